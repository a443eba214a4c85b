//! The CPU: products (`tile` for large ones, `gemm` for the rest), vectorised loops (`simd`) per-thread scratch memory (`scratch`), and where
//! the time goes (`profile`).

pub mod aligned;
pub mod linear;
pub mod pack;
pub mod profile;
pub mod scratch;
pub mod shared;
pub mod simd;
pub mod tile;
