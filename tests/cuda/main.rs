//! The CUDA kernels against their references: on the simulated driver, or with `DTR_REQUIRE_CUDA=1` on a GPU.

mod common;
mod launch;
