//! The CPU version: rows, packed, times the panels of the weight, of which a window is some halves; bias, gate and residual are
//! applied to each tile while it is in cache.

use super::Dims;
use crate::backend::DType;
use crate::backend::cpu::packed::Format;
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::{add_assign, fma, gelu_and_derivative, simd_fn};
use crate::backend::cpu::tile::{HALF, PANEL, Segment, Tile, add_tile, panels, write_rows};
use crate::ops::cpu::products::{
    Stage, WindowedColumns, batches, each_panel, fetched_by_each, inner_of_all, joined_samples, most_rows, pack_panels,
    packed_tile_len, packed_tiles_len, rows_per_block, samples_per_block, window_of_all, with_packed,
};
use crate::ops::cpu::weight_gradient::{Layout, Operands, Sample, clear_routed, weight_gradient};
use crate::routing::Window;
use rayon::prelude::*;
use std::ops::Range;

/// Columns of `[B, stride]`.
#[derive(Clone, Copy)]
pub struct Gate<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

impl<'a> Gate<'a> {
    /// Of `data` `[B, stride]`, which holds `b` samples.
    pub fn new(data: &'a [f32], b: usize, offset: usize) -> Self {
        Gate { data, stride: data.len() / b, offset }
    }

    fn of(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.offset..][..c]
    }
}

/// What both passes read.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub weight: &'a [f32], // [C, K]
    pub gate: Gate<'a>,
    pub write: &'a [Window], // B
    pub dims: Dims,
    pub elem: DType, // in which products are: f32 or bf16
}

/// What is added to the gated output of the linear layer: `[B, T, C]`, each with one window a sample.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    pub base: (&'a [f32], &'a [Window]),           // inside of its windows
    pub bypass: Option<(&'a [f32], &'a [Window])>, // outside of its windows
}

/// Operations of the forward product.
fn flops(write: &[Window], t: usize, k: usize) -> usize {
    write.iter().map(|window| 2 * t * k * window.width).sum()
}

/// See [`super::linear_residual`].
pub fn forward(
    out: &mut [f32], // [B, T, C]
    z: &mut [f32],   // [B, T, C], written on the write windows; empty when nobody reads it
    a: &[f32],       // [B, T, K]
    of_gelu: bool,   // multiply the GELU of `a`
    inputs: Inputs,
    bias: &[f32], // [C]
    Residual { base, bypass }: Residual,
) {
    let Inputs { weight, gate, write, dims: Dims { b, t, k, c }, elem } = inputs;
    let numbers = b * t * (k + 3 * c) + c * k;
    let _span = span("linear_residual", Pass::Forward, [k, c], flops(write, t, k), numbers);
    let format = Format::of(t, elem);
    let panels_len = panels(c) * format.panel_len(k);
    let rows = rows_per_block(b * t, format.joined(t) * t, panels_len);
    // Whether the whole write window is added to base alone: then that is done tile by tile.
    let is_base = |sample: usize| {
        let inside = |windows: &[Window]| {
            let (outer, inner) = (windows[sample].range(), write[sample].range());
            outer.start <= inner.start && inner.end <= outer.end
        };
        inside(base.1) && bypass.is_none_or(|(_, windows)| inside(windows))
    };
    scratch::with(panels_len, |panels_of_w| {
        panels_of_w
            .par_chunks_mut(format.panel_len(k))
            .enumerate()
            .for_each(|(panel, to)| format.pack_panel_transposed(to, weight, panel, c, k));
        let product = WindowedColumns { format, panels_of_w, windows: write, tokens: t, k };
        let (keeps_z, z) = (!z.is_empty(), Shared::new(z));
        out.par_chunks_mut(rows * c).enumerate().for_each(|(block, out)| {
            let first = block * rows;
            // SAFETY: blocks have rows of their own, and `z` is borrowed for all of them; where it is empty, so are the parts.
            let z = unsafe { z.slice(if keeps_z { first * c..first * c + out.len() } else { 0..0 }) };
            let rows = first..first + out.len() / c;
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(c)) {
                let sample = row / t;
                let later = if is_base(sample) { write[sample].range() } else { 0..0 };
                for columns in [0..later.start, later.end..c] {
                    let out = &mut out[columns.clone()];
                    match bypass {
                        Some((x, windows)) => {
                            out.copy_from_slice(&x[row * c..][columns.clone()]);
                            out[within(windows[sample].range(), &columns)].fill(0.0);
                        }
                        None => out.fill(0.0),
                    }
                    let of_base = within(base.1[sample].range(), &columns);
                    let from = columns.start + of_base.start..columns.start + of_base.end;
                    add_assign(&mut out[of_base], &base.0[row * c..][from]);
                }
            }
            scratch::with(product.room(), |room| {
                product.batches(rows, |tiles| {
                    let a = &a[tiles[0].rows.start * k..];
                    product.multiply(room, tiles, a, of_gelu, |row_tile, part, mut stage| {
                        for (sample, rows) in row_tile.of_samples(t) {
                            for (columns, of_tile) in part.columns_of(write[sample]) {
                                let (at, width) = ((rows.start - first) * c + columns.start, columns.len());
                                let out = &mut out[at..];
                                let z = if keeps_z { &mut z[at..] } else { &mut [][..] };
                                let base = match is_base(sample) {
                                    true => &base.0[rows.start * c + columns.start..],
                                    false => &[],
                                };
                                match &mut stage {
                                    Stage::Before(kernel) => {
                                        for numbers in [base, out, z] {
                                            kernel.fetch_rows(numbers, rows.len(), width, c);
                                        }
                                    }
                                    Stage::Done(sums) => {
                                        let sums = &sums[rows.start - row_tile.rows.start..][..rows.len()];
                                        let gate = &gate.of(sample, c)[columns.clone()];
                                        finish_tile(out, z, base, sums, of_tile, c, &bias[columns], gate);
                                    }
                                }
                            }
                        }
                    });
                });
            });
        });
    });
}

