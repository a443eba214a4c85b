//! What the linear layers on the CPU share: tiles of rows that never cross samples, panels of a weight, and its gradient.

use crate::backend::cpu::pack::{pack_panel, pack_rows, pack_rows_of_gelu};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::{Level, add_assign, fetch, level, simd_fn};
use crate::backend::cpu::tile::{
    HALF, MOST_INNER, PANEL, Rows, Segment, Streams, copy_row, groups, multiply_add, of_panel, of_panel_mut,
    packed_len, packed_stride, panels, row_tiles, step_rows, tile_rows, write_transposed,
};
use crate::routing::Window;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of one sample that are multiplied as one tile.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowTile {
    pub(crate) sample: usize,
    /// Rows of `[B T, _]`.
    pub(crate) rows: Range<usize>,
}

/// Most tiles of a batch.
const MOST_TILES: usize = 24;
/// Numbers of packed rows that leave room in a core's cache for the panels; and of an operand that stays there.
const RESIDENT: usize = 1 << 17;
/// Tiles that are multiplied at once even when they leave less room: they share what is read of the panels.
const FEW_TILES: usize = 4;

/// Numbers that a tile of a sample takes, packed.
pub(crate) fn packed_tile_len(tokens: usize, inner: usize) -> usize {
    packed_len(tile_rows().min(tokens), inner)
}

/// Numbers that the tiles of a batch of [`batches`] take, packed.
pub(crate) fn packed_tiles_len(tokens: usize, inner: usize) -> usize {
    tiles_at_once(tokens, inner) * packed_tile_len(tokens, inner)
}

/// Tiles of a batch; none crosses samples.
fn tiles_at_once(tokens: usize, inner: usize) -> usize {
    let fit = |numbers: usize| numbers / packed_tile_len(tokens, inner);
    let tiles = match level() {
        // Measured on an Intel Xeon, with 2 MB a core: with 2 tiles instead of 4 a step of DiT-B/4 takes 1 to 2 % more. With less
        // it is not known.
        Level::Avx512 => fit(RESIDENT).max(fit(2 * RESIDENT).min(FEW_TILES)),
        // Measured on Zen 3, with 512 KB a core. Half as much: DiT-S/4 takes 2 % less time, 1 at sublayer .5, but forward passes
        // of DiT-B/4 with less than 4 tiles 7 % more.
        Level::Avx2 | Level::Baseline => fit(RESIDENT / 2).max(fit(RESIDENT).min(FEW_TILES)),
    };
    tiles.clamp(1, MOST_TILES)
}

/// Packs the tiles of a batch one after the other, each [`packed_tile_len`] numbers: of rows of `inner` numbers, the first of
/// which is that of the first tile, or of their GELU.
pub(crate) fn pack_tiles(to: &mut [f32], rows: &[f32], of_gelu: bool, tiles: &[RowTile], tokens: usize, inner: usize) {
    let pack = if of_gelu { pack_rows_of_gelu } else { pack_rows };
    let first = tiles[0].rows.start;
    for (to, tile) in to.chunks_exact_mut(packed_tile_len(tokens, inner)).zip(tiles) {
        pack(to, &rows[(tile.rows.start - first) * inner..], tile.rows.len(), inner, inner);
    }
}

/// The tiles of a batch, each with its part of `packed`.
pub(crate) fn with_packed<'a>(
    tiles: &'a [RowTile],
    packed: &'a [f32],
    tokens: usize,
    inner: usize,
) -> impl Iterator<Item = (&'a RowTile, &'a [f32])> {
    let len = packed_tile_len(tokens, inner);
    assert!(tiles.len() * len <= packed.len(), "fewer packed tiles than tiles");
    tiles.iter().zip(packed.chunks_exact(len))
}

