//! The CPU: products (`tile` is their kernel, `pack` its operands, `linear` the layers without windows), vectorised loops
//! (`simd`), scratch memory of a thread (`scratch`), threads between loops (`threads`), and where the time goes (`profile`).

pub mod aligned;
pub mod linear;
pub mod pack;
pub mod profile;
pub mod scratch;
pub mod shared;
pub mod simd;
pub mod threads;
pub mod tile;
