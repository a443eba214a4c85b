//! Matrix products by tiles that stay in registers: the kernels, and the layouts they read.
//!
//! ```text
//! A   rows of a tile, interleaved: element (row i, inner k) at k * A_STRIDE + i       up to `tile_rows()` rows
//! B   panels of 32 columns: element (inner k, column j) at k * PANEL + j
//! C   a tile of rows x 32 in a small buffer; what to do with it is the caller's epilogue
//! ```
//!
//! A range of the inner dimension is a sub-slice of both operands, so a window of input channels needs no packing of its
//! own, and neither does a window of output channels (a range of panels, to the half). Every element of C is one chain of
//! additions in the order of k: the result depends on the operands alone, neither on the threads nor on the tile.

use super::simd::{Level, level, simd_fn};

/// Columns of a panel of B, and of a tile.
pub const PANEL: usize = 32;
/// Columns of half a panel: what a tile is rounded to.
pub const HALF: usize = PANEL / 2;
/// Distance between the inner elements of interleaved rows.
pub const A_STRIDE: usize = 16;
/// Distance between the rows of a [`Rows::Strided`] operand: 9 cache lines, so that the rows of a tile fall into different
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

/// Splits `rows` into as few tiles as there can be, all of about one size.
pub fn row_tiles(rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> + Clone {
    let count = rows.div_ceil(tile_rows());
    (0..count).map(move |i| i * rows / count..(i + 1) * rows / count)
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

/// How a tile is written to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Through the caches.
    Cached,
    /// Past the caches, which do not have to read the lines first: for results too large to stay there.
    Streamed,
}

impl Store {
    /// The best way to write `len` numbers that are read after all of them have been written.
    pub fn of(len: usize) -> Store {
        // Measured: 12 MB gain 3 % of a forward pass, 3 MB nothing; much less is read back from a cache.
        const LARGE: usize = (8 << 20) / size_of::<f32>();
        if len >= LARGE { Store::Streamed } else { Store::Cached }
    }
}

/// Writes the first `width` columns of `rows` rows to lines that are `stride` apart. What is streamed may be read by others
/// only after [`finish_streams`].
#[inline]
pub fn write_tile(to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize, store: Store) {
    assert!(rows <= MAX_ROWS && width <= PANEL && (rows == 0 || (rows - 1) * stride + width <= to.len()));
    #[cfg(target_arch = "x86_64")]
    if store == Store::Streamed
        && width == PANEL
        && stride.is_multiple_of(HALF)
        && to.as_ptr().addr().is_multiple_of(64)
        && level() == Level::Avx512
    {
        // SAFETY: the processor has AVX-512; the rows are in bounds, and each starts at a cache line.
        unsafe { avx512::stream(to, tile, rows, stride) };
        return;
    }
    copy_tile(to, tile, rows, width, stride);
}

simd_fn! {
    fn copy_tile<F>(to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize) {
        for (i, row) in tile.rows[..rows].iter().enumerate() {
            copy_row(&mut to[i * stride..][..width], row);
        }
    }
}

/// Makes what this thread has streamed visible to others.
#[inline]
pub fn finish_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// How the rows of A lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// (i, k) at `k * stride + i`.
    Interleaved(usize),
    /// (i, k) at `i * STRIP + k`.
    Strided,
}

/// A part of the inner dimension: `len` elements of rows of A and of a panel of B.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Rows, in the layout the call names.
    pub a: &'a [f32],
    /// Rows of a panel, from the first column asked for.
    pub b: &'a [f32],
    /// Inner elements.
    pub len: usize,
}

/// `tile[i, j] = sum over segments and their k of a[i, k] b[k, j]` for `rows` rows and `halves` times 16 columns.
#[inline]
pub fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, segments: &[Segment]) {
    assert!((1..=tile_rows()).contains(&rows) && (1..=2).contains(&halves));
    for &Segment { a, b, len } in segments {
        let last = match layout {
            Rows::Interleaved(stride) => len.saturating_sub(1) * stride + rows - 1,
            Rows::Strided => (rows - 1) * STRIP + len.saturating_sub(1),
        };
        assert!(len == 0 || last < a.len() && (len - 1) * PANEL + halves * HALF <= b.len(), "an operand is too short");
    }
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the processor has the features; rows, halves and the segments' lengths were checked above.
        Level::Avx512 => return unsafe { avx512::multiply(tile, rows, halves, layout, segments) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { avx2::multiply(tile, rows, halves, layout, segments) },
        Level::Baseline => {}
    }
    plain::multiply(tile, rows, halves, layout, segments);
}

