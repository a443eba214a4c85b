//! The CPU version: one strided product a group of samples, and the epilogue while its rows are in cache.

use crate::backend::cpu::gemm::{Mat, MatMut, Write, matmul};
use crate::backend::cpu::simd::{add_assign, fma, simd_fn};
use crate::ops::{WEIGHT_ROWS, row_groups, rows_per_block, samples_per_block};
use crate::routing::{Group, Window, groups};
use rayon::prelude::*;

#[derive(Clone, Copy)]
pub struct Dims {
    pub b: usize,
    pub t: usize,
    pub c: usize,
    pub k: usize,
}

/// Columns of `[B, stride]`.
#[derive(Clone, Copy)]
pub struct Gate<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

impl<'a> Gate<'a> {
    fn of(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.offset..][..c]
    }
}

/// See [`super::linear_residual`].
#[allow(clippy::too_many_arguments)]
pub fn forward(
    out: &mut [f32], // [B, T, C]
    z: &mut [f32],   // [B, T, C], written on the write windows
    a: &[f32],       // [B, T, K]
    weight: &[f32],  // [C, K]
    bias: &[f32],    // [C]
    gate: Gate,      // [B, C]
    base: (&[f32], &[Window]),
    bypass: Option<(&[f32], &[Window])>,
    write: &[Window], // B
    Dims { b, t, c, k }: Dims,
) {
    if b * t == 0 {
        return;
    }
    let rows = rows_per_block(b * t, t);
    out.par_chunks_mut(rows * c).zip(z.par_chunks_mut(rows * c)).enumerate().for_each(|(block, (out, z))| {
        let first = block * rows;
        let count = out.len() / c;
        for (rows, union) in row_groups(write, t, first..first + count) {
            let a = Mat::new(&a[(first + rows.start) * k..], rows.len(), k, k);
            let w = Mat::new(&weight[union.start * k..], union.width, k, k);
            let z = &mut z[rows.start * c + union.start..];
            matmul(MatMut::new(z, rows.len(), union.width, c), a, w.t(), Write::Set);
        }
        for i in 0..count {
            let row = first + i;
            let sample = row / t;
            let out = &mut out[i * c..][..c];
            match bypass {
                Some((x, windows)) => {
                    out.copy_from_slice(&x[row * c..][..c]);
                    out[windows[sample].range()].fill(0.0);
                }
                None => out.fill(0.0),
            }
            let window = base.1[sample].range();
            add_assign(&mut out[window.clone()], &base.0[row * c..][window]);
            let window = write[sample].range();
            let (z, gate) = (&mut z[i * c..][window.clone()], &gate.of(sample, c)[window.clone()]);
            bias_and_gate(&mut out[window.clone()], z, &bias[window], gate);
        }
    });
}

/// What backward writes. `da` and the weights are overwritten or added to as the flags say; `dmodulation` is added to.
pub struct Gradients<'a> {
    pub da: &'a mut [f32],          // [B, T, K]
    pub fresh_da: bool,             // overwrite da
    pub dmodulation: &'a mut [f32], // [B, stride]
    pub dweight: &'a mut [f32],     // [C, K]
    pub dbias: &'a mut [f32],       // [C]
    pub add: bool,                  // add to dweight and dbias
}

/// Memory for the time of the call.
pub struct Scratch<'a> {
    pub dz: &'a mut [f32],          // [B, T, C]
    pub dbias_parts: &'a mut [f32], // [B, C]
}

