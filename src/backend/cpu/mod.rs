//! The CPU: products (`tile`, and `linear` for layers without windows), vectorised loops (`simd`), scratch memory of a thread
//! (`scratch`), and where the time goes (`profile`).

pub mod aligned;
pub mod linear;
pub mod pack;
pub mod profile;
pub mod scratch;
pub mod shared;
pub mod simd;
pub mod tile;
