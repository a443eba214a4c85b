//! What computes: nothing here knows of diffusion or transformers.

pub mod cpu;
pub mod cuda;
