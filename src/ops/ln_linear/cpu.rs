//! The CPU version: the windows of a few rows are normalised, packed, and multiplied with the panels of the weight, of which a
//! window is a range; correction and bias are added to each tile while it is in cache. Where very few channels are inactive in every
//! sample, all are computed and nothing is corrected ([`computes_all`]). GELU is left to the reader of its output, or a pass of its own.

use super::Dims;
use super::inactive::Inactive;
use super::rows::{Row, correct_rows, masked, normalise, normalise_backward, sums_over_tokens};
pub use super::rows::{gelu_backward, gelu_forward};
use crate::backend::DType;
use crate::backend::cpu::packed::{Format, Kernel};
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::tile::{HALF, MAX_ROWS, PANEL, Segment, Streams, Tile, panels, write_rows};
use crate::ops::cpu::products::{
    PACKED_PANELS, RowTile, Stage, WindowedColumns, batches, each_panel, fetched_by_each, inner_of_all, joined_samples,
    most_rows, pack_panels, packed_tile_len, packed_tiles_len, panels_at_once, rows_per_block, samples_per_block,
    window_of_all, with_packed,
};
use crate::ops::cpu::weight_gradient::{Layout, Operands, Sample, clear_routed, weight_gradient};
use crate::routing::Window;
use rayon::prelude::*;
use std::ops::Range;

/// Shift and scale: columns of `[B, stride]`.
#[derive(Clone, Copy)]
pub struct Modulation<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub shift: usize,
    pub scale: usize,
}

impl<'a> Modulation<'a> {
    /// Of `data` `[B, stride]`, which holds `b` samples.
    pub fn new(data: &'a [f32], b: usize, shift: usize, scale: usize) -> Self {
        Modulation { data, stride: data.len() / b, shift, scale }
    }

    pub(super) fn shift(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.shift..][..c]
    }

    pub(super) fn scale(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.scale..][..c]
    }
}

/// What both passes read.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub x: &'a [f32],           // [B, T, C]
    pub read: &'a [Window],     // B
    pub computed: &'a [Window], // B: those of `read`, or all channels
    pub modulation: Modulation<'a>,
    pub weight: &'a [f32], // [N, C]
    pub dims: Dims,
    pub elem: DType, // in which products are: f32 or bf16
}

/// Whether all channels of masked rows are computed, rather than the windows and what corrects for the others: where that takes less,
/// because so few are inactive in every sample ([`Format::few_inner`]: none but with parts).
pub fn computes_all(read: &[Window], Dims { t, c, .. }: Dims, elem: DType) -> bool {
    read.iter().all(|window| c - window.width <= Format::of(t, elem).few_inner())
}

/// Operations of the forward product and of the correction.
fn flops(read: &[Window], t: usize, c: usize, n: usize) -> usize {
    read.iter().map(|window| 2 * n * (t * window.width + 2 * (c - window.width))).sum()
}

/// See [`super::ln_linear`], without activation. `correction` is empty when it is not needed.
pub fn forward(
    y: &mut [f32],          // [B, T, N]
    mean: &mut [f32],       // [B, T]
    rstd: &mut [f32],       // [B, T]
    correction: &mut [f32], // [B, 2, N] or empty
    inputs: Inputs,
    bias: &[f32], // [N]
) {
    let Inputs { read, computed, modulation, weight, dims: Dims { b, t, c, n }, elem, .. } = inputs;
    let format = Format::of(t, elem);
    let _span = span("ln_linear", Pass::Forward, [c, n], flops(computed, t, c, n), b * t * (c + n) + n * c);
    let inactive = Inactive { format, read, modulation, c };
    let inactive_len = if correction.is_empty() { 0 } else { inactive.packed_len() };
    scratch::with(panels(n) * format.panel_len(c) + inactive_len, |buffer| {
        let (panels_of_w, packed) = buffer.split_at_mut(panels(n) * format.panel_len(c));
        inactive.pack(packed);
        let (packed, shared_correction) = (&*packed, Shared::new(correction));
        let at_once = panels_at_once(n, PACKED_PANELS);
        panels_of_w.par_chunks_mut(at_once * format.panel_len(c)).enumerate().for_each(|(task, to)| {
            let first = task * at_once;
            for (panel, to) in (first..).zip(to.chunks_exact_mut(format.panel_len(c))) {
                format.pack_panel_transposed(to, weight, panel, n, c);
            }
            if !packed.is_empty() {
                // While the panels are in cache.
                // SAFETY: each panel once.
                unsafe { inactive.correction(&shared_correction, packed, first, to, bias) };
            }
        });
        let (panels_of_w, correction) = (&*panels_of_w, &*correction);
        let forward = Forward { inputs, format, panels_of_w, bias, correction };
        let rows = rows_per_block(b * t, format.joined(t) * t, panels_of_w.len());
        let stats = mean.par_chunks_mut(rows).zip(rstd.par_chunks_mut(rows));
        let blocks = y.par_chunks_mut(rows * n).zip(stats).enumerate();
        blocks.for_each(|(block, (y, (mean, rstd)))| forward.block(block * rows, y, mean, rstd));
    });
}

