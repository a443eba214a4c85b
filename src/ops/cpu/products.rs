//! What the linear layers on the CPU share: tiles of rows, panels of a weight, and windows of its columns.

use crate::backend::cpu::packed::{Format, Kernel};
use crate::backend::cpu::simd::{Level, level, simd_fn};
use crate::backend::cpu::tile::{HALF, PANEL, Segment, Tile, panels};
use crate::routing::Window;
use rayon::prelude::*;
use std::ops::Range;

/// Rows that are multiplied as one tile: of one sample, or all of a few samples that follow each other ([`Format::joined`]). A batch is
/// sorted by timestep, so those have nearly the same windows.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowTile {
    pub(crate) samples: Range<usize>,
    /// Rows of `[B T, _]`.
    pub(crate) rows: Range<usize>,
}

impl RowTile {
    /// The window that holds those of its samples.
    pub(crate) fn window(&self, windows: &[Window]) -> Window {
        window_of_all(&windows[self.samples.clone()])
    }

    /// Its samples, each with its rows.
    pub(crate) fn of_samples(&self, tokens: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (samples, rows) = (self.samples.clone(), self.rows.clone());
        samples.map(move |sample| (sample, rows.start.max(sample * tokens)..rows.end.min((sample + 1) * tokens)))
    }

    /// Its first row where each sample takes [`Format::rows_of`].
    pub(crate) fn first_row(&self, format: Format, tokens: usize) -> usize {
        self.rows.start + self.samples.start * (format.rows_of(tokens) - tokens)
    }
}

/// The window that holds all of some.
pub(crate) fn window_of_all(windows: &[Window]) -> Window {
    windows.iter().copied().reduce(Window::union).expect("there are windows")
}

/// Most tiles of a batch.
const MOST_TILES: usize = 24;
/// Numbers, 512 KB of them: an operand of at most so many is taken to stay in a core's second cache from one use to the next. How many
/// times as many the packed rows of a batch may be was measured ([`tiles_at_once`]): they should stay there while panels pass through.
pub(crate) const RESIDENT: usize = 1 << 17;
/// Tiles that are multiplied at once even when they leave less room: they share what is read of the panels.
const FEW_TILES: usize = 4;

/// Those of `b` samples that are run `i` of joined ones.
pub(crate) fn joined_samples(format: Format, tokens: usize, b: usize, i: usize) -> Range<usize> {
    let joined = format.joined(tokens);
    i * joined..((i + 1) * joined).min(b)
}

/// Most rows of a tile of samples of `tokens` tokens.
pub(crate) fn most_rows(format: Format, tokens: usize) -> usize {
    format.tile_rows().min(format.joined(tokens) * tokens)
}

/// Numbers that such a tile takes, packed.
pub(crate) fn packed_tile_len(format: Format, tokens: usize, inner: usize) -> usize {
    format.rows_len(most_rows(format, tokens), inner)
}

/// Numbers that the tiles of a batch take, packed: those of [`batches`] with as much for each.
pub(crate) fn packed_tiles_len(format: Format, tokens: usize, inner: usize) -> usize {
    let of_tile = packed_tile_len(format, tokens, inner);
    tiles_at_once(format, of_tile) * of_tile
}

/// Tiles of a batch, of which each takes `of_tile` numbers.
fn tiles_at_once(format: Format, of_tile: usize) -> usize {
    let fit = |numbers: usize| numbers / of_tile.max(1);
    let tiles = match level() {
        // Measured on an Intel Xeon, with 2 MB a core: with half as much, forward passes of DiT-S/2 take 8 % more.
        _ if format.is_parts() => fit(9 * RESIDENT / 4),
        // There too: with 2 tiles instead of 4 a step of DiT-B/4 takes 1 to 2 % more. With less than 2 MB it is not known.
        Level::Amx | Level::Avx512 => fit(RESIDENT).max(fit(2 * RESIDENT).min(FEW_TILES)),
        // Measured on Zen 3, with 512 KB a core. Half as much: DiT-S/4 takes 2 % less time, 1 at sublayer .5, but forward passes
        // of DiT-B/4 with less than 4 tiles 7 % more.
        Level::Avx2 | Level::Baseline => fit(RESIDENT / 2).max(fit(RESIDENT).min(FEW_TILES)),
    };
    tiles.clamp(1, MOST_TILES)
}

