//! Packed operands of the linear layers, and their products: rows in tiles (A), a weight in panels (B), both over an inner dimension
//! of which a window is a range.
//!
//! They are packed for the kernel that multiplies them: numbers as they are ([`super::tile`]), or for AMX parts of each
//! ([`super::split`]). Either way they are a slice of f32; what is in it only this file knows, and attention in bf16.

use super::pack;
use super::shared::Shared;
use super::simd::{Level, fetch_rows, level, limit};
use super::split::{self, EXACT, ROUNDED, by_parts};
use super::tile::{self, HALF, Lines, PANEL, Registers, Rows, Segment, Tile};
use crate::backend::DType;
use crate::routing::Window;
use std::ops::Range;
use std::sync::OnceLock;

/// Whether the kernel for AMX is wanted for all sizes, as tests of it do.
fn amx_is_asked_for() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| matches!(limit(), Ok(Some(Level::Amx))))
}

/// What operands are packed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Numbers, for the kernels of [`super::tile`].
    Numbers,
    /// So many parts of each, for the kernels for AMX: [`EXACT`] or [`ROUNDED`].
    Parts(usize),
}

impl Format {
    /// The one for samples of `tokens` tokens and products in `elem`, f32 or bf16. Where there is no AMX, those in bf16 take long: then
    /// their specification computes them.
    #[inline]
    pub fn of(tokens: usize, elem: DType) -> Format {
        let parts = Format::Parts(if elem == DType::Bf16 { ROUNDED } else { EXACT });
        // Without joining, so few rows leave more than half of a tile empty.
        let few = tokens <= split::STEP && parts.joined(tokens) == 1;
        let has_kernel = level() == Level::Amx || elem == DType::Bf16;
        if has_kernel && (!few || amx_is_asked_for()) { parts } else { Format::Numbers }
    }

    /// Whether operands are packed as parts.
    #[inline]
    pub fn is_parts(self) -> bool {
        matches!(self, Format::Parts(_))
    }

    /// How many samples of `tokens` tokens are one tile together: several where their rows fit into a tile of parts. Where rows are the
    /// inner dimension, parts are of pairs of rows, and an odd sample would share one with the next.
    #[inline]
    pub fn joined(self, tokens: usize) -> usize {
        let joins = self.is_parts() && (2..=split::STEP).contains(&tokens) && tokens.is_multiple_of(2);
        if joins { 2 * split::STEP / tokens } else { 1 }
    }

    /// Rows of a step: what the rows of a tile are rounded to, and the channels of a group.
    #[inline]
    pub fn step_rows(self) -> usize {
        if self.is_parts() { split::STEP } else { tile::step_rows() }
    }

    /// Rows of a tile.
    #[inline]
    pub fn tile_rows(self) -> usize {
        if self.is_parts() { 2 * split::STEP } else { tile::tile_rows() }
    }

    /// Splits `rows` into tiles of at most [`Format::tile_rows`] rows.
    pub fn row_tiles(self, rows: usize) -> impl Iterator<Item = Range<usize>> + Clone {
        // A step of AMX takes as long whatever it holds, so all but the last are full.
        let (whole, even) = if self.is_parts() { (rows, 0) } else { (0, rows) };
        let whole = (0..whole).step_by(2 * split::STEP).map(move |row| row..(row + 2 * split::STEP).min(whole));
        whole.chain(tile::row_tiles(even))
    }

    /// Groups of [`Format::step_rows`] channels that hold `channels`, of which only the last may be smaller.
    #[inline]
    pub fn groups(self, channels: usize) -> usize {
        channels.div_ceil(self.step_rows())
    }

    /// Columns that hold `columns` in whole panels and in whole groups, and in whole cache lines.
    #[inline]
    pub fn padded_columns(self, columns: usize) -> usize {
        (tile::panels(columns) * PANEL).max(self.groups(columns) * self.step_rows()).next_multiple_of(HALF)
    }

    /// Numbers of a tile of up to `rows` rows over `inner` elements.
    #[inline]
    pub fn rows_len(self, rows: usize, inner: usize) -> usize {
        match self {
            Format::Numbers => tile::packed_len(rows, inner),
            Format::Parts(parts) => rows.div_ceil(split::STEP) * split::len(parts, inner),
        }
    }

    /// Numbers of half a panel over `inner` elements.
    #[inline]
    pub fn half_len(self, inner: usize) -> usize {
        match self {
            Format::Numbers => inner * HALF,
            Format::Parts(parts) => split::len(parts, inner),
        }
    }

