//! Diffusion transformers (DiT) with Denoising Task Routing (DTR; Park et al., ICLR 2024, arXiv 2310.07138).

pub mod atomic_file;
pub mod autograd;
pub mod backend;
pub mod cli;
pub mod data;
pub mod diffusion;
pub mod element;
pub mod error;
pub mod generate;
pub mod model;
pub mod ops;
pub mod params;
pub mod parity;
pub mod picture;
pub mod rng;
pub mod routing;
pub mod safetensors_file;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
