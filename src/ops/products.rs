//! What the linear layers on the CPU share: tiles of rows that never cross samples, and the gradient of a weight.

use crate::backend::cpu::pack::gather_columns;
use crate::backend::cpu::scratch;
use crate::backend::cpu::tile::{
    A_STRIDE, HALF, PANEL, Rows, Segment, Tile, add_tile, multiply, panels, row_tiles, tile_rows, write_tile,
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

/// Most tiles whose rows are packed at a time.
const MOST_TILES: usize = 24;
/// Numbers of packed rows that leave room in a core's cache for the panels.
const PACKED: usize = 1 << 17;

/// Numbers that the packed rows of [`batches`] take.
pub(crate) fn packed_len(rows: usize, inner: usize) -> usize {
    tiles_at_once(inner).min(rows) * inner * A_STRIDE
}

fn tiles_at_once(inner: usize) -> usize {
    (PACKED / (inner * A_STRIDE).max(1)).clamp(1, MOST_TILES)
}

/// Calls `work` with the tiles of `rows`, as many at a time as can stay in cache when packed with `inner` numbers a row.
pub(crate) fn batches(rows: Range<usize>, tokens: usize, inner: usize, mut work: impl FnMut(&[RowTile])) {
    let samples = rows.start / tokens..rows.end.div_ceil(tokens);
    let mut tiles = samples.flat_map(|sample| {
        let (start, end) = ((sample * tokens).max(rows.start), ((sample + 1) * tokens).min(rows.end));
        row_tiles(end - start).map(move |tile| RowTile { sample, rows: start + tile.start..start + tile.end })
    });
    let most = tiles_at_once(inner);
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

/// The part of a panel that a window touches: first column inside the panel (0 or 16), and 16 or 32 columns in halves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) halves: usize,
}

impl Part {
    fn end(self) -> usize {
        self.first + self.halves * HALF
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

/// Operands of a weight gradient `sum over samples and tokens of g (outer product) h`.
#[derive(Clone, Copy)]
pub(crate) struct Outer<'a> {
    pub(crate) g: &'a [f32], // [B, T, N], zero outside of the rows
    pub(crate) h: &'a [f32], // [B, panels(C), T, PANEL], zero outside of the columns in panels that they touch
    pub(crate) samples: usize,
    pub(crate) tokens: usize,
    /// Of each sample: the rows of the gradient that it adds to, inside 0..N. None for all.
    pub(crate) rows: Option<&'a [Window]>,
    /// Of each sample: the columns of the gradient that it adds to, inside 0..C. None for all.
    pub(crate) columns: Option<&'a [Window]>,
}

impl Outer<'_> {
    /// Whether `sample` adds to any of `rows`.
    fn touches(&self, sample: usize, rows: &Range<usize>) -> bool {
        self.rows.is_none_or(|windows| windows[sample].start < rows.end && rows.start < windows[sample].end())
    }

    /// The part of `panel` that `sample` adds to.
    fn part(&self, sample: usize, panel: usize) -> Part {
        let whole = Part { first: 0, halves: 2 };
        self.columns.map_or(whole, |windows| part(windows[sample], panel).unwrap_or_default())
    }
}

/// Most samples that are summed in registers.
const MOST_SAMPLES: usize = 16;
/// Numbers of `h` that stay in a core's cache while rows of the gradient go over them.
const RESIDENT: usize = 224 << 10;

/// `dw (+)= sum of terms`, `dw` `[N, C]`. The sums are over whole samples in their order, whatever the number of threads.
pub(crate) fn weight_gradient(dw: &mut [f32], add: bool, n: usize, c: usize, terms: &[Outer]) {
    let height = 2 * tile_rows();
    let stride = height.next_multiple_of(A_STRIDE);
    dw.par_chunks_mut(height * c).enumerate().for_each(|(chunk, dw)| {
        let rows = chunk * height..chunk * height + dw.len() / c;
        let mut add = add;
        for term in terms {
            let at_once = (RESIDENT / (term.tokens * panels(c) * PANEL).max(1)).clamp(1, MOST_SAMPLES);
            for first in (0..term.samples).step_by(at_once) {
                let samples = first..(first + at_once).min(term.samples);
                scratch::with(samples.len() * term.tokens * stride, |packed| {
                    for (sample, to) in samples.clone().zip(packed.chunks_exact_mut(term.tokens * stride)) {
                        if term.touches(sample, &rows) {
                            let g = &term.g[sample * term.tokens * n + rows.start..(sample + 1) * term.tokens * n];
                            gather_columns(to, stride, g, rows.len(), term.tokens, n);
                        }
                    }
                    for tile in row_tiles(rows.len()) {
                        let dw = &mut dw[tile.start * c..tile.end * c];
                        let packed = &packed[tile.start..];
                        let tile = rows.start + tile.start..rows.start + tile.end;
                        rows_of_weight_gradient(dw, add, c, term, samples.clone(), tile, packed, stride);
                    }
                });
                add = true;
            }
        }
    });
}

/// `packed` holds the columns of g that belong to `rows`, `[samples, T, stride]`.
#[expect(clippy::too_many_arguments, reason = "one use")]
fn rows_of_weight_gradient(
    dw: &mut [f32], // [rows, C]
    add: bool,
    c: usize,
    term: &Outer,
    samples: Range<usize>,
    rows: Range<usize>,
    packed: &[f32],
    stride: usize,
) {
    let tokens = term.tokens;
    let mut tile = Tile::new();
    // Products with the columns of a panel from `first` on.
    let mut product = |panel: usize, Part { first, halves }: Part| {
        let mut segments = [Segment { a: &[], b: &[], len: 0 }; MOST_SAMPLES];
        let mut count = 0;
        for sample in samples.clone().filter(|&sample| term.touches(sample, &rows)) {
            if term.part(sample, panel).first < first + halves * HALF && first < term.part(sample, panel).end() {
                segments[count] = Segment {
                    a: &packed[(sample - samples.start) * tokens * stride..],
                    b: &term.h[(sample * panels(c) + panel) * tokens * PANEL + first..],
                    len: tokens,
                };
                count += 1;
            }
        }
        let start = panel * PANEL + first;
        let columns = start..(start + halves * HALF).min(c);
        if columns.is_empty() || count == 0 && add {
            return;
        }
        let halves = columns.len().div_ceil(HALF);
        multiply(&mut tile, rows.len(), halves, Rows::Interleaved(stride), &segments[..count]);
        if add {
            add_tile(&mut dw[columns.start..], &tile, rows.len(), columns.len(), c);
        } else {
            write_tile(&mut dw[columns.start..], &tile, rows.len(), columns.len(), c);
        }
    };
    for panel in 0..panels(c) {
        let whole = |sample| matches!(term.part(sample, panel).halves, 0 | 2);
        if samples.clone().all(whole) {
            product(panel, Part { first: 0, halves: 2 });
        } else {
            product(panel, Part { first: 0, halves: 1 });
            product(panel, Part { first: HALF, halves: 1 });
        }
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
                assert!(tiles.len() * inner * A_STRIDE <= packed_len(rows.len(), inner));
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
}