    /// Numbers of a panel over `inner` elements.
    #[inline]
    pub fn panel_len(self, inner: usize) -> usize {
        2 * self.half_len(inner)
    }

    /// The inner elements, of `len`, that are multiplied for `range`: with parts a few more around them, for which A holds zeros.
    #[inline]
    pub fn inner(self, range: Range<usize>, len: usize) -> Range<usize> {
        if self.is_parts() { split::padded(range, len) } else { range }
    }

    /// So few inner elements that it takes less to multiply them than to do without. Measured (2 cores of an Intel Xeon, three parts): of
    /// 128 channels, to multiply 26 inactive ones too takes 5 to 9 % off a step; of 384, with 77 inactive it neither saves nor costs.
    #[inline]
    pub fn few_inner(self) -> usize {
        if self.is_parts() { split::INNER } else { 0 }
    }

    /// Where the inner elements of `range` are in half a panel: with parts, those of whole pairs.
    #[inline]
    pub fn in_half(self, range: Range<usize>) -> Range<usize> {
        let at = |inner: usize| match self {
            Format::Numbers => inner * HALF,
            Format::Parts(parts) => split::at(parts, inner),
        };
        at(range.start)..at(range.end)
    }

    /// The halves of a panel from inner element `first` on, at which one of [`Format::inner`] starts.
    #[inline]
    pub fn of_panel(self, panel: &[f32], first: usize) -> [&[f32]; 2] {
        let (left, right) = panel.split_at(panel.len() / 2);
        let first = self.in_half(first..first).start;
        [&left[first..], &right[first..]]
    }

    /// Packs a tile of rows, `stride` apart, of `len` inner elements. The first is where a range of [`Format::inner`] starts.
    pub fn pack_rows(self, to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
        match self {
            Format::Numbers => pack::pack_rows(to, from, rows, len, stride),
            Format::Parts(parts) => by_parts!(parts, P => split::pack_rows::<P>(to, from, rows, len, stride)),
        }
    }

    /// [`Format::pack_rows`] of the GELU of the rows.
    pub fn pack_rows_of_gelu(self, to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
        match self {
            Format::Numbers => pack::pack_rows_of_gelu(to, from, rows, len, stride),
            Format::Parts(parts) => by_parts!(parts, P => split::pack_rows_of_gelu::<P>(to, from, rows, len, stride)),
        }
    }

    /// Packs panel `panel` of `B = W^T`, W row-major `[n, len]`: columns of the panel are rows of W.
    pub fn pack_panel_transposed(self, to: &mut [f32], w: &[f32], panel: usize, n: usize, len: usize) {
        match self {
            Format::Numbers => pack::pack_panel_transposed(to, w, panel, n, len, len),
            Format::Parts(parts) => by_parts!(parts, P => split::pack_panel_transposed::<P>(to, w, panel, n, len, len)),
        }
    }

    /// Packs panels of a row-major B `[len, n]`, as many as `to` holds: those of the columns from `first` on.
    pub fn pack_panels(self, to: &mut [f32], b: &[f32], first: usize, n: usize, len: usize) {
        match self {
            Format::Numbers => pack::pack_panels(to, b, first, n, len),
            Format::Parts(parts) => by_parts!(parts, P => split::pack_panels::<P>(to, b, first, n, len)),
        }
    }

    /// Rows that are multiplied at once where rows are the inner dimension.
    #[inline]
    pub fn block_rows(self) -> usize {
        if self.is_parts() { split::INNER } else { 1 }
    }

    /// Most rows that are multiplied with a tile of channels before its sums go back to memory.
    pub fn most_rows(self) -> usize {
        if self.is_parts() { CACHED_ROWS } else { tile::MOST_INNER }
    }

    /// Rows that `tokens` tokens of a sample take where rows are the inner dimension.
    pub fn rows_of(self, tokens: usize) -> usize {
        if self.is_parts() { tokens.next_multiple_of(2) } else { tokens }
    }

    /// Packs `panels` of a row-major B of `n` columns and `rows` rows: as rows from `start` on of panels side by side, of `panel_len`
    /// numbers each.
    #[expect(clippy::too_many_arguments, reason = "where from, and where to")]
    pub fn pack_rows_of_panels(
        self,
        to: &mut [f32],
        panel_len: usize,
        start: usize,
        b: &[f32],
        panels: Range<usize>,
        n: usize,
        rows: usize,
    ) {
        let at = self.in_half(start..start + self.rows_of(rows));
        assert!(at.end <= panel_len / 2, "more rows than a panel has");
        if let Format::Parts(parts) = self {
            let (to, columns) = (&mut to[at.start..], panels.start * PANEL..(panels.end * PANEL).min(n));
            return by_parts!(parts, P => split::pack_columns::<P>(to, panel_len / 2, b, columns, n, rows, rows));
        }
        for (panel, to) in panels.zip(to.chunks_exact_mut(panel_len)) {
            pack::pack_panel(tile::of_panel_mut(to).map(|half| &mut half[at.clone()]), b, panel, n, n);
        }
    }

