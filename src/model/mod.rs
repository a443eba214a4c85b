//! The diffusion transformer: sizes (`config`), fixed positions (`embed`), arithmetic (`flops`) and main memory (`memory`) of a step,
//! one block (`block`), the whole (`dit`), and that in plain loops (`reference`).

pub mod block;
pub mod config;
pub mod dit;
pub mod embed;
pub mod flops;
pub mod memory;
pub mod reference;