/// What each of `count` products fetches of the rows `inner` of the panel `next`, which may be empty: a share of one half. With one
/// product nobody fetches the right half.
pub(crate) fn fetched_by_each(next: &[f32], inner: Range<usize>, count: usize) -> impl Iterator<Item = &[f32]> {
    let [left, right] = of_panel(next, 0).map(|half| half.get(inner.start * HALF..inner.end * HALF).unwrap_or(&[]));
    let shares = |half: &'_ [f32], count: usize| half.len().div_ceil(count.max(1)).max(1);
    let (of_left, of_right) = (shares(left, count.div_ceil(2)), shares(right, count / 2));
    left.chunks(of_left).chain(right.chunks(of_right)).chain(std::iter::repeat(&[][..]))
}

/// Panels of `len` rows, each with the one that follows, to fetch it in time; with nothing the last, and all of so few that they
/// stay in a core's cache.
pub(crate) fn each_panel(panels: &[f32], len: usize) -> impl Iterator<Item = (&[f32], &[f32])> {
    let fetched = if panels.len() > RESIDENT { panels } else { &[] };
    let following = fetched.chunks_exact(len * PANEL).skip(1).chain(std::iter::repeat(&[][..]));
    panels.chunks_exact(len * PANEL).zip(following)
}

/// Calls `work` with the tiles of `rows`, as many at a time as can stay in cache with `inner` numbers a row. Those of a call
/// follow each other.
pub(crate) fn batches(rows: Range<usize>, tokens: usize, inner: usize, mut work: impl FnMut(&[RowTile])) {
    let samples = rows.start / tokens..rows.end.div_ceil(tokens);
    let mut tiles = samples.flat_map(|sample| {
        let (start, end) = ((sample * tokens).max(rows.start), ((sample + 1) * tokens).min(rows.end));
        row_tiles(end - start).map(move |tile| RowTile { sample, rows: start + tile.start..start + tile.end })
    });
    let most = tiles_at_once(tokens, inner);
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

/// Most panels that a task packs: their 8 halves may lie in one set of the first cache, which has 8 lines on Zen 3.
const MOST_PANELS: usize = 4;
/// Lines from one that is copied to the one that is fetched meanwhile.
const LINES_AHEAD: usize = 8;

/// Panels of `n` columns that a task packs.
pub(crate) fn panels_at_once(n: usize) -> usize {
    panels(n).div_ceil(2 * rayon::current_num_threads()).clamp(1, MOST_PANELS)
}

/// The panels `[panels(n), 2, len, HALF]` of a row-major B `[len, n]`: of lines n apart, a tile's columns would crowd into few
/// sets of the cache.
pub(crate) fn pack_panels(to: &mut [f32], b: &[f32], n: usize, len: usize) {
    let at_once = panels_at_once(n);
    to.par_chunks_mut((at_once * len * PANEL).max(1))
        .enumerate()
        .for_each(|(task, to)| pack_some_panels(to, b, task * at_once * PANEL, n, len));
}

simd_fn! {
    /// The panels of the columns from `first` on, side by side: longer parts of lines come faster from memory.
    fn pack_some_panels<F>(to: &mut [f32], b: &[f32], first: usize, n: usize, len: usize) {
        let columns = first..(first + to.len() / len).min(n);
        for k in 0..len {
            for (half, from) in b[k * n..][columns.clone()].chunks(HALF).enumerate() {
                fetch(from.as_ptr().wrapping_add(LINES_AHEAD * n));
                let to = &mut to[(half * len + k) * HALF..][..HALF];
                match from.first_chunk::<HALF>() {
                    Some(from) => to.copy_from_slice(from),
                    None => to[..from.len()].copy_from_slice(from),
                }
            }
        }
    }
}

/// Columns that a tile computes for a window: one or two halves of panels, of which the first may be the second of its panel.
///
/// A window is as many halves as its width asks for, wherever it starts: what it has of one half more takes the place of what its
/// first half has before it ([`Part::mix`]). What a tile has outside of [`Part::columns`] is of no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    window: Window,
    first_half: usize,
    pub(crate) halves: usize,
    /// The half of which the first has a part.
    last_half: Option<usize>,
}

