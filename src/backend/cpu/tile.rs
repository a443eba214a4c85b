//! Matrix products by tiles: the kernels, and the layouts they read.
//!
//! ```text
//! A   up to `tile_rows()` rows, at any two distances, or packed: see `Rows`
//! B   32 columns of a row-major matrix, or a panel, in halves of 16: element (inner k, column j) of a half at k * stride + j
//! C   a tile of rows x 32 in a small buffer; what to do with it is the caller's epilogue
//! ```
//!
//! A panel is its halves one after the other, `[2, len, 16]`: of lines of 32, a block of a half would fall into half the sets of
//! the first cache, and that of A beside it would not fit.
//!
//! A range of the inner dimension is a sub-slice of both operands, so a window of input channels needs no panels of its own, and
//! neither does a window of output channels (a range of panels, to the half). Every element of C is one chain of
//! additions in the order of k: the result depends on the operands alone, neither on the threads nor on the tile.

/// Calls `$kernel::<ROWS, ..>` with the number of rows as a constant.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident::<$other:tt> $args:tt, [$($n:literal)*]) => {
        match $rows {
            $($n => $kernel::<$n, $other> $args,)*
            _ => unreachable!("more rows than a tile has"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;
mod steps;

use super::pack::interleave;
use super::simd::{Level, level, simd_fn};
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a panel of B, and of a tile.
pub const PANEL: usize = 32;
/// Columns of half a panel: what a tile is rounded to.
pub const HALF: usize = PANEL / 2;
/// Distance between the rows of a matrix of at most 128 columns: 9 cache lines, so that the rows of a tile fall into different
/// sets of the cache.
pub const STRIP: usize = 144;
/// Elements of the inner dimension whose part of a panel stays in the first cache.
pub const MOST_INNER: usize = steps::PACKED_BLOCK;
/// Most rows of a tile, of all processors.
pub const MAX_ROWS: usize = steps::AT_ONCE * steps::ROWS;

/// Rows whose sums the registers of this processor hold.
#[inline]
pub fn step_rows() -> usize {
    match level() {
        Level::Avx512 => 14,
        Level::Avx2 | Level::Baseline => steps::ROWS,
    }
}

/// Rows of a tile on this processor: with AVX-512 as many as its registers hold, else some times as many.
#[inline]
pub fn tile_rows() -> usize {
    step_rows() * steps_at_once()
}

fn steps_at_once() -> usize {
    match level() {
        Level::Avx512 => 1,
        Level::Avx2 | Level::Baseline => steps::AT_ONCE,
    }
}

/// The rows of each step of a tile of `rows` rows.
#[inline]
pub fn steps_of(rows: usize) -> impl Iterator<Item = Range<usize>> {
    even_parts(rows, step_rows(), 1)
}

/// Panels that hold `columns`.
#[inline]
pub fn panels(columns: usize) -> usize {
    columns.div_ceil(PANEL)
}

/// Distance between the elements of a row in a packed step: the rows of a step, and for more than 8 of them a multiple of 8,
/// as [`super::pack::interleave`] needs.
#[inline]
pub fn packed_stride() -> usize {
    match level() {
        Level::Avx512 => 16,
        Level::Avx2 | Level::Baseline => steps::ROWS,
    }
}

/// Groups of [`step_rows`] rows that hold `rows`, of which only the last may be smaller.
#[inline]
pub fn groups(rows: usize) -> usize {
    rows.div_ceil(step_rows())
}

/// Columns that hold `columns` in whole panels and in whole groups.
#[inline]
pub fn padded(columns: usize) -> usize {
    (panels(columns) * PANEL).max(groups(columns) * step_rows())
}

/// Numbers of a packed tile of up to `rows` rows of `len` numbers.
#[inline]
pub fn packed_len(rows: usize, len: usize) -> usize {
    // The last vector that is written may end behind the last element.
    rows.div_ceil(step_rows()) * packed_stride() * len + 8
}

/// Splits `rows` into tiles of at most [`tile_rows`] rows.
pub fn row_tiles(rows: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    even_parts(rows, step_rows(), steps_at_once())
}

/// Splits `rows` into as few parts of at most `height` as there can be, all of about one size; each range is `at_once` of them
/// that follow each other, the last what is left.
fn even_parts(rows: usize, height: usize, at_once: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = rows.div_ceil(height);
    (0..count).step_by(at_once).map(move |i| i * rows / count..(i + at_once).min(count) * rows / count)
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
    /// Writes (`add`: adds) the first `width` columns of rows as lines: column j to `to[j * stride..][..rows.len()]`.
    pub fn write_transposed<F>(to: &mut [f32], rows: &[[f32; PANEL]], width: usize, stride: usize, add: bool) {
        let mut columns = Columns([[0.0; HALF]; PANEL]);
        for (part, sums) in rows.chunks(HALF).enumerate() {
            interleave(columns.0.as_flattened_mut(), HALF, sums.as_flattened(), sums.len(), width, PANEL);
            let (to, columns) = (&mut to[part * HALF..], &columns.0[..width]);
            if add {
                by_rows!(sums.len(), narrow::<true>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16])
            } else {
                by_rows!(sums.len(), narrow::<false>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16])
            }
        }
    }
}

