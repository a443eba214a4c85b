//! Numbers of which several threads write different parts, where the parts are no chunks.

use super::simd::{LINE, fetch};
use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice that is handed out in parts.
pub struct Shared<'a> {
    data: *mut f32,
    len: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: `slice` is only called for parts that no other thread has, see its contract.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// All of `data`.
    pub fn new(data: &'a mut [f32]) -> Self {
        Shared { data: data.as_mut_ptr(), len: data.len(), of: PhantomData }
    }

    /// Fetches a part into the second cache before it is written, except what it has of a last cache line, as in
    /// [`super::simd::fetch_rows`].
    #[inline]
    pub fn fetch(&self, range: Range<usize>) {
        for at in range.step_by(LINE) {
            fetch(self.data.wrapping_add(at));
        }
    }

    /// Whether the first number starts a cache line.
    pub fn starts_line(&self) -> bool {
        self.data.addr().is_multiple_of(LINE * size_of::<f32>())
    }

    /// # Safety
    /// Nobody else may hold any of these numbers for as long as the result lives.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one borrow, by the contract")]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "a part outside of its data");
        // SAFETY: in bounds of a slice that stays mutably borrowed; unshared by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}