/// The part of `range` inside `of`, from the start of `of`.
fn within(range: Range<usize>, of: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(of.start, of.end);
    start - of.start..range.end.clamp(start, of.end) - of.start
}

/// What backward writes. `da` and the weights are overwritten or added to as the flags say; `dmodulation` is added to.
pub struct Gradients<'a> {
    pub da: &'a mut [f32],          // [B, T, K], see Activation
    pub fresh_da: bool,             // overwrite da; of no meaning with GeluOfDa
    pub dmodulation: &'a mut [f32], // [B, stride]
    pub dweight: &'a mut [f32],     // [C, K]
    pub dbias: &'a mut [f32],       // [C]
    pub add: bool,                  // add to dweight and dbias
}

/// `a` for backward.
pub enum Activation<'a> {
    /// `[B, T, K]`
    Rows(&'a [f32]),
    /// It is the GELU of what `da` holds, whose gradient takes its place; `a` is put into this room `[panels(K), 2, B T, HALF]`.
    GeluOfDa(&'a mut [f32]),
}

/// Numbers of `[panels(K), 2, B T, HALF]`.
pub fn panels_len([b, t, k]: [usize; 3]) -> usize {
    b * t * panels(k) * PANEL
}

/// The gradients of `a`, the gate, weight and bias; those of base and bypass are `dout` itself. Gives the sum of squares of what
/// is written, or added, to the weight's.
pub fn backward(
    grads: Gradients,
    dbias_parts: &mut [f32], // [B, C], for the time of the call
    dout: &[f32],            // [B, T, C]
    a: Activation,
    z: &[f32],      // [B, T, C]
    inputs: Inputs, // as in the forward pass
) -> f64 {
    let Inputs { weight, gate, write, dims: Dims { b, t, k, c }, elem } = inputs;
    let Gradients { da, fresh_da, dmodulation, dweight, dbias, add } = grads;
    let each = if matches!(a, Activation::GeluOfDa(_)) { 3 * k } else { 2 * k };
    let numbers = b * t * (each + 3 * c) + 2 * c * k;
    let _span = span("linear_residual", Pass::Backward, [k, c], 2 * flops(write, t, k), numbers);
    let format = Format::of(t, elem);
    let stride = gate.stride;
    let wide_k = panels(k) * PANEL;
    let panels_len = panels(k) * format.panel_len(c);
    let joined = format.joined(t);
    let samples = samples_per_block(b, t, joined, panels_len);
    let squares = scratch::with(panels_len + format.routed_len(b * format.rows_of(t), c), |buffer| {
        let (panels_of_w, dz) = buffer.split_at_mut(panels_len);
        clear_routed(format, dz, joined * t, b * t);
        pack_panels(format, panels_of_w, weight, k, c);
        let (rows, room, of_gelu) = match a {
            Activation::Rows(rows) => (rows, &mut [][..], false),
            Activation::GeluOfDa(room) => (&[][..], room, true),
        };
        assert!(!of_gelu || room.len() == b * t * wide_k, "room of another size than the panels");
        let backward = Backward { inputs, format, dout, of_gelu, panels_of_w, z };
        let (shared_dz, recomputed) = (Shared::new(dz), Shared::new(room));
        da.par_chunks_mut(samples * t * k)
            .zip(dmodulation.par_chunks_mut(samples * stride))
            .zip(dbias_parts.par_chunks_mut(samples * c))
            .enumerate()
            .for_each(|(block, ((da, dmodulation), dbias))| {
                // SAFETY: each sample once; they are read after all tasks.
                unsafe { backward.samples(block * samples, &shared_dz, da, fresh_da, &recomputed, dmodulation, dbias) };
            });
        let operands = Operands { routed: dz, other: room };
        weight_gradient(format, dweight, add, Layout::RoutedRows, [c, k], operands, b.div_ceil(joined), |i| {
            let samples = joined_samples(format, t, b, i);
            let other = if of_gelu { &[] } else { &rows[samples.start * t * k..samples.end * t * k] };
            Sample { tokens: samples.len() * t, channels: [window_of_all(&write[samples]).range(), 0..0], other }
        })
    });
    if !add {
        dbias.fill(0.0);
    }
    for part in dbias_parts.chunks_exact(c) {
        add_assign(dbias, part);
    }
    squares
}

/// What backward reads of all samples.
struct Backward<'a> {
    inputs: Inputs<'a>,
    format: Format,
    dout: &'a [f32],
    of_gelu: bool,          // see Activation
    panels_of_w: &'a [f32], // panels(K) over C
    z: &'a [f32],
}

