//! The CPU version: the windows of a few rows are normalised, packed, and multiplied with the panels of the weight, of which a
//! window is a range; correction and bias are added to each tile while it is in cache. Where very few channels are inactive in every
//! sample, all are computed and nothing is corrected ([`computes_all`]). GELU is left to the reader of its output, or a pass of its own.

use super::{Dims, EPS};
use crate::backend::cpu::packed::Format;
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::{add_assign, fma, gelu, gelu_derivative, simd_fn, sum_by};
use crate::backend::cpu::tile::{HALF, MAX_ROWS, PANEL, Segment, Streams, Tile, panels, write_rows};
use crate::ops::products::{
    PACKED_PANELS, Stage, WindowedColumns, batches, each_panel, fetched_by_each, inner_of_all, joined_samples,
    most_rows, pack_panels, packed_tile_len, packed_tiles_len, panels_at_once, rows_per_block, samples_per_block,
    window_of_all, with_packed,
};
use crate::ops::weight_gradient::{Layout, Operands, Sample, clear_routed, weight_gradient};
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

    fn shift(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.shift..][..c]
    }

    fn scale(&self, sample: usize, c: usize) -> &'a [f32] {
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
}

/// Whether all channels of masked rows are computed, rather than the windows and what corrects for the others: where that takes less,
/// because so few are inactive in every sample ([`Format::few_inner`]: none but with parts).
pub fn computes_all(read: &[Window], Dims { t, c, .. }: Dims) -> bool {
    read.iter().all(|window| c - window.width <= Format::of(t).few_inner())
}

/// The row of x to normalise: `x` where its window is all that is computed, else its window, copied into `room`, which is zero elsewhere.
fn masked<'a>(room: &'a mut [f32], x: &'a [f32], window: Window, computed: Window) -> &'a [f32] {
    if window == computed {
        return x;
    }
    room[window.range()].copy_from_slice(&x[window.range()]);
    room
}

/// The channels that are inactive in some of the samples.
fn inactive_ranges(windows: &[Window], c: usize) -> [Range<usize>; 2] {
    let left = windows.iter().map(|w| w.start).max().unwrap_or(0);
    let right = windows.iter().map(|w| w.end()).min().unwrap_or(c);
    if right <= left { [0..c, c..c] } else { [0..left, right..c] }
}

/// The inner elements that are multiplied for [`inactive_ranges`], as whole blocks: in one range of all, where those of the two overlap.
fn inactive_inner(format: Format, windows: &[Window], c: usize) -> [Range<usize>; 2] {
    let [left, right] = inactive_ranges(windows, c).map(|range| format.inner(range, c));
    if right.start < left.end { [format.inner(0..c, c), c..c] } else { [left, right] }
}

/// `[2 samples, stride]`: `1 + scale` and `shift` of each sample from `first` on, on its inactive channels; zero on the active ones, and
/// behind the last.
fn inactive_modulation(
    out: &mut [f32],
    first: usize,
    windows: &[Window],
    modulation: Modulation,
    c: usize,
    stride: usize,
) {
    for ((i, rows), &window) in (first..).zip(out.chunks_exact_mut(2 * stride)).zip(windows) {
        let (one_plus_scale, shift) = rows.split_at_mut(stride);
        for (y, s) in one_plus_scale.iter_mut().zip(modulation.scale(i, c)) {
            *y = 1.0 + s;
        }
        shift[..c].copy_from_slice(modulation.shift(i, c));
        for zeros in [window.range(), c..stride] {
            one_plus_scale[zeros.clone()].fill(0.0);
            shift[zeros].fill(0.0);
        }
    }
}

/// Numbers of [`packed_lines`].
fn packed_lines_len(format: Format, b: usize, c: usize) -> usize {
    b.div_ceil(samples_at_once(format, b)) * 2 * format.rows_len(format.tile_rows(), c)
}

/// [`inactive_modulation`] of as many samples as are multiplied at once, packed: of the left and of the right inactive channels.
fn packed_lines(format: Format, to: &mut [f32], read: &[Window], modulation: Modulation, c: usize) {
    let (samples, len) = (samples_at_once(format, read.len()), format.rows_len(format.tile_rows(), c));
    to.par_chunks_mut(2 * len).zip(read.par_chunks(samples)).enumerate().for_each(|(chunk, (to, windows))| {
        let wide = format.padded_columns(c);
        scratch::with(2 * windows.len() * wide, |lines| {
            inactive_modulation(lines, chunk * samples, windows, modulation, c, wide);
            for (inner, to) in inactive_inner(format, windows, c).into_iter().zip(to.chunks_exact_mut(len)) {
                format.pack_rows(to, &lines[inner.start..], 2 * windows.len(), inner.len(), wide);
            }
        });
    });
}

