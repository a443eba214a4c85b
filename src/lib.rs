//! Diffusion transformers (DiT) with Denoising Task Routing (DTR; Park et al., ICLR 2024, arXiv 2310.07138).
//!
//! DTR gives every diffusion timestep its own window of channels. Here the window is part of the operations: what it leaves
//! out is not computed, forward or backward, and the result is that of masking and computing everything, but for rounding.
//!
//! ```text
//! data ──> train::learner ──> model::dit ──> model::block ──> ops ──> backend::{cpu, cuda}
//!            │  ▲                 │ windows of t                │
//!            │  │ loss, gradient  └── routing                   └── autograd (tape)
//!            │  └── diffusion
//!            └──> train::checkpoint ──> generate ──> picture, data::npz
//! ```
//!
//! [`train::trainer::start_on`] trains on a data set of one's own, with checkpoints and all that goes with them; `examples/train_on_cpu.rs`
//! has a loop of its own around a model, and samples from it; one operation on a tape is shown at
//! [`autograd::Tape`], and `examples/fused_ops.rs` calls kernels on CUDA memory of one's own.

#![cfg_attr(not(feature = "cli"), allow(dead_code, reason = "some things only the command line uses"))]

// The idea: which channels are active at which timestep.
pub mod routing;

// The model and what it is made of.
pub mod autograd;
pub mod backend;
pub mod model;
pub mod ops;
pub mod params;
pub mod tensor;

// Diffusion: noise schedules, losses, samplers; random numbers; whole samples from a model.
pub mod diffusion;
pub mod generate;
pub mod rng;

// Training: data in, a run's directory out; and comparing with other implementations.
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod parity;
pub mod train;

// Files: safetensors in, pictures out, nothing half-written.
pub mod atomic_file;
pub mod element;
pub mod picture;
mod regular_file;
pub mod safetensors_file;
mod system_memory;

// What all of them use.
mod choice;
pub mod error;

pub use error::{Error, Result};
