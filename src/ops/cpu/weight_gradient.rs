//! The gradient of a weight: the sum over the rows of all samples of which each has its window of channels.

use crate::backend::cpu::packed::Format;
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::tile::{
    self, HALF, PANEL, Segment, Streams, copy_row, of_panel_mut, panels, write_transposed,
};
use crate::ops::cpu::products::{RESIDENT, panels_at_once};
use rayon::prelude::*;
use std::ops::Range;

/// What a weight gradient is a sum over, `sum over rows of routed (outer product) other`: the rows of all samples, in their
/// order.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// [`Format::routed_len`] numbers, the channels as rows of operand A: of a sample, zero outside of its channels in the groups that
    /// they meet. See [`clear_routed`].
    pub(crate) routed: &'a [f32],
    /// `[panels(M), 2, R, HALF]`; or empty: then each sample has its own.
    pub(crate) other: &'a [f32],
}

/// Zeroes [`Operands::routed`] where a block of rows would hold rows of several samples, of `tokens` tokens, or end beyond the last of
/// `all` rows.
pub(crate) fn clear_routed(format: Format, routed: &mut [f32], tokens: usize, all: usize) {
    if ![tokens, all].iter().all(|tokens| tokens.is_multiple_of(format.block_rows())) {
        routed.par_chunks_mut(1 << 14).for_each(|routed| routed.fill(0.0));
    }
}

/// A sample of a weight gradient, or samples that are joined ([`Format::joined`]).
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

/// Most panels of a task: what it reads of `routed` it multiplies with all of them. With 12, steps of DiT-S/4 take as long.
const MOST_PANELS: usize = 6;

/// Tokens of a sample that are summed at once.
struct TokensOf<'a> {
    sample: Sample<'a>,
    tokens: Range<usize>,
}

/// `dw (+)= sum over samples`. Groups of channels are the rows of a tile, so that a window is rounded by a few channels at most;
/// each sum is over the samples in their order, whatever the number of threads. Gives the sum of squares of what is written, or added,
/// to `dw`.
#[expect(clippy::too_many_arguments, reason = "a gradient and what it is of")]
pub(crate) fn weight_gradient<'a>(
    format: Format,
    dw: &mut [f32],
    add: bool,
    layout: Layout,
    [c, m]: [usize; 2],
    operands: Operands<'a>,
    samples: usize,
    sample: impl Fn(usize) -> Sample<'a> + Sync,
) -> f64 {
    assert!(dw.len() == c * m, "a gradient of another size than its weight");
    let tokens: usize = (0..samples).map(|i| sample(i).tokens).sum();
    let rows: usize = (0..samples).map(|i| format.rows_of(sample(i).tokens)).sum();
    assert!(
        operands.routed.len() == format.routed_len(rows, c),
        "routed numbers of other rows than those of the samples"
    );
    let of_rows = operands.other.len() == panels(m) * tokens * PANEL;
    assert!(operands.other.is_empty() || of_rows, "panels of other rows than those of the samples");
    let dw = Shared::new(dw);
    let at_once = panels_at_once(m, MOST_PANELS);
    scratch::sum(panels(m), |squares| {
        // One by one: in bundles, a thread would be idle at the end.
        squares.par_chunks_mut(at_once).enumerate().with_max_len(1).for_each(|(task, squares)| {
            let parts = (0..samples).flat_map(|i| {
                let count = sample(i).tokens.div_ceil(format.most_rows());
                let sample = &sample;
                (0..count).map(move |part| {
                    let sample = sample(i);
                    let blocks = sample.tokens.div_ceil(format.block_rows());
                    let bound = |part: usize| (part * blocks / count * format.block_rows()).min(sample.tokens);
                    let tokens = bound(part)..bound(part + 1);
                    TokensOf { sample, tokens }
                })
            });
            let panels = task * at_once..((task + 1) * at_once).min(panels(m));
            Task { format, dw: &dw, add, layout, c, m, panels, operands, tokens, rows }.run(parts, squares);
        });
    })
}

