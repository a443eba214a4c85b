//! CUDA: libraries found at run time, kernels compiled by NVRTC and kept on disk, launches checked against the kernels'
//! signatures. The only place that names cudarc.
//!
//! ```text
//! library   libcuda and NVRTC: where they are, and a sentence when they are not
//! nvrtc     kernel text -> CUBIN and PTX;  cache: the same, from disk
//! launch    a kernel's name and arguments against its signature
//! device    context, stream, launches;  memory, graph, clock: what else it does
//! transfer  copies that do not stop the host: the next inputs, the last results
//! arena     one block of device memory, cut into the buffers of a step
//! ```

pub mod arena;
pub(crate) mod cache;
pub mod clock;
pub mod device;
mod graph;
pub mod launch;
mod library;
mod memory;
pub mod nvrtc;
pub(crate) mod transfer;

pub use super::dtype::DType;
/// The version of cudarc whose contexts, streams and slices [`Device`] takes.
pub use cudarc;
pub use device::Device;
pub use graph::Graph;
pub use launch::{Arg, Launch};
pub use library::load_driver;
pub use memory::{Allocation, Element};

/// Numbers in device memory, owned by somebody else: an address, how many they are, and their type.
///
/// Like a raw pointer it may be kept longer than what it points to. So making, copying and cutting one is harmless, and safe; what has
/// the device read or write there is `unsafe`: [`Device::launch`], [`Device::replay`] and the operations in `ops::*::cuda`. Whoever calls
/// these promises of every buffer that is given, and not left out, that
///
/// - all its numbers are memory of the device's context, and stay it until the work is done. An [`Allocation`] of the same device may
///   be dropped before: its memory is given back in the order of the stream.
/// - what is written overlaps nothing else that is given, unless it is said to, and nobody else uses it meanwhile, on another stream say.
///
/// What takes an [`Allocation`] is safe: it holds its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub(crate) address: u64, // of the first number
    pub(crate) len: usize,
    pub(crate) dtype: DType,
}

impl Buffer {
    /// `len` numbers at a device address.
    pub const fn from_raw(address: u64, len: usize, dtype: DType) -> Self {
        Buffer { address, len, dtype }
    }

    /// Device address of the first number.
    pub fn address(self) -> u64 {
        self.address
    }

    /// How many numbers there are.
    #[expect(clippy::len_without_is_empty, reason = "a buffer without numbers is Buffer::none")]
    pub fn len(self) -> usize {
        self.len
    }

    /// Their type.
    pub fn dtype(self) -> DType {
        self.dtype
    }

    /// No buffer, for arguments that may be left out: a null pointer.
    pub const fn none(dtype: DType) -> Self {
        Buffer { address: 0, len: 0, dtype }
    }

    /// Whether this is [`Buffer::none`].
    pub fn is_none(self) -> bool {
        self.address == 0
    }

    /// The numbers `range`.
    ///
    /// # Panics
    /// When they are not all in the buffer.
    pub fn slice(self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a buffer of {}", self.len);
        Buffer {
            address: self.address.wrapping_add((range.start * self.dtype.bytes()) as u64),
            len: range.end - range.start,
            dtype: self.dtype,
        }
    }
}