/// Operations of the forward product and of the correction.
fn flops(read: &[Window], t: usize, c: usize, n: usize) -> usize {
    read.iter().map(|window| 2 * n * (t * window.width + 2 * (c - window.width))).sum()
}

/// Samples whose two vectors fill a tile.
fn samples_at_once(format: Format, b: usize) -> usize {
    b.div_ceil(b.div_ceil(format.tile_rows() / 2))
}

/// Whether `panel` holds channels of `ranges`.
fn touched(ranges: [Range<usize>; 2], panel: usize) -> bool {
    ranges.iter().any(|range| range.start.max(panel * PANEL) < range.end.min((panel + 1) * PANEL))
}

/// u and v + b of every sample in the columns of some panels, the first of which is `first`: those of `correction` `[B, 2, N]`.
///
/// # Safety
/// Nobody else may access these columns.
#[expect(clippy::too_many_arguments, reason = "operands and sizes")]
unsafe fn forward_correction(
    format: Format,
    correction: &Shared,
    lines: &[f32], // see packed_lines
    read: &[Window],
    first: usize,
    panels_of_w: &[f32],
    bias: &[f32],
    c: usize,
) {
    let n = bias.len();
    let samples = samples_at_once(format, read.len());
    let (mut tile, mut kernel) = (Tile::new(), format.kernel());
    let chunks = read.chunks(samples).zip(lines.chunks_exact(2 * format.rows_len(format.tile_rows(), c)));
    for (chunk, (windows, lines)) in chunks.enumerate() {
        let m = 2 * windows.len();
        let ranges = inactive_inner(format, windows, c);
        for (panel, b) in (first..).zip(panels_of_w.chunks_exact(format.panel_len(c))) {
            let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
            tile.rows[..m].fill([0.0; PANEL]);
            for (inner, a) in ranges.iter().zip(lines.chunks_exact(format.rows_len(format.tile_rows(), c))) {
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

/// See [`super::ln_linear`], without activation. `correction` is empty when it is not needed.
pub fn forward(
    y: &mut [f32],          // [B, T, N]
    mean: &mut [f32],       // [B, T]
    rstd: &mut [f32],       // [B, T]
    correction: &mut [f32], // [B, 2, N] or empty
    inputs: Inputs,
    bias: &[f32], // [N]
) {
    let Inputs { read, computed, modulation, weight, dims: Dims { b, t, c, n }, .. } = inputs;
    let format = Format::of(t);
    let _span = span("ln_linear", Pass::Forward, [c, n], flops(computed, t, c, n), b * t * (c + n) + n * c);
    let lines_len = if correction.is_empty() { 0 } else { packed_lines_len(format, b, c) };
    scratch::with(panels(n) * format.panel_len(c) + lines_len, |buffer| {
        let (panels_of_w, lines) = buffer.split_at_mut(panels(n) * format.panel_len(c));
        packed_lines(format, lines, read, modulation, c);
        let (lines, shared_correction) = (&*lines, Shared::new(correction));
        let at_once = panels_at_once(n, PACKED_PANELS);
        panels_of_w.par_chunks_mut(at_once * format.panel_len(c)).enumerate().for_each(|(task, to)| {
            let first = task * at_once;
            for (panel, to) in (first..).zip(to.chunks_exact_mut(format.panel_len(c))) {
                format.pack_panel_transposed(to, weight, panel, n, c);
            }
            if !lines.is_empty() {
                // While the panels are in cache.
                // SAFETY: each panel once.
                unsafe { forward_correction(format, &shared_correction, lines, read, first, to, bias, c) };
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

impl Forward<'_> {
    /// Rows from `first` on, as many as `mean` has.
    fn block(&self, first: usize, y: &mut [f32], mean: &mut [f32], rstd: &mut [f32]) {
        let Inputs { x, read, computed, modulation, dims: Dims { b, t, c, n }, .. } = self.inputs;
        let format = self.format;
        let rows = first..first + mean.len();
        let (mut tile, mut kernel) = (Tile::new(), format.kernel());
        let streams = Streams::of(b * t * n);
        let wide = format.padded_columns(c);
        let (lines_len, tile_len) = (most_rows(format, t) * wide, packed_tile_len(format, t, c));
        scratch::with(c + lines_len + packed_tiles_len(format, t, c), |buffer| {
            let (row_of_x, buffer) = buffer.split_at_mut(c);
            let (lines, packed) = buffer.split_at_mut(lines_len);
            batches(format, rows, t, tile_len, |tiles| {
                for (row_tile, packed) in tiles.iter().zip(packed.chunks_exact_mut(tile_len)) {
                    let inner = format.inner(row_tile.window(computed).range(), c);
                    let mut lines_of_rows = lines.chunks_exact_mut(wide);
                    for (sample, rows) in row_tile.of_samples(t) {
                        let (window, of_sample) = (read[sample], computed[sample]);
                        let here = of_sample.start - inner.start..of_sample.end() - inner.start;
                        row_of_x.fill(0.0);
                        for (row, line) in rows.zip(&mut lines_of_rows) {
                            line[..here.start].fill(0.0);
                            line[here.end..inner.len()].fill(0.0);
                            (mean[row - first], rstd[row - first]) = normalise(
                                &mut line[here.clone()],
                                masked(row_of_x, &x[row * c..][..c], window, of_sample),
                                of_sample,
                                modulation.shift(sample, c),
                                modulation.scale(sample, c),
                            );
                        }
                    }
                    format.pack_rows(packed, lines, row_tile.rows.len(), inner.len(), wide);
                }
                let of_all = inner_of_all(tiles, computed);
                for (panel, (b, next)) in each_panel(format, self.panels_of_w, c).enumerate() {
                    let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
                    let shares = fetched_by_each(format, next, of_all.clone(), tiles.len());
                    for ((row_tile, a), next) in with_packed(format, tiles, packed, t, c).zip(shares) {
                        let inner = format.inner(row_tile.window(computed).range(), c);
                        let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                        let halves = columns.len().div_ceil(HALF);
                        let rows = row_tile.rows.start - first..row_tile.rows.end - first;
                        let at = rows.start * n + columns.start;
                        let width = columns.len();
                        if !self.correction.is_empty() {
                            let of_tile = &self.correction[row_tile.samples.start * 2 * n + columns.start..];
                            kernel.fetch_rows(of_tile, 2 * row_tile.samples.len(), width, n);
                        }
                        if streams.is_none() {
                            kernel.fetch_rows(&y[at..], rows.len(), width, n);
                        }
                        kernel.multiply(&mut tile, rows.len(), halves, segment, next);
                        let mut sums = &mut tile.rows[..rows.len()];
                        for (sample, rows) in row_tile.of_samples(t) {
                            let rows = rows.start - first..rows.end - first;
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
                        match &streams {
                            // SAFETY: each place of `y` is written once and read by nobody before this block is done.
                            Some(streams) => unsafe {
                                streams.write_tile(&mut y[at..], &tile, rows.len(), width, n);
                            },
                            None => write_rows(&mut y[at..], &tile.rows[..rows.len()], width, n),
                        }
                    }
                }
            });
        });
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
    let Inputs { read, computed, modulation, weight, dims: Dims { b, t, c, n }, .. } = inputs;
    let Gradients { dx, fresh_dx, dmodulation, dweight, dbias, add } = grads;
    let numbers = b * t * (2 * c + n) + 2 * n * c;
    let format = Format::of(t);
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
        let stride = modulation.stride;
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
            inactive_gradient(format, dmodulation, pq, read, modulation, panels_of_w, n, c);
            let wide = format.padded_columns(c);
            scratch::with(2 * b * wide, |lines| {
                inactive_modulation(lines, 0, read, modulation, c, wide);
                // SAFETY: `h` is borrowed here alone.
                unsafe { format.scatter(&Shared::new(h), lines, wide, Window::all(c), b * format.rows_of(t), rows) };
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
                Sample { tokens: 2 * b, channels: inactive_ranges(read, c), other: pq }
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
                        let (window, of_sample) = (read[sample], computed[sample]);
                        row_of_x.fill(0.0);
                        for (row, line) in rows.zip(&mut lines_of_rows) {
                            normalise_backward(
                                &mut dx[(row - first_row) * c..][..c],
                                fresh_dx,
                                &mut line[..c],
                                dshift,
                                dscale,
                                &dh[(row - start) * wide..][..c],
                                dr[row - start],
                                masked(row_of_x, &x[row * c..][..c], window, of_sample),
                                shift,
                                scale,
                                window,
                                of_sample,
                                self.mean[row],
                                self.rstd[row],
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

/// The gradients of shift and scale outside of the windows: `W[:, I]^T Q` and `W[:, I]^T P`.
#[expect(clippy::too_many_arguments, reason = "operands and sizes")]
fn inactive_gradient(
    format: Format,
    dmodulation: &mut [f32],
    pq: &[f32], // [B, 2, N]
    read: &[Window],
    modulation: Modulation,
    panels_of_w: &[f32], // panels(C) over N
    n: usize,
    c: usize,
) {
    let (stride, inner) = (modulation.stride, format.inner(0..n, n));
    let samples = samples_at_once(format, read.len());
    let of_chunk = format.rows_len(2 * samples, n);
    scratch::with(read.len().div_ceil(samples) * of_chunk, |packed| {
        let chunks = packed.par_chunks_mut(of_chunk).zip(pq.par_chunks(samples * 2 * n));
        chunks.for_each(|(to, pq)| format.pack_rows(to, pq, pq.len() / n, n, n));
        let (packed, dmodulation) = (&*packed, Shared::new(dmodulation));
        panels_of_w.par_chunks_exact(format.panel_len(n)).enumerate().with_max_len(1).for_each(|(panel, b)| {
            let columns = panel * PANEL..((panel + 1) * PANEL).min(c);
            let (mut tile, mut kernel) = (Tile::new(), format.kernel());
            for (chunk, (windows, a)) in read.chunks(samples).zip(packed.chunks_exact(of_chunk)).enumerate() {
                if !touched(inactive_ranges(windows, c), panel) {
                    continue;
                }
                let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                kernel.multiply(&mut tile, 2 * windows.len(), columns.len().div_ceil(HALF), segment, &[]);
                for (s, (window, sums)) in windows.iter().zip(tile.rows.chunks_exact(2)).enumerate() {
                    let row = (chunk * samples + s) * stride;
                    for (first, sums) in [(modulation.scale, &sums[0]), (modulation.shift, &sums[1])] {
                        for range in [0..window.start, window.end()..c] {
                            let (from, to) = (range.start.max(columns.start), range.end.min(columns.end));
                            if from < to {
                                // SAFETY: columns of this panel.
                                let d = unsafe { dmodulation.slice(row + first + from..row + first + to) };
                                add_assign(d, &sums[from - columns.start..to - columns.start]);
                            }
                        }
                    }
                }
            }
        });
    });
}

/// Two columns of C numbers of one row, which must not overlap.
fn columns(row: &mut [f32], a: usize, b: usize, c: usize) -> (&mut [f32], &mut [f32]) {
    let [a, b] = row.get_disjoint_mut([a..a + c, b..b + c]).expect("shift and scale are different columns");
    (a, b)
}

simd_fn! {
    /// One row: mean and rstd of the masked row; `h` is its modulated window.
    fn normalise<F>(h: &mut [f32], x: &[f32], window: Window, shift: &[f32], scale: &[f32]) -> (f32, f32) {
        let count = x.len() as f32;
        let (a, w) = (window.range(), window.width);
        let (h, x, shift, scale) = (&mut h[..w], &x[a.clone()], &shift[a.clone()], &scale[a]);
        let [sum] = sum_by([x], |[x]| [x]);
        let mean = sum / count;
        let [squares] = sum_by([x], |[x]| [(x - mean) * (x - mean)]);
        // The inactive channels are zeros: each adds mean^2.
        let variance = (squares + (count - w as f32) * mean * mean) / count;
        let rstd = 1.0 / (variance + EPS as f32).sqrt();
        for i in 0..w {
            h[i] = fma::<F>((x[i] - mean) * rstd, 1.0 + scale[i], shift[i]);
        }
        (mean, rstd)
    }
}

simd_fn! {
    /// `rows += r u + v` (without `u`: `rows += v`), in the columns that `v` has.
    fn correct_rows<F>(rows: &mut [[f32; PANEL]], r: &[f32; MAX_ROWS], u: &[f32], v: &[f32]) {
        for (line, &r) in rows.iter_mut().zip(r) {
            if u.is_empty() {
                for (line, &v) in line.iter_mut().zip(v) {
                    *line += v;
                }
            } else {
                for ((line, &u), &v) in line.iter_mut().zip(u).zip(v) {
                    *line += fma::<F>(r, u, v);
                }
            }
        }
    }
}

/// Numbers of a task of a pass over all.
const AT_ONCE: usize = 1 << 14;

/// `y = gelu(pre)`.
pub fn gelu_forward(y: &mut [f32], pre: &[f32]) {
    let _span = span("gelu", Pass::Forward, [1, 1], 0, 2 * y.len());
    y.par_chunks_mut(AT_ONCE).zip(pre.par_chunks(AT_ONCE)).for_each(|(y, pre)| gelu_of(y, pre));
}

/// `dy *= gelu'(pre)`.
pub fn gelu_backward(dy: &mut [f32], pre: &[f32]) {
    let _span = span("gelu", Pass::Backward, [1, 1], 0, 3 * dy.len());
    dy.par_chunks_mut(AT_ONCE).zip(pre.par_chunks(AT_ONCE)).for_each(|(dy, pre)| times_slope(dy, pre));
}

simd_fn! {
    fn gelu_of<F>(y: &mut [f32], pre: &[f32]) {
        for (y, &x) in y.iter_mut().zip(pre) {
            *y = gelu::<F>(x);
        }
    }
}

simd_fn! {
    fn times_slope<F>(g: &mut [f32], pre: &[f32]) {
        for (g, &x) in g.iter_mut().zip(pre) {
            *g *= gelu_derivative::<F>(x);
        }
    }
}

simd_fn! {
    /// Rows of one sample: adds `P = sum_t r_t g_t` and `Q = sum_t g_t` to `pq` `[2, N]`, and sets `dr_t = g_t . u`. With an
    /// empty `u` (all channels are computed), only Q; `dr` is zero.
    fn sums_over_tokens<F>(pq: &mut [f32], dr: &mut [f32], g: &[f32], mean: &[f32], rstd: &[f32], u: &[f32]) {
        let n = pq.len() / 2;
        let (p, q) = pq.split_at_mut(n);
        if u.is_empty() {
            dr.fill(0.0);
            for g in g.chunks_exact(n) {
                for (q, &g) in q.iter_mut().zip(g) {
                    *q += g;
                }
            }
            return;
        }
        let u = &u[..n];
        for (((g, dr), mean), rstd) in g.chunks_exact(n).zip(dr).zip(mean).zip(rstd) {
            let r = -mean * rstd;
            for ((q, p), &g) in q.iter_mut().zip(&mut *p).zip(g) {
                *q += g;
                *p = fma::<F>(r, g, *p);
            }
            [*dr] = sum_by([g, u], |[g, u]| [g * u]);
        }
    }
}

simd_fn! {
    /// One row of the LayerNorm backward; also the window of `h` again, and the row's part of `dshift` and `dscale` on the window.
    fn normalise_backward<F>(
        dx: &mut [f32],
        fresh: bool,
        h: &mut [f32],
        dshift: &mut [f32],
        dscale: &mut [f32],
        dh: &[f32],
        dr: f32,
        x: &[f32],
        shift: &[f32],
        scale: &[f32],
        window: Window,
        computed: Window,
        mean: f32,
        rstd: f32,
    ) {
        let inverse = 1.0 / x.len() as f32;
        let (a, w) = (computed.range(), computed.width);
        let (h, of_dh, of_x) = (&mut h[a.clone()], &dh[a.clone()], &x[a.clone()]);
        let (dshift, dscale) = (&mut dshift[a.clone()], &mut dscale[a.clone()]);
        let (shift, of_scale) = (&shift[a.clone()], &scale[a]);
        for i in 0..w {
            let z = (of_x[i] - mean) * rstd;
            h[i] = fma::<F>(z, 1.0 + of_scale[i], shift[i]);
            dshift[i] += of_dh[i];
            dscale[i] = fma::<F>(of_dh[i], z, dscale[i]);
        }
        let [sum, product] = sum_by([of_dh, of_scale, of_x], |[dh, scale, x]| {
            let dz = dh * (1.0 + scale);
            [dz, dz * ((x - mean) * rstd)]
        });
        let s1 = (sum + dr) * inverse;
        let s2 = (product - mean * rstd * dr) * inverse;
        let (a, w) = (window.range(), window.width);
        if fresh {
            dx[..a.start].fill(0.0);
            dx[a.end..].fill(0.0);
        }
        let (dx, dh, x, scale) = (&mut dx[a.clone()], &dh[a.clone()], &x[a.clone()], &scale[a]);
        for i in 0..w {
            let z = (x[i] - mean) * rstd;
            let d = rstd * (dh[i] * (1.0 + scale[i]) - s1 - z * s2);
            dx[i] = if fresh { d } else { dx[i] + d };
        }
    }
}
