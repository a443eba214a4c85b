//! The inactive channels on the CPU. Two vectors a sample hold all they do, `1 + scale` and `shift`. Forward needs the products of the
//! weight with them, u and v. Backward multiplies it with the gradients of those, P and Q, for the ones of scale and shift (formulas:
//! [`super`]).

use super::cpu::Modulation;
use crate::backend::cpu::packed::Format;
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::tile::{HALF, PANEL, Segment, Tile};
use crate::routing::Window;
use rayon::prelude::*;
use std::ops::Range;

/// The inactive channels of all samples.
#[derive(Clone, Copy)]
pub(super) struct Inactive<'a> {
    pub(super) format: Format,
    pub(super) read: &'a [Window], // B: those that are active
    pub(super) modulation: Modulation<'a>,
    pub(super) c: usize,
}

impl Inactive<'_> {
    /// The channels that are inactive in some of the samples of these windows.
    pub(super) fn ranges(&self, windows: &[Window]) -> [Range<usize>; 2] {
        let c = self.c;
        let left = windows.iter().map(|w| w.start).max().unwrap_or(0);
        let right = windows.iter().map(|w| w.end()).min().unwrap_or(c);
        if right <= left { [0..c, c..c] } else { [0..left, right..c] }
    }

    /// The inner elements that are multiplied for [`Inactive::ranges`], as whole blocks: in one range of all, where those of the two
    /// overlap.
    fn inner(&self, windows: &[Window]) -> [Range<usize>; 2] {
        let (format, c) = (self.format, self.c);
        let [left, right] = self.ranges(windows).map(|range| format.inner(range, c));
        if right.start < left.end { [format.inner(0..c, c), c..c] } else { [left, right] }
    }

    /// Samples whose two vectors fill a tile.
    fn samples_at_once(&self) -> usize {
        let b = self.read.len();
        b.div_ceil(b.div_ceil(self.format.tile_rows() / 2))
    }

    /// `[2 samples, stride]`: `1 + scale` and `shift` of each sample from `first` on, on its inactive channels; zero on the active ones,
    /// and behind the last.
    pub(super) fn vectors(&self, out: &mut [f32], first: usize, stride: usize) {
        let c = self.c;
        for ((i, rows), &window) in (first..).zip(out.chunks_exact_mut(2 * stride)).zip(&self.read[first..]) {
            let (one_plus_scale, shift) = rows.split_at_mut(stride);
            for (y, s) in one_plus_scale.iter_mut().zip(self.modulation.scale(i, c)) {
                *y = 1.0 + s;
            }
            shift[..c].copy_from_slice(self.modulation.shift(i, c));
            for zeros in [window.range(), c..stride] {
                one_plus_scale[zeros.clone()].fill(0.0);
                shift[zeros].fill(0.0);
            }
        }
    }

    /// Numbers of the vectors of as many samples as are multiplied at once, packed: on each side of the windows.
    fn side_len(&self) -> usize {
        self.format.rows_len(self.format.tile_rows(), self.c)
    }

    /// Numbers that [`Inactive::pack`] writes.
    pub(super) fn packed_len(&self) -> usize {
        self.read.len().div_ceil(self.samples_at_once()) * 2 * self.side_len()
    }

    /// [`Inactive::vectors`] of as many samples as are multiplied at once, packed: of the left and of the right inactive channels.
    pub(super) fn pack(&self, to: &mut [f32]) {
        let (format, samples, len) = (self.format, self.samples_at_once(), self.side_len());
        to.par_chunks_mut(2 * len).zip(self.read.par_chunks(samples)).enumerate().for_each(|(chunk, (to, windows))| {
            let wide = format.padded_columns(self.c);
            scratch::with(2 * windows.len() * wide, |vectors| {
                self.vectors(vectors, chunk * samples, wide);
                for (inner, to) in self.inner(windows).into_iter().zip(to.chunks_exact_mut(len)) {
                    format.pack_rows(to, &vectors[inner.start..], 2 * windows.len(), inner.len(), wide);
                }
            });
        });
    }

    /// u and v + b of every sample in the columns of some panels, the first of which is `first`: those of `correction` `[B, 2, N]`.
    /// `packed` is from [`Inactive::pack`].
    ///
    /// # Safety
    /// Nobody else may access these columns.
    pub(super) unsafe fn correction(
        &self,
        correction: &Shared,
        packed: &[f32],
        first: usize,
        panels_of_w: &[f32], // over C
        bias: &[f32],        // [N]
    ) {
        let (format, c, n) = (self.format, self.c, bias.len());
        let samples = self.samples_at_once();
        let (mut tile, mut kernel) = (Tile::new(), format.kernel());
        let chunks = self.read.chunks(samples).zip(packed.chunks_exact(2 * self.side_len()));
        for (chunk, (windows, packed)) in chunks.enumerate() {
            let m = 2 * windows.len();
            let ranges = self.inner(windows);
            for (panel, b) in (first..).zip(panels_of_w.chunks_exact(format.panel_len(c))) {
                let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
                tile.rows[..m].fill([0.0; PANEL]);
                for (inner, a) in ranges.iter().zip(packed.chunks_exact(self.side_len())) {
                    let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                    kernel.multiply_add(&mut tile.rows, m, columns.len().div_ceil(HALF), inner.len(), &[segment], &[]);
                }
                for (i, sums) in tile.rows[..m].iter().enumerate() {
                    let row = (chunk * samples * 2 + i) * n;
                    // SAFETY: columns of these panels.
                    let uv = unsafe { correction.slice(row + columns.start..row + columns.end) };
                    uv.copy_from_slice(&sums[..uv.len()]);
                    if i % 2 == 1 {
                        add_assign(uv, &bias[columns.clone()]);
                    }
                }
            }
        }
    }

    /// Adds the gradients of shift and scale outside of the windows, `W[:, I]^T Q` and `W[:, I]^T P`.
    pub(super) fn gradient(
        &self,
        dmodulation: &mut [f32], // [B, stride]
        pq: &[f32],              // [B, 2, N]
        panels_of_w: &[f32],     // panels(C) over N
        n: usize,
    ) {
        let (format, modulation, inner) = (self.format, self.modulation, self.format.inner(0..n, n));
        let samples = self.samples_at_once();
        let of_chunk = format.rows_len(2 * samples, n);
        scratch::with(self.read.len().div_ceil(samples) * of_chunk, |packed| {
            let chunks = packed.par_chunks_mut(of_chunk).zip(pq.par_chunks(samples * 2 * n));
            chunks.for_each(|(to, pq)| format.pack_rows(to, pq, pq.len() / n, n, n));
            let (packed, dmodulation) = (&*packed, Shared::new(dmodulation));
            panels_of_w.par_chunks_exact(format.panel_len(n)).enumerate().with_max_len(1).for_each(|(panel, b)| {
                let columns = panel * PANEL..((panel + 1) * PANEL).min(self.c);
                let (mut tile, mut kernel) = (Tile::new(), format.kernel());
                for (chunk, (windows, a)) in self.read.chunks(samples).zip(packed.chunks_exact(of_chunk)).enumerate() {
                    if self.ranges(windows).into_iter().all(|range| intersection(range, &columns).is_empty()) {
                        continue;
                    }
                    let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                    kernel.multiply(&mut tile, 2 * windows.len(), columns.len().div_ceil(HALF), segment, &[]);
                    for ((sample, window), sums) in (chunk * samples..).zip(windows).zip(tile.rows.chunks_exact(2)) {
                        for (first, sums) in [(modulation.scale, &sums[0]), (modulation.shift, &sums[1])] {
                            let at = sample * modulation.stride + first;
                            for outside in [0..window.start, window.end()..self.c] {
                                let Range { start, end } = intersection(outside, &columns);
                                // SAFETY: columns of this panel.
                                let d = unsafe { dmodulation.slice(at + start..at + end) };
                                add_assign(d, &sums[start - columns.start..end - columns.start]);
                            }
                        }
                    }
                }
            });
        });
    }
}

/// The part of `range` that is in `of`; where there is none, an empty one there.
fn intersection(range: Range<usize>, of: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(of.start, of.end);
    start..range.end.clamp(start, of.end)
}