    /// Packs halves of a panel, `[rows, HALF]` of numbers each. Numbers need no packing: they are multiplied where they are.
    pub fn pack_halves(self, to: [&mut [f32]; 2], from: [&[f32]; 2], rows: usize) {
        let Format::Parts(parts) = self else { panic!("a panel of numbers is multiplied where it is") };
        for (to, from) in to.into_iter().zip(from) {
            by_parts!(parts, P => split::pack_pairs::<P>(to, from, rows, HALF, HALF));
        }
    }

    /// Numbers of channels as the rows of A, whose inner dimension is `rows` rows: groups one after the other.
    pub fn routed_len(self, rows: usize, channels: usize) -> usize {
        self.groups(channels) * self.group_len(rows)
    }

    /// Numbers of a group of channels over `rows` rows.
    fn group_len(self, rows: usize) -> usize {
        match self {
            Format::Numbers => rows * tile::packed_stride(),
            Format::Parts(parts) => split::len(parts, rows),
        }
    }

    /// Where row `row` of group `group` is: with parts, where its block is.
    pub fn in_routed(self, group: usize, row: usize, rows: usize) -> usize {
        let of_group = match self {
            Format::Numbers => row * tile::packed_stride(),
            Format::Parts(parts) => row / split::INNER * split::block(parts),
        };
        group * self.group_len(rows) + of_group
    }

    /// Puts lines of channels into [`Format::routed_len`] numbers, where the groups that the window meets have them. Lines are `stride`
    /// apart and hold whole groups; the first is row `first` of `rows`.
    ///
    /// # Safety
    /// Nobody else may access these rows.
    pub unsafe fn scatter(self, to: &Shared, lines: &[f32], stride: usize, window: Window, first: usize, rows: usize) {
        // SAFETY: the contract is the same.
        unsafe {
            match self {
                Format::Numbers => pack::scatter(to, lines, stride, window, first, rows),
                Format::Parts(parts) => {
                    by_parts!(parts, P => split::scatter::<P>(to, lines, stride, window.range(), first, rows));
                }
            }
        }
    }

    /// The most inner elements that are multiplied with all panels before the next.
    pub fn most_inner(self) -> usize {
        if self.is_parts() { CACHED_INNER } else { usize::MAX }
    }

    /// Rows of the sums of `rows` rows: whole steps, where the kernel writes them.
    pub fn sums_rows(self, rows: usize) -> usize {
        if self.is_parts() { rows.next_multiple_of(split::STEP) } else { rows }
    }

    /// Its kernel, on this thread.
    #[inline]
    pub fn kernel(self) -> Kernel {
        Kernel { format: self, registers: self.is_parts().then(Registers::new), lines: Lines::new() }
    }

    /// A number as products read it.
    #[cfg(test)]
    pub fn reads(self, x: f32) -> f32 {
        if self == Format::Parts(ROUNDED) { split::rounded(x) } else { x }
    }

    /// The number of inner element `k` and column `j` of a panel, as products read it.
    #[cfg(test)]
    pub fn in_panel(self, halves: [&[f32]; 2], k: usize, j: usize) -> f32 {
        let half = halves[j / HALF];
        match self {
            Format::Numbers => half[k * HALF + j % HALF],
            Format::Parts(parts) => split::in_half(parts, half, k, j % HALF),
        }
    }
}

/// What multiplies packed operands on a thread, from where products begin to where they end.
pub struct Kernel {
    format: Format,
    registers: Option<Registers>, // with parts
    lines: Lines,
}

impl Kernel {
    /// As [`fetch_rows`]; with parts, the kernel of the next product fetches them, a few at a time, so that its own operands do not wait
    /// behind them, and as if all were written.
    #[inline]
    pub fn fetch_rows(&mut self, from: &[f32], rows: usize, width: usize, stride: usize) {
        match self.format {
            Format::Numbers => fetch_rows(from, rows, width, stride),
            Format::Parts(_) => self.lines.add_rows(from, rows, width, stride),
        }
    }