/// Rows of a tile, transposed.
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
            && level() != Level::Baseline
        {
            for (line, row) in to.chunks_mut(stride).zip(&tile.rows[..rows]) {
                let line = line.first_chunk_mut().expect("a line holds a panel");
                // SAFETY: the processor has the features; each line starts at a cache line, since the first does and they
                // are a multiple of 16 numbers apart; nobody reads them before the fence, by this function's contract.
                unsafe { if level() == Level::Avx512 { avx512::stream(line, row) } else { avx2::stream(line, row) } }
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

/// How the rows of A lie in memory: element (row i, inner k) at `i * row + k * inner`, where i counts from the first row of the
/// tile, or if steps are apart, from the first row of its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    row: usize,
    inner: usize,
    step: usize, // between steps; 0: a step follows the rows of the one before
}

impl Rows {
    /// Rows side by side: (i, k) at `k * stride + i`.
    pub fn interleaved(stride: usize) -> Rows {
        Rows { row: 1, inner: stride, step: 0 }
    }

    /// Rows of a row-major matrix: (i, k) at `i * stride + k`.
    pub fn lines(stride: usize) -> Rows {
        Rows { row: stride, inner: 1, step: 0 }
    }

    /// Rows of `len` numbers as [`super::pack::pack_rows`] and [`super::pack::scatter`] put them: `[steps, len, packed_stride()]`,
    /// in the order in which a step reads them.
    pub fn packed(len: usize) -> Rows {
        Rows { row: 1, inner: packed_stride(), step: len.saturating_mul(packed_stride()) }
    }

    /// Where the first row of step `number` of a tile is, which is row `row` of the tile. Wrapping, as in the kernels: a
    /// distance that nothing is at may be any number.
    fn first_of_step(self, number: usize, row: usize) -> usize {
        if self.step == 0 { row.wrapping_mul(self.row) } else { number.wrapping_mul(self.step) }
    }
}

/// A part of the inner dimension: `len` elements of rows of A and of a panel of B.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Rows, in the layout the call names.
    pub a: &'a [f32],
    /// Rows of each half of the columns; the second may be empty where one half is asked for.
    pub b: [&'a [f32]; 2],
    /// Inner elements.
    pub len: usize,
}

/// The halves of a panel `[2, len, HALF]` from its row `first` on.
#[inline]
pub fn of_panel(panel: &[f32], first: usize) -> [&[f32]; 2] {
    let (left, right) = panel.split_at(panel.len() / 2);
    [left, right].map(|half| &half[first * HALF..])
}

/// The halves of a panel, to write them.
#[inline]
pub fn of_panel_mut(panel: &mut [f32]) -> [&mut [f32]; 2] {
    panel.split_at_mut(panel.len() / 2).into()
}

/// The halves of columns that lie side by side in a row-major matrix, from the first of them on.
#[inline]
pub fn of_matrix(columns: &[f32]) -> [&[f32]; 2] {
    [columns, columns.get(HALF..).unwrap_or(&[])]
}

/// `tile[i, j] = sum over segments and their k of a[i, k] b[k, j]` for `rows` rows and `halves` times 16 columns; `stride` is
/// the distance between the rows of B: [`HALF`] in a panel.
#[inline]
pub fn multiply(tile: &mut Tile, rows: usize, halves: usize, layout: Rows, stride: usize, segments: &[Segment]) {
    products(&mut tile.rows[..rows], false, halves, layout, stride, segments);
}

/// As [`multiply`], but the products are added, each to what is there.
#[inline]
pub fn multiply_add(sums: &mut [[f32; PANEL]], halves: usize, layout: Rows, stride: usize, segments: &[Segment]) {
    products(sums, true, halves, layout, stride, segments);
}

#[inline]
fn products(sums: &mut [[f32; PANEL]], add: bool, halves: usize, layout: Rows, stride: usize, segments: &[Segment]) {
    let rows = sums.len();
    assert!((1..=tile_rows()).contains(&rows) && (1..=2).contains(&halves));
    for &Segment { a, b, len } in segments {
        // Saturated, so that no stride wraps round to a place inside: no slice is that long.
        let before = len.saturating_sub(1);
        let (step, row) =
            if layout.step == 0 { (0, rows - 1) } else { ((rows - 1) / step_rows(), step_rows().min(rows) - 1) };
        let last = step
            .saturating_mul(layout.step)
            .saturating_add(row.saturating_mul(layout.row))
            .saturating_add(before.saturating_mul(layout.inner));
        let end = before.saturating_mul(stride).saturating_add(HALF);
        let reaches = |b: &[f32]| end <= b.len();
        assert!(len == 0 || last < a.len() && b[..halves].iter().all(|b| reaches(b)), "an operand is too short");
    }
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the processor has the features; rows, halves and the segments' lengths were checked above.
        Level::Avx512 => return unsafe { avx512::multiply(sums, add, halves, layout, stride, segments) },
        Level::Avx2 => {
            // SAFETY: as above; the steps lie inside of what was checked.
            return steps::multiply(sums, add, halves, layout, stride, segments, |step| unsafe { avx2::step(step) });
        }
        Level::Baseline => {}
    }
    steps::multiply(sums, add, halves, layout, stride, segments, plain::step);
}

