//! What the linear layers on the CPU share: tiles of rows that never cross samples, panels of a weight, and its gradient.

use crate::backend::cpu::pack::pack_panel;
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::tile::{
    HALF, PANEL, Rows, Segment, Tile, copy_row, line_stride, multiply, panels, row_tiles, step_rows, tile_rows,
    write_transposed,
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
/// Numbers of the rows of a batch that leave room in a core's cache for the panels.
const RESIDENT: usize = 1 << 17;

/// Numbers that the rows of a batch of [`batches`] take as lines [`line_stride`] apart.
pub(crate) fn lines_len(rows: usize, tokens: usize, inner: usize) -> usize {
    (tiles_at_once(tokens, inner) * tile_rows().min(tokens)).min(rows) * line_stride(inner)
}

/// Tiles of a batch; none crosses samples.
fn tiles_at_once(tokens: usize, inner: usize) -> usize {
    (RESIDENT / (inner * tile_rows().min(tokens)).max(1)).clamp(1, MOST_TILES)
}

/// Numbers that [`spread`] needs for the rows of a batch.
pub(crate) fn spread_len(rows: usize, tokens: usize, inner: usize) -> usize {
    if line_stride(inner) == inner { 0 } else { lines_len(rows, tokens, inner) }
}

/// Rows of `inner` numbers as lines [`line_stride`] apart: where they are, or copied to `room`.
pub(crate) fn spread<'a>(room: &'a mut [f32], rows: &'a [f32], inner: usize) -> &'a [f32] {
    let stride = line_stride(inner);
    if stride == inner {
        return rows;
    }
    for (line, row) in room.chunks_exact_mut(stride).zip(rows.chunks_exact(inner)) {
        line[..inner].copy_from_slice(row);
    }
    room
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

/// The panels of a row-major B `[len, n]`: of lines n apart, a tile's columns would crowd into few sets of the cache.
pub(crate) fn pack_panels(to: &mut [f32], b: &[f32], n: usize, len: usize) {
    to.par_chunks_mut(len * PANEL).enumerate().for_each(|(panel, to)| pack_panel(to, b, panel, n, len, n));
}

/// Columns that a tile computes of a panel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: usize,  // in a panel 0 or 16
    pub(crate) halves: usize, // 1 or 2 of 16 columns
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

/// One sample of a weight gradient: `sum over its tokens of routed (outer product) other`.
#[derive(Clone, Copy)]
pub(crate) struct Outer<'a> {
    pub(crate) routed: &'a [f32], // [panels(C), T, PANEL], zero outside of the window in the panels that it meets
    pub(crate) window: Window,    // inside 0..C
    pub(crate) other: Other<'a>,
}

/// What the routed numbers are multiplied with.
#[derive(Clone, Copy)]
pub(crate) enum Other<'a> {
    Rows(&'a [f32]),   // [T, M]
    Panels(&'a [f32]), // [panels(M), T, PANEL]
}

impl Outer<'_> {
    fn tokens(&self, c: usize) -> usize {
        self.routed.len() / (panels(c) * PANEL)
    }
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
    samples: usize,
    sample: impl Fn(usize) -> Outer<'a> + Sync,
) {
    assert!(dw.len() == c * m, "a gradient of another size than its weight");
    let dw = Shared::new(dw);
    // One by one: in bundles, a thread would be idle at the end.
    (0..panels(m)).into_par_iter().with_max_len(1).for_each(|panel| {
        let (mut add, mut first) = (add, 0);
        while first < samples {
            let nothing = Outer { routed: &[], window: Window { start: 0, width: 0 }, other: Other::Rows(&[]) };
            let mut group = [nothing; MOST_SAMPLES];
            let (mut count, mut tokens) = (0, 0);
            while count < MOST_SAMPLES && first + count < samples {
                let next = sample(first + count);
                if count > 0 && tokens + next.tokens(c) > MOST_TOKENS {
                    break;
                }
                group[count] = next;
                tokens += next.tokens(c);
                count += 1;
            }
            panel_of_weight_gradient(&dw, add, layout, [c, m], panel, &group[..count]);
            first += count;
            add = true;
        }
    });
}

/// Columns `panel` of M.
fn panel_of_weight_gradient(dw: &Shared, add: bool, layout: Layout, [c, m]: [usize; 2], panel: usize, group: &[Outer]) {
    let columns = panel * PANEL..((panel + 1) * PANEL).min(m);
    // Every tile of channels reads the panel: as lines M apart, it would crowd into few sets of the cache.
    let packs = |sample: &Outer| matches!(sample.other, Other::Rows(_));
    let tokens: usize = group.iter().filter(|sample| packs(sample)).map(|sample| sample.tokens(c)).sum();
    scratch::with(tokens * PANEL, |mut packed| {
        let mut others = [&[][..]; MOST_SAMPLES];
        for (sample, other) in group.iter().zip(&mut others) {
            let tokens = sample.tokens(c);
            *other = match sample.other {
                Other::Panels(panels) => &panels[panel * tokens * PANEL..][..tokens * PANEL],
                Other::Rows(rows) => {
                    let to = packed.split_off_mut(..tokens * PANEL).expect("room for all tokens");
                    pack_panel(to, rows, panel, m, tokens, m);
                    to
                }
            };
        }
        let mut tile = Tile::new();
        let mut segments = [Segment { a: &[], b: &[], len: 0 }; MOST_SAMPLES];
        for first in (0..c).step_by(PANEL) {
            channel_tiles(first..(first + PANEL).min(c), group, |channels, set| {
                if set == 0 && add {
                    return;
                }
                let (mut count, mut rest) = (0, set);
                while rest != 0 {
                    let sample = rest.trailing_zeros() as usize;
                    let len = group[sample].tokens(c);
                    let a = &group[sample].routed[first * len + channels.start - first..];
                    segments[count] = Segment { a, b: others[sample], len };
                    (count, rest) = (count + 1, rest & (rest - 1));
                }
                let halves = columns.len().div_ceil(HALF);
                multiply(&mut tile, channels.len(), halves, Rows::interleaved(PANEL), PANEL, &segments[..count]);
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

/// Calls `work` with tiles of the channels of a panel, and for each the set of samples whose windows meet it.
fn channel_tiles(panel: Range<usize>, group: &[Outer], mut work: impl FnMut(Range<usize>, u64)) {
    // Samples whose windows start or end at a channel; then those that hold it.
    let mut sets = [0u64; PANEL + 1];
    for (i, sample) in group.iter().enumerate() {
        let (start, end) = (sample.window.start.max(panel.start), sample.window.end().min(panel.end));
        if start < end {
            sets[start - panel.start] ^= 1 << i;
            sets[end - panel.start] ^= 1 << i;
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
                let of_batch = tiles[tiles.len() - 1].rows.end - tiles[0].rows.start;
                assert!(of_batch * line_stride(inner) <= lines_len(rows.len(), tokens, inner));
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

    /// A sample of `t` tokens: its window, its routed numbers `[T, C]`, those as panels with NaN wherever nobody may look,
    /// and the others `[T, M]`, in panels too.
    struct Sample {
        window: Window,
        dense: Vec<f32>,
        routed: Vec<f32>,
        other: Vec<f32>,
        packed: Vec<f32>,
    }

    fn sample(seed: usize, window: Window, t: usize, [c, m]: [usize; 2]) -> Sample {
        let (mut dense, mut routed) = (vec![0.0; t * c], vec![f32::NAN; panels(c) * t * PANEL]);
        let values = numbers(seed, t * c);
        for panel in window.start / PANEL..panels(window.end()) {
            for (i, channel) in (0..t).flat_map(|i| (panel * PANEL..((panel + 1) * PANEL).min(c)).map(move |c| (i, c)))
            {
                if window.range().contains(&channel) {
                    dense[i * c + channel] = values[i * c + channel];
                }
                routed[(panel * t + i) * PANEL + channel % PANEL] = dense[i * c + channel];
            }
        }
        let other = numbers(seed + 1000, t * m);
        let mut packed = vec![f32::NAN; panels(m) * t * PANEL];
        pack_panels(&mut packed, &other, m, t);
        Sample { window, dense, routed, other, packed }
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
            tokens.iter().enumerate().map(|(i, &t)| sample(seed + i, window(seed + i, c), t, [c, m])).collect();
        // The sums, and those of their terms' sizes.
        let mut expected = vec![[0.0f64; 2]; c * m];
        for Sample { window, dense, other, .. } in &samples {
            for (dense, other) in dense.chunks_exact(c).zip(other.chunks_exact(m)) {
                for (channel, j) in window.range().flat_map(|channel| (0..m).map(move |j| (channel, j))) {
                    let term = f64::from(dense[channel]) * f64::from(other[j]);
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
                    weight_gradient(&mut dw, add, layout, [c, m], samples.len(), |i| {
                        let Sample { window, routed, other, packed, .. } = &samples[i];
                        Outer {
                            routed,
                            window: *window,
                            other: if panels { Other::Panels(packed) } else { Other::Rows(other) },
                        }
                    });
                });
                dw
            };
            let dw = run(1, false);
            let what = format!("C {c}, M {m}, tokens {:?} x {}, {layout:?}, add {add}", &tokens[..1], tokens.len());
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
            check_weight_gradient(dims, &[1], i);
            check_weight_gradient(dims, &[5, 1, 17, 2, 9, 3, 4, 8], 3 * i);
        }
    }

    /// Groups of samples: of 64, and of about 4096 tokens or one sample of more.
    #[test]
    fn weight_gradients_of_many_samples_add_up() {
        for dims in [[36, 20], [33, 32]] {
            check_weight_gradient(dims, &[3; 65], 1);
            check_weight_gradient(dims, &[1; 200], 2);
            check_weight_gradient(dims, &[1500, 1500, 1500, 1096, 1], 3);
            check_weight_gradient(dims, &[4100, 7, 4096, 3], 4);
        }
    }
}
