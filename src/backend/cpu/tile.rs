//! Matrix products by tiles: the kernels, and the layouts they read.
//!
//! ```text
//! A   up to `tile_rows()` rows: lines, side by side, or packed, see `Rows`
//! B   32 columns of a row-major matrix, or a panel, in halves of 16: element (inner k, column j) of a half at k * stride + j
//! C   a tile of rows x 32 in a small buffer, and what to do with it is the caller's epilogue; or sums that are added to
//! ```
//!
//! A panel is its halves one after the other, `[2, len, 16]`: of lines of 32, a block of a half would fall into half the sets of
//! the first cache, and that of A beside it would not fit.
//!
//! A range of the inner dimension is a sub-slice of both operands, so a window of input channels needs no panels of its own; a
//! window of output channels is halves of panels, of which it may copy one. Every element of C is one chain of additions in the
//! order of k, from 0 or from what is there (of operands in parts as [`super::split::multiply`] says): the result depends on the
//! operands alone, neither on the threads nor on the tile.

/// `$call` with the number of rows as a constant of this name.
macro_rules! by_rows {
    ($rows:expr, $name:ident => $call:expr, [$($n:literal)*]) => {
        match $rows {
            $($n => {
                const $name: usize = $n;
                $call
            })*
            _ => unreachable!("more rows than a tile has"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;
mod steps;
#[cfg(test)]
mod tests;

use super::pack::interleave;
use super::simd::{LINE, Level, fetch_rows, level, simd_fn, sum_of_squares};
use super::split;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a panel of B, and of a tile.
pub const PANEL: usize = 32;
/// Columns of half a panel: what a tile is rounded to.
pub const HALF: usize = PANEL / 2;
/// Distance between the rows of a matrix of at most 128 columns: 9 cache lines, so that the rows of a tile fall into different
/// sets of the cache.
pub const STRIP: usize = 144;
/// Most elements of the inner dimension that are multiplied as one block: their part of half a panel stays in the first cache.
pub const MOST_INNER: usize = steps::PACKED_BLOCK;
/// Most rows of a tile, of all processors.
pub const MAX_ROWS: usize = steps::AT_ONCE * steps::ROWS;

/// Rows whose sums the registers of this processor hold.
#[inline]
pub fn step_rows() -> usize {
    match level() {
        Level::Amx | Level::Avx512 => 14,
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
        Level::Amx | Level::Avx512 => 1,
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
        Level::Amx | Level::Avx512 => 16,
        Level::Avx2 | Level::Baseline => steps::ROWS,
    }
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

/// Cache lines that are read or written soon, two at a time, for a kernel to fetch meanwhile.
pub struct Lines {
    addresses: [usize; Lines::MOST],
    len: usize,
}

impl Lines {
    /// Rows of tiles of three results. Of a window's columns in one half more, some are left out.
    const MOST: usize = 3 * MAX_ROWS;

    /// None.
    pub fn new() -> Self {
        Lines { addresses: [0; _], len: 0 }
    }

    /// Those of the first `width` numbers of `rows` rows, which start `stride` apart. What is more than fits is left out.
    pub fn add_rows(&mut self, from: &[f32], rows: usize, width: usize, stride: usize) {
        let rows = rows.min(from.len().div_ceil(stride));
        for pair in (0..width).step_by(2 * LINE) {
            let Some(to) = self.addresses[self.len..].get_mut(..rows) else { return };
            progression(to, from.as_ptr().wrapping_add(pair).addr(), stride * size_of::<f32>());
            self.len += rows;
        }
    }

    /// The addresses, in at most `portions` portions of one size, which the last address fills up; and that size. What would take more
    /// room than there is, is left out. Afterwards there are none.
    #[cfg(target_arch = "x86_64")]
    fn in_portions(&mut self, portions: usize) -> (&[usize], usize) {
        let of_each = self.len.div_ceil(portions).max(1);
        let all = self.len.next_multiple_of(of_each).min(Lines::MOST / of_each * of_each);
        let last = self.addresses[self.len.saturating_sub(1)];
        self.addresses[self.len.min(all)..all].fill(last);
        self.len = 0;
        (&self.addresses[..all], of_each)
    }
}

simd_fn! {
    fn progression<F>(to: &mut [usize], first: usize, distance: usize) {
        for (i, to) in to.iter_mut().enumerate() {
            *to = first.wrapping_add(i.wrapping_mul(distance));
        }
    }
}

impl Default for Lines {
    fn default() -> Self {
        Self::new()
    }
}

/// The tile registers, set up on this thread for [`multiply_split`] until the last of these is dropped; nothing, where the processor
/// has none. What a thread calls while it has one must not use the tile registers itself: functions need not keep their shape.
pub struct Registers(PhantomData<*const ()>);

thread_local! {
    /// How many [`Registers`] this thread has.
    static SET_UP: Cell<usize> = const { Cell::new(0) };
}

impl Registers {
    /// Sets them up.
    pub fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        if SET_UP.get() == 0 && level() == Level::Amx {
            // SAFETY: the processor has AMX.
            unsafe { amx::set_up() };
        }
        SET_UP.set(SET_UP.get() + 1);
        Registers(PhantomData)
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        SET_UP.set(SET_UP.get() - 1);
        #[cfg(target_arch = "x86_64")]
        if SET_UP.get() == 0 && level() == Level::Amx {
            // SAFETY: the processor has AMX.
            unsafe { amx::release() };
        }
    }
}

impl Default for Registers {
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

/// The sum of squares of the first `width` columns of rows.
pub fn squares(rows: &[[f32; PANEL]], width: usize) -> f64 {
    match width {
        PANEL => sum_of_squares(rows.as_flattened()),
        _ => rows.iter().map(|row| sum_of_squares(&row[..width])).sum(),
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
    /// Writes the first `width` columns of rows to lines that are `stride` apart.
    pub fn write_rows<F>(to: &mut [f32], rows: &[[f32; PANEL]], width: usize, stride: usize) {
        for (i, row) in rows.iter().enumerate() {
            copy_row(&mut to[i * stride..][..width], row);
        }
    }
}

simd_fn! {
    /// Writes (`add`: adds) the first `width` columns of rows as lines: column j to `to[j * stride..][..rows.len()]`.
    pub fn write_transposed<F>(to: &mut [f32], rows: &[[f32; PANEL]], width: usize, stride: usize, add: bool) {
        let mut columns = Columns([[0.0; HALF]; PANEL]);
        for (part, sums) in rows.chunks(HALF).enumerate() {
            if part == 0 {
                fetch_rows(to, width, HALF, stride);
            }
            fetch_rows(to.get((part + 1) * HALF..).unwrap_or(&[]), width, HALF, stride);
            interleave(columns.0.as_flattened_mut(), HALF, sums.as_flattened(), sums.len(), width, PANEL);
            let (to, columns) = (&mut to[part * HALF..], &columns.0[..width]);
            if add {
                by_rows!(sums.len(), N => narrow::<N, true>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16])
            } else {
                by_rows!(sums.len(), N => narrow::<N, false>(to, columns, stride), [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16])
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

/// Writes tiles and rows past the caches, which then need not read the lines first: for results that would not stay there. What was
/// written is there when this is dropped; it stays on its thread, since a fence is of the thread that wrote.
pub struct Streams(PhantomData<*const ()>);

impl Streams {
    /// For a result of `len` numbers that are read after all of them have been written, if it is large enough.
    pub fn of(len: usize) -> Option<Streams> {
        // Measured: 12 MB gain 3 % of a forward pass, 3 MB nothing; much less is read back from a cache.
        const LARGE: usize = (8 << 20) / size_of::<f32>();
        (len >= LARGE).then_some(Streams(PhantomData))
    }

    /// For a result of `len` numbers that is next read when much else has been: it need not be so large.
    pub fn for_later(len: usize) -> Option<Streams> {
        // Measured (2 cores of an Intel Xeon, 2.4 MB): the products that write such a gradient take 5 % less time.
        const LARGE: usize = (1 << 20) / size_of::<f32>();
        (len >= LARGE).then_some(Streams(PhantomData))
    }

    /// As [`write_rows`].
    ///
    /// # Safety
    /// Until `self` is dropped, nobody, this thread included, may access what was written.
    #[inline]
    pub unsafe fn write_tile(&self, to: &mut [f32], tile: &Tile, rows: usize, width: usize, stride: usize) {
        for (line, row) in to.chunks_mut(stride).zip(&tile.rows[..rows]) {
            // SAFETY: the contract is the same.
            unsafe { self.write_row(&mut line[..width], row) };
        }
    }

    /// As [`copy_row`]. What is no whole row, or does not start at a cache line, is written through the caches.
    ///
    /// # Safety
    /// That of [`Streams::write_tile`].
    #[inline]
    pub unsafe fn write_row(&self, to: &mut [f32], row: &[f32; PANEL]) {
        #[cfg(target_arch = "x86_64")]
        if let Ok(to) = <&mut [f32; PANEL]>::try_from(&mut *to)
            && to.as_ptr().addr().is_multiple_of(64)
            && level() != Level::Baseline
        {
            // SAFETY: the processor has the features, and the row starts at a cache line; nobody reads it before the fence, by
            // this function's contract.
            return unsafe { if level() == Level::Avx2 { avx2::stream(to, row) } else { avx512::stream(to, row) } };
        }
        copy_row(to, row);
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

/// `sums[i, j] = sum over segments and their k of a[i, k] b[k, j]` for all rows and `halves` times 16 columns; `stride` is the
/// distance between the rows of B: [`HALF`] in a panel. Meanwhile `next`, which is read soon, may be fetched into the second
/// cache (with AVX-512 at most a line for each inner element); nothing if it is empty.
#[inline]
pub fn multiply(
    sums: &mut [[f32; PANEL]],
    halves: usize,
    layout: Rows,
    stride: usize,
    segments: &[Segment],
    next: &[f32],
) {
    sum_products(sums, false, halves, layout, stride, segments, next);
}

/// As [`multiply`] of whole packed rows and a panel.
#[inline]
pub fn multiply_packed(tile: &mut Tile, rows: usize, halves: usize, segment: Segment, next: &[f32]) {
    sum_products(&mut tile.rows[..rows], false, halves, Rows::packed(segment.len), HALF, &[segment], next);
}

/// As [`multiply`], but the products are added, each to what is there.
#[inline]
pub fn multiply_add(
    sums: &mut [[f32; PANEL]],
    halves: usize,
    layout: Rows,
    stride: usize,
    segments: &[Segment],
    next: &[f32],
) {
    sum_products(sums, true, halves, layout, stride, segments, next);
}

/// The products, added to what is there or not.
#[inline]
fn sum_products(
    sums: &mut [[f32; PANEL]],
    add: bool,
    halves: usize,
    layout: Rows,
    stride: usize,
    segments: &[Segment],
    next: &[f32],
) {
    let rows = sums.len();
    assert!((1..=tile_rows()).contains(&rows) && (1..=2).contains(&halves));
    for segment in segments {
        // Field by field: a copy of what was just written in parts waits until all stores before it are done.
        let (a, len) = (segment.a, segment.len);
        // Saturated, so that no stride wraps round to a place inside: no slice is that long.
        let before = len.saturating_sub(1);
        let (step, row) =
            if layout.step == 0 { (0, rows - 1) } else { ((rows - 1) / step_rows(), step_rows().min(rows) - 1) };
        let last = step
            .saturating_mul(layout.step)
            .saturating_add(row.saturating_mul(layout.row))
            .saturating_add(before.saturating_mul(layout.inner));
        let end = before.saturating_mul(stride).saturating_add(HALF);
        let reaches = |b: &&[f32]| end <= b.len();
        assert!(len == 0 || last < a.len() && segment.b[..halves].iter().all(reaches), "an operand is too short");
    }
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: the processor has the features; rows, halves and the segments' lengths were checked above.
        Level::Amx | Level::Avx512 => {
            return unsafe { avx512::multiply(sums, add, halves, layout, stride, segments, next) };
        }
        Level::Avx2 => {
            // SAFETY: as above; the steps lie inside of what was checked.
            return steps::multiply(sums, add, halves, layout, stride, segments, next, |step| unsafe {
                avx2::step(step)
            });
        }
        Level::Baseline => {}
    }
    steps::multiply(sums, add, halves, layout, stride, segments, next, plain::step);
}

/// As [`multiply_packed`], of operands in `parts` parts ([`super::split`]): writes, or adds, the sums of up to two steps of rows, which are
/// `step` apart in A. All rows of the steps are written; those that are not asked for are of no meaning. The segment
/// is whole blocks. Meanwhile `next` and `lines`, which are read or written soon, may be fetched.
#[inline]
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "fetched where it was measured"))]
#[expect(clippy::too_many_arguments, reason = "operands and sizes")]
pub fn multiply_split(
    _: &Registers,
    parts: usize,
    sums: &mut [[f32; PANEL]],
    add: bool,
    [rows, halves]: [usize; 2],
    step: usize,
    segment: Segment,
    next: &[f32],
    lines: &mut Lines,
) {
    assert!(segment.len.is_multiple_of(split::INNER), "parts are multiplied in whole blocks");
    let (steps, blocks) = (rows.div_ceil(split::STEP), segment.len / split::INNER);
    // Saturated, so that no length wraps round to a place inside.
    let end = blocks.saturating_mul(split::block(parts));
    assert!((1..=2).contains(&steps) && (1..=2).contains(&halves) && steps * split::STEP <= sums.len());
    let reaches = |b: &&[f32]| end <= b.len();
    let last = (steps - 1).saturating_mul(step).saturating_add(end);
    assert!(last <= segment.a.len() && segment.b[..halves].iter().all(reaches), "an operand is too short");
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Amx && blocks > 0 {
        let a = [segment.a, segment.a.get(step..).unwrap_or(&[])].map(<[f32]>::as_ptr);
        let b = segment.b.map(<[f32]>::as_ptr);
        let to = sums.as_mut_ptr().cast();
        // SAFETY: the processor has AMX, and its registers are set up, as [`Registers`] says; the lengths of the operands and of the
        // sums were checked above.
        return unsafe { amx::multiply(parts, to, add, [steps, halves], a, b, blocks, next, lines) };
    }
    split::multiply(parts, sums, add, [steps, halves], step, segment, blocks);
}