/// What tiles compute for `window` when they come to panel `panel`, if anything: every part of it once.
pub(crate) fn part(window: Window, panel: usize) -> Option<Part> {
    let (start, count) = (window.start / HALF, window.width.div_ceil(HALF));
    let before = 2 * panel.checked_sub(start / 2)?;
    let last_half = (before == 0 && start + count < window.end().div_ceil(HALF)).then_some(start + count);
    let part = || Part { window, first_half: start + before, halves: (count - before).min(2), last_half };
    (before < count).then(part)
}

impl Part {
    /// Its columns of the panels `[panels, 2, len, HALF]`; the first half is from [`Part::mix`], if that put it together.
    pub(crate) fn of<'a>(&self, panels: &'a [f32], len: usize, mixed: &'a [f32]) -> [&'a [f32]; 2] {
        let left = if self.last_half.is_some() { mixed } else { half_of(panels, len, self.first_half) };
        [left, if self.halves == 2 { half_of(panels, len, self.first_half + 1) } else { &[] }]
    }

    /// Puts its first half `[len, HALF]` together, if that has a part of the last.
    pub(crate) fn mix(&self, to: &mut [f32], panels: &[f32], len: usize) {
        if let Some(last_half) = self.last_half {
            let [last, first] = [last_half, self.first_half].map(|half| half_of(panels, len, half));
            mix_halves(to, last, first, self.window.start % HALF);
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
}

/// Half number `half` of panels `[panels, 2, len, HALF]`.
fn half_of(panels: &[f32], len: usize, half: usize) -> &[f32] {
    &panels[half * len * HALF..][..len * HALF]
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

/// What a weight gradient is a sum over, `sum over rows of routed (outer product) other`: the rows of all samples, in their
/// order.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// `[groups(C), R, packed_stride()]`, as packed rows of operand A: of a sample, zero outside of its channels in the groups
    /// that they meet.
    pub(crate) routed: &'a [f32],
    /// `[panels(M), 2, R, HALF]`, as panels of operand B; or empty: then each sample has its own.
    pub(crate) other: &'a [f32],
}

/// Numbers of [`Operands::routed`].
pub(crate) fn routed_len(rows: usize, channels: usize) -> usize {
    groups(channels) * rows * packed_stride()
}

/// A sample of a weight gradient.
pub(crate) struct Sample<'a> {
    pub(crate) tokens: usize,
    /// Outside of these the sample is zero. They are disjoint, inside 0..C, and may be empty.
    pub(crate) channels: [Range<usize>; 2],
    /// `[T, M]`, or empty: see [`Operands`].
    pub(crate) other: &'a [f32],
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[C, M]`: it writes the windows.
    RoutedRows,
    /// `[M, C]`: it reads the windows.
    RoutedColumns,
}

/// Most parts of samples that are summed at once: bits of a set.
const MOST_PARTS: usize = u64::BITS as usize;
/// Groups of channels of which the parts that hold them are found at once: a few tiles.
const GROUPS: usize = 36;

/// Channels whose place in a gradient is fetched before it is written.
const FETCHED: usize = 16;

/// Tokens of a sample that are summed at once.
struct TokensOf<'a> {
    sample: Sample<'a>,
    tokens: Range<usize>,
}

/// `dw (+)= sum over samples`. Groups of channels are the rows of a tile, so that a window is rounded by a few channels at most;
/// each sum is one chain of additions in the order of the samples, whatever the number of threads.
pub(crate) fn weight_gradient<'a>(
    dw: &mut [f32],
    add: bool,
    layout: Layout,
    [c, m]: [usize; 2],
    operands: Operands<'a>,
    samples: usize,
    sample: impl Fn(usize) -> Sample<'a> + Sync,
) {
    assert!(dw.len() == c * m, "a gradient of another size than its weight");
    let rows: usize = (0..samples).map(|i| sample(i).tokens).sum();
    assert!(operands.routed.len() == routed_len(rows, c), "routed numbers of other rows than those of the samples");
    let of_rows = operands.other.len() == panels(m) * rows * PANEL;
    assert!(operands.other.is_empty() || of_rows, "panels of other rows than those of the samples");
    let dw = Shared::new(dw);
    // One by one: in bundles, a thread would be idle at the end.
    (0..panels(m)).into_par_iter().with_max_len(1).for_each(|panel| {
        let parts = (0..samples).flat_map(|i| {
            let count = sample(i).tokens.div_ceil(MOST_INNER);
            let sample = &sample;
            (0..count).map(move |part| {
                let sample = sample(i);
                let tokens = part * sample.tokens / count..(part + 1) * sample.tokens / count;
                TokensOf { sample, tokens }
            })
        });
        panel_of_weight_gradient(&dw, add, layout, [c, m], panel, operands, rows, parts);
    });
}

/// Panel `panel` of M: the sum over all rows, which are those of the parts.
#[allow(clippy::too_many_arguments)]
fn panel_of_weight_gradient<'a>(
    dw: &Shared,
    add: bool,
    layout: Layout,
    [c, m]: [usize; 2],
    panel: usize,
    Operands { routed, other }: Operands,
    all_rows: usize,
    parts: impl Iterator<Item = TokensOf<'a>>,
) {
    let columns = panel * PANEL..((panel + 1) * PANEL).min(m);
    let halves = columns.len().div_ceil(HALF);
    // Every tile of channels reads the panel: as lines M apart, it would crowd into few sets of the cache.
    let packs = other.is_empty();
    scratch::with((c + if packs { MOST_INNER } else { 0 }) * PANEL, |buffer| {
        let (sums, packed) = buffer.split_at_mut(c * PANEL);
        sums.fill(0.0);
        let sums = sums.as_chunks_mut::<PANEL>().0;
        let (mut parts, mut row) = (parts.peekable(), 0);
        while parts.peek().is_some() {
            // The channels of each part, where it starts in the block, and where the last ends.
            let (mut channels, mut starts) = ([const { [0..0, 0..0] }; MOST_PARTS], [0; MOST_PARTS + 1]);
            let mut count = 0;
            let fits = |count: usize, start: usize, part: &TokensOf| {
                count == 0 || count < MOST_PARTS && start + part.tokens.len() <= MOST_INNER
            };
            while let Some(TokensOf { sample, tokens }) = parts.next_if(|part| fits(count, starts[count], part)) {
                let rows = starts[count]..starts[count] + tokens.len();
                if packs {
                    let of_part = of_panel_mut(packed).map(|half| &mut half[rows.start * HALF..rows.end * HALF]);
                    pack_panel(of_part, &sample.other[tokens.start * m..tokens.end * m], panel, m, m);
                }
                channels[count] = sample.channels;
                starts[count + 1] = rows.end;
                count += 1;
            }
            let b = match packs {
                true => of_panel(packed, 0),
                false => of_panel(&other[panel * all_rows * PANEL..][..all_rows * PANEL], row),
            };
            let mut segments = [Segment { a: &[], b: [&[]; 2], len: 0 }; MOST_PARTS];
            channel_tiles(c, &channels[..count], |tile, set| {
                let (mut used, mut rest) = (0, set);
                while rest != 0 {
                    // Neighbours are one segment. A batch is sorted by timestep, so there is one mostly.
                    let part = rest.trailing_zeros();
                    let last = part + (rest >> part).trailing_ones() - 1;
                    let (start, end) = (starts[part as usize], starts[last as usize + 1]);
                    let a = &routed[(tile.start / step_rows() * all_rows + row + start) * packed_stride()..];
                    segments[used] = Segment { a, b: b.map(|half| &half[start * HALF..]), len: end - start };
                    (used, rest) = (used + 1, rest & (u64::MAX << last << 1));
                }
                // What the next tile reads, if it has the same parts, and unless all of it stays in cache.
                let (part, fetched) = (set.trailing_zeros() as usize, routed.len() > RESIDENT);
                let next = (groups(tile.end) * all_rows + row + starts[part]) * packed_stride();
                let len = segments[..used].iter().map(|segment| segment.len).sum::<usize>() * packed_stride();
                let next = if fetched { routed.get(next..next + len).unwrap_or(&[]) } else { &[] };
                multiply_add(&mut sums[tile], halves, Rows::packed(all_rows), HALF, &segments[..used], next);
            });
            row += starts[count];
        }
        match layout {
            Layout::RoutedRows => {
                let of_lines = m.is_multiple_of(HALF) && dw.starts_line();
                let streams = Streams::for_later(c * m).filter(|_| of_lines && !add);
                for (channel, sums) in sums.iter().enumerate() {
                    if streams.is_none() {
                        // Far apart, they come one after the other unless they are asked for in time.
                        let ahead = (channel + FETCHED).min(c - 1) * m;
                        dw.fetch(ahead + columns.start..ahead + columns.end);
                    }
                    // SAFETY: these columns of all rows belong to this panel's task alone.
                    let to = unsafe { dw.slice(channel * m + columns.start..channel * m + columns.end) };
                    match &streams {
                        // SAFETY: each place is written once, and read by nobody before all tasks are done.
                        Some(streams) => unsafe { streams.write_row(to, sums) },
                        None if add => add_assign(to, &sums[..to.len()]),
                        None => copy_row(to, sums),
                    }
                }
            }
            Layout::RoutedColumns => {
                // SAFETY: these rows belong to this panel's task alone.
                let to = unsafe { dw.slice(columns.start * c..columns.end * c) };
                write_transposed(to, sums, columns.len(), c, add);
            }
        }
    });
}

/// Calls `work` with tiles of channels, and for each the set of parts whose channels meet it, which is not empty. A tile is of
/// whole groups, or of the channels of the last.
fn channel_tiles(c: usize, parts: &[[Range<usize>; 2]], mut work: impl FnMut(Range<usize>, u64)) {
    let (height, whole) = (step_rows(), c / step_rows());
    for first in (0..groups(c)).step_by(GROUPS) {
        // Parts whose channels start or end at a group; then those that meet it.
        let mut sets = [[0u64; 2]; GROUPS + 1];
        let here = first..(first + GROUPS).min(groups(c));
        for (i, channels) in parts.iter().enumerate() {
            for (range, channels) in channels.iter().enumerate().filter(|(_, channels)| !channels.is_empty()) {
                let (start, end) = (channels.start / height, channels.end.div_ceil(height));
                let (start, end) = (start.max(here.start), end.min(here.end));
                if start < end {
                    sets[start - first][range] ^= 1 << i;
                    sets[end - first][range] ^= 1 << i;
                }
            }
        }
        for i in 1..GROUPS {
            for range in 0..2 {
                sets[i][range] ^= sets[i - 1][range];
            }
        }
        let set = |group: usize| sets[group - first][0] | sets[group - first][1];
        let mut start = here.start;
        while start < here.end {
            let (met_by, mut end) = (set(start), start + 1);
            while end < here.end.min(whole) && set(end) == met_by {
                end += 1;
            }
            if met_by != 0 {
                for tile in row_tiles((end - start) * height) {
                    work(start * height + tile.start..(start * height + tile.end).min(c), met_by);
                }
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::aligned::AlignedVec;

    #[test]
    fn batches_cover_the_rows_and_never_cross_samples() {
        for (rows, tokens, inner) in [(0..10, 5, 3), (7..61, 9, 1 << 13), (3..4, 1, 1), (128..256, 256, 384)] {
            let mut seen = Vec::new();
            batches(rows.clone(), tokens, inner, |tiles| {
                assert!(tiles.len() * packed_tile_len(tokens, inner) <= packed_tiles_len(tokens, inner));
                assert!(tiles.iter().all(|tile| packed_len(tile.rows.len(), inner) <= packed_tile_len(tokens, inner)));
                for tile in tiles {
                    assert!(!tile.rows.is_empty() && tile.rows.len() <= tile_rows());
                    assert!(tile.rows.clone().all(|row| row / tokens == tile.sample));
                    seen.extend(tile.rows.clone());
                }
            });
            assert_eq!(seen, rows.collect::<Vec<_>>());
        }
    }

    #[test]
    fn parts_of_panels_cover_the_window_in_as_few_halves_as_its_width_asks_for() {
        let len = 3;
        for window in
            [(0, 1), (15, 1), (16, 17), (5, 307), (31, 2), (64, 32), (47, 49), (9, 64), (0, 64), (30, 20), (7, 0)]
        {
            let window = Window { start: window.0, width: window.1 };
            let n = window.end() + 3;
            let b = numbers(6, len * n);
            let mut panels_of_b = vec![f32::NAN; panels(n) * len * PANEL];
            pack_panels(&mut panels_of_b, &b, n, len);
            let (mut seen, mut halves) = (Vec::new(), 0);
            for part in (0..panels(n)).filter_map(|panel| part(window, panel)) {
                let mut mixed = vec![f32::NAN; len * HALF];
                part.mix(&mut mixed, &panels_of_b, len);
                let of_part = part.of(&panels_of_b, len, &mixed);
                for (columns, first) in part.columns() {
                    for (column, at) in columns.clone().zip(first..) {
                        assert!((0..len).all(|k| of_part[at / HALF][k * HALF + at % HALF] == b[k * n + column]));
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

    /// Numbers around 0, with no pattern.
    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + 7919 * seed) * 2_654_435_761 % 1009) as f32 - 504.3) / 400.0).collect()
    }

    /// A sample of `t` tokens: its channels, its routed numbers `[T, C]`, zero outside, and the others `[T, M]`.
    struct Drawn {
        channels: [Range<usize>; 2],
        t: usize,
        routed: Vec<f32>,
        other: Vec<f32>,
    }

    fn draw(seed: usize, window: Window, t: usize, [c, m]: [usize; 2]) -> Drawn {
        // Every other sample without some in the middle.
        let gap = if seed.is_multiple_of(2) { window.width / 2 } else { 0 };
        let left = window.start + (window.width - gap) / 3;
        let channels = [window.start..left, left + gap..window.end()];
        let mut routed = numbers(seed, t * c);
        for row in routed.chunks_exact_mut(c) {
            for outside in [0..channels[0].start, left..left + gap, channels[1].end..c] {
                row[outside].fill(0.0);
            }
        }
        Drawn { channels, t, routed, other: numbers(seed + 1000, t * m) }
    }

    /// The routed numbers of all samples in groups, NaN in those that no channels meet, and the others as panels.
    fn operands(samples: &[Drawn], [c, m]: [usize; 2]) -> [Vec<f32>; 2] {
        let rows: usize = samples.iter().map(|sample| sample.t).sum();
        let mut routed = vec![f32::NAN; routed_len(rows, c)];
        let mut first = 0;
        for Drawn { channels, t, routed: from, .. } in samples {
            let met = channels.iter().flat_map(|channels| channels.clone().map(|channel| channel / step_rows()));
            for group in met {
                let of_group = group * step_rows()..((group + 1) * step_rows()).min(c);
                for (i, channel) in (0..*t).flat_map(|i| of_group.clone().map(move |channel| (i, channel))) {
                    let row = (group * rows + first + i) * packed_stride();
                    routed[row + channel - of_group.start] = from[i * c + channel];
                }
            }
            first += t;
        }
        let other: Vec<_> = samples.iter().flat_map(|sample| sample.other.iter().copied()).collect();
        let mut packed = vec![f32::NAN; panels(m) * rows * PANEL];
        pack_panels(&mut packed, &other, m, rows);
        [routed, packed]
    }

    /// Windows at both ends and of one channel, all, and any.
    fn window(seed: usize, c: usize) -> Window {
        let any = |n: usize, of: usize| (seed + 31 * n) * 2_654_435_761 % 1009 % of;
        match seed % 7 {
            0 => Window { start: 0, width: 1 },
            1 => Window { start: c - 1, width: 1 },
            2 => Window::all(c),
            3 => Window { start: c - 1 - any(1, c), width: 1 + any(1, c) },
            _ => {
                let width = 1 + any(2, c);
                Window { start: any(3, c - width + 1), width }
            }
        }
    }

    fn check_weight_gradient([c, m]: [usize; 2], tokens: &[usize], seed: usize) {
        let samples: Vec<_> =
            tokens.iter().enumerate().map(|(i, &t)| draw(seed + i, window(seed + i, c), t, [c, m])).collect();
        let [routed, packed] = operands(&samples, [c, m]);
        // The sums, and those of their terms' sizes.
        let mut expected = vec![[0.0f64; 2]; c * m];
        for Drawn { routed, other, .. } in &samples {
            for (routed, other) in routed.chunks_exact(c).zip(other.chunks_exact(m)) {
                for (channel, j) in (0..c).flat_map(|channel| (0..m).map(move |j| (channel, j))) {
                    let term = f64::from(routed[channel]) * f64::from(other[j]);
                    expected[channel * m + j][0] += term;
                    expected[channel * m + j][1] += term.abs();
                }
            }
        }
        for (layout, add) in [Layout::RoutedRows, Layout::RoutedColumns]
            .into_iter()
            .flat_map(|layout| [false, true].map(|add| (layout, add)))
        {
            let run = |threads: usize, panels: bool| {
                let mut dw = AlignedVec::zeros(c * m);
                dw.fill(if add { 3.0 } else { f32::NAN });
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let operands = Operands { routed: &routed, other: if panels { &packed } else { &[] } };
                    weight_gradient(&mut dw, add, layout, [c, m], operands, samples.len(), |i| {
                        let Drawn { channels, t, other, .. } = &samples[i];
                        Sample { tokens: *t, channels: channels.clone(), other: if panels { &[] } else { other } }
                    });
                });
                dw
            };
            let dw = run(1, false);
            let what = format!("C {c}, M {m}, tokens {:?} x {}, {layout:?}, add {add}", tokens.first(), tokens.len());
            for (channel, j) in (0..c).flat_map(|channel| (0..m).map(move |j| (channel, j))) {
                let at = if layout == Layout::RoutedRows { channel * m + j } else { j * c + channel };
                let [sum, size] = expected[channel * m + j];
                let err = (f64::from(dw[at]) - sum - if add { 3.0 } else { 0.0 }).abs();
                assert!(err <= 1e-6 * (size + 3.0), "{what}: {} for {sum} at channel {channel}, {j}", dw[at]);
            }
            for other in [run(3, false), run(1, true)] {
                assert!(
                    dw.iter().zip(other.iter()).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{what}: threads or panels change bits"
                );
            }
        }
    }

    #[test]
    fn weight_gradients_agree_with_loops() {
        for (i, dims) in [[1, 1], [4, 3], [12, 20], [20, 16], [33, 48], [60, 45], [64, 33], [97, 64], [611, 9]]
            .into_iter()
            .enumerate()
        {
            check_weight_gradient(dims, &[], i);
            check_weight_gradient(dims, &[1], i);
            check_weight_gradient(dims, &[5, 1, 17, 2, 9, 3, 4, 8], 3 * i);
        }
    }

    /// Large enough to be written past the caches: in whole panels, with half a panel at the end, and with rows that start inside of
    /// cache lines, which are not.
    #[test]
    fn large_weight_gradients_agree_with_loops() {
        for dims in [[520, 512], [513, 528], [513, 524]] {
            assert!(Streams::for_later(dims[0] * dims[1]).is_some());
            check_weight_gradient(dims, &[2, 1], 3);
        }
    }

    #[test]
    fn tiles_of_channels_hold_whole_groups_and_all_that_parts_have() {
        let any = |n: usize, of: usize| (n + 1) * 2_654_435_761 % 1009 * 7919 % of;
        let cs = [1, 5, step_rows(), 4 * step_rows() + 1, (GROUPS + 2) * step_rows() + 3];
        for (case, c) in cs.into_iter().enumerate() {
            for count in [0, 1, 2, MOST_PARTS] {
                let parts: Vec<_> = (0..count)
                    .map(|i| {
                        let mut ends = [0, 1, 2, 3].map(|n| any(97 * case + 11 * i + n, c + 1));
                        ends.sort();
                        [ends[0]..ends[1], ends[2]..ends[3]]
                    })
                    .collect();
                let mut sets = vec![0; c];
                channel_tiles(c, &parts, |tile, set| {
                    let groups = tile.start / step_rows()..tile.end.div_ceil(step_rows());
                    assert!(set != 0 && (1..=tile_rows()).contains(&tile.len()) && tile.start % step_rows() == 0);
                    assert!(tile.end % step_rows() == 0 || tile.end == c && groups.len() == 1, "{tile:?} of {c}");
                    for of_channel in &mut sets[tile] {
                        assert_eq!(std::mem::replace(of_channel, set), 0, "a channel in two tiles");
                    }
                });
                for (group, sets) in sets.chunks(step_rows()).enumerate() {
                    let channels = group * step_rows()..group * step_rows() + sets.len();
                    let meets = |range: &Range<usize>| channels.clone().any(|channel| range.contains(&channel));
                    let expected = parts.iter().enumerate().filter(|(_, part)| part.iter().any(meets));
                    let expected = expected.fold(0, |set, (i, _)| set | 1 << i);
                    assert!(sets.iter().all(|&set| set == expected), "group {group} of {c}, {parts:?}");
                }
            }
        }
    }

    #[test]
    fn products_fetch_the_next_panel_in_shares_where_panels_are_many() {
        let inner = 5;
        for (count, large) in [(4, false), (RESIDENT / (inner * PANEL) + 1, true)] {
            let panels: Vec<_> = (0..count * inner * PANEL).map(|i| i as f32).collect();
            let mut rest = &panels[..];
            for (i, (panel, next)) in each_panel(&panels, inner).enumerate() {
                assert_eq!(panel, rest.split_off(..inner * PANEL).unwrap());
                assert_eq!(next, if large && i + 1 < count { &rest[..inner * PANEL] } else { &[] });
            }
            assert!(rest.is_empty());
        }
        let panel: Vec<_> = (0..inner * PANEL).map(|i| i as f32).collect();
        for (rows, products) in
            [(0..inner, 4), (1..3, 2), (2..inner, 5), (0..inner, 3), (0..inner, 40), (0..inner, 321)]
        {
            let shares: Vec<_> = fetched_by_each(&panel, rows.clone(), products).take(products).collect();
            let rows = rows.start * HALF..rows.end * HALF;
            assert_eq!(shares.concat(), of_panel(&panel, 0).map(|half| &half[rows.clone()]).concat());
            assert!(shares.iter().all(|share| share.len() <= rows.len().div_ceil(products / 2)));
        }
        assert_eq!(fetched_by_each(&panel, 0..inner, 1).next().unwrap(), &panel[..inner * HALF]);
        assert!(fetched_by_each(&[], 0..inner, 3).next().is_some_and(<[f32]>::is_empty));
    }

    /// Blocks of samples: of 64, of few tokens, and of a part of one with many.
    #[test]
    fn weight_gradients_of_many_samples_add_up() {
        // With one channel, every sample holds it.
        for dims in [[36, 20], [33, 32], [1, 20]] {
            check_weight_gradient(dims, &[3; 64], 2);
            check_weight_gradient(dims, &[3; 65], 1);
            check_weight_gradient(dims, &[1; 200], 2);
            check_weight_gradient(dims, &[MOST_INNER, 1, MOST_INNER - 1, 2, MOST_INNER + 1], 3);
            check_weight_gradient(dims, &[4100, 7, 0, 4096, 3], 4);
        }
    }
}