/// What a block of rows of the forward pass reads.
struct Forward<'a> {
    inputs: Inputs<'a>,
    format: Format,
    panels_of_w: &'a [f32], // panels(N) over C
    bias: &'a [f32],        // [N]
    correction: &'a [f32],  // [B, 2, N] or empty
}

/// A block of rows of the forward pass.
struct Block<'a> {
    first: usize, // row of [B T, _]
    y: &'a mut [f32],
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
    streams: Option<Streams>, // for y
    tile: Tile,
    kernel: Kernel,
}

impl Forward<'_> {
    /// Rows from `first` on, as many as `mean` has.
    fn block(&self, first: usize, y: &mut [f32], mean: &mut [f32], rstd: &mut [f32]) {
        let (format, computed, Dims { b, t, c, n }) = (self.format, self.inputs.computed, self.inputs.dims);
        let rows = first..first + mean.len();
        let streams = Streams::of(b * t * n);
        let mut block = Block { first, y, mean, rstd, streams, tile: Tile::new(), kernel: format.kernel() };
        let wide = format.padded_columns(c);
        let (lines_len, tile_len) = (most_rows(format, t) * wide, packed_tile_len(format, t, c));
        scratch::with(c + lines_len + packed_tiles_len(format, t, c), |buffer| {
            let (row_of_x, buffer) = buffer.split_at_mut(c);
            let (lines, packed) = buffer.split_at_mut(lines_len);
            batches(format, rows, t, tile_len, |tiles| {
                for (row_tile, packed) in tiles.iter().zip(packed.chunks_exact_mut(tile_len)) {
                    let rows = row_tile.rows.start - first..row_tile.rows.end - first;
                    let (mean, rstd) = (&mut block.mean[rows.clone()], &mut block.rstd[rows]);
                    let inner = self.normalise(lines, row_of_x, row_tile, mean, rstd);
                    format.pack_rows(packed, lines, row_tile.rows.len(), inner.len(), wide);
                }
                let of_all = inner_of_all(tiles, computed);
                for (panel, (b, next)) in each_panel(format, self.panels_of_w, c).enumerate() {
                    let shares = fetched_by_each(format, next, of_all.clone(), tiles.len());
                    for ((row_tile, a), next) in with_packed(format, tiles, packed, t, c).zip(shares) {
                        let inner = format.inner(row_tile.window(computed).range(), c);
                        let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                        self.multiply(&mut block, row_tile, panel, segment, next);
                    }
                }
            });
        });
    }

    /// Lines of the normalised and modulated rows of a tile over the inner elements that are returned, and their mean and rstd.
    fn normalise(
        &self,
        lines: &mut [f32],    // [_, wide]
        row_of_x: &mut [f32], // [C], for the time of the call
        row_tile: &RowTile,
        mean: &mut [f32],
        rstd: &mut [f32],
    ) -> Range<usize> {
        let Inputs { x, read, computed, modulation, dims: Dims { t, c, .. }, .. } = self.inputs;
        let wide = self.format.padded_columns(c);
        let inner = self.format.inner(row_tile.window(computed).range(), c);
        let mut results = lines.chunks_exact_mut(wide).zip(mean.iter_mut().zip(rstd));
        for (sample, rows) in row_tile.of_samples(t) {
            let (window, computed) = (read[sample], computed[sample]);
            let here = computed.start - inner.start..computed.end() - inner.start;
            let (shift, scale) = (modulation.shift(sample, c), modulation.scale(sample, c));
            row_of_x.fill(0.0);
            for (row, (line, (mean, rstd))) in rows.zip(&mut results) {
                line[..here.start].fill(0.0);
                line[here.end..inner.len()].fill(0.0);
                let x = masked(row_of_x, &x[row * c..][..c], window, computed);
                (*mean, *rstd) = normalise(&mut line[here.clone()], x, computed, shift, scale);
            }
        }
        inner
    }

    /// A tile of rows of y in the columns of a panel: the product, correction and bias.
    fn multiply(&self, block: &mut Block, row_tile: &RowTile, panel: usize, segment: Segment, next: &[f32]) {
        let n = self.inputs.dims.n;
        let Block { first, y, mean, rstd, streams, tile, kernel } = block;
        let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
        let (width, halves) = (columns.len(), columns.len().div_ceil(HALF));
        let rows = row_tile.rows.start - *first..row_tile.rows.end - *first;
        let y = &mut y[rows.start * n + columns.start..];
        if !self.correction.is_empty() {
            let of_tile = &self.correction[row_tile.samples.start * 2 * n + columns.start..];
            kernel.fetch_rows(of_tile, 2 * row_tile.samples.len(), width, n);
        }
        if streams.is_none() {
            kernel.fetch_rows(y, rows.len(), width, n);
        }
        kernel.multiply(tile, rows.len(), halves, segment, next);
        let sums = &mut tile.rows[..rows.len()];
        self.correct(sums, row_tile, columns, &mean[rows.clone()], &rstd[rows.clone()]);
        match streams {
            // SAFETY: each place of `y` is written once and read by nobody before this block is done.
            Some(streams) => unsafe { streams.write_tile(y, tile, rows.len(), width, n) },
            None => write_rows(y, sums, width, n),
        }
    }

    /// Adds correction and bias to the sums of a tile of rows in some columns.
    fn correct(
        &self,
        mut sums: &mut [[f32; PANEL]],
        row_tile: &RowTile,
        columns: Range<usize>,
        mean: &[f32], // of its rows
        rstd: &[f32],
    ) {
        let Dims { t, n, .. } = self.inputs.dims;
        for (sample, rows) in row_tile.of_samples(t) {
            let rows = rows.start - row_tile.rows.start..rows.end - row_tile.rows.start;
            let of_sample = sums.split_off_mut(..rows.len()).expect("a row of the tile for each");
            let mut r = [0.0; MAX_ROWS];
            let (u, v) = if self.correction.is_empty() {
                (&[][..], &self.bias[columns.clone()])
            } else {
                for (r, (mean, rstd)) in r.iter_mut().zip(mean[rows.clone()].iter().zip(&rstd[rows])) {
                    *r = -mean * rstd;
                }
                let (u, v) = self.correction[sample * 2 * n..][..2 * n].split_at(n);
                (&u[columns.clone()], &v[columns.clone()])
            };
            correct_rows(of_sample, &r, u, v);
        }
    }
}