/// The tiles of a batch, each with its part of `packed`.
pub(crate) fn with_packed<'a>(
    format: Format,
    tiles: &'a [RowTile],
    packed: &'a [f32],
    tokens: usize,
    inner: usize,
) -> impl Iterator<Item = (&'a RowTile, &'a [f32])> {
    let len = packed_tile_len(format, tokens, inner);
    assert!(tiles.len() * len <= packed.len(), "fewer packed tiles than tiles");
    tiles.iter().zip(packed.chunks_exact(len))
}

/// What each of `count` products fetches of the rows `inner` of the panel `next`, which may be empty: a share of one half. With one
/// product nobody fetches the right half.
pub(crate) fn fetched_by_each(
    format: Format,
    next: &[f32],
    inner: Range<usize>,
    count: usize,
) -> impl Iterator<Item = &[f32]> {
    let [left, right] = format.of_panel(next, 0).map(|half| half.get(format.in_half(inner.clone())).unwrap_or(&[]));
    let shares = |half: &'_ [f32], count: usize| half.len().div_ceil(count.max(1)).max(1);
    let (of_left, of_right) = (shares(left, count.div_ceil(2)), shares(right, count / 2));
    left.chunks(of_left).chain(right.chunks(of_right)).chain(std::iter::repeat(&[][..]))
}

/// The inner elements that the samples of some tiles have in their windows, and what is between them.
pub(crate) fn inner_of_all(tiles: &[RowTile], windows: &[Window]) -> Range<usize> {
    tiles.iter().map(|tile| tile.window(windows)).reduce(Window::union).map_or(0..0, |window| window.range())
}

/// Panels of `len` rows, each with the one that follows, to fetch it in time; with nothing the last, and all of so few that they
/// stay in a core's cache.
pub(crate) fn each_panel(format: Format, panels: &[f32], len: usize) -> impl Iterator<Item = (&[f32], &[f32])> {
    let fetched = if panels.len() > RESIDENT { panels } else { &[] };
    let following = fetched.chunks_exact(format.panel_len(len)).skip(1).chain(std::iter::repeat(&[][..]));
    panels.chunks_exact(format.panel_len(len)).zip(following)
}

/// Calls `work` with the tiles of `rows`, which are of whole samples where those are joined, as many at a time as can stay in cache
/// with `of_tile` numbers each. Those of a call follow each other.
pub(crate) fn batches(
    format: Format,
    rows: Range<usize>,
    tokens: usize,
    of_tile: usize,
    mut work: impl FnMut(&[RowTile]),
) {
    let joined = format.joined(tokens);
    let samples = rows.start / tokens..rows.end.div_ceil(tokens);
    assert!(joined == 1 || rows.start.is_multiple_of(joined * tokens), "rows that start amid joined samples");
    let mut tiles = samples.clone().step_by(joined).flat_map(|first| {
        let samples = first..(first + joined).min(samples.end);
        let (start, end) = ((first * tokens).max(rows.start), (samples.end * tokens).min(rows.end));
        let of_tile =
            move |tile: Range<usize>| RowTile { samples: samples.clone(), rows: start + tile.start..start + tile.end };
        format.row_tiles(end - start).map(of_tile)
    });
    // In even parts: a batch of few tiles would read all panels for little.
    let count = tiles.clone().count().max(1);
    let most = count.div_ceil(count.div_ceil(tiles_at_once(format, of_tile)));
    let mut batch: [RowTile; MOST_TILES] = Default::default();
    loop {
        let mut count = 0;
        for (slot, tile) in batch[..most].iter_mut().zip(&mut tiles) {
            *slot = tile;
            count += 1;
        }
        if count == 0 {
            return;
        }
        work(&batch[..count]);
    }
}

