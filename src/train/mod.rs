//! Training: configuration, checkpoints, metrics, and the loop that ties them together.
//!
//! ```text
//! trainer       the loop: draws, steps, lines of metrics, checkpoints, samples
//! ├─ setup      data, device, model and memory, before the first step (plan: memory and launches of a device)
//! ├─ batches    which samples, timesteps, noise and labels a step has
//! ├─ learner    weights and what changes them: gradients (pass), objective, update (optimizer)
//! │  └─ device  the same on a CUDA device
//! ├─ validation the loss of the moving average (average) on samples that are held out
//! ├─ samples    a grid of the moving average
//! ├─ metrics    lines and TensorBoard's events (events), the curve of the loss (plot)
//! └─ state      what a checkpoint holds (checkpoint: the files; weights: those of others; resume: going on; changes: with other settings)
//! config        every knob; run_dir: where files are; progress: the bar; timing: steps for bench
//! ```

mod average;
mod batches;
pub(crate) mod changes;
pub mod checkpoint;
pub mod config;
pub mod device;
mod events;
pub mod learner;
pub mod metrics;
pub mod optimizer;
mod pass;
pub mod plan;
pub mod plot;
pub mod progress;
pub mod resume;
pub mod run_dir;
pub mod samples;
pub mod setup;
pub(crate) mod state;
pub mod timing;
pub mod trainer;
pub(crate) mod validation;
pub mod weights;

pub use config::TrainConfig;
pub use run_dir::RunDir;
