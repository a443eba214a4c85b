//! Diffusion transformers (DiT) with Denoising Task Routing (DTR; Park et al., ICLR 2024, arXiv 2310.07138).

pub mod atomic_file;
pub mod data;
pub mod element;
pub mod error;
pub mod picture;
pub mod rng;
pub mod safetensors_file;

pub use error::{Error, Result};
