//! A simulated CUDA driver: runs PTX on the CPU, checks it like a sanitizer and counts its work like a profiler.
//!
//! Data flow: PTX text -> `ptx` (a tree) -> `compile` (a compact program, everything unknown refused)
//! -> `exec` (blocks over host threads, warps 32 lanes at a time) -> [`LaunchReport`] or [`Fault`].
//!
//! - [`arch`]: limits and data sheets of the GPUs that can be simulated.
//! - [`device`]: memory, modules, launches: what a driver needs.
//! - [`options`]: which checks run, the seed of the schedule, the budget.
//! - [`error`]: load errors, memory errors, faults with CUDA error codes.
//! - [`counters`]: what a launch did, and the least time a data sheet allows for it.
//! - [`tensor_map`]: the 128-byte descriptors of tensor copies.
//! - [`case`]: directories with a kernel, its inputs and expected outputs.
#![warn(missing_docs)]

pub mod arch;
pub mod case;
mod compile;
pub mod counters;
pub mod device;
pub mod error;
mod exec;
mod lanes;
mod memory;
mod numeric;
pub mod options;
mod program;
mod ptx;
pub mod tensor_map;

pub use arch::Arch;
pub use counters::{Counters, LaunchReport};
pub use device::{Device, Function, LaunchConfig, Module, Param};
pub use error::{Fault, FaultClass, LoadError, MemoryError, Report};
pub use memory::Leak;
pub use options::{Options, Sanitizer};