/// Rows of one block of work, the unit that threads take, for `rows` rows of samples of `tokens` tokens (or of runs of joined samples,
/// with the tokens of a run) that are multiplied with panels of `packed` numbers:
///
/// - at most 256, so that panels are read few times; if they stay in cache at most a sample, but 64 may always be taken;
/// - fewer, but not less than 32, so that every thread gets about as many blocks;
/// - then whole samples if one fits, or else an even part of a sample.
///
/// It depends on the number of threads, and results must not: nothing may be summed over a block.
pub(crate) fn rows_per_block(rows: usize, tokens: usize, packed: usize) -> usize {
    // Measured (2 cores of an Intel Xeon, which others used too): with 256, a thread waits longer for the other at the end, and a step of
    // digits takes 2 to 4 % more time with AMX, 1 to 2 % with AVX2, as long with AVX-512.
    let most = if packed <= RESIDENT { tokens.clamp(64, 256) } else { 256 };
    let blocks = rows.div_ceil(most).next_multiple_of(rayon::current_num_threads());
    // At least a tile, so that joined samples fit.
    let target = rows.div_ceil(blocks.max(1)).clamp(32, most);
    if tokens <= target { target / tokens * tokens } else { tokens.div_ceil(tokens.div_ceil(target)) }
}

/// Samples of one block of work that sums over the tokens of each: whole runs of `joined`.
pub(crate) fn samples_per_block(batch: usize, tokens: usize, joined: usize, packed: usize) -> usize {
    (rows_per_block(batch * tokens, tokens * joined, packed) / tokens).max(1)
}

/// Most panels that a task packs: their 8 halves may lie in one set of the first cache, which has 8 lines on Zen 3.
pub(crate) const PACKED_PANELS: usize = 4;

/// Panels of `n` columns for a task, at most `most`: so many that there are some tasks for each thread.
pub(crate) fn panels_at_once(n: usize, most: usize) -> usize {
    panels(n).div_ceil(2 * rayon::current_num_threads()).clamp(1, most)
}

/// The panels of a row-major B `[len, n]`: of lines n apart, the columns of a tile would crowd into few
/// sets of the cache.
pub(crate) fn pack_panels(format: Format, to: &mut [f32], b: &[f32], n: usize, len: usize) {
    let at_once = panels_at_once(n, PACKED_PANELS);
    to.par_chunks_mut((at_once * format.panel_len(len)).max(1))
        .enumerate()
        .for_each(|(task, to)| format.pack_panels(to, b, task * at_once * PANEL, n, len));
}

/// Columns that a tile computes for a window: one or two halves of panels, of which the first may be the second of its panel.
///
/// A window is as many halves as its width asks for, wherever it starts: what it has of one half more takes the place of what its
/// first half has before it ([`Part::mix`]). What a tile has outside of [`Part::columns`] is of no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    format: Format,
    window: Window,
    first_half: usize,
    pub(crate) halves: usize,
    /// The half of which the first has a part.
    last_half: Option<usize>,
}

/// What tiles compute for `window` when they come to panel `panel`, if anything: every part of it once.
pub(crate) fn part(format: Format, window: Window, panel: usize) -> Option<Part> {
    let (start, count) = (window.start / HALF, window.width.div_ceil(HALF));
    let before = 2 * panel.checked_sub(start / 2)?;
    let last_half = (before == 0 && start + count < window.end().div_ceil(HALF)).then_some(start + count);
    let part = || Part { format, window, first_half: start + before, halves: (count - before).min(2), last_half };
    (before < count).then(part)
}

impl Part {
    /// Its columns of the panels over `len` inner elements; the first half is from [`Part::mix`], if that put it together.
    pub(crate) fn of<'a>(&self, panels: &'a [f32], len: usize, mixed: &'a [f32]) -> [&'a [f32]; 2] {
        let left = if self.last_half.is_some() { mixed } else { half_of(self.format, panels, len, self.first_half) };
        [left, if self.halves == 2 { half_of(self.format, panels, len, self.first_half + 1) } else { &[] }]
    }

    /// Puts the inner elements `inner`, of `len`, of its first half together, if that has a part of the last.
    pub(crate) fn mix(&self, to: &mut [f32], panels: &[f32], len: usize, inner: Range<usize>) {
        if let Some(last_half) = self.last_half {
            let inner = self.format.in_half(inner);
            let of_half = |half| &half_of(self.format, panels, len, half)[inner.clone()];
            mix_halves(&mut to[inner.clone()], of_half(last_half), of_half(self.first_half), self.window.start % HALF);
        }
    }

    /// The columns of its window, each range with the column of the tile that has the first of them.
    pub(crate) fn columns(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let at = self.first_half * HALF;
        let own = self.window.start.max(at)..self.window.end().min(at + self.halves * HALF);
        let of_tile = own.start - at;
        let of_last = self.last_half.map(|half| (half * HALF..self.window.end(), 0));
        std::iter::once((own, of_tile)).chain(of_last)
    }

    /// Those of them in the window of a sample.
    pub(crate) fn columns_of(&self, window: Window) -> impl Iterator<Item = (Range<usize>, usize)> {
        let clip = move |(columns, of_tile): (Range<usize>, usize)| {
            let (start, end) = (columns.start.max(window.start), columns.end.min(window.end()));
            (start < end).then(|| (start..end, of_tile + start - columns.start))
        };
        self.columns().filter_map(clip)
    }
}

