//! Numbers that start at a cache line: a vector of 512 bits that straddles two lines costs a second access.

/// f32s of a cache line.
const LINE: usize = 16;

/// Numbers that start at a cache line. Their count is fixed when they are made; it is a slice in all else.
#[derive(Default)]
pub struct AlignedVec {
    room: Vec<f32>,
    start: usize,
    len: usize,
}

impl AlignedVec {
    /// None.
    pub const fn new() -> Self {
        AlignedVec { room: Vec::new(), start: 0, len: 0 }
    }

    /// `len` zeros. Of many, the system makes each page when it is first touched: those that never are cost nothing.
    pub fn zeros(len: usize) -> Self {
        // Not lines in the type: room of such an alignment is not had from the system zeroed, but filled here, page by page.
        let room = vec![0.0; len + LINE - 1];
        let start = room.as_ptr().align_offset(LINE * size_of::<f32>());
        AlignedVec { room, start, len }
    }
}

impl Clone for AlignedVec {
    fn clone(&self) -> Self {
        Self::from(&self[..])
    }
}

impl std::ops::Deref for AlignedVec {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.room[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedVec {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.room[self.start..self.start + self.len]
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
            let copy = aligned.clone();
            assert_eq!((copy.as_ptr().align_offset(64), &copy[..]), (0, &numbers[..]));
            aligned.fill(1.0);
            assert_eq!(aligned.iter().sum::<f32>(), len as f32);
        }
        assert!(AlignedVec::new().is_empty() && AlignedVec::zeros(5).iter().all(|&x| x == 0.0));
    }
}
