//! Matrix products by tiles that stay in registers: the kernels, and the layouts they read.
//!
//! ```text
//! A   up to `tile_rows()` rows, at any two distances: see `Rows`
//! B   32 columns of a row-major matrix, or a panel: element (inner k, column j) at k * stride + j
//! C   a tile of rows x 32 in a small buffer; what to do with it is the caller's epilogue
//! ```
//!
//! A range of the inner dimension is a sub-slice of both operands, so a window of input channels needs no packing of its
//! own, and neither does a window of output channels (a range of panels, to the half). Every element of C is one chain of
//! additions in the order of k: the result depends on the operands alone, neither on the threads nor on the tile.

use super::pack::interleave;
use super::simd::{Level, level, simd_fn};
use std::marker::PhantomData;

/// Columns of a panel of B, and of a tile.
pub const PANEL: usize = 32;
/// Columns of half a panel: what a tile is rounded to.
pub const HALF: usize = PANEL / 2;
/// Distance between the rows of a matrix of at most 128 columns: 9 cache lines, so that the rows of a tile fall into different
/// sets of the cache.
pub const STRIP: usize = 144;
/// Most rows of a tile, of all processors.
pub const MAX_ROWS: usize = 14;

/// Rows of a tile on this processor: as many as its registers hold.
#[inline]
pub fn tile_rows() -> usize {
    match level() {
        Level::Avx512 => MAX_ROWS,
        Level::Avx2 | Level::Baseline => 6,
    }
}

/// Panels that hold `columns`.
#[inline]
pub fn panels(columns: usize) -> usize {
    columns.div_ceil(PANEL)
}

/// Distance for rows of `len` numbers in scratch memory.
///
/// The rows of a tile are read side by side. At a multiple of 4 KB they would all fall into one set of the first cache, which
/// holds 8 lines: a product took 1.3 times as long.
#[inline]
pub fn line_stride(len: usize) -> usize {
    const WORST: usize = 4096 / size_of::<f32>();
    if len.is_multiple_of(WORST) { len + HALF } else { len }
}

/// Splits `rows` into as few tiles as there can be, all of about one size.
pub fn row_tiles(rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> + Clone {
    let count = rows.div_ceil(tile_rows());
    (0..count).map(move |i| i * rows / count..(i + 1) * rows / count)
}

/// Calls `$kernel::<ROWS, ..>` with the number of rows as a constant.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident::<$other:tt> $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => $kernel::<$n, $other> $args,)*
            _ => unreachable!("more rows than a tile has"),
        }
    };
}

/// The result of a kernel: row i is `rows[i]`, of which only the columns asked for are defined.
#[repr(align(64))]
pub struct Tile {
    /// `[rows, PANEL]`
    pub rows: [[f32; PANEL]; MAX_ROWS],
}

impl Tile {
    /// A tile of zeros.
    pub fn new() -> Self {
        Tile { rows: [[0.0; PANEL]; MAX_ROWS] }
    }
}