/// The sums in the columns of some panels of M.
struct Task<'a> {
    format: Format,
    dw: &'a Shared<'a>,
    add: bool,
    layout: Layout,
    c: usize,
    m: usize,
    panels: Range<usize>,
    operands: Operands<'a>,
    tokens: usize, // of all samples
    rows: usize,   // that they take
}

/// Parts of samples that are summed at once.
struct Block {
    channels: [[Range<usize>; 2]; MOST_PARTS], // of each part
    starts: [usize; MOST_PARTS + 1],           // its first row, and behind the last the end
    parts: usize,
}

impl Task<'_> {
    /// Sums over the parts, which are all rows; and the sum of squares of each panel.
    fn run<'a>(&self, parts: impl Iterator<Item = TokensOf<'a>>, squares: &mut [f64]) {
        let (c, count, most_rows) = (self.c, self.panels.len(), self.format.most_rows());
        let sums_len = self.format.sums_rows(c) * PANEL;
        // Every tile of channels reads the panels: as lines M apart, they would crowd into few sets of the cache.
        let packs = self.format.is_parts() || self.operands.other.is_empty();
        // A block may start and end inside of rows that are multiplied at once.
        let packed_len = if packs { self.format.panel_len(most_rows + 2 * (self.format.block_rows() - 1)) } else { 0 };
        scratch::with(count * (sums_len + packed_len), |buffer| {
            let (sums, packed) = buffer.split_at_mut(count * sums_len);
            sums.fill(0.0);
            let (mut parts, mut row, mut token) = (parts.peekable(), 0, 0);
            while parts.peek().is_some() {
                let first = row % self.format.block_rows();
                let mut block = Block { channels: [const { [0..0, 0..0] }; _], starts: [first; _], parts: 0 };
                let fits = |block: &Block, part: &TokensOf| {
                    let start = block.starts[block.parts];
                    block.parts == 0 || block.parts < MOST_PARTS && start + part.tokens.len() <= most_rows
                };
                while let Some(part) = parts.next_if(|part| fits(&block, part)) {
                    let start = block.starts[block.parts];
                    if packs {
                        self.pack(packed, packed_len, start, &part, token);
                    }
                    token += part.tokens.len();
                    block.channels[block.parts] = part.sample.channels;
                    block.parts += 1;
                    block.starts[block.parts] = start + self.format.rows_of(part.tokens.len());
                }
                let end = block.starts[block.parts];
                for half in packed.chunks_exact_mut(packed_len.max(1)).flat_map(of_panel_mut) {
                    // What the first and the last rows that are multiplied at once have of others.
                    half[self.format.in_half(0..first)].fill(0.0);
                    half[self.format.in_half(end..end.next_multiple_of(self.format.block_rows()))].fill(0.0);
                }
                self.sum_block(sums, packed, packed_len, &block, row);
                row += end - first;
            }
            for ((panel, sums), squares) in self.panels.clone().zip(sums.chunks_exact(sums_len.max(1))).zip(squares) {
                let sums = &sums.as_chunks().0[..c];
                *squares = tile::squares(sums, self.columns(panel).len());
                self.write(panel, sums);
            }
        });
    }

    fn columns(&self, panel: usize) -> Range<usize> {
        panel * PANEL..((panel + 1) * PANEL).min(self.m)
    }

    /// Packs the rows of a part, the first of which is row `start` of the block and token `token` of all.
    fn pack(&self, packed: &mut [f32], packed_len: usize, start: usize, part: &TokensOf, token: usize) {
        let (m, tokens) = (self.m, &part.tokens);
        if self.operands.other.is_empty() {
            let (lines, panels) = (&part.sample.other[tokens.start * m..tokens.end * m], self.panels.clone());
            return self.format.pack_rows_of_panels(packed, packed_len, start, lines, panels, m, tokens.len());
        }
        let rows = self.format.in_half(start..start + self.format.rows_of(tokens.len()));
        for (panel, to) in self.panels.clone().zip(packed.chunks_exact_mut(packed_len)) {
            let to = of_panel_mut(to).map(|half| &mut half[rows.clone()]);
            let halves = [2 * panel, 2 * panel + 1];
            let lines = halves.map(|half| &self.operands.other[(half * self.tokens + token) * HALF..]);
            self.format.pack_halves(to, lines, tokens.len());
        }
    }

    /// Adds the sums over a block, the first part of which is row `row` of all.
    fn sum_block(&self, sums: &mut [f32], packed: &[f32], packed_len: usize, block: &Block, row: usize) {
        let Operands { routed, other } = self.operands;
        let (c, rows, first) = (self.c, self.rows, block.starts[0]);
        let row_of = |start: usize| row - first + start;
        let mut segments = [Segment { a: &[], b: [&[]; 2], len: 0 }; MOST_PARTS];
        let mut starts = [0; MOST_PARTS];
        let sums_rows = self.format.sums_rows(c);
        let mut kernel = self.format.kernel();
        channel_tiles(self.format, c, &block.channels[..block.parts], |tile, set| {
            let (mut used, mut rest, mut reached) = (0, set, 0);
            while rest != 0 {
                // Neighbours are one segment. A batch is sorted by timestep, so there is one mostly.
                let part = rest.trailing_zeros();
                let last = part + (rest >> part).trailing_ones() - 1;
                rest &= u64::MAX << last << 1;
                // What is multiplied at once, once.
                let start = block.starts[part as usize];
                let start = (start - start % self.format.block_rows()).max(reached);
                let end = block.starts[last as usize + 1].next_multiple_of(self.format.block_rows());
                if start < end {
                    let a = &routed[self.format.in_routed(tile.start / self.format.step_rows(), row_of(start), rows)..];
                    segments[used] = Segment { a, b: [&[]; 2], len: end - start };
                    (starts[used], used, reached) = (start, used + 1, end);
                }
            }
            // What the next tile reads, if it has the same parts, and unless all of it stays in cache.
            let (part, fetched) = (set.trailing_zeros() as usize, routed.len() > RESIDENT);
            let next = self.format.in_routed(self.format.groups(tile.end), row_of(block.starts[part]), rows);
            let len = self.format.in_routed(0, segments[..used].iter().map(|segment| segment.len).sum(), rows);
            let next = if fetched { routed.get(next..next + len).unwrap_or(&[]) } else { &[] };
            let shares = next.chunks(next.len().div_ceil(self.panels.len()).max(1)).chain(std::iter::repeat(&[][..]));
            for ((i, panel), next) in self.panels.clone().enumerate().zip(shares) {
                let b = match packed_len {
                    0 => tile::of_panel(&other[panel * self.tokens * PANEL..][..self.tokens * PANEL], row),
                    _ => self.format.of_panel(&packed[i * packed_len..][..packed_len], 0),
                };
                for (segment, start) in segments[..used].iter_mut().zip(starts) {
                    segment.b = b.map(|half| half.get(self.format.in_half(start..start).start..).unwrap_or(&[]));
                }
                let sums = sums[i * sums_rows * PANEL..][..sums_rows * PANEL].as_chunks_mut().0;
                let halves = self.columns(panel).len().div_ceil(HALF);
                kernel.multiply_add(&mut sums[tile.start..], tile.len(), halves, rows, &segments[..used], next);
            }
        });
    }

    /// Writes (`add`: adds) the sums of a panel.
    fn write(&self, panel: usize, sums: &[[f32; PANEL]]) {
        let (c, m, columns) = (self.c, self.m, self.columns(panel));
        match self.layout {
            Layout::RoutedRows => {
                let of_lines = m.is_multiple_of(HALF) && self.dw.starts_line();
                let streams = Streams::for_later(c * m).filter(|_| of_lines && !self.add);
                for (channel, sums) in sums.iter().enumerate() {
                    if streams.is_none() {
                        // Far apart, they come one after the other unless they are asked for in time.
                        let ahead = (channel + FETCHED).min(c - 1) * m;
                        self.dw.fetch(ahead + columns.start..ahead + columns.end);
                    }
                    // SAFETY: these columns of all rows belong to this task alone.
                    let to = unsafe { self.dw.slice(channel * m + columns.start..channel * m + columns.end) };
                    match &streams {
                        // SAFETY: each place is written once, and read by nobody before all tasks are done.
                        Some(streams) => unsafe { streams.write_row(to, sums) },
                        None if self.add => add_assign(to, &sums[..to.len()]),
                        None => copy_row(to, sums),
                    }
                }
            }
            Layout::RoutedColumns => {
                // SAFETY: these rows belong to this task alone.
                let to = unsafe { self.dw.slice(columns.start * c..columns.end * c) };
                write_transposed(to, sums, columns.len(), c, self.add);
            }
        }
    }
}