impl Backward<'_> {
    /// Some samples, from `first` on: `dz` in the groups that the window of each tile meets, `da`, and the sums over tokens.
    ///
    /// # Safety
    /// Nobody else may access the rows of these samples in `dz` and `recomputed`.
    #[expect(clippy::too_many_arguments, reason = "those of some samples")]
    unsafe fn samples(
        &self,
        first: usize,
        dz: &Shared,    // see Operands
        da: &mut [f32], // [_, T, K]
        fresh_da: bool,
        recomputed: &Shared,     // [panels(K), 2, B T, HALF] or empty
        dmodulation: &mut [f32], // [_, stride]
        dbias: &mut [f32],       // [_, C]
    ) {
        let Inputs { gate, write, dims: Dims { b, t, k, c }, .. } = self.inputs;
        let format = self.format;
        let (all_rows, first_row, count) = (b * t, first * t, dbias.len() / c);
        let (wide, tile_len) = (format.padded_columns(c), packed_tile_len(format, t, c));
        let lines_len = most_rows(format, t) * wide;
        dbias.fill(0.0);
        let (mut tile, mut kernel) = (Tile::new(), format.kernel());
        let mut lines_of = None;
        scratch::with(lines_len + packed_tiles_len(format, t, c), |buffer| {
            let (lines, packed) = buffer.split_at_mut(lines_len);
            batches(format, first_row..first_row + count * t, t, tile_len, |tiles| {
                for (tile, packed) in tiles.iter().zip(packed.chunks_exact_mut(tile_len)) {
                    if lines_of.replace(tile.samples.start) != Some(tile.samples.start) {
                        lines.fill(0.0);
                    }
                    let mut lines_of_rows = lines.chunks_exact_mut(wide);
                    for (sample, rows) in tile.of_samples(t) {
                        let (at, range) = (sample - first, write[sample].range());
                        let dgate = &mut dmodulation[at * gate.stride + gate.offset..][range.clone()];
                        let dbias = &mut dbias[at * c..][range.clone()];
                        let gate = &gate.of(sample, c)[range.clone()];
                        for (row, line) in rows.zip(&mut lines_of_rows) {
                            gate_backward(
                                &mut line[range.clone()],
                                dgate,
                                dbias,
                                &self.dout[row * c..][range.clone()],
                                &self.z[row * c..][range.clone()],
                                gate,
                            );
                        }
                    }
                    let (window, rows) = (tile.window(write), tile.rows.len());
                    let (lines, row) = (&lines[..rows * wide], tile.first_row(format, t));
                    // SAFETY: rows of these samples.
                    unsafe { format.scatter(dz, lines, wide, window, row, b * format.rows_of(t)) };
                    let inner = format.inner(window.range(), c);
                    format.pack_rows(packed, &lines[inner.start..], rows, inner.len(), wide);
                }
                let of_all = inner_of_all(tiles, write);
                for (panel, (b, next)) in each_panel(format, self.panels_of_w, c).enumerate() {
                    let columns = panel * PANEL..((panel + 1) * PANEL).min(k);
                    let shares = fetched_by_each(format, next, of_all.clone(), tiles.len());
                    for ((row_tile, a), next) in with_packed(format, tiles, packed, t, c).zip(shares) {
                        let (rows, inner) = (&row_tile.rows, format.inner(row_tile.window(write).range(), c));
                        let segment = Segment { a, b: format.of_panel(b, inner.start), len: inner.len() };
                        let halves = columns.len().div_ceil(HALF);
                        let (width, at) = (columns.len(), (rows.start - first_row) * k + columns.start);
                        let da = &mut da[at..(rows.end - first_row) * k];
                        kernel.fetch_rows(da, rows.len(), width, k);
                        kernel.multiply(&mut tile, rows.len(), halves, segment, next);
                        if self.of_gelu {
                            let y = [0, 1].map(|half| {
                                let at = ((2 * panel + half) * all_rows + rows.start) * HALF;
                                // SAFETY: rows of these samples.
                                unsafe { recomputed.slice(at..at + rows.len() * HALF) }
                            });
                            gelu_backward(da, y, &tile, width, k);
                        } else if fresh_da {
                            write_rows(da, &tile.rows[..rows.len()], width, k);
                        } else {
                            add_tile(da, &tile, rows.len(), width, k);
                        }
                    }
                }
            });
        });
    }
}

