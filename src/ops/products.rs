//! What the linear layers on the CPU share: tiles of rows that never cross samples, panels of a weight, and its gradient.

use crate::backend::cpu::pack::{pack_panel, pack_rows};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::tile::{
    HALF, PANEL, Rows, Segment, Tile, copy_row, multiply, of_panel, of_panel_mut, packed_len, panels, row_tiles,
    step_rows, tile_rows, write_transposed,
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
/// Numbers of the packed rows of a batch that leave room in a core's cache for the panels.
const RESIDENT: usize = 1 << 17;

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
    (RESIDENT / packed_tile_len(tokens, inner)).clamp(1, MOST_TILES)
}

/// Packs the tiles of a batch one after the other, each [`packed_tile_len`] numbers: of rows of `inner` numbers, the first of
/// which is that of the first tile.
pub(crate) fn pack_tiles(to: &mut [f32], rows: &[f32], tiles: &[RowTile], tokens: usize, inner: usize) {
    let first = tiles[0].rows.start;
    for (to, tile) in to.chunks_exact_mut(packed_tile_len(tokens, inner)).zip(tiles) {
        pack_rows(to, &rows[(tile.rows.start - first) * inner..], tile.rows.len(), inner, inner);
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

/// The panels `[panels(n), 2, len, HALF]` of a row-major B `[len, n]`: of lines n apart, a tile's columns would crowd into few
/// sets of the cache.
pub(crate) fn pack_panels(to: &mut [f32], b: &[f32], n: usize, len: usize) {
    to.par_chunks_mut(len * PANEL).enumerate().for_each(|(panel, to)| pack_panel(of_panel_mut(to), b, panel, n, n));
}

/// Columns that a tile computes of a panel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: usize,  // in a panel 0 or 16
    pub(crate) halves: usize, // 1 or 2 of 16 columns
}

impl Part {
    /// Its columns of a packed panel.
    pub(crate) fn of(self, panel: &[f32]) -> [&[f32]; 2] {
        let [left, right] = of_panel(panel, 0);
        if self.first == 0 { [left, right] } else { [right, &[]] }
    }
}

/// The part of `panel` to compute for `window`, if any.
pub(crate) fn part(window: Window, panel: usize) -> Option<Part> {
    let (from, to) = (window.start / HALF, window.end().div_ceil(HALF));
    let (from, to) = (from.max(2 * panel), to.min(2 * panel + 2));
    (window.width > 0 && from < to).then(|| Part { first: (from - 2 * panel) * HALF, halves: to - from })
}

/// The columns of `panel` that are computed and lie in `range`: of the matrix, and of the tile.
pub(crate) fn columns(part: Part, panel: usize, range: Range<usize>) -> (Range<usize>, Range<usize>) {
    let first = panel * PANEL + part.first;
    let (from, to) = (first.max(range.start), (first + part.halves * HALF).min(range.end));
    (from..to.max(from), from - first..to.max(from) - first)
}

/// What a weight gradient is a sum over, `sum over rows of routed (outer product) other`: the rows of all samples, in their
/// order.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// `[panels(C), R, PANEL]`, as interleaved rows of operand A: of a sample, zero outside of its channels in the panels that
    /// they meet.
    pub(crate) routed: &'a [f32],
    /// `[panels(M), 2, R, HALF]`, as panels of operand B; or empty: then each sample has its own.
    pub(crate) other: &'a [f32],
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

/// Most samples that are summed at once: bits of a set.
const MOST_SAMPLES: usize = u64::BITS as usize;
/// Most tokens that are summed at once: a panel of them stays in a core's cache.
const MOST_TOKENS: usize = 4096;
/// Fewest channels of a tile, where there are more and a step holds them. Fewer cut the windows closer, but make more tiles of
/// the same columns, and below 4 the latency of its sums bounds a tile.
const FEWEST_CHANNELS: usize = 7;

/// `dw (+)= sum over samples`. The channels are the rows of a tile, so that a window is rounded by a few channels at most;
/// the sums are over whole samples in their order, whatever the number of threads.
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
    let of_rows = |numbers: &[f32], columns| numbers.len() == panels(columns) * rows * PANEL;
    assert!(of_rows(operands.routed, c), "routed numbers of other rows than those of the samples");
    assert!(operands.other.is_empty() || of_rows(operands.other, m), "panels of other rows than those of the samples");
    let dw = Shared::new(dw);
    // One by one: in bundles, a thread would be idle at the end.
    (0..panels(m)).into_par_iter().with_max_len(1).for_each(|panel| {
        let (mut add, mut first, mut row) = (add, 0, 0);
        // At least once: the sum of no samples is zero.
        loop {
            let mut group = [const { Sample { tokens: 0, channels: [0..0, 0..0], other: &[] } }; MOST_SAMPLES];
            let (mut count, mut tokens) = (0, 0);
            while count < MOST_SAMPLES && first + count < samples {
                let next = sample(first + count);
                if count > 0 && tokens + next.tokens > MOST_TOKENS {
                    break;
                }
                tokens += next.tokens;
                group[count] = next;
                count += 1;
            }
            let rows = row..row + tokens;
            panel_of_weight_gradient(&dw, add, layout, [c, m], panel, operands, rows, &group[..count]);
            first += count;
            row += tokens;
            add = true;
            if first == samples {
                return;
            }
        }
    });
}