/// Half number `half` of panels over `len` inner elements.
fn half_of(format: Format, panels: &[f32], len: usize, half: usize) -> &[f32] {
    &panels[half * format.half_len(len)..][..format.half_len(len)]
}

/// From its number `HALF - count` on, all bits of `count` numbers and none of the next.
const BITS: [u32; 2 * HALF] = {
    let mut bits = [0; 2 * HALF];
    let mut i = 0;
    while i < HALF {
        bits[i] = u32::MAX;
        i += 1;
    }
    bits
};

simd_fn! {
    /// Lines of the first `count` numbers of those of one half, and then of those of another.
    fn mix_halves<F>(to: &mut [f32], left: &[f32], right: &[f32], count: usize) {
        // A comparison for each number would be compiled to loads of single numbers.
        let bits: &[u32; HALF] = BITS[HALF - count..].first_chunk().expect("at most all of them");
        let lines = left.as_chunks::<HALF>().0.iter().zip(right.as_chunks::<HALF>().0);
        for (to, (left, right)) in to.as_chunks_mut::<HALF>().0.iter_mut().zip(lines) {
            for j in 0..HALF {
                to[j] = f32::from_bits(left[j].to_bits() & bits[j] | right[j].to_bits() & !bits[j]);
            }
            // Keeps the compiler from making vectors across lines, which it would gather.
            std::hint::black_box(());
        }
    }
}

/// When [`WindowedColumns::multiply`] calls.
pub(crate) enum Stage<'a> {
    /// Before a product: its kernel may fetch where the sums go.
    Before(&'a mut Kernel),
    /// With its sums.
    Done(&'a [[f32; PANEL]]),
}

/// Rows of `[B T, K]` times a weight in panels over K, of whose columns each sample has a window.
#[derive(Clone, Copy)]
pub(crate) struct WindowedColumns<'a> {
    pub(crate) format: Format,
    /// Over K.
    pub(crate) panels_of_w: &'a [f32],
    /// `[B]`
    pub(crate) windows: &'a [Window],
    pub(crate) tokens: usize,
    pub(crate) k: usize,
}