/// `dx (+)= dout` outside the windows.
pub fn bypass_backward(dx: &mut [f32], fresh: bool, dout: &[f32], windows: &[Window], t: usize, c: usize) {
    each_row(dx, windows, t, c, |row, dx, window| {
        let dout = &dout[row * c..][..c];
        for outside in [0..window.start, window.end()..c] {
            let (dx, dout) = (&mut dx[outside.clone()], &dout[outside]);
            if fresh { dx.copy_from_slice(dout) } else { add_assign(dx, dout) }
        }
        if fresh {
            dx[window.range()].fill(0.0);
        }
    });
}

/// `dbase += dout` inside the windows.
pub fn base_backward(dbase: &mut [f32], dout: &[f32], windows: &[Window], t: usize, c: usize) {
    each_row(dbase, windows, t, c, |row, dbase, window| {
        add_assign(&mut dbase[window.range()], &dout[row * c..][window.range()]);
    });
}

/// Zeros outside the windows.
pub fn clear_outside(dout: &mut [f32], windows: &[Window], t: usize, c: usize) {
    if windows.iter().all(|window| window.width == c) {
        return;
    }
    each_row(dout, windows, t, c, |_, dout, window| {
        dout[..window.start].fill(0.0);
        dout[window.end()..].fill(0.0);
    });
}

fn each_row(to: &mut [f32], windows: &[Window], t: usize, c: usize, work: impl Fn(usize, &mut [f32], Window) + Sync) {
    let _span = span("residual", Pass::Backward, [c, c], 0, 3 * to.len());
    let rows = rows_per_block(windows.len() * t, t, 0);
    to.par_chunks_mut(rows * c).enumerate().for_each(|(block, to)| {
        for (row, to) in (block * rows..).zip(to.chunks_exact_mut(c)) {
            work(row, to, windows[row / t]);
        }
    });
}

simd_fn! {
    /// The sums of a tile from its column `first` on: `z = sums + bias; out = base + gate z`, or `out += gate z` when `base` is
    /// empty. Lines are `c` apart, and `bias.len()` columns are written.
    fn finish_tile<F>(
        out: &mut [f32],
        z: &mut [f32],
        base: &[f32],
        sums: &[[f32; PANEL]],
        first: usize,
        c: usize,
        bias: &[f32],
        gate: &[f32],
    ) {
        let (width, keeps_z, mut not_kept) = (bias.len(), !z.is_empty(), [0.0; PANEL]);
        for (i, sums) in sums.iter().enumerate() {
            let z = if keeps_z { &mut z[i * c..][..width] } else { &mut not_kept[..width] };
            let out = &mut out[i * c..][..width];
            let (sums, gate) = (&sums[first..][..width], &gate[..width]);
            if base.is_empty() {
                for j in 0..width {
                    z[j] = sums[j] + bias[j];
                    out[j] = fma::<F>(gate[j], z[j], out[j]);
                }
            } else {
                let base = &base[i * c..][..width];
                for j in 0..width {
                    z[j] = sums[j] + bias[j];
                    out[j] = fma::<F>(gate[j], z[j], base[j]);
                }
            }
        }
    }
}

