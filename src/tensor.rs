//! A shape and its numbers.

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

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    /// Whether a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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

/// Row-major f32 numbers with a shape. Invariant: `data.len() == shape.len()`.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The sizes.
    pub shape: Shape,
    /// The numbers, last dimension contiguous.
    pub data: Vec<f32>,
}
