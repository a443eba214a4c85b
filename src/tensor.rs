//! A shape and its numbers.

use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::Buffer;

/// Sizes of up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The sizes as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements; `usize::MAX` where it cannot be counted, which is the length of no memory.
    pub fn len(&self) -> usize {
        self.dims().iter().fold(1, |len: usize, &size| len.saturating_mul(size))
    }

    /// Whether a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.dims().contains(&0)
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(sizes: [usize; N]) -> Self {
        const { assert!(N <= 4) };
        let mut dims = [1; 4];
        dims[..N].copy_from_slice(&sizes);
        Shape { dims, rank: N }
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.dims().fmt(f)
    }
}

/// Row-major numbers with a shape, last dimension contiguous. Invariant: there are `shape.len()` of them,
/// or none any more.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// The sizes.
    pub(crate) shape: Shape,
    /// The numbers.
    pub(crate) data: Storage,
}

/// Where numbers are: one of two devices.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// f32 in main memory.
    Cpu(AlignedVec),
    /// Memory of a CUDA device, owned by the arena of the tape.
    Cuda(Buffer),
}

impl Storage {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Storage::Cpu(data) => data.len(),
            Storage::Cuda(buffer) => buffer.len,
        }
    }

    /// The numbers in main memory.
    ///
    /// # Panics
    /// When they are on a CUDA device: read them with [`Tape::read`](crate::autograd::Tape::read).
    pub(crate) fn cpu(&self) -> &[f32] {
        match self {
            Storage::Cpu(data) => data,
            Storage::Cuda(_) => panic!("these numbers are on a CUDA device: read them with Tape::read"),
        }
    }

    /// The numbers on a CUDA device.
    ///
    /// # Panics
    /// When they are in main memory.
    pub(crate) fn cuda(&self) -> Buffer {
        match self {
            Storage::Cuda(buffer) => *buffer,
            Storage::Cpu(_) => panic!("these numbers are in main memory, not on a CUDA device"),
        }
    }
}

impl From<AlignedVec> for Storage {
    fn from(data: AlignedVec) -> Self {
        Storage::Cpu(data)
    }
}

impl From<Buffer> for Storage {
    fn from(buffer: Buffer) -> Self {
        Storage::Cuda(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_whose_product_cannot_be_counted_are_not_taken_for_few() {
        assert_eq!(Shape::from([2, 3, 4]).len(), 24);
        assert_eq!(Shape::from([1 << 32, 1 << 32, 3]).len(), usize::MAX);
        let empty = Shape::from([1 << 32, 1 << 32, 0]);
        assert_eq!((empty.len(), empty.is_empty()), (0, true));
    }
}