/// Calls `work` with tiles of channels, and for each the set of parts whose channels meet it, which is not empty. A tile is of
/// whole groups, or of the channels of the last.
fn channel_tiles(format: Format, c: usize, parts: &[[Range<usize>; 2]], mut work: impl FnMut(Range<usize>, u64)) {
    let (height, whole) = (format.step_rows(), c / format.step_rows());
    for first in (0..format.groups(c)).step_by(GROUPS) {
        // Parts whose channels start or end at a group; then those that meet it.
        let mut sets = [[0u64; 2]; GROUPS + 1];
        let here = first..(first + GROUPS).min(format.groups(c));
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
                for tile in format.row_tiles((end - start) * height) {
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
    use crate::backend::cpu::numbers;
    use crate::backend::cpu::pack::pack_panels;
    use crate::backend::cpu::packed::formats;
    use crate::routing::Window;

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

    /// The routed numbers of all samples in groups, NaN in those that a sample's channels do not meet, unless [`clear_routed`] cleared
    /// them; and the others as panels.
    fn operands(format: Format, samples: &[Drawn], [c, m]: [usize; 2]) -> [Vec<f32>; 2] {
        let rows: usize = samples.iter().map(|sample| format.rows_of(sample.t)).sum();
        let mut routed = vec![f32::NAN; format.routed_len(rows, c)];
        samples.iter().for_each(|sample| clear_routed(format, &mut routed, sample.t, sample.t));
        let (mut first, wide) = (0, format.padded_columns(c));
        for Drawn { channels, t, routed: from, .. } in samples {
            let mut lines = vec![0.0; t * wide];
            lines.chunks_exact_mut(wide).zip(from.chunks_exact(c)).for_each(|(to, from)| to[..c].copy_from_slice(from));
            for channel in channels.iter().cloned().flatten() {
                // SAFETY: nobody else has it.
                unsafe {
                    format.scatter(
                        &Shared::new(&mut routed),
                        &lines,
                        wide,
                        Window { start: channel, width: 1 },
                        first,
                        rows,
                    )
                };
            }
            first += format.rows_of(*t);
        }
        let (other, tokens) = (
            samples.iter().map(|sample| &sample.other[..]).collect::<Vec<_>>().concat(),
            samples.iter().map(|sample| sample.t).sum(),
        );
        let mut panels_of_other = vec![f32::NAN; panels(m) * tokens * PANEL];
        if tokens > 0 {
            pack_panels(&mut panels_of_other, &other, 0, m, tokens);
        }
        [routed, panels_of_other]
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
        formats().for_each(|format| check_format(format, [c, m], tokens, seed));
    }

    fn check_format(format: Format, [c, m]: [usize; 2], tokens: &[usize], seed: usize) {
        let samples: Vec<_> =
            tokens.iter().enumerate().map(|(i, &t)| draw(seed + i, window(seed + i, c), t, [c, m])).collect();
        let [routed, packed] = operands(format, &samples, [c, m]);
        // The sums, and those of their terms' sizes.
        let mut expected = vec![[0.0f64; 2]; c * m];
        for Drawn { routed, other, .. } in &samples {
            for (routed, other) in routed.chunks_exact(c).zip(other.chunks_exact(m)) {
                for (channel, j) in (0..c).flat_map(|channel| (0..m).map(move |j| (channel, j))) {
                    let term = f64::from(format.reads(routed[channel])) * f64::from(format.reads(other[j]));
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
                let squares = pool.install(|| {
                    let operands = Operands { routed: &routed, other: if panels { &packed } else { &[] } };
                    weight_gradient(format, &mut dw, add, layout, [c, m], operands, samples.len(), |i| {
                        let Drawn { channels, t, other, .. } = &samples[i];
                        Sample { tokens: *t, channels: channels.clone(), other: if panels { &[] } else { other } }
                    })
                });
                (dw, squares)
            };
            let (dw, squares) = run(1, false);
            let what = format!(
                "C {c}, M {m}, tokens {:?} x {}, {layout:?}, add {add}, {format:?}",
                tokens.first(),
                tokens.len()
            );
            for (channel, j) in (0..c).flat_map(|channel| (0..m).map(move |j| (channel, j))) {
                let at = if layout == Layout::RoutedRows { channel * m + j } else { j * c + channel };
                let [sum, size] = expected[channel * m + j];
                let err = (f64::from(dw[at]) - sum - if add { 3.0 } else { 0.0 }).abs();
                assert!(err <= 1e-6 * (size + 3.0), "{what}: {} for {sum} at channel {channel}, {j}", dw[at]);
            }
            let written = |&x: &f32| (f64::from(x) - if add { 3.0 } else { 0.0 }).powi(2);
            let expected: f64 = dw.iter().map(written).sum();
            // What is added to 3 is rounded to its last bit.
            let tolerance = if add { 1e-5 * (expected + 1.0) } else { 1e-12 * expected };
            assert!((squares - expected).abs() <= tolerance, "{what}: squares sum to {squares}, expected {expected}");
            for (other, other_squares) in [run(3, false), run(1, true)] {
                assert!(
                    dw.iter().zip(other.iter()).all(|(a, b)| a.to_bits() == b.to_bits()) && squares == other_squares,
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
            // Whole blocks of rows, which are not cleared.
            check_weight_gradient(dims, &[32, 64, 96, 32], 5 * i);
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
        formats().for_each(tiles_of_channels_hold_groups);
    }

    fn tiles_of_channels_hold_groups(format: Format) {
        let any = |n: usize, of: usize| (n + 1) * 2_654_435_761 % 1009 * 7919 % of;
        let cs = [1, 5, format.step_rows(), 4 * format.step_rows() + 1, (GROUPS + 2) * format.step_rows() + 3];
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
                channel_tiles(format, c, &parts, |tile, set| {
                    let groups = tile.start / format.step_rows()..tile.end.div_ceil(format.step_rows());
                    assert!(
                        set != 0
                            && (1..=format.tile_rows()).contains(&tile.len())
                            && tile.start % format.step_rows() == 0
                    );
                    assert!(
                        tile.end % format.step_rows() == 0 || tile.end == c && groups.len() == 1,
                        "{tile:?} of {c}"
                    );
                    for of_channel in &mut sets[tile] {
                        assert_eq!(std::mem::replace(of_channel, set), 0, "a channel in two tiles");
                    }
                });
                for (group, sets) in sets.chunks(format.step_rows()).enumerate() {
                    let channels = group * format.step_rows()..group * format.step_rows() + sets.len();
                    let meets = |range: &Range<usize>| channels.clone().any(|channel| range.contains(&channel));
                    let expected = parts.iter().enumerate().filter(|(_, part)| part.iter().any(meets));
                    let expected = expected.fold(0, |set, (i, _)| set | 1 << i);
                    assert!(sets.iter().all(|&set| set == expected), "group {group} of {c}, {parts:?}");
                }
            }
        }
    }

    /// Blocks of samples: of 64, of few tokens, and of a part of one with many.
    #[test]
    fn weight_gradients_of_many_samples_add_up() {
        // With one channel, every sample holds it.
        for dims in [[36, 20], [33, 32], [1, 20]] {
            check_weight_gradient(dims, &[3; 64], 2);
            check_weight_gradient(dims, &[3; 65], 1);
            check_weight_gradient(dims, &[1; 200], 2);
            for most in formats().map(Format::most_rows) {
                check_weight_gradient(dims, &[most, 1, most - 1, 2, most + 1], 3);
            }
            check_weight_gradient(dims, &[4100, 7, 0, 4096, 3], 4);
        }
    }
}
