//! The diffusion process: noise schedules, the training loss and its gradient, loss weights, samplers.
//!
//! ```text
//! schedule    betas and everything derived from them, for all timesteps or a subset (respacing)
//! prediction  what a model predicts: noise, v or the velocity of a flow
//! timesteps   which timesteps a batch draws
//! weighting   how much each timestep counts
//! loss        x_start, noise, t, model output -> mse, vb, loss and the gradient with respect to the model output
//! sampler     noise -> image, DDPM, DDIM or DPM-Solver++(2M), with classifier-free guidance
//! reference   the formulas as plain loops: the specification
//! ```
//!
//! All per-element mathematics is f64 and is rounded to f32 once, at the end; guidance rounds too: what it makes is a model's answer then.

pub mod loss;
pub mod prediction;
pub mod reference;
pub mod sampler;
pub mod schedule;
pub mod timesteps;
pub mod weighting;

pub use loss::{ImageDims, LossTerms, losses, q_sample};
pub use prediction::Prediction;
pub use sampler::{Method, Sampler};
pub use schedule::{Schedule, ScheduleKind, sampling_timesteps, space_timesteps};
pub use timesteps::Timesteps;
pub use weighting::LossWeight;