/// Panel `panel` of M: the part of the sum over `rows`, which are those of `group`.
#[allow(clippy::too_many_arguments)]
fn panel_of_weight_gradient(
    dw: &Shared,
    add: bool,
    layout: Layout,
    [c, m]: [usize; 2],
    panel: usize,
    Operands { routed, other }: Operands,
    rows: Range<usize>,
    group: &[Sample],
) {
    let columns = panel * PANEL..((panel + 1) * PANEL).min(m);
    let all_rows = routed.len() / (panels(c) * PANEL);
    // Every tile of channels reads the panel: as lines M apart, it would crowd into few sets of the cache.
    let packs = other.is_empty();
    scratch::with(if packs { rows.len() * PANEL } else { 0 }, |packed| {
        // Where each sample starts in `rows`, and where the last ends.
        let mut starts = [0; MOST_SAMPLES + 1];
        let mut halves = of_panel_mut(packed);
        for (i, sample) in group.iter().enumerate() {
            if packs {
                let of_sample = halves
                    .each_mut()
                    .map(|half| half.split_off_mut(..sample.tokens * HALF).expect("room for all rows"));
                pack_panel(of_sample, sample.other, panel, m, m);
            }
            starts[i + 1] = starts[i] + sample.tokens;
        }
        let other = match packs {
            true => of_panel(packed, 0),
            false => of_panel(&other[panel * all_rows * PANEL..][..all_rows * PANEL], rows.start),
        };
        let mut tile = Tile::new();
        let mut segments = [Segment { a: &[], b: [&[]; 2], len: 0 }; MOST_SAMPLES];
        for first in (0..c).step_by(PANEL) {
            channel_tiles(first..(first + PANEL).min(c), group, |channels, set| {
                if set == 0 && add {
                    return;
                }
                let (mut count, mut rest) = (0, set);
                while rest != 0 {
                    // Neighbours are one segment. A batch is sorted by timestep, so there is one mostly.
                    let sample = rest.trailing_zeros();
                    let last = sample + (rest >> sample).trailing_ones() - 1;
                    let (start, end) = (starts[sample as usize], starts[last as usize + 1]);
                    let a = &routed[first * all_rows + (rows.start + start) * PANEL + channels.start - first..];
                    let b = other.map(|half| &half[start * HALF..]);
                    segments[count] = Segment { a, b, len: end - start };
                    (count, rest) = (count + 1, rest & (u64::MAX << last << 1));
                }
                let halves = columns.len().div_ceil(HALF);
                multiply(&mut tile, channels.len(), halves, Rows::interleaved(PANEL), HALF, &segments[..count]);
                match layout {
                    Layout::RoutedRows => {
                        for (channel, sums) in channels.zip(&tile.rows) {
                            // SAFETY: these columns of all rows belong to this panel's task alone.
                            let to = unsafe { dw.slice(channel * m + columns.start..channel * m + columns.end) };
                            if add { add_assign(to, &sums[..to.len()]) } else { copy_row(to, sums) }
                        }
                    }
                    Layout::RoutedColumns => {
                        // SAFETY: these rows belong to this panel's task alone.
                        let to = unsafe { dw.slice(columns.start * c + channels.start..columns.end * c) };
                        write_transposed(to, &tile, channels.len(), columns.len(), c, add);
                    }
                }
            });
        }
    });
}