/// The gradients of `a`, the gate, weight and bias; those of base and bypass are `dout` itself.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    grads: Gradients,
    scratch: Scratch,
    dout: &[f32],   // [B, T, C]
    a: &[f32],      // [B, T, K]
    weight: &[f32], // [C, K]
    gate: Gate,
    z: &[f32],        // [B, T, C]
    write: &[Window], // B
    Dims { b, t, c, k }: Dims,
) {
    let Gradients { da, fresh_da, dmodulation, dweight, dbias, add } = grads;
    let Scratch { dz, dbias_parts } = scratch;
    let samples = samples_per_block(b, t);
    let rows = samples * t;
    let stride = gate.stride;
    dz.par_chunks_mut(rows * c)
        .zip(da.par_chunks_mut(rows * k))
        .zip(dmodulation.par_chunks_mut(samples * stride))
        .zip(dbias_parts.par_chunks_mut(samples * c))
        .enumerate()
        .for_each(|(block, (((dz, da), dmodulation), dbias))| {
            let first = block * samples;
            let windows = &write[first..(first + samples).min(b)];
            for (s, window) in windows.iter().map(|w| w.range()).enumerate() {
                let dgate = &mut dmodulation[s * stride + gate.offset..][window.clone()];
                let gate = &gate.of(first + s, c)[window.clone()];
                let dbias = &mut dbias[s * c..][..c];
                dbias.fill(0.0);
                for i in s * t..(s + 1) * t {
                    let row = (first * t + i) * c;
                    let dz = &mut dz[i * c..][..c];
                    dz[..window.start].fill(0.0);
                    dz[window.end..].fill(0.0);
                    gate_backward(
                        &mut dz[window.clone()],
                        dgate,
                        &mut dbias[window.clone()],
                        &dout[row..][window.clone()],
                        &z[row..][window.clone()],
                        gate,
                    );
                }
            }
            for (rows, union) in row_groups(write, t, first * t..(first + windows.len()) * t) {
                let dz = Mat::new(&dz[rows.start * c + union.start..], rows.len(), union.width, c);
                let w = Mat::new(&weight[union.start * k..], union.width, k, k);
                let da = MatMut::new(&mut da[rows.start * k..], rows.len(), k, k);
                matmul(da, dz, w, if fresh_da { Write::Set } else { Write::Add });
            }
        });

    let full = write.iter().all(|w| w.width == c);
    dweight.par_chunks_mut(WEIGHT_ROWS * k).enumerate().for_each(|(tile, dw)| {
        let tile = tile * WEIGHT_ROWS..tile * WEIGHT_ROWS + dw.len() / k;
        if !add && !full {
            dw.fill(0.0);
        }
        for Group { samples, union } in groups(write, t) {
            let (from, to) = (union.start.max(tile.start), union.end().min(tile.end));
            if from >= to {
                continue;
            }
            let rows = samples.len() * t;
            let at = samples.start * t;
            let dz = Mat::new(&dz[at * c + from..], rows, to - from, c);
            let a = Mat::new(&a[at * k..], rows, k, k);
            let write = if add || !full { Write::Add } else { Write::Set };
            matmul(MatMut::new(&mut dw[(from - tile.start) * k..], to - from, k, k), dz.t(), a, write);
        }
    });
    if !add {
        dbias.fill(0.0);
    }
    for part in dbias_parts.chunks_exact(c) {
        add_assign(dbias, part);
    }
}

/// `dx (+)= dout` outside the windows.
pub fn bypass_backward(dx: &mut [f32], fresh: bool, dout: &[f32], windows: &[Window], t: usize, c: usize) {
    each_row(dx, dout, windows, t, c, |dx, dout, window| {
        for outside in [0..window.start, window.end()..c] {
            pass(&mut dx[outside.clone()], &dout[outside], fresh);
        }
        if fresh {
            dx[window.range()].fill(0.0);
        }
    });
}

/// `dbase (+)= dout` inside the windows.
pub fn base_backward(dbase: &mut [f32], fresh: bool, dout: &[f32], windows: &[Window], t: usize, c: usize) {
    each_row(dbase, dout, windows, t, c, |dbase, dout, window| {
        if fresh {
            dbase[..window.start].fill(0.0);
            dbase[window.end()..].fill(0.0);
        }
        pass(&mut dbase[window.range()], &dout[window.range()], fresh);
    });
}

fn pass(to: &mut [f32], from: &[f32], fresh: bool) {
    if fresh { to.copy_from_slice(from) } else { add_assign(to, from) }
}

fn each_row(
    to: &mut [f32],
    from: &[f32],
    windows: &[Window],
    t: usize,
    c: usize,
    work: impl Fn(&mut [f32], &[f32], Window) + Sync,
) {
    let rows = rows_per_block(windows.len() * t, t);
    to.par_chunks_mut(rows * c).zip(from.par_chunks(rows * c)).enumerate().for_each(|(block, (to, from))| {
        for (i, (to, from)) in to.chunks_exact_mut(c).zip(from.chunks_exact(c)).enumerate() {
            work(to, from, windows[(block * rows + i) / t]);
        }
    });
}

simd_fn! {
    /// `z += bias; out += gate z`.
    fn bias_and_gate<F>(out: &mut [f32], z: &mut [f32], bias: &[f32], gate: &[f32]) {
        for (((out, z), &bias), &gate) in out.iter_mut().zip(z).zip(bias).zip(gate) {
            *z += bias;
            *out = fma::<F>(gate, *z, *out);
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
