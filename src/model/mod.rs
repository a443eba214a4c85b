//! The diffusion transformer: sizes (`config`), fixed positions (`embed`), arithmetic (`flops`) and main memory (`memory`) of a step,
//! one block (`block`), the whole (`dit`), how small ones share out a batch (`halves`), and the model in
//! plain loops (`reference`).

pub mod block;
pub mod config;
pub mod dit;
pub mod embed;
pub mod flops;
pub(crate) mod halves;
pub mod memory;
pub mod reference;
