//! Diffusion transformers with Denoising Task Routing.