impl WindowedColumns<'_> {
    /// Inner elements of a part of K whose panels are multiplied before those of the next.
    fn at_once(&self) -> usize {
        self.k_of_panels().min(self.format.most_inner())
    }

    /// K, as multiplied.
    fn k_of_panels(&self) -> usize {
        self.format.inner(0..self.k, self.k).len()
    }

    /// Numbers that a tile takes: packed, and its sums.
    fn of_tile(&self) -> [usize; 2] {
        let panels = self.panels_of_w.len() / self.format.panel_len(self.k).max(1);
        let packed = packed_tile_len(self.format, self.tokens, self.at_once());
        let rows = self.format.sums_rows(most_rows(self.format, self.tokens));
        let sums = if self.at_once() < self.k_of_panels() { panels * rows * PANEL } else { 0 };
        [packed, sums]
    }

    /// [`batches`] for [`WindowedColumns::multiply`].
    pub(crate) fn batches(&self, rows: Range<usize>, work: impl FnMut(&[RowTile])) {
        batches(self.format, rows, self.tokens, self.of_tile().iter().sum(), work);
    }

    /// Most tiles of a batch.
    pub(crate) fn tiles_at_once(&self) -> usize {
        tiles_at_once(self.format, self.of_tile().iter().sum())
    }

    /// Numbers of the room for [`WindowedColumns::multiply`].
    pub(crate) fn room(&self) -> usize {
        self.format.half_len(self.k) + self.tiles_at_once() * self.of_tile().iter().sum::<usize>()
    }

    /// Products of the tiles of a batch, the first of which has the first of `rows` `[_, K]`, or of the GELU of those. `work` is
    /// called before each part is multiplied, and with its sums.
    pub(crate) fn multiply(
        &self,
        room: &mut [f32],
        tiles: &[RowTile],
        rows: &[f32],
        of_gelu: bool,
        mut work: impl FnMut(&RowTile, &Part, Stage),
    ) {
        let WindowedColumns { format, panels_of_w, windows, k, .. } = *self;
        let [packed_len, sums_len] = self.of_tile();
        let (mixed, room) = room.split_at_mut(format.half_len(k));
        let (packed, sums) = room.split_at_mut(tiles.len() * packed_len);
        let (mut tile, mut kernel) = (Tile::new(), format.kernel());
        for start in (0..self.k_of_panels()).step_by(self.at_once().max(1)) {
            let inner = start..(start + self.at_once()).min(self.k_of_panels());
            let is_last = inner.end == self.k_of_panels();
            for (RowTile { rows: of_tile, .. }, to) in tiles.iter().zip(packed.chunks_exact_mut(packed_len)) {
                let rows = &rows[(of_tile.start - tiles[0].rows.start) * k + start..];
                let pack = if of_gelu { Format::pack_rows_of_gelu } else { Format::pack_rows };
                pack(format, to, rows, of_tile.len(), inner.end.min(k) - start, k);
            }
            for (panel, (_, next)) in each_panel(format, panels_of_w, k).enumerate() {
                let part_of = |tile: &RowTile| part(format, tile.window(windows), panel);
                let active = tiles.iter().filter(|tile| part_of(tile).is_some()).count();
                let mut shares = fetched_by_each(format, next, inner.clone(), active);
                let mut mixed_for = None;
                for (i, row_tile) in tiles.iter().enumerate() {
                    let Some(part) = part_of(row_tile) else { continue };
                    if mixed_for.replace(part) != Some(part) {
                        part.mix(mixed, panels_of_w, k, inner.clone());
                    }
                    let next = shares.next().unwrap_or(&[]);
                    let b = part
                        .of(panels_of_w, k, mixed)
                        .map(|half| half.get(format.in_half(inner.clone())).unwrap_or(&[]));
                    let segment = Segment { a: &packed[i * packed_len..][..packed_len], b, len: inner.len() };
                    let count = row_tile.rows.len();
                    if is_last {
                        work(row_tile, &part, Stage::Before(&mut kernel));
                    }
                    if sums_len == 0 {
                        kernel.multiply(&mut tile, count, part.halves, segment, next);
                        work(row_tile, &part, Stage::Done(&tile.rows[..count]));
                        continue;
                    }
                    let of_panel = format.sums_rows(count) * PANEL;
                    let sums = sums[i * sums_len + panel * of_panel..][..of_panel].as_chunks_mut().0;
                    kernel.multiply_part(sums, start > 0, count, part.halves, segment, next);
                    if is_last {
                        work(row_tile, &part, Stage::Done(&sums[..count]));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::numbers;
    use crate::backend::cpu::packed::formats;

    #[test]
    fn batches_cover_the_rows_in_tiles_of_whole_samples_or_parts_of_one() {
        let cases = [
            (0..10, 5, 3),
            (7..61, 9, 1 << 13),
            (3..4, 1, 1),
            (128..256, 256, 384),
            (0..800, 256, 384),
            (32..110, 2, 5),
            (30..96, 6, 70),
            (64..144, 16, 128),
        ];
        for (format, (rows, tokens, inner)) in formats().flat_map(|format| cases.clone().map(|case| (format, case))) {
            let (mut seen, mut counts) = (Vec::new(), Vec::new());
            batches(format, rows.clone(), tokens, packed_tile_len(format, tokens, inner), |tiles| {
                counts.push(tiles.len());
                assert!(
                    tiles.len() * packed_tile_len(format, tokens, inner) <= packed_tiles_len(format, tokens, inner)
                );
                assert!(
                    tiles
                        .iter()
                        .all(|tile| format.rows_len(tile.rows.len(), inner) <= packed_tile_len(format, tokens, inner))
                );
                for tile in tiles {
                    assert!(!tile.rows.is_empty() && tile.rows.len() <= format.tile_rows());
                    assert!(tile.rows.clone().all(|row| tile.samples.contains(&(row / tokens))));
                    let of_samples: Vec<_> = tile.of_samples(tokens).collect();
                    assert!(of_samples.iter().all(|(sample, rows)| rows.clone().all(|row| row / tokens == *sample)));
                    assert!(of_samples.into_iter().flat_map(|(_, rows)| rows).eq(tile.rows.clone()));
                    assert!(tile.samples.len() == 1 || tile.rows.len() == tile.samples.len() * tokens);
                    seen.extend(tile.rows.clone());
                }
            });
            let most = counts.iter().max().copied().unwrap_or(0);
            let all: usize = counts.iter().sum();
            assert_eq!(most, all.div_ceil(counts.len()), "a batch is larger than even ones");
            assert_eq!(seen, rows.collect::<Vec<_>>());
        }
    }

    #[test]
    fn parts_of_panels_cover_the_window_in_as_few_halves_as_its_width_asks_for() {
        let len = 3;
        let windows =
            [(0, 1), (15, 1), (16, 17), (5, 307), (31, 2), (64, 32), (47, 49), (9, 64), (0, 64), (30, 20), (7, 0)];
        for (format, window) in formats().flat_map(|format| windows.map(|window| (format, window))) {
            let window = Window { start: window.0, width: window.1 };
            let n = window.end() + 3;
            let b = numbers(6, len * n);
            let mut panels_of_b = vec![f32::NAN; panels(n) * format.panel_len(len)];
            pack_panels(format, &mut panels_of_b, &b, n, len);
            let (mut seen, mut halves) = (Vec::new(), 0);
            for part in (0..panels(n)).filter_map(|panel| part(format, window, panel)) {
                let mut mixed = vec![f32::NAN; format.half_len(len)];
                part.mix(&mut mixed, &panels_of_b, len, format.inner(0..len, len));
                let of_part = part.of(&panels_of_b, len, &mixed);
                for (columns, first) in part.columns() {
                    for (column, at) in columns.clone().zip(first..) {
                        assert!((0..len).all(|k| format.in_panel(of_part, k, at) == format.reads(b[k * n + column])));
                    }
                    seen.extend(columns);
                }
                halves += part.halves;
            }
            seen.sort();
            assert_eq!(seen, window.range().collect::<Vec<_>>());
            assert_eq!(halves, window.width.div_ceil(HALF));
        }
    }

    #[test]
    fn products_fetch_the_next_panel_in_shares_where_panels_are_many() {
        let inner = 5;
        for format in formats() {
            let len = format.panel_len(inner);
            for (count, large) in [(4, false), (RESIDENT / len + 1, true)] {
                let panels: Vec<_> = (0..count * len).map(|i| i as f32).collect();
                let mut rest = &panels[..];
                for (i, (panel, next)) in each_panel(format, &panels, inner).enumerate() {
                    assert_eq!(panel, rest.split_off(..len).unwrap());
                    assert_eq!(next, if large && i + 1 < count { &rest[..len] } else { &[] });
                }
                assert!(rest.is_empty());
            }
            let panel: Vec<_> = (0..len).map(|i| i as f32).collect();
            for (rows, products) in
                [(0..inner, 4), (1..3, 2), (2..inner, 5), (0..inner, 3), (0..inner, 40), (0..inner, 321)]
            {
                let shares: Vec<_> = fetched_by_each(format, &panel, rows.clone(), products).take(products).collect();
                let rows = format.in_half(rows);
                assert_eq!(shares.concat(), format.of_panel(&panel, 0).map(|half| &half[rows.clone()]).concat());
                assert!(shares.iter().all(|share| share.len() <= rows.len().div_ceil(products / 2)));
            }
            assert_eq!(
                fetched_by_each(format, &panel, 0..inner, 1).next().unwrap(),
                &panel[..format.in_half(0..inner).end]
            );
            assert!(fetched_by_each(format, &[], 0..inner, 3).next().is_some_and(<[f32]>::is_empty));
        }
    }
}
