//! `libcuda.so`: every exported call is in the library crate.

pub use cuda_sim_driver::*;
