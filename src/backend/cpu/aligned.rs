//! Numbers that start at a cache line: a vector of 512 bits that straddles two lines costs a second access.

use super::simd::LINE;
use memmap2::MmapMut;

/// Bytes of a large page of x86-64.
#[cfg(any(target_os = "linux", test))]
const LARGE_PAGE: usize = 2 << 20;

/// Numbers that start at a cache line; a slice in all else. Their room is fixed when they are made.
pub struct AlignedVec {
    room: Room,
    start: usize,
    len: usize,
    capacity: usize,
}

enum Room {
    Heap(Vec<f32>),
    Pages(MmapMut),
}

impl AlignedVec {
    /// None.
    pub const fn new() -> Self {
        AlignedVec { room: Room::Heap(Vec::new()), start: 0, len: 0, capacity: 0 }
    }

    /// `len` zeros. Of many, the system makes each page when it is first touched: those that never are cost nothing.
    pub fn zeros(len: usize) -> Self {
        if let Some((pages, start)) = large_pages(len) {
            return AlignedVec { room: Room::Pages(pages), start, len, capacity: len };
        }
        // Not lines in the type: room of such an alignment is not had from the system zeroed, but filled here, page by page.
        let room = vec![0.0; len + LINE - 1];
        let start = room.as_ptr().align_offset(LINE * size_of::<f32>());
        AlignedVec { room: Room::Heap(room), start, len, capacity: len }
    }

    /// Numbers that it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it `len` numbers, at most its capacity: the first ones of its room.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} numbers in room for {}", self.capacity());
        self.len = len;
    }
}

impl Default for AlignedVec {
    fn default() -> Self {
        Self::new()
    }
}

/// Pages of zeros, and the number at which `len` of them start: large pages, and behind them small ones for what does not fill one.
/// None of few, and where the system has none.
///
/// The rows of a matrix, each on a small page of its own, are more than a processor remembers where to find. Measured (2 cores of an
/// Intel Xeon with AVX-512): a step of digits takes 4 % less time, one of DiT-S/4 5 %, one of DiT-S/2 2 %.
#[cfg(target_os = "linux")]
fn large_pages(len: usize) -> Option<(MmapMut, usize)> {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let bytes = len.checked_mul(size_of::<f32>())?;
    if bytes < LARGE_PAGE {
        return None;
    }
    let first = first_number(COUNT.fetch_add(1, Relaxed));
    let bytes = bytes.checked_add(first * size_of::<f32>())?;
    // Room to start anywhere; what is not touched is not there.
    let pages = MmapMut::map_anon(bytes.checked_add(LARGE_PAGE)?).ok()?;
    let start = pages.as_ptr().align_offset(LARGE_PAGE);
    // Where it is refused the pages are small.
    let _ = pages.advise_range(memmap2::Advice::HugePage, start, bytes / LARGE_PAGE * LARGE_PAGE);
    Some((pages, start / size_of::<f32>() + first))
}

/// At which number of its first page array `count` starts: far from where those before it do in theirs.
///
/// Loops go through arrays side by side. Lines at the same place of their pages fall into the same set of the first cache, and if a
/// hash of more bits of their addresses agrees too, a processor may take one for the other, and each pushes the other out (Lipp et
/// al., Take A Way: Exploring the Security Implications of AMD's Cache Way Predictors, 2020). Measured (2 cores of an AMD EPYC with
/// AVX2): AdamW of DiT-S/4 takes 0.54 of the time, with one thread 0.33.
#[cfg(target_os = "linux")]
fn first_number(count: usize) -> usize {
    const LINES: usize = 4096 / (LINE * size_of::<f32>()); // of a page
    // Any seven in a row are as far from each other.
    const STEP: usize = 9;
    count.wrapping_mul(STEP) % LINES * LINE
}

#[cfg(not(target_os = "linux"))]
fn large_pages(_: usize) -> Option<(MmapMut, usize)> {
    None
}

impl Clone for AlignedVec {
    fn clone(&self) -> Self {
        Self::from(&self[..])
    }
}

impl std::ops::Deref for AlignedVec {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let numbers = match &self.room {
            Room::Heap(room) => room,
            Room::Pages(pages) => bytemuck::cast_slice(pages),
        };
        &numbers[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedVec {
    fn deref_mut(&mut self) -> &mut [f32] {
        let numbers = match &mut self.room {
            Room::Heap(room) => room,
            Room::Pages(pages) => bytemuck::cast_slice_mut(pages),
        };
        &mut numbers[self.start..self.start + self.len]
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
        let large = LARGE_PAGE / size_of::<f32>();
        for len in [0, 1, 15, 16, 17, 1000, large - 1, large, large + 1, 3 * large + 5] {
            assert!(AlignedVec::zeros(len).iter().all(|&x| x == 0.0));
            let numbers: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let mut aligned = AlignedVec::from(&numbers[..]);
            assert_eq!(aligned.as_ptr().align_offset(64), 0);
            assert_eq!(*aligned, numbers[..]);
            let copy = aligned.clone();
            assert_eq!((copy.as_ptr().align_offset(64), &copy[..]), (0, &numbers[..]));
            aligned.fill(1.0);
            assert_eq!((aligned.iter().sum::<f32>(), aligned.len()), (len as f32, len));
            aligned.set_len(len / 2);
            assert_eq!((aligned.len(), aligned.capacity()), (len / 2, len));
            aligned.set_len(len);
            assert_eq!(aligned.iter().sum::<f32>(), len as f32);
        }
        assert!(AlignedVec::new().is_empty() && AlignedVec::new().capacity() == 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn arrays_in_a_row_start_far_from_each_other_in_their_pages() {
        const PAGE: usize = 4096 / size_of::<f32>();
        for count in [0, 1, 63, usize::MAX - 2] {
            let mut starts = [0, 1, 2, 3, 4, 5, 6].map(|i| first_number(count.wrapping_add(i)));
            starts.sort();
            let next = starts[1..].iter().copied().chain([starts[0] + PAGE]);
            let gaps = starts.iter().zip(next).map(|(start, next)| next - start);
            assert!(gaps.min().is_some_and(|gap| gap >= 9 * LINE), "{starts:?} of {PAGE} numbers");
        }
        // Other tests make some meanwhile, so that these need not be in a row.
        let arrays = [(); 8].map(|_| AlignedVec::zeros(LARGE_PAGE / size_of::<f32>()));
        let places = arrays.each_ref().map(|array| array.as_ptr().addr() % 4096);
        assert!(places.iter().any(|place| *place != places[0]), "all start at {places:?}");
    }

    #[test]
    #[should_panic(expected = "11 numbers in room for 10")]
    fn more_than_there_is_room_for() {
        AlignedVec::zeros(10).set_len(11);
    }
}
