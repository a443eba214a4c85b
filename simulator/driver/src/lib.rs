//! The CUDA driver's calls over the simulator `cuda-sim`: what `libcuda.so` is made of.
//!
//! Data flow: a call -> [`abi`] (null pointers, panics) -> [`state`] (handles, the sticky error) -> for work on a
//! stream [`work`] (run now, or written down by [`capture`]) -> the simulated device; what it finds -> [`report`].
//!
//! Work runs before the call that asks for it returns. Issue order is one of the orders that streams and events allow,
//! so results are those of a correct program; a missing synchronisation between streams is not found.
//!
//! - [`config`]: every environment variable, in one place.
//! - [`device`], [`context`], [`memory`], [`pool`], [`module`], [`launch`], [`stream`], [`event`], [`capture`], [`graph`],
//!   [`occupancy`], [`tensor`], [`errors`], [`entry`]: the calls, by the chapters of the driver's manual.
//! - [`unsupported`]: all other calls; each is an error that names it.
#![warn(missing_docs)]

pub mod abi;
pub mod capture;
pub mod config;
pub mod context;
pub mod device;
pub mod entry;
pub mod errors;
pub mod event;
pub mod graph;
pub mod launch;
pub mod memory;
pub mod module;
pub mod occupancy;
pub mod pool;
pub mod report;
pub mod state;
pub mod stream;
pub mod tensor;
pub mod unsupported;
pub mod work;