    /// `to[i, j] = sum over k of a[i, k] b[k, j]` for a tile of rows and halves of a panel. Meanwhile `next`, which is read soon, may be
    /// fetched into the second cache.
    #[inline]
    pub fn multiply(&mut self, to: &mut Tile, rows: usize, halves: usize, segment: Segment, next: &[f32]) {
        match self.format {
            Format::Numbers => tile::multiply_packed(to, rows, halves, segment, next),
            Format::Parts(_) => self.multiply_part(&mut to.rows, false, rows, halves, segment, next),
        }
    }

    /// As [`Kernel::multiply`] of parts, for a part of the inner dimension, where that has several: to [`Format::sums_rows`], or added to
    /// them.
    pub fn multiply_part(
        &mut self,
        sums: &mut [[f32; PANEL]],
        add: bool,
        rows: usize,
        halves: usize,
        segment: Segment,
        next: &[f32],
    ) {
        self.multiply_split(sums, add, rows, halves, self.format.group_len(segment.len), segment, next);
    }

    /// Adds products to `sums`, which have [`Format::sums_rows`]: of `rows` rows of A and halves of a panel, over parts of an inner
    /// dimension of `inner` elements.
    #[inline]
    pub fn multiply_add(
        &mut self,
        sums: &mut [[f32; PANEL]],
        rows: usize,
        halves: usize,
        inner: usize,
        segments: &[Segment],
        next: &[f32],
    ) {
        if self.format == Format::Numbers {
            return tile::multiply_add(&mut sums[..rows], halves, Rows::packed(inner), HALF, segments, next);
        }
        let mut shares = next.chunks(next.len().div_ceil(segments.len().max(1)).max(1));
        for segment in segments {
            let next = shares.next().unwrap_or(&[]);
            self.multiply_split(sums, true, rows, halves, self.format.group_len(inner), *segment, next);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "operands and sizes")]
    fn multiply_split(
        &mut self,
        sums: &mut [[f32; PANEL]],
        add: bool,
        rows: usize,
        halves: usize,
        step: usize,
        segment: Segment,
        next: &[f32],
    ) {
        let (Format::Parts(parts), Some(registers)) = (self.format, &self.registers) else {
            panic!("numbers are multiplied over all of the inner dimension")
        };
        tile::multiply_split(registers, parts, sums, add, [rows, halves], step, segment, next, &mut self.lines);
    }
}

/// Inner elements of rows and panels that stay in a core's caches: with 384, 6 tiles of DiT-B/4 in three parts with their sums take 1 MB
/// of the 2 MB of an Intel Xeon. More were not tried; of one part, steps of DiT-S/2 with 192 to 1536 take as long.
const CACHED_INNER: usize = 12 * split::INNER;

/// Rows of panels that stay in a core's caches, with the sums over them. Measured (2 cores of an Intel Xeon, with 2 MB each): as against
/// half as many, steps of DiT-S/2 in three parts take 2 to 5 % less time and of S/4 2 %; twice as many gain nothing. Of one part, with a
/// third to twice as many they take as long.
const CACHED_ROWS: usize = 24 * split::INNER;

/// All formats: parts are multiplied on every processor, if only by their specification.
#[cfg(test)]
pub fn formats() -> impl Iterator<Item = Format> + Clone {
    [Format::Numbers, Format::Parts(EXACT), Format::Parts(ROUNDED)].into_iter()
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::*;

    #[test]
    fn transposed_panels_hold_the_matrix_and_zeros() {
        let sizes =
            [1, 8, 9, 15, 16, 17, 33, 70].into_iter().flat_map(|n| [1, 2, 31, 32, 33, 45, 64].map(|len| (n, len)));
        for (format, (n, len)) in formats().flat_map(|format| sizes.clone().map(move |size| (format, size))) {
            let w = numbers(1, n * len);
            for panel in 0..tile::panels(n) {
                let mut packed = vec![f32::NAN; format.panel_len(len)];
                format.pack_panel_transposed(&mut packed, &w, panel, n, len);
                let halves = format.of_panel(&packed, 0);
                let columns = (n - panel * PANEL).min(PANEL);
                // What is multiplied: whole halves, and with parts whole blocks.
                for (k, j) in (0..format.inner(0..len, len).len())
                    .flat_map(|k| (0..columns.next_multiple_of(HALF)).map(move |j| (k, j)))
                {
                    let column = panel * PANEL + j;
                    let got = format.in_panel(halves, k, j);
                    let what = format!("({k}, {j}) of panel {panel} of {n} x {len}, {format:?}");
                    if j < columns && k < len {
                        assert_eq!(got, format.reads(w[column * len + k]), "{what}");
                    } else if format.is_parts() {
                        assert_eq!(got, 0.0, "{what}");
                    }
                }
            }
        }
    }
}
