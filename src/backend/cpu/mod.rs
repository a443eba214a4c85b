//! The CPU: products (`tile` for large ones, `gemm` for the rest), vectorised loops (`simd`) and per-thread scratch memory (`scratch`).

pub mod gemm;
pub mod scratch;
pub mod simd;
pub mod tile;
