//! Numbers that start at a cache line: a vector of 512 bits that straddles two lines costs a second access.

use bytemuck::{Pod, Zeroable};

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

// SAFETY: zeros are f32 zeros.
unsafe impl Zeroable for Line {}
// SAFETY: 16 f32 of 4 bytes fill 64 bytes, the alignment, so there is no padding; every pattern of bits is an f32.
unsafe impl Pod for Line {}

/// Numbers that start at a cache line. Their count is fixed when they are made; it is a slice in all else.
#[derive(Clone, Default)]
pub struct AlignedVec {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedVec {
    /// None.
    pub const fn new() -> Self {
        AlignedVec { lines: Vec::new(), len: 0 }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        AlignedVec { lines: vec![Line([0.0; LINE]); len.div_ceil(LINE)], len }
    }
}

impl std::ops::Deref for AlignedVec {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl std::ops::DerefMut for AlignedVec {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl From<&[f32]> for AlignedVec {
    fn from(numbers: &[f32]) -> Self {
        let mut copy = AlignedVec::zeros(numbers.len());
        copy.copy_from_slice(numbers);
        copy
    }
}

impl std::fmt::Debug for AlignedVec {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_start_at_a_cache_line() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let numbers: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let mut aligned = AlignedVec::from(&numbers[..]);
            assert_eq!(aligned.as_ptr().align_offset(64), 0);
            assert_eq!(*aligned, numbers[..]);
            aligned.fill(1.0);
            assert_eq!(aligned.iter().sum::<f32>(), len as f32);
        }
        assert!(AlignedVec::new().is_empty() && AlignedVec::zeros(5).iter().all(|&x| x == 0.0));
    }
}
