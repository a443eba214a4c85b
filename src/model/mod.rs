//! The diffusion transformer: sizes (`config`), fixed positions (`embed`), one block (`block`), the whole (`dit`).

pub mod block;
pub mod config;
pub mod dit;
pub mod embed;