/// Calls `work` with tiles of the channels of a panel, and for each the set of samples whose channels meet it.
fn channel_tiles(panel: Range<usize>, group: &[Sample], mut work: impl FnMut(Range<usize>, u64)) {
    // Samples whose channels start or end at a channel; then those that hold it.
    let mut sets = [0u64; PANEL + 1];
    for (i, sample) in group.iter().enumerate() {
        for channels in &sample.channels {
            let (start, end) = (channels.start.max(panel.start), channels.end.min(panel.end));
            if start < end {
                sets[start - panel.start] ^= 1 << i;
                sets[end - panel.start] ^= 1 << i;
            }
        }
    }
    for i in 1..PANEL {
        sets[i] ^= sets[i - 1];
    }
    let fewest = FEWEST_CHANNELS.min(step_rows());
    let (mut start, end) = (0, panel.len());
    while start < end {
        let (mut stop, mut set) = (start + 1, sets[start]);
        while stop < end && (sets[stop] == set || stop - start < fewest) {
            set |= sets[stop];
            stop += 1;
        }
        for tile in row_tiles(stop - start) {
            let start = panel.start + start;
            work(start + tile.start..start + tile.end, set);
        }
        start = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn parts_of_panels_cover_the_window() {
        for window in [(0, 1), (15, 1), (16, 17), (5, 307), (31, 2), (64, 32), (47, 49)] {
            let window = Window { start: window.0, width: window.1 };
            let mut seen = Vec::new();
            for panel in 0..panels(window.end()) + 1 {
                if let Some(part) = part(window, panel) {
                    assert!(part.first + part.halves * HALF <= PANEL);
                    let (columns, of_tile) = columns(part, panel, window.range());
                    assert_eq!(columns.len(), of_tile.len());
                    assert_eq!(columns.start, panel * PANEL + part.first + of_tile.start);
                    seen.extend(columns);
                }
            }
            assert_eq!(seen, window.range().collect::<Vec<_>>());
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

    /// The routed numbers of all samples as panels, NaN in those that no channels meet, and the others.
    fn operands(samples: &[Drawn], [c, m]: [usize; 2]) -> [Vec<f32>; 2] {
        let rows: usize = samples.iter().map(|sample| sample.t).sum();
        let mut routed = vec![f32::NAN; panels(c) * rows * PANEL];
        let mut first = 0;
        for Drawn { channels, t, routed: from, .. } in samples {
            let met = channels.iter().flat_map(|channels| channels.clone().map(|channel| channel / PANEL));
            for panel in met {
                for (i, channel) in
                    (0..*t).flat_map(|i| (panel * PANEL..((panel + 1) * PANEL).min(c)).map(move |c| (i, c)))
                {
                    routed[(panel * rows + first + i) * PANEL + channel % PANEL] = from[i * c + channel];
                }
            }
            first += t;
        }
        let other: Vec<_> = samples.iter().flat_map(|sample| sample.other.iter().copied()).collect();
        let mut packed = vec![f32::NAN; panels(m) * rows * PANEL];
        if rows > 0 {
            pack_panels(&mut packed, &other, m, rows);
        }
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
                let mut dw = vec![if add { 3.0 } else { f32::NAN }; c * m];
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
                    dw.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{what}: threads or panels change bits"
                );
            }
        }
    }

    #[test]
    fn weight_gradients_agree_with_loops() {
        for (i, dims) in
            [[1, 1], [4, 3], [12, 20], [20, 16], [33, 48], [60, 45], [64, 33], [97, 64]].into_iter().enumerate()
        {
            check_weight_gradient(dims, &[], i);
            check_weight_gradient(dims, &[1], i);
            check_weight_gradient(dims, &[5, 1, 17, 2, 9, 3, 4, 8], 3 * i);
        }
    }

    /// Groups of samples: of 64, and of about 4096 tokens or one sample of more.
    #[test]
    fn weight_gradients_of_many_samples_add_up() {
        // With one channel, every sample holds it.
        for dims in [[36, 20], [33, 32], [1, 20]] {
            check_weight_gradient(dims, &[3; 64], 2);
            check_weight_gradient(dims, &[3; 65], 1);
            check_weight_gradient(dims, &[1; 200], 2);
            check_weight_gradient(dims, &[1500, 1500, 1500, 1096, 1], 3);
            check_weight_gradient(dims, &[4100, 7, 4096, 3], 4);
        }
    }
}