/// What backward writes. `dx` and the weights are overwritten or added to as the flags say; `dmodulation` is added to.
pub struct Gradients<'a> {
    pub dx: &'a mut [f32],          // [B, T, C]
    pub fresh_dx: bool,             // overwrite dx
    pub dmodulation: &'a mut [f32], // [B, stride]
    pub dweight: &'a mut [f32],     // [N, C]
    pub dbias: &'a mut [f32],       // [N]
    pub add: bool,                  // add to dweight and dbias
}

/// See [`super::ln_linear`], without activation. Gives the sum of squares of what is written, or added, to `dweight`.
pub fn backward(
    grads: Gradients,
    dy: &[f32],                 // [B, T, N]
    inputs: Inputs,             // as in the forward pass
    mean: &[f32],               // [B, T]
    rstd: &[f32],               // [B, T]
    correction: Option<&[f32]>, // [B, 2, N]: u, v + b
) -> f64 {
    let Inputs { read, computed, modulation, weight, dims: Dims { b, t, c, n }, elem, .. } = inputs;
    let Gradients { dx, fresh_dx, dmodulation, dweight, dbias, add } = grads;
    let numbers = b * t * (2 * c + n) + 2 * n * c;
    let format = Format::of(t, elem);
    let _span = span("ln_linear", Pass::Backward, [c, n], 2 * flops(computed, t, c, n), numbers);
    // Those of the samples, then the two of each that correct for the inactive channels.
    let rows = b * format.rows_of(t) + if correction.is_some() { 2 * b } else { 0 };
    let (panels_len, h_len) = (panels(c) * format.panel_len(n), format.routed_len(rows, c));
    scratch::with(panels_len + h_len + b * 2 * n, |buffer| {
        let (panels_of_w, buffer) = buffer.split_at_mut(panels_len);
        let (h, pq) = buffer.split_at_mut(h_len);
        pack_panels(format, panels_of_w, weight, c, n);
        let panels_of_w = &*panels_of_w;
        let joined = format.joined(t);
        clear_routed(format, h, joined * t, b * t);

        let samples = samples_per_block(b, t, joined, panels_len);
        let (stride, inactive) = (modulation.stride, Inactive { format, read, modulation, c });
        let backward = Backward { inputs, format, panels_of_w, mean, rstd, correction };
        let shared_h = Shared::new(h);
        dy.par_chunks(samples * t * n)
            .zip(dx.par_chunks_mut(samples * t * c))
            .zip(dmodulation.par_chunks_mut(samples * stride))
            .zip(pq.par_chunks_mut(samples * 2 * n))
            .enumerate()
            .for_each(|(block, (((g, dx), dmodulation), pq))| {
                // SAFETY: each sample once; they are read after all tasks.
                unsafe { backward.samples(block * samples, g, dx, fresh_dx, &shared_h, rows, dmodulation, pq) };
            });

        let pq = &*pq;
        if correction.is_some() {
            inactive.gradient(dmodulation, pq, panels_of_w, n);
            let wide = format.padded_columns(c);
            scratch::with(2 * b * wide, |vectors| {
                inactive.vectors(vectors, 0, wide);
                // SAFETY: `h` is borrowed here alone.
                unsafe { format.scatter(&Shared::new(h), vectors, wide, Window::all(c), b * format.rows_of(t), rows) };
            });
        }
        let runs = b.div_ceil(joined);
        let count = if correction.is_some() { runs + 1 } else { runs };
        let operands = Operands { routed: h, other: &[] };
        let squares = weight_gradient(format, dweight, add, Layout::RoutedColumns, [c, n], operands, count, |i| {
            if i < runs {
                let samples = joined_samples(format, t, b, i);
                let window = window_of_all(&computed[samples.clone()]);
                let other = &dy[samples.start * t * n..samples.end * t * n];
                Sample { tokens: samples.len() * t, channels: [window.range(), 0..0], other }
            } else {
                Sample { tokens: 2 * b, channels: inactive.ranges(read), other: pq }
            }
        });
        if !add {
            dbias.fill(0.0);
        }
        for pq in pq.chunks_exact(2 * n) {
            add_assign(dbias, &pq[n..]);
        }
        squares
    })
}