#[cfg(test)]
mod tests {
    use super::super::aligned::AlignedVec;
    use super::*;

    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 2_654_435_761 % 1009) as f32 - 504.3) / 250.0).collect()
    }

    type Kernel = fn(&mut [[f32; PANEL]], bool, usize, Rows, usize, &[Segment]);

    /// All sizes of a tile in all layouts, with the inner dimension in parts, empty ones and those of more than a step too, from
    /// nothing and added: the bits are those of one chain of additions.
    fn check<const FMA: bool>(kernel: Kernel, most_rows: usize, step_rows: usize) {
        let apart = |inner| Rows { row: 1, inner, step: 700 };
        let (a, b) = (numbers(1, 12_000), numbers(2, 640 * PANEL));
        let lens: [&[usize]; 14] = [
            &[],
            &[0],
            &[0, 5],
            &[1],
            &[25],
            &[37],
            &[3, 0, 11],
            &[128],
            &[129],
            &[99, 29],
            &[128, 128],
            &[300],
            &[99, 30, 260, 5],
            &[500],
        ];
        for rows in 1..=most_rows {
            // Where the first row of the step that holds a row is, and the row in that step.
            let steps: Vec<_> = even_parts(rows, step_rows, 1).enumerate().collect();
            let in_step = |i: usize, layout: Rows| match steps.iter().find(|(_, step)| step.contains(&i)) {
                Some((number, step)) if layout.step > 0 => (number * layout.step, i - step.start),
                _ => (0, i),
            };
            for (halves, layout) in [
                (1, Rows::lines(STRIP)),
                (2, Rows::lines(45)),
                (1, Rows::interleaved(16)),
                (2, Rows::interleaved(17)),
                (1, apart(16)),
                (2, apart(6)),
                (2, apart(16)),
            ] {
                for (number, lens) in lens.iter().enumerate() {
                    let (stride, add) = ([HALF, 33, 35][number % 3], (rows + number).is_multiple_of(2));
                    let mut tile = Tile { rows: [[f32::NAN; PANEL]; MAX_ROWS] };
                    if add {
                        tile.rows[..rows].fill(std::array::from_fn(|j| j as f32 - 7.3));
                    }
                    let segments: Vec<_> = lens
                        .iter()
                        .enumerate()
                        .map(|(s, &len)| {
                            let right = if halves == 2 { &b[3000 + 9 * s..] } else { &[] };
                            Segment { a: &a[5 * s..], b: [&b[7 * s..], right], len }
                        })
                        .collect();
                    kernel(&mut tile.rows[..rows], add, halves, layout, stride, &segments);
                    for (i, j) in (0..rows).flat_map(|i| (0..halves * HALF).map(move |j| (i, j))) {
                        let (first, row) = in_step(i, layout);
                        let mut expected = if add { j as f32 - 7.3 } else { 0.0 };
                        for segment in &segments {
                            for k in 0..segment.len {
                                let (a, b) = (
                                    segment.a[first + row * layout.row + k * layout.inner],
                                    segment.b[j / HALF][k * stride + j % HALF],
                                );
                                expected = if FMA { a.mul_add(b, expected) } else { a * b + expected };
                            }
                        }
                        let got = tile.rows[i][j];
                        assert!(
                            got.to_bits() == expected.to_bits(),
                            "({i}, {j}) of {rows} rows, {halves}, {layout:?}, {stride}, {lens:?}, added: {add}: {got} for {expected}"
                        );
                    }
                    assert!(tile.rows[rows..].iter().flatten().all(|x| x.is_nan()), "rows beyond the tile are written");
                }
            }
        }
    }

    #[test]
    fn tiles_are_chains_of_additions() {
        check::<{ cfg!(target_arch = "aarch64") }>(
            |rows, add, halves, layout, stride, segments| {
                steps::multiply(rows, add, halves, layout, stride, segments, plain::step)
            },
            MAX_ROWS,
            steps::ROWS,
        );
        #[cfg(target_arch = "x86_64")]
        if level() != Level::Baseline {
            check::<true>(
                |rows, add, halves, layout, stride, segments| {
                    // SAFETY: the processor has AVX2; `check` keeps to what `multiply` checks, and so do the steps.
                    steps::multiply(rows, add, halves, layout, stride, segments, |step| unsafe { avx2::step(step) })
                },
                MAX_ROWS,
                steps::ROWS,
            );
            check::<true>(products, tile_rows(), step_rows());
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
    fn tiles_are_transposed() {
        let mut tile = Tile::new();
        for (i, x) in tile.rows.as_flattened_mut().iter_mut().enumerate() {
            *x = i as f32 + 1.0;
        }
        for (rows, width, stride) in (1..=MAX_ROWS).map(|rows| (rows, PANEL - rows % 3, rows + rows % 2)) {
            for add in [false, true] {
                let mut to = vec![0.5; PANEL * stride];
                write_transposed(&mut to, &tile.rows[..rows], width, stride, add);
                for (at, &x) in to.iter().enumerate() {
                    let (j, i) = (at / stride, at % stride);
                    let old = if add { 0.5 } else { 0.0 };
                    let expected = if j < width && i < rows { tile.rows[i][j] + old } else { 0.5 };
                    assert_eq!(x, expected, "({i}, {j}) of {rows} rows, {width} columns, {stride}, added: {add}");
                }
            }
        }
    }

    fn is_refused(rows: usize, halves: usize, layout: Rows, stride: usize, segment: Segment) -> bool {
        let result = std::panic::catch_unwind(|| multiply(&mut Tile::new(), rows, halves, layout, stride, &[segment]));
        result.is_err_and(|why| why.downcast_ref() == Some(&"an operand is too short"))
    }

    #[test]
    fn operands_that_are_too_short_are_refused() {
        let numbers = [0.5; 500];
        for halves in 1..=2 {
            let layouts = [
                (Rows::interleaved(16), 16 + 3),
                (Rows::lines(20), 2 * 20 + 2),
                (Rows::packed(2), packed_stride() + 3),
            ];
            for (layout, a_len) in layouts {
                for stride in [HALF, 40] {
                    let (a, half) = (&numbers[..a_len], &numbers[..stride + HALF]);
                    let b = [half, if halves == 2 { half } else { &[] }];
                    let refused = |a, b| is_refused(3, halves, layout, stride, Segment { a, b, len: 2 });
                    assert!(!refused(a, b), "{halves}, {layout:?}, {stride}");
                    assert!(refused(&a[1..], b), "{halves}, {layout:?}, {stride}");
                    for short in 0..halves {
                        let mut b = b;
                        b[short] = &half[1..];
                        assert!(refused(a, b), "{halves}, {layout:?}, {stride}, half {short}");
                    }
                }
            }
        }
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
            (Rows::packed(1), FAR),
        ] {
            assert!(
                is_refused(3, 2, layout, stride, Segment { a: &numbers, b: [&numbers; 2], len: 3 }),
                "{layout:?}, {stride}"
            );
        }
        if tile_rows() > step_rows() {
            let (rows, stride) = (step_rows() + 1, packed_stride());
            // Two steps of 4 and 3 rows, counted as if they could be of 6.
            let ends = 2 * stride + stride + step_rows();
            for (len, refused) in [(ends, false), (ends - 1, true)] {
                let segment = Segment { a: &numbers[..len], b: [&numbers; 2], len: 2 };
                assert_eq!(is_refused(rows, 2, Rows::packed(2), HALF, segment), refused, "{len} numbers of two steps");
            }
            let segment = Segment { a: &numbers, b: [&numbers; 2], len: 3 };
            assert!(is_refused(step_rows() + 1, 2, Rows::packed(FAR), PANEL, segment), "steps that are far apart");
        }
        // One row, or one element, has no distances.
        for (rows, layout) in [(1, Rows::lines(FAR)), (3, Rows::interleaved(FAR))] {
            for stride in [PANEL, FAR] {
                let segment = Segment { a: &numbers, b: [&numbers; 2], len: 1 };
                assert!(!is_refused(rows, 2, layout, stride, segment), "{layout:?}, {stride}");
            }
        }
    }

    #[test]
    fn tiles_cover_the_rows_evenly() {
        for (height, at_once) in [(14, 1), (6, 6), (6, 1)] {
            for rows in 0..100 {
                let parts: Vec<_> = even_parts(rows, height, at_once).collect();
                assert_eq!(parts.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
                assert_eq!(parts.len(), rows.div_ceil(height).div_ceil(at_once));
                let lens = || parts.iter().map(Range::len);
                assert!(lens().all(|len| 0 < len && len <= height * at_once));
                if at_once == 1 && rows > 0 {
                    assert!(lens().max().unwrap() - lens().min().unwrap() <= 1, "{rows}: {parts:?}");
                }
            }
        }
        assert!(row_tiles(100).all(|tile| tile.len() <= tile_rows()) && tile_rows() <= MAX_ROWS);
    }
}