/// Calls `$kernel::<ROWS, STRIDE>` with the number of rows as a constant.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident::<$stride:tt> $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => $kernel::<$n, $stride> $args,)*
            _ => unreachable!("more rows than a tile has"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{PANEL, Rows, STRIP, Segment, Tile};
    use std::arch::x86_64::{
        __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_stream_ps,
    };

    /// # Safety
    /// The processor has AVX-512F; `to` holds `rows` rows of a panel that are `stride` apart, each at a cache line.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn stream(to: &mut [f32], tile: &Tile, rows: usize, stride: usize) {
        for (i, row) in tile.rows[..rows].iter().enumerate() {
            for v in (0..PANEL).step_by(16) {
                // SAFETY: in bounds and aligned by the contract.
                unsafe {
                    _mm512_stream_ps(to.as_mut_ptr().add(i * stride + v), _mm512_loadu_ps(row.as_ptr().add(v)));
                }
            }
        }
    }

    /// # Safety
    /// The processor has AVX-512F; `rows`, `halves` and the segments are as [`super::multiply`] checks.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, segments: &[Segment]) {
        // SAFETY: the contract is the same.
        unsafe {
            match (layout, halves) {
                (Rows::Interleaved(stride), 1) => {
                    by_rows!(rows, one::<1> (tile, stride, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
                (Rows::Interleaved(stride), _) => {
                    by_rows!(rows, two::<1> (tile, stride, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
                (Rows::Strided, 1) => {
                    by_rows!(rows, one::<STRIP> (tile, 1, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
                (Rows::Strided, _) => {
                    by_rows!(rows, two::<STRIP> (tile, 1, segments), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn one<const ROWS: usize, const STRIDE: usize>(tile: &mut Tile, step: usize, segments: &[Segment]) {
        // SAFETY: the caller's contract.
        unsafe { kernel::<ROWS, 1, STRIDE>(tile, step, segments) }
    }

    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn two<const ROWS: usize, const STRIDE: usize>(tile: &mut Tile, step: usize, segments: &[Segment]) {
        // SAFETY: the caller's contract.
        unsafe { kernel::<ROWS, 2, STRIDE>(tile, step, segments) }
    }

    /// Row i, inner k of A at `k * step + i * STRIDE`.
    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn kernel<const ROWS: usize, const VECTORS: usize, const STRIDE: usize>(
        tile: &mut Tile,
        step: usize,
        segments: &[Segment],
    ) {
        let mut sums: [[__m512; VECTORS]; ROWS] = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for segment in segments {
            let (mut a, mut b) = (segment.a.as_ptr(), segment.b.as_ptr());
            for _ in 0..segment.len {
                // SAFETY: `multiply` checked the last element that these reach; the pointers move past it only after the
                // last round, by wrapping arithmetic.
                unsafe {
                    let columns: [__m512; VECTORS] = std::array::from_fn(|v| _mm512_loadu_ps(b.add(v * 16)));
                    for i in 0..ROWS {
                        let row = _mm512_set1_ps(*a.add(i * STRIDE));
                        for v in 0..VECTORS {
                            sums[i][v] = _mm512_fmadd_ps(row, columns[v], sums[i][v]);
                        }
                        // Keeps the compiler from loading all rows first, for which there are not enough registers: the sums
                        // would go to memory and back in every round.
                        std::arch::asm!("", options(nostack, preserves_flags));
                    }
                }
                a = a.wrapping_add(step);
                b = b.wrapping_add(PANEL);
            }
        }
        for i in 0..ROWS {
            for v in 0..VECTORS {
                // SAFETY: a row holds two vectors.
                unsafe { _mm512_storeu_ps(tile.rows[i].as_mut_ptr().add(v * 16), sums[i][v]) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{HALF, PANEL, Rows, STRIP, Segment, Tile};
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    /// # Safety
    /// The processor has AVX2 and FMA; `rows`, `halves` and the segments are as [`super::multiply`] checks.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, segments: &[Segment]) {
        for half in 0..halves {
            // SAFETY: the contract is the same.
            unsafe {
                match layout {
                    Rows::Interleaved(stride) => {
                        by_rows!(rows, kernel::<1> (tile, half, stride, segments), [1 2 3 4 5 6])
                    }
                    Rows::Strided => by_rows!(rows, kernel::<STRIP> (tile, half, 1, segments), [1 2 3 4 5 6]),
                }
            }
        }
    }

    /// Half a panel. Row i, inner k of A at `k * step + i * STRIDE`.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn kernel<const ROWS: usize, const STRIDE: usize>(
        tile: &mut Tile,
        half: usize,
        step: usize,
        segments: &[Segment],
    ) {
        let mut sums: [[__m256; 2]; ROWS] = [[_mm256_setzero_ps(); 2]; ROWS];
        for segment in segments {
            let (mut a, mut b) = (segment.a.as_ptr(), segment.b.as_ptr().wrapping_add(half * HALF));
            for _ in 0..segment.len {
                // SAFETY: as in the AVX-512 kernel.
                unsafe {
                    let columns = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                    for i in 0..ROWS {
                        let row = _mm256_set1_ps(*a.add(i * STRIDE));
                        for v in 0..2 {
                            sums[i][v] = _mm256_fmadd_ps(row, columns[v], sums[i][v]);
                        }
                    }
                }
                a = a.wrapping_add(step);
                b = b.wrapping_add(PANEL);
            }
        }
        for (row, sums) in tile.rows.iter_mut().zip(&sums) {
            for (v, &sum) in sums.iter().enumerate() {
                // SAFETY: a row holds two halves of two vectors.
                unsafe { _mm256_storeu_ps(row.as_mut_ptr().add(half * HALF + v * 8), sum) };
            }
        }
    }
}

mod plain {
    use super::super::simd::fma;
    use super::{HALF, PANEL, Rows, STRIP, Segment, Tile};

    pub(super) fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, segments: &[Segment]) {
        for half in 0..halves {
            match layout {
                Rows::Interleaved(stride) => {
                    by_rows!(rows, kernel::<1> (tile, half, stride, segments), [1 2 3 4 5 6])
                }
                Rows::Strided => by_rows!(rows, kernel::<STRIP> (tile, half, 1, segments), [1 2 3 4 5 6]),
            }
        }
    }

    fn kernel<const ROWS: usize, const STRIDE: usize>(tile: &mut Tile, half: usize, step: usize, segments: &[Segment]) {
        let mut sums = [[0.0f32; HALF]; ROWS];
        for segment in segments {
            for k in 0..segment.len {
                let columns: &[f32; HALF] =
                    segment.b[k * PANEL + half * HALF..][..HALF].try_into().expect("a slice of HALF");
                let a = &segment.a[k * step..];
                for i in 0..ROWS {
                    for j in 0..HALF {
                        sums[i][j] = fma::<{ cfg!(target_arch = "aarch64") }>(a[i * STRIDE], columns[j], sums[i][j]);
                    }
                }
            }
        }
        for (row, sums) in tile.rows.iter_mut().zip(&sums) {
            row[half * HALF..][..HALF].copy_from_slice(sums);
        }
    }
}

/// Interleaves `rows` rows (`stride` apart) of `len` elements: `to[k * to_stride + i] = from[i * stride + k]`. Elements of
/// `to` that belong to no row, up to the next multiple of 8, may be overwritten.
#[inline]
pub fn interleave(to: &mut [f32], to_stride: usize, from: &[f32], rows: usize, len: usize, stride: usize) {
    if rows == 0 || len == 0 {
        return;
    }
    let width = rows.next_multiple_of(8);
    assert!(width <= to_stride && (len - 1) * to_stride + width <= to.len(), "too small for interleaved rows");
    assert!((rows - 1) * stride + len <= from.len(), "interleaved rows exceed their data");
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Baseline {
        // SAFETY: the processor has AVX2, and the bounds were checked.
        unsafe { transpose::interleave(to, to_stride, from, rows, len, stride) };
        return;
    }
    for i in 0..rows {
        for k in 0..len {
            to[k * to_stride + i] = from[i * stride + k];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod transpose {
    use std::arch::x86_64::{
        __m256, _mm_loadu_ps, _mm256_castps128_ps256, _mm256_insertf128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    /// # Safety
    /// The processor has AVX2; see [`super::interleave`] for the bounds.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn interleave(
        to: &mut [f32],
        to_stride: usize,
        from: &[f32],
        rows: usize,
        len: usize,
        stride: usize,
    ) {
        let whole = len / 4 * 4;
        for first in (0..rows).step_by(8) {
            // Rows beyond the last are the last one again: their place in `to` is of no meaning.
            let row: [usize; 8] = std::array::from_fn(|i| (first + i).min(rows - 1) * stride);
            for k in (0..whole).step_by(4) {
                // SAFETY: `row[i] + k + 4 <= (rows - 1) * stride + len`; the last store ends at
                // `(k + 3) * to_stride + first + 8 <= (len - 1) * to_stride + width`.
                unsafe {
                    let four = |i: usize| _mm_loadu_ps(from.as_ptr().add(row[i] + k));
                    let pair = |i: usize| _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(four(i)), four(i + 4));
                    let columns = transpose4([pair(0), pair(1), pair(2), pair(3)]);
                    for (i, &column) in columns.iter().enumerate() {
                        _mm256_storeu_ps(to.as_mut_ptr().add((k + i) * to_stride + first), column);
                    }
                }
            }
            for k in whole..len {
                for i in first..(first + 8).min(rows) {
                    to[k * to_stride + i] = from[i * stride + k];
                }
            }
        }
    }

    /// Transposes the 4 x 4 numbers in each half of the vectors.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose4(r: [__m256; 4]) -> [__m256; 4] {
        let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpacklo_ps(r[2], r[3]));
        let (c, d) = (_mm256_unpackhi_ps(r[0], r[1]), _mm256_unpackhi_ps(r[2], r[3]));
        [
            _mm256_shuffle_ps::<0x44>(a, b),
            _mm256_shuffle_ps::<0xEE>(a, b),
            _mm256_shuffle_ps::<0x44>(c, d),
            _mm256_shuffle_ps::<0xEE>(c, d),
        ]
    }
}

simd_fn! {
    /// Packs rows that lie side by side in every line: `to[k * to_stride + i] = from[k * stride + i]`, for the transpose of a
    /// row-major matrix. `to_stride` is [`A_STRIDE`] or twice that.
    pub fn gather_columns<F>(to: &mut [f32], to_stride: usize, from: &[f32], rows: usize, len: usize, stride: usize) {
        match to_stride {
            A_STRIDE => gather::<A_STRIDE>(to, from, rows, len, stride),
            _ => gather::<{ 2 * A_STRIDE }>(to, from, rows, len, stride),
        }
    }
}

/// Copies of constant length; what lies beyond the rows is never read.
#[inline(always)]
fn gather<const N: usize>(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    for (to, from) in to.as_chunks_mut::<N>().0.iter_mut().zip(from.chunks(stride)).take(len) {
        match from.first_chunk() {
            Some(from) => *to = *from,
            None => to[..rows].copy_from_slice(&from[..rows]),
        }
    }
}

/// Packs panel `panel` of `B = W^T`, W row-major `[n, len]`: `to[k * PANEL + j] = w[(panel * PANEL + j) * len + k]`.
pub fn pack_panel_transposed(to: &mut [f32], w: &[f32], panel: usize, n: usize, len: usize) {
    let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
    for half in columns.clone().step_by(HALF) {
        let rows = HALF.min(columns.end - half);
        interleave(&mut to[half - columns.start..], PANEL, &w[half * len..], rows, len, len);
    }
}

simd_fn! {
    /// Packs panel `panel` of a row-major B `[len, n]` (lines `stride` apart): a copy of its lines.
    pub fn pack_panel<F>(to: &mut [f32], b: &[f32], panel: usize, n: usize, len: usize, stride: usize) {
        let first = panel * PANEL;
        let width = PANEL.min(n - first);
        for (k, to) in to.as_chunks_mut::<PANEL>().0.iter_mut().take(len).enumerate() {
            let from = &b[k * stride + first..];
            match from.first_chunk() {
                Some(from) if width == PANEL => *to = *from,
                _ => to[..width].copy_from_slice(&from[..width]),
            }
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

    type Kernel = fn(&mut Tile, usize, usize, Rows, &[Segment]);

    /// All sizes of a tile in both layouts, with the inner dimension in one, two and three parts, an empty one too.
    fn check(kernel: Kernel, most_rows: usize) {
        let (a, b) = (numbers(1, MAX_ROWS * STRIP + 700), numbers(2, 40 * PANEL));
        for rows in 1..=most_rows {
            for (halves, layout) in
                [(1, Rows::Strided), (2, Rows::Strided), (1, Rows::Interleaved(16)), (2, Rows::Interleaved(17))]
            {
                for lens in [vec![1], vec![37], vec![3, 0, 11], vec![]] {
                    let mut tile = Tile { rows: [[f32::NAN; PANEL]; MAX_ROWS] };
                    let segments: Vec<_> = lens
                        .iter()
                        .enumerate()
                        .map(|(s, &len)| Segment { a: &a[5 * s..], b: &b[PANEL * s..], len })
                        .collect();
                    kernel(&mut tile, rows, halves, layout, &segments);
                    for (i, j) in (0..rows).flat_map(|i| (0..halves * HALF).map(move |j| (i, j))) {
                        let mut expected = 0.0f64;
                        for segment in &segments {
                            for k in 0..segment.len {
                                let at = match layout {
                                    Rows::Interleaved(stride) => k * stride + i,
                                    Rows::Strided => i * STRIP + k,
                                };
                                expected += f64::from(segment.a[at]) * f64::from(segment.b[k * PANEL + j]);
                            }
                        }
                        let got = f64::from(tile.rows[i][j]);
                        assert!(
                            (got - expected).abs() <= 1e-4,
                            "({i}, {j}) of {rows} rows, {halves}, {layout:?}, {lens:?}: {got} for {expected}"
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
                |tile, rows, halves, layout, segments| unsafe { avx2::multiply(tile, rows, halves, layout, segments) },
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
            for store in [Store::Cached, Store::Streamed] {
                for rows in [0, 1, MAX_ROWS] {
                    let mut to = AlignedVec::zeros(first + MAX_ROWS * stride);
                    write_tile(&mut to[first..], &tile, rows, width, stride, store);
                    finish_streams();
                    for (at, &x) in to.iter().enumerate() {
                        let (i, j) = (at.wrapping_sub(first) / stride, at.wrapping_sub(first) % stride);
                        let inside = at >= first && i < rows && j < width;
                        let expected = if inside { tile.rows[i][j] } else { 0.0 };
                        assert_eq!(x, expected, "{at} of {rows} rows from {first}, {width} of {stride}, {store:?}");
                    }
                }
            }
        }
        assert_eq!((Store::of(1 << 20), Store::of(1 << 22)), (Store::Cached, Store::Streamed));
    }

    #[test]
    #[should_panic(expected = "an operand is too short")]
    fn operands_that_are_too_short_are_refused() {
        let segment = Segment { a: &[0.0; 20], b: &[0.0; 2 * PANEL - 1], len: 2 };
        multiply(&mut Tile::new(), 3, 2, Rows::Interleaved(16), &[segment]);
    }

    #[test]
    fn packed_operands_hold_the_matrix() {
        for (n, len) in [(1, 1), (3, 8), (16, 9), (33, 24), (70, 13)] {
            let w = numbers(3, n * len);
            for panel in 0..panels(n) {
                let (mut transposed, mut copied) = (vec![f32::NAN; len * PANEL], vec![f32::NAN; len * PANEL]);
                let b: Vec<f32> =
                    (0..len).flat_map(|k| (0..n).map(move |j| (j, k))).map(|(j, k)| w[j * len + k]).collect();
                pack_panel_transposed(&mut transposed, &w, panel, n, len);
                pack_panel(&mut copied, &b, panel, n, len, n);
                for (k, j) in (0..len).flat_map(|k| (0..PANEL.min(n - panel * PANEL)).map(move |j| (k, j))) {
                    let expected = w[(panel * PANEL + j) * len + k];
                    assert_eq!(
                        [transposed[k * PANEL + j], copied[k * PANEL + j]],
                        [expected; 2],
                        "panel {panel} of {n} x {len}"
                    );
                }
            }
            let rows = n.min(MAX_ROWS);
            let mut columns = vec![f32::NAN; len * A_STRIDE];
            gather_columns(&mut columns, A_STRIDE, &w, rows.min(len), n, len);
            for (k, i) in (0..n.min(len)).flat_map(|k| (0..rows.min(len)).map(move |i| (k, i))) {
                assert_eq!(columns[k * A_STRIDE + i], w[k * len + i]);
            }
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