impl Default for Tile {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies the first numbers of a row of a tile. Whole rows, the rule, need no call.
#[inline(always)]
pub fn copy_row(to: &mut [f32], row: &[f32; PANEL]) {
    match <&mut [f32; PANEL]>::try_from(&mut *to) {
        Ok(to) => *to = *row,
        Err(_) => to.copy_from_slice(&row[..to.len()]),
    }
}

simd_fn! {
    /// Adds the first `width` columns of `rows` rows to lines that are `stride` apart.
    pub fn add_tile<F>(to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize) {
        for (to, row) in to.chunks_mut(stride).zip(&tile.rows).take(rows) {
            if let Ok(to) = <&mut [f32; PANEL]>::try_from(&mut to[..width]) {
                for j in 0..PANEL {
                    to[j] += row[j];
                }
            } else {
                for (to, sum) in to[..width].iter_mut().zip(row) {
                    *to += sum;
                }
            }
        }
    }
}

simd_fn! {
    /// Writes the first `width` columns of `rows` rows to lines that are `stride` apart.
    pub fn write_tile<F>(to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize) {
        for (i, row) in tile.rows[..rows].iter().enumerate() {
            copy_row(&mut to[i * stride..][..width], row);
        }
    }
}

simd_fn! {
    /// Writes (`add`: adds) the first `width` columns of `rows` rows as lines: column j to `to[j * stride..][..rows]`.
    pub fn write_transposed<F>(to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize, add: bool) {
        let mut columns = Columns([[0.0; HALF]; PANEL]);
        interleave(columns.0.as_flattened_mut(), HALF, tile.rows.as_flattened(), rows, width, PANEL);
        let columns = &columns.0[..width];
        if add {
            by_rows!(rows, narrow::<true>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
        } else {
            by_rows!(rows, narrow::<false>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
        }
    }
}

/// A transposed tile.
#[repr(align(64))]
struct Columns([[f32; HALF]; PANEL]);

/// Writes the first `N` numbers of each column; a constant length needs no call.
#[inline(always)]
fn narrow<const N: usize, const ADD: bool>(to: &mut [f32], columns: &[[f32; HALF]], stride: usize) {
    for (to, column) in to.chunks_mut(stride).zip(columns) {
        let to = to.first_chunk_mut::<N>().expect("a line holds the rows of a tile");
        for i in 0..N {
            to[i] = if ADD { to[i] + column[i] } else { column[i] };
        }
    }
}

/// Writes tiles past the caches, which then need not read the lines first: for results too large to stay there. What was
/// written is there when this is dropped; it stays on its thread, since a fence is of the thread that wrote.
pub struct Streams(PhantomData<*const ()>);

impl Streams {
    /// For a result of `len` numbers that are read after all of them have been written, if it is large enough.
    pub fn of(len: usize) -> Option<Streams> {
        // Measured: 12 MB gain 3 % of a forward pass, 3 MB nothing; much less is read back from a cache.
        const LARGE: usize = (8 << 20) / size_of::<f32>();
        (len >= LARGE).then_some(Streams(PhantomData))
    }

    /// As [`write_tile`]. Rows that do not start at cache lines are written through the caches.
    ///
    /// # Safety
    /// Until `self` is dropped, nobody, this thread included, may access what was written.
    #[inline]
    pub unsafe fn write_tile(&self, to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize) {
        #[cfg(target_arch = "x86_64")]
        if width == PANEL
            && stride >= PANEL
            && stride.is_multiple_of(HALF)
            && to.as_ptr().addr().is_multiple_of(64)
            && level() == Level::Avx512
        {
            for (line, row) in to.chunks_mut(stride).zip(&tile.rows[..rows]) {
                // SAFETY: the processor has AVX-512; each line starts at a cache line, since the first does and they are a
                // multiple of 16 numbers apart; nobody reads them before the fence, by this function's contract.
                unsafe { avx512::stream(line.first_chunk_mut().expect("a line holds a panel"), row) };
            }
            return;
        }
        write_tile(to, tile, rows, width, stride);
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

/// How the rows of A lie in memory: element (row i, inner k) at `i * row + k * inner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    row: usize,
    inner: usize,
}

impl Rows {
    /// Rows side by side: (i, k) at `k * stride + i`.
    pub fn interleaved(stride: usize) -> Rows {
        Rows { row: 1, inner: stride }
    }

    /// Rows of a row-major matrix: (i, k) at `i * stride + k`.
    pub fn lines(stride: usize) -> Rows {
        Rows { row: stride, inner: 1 }
    }
}

/// A part of the inner dimension: `len` elements of rows of A and of a panel of B.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Rows, in the layout the call names.
    pub a: &'a [f32],
    /// Rows of a matrix or of a panel, from the first column asked for.
    pub b: &'a [f32],
    /// Inner elements.
    pub len: usize,
}

/// `tile[i, j] = sum over segments and their k of a[i, k] b[k, j]` for `rows` rows and `halves` times 16 columns; `stride` is
/// the distance between the rows of B: [`PANEL`] in a panel.
#[inline]
pub fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, stride: usize, segments: &[Segment]) {
    assert!((1..=tile_rows()).contains(&rows) && (1..=2).contains(&halves));
    for &Segment { a, b, len } in segments {
        // Saturated, so that no stride wraps round to a place inside: no slice is that long.
        let before = len.saturating_sub(1);
        let last = (rows - 1).saturating_mul(layout.row).saturating_add(before.saturating_mul(layout.inner));
        let end = before.saturating_mul(stride).saturating_add(halves * HALF);
        assert!(len == 0 || last < a.len() && end <= b.len(), "an operand is too short");
    }
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the processor has the features; rows, halves and the segments' lengths were checked above.
        Level::Avx512 => return unsafe { avx512::multiply(tile, rows, halves, layout, stride, segments) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { avx2::multiply(tile, rows, halves, layout, stride, segments) },
        Level::Baseline => {}
    }
    plain::multiply(tile, rows, halves, layout, stride, segments);
}

/// The kernel for one vector type: `ROWS` rows and `VECTORS` vectors of columns, from the column `first` of B and of the tile.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_kernel {
    ($features:literal, $lanes:literal, $vector:ty, $zero:ident, $load:ident, $splat:ident, $fma:ident, $store:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn kernel<const ROWS: usize, const VECTORS: usize>(
            tile: &mut Tile,
            first: usize,
            layout: Rows,
            stride: usize,
            segments: &[Segment],
        ) {
            let mut sums: [[$vector; VECTORS]; ROWS] = [[$zero(); VECTORS]; ROWS];
            for segment in segments {
                let (mut a, mut b) = (segment.a.as_ptr(), segment.b.as_ptr().wrapping_add(first));
                for _ in 0..segment.len {
                    let mut row = a;
                    // SAFETY: `multiply` checked the last element that these reach; the pointers move past it only after the
                    // last row and round, by wrapping arithmetic.
                    unsafe {
                        let columns: [$vector; VECTORS] = std::array::from_fn(|v| $load(b.add(v * $lanes)));
                        for sums in &mut sums {
                            let factor = $splat(*row);
                            for v in 0..VECTORS {
                                sums[v] = $fma(factor, columns[v], sums[v]);
                            }
                            row = row.wrapping_add(layout.row);
                            // Keeps the compiler from loading all rows first, for which there are not enough registers: the
                            // sums would go to memory and back in every round, which takes twice as long.
                            std::arch::asm!("", options(nostack, preserves_flags));
                        }
                    }
                    a = a.wrapping_add(layout.inner);
                    b = b.wrapping_add(stride);
                }
            }
            // By index: iterators here put the sums into memory in the loop above.
            for i in 0..ROWS {
                for v in 0..VECTORS {
                    // SAFETY: the columns asked for lie inside of a row.
                    unsafe { $store(tile.rows[i].as_mut_ptr().add(first + v * $lanes), sums[i][v]) };
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{PANEL, Rows, Segment, Tile};
    use std::arch::x86_64::{
        __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_stream_ps,
    };

    /// # Safety
    /// The processor has AVX-512F; `to` starts at a cache line, and nobody accesses it before this thread's next fence.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn stream(to: &mut [f32; PANEL], row: &[f32; PANEL]) {
        for v in (0..PANEL).step_by(16) {
            // SAFETY: in bounds; aligned by the contract.
            unsafe { _mm512_stream_ps(to.as_mut_ptr().add(v), _mm512_loadu_ps(row.as_ptr().add(v))) };
        }
    }

    /// # Safety
    /// The processor has AVX-512F; `rows`, `halves` and the segments are as [`super::multiply`] checks.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn multiply(
        tile: &mut Tile,
        rows: usize,
        halves: usize,
        layout: Rows,
        stride: usize,
        segments: &[Segment],
    ) {
        // SAFETY: the contract is the same.
        unsafe {
            match halves {
                1 => {
                    by_rows!(rows, kernel::<1> (tile, 0, layout, stride, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
                _ => {
                    by_rows!(rows, kernel::<2> (tile, 0, layout, stride, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
            }
        }
    }

    vector_kernel!(
        "avx512f,avx2,fma",
        16,
        __m512,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_storeu_ps
    );
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{HALF, Rows, Segment, Tile};
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    /// # Safety
    /// The processor has AVX2 and FMA; `rows`, `halves` and the segments are as [`super::multiply`] checks.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply(
        tile: &mut Tile,
        rows: usize,
        halves: usize,
        layout: Rows,
        stride: usize,
        segments: &[Segment],
    ) {
        for half in 0..halves {
            // SAFETY: the contract is the same.
            unsafe { by_rows!(rows, kernel::<2> (tile, half * HALF, layout, stride, segments), [1 2 3 4 5 6]) }
        }
    }

    vector_kernel!(
        "avx2,fma",
        8,
        __m256,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_storeu_ps
    );
}

mod plain {
    use super::super::simd::fma;
    use super::{HALF, Rows, Segment, Tile};

    pub(super) fn multiply(
        tile: &mut Tile,
        rows: usize,
        halves: usize,
        layout: Rows,
        stride: usize,
        segments: &[Segment],
    ) {
        for half in 0..halves {
            by_rows!(rows, kernel::<HALF> (tile, half, layout, stride, segments), [1 2 3 4 5 6])
        }
    }

    fn kernel<const ROWS: usize, const COLUMNS: usize>(
        tile: &mut Tile,
        half: usize,
        layout: Rows,
        stride: usize,
        segments: &[Segment],
    ) {
        let mut sums = [[0.0f32; COLUMNS]; ROWS];
        for segment in segments {
            for k in 0..segment.len {
                let columns = segment.b[k * stride + half * HALF..].first_chunk::<COLUMNS>().expect("half a panel");
                let a = &segment.a[k * layout.inner..];
                for i in 0..ROWS {
                    for j in 0..COLUMNS {
                        sums[i][j] =
                            fma::<{ cfg!(target_arch = "aarch64") }>(a[i * layout.row], columns[j], sums[i][j]);
                    }
                }
            }
        }
        for (row, sums) in tile.rows.iter_mut().zip(&sums) {
            row[half * HALF..][..COLUMNS].copy_from_slice(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::aligned::AlignedVec;
    use super::*;

    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 2_654_435_761 % 1009) as f32 - 504.3) / 250.0).collect()
    }

    type Kernel = fn(&mut Tile, usize, usize, Rows, usize, &[Segment]);

    /// All sizes of a tile in both layouts, with the inner dimension in one, two and three parts, an empty one too.
    fn check(kernel: Kernel, most_rows: usize) {
        let (a, b) = (numbers(1, MAX_ROWS * STRIP + 700), numbers(2, 40 * PANEL));
        for rows in 1..=most_rows {
            for (halves, layout) in
                [(1, Rows::lines(STRIP)), (2, Rows::lines(45)), (1, Rows::interleaved(16)), (2, Rows::interleaved(17))]
            {
                for (stride, lens) in
                    [(PANEL, vec![1]), (PANEL, vec![37]), (33, vec![3, 0, 11]), (45, vec![25]), (50, vec![])]
                {
                    let mut tile = Tile { rows: [[f32::NAN; PANEL]; MAX_ROWS] };
                    let segments: Vec<_> = lens
                        .iter()
                        .enumerate()
                        .map(|(s, &len)| Segment { a: &a[5 * s..], b: &b[7 * s..], len })
                        .collect();
                    kernel(&mut tile, rows, halves, layout, stride, &segments);
                    for (i, j) in (0..rows).flat_map(|i| (0..halves * HALF).map(move |j| (i, j))) {
                        let mut expected = 0.0f64;
                        for segment in &segments {
                            for k in 0..segment.len {
                                expected += f64::from(segment.a[i * layout.row + k * layout.inner])
                                    * f64::from(segment.b[k * stride + j]);
                            }
                        }
                        let got = f64::from(tile.rows[i][j]);
                        assert!(
                            (got - expected).abs() <= 1e-4,
                            "({i}, {j}) of {rows} rows, {halves}, {layout:?}, {stride}, {lens:?}: {got} for {expected}"
                        );
                    }
                    assert!(tile.rows[rows..].iter().flatten().all(|x| x.is_nan()), "rows beyond the tile are written");
                }
            }
        }
    }

    #[test]
    fn tiles_agree_with_loops() {
        check(multiply, tile_rows());
        check(plain::multiply, 6);
        #[cfg(target_arch = "x86_64")]
        if level() != Level::Baseline {
            // SAFETY: the processor has AVX2; `check` keeps to what `multiply` checks.
            check(
                |tile, rows, halves, layout, stride, segments| unsafe {
                    avx2::multiply(tile, rows, halves, layout, stride, segments)
                },
                6,
            );
        }
    }

    /// Rows that start at cache lines and rows that do not, whole and part: the rest of the destination stays as it is.
    #[test]
    fn tiles_are_written_where_they_belong() {
        let mut tile = Tile::new();
        for (i, x) in tile.rows.as_flattened_mut().iter_mut().enumerate() {
            *x = i as f32 + 1.0;
        }
        for (first, width, stride) in [(0, PANEL, 64), (16, PANEL, 48), (3, PANEL, 64), (0, PANEL, 37), (0, 5, 64)] {
            for streams in [None, Streams::of(usize::MAX)] {
                for rows in [0, 1, MAX_ROWS] {
                    let mut to = AlignedVec::zeros(first + MAX_ROWS * stride);
                    let what =
                        format!("{rows} rows from {first}, {width} of {stride}, streamed: {}", streams.is_some());
                    match &streams {
                        None => write_tile(&mut to[first..], &tile, rows, width, stride),
                        // SAFETY: `to` is read after the fence of another `Streams`.
                        Some(streams) => unsafe { streams.write_tile(&mut to[first..], &tile, rows, width, stride) },
                    }
                    drop(Streams(PhantomData));
                    for (at, &x) in to.iter().enumerate() {
                        let (i, j) = (at.wrapping_sub(first) / stride, at.wrapping_sub(first) % stride);
                        let inside = at >= first && i < rows && j < width;
                        assert_eq!(x, if inside { tile.rows[i][j] } else { 0.0 }, "{at} of {what}");
                    }
                }
            }
        }
        assert!(Streams::of(1 << 20).is_none() && Streams::of(1 << 22).is_some());
    }

    #[test]
    #[should_panic(expected = "an operand is too short")]
    fn operands_that_are_too_short_are_refused() {
        let segment = Segment { a: &[0.0; 20], b: &[0.0; 2 * PANEL - 1], len: 2 };
        multiply(&mut Tile::new(), 3, 2, Rows::interleaved(16), PANEL, &[segment]);
    }

    /// Distances whose product is 0, were it to wrap.
    #[test]
    fn strides_that_overflow_are_refused() {
        const FAR: usize = 1 << (usize::BITS - 1);
        let numbers = [0.0; 4 * PANEL];
        for (layout, stride) in [
            (Rows::lines(FAR), PANEL),
            (Rows::interleaved(FAR), PANEL),
            (Rows::lines(1), FAR),
            (Rows::interleaved(1), FAR),
        ] {
            let segment = Segment { a: &numbers, b: &numbers, len: 3 };
            let refused = std::panic::catch_unwind(|| multiply(&mut Tile::new(), 3, 2, layout, stride, &[segment]));
            let message = *refused.expect_err("refused").downcast::<&str>().expect("a message without numbers");
            assert_eq!(message, "an operand is too short", "{layout:?}, {stride}");
        }
    }

    #[test]
    fn tiles_cover_the_rows_evenly() {
        for rows in 0..100 {
            let tiles: Vec<_> = row_tiles(rows).collect();
            assert_eq!(tiles.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
            assert!(tiles.iter().all(|tile| !tile.is_empty() && tile.len() <= tile_rows()));
        }
    }
}
