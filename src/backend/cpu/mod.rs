//! The CPU: products (`tile` has their kernels, `pack` and `split` lay operands out for them, `packed` chooses between the two, `linear`
//! has the layers without windows), vectorised loops (`simd`), scratch memory of a thread (`scratch`), threads between loops
//! (`threads`), and where the time goes (`profile`).

pub mod aligned;
pub mod linear;
pub mod pack;
pub mod packed;
pub mod profile;
pub mod scratch;
pub mod shared;
pub mod simd;
pub mod split;
pub mod threads;
pub mod tile;