simd_fn! {
    /// A tile of the gradient of `a = gelu(pre)`: puts that of `pre` in its place, and `a` into rows of the halves of a panel.
    /// Lines of `pre` are `k` apart.
    fn gelu_backward<F>(pre: &mut [f32], a: [&mut [f32]; 2], tile: &Tile, width: usize, k: usize) {
        let [left, right] = a.map(|half| half.as_chunks_mut::<HALF>().0);
        for (i, (left, right)) in left.iter_mut().zip(right).enumerate() {
            let mut row = [0.0; PANEL];
            for ((pre, a), &da) in pre[i * k..][..width].iter_mut().zip(&mut row).zip(&tile.rows[i]) {
                let slope;
                (*a, slope) = gelu_and_derivative::<F>(*pre);
                *pre = da * slope;
            }
            left.copy_from_slice(&row[..HALF]);
            right.copy_from_slice(&row[HALF..]);
        }
    }
}

simd_fn! {
    /// One row: `dz = gate dout; dgate += dout z; dbias += dz`.
    fn gate_backward<F>(dz: &mut [f32], dgate: &mut [f32], dbias: &mut [f32], dout: &[f32], z: &[f32], gate: &[f32]) {
        let n = dz.len();
        let (dgate, dbias, dout, z, gate) = (&mut dgate[..n], &mut dbias[..n], &dout[..n], &z[..n], &gate[..n]);
        for i in 0..n {
            let d = dout[i] * gate[i];
            dz[i] = d;
            dbias[i] += d;
            dgate[i] = fma::<F>(dout[i], z[i], dgate[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::numbers;
    use crate::backend::cpu::simd::{gelu, gelu_derivative};

    simd_fn! {
        fn after_gelu<F>(pre: &[f32], a: &mut [f32], slope: &mut [f32]) {
            for ((&pre, a), slope) in pre.iter().zip(a).zip(slope) {
                (*a, *slope) = (gelu::<F>(pre), gelu_derivative::<F>(pre));
            }
        }
    }

    /// The input of a GELU in place of its output: the same bits, and the gradient of that input.
    #[test]
    fn what_is_before_gelu_stands_for_what_is_after() {
        let sizes = [[1, 1, 4, 3], [2, 5, 12, 20], [3, 17, 40, 33], [2, 30, 36, 64], [1, 9, 64, 97], [1, 400, 36, 20]];
        for ([b, t, c, k], elem) in
            sizes.into_iter().flat_map(|size| [DType::F32, DType::Bf16].map(|elem| (size, elem)))
        {
            let (dout, pre, weight) = (numbers(1, b * t * c), numbers(2, b * t * k), numbers(3, c * k));
            let (z, modulation) = (numbers(4, b * t * c), numbers(5, b * c));
            let (mut a, mut slope) = (vec![0.0; b * t * k], vec![0.0; b * t * k]);
            after_gelu(&pre, &mut a, &mut slope);
            let windows: Vec<_> = (0..b).map(|i| Window { start: i, width: c - 2 * i }).collect();
            let run = |input: Activation, mut da: Vec<f32>, add: bool| {
                let mut dmodulation = vec![0.5; b * c];
                let (mut dweight, mut dbias) = (vec![2.0; c * k], vec![3.0; c]);
                backward(
                    Gradients {
                        da: &mut da,
                        fresh_da: true,
                        dmodulation: &mut dmodulation,
                        dweight: &mut dweight,
                        dbias: &mut dbias,
                        add,
                    },
                    &mut vec![f32::NAN; b * c],
                    &dout,
                    input,
                    &z,
                    Inputs {
                        weight: &weight,
                        gate: Gate::new(&modulation, b, 0),
                        write: &windows,
                        dims: Dims { b, t, k, c },
                        elem,
                    },
                );
                (da, [dmodulation, dweight, dbias])
            };
            for add in [false, true] {
                let (da, others) = run(Activation::Rows(&a), vec![f32::NAN; b * t * k], add);
                let mut room = vec![f32::NAN; panels_len([b, t, k])];
                let (dpre, same) = run(Activation::GeluOfDa(&mut room), pre.clone(), add);
                let expected: Vec<_> = da.iter().zip(&slope).map(|(da, slope)| da * slope).collect();
                assert_eq!(dpre, expected, "{b} x {t} x {k}, {elem:?}");
                assert_eq!(same, others, "{b} x {t} x {k} -> {c}, {elem:?}");
                assert!(others.iter().chain([&da]).flatten().all(|x| x.is_finite()));
            }
        }
    }
}
