//! The CPU: products (`gemm`), vectorised loops (`simd`) and per-thread scratch memory (`scratch`).

pub mod gemm;
pub mod scratch;
pub mod simd;