/// What backward reads of all samples.
struct Backward<'a> {
    inputs: Inputs<'a>,
    format: Format,
    panels_of_w: &'a [f32], // panels(C) over N
    mean: &'a [f32],
    rstd: &'a [f32],
    correction: Option<&'a [f32]>,
}

impl Backward<'_> {
    /// Some samples, from `first` on: `dx`, the modulated rows again in groups, the gradients of shift and scale on what is computed of
    /// each, and P and Q.
    ///
    /// # Safety
    /// Nobody else may access the rows of these samples in `h`.
    #[expect(clippy::too_many_arguments, reason = "those of some samples")]
    unsafe fn samples(
        &self,
        first: usize,
        g: &[f32],      // [_, T, N]
        dx: &mut [f32], // [_, T, C]
        fresh_dx: bool,
        h: &Shared, // see Operands
        rows_of_h: usize,
        dmodulation: &mut [f32], // [_, stride]
        pq: &mut [f32],          // [_, 2, N]
    ) {
        let Inputs { x, read, computed, modulation, dims: Dims { t, c, n, .. }, .. } = self.inputs;
        let format = self.format;
        let (wide, first_row, rows) = (format.padded_columns(c), first * t, dx.len() / c);
        let product = WindowedColumns { format, panels_of_w: self.panels_of_w, windows: computed, tokens: t, k: n };
        let of_batch = product.tiles_at_once() * most_rows(format, t);
        let lines_len = most_rows(format, t) * wide;
        pq.fill(0.0);
        let mut lines_of = None;
        scratch::with(c + of_batch * (wide + 1) + lines_len + product.room(), |buffer| {
            let (row_of_x, buffer) = buffer.split_at_mut(c);
            let (dh, buffer) = buffer.split_at_mut(of_batch * wide);
            let (lines_of_h, buffer) = buffer.split_at_mut(lines_len);
            let (room, dr) = buffer.split_at_mut(product.room());
            product.batches(first_row..first_row + rows, |tiles| {
                let start = tiles[0].rows.start;
                let g = &g[(start - first_row) * n..];
                for (sample, rows) in tiles.iter().flat_map(|tile| tile.of_samples(t)) {
                    let u = self.correction.map_or(&[][..], |uv| &uv[sample * 2 * n..][..n]);
                    let (pq, of_batch) =
                        (&mut pq[(sample - first) * 2 * n..][..2 * n], rows.start - start..rows.end - start);
                    let (mean, rstd) = (&self.mean[rows.clone()], &self.rstd[rows.clone()]);
                    let g = &g[of_batch.start * n..of_batch.end * n];
                    sums_over_tokens(pq, &mut dr[of_batch], g, mean, rstd, u);
                }
                product.multiply(room, tiles, g, false, |row_tile, part, stage| {
                    let (Stage::Done(sums), rows) = (stage, &row_tile.rows) else { return };
                    // Whole halves: what lies outside of the window is not read.
                    for (columns, of_tile) in part.columns() {
                        let width = (of_tile + columns.len()).next_multiple_of(HALF);
                        let dh = &mut dh[(rows.start - start) * wide + columns.start - of_tile..];
                        write_rows(dh, sums, width, wide);
                    }
                });
                for tile in tiles {
                    if lines_of.replace(tile.samples.start) != Some(tile.samples.start) {
                        lines_of_h.fill(0.0);
                    }
                    let mut lines_of_rows = lines_of_h.chunks_exact_mut(wide);
                    for (sample, rows) in tile.of_samples(t) {
                        let dmodulation = &mut dmodulation[(sample - first) * modulation.stride..];
                        let (dshift, dscale) = columns(dmodulation, modulation.shift, modulation.scale, c);
                        let (shift, scale) = (modulation.shift(sample, c), modulation.scale(sample, c));
                        let (window, computed) = (read[sample], computed[sample]);
                        row_of_x.fill(0.0);
                        for (row, line) in rows.zip(&mut lines_of_rows) {
                            let (mean, rstd) = (self.mean[row], self.rstd[row]);
                            let x = masked(row_of_x, &x[row * c..][..c], window, computed);
                            normalise_backward(
                                &mut dx[(row - first_row) * c..][..c],
                                fresh_dx,
                                &mut line[..c],
                                dshift,
                                dscale,
                                &dh[(row - start) * wide..][..c],
                                dr[row - start],
                                &Row { x, shift, scale, window, computed, mean, rstd },
                            );
                        }
                    }
                    let lines = &lines_of_h[..tile.rows.len() * wide];
                    let (window, row) = (tile.window(computed), tile.first_row(format, t));
                    // SAFETY: rows of these samples.
                    unsafe { format.scatter(h, lines, wide, window, row, rows_of_h) };
                }
            });
        });
    }
}

/// Two columns of C numbers of one row, which must not overlap.
fn columns(row: &mut [f32], a: usize, b: usize, c: usize) -> (&mut [f32], &mut [f32]) {
    let [a, b] = row.get_disjoint_mut([a..a + c, b..b + c]).expect("shift and scale are different columns");
    (a, b)
}
