//! The CPU version: normalised windows go to a block of scratch rows, one strided product a group of samples, and the
//! correction and GELU while the block is in cache.

use super::{Activation, EPS};
use crate::backend::cpu::gemm::{Mat, MatMut, Write, matmul};
use crate::backend::cpu::scratch;
use crate::backend::cpu::simd::{add_assign, fma, gelu, gelu_derivative, simd_fn, sum_by};
use crate::ops::{WEIGHT_ROWS, row_groups, rows_per_block, samples_per_block};
use crate::routing::{Group, Window, groups};
use rayon::prelude::*;
use std::ops::Range;

#[derive(Clone, Copy)]
pub struct Dims {
    pub b: usize,
    pub t: usize,
    pub c: usize,
    pub n: usize,
}

/// Shift and scale: columns of `[B, stride]`.
#[derive(Clone, Copy)]
pub struct Modulation<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub shift: usize,
    pub scale: usize,
}

impl<'a> Modulation<'a> {
    fn shift(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.shift..][..c]
    }

    fn scale(&self, sample: usize, c: usize) -> &'a [f32] {
        &self.data[sample * self.stride + self.scale..][..c]
    }
}

/// The channels that are inactive in some of the samples, as at most two ranges.
fn inactive_ranges(windows: &[Window], c: usize) -> impl Iterator<Item = Range<usize>> {
    let left = windows.iter().map(|w| w.start).max().unwrap_or(0);
    let right = windows.iter().map(|w| w.end()).min().unwrap_or(c);
    let ranges = if right <= left { [0..c, c..c] } else { [0..left, right..c] };
    ranges.into_iter().filter(|range| !range.is_empty())
}

/// `[2 samples, C]`: `1 + scale` and `shift` of each sample on its inactive channels, zero on the active ones.
fn inactive_modulation(out: &mut [f32], windows: &[Window], first: usize, modulation: Modulation, c: usize) {
    for ((i, rows), &window) in out.chunks_exact_mut(2 * c).enumerate().zip(windows) {
        let (one_plus_scale, shift) = rows.split_at_mut(c);
        for (y, s) in one_plus_scale.iter_mut().zip(modulation.scale(first + i, c)) {
            *y = 1.0 + s;
        }
        shift.copy_from_slice(modulation.shift(first + i, c));
        one_plus_scale[window.range()].fill(0.0);
        shift[window.range()].fill(0.0);
    }
}

/// See [`super::ln_linear`]. `pre` and `correction` are empty when they are not needed.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    y: &mut [f32],          // [B, T, N]
    pre: &mut [f32],        // [B, T, N] or empty
    mean: &mut [f32],       // [B, T]
    rstd: &mut [f32],       // [B, T]
    correction: &mut [f32], // [B, 2, N] or empty
    x: &[f32],              // [B, T, C]
    read: &[Window],        // B
    modulation: Modulation,
    weight: &[f32], // [N, C]
    bias: &[f32],   // [N]
    activation: Activation,
    Dims { b, t, c, n }: Dims,
) {
    if b * t == 0 {
        return;
    }
    if !correction.is_empty() {
        let samples = samples_per_block(b, t);
        correction.par_chunks_mut(samples * 2 * n).enumerate().for_each(|(block, uv)| {
            let first = block * samples;
            let windows = &read[first..(first + samples).min(b)];
            let m = 2 * windows.len();
            scratch::with(m * c, |s| {
                inactive_modulation(s, windows, first, modulation, c);
                for (i, uv) in uv.chunks_exact_mut(n).enumerate() {
                    if i % 2 == 0 { uv.fill(0.0) } else { uv.copy_from_slice(bias) }
                }
                for range in inactive_ranges(windows, c) {
                    let s = Mat::new(&s[range.start..], m, range.len(), c);
                    let w = Mat::new(&weight[range.start..], n, range.len(), c);
                    matmul(MatMut::new(uv, m, n, n), s, w.t(), Write::Add);
                }
            });
        });
    }
    let correction = &*correction;
    let rows = rows_per_block(b * t, t);
    let work = |block: usize, y: &mut [f32], pre: &mut [f32], mean: &mut [f32], rstd: &mut [f32]| {
        let first = block * rows;
        let count = mean.len();
        scratch::with(count * c, |h| {
            for i in 0..count {
                let sample = (first + i) / t;
                let (m, r) = normalise(
                    &mut h[i * c..][..c],
                    &x[(first + i) * c..][..c],
                    read[sample],
                    modulation.shift(sample, c),
                    modulation.scale(sample, c),
                );
                (mean[i], rstd[i]) = (m, r);
            }
            let linear = if pre.is_empty() { &mut *y } else { &mut *pre };
            for (rows, union) in row_groups(read, t, first..first + count) {
                let h = Mat::new(&h[rows.start * c + union.start..], rows.len(), union.width, c);
                let w = Mat::new(&weight[union.start..], n, union.width, c);
                matmul(MatMut::new(&mut linear[rows.start * n..], rows.len(), n, n), h, w.t(), Write::Set);
            }
            for i in 0..count {
                let line = &mut linear[i * n..][..n];
                if correction.is_empty() {
                    add_assign(line, bias);
                } else {
                    let (u, v) = correction[(first + i) / t * 2 * n..][..2 * n].split_at(n);
                    add_correction(line, -mean[i] * rstd[i], u, v);
                }
            }
        });
        if activation == Activation::Gelu {
            if pre.is_empty() { gelu_in_place(y) } else { gelu_to(y, pre) }
        }
    };
    let stats = mean.par_chunks_mut(rows).zip(rstd.par_chunks_mut(rows));
    let blocks = y.par_chunks_mut(rows * n).zip(stats).enumerate();
    if pre.is_empty() {
        blocks.for_each(|(block, (y, (mean, rstd)))| work(block, y, &mut [], mean, rstd));
    } else {
        blocks
            .zip(pre.par_chunks_mut(rows * n))
            .for_each(|((block, (y, (mean, rstd))), pre)| work(block, y, pre, mean, rstd));
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

/// Memory for the time of the call.
pub struct Scratch<'a> {
    pub h: &'a mut [f32],        // [B, T, C]: the modulated rows again, zero outside the windows
    pub pq: &'a mut [f32],       // [B, 2, N]: P and Q
    pub inactive: &'a mut [f32], // [B, 2, C]: 1 + scale and shift, zero on active channels
}

/// See [`super::ln_linear`]. Multiplies `dy` by the derivative of GELU in place.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    grads: Gradients,
    dy: &mut [f32], // [B, T, N]
    scratch: Scratch,
    x: &[f32],       // [B, T, C]
    read: &[Window], // B
    modulation: Modulation,
    weight: &[f32],             // [N, C]
    mean: &[f32],               // [B, T]
    rstd: &[f32],               // [B, T]
    correction: Option<&[f32]>, // [B, 2, N]: u, v + b
    pre: Option<&[f32]>,        // [B, T, N]
    Dims { b, t, c, n }: Dims,
) {
    let Gradients { dx, fresh_dx, dmodulation, dweight, dbias, add } = grads;
    let Scratch { h, pq, inactive } = scratch;
    let samples = samples_per_block(b, t);
    let rows = samples * t;
    let stride = modulation.stride;
    dy.par_chunks_mut(rows * n)
        .zip(dx.par_chunks_mut(rows * c))
        .zip(h.par_chunks_mut(rows * c))
        .zip(dmodulation.par_chunks_mut(samples * stride))
        .zip(pq.par_chunks_mut(samples * 2 * n))
        .enumerate()
        .for_each(|(block, ((((g, dx), h), dmodulation), pq))| {
            let first = block * samples;
            let windows = &read[first..(first + samples).min(b)];
            let count = windows.len() * t;
            if let Some(pre) = pre {
                gelu_backward(g, &pre[first * t * n..][..count * n]);
            }
            scratch::with(count * (c + 1), |buffer| {
                let (dh, dr) = buffer.split_at_mut(count * c);
                for (s, pq) in pq.chunks_exact_mut(2 * n).enumerate() {
                    let u = correction.map_or(&[][..], |uv| &uv[(first + s) * 2 * n..][..n]);
                    let at = (first + s) * t;
                    let (mean, rstd) = (&mean[at..at + t], &rstd[at..at + t]);
                    sums_over_tokens(pq, &mut dr[s * t..][..t], &g[s * t * n..][..t * n], mean, rstd, u);
                }
                for (rows, union) in row_groups(read, t, first * t..first * t + count) {
                    let g = Mat::new(&g[rows.start * n..], rows.len(), n, n);
                    let w = Mat::new(&weight[union.start..], n, union.width, c);
                    let dh = &mut dh[rows.start * c + union.start..];
                    matmul(MatMut::new(dh, rows.len(), union.width, c), g, w, Write::Set);
                }
                for (s, &window) in windows.iter().enumerate() {
                    let (dshift, dscale) =
                        columns(&mut dmodulation[s * stride..][..stride], modulation.shift, modulation.scale, c);
                    for i in s * t..(s + 1) * t {
                        normalise_backward(
                            &mut dx[i * c..][..c],
                            fresh_dx,
                            &mut h[i * c..][..c],
                            dshift,
                            dscale,
                            &dh[i * c..][..c],
                            dr[i],
                            &x[(first * t + i) * c..][..c],
                            modulation.shift(first + s, c),
                            modulation.scale(first + s, c),
                            window,
                            mean[first * t + i],
                            rstd[first * t + i],
                        );
                    }
                }
            });
            if correction.is_some() {
                let m = 2 * windows.len();
                scratch::with(m * c, |d| {
                    for range in inactive_ranges(windows, c) {
                        let d = MatMut::new(&mut d[range.start..], m, range.len(), c);
                        matmul(
                            d,
                            Mat::new(pq, m, n, n),
                            Mat::new(&weight[range.start..], n, range.len(), c),
                            Write::Set,
                        );
                    }
                    for (s, &window) in windows.iter().enumerate() {
                        let (dshift, dscale) =
                            columns(&mut dmodulation[s * stride..][..stride], modulation.shift, modulation.scale, c);
                        let (p, q) = d[s * 2 * c..][..2 * c].split_at(c);
                        for range in [0..window.start, window.end()..c] {
                            add_assign(&mut dscale[range.clone()], &p[range.clone()]);
                            add_assign(&mut dshift[range.clone()], &q[range]);
                        }
                    }
                });
            }
        });

    if correction.is_some() {
        inactive_modulation(inactive, read, 0, modulation, c);
    }
    dweight.par_chunks_mut(WEIGHT_ROWS * c).enumerate().for_each(|(tile, dw)| {
        let o = tile * WEIGHT_ROWS;
        let m = dw.len() / c;
        if !add && correction.is_some() {
            dw.fill(0.0);
        }
        for Group { samples, union } in groups(read, t) {
            let rows = samples.len() * t;
            let at = samples.start * t;
            let g = Mat::new(&dy[at * n + o..], rows, m, n);
            let h = Mat::new(&h[at * c + union.start..], rows, union.width, c);
            let write = if add || correction.is_some() { Write::Add } else { Write::Set };
            matmul(MatMut::new(&mut dw[union.start..], m, union.width, c), g.t(), h, write);
        }
        if correction.is_some() {
            for range in inactive_ranges(read, c) {
                let pq = Mat::new(&pq[o..], 2 * b, m, n);
                let s = Mat::new(&inactive[range.start..], 2 * b, range.len(), c);
                matmul(MatMut::new(&mut dw[range.start..], m, range.len(), c), pq.t(), s, Write::Add);
            }
        }
    });
    if !add {
        dbias.fill(0.0);
    }
    for pq in pq.chunks_exact(2 * n) {
        add_assign(dbias, &pq[n..]);
    }
}

/// Two columns of C numbers of one row, which must not overlap.
fn columns(row: &mut [f32], a: usize, b: usize, c: usize) -> (&mut [f32], &mut [f32]) {
    let [a, b] = row.get_disjoint_mut([a..a + c, b..b + c]).expect("shift and scale are different columns");
    (a, b)
}

simd_fn! {
    /// One row: mean and rstd of the masked row; `h` = modulated window, zero outside it.
    fn normalise<F>(h: &mut [f32], x: &[f32], window: Window, shift: &[f32], scale: &[f32]) -> (f32, f32) {
        let count = x.len() as f32;
        let (a, w) = (window.range(), window.width);
        h[..a.start].fill(0.0);
        h[a.end..].fill(0.0);
        let (h, x, shift, scale) = (&mut h[a.clone()], &x[a.clone()], &shift[a.clone()], &scale[a]);
        let mean = sum_by(w, |i| x[i]) / count;
        let squares = sum_by(w, |i| (x[i] - mean) * (x[i] - mean));
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
    /// `y += r u + v`.
    fn add_correction<F>(y: &mut [f32], r: f32, u: &[f32], v: &[f32]) {
        for ((y, &u), &v) in y.iter_mut().zip(u).zip(v) {
            *y += fma::<F>(r, u, v);
        }
    }
}

simd_fn! {
    fn gelu_in_place<F>(y: &mut [f32]) {
        for y in y {
            *y = gelu::<F>(*y);
        }
    }
}

simd_fn! {
    fn gelu_to<F>(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = gelu::<F>(x);
        }
    }
}

simd_fn! {
    fn gelu_backward<F>(g: &mut [f32], pre: &[f32]) {
        for (g, &x) in g.iter_mut().zip(pre) {
            *g *= gelu_derivative::<F>(x);
        }
    }
}

simd_fn! {
    /// One sample: `P = sum_t r_t g_t` and `Q = sum_t g_t` to `pq` `[2, N]`, and `dr_t = g_t . u`. With an empty `u`
    /// (full windows), only Q; `P` and `dr` are zero.
    fn sums_over_tokens<F>(pq: &mut [f32], dr: &mut [f32], g: &[f32], mean: &[f32], rstd: &[f32], u: &[f32]) {
        let n = pq.len() / 2;
        let (p, q) = pq.split_at_mut(n);
        p.fill(0.0);
        q.fill(0.0);
        dr.fill(0.0);
        for (t, g) in g.chunks_exact(n).enumerate() {
            if u.is_empty() {
                for (q, &g) in q.iter_mut().zip(g) {
                    *q += g;
                }
                continue;
            }
            let r = -mean[t] * rstd[t];
            for ((q, p), &g) in q.iter_mut().zip(&mut *p).zip(g) {
                *q += g;
                *p = fma::<F>(r, g, *p);
            }
            dr[t] = sum_by(n, |i| g[i] * u[i]);
        }
    }
}

simd_fn! {
    /// One row of the LayerNorm backward; also `h` again, and the row's part of `dshift` and `dscale` on the window.
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
        mean: f32,
        rstd: f32,
    ) {
        let inverse = 1.0 / x.len() as f32;
        let (a, w) = (window.range(), window.width);
        h[..a.start].fill(0.0);
        h[a.end..].fill(0.0);
        if fresh {
            dx[..a.start].fill(0.0);
            dx[a.end..].fill(0.0);
        }
        let (dx, h, dh, x) = (&mut dx[a.clone()], &mut h[a.clone()], &dh[a.clone()], &x[a.clone()]);
        let (dshift, dscale) = (&mut dshift[a.clone()], &mut dscale[a.clone()]);
        let (shift, scale) = (&shift[a.clone()], &scale[a]);
        for i in 0..w {
            let z = (x[i] - mean) * rstd;
            h[i] = fma::<F>(z, 1.0 + scale[i], shift[i]);
            dshift[i] += dh[i];
            dscale[i] = fma::<F>(dh[i], z, dscale[i]);
        }
        let sum = sum_by(w, |i| dh[i] * (1.0 + scale[i]));
        let product = sum_by(w, |i| dh[i] * (1.0 + scale[i]) * ((x[i] - mean) * rstd));
        let s1 = (sum + dr) * inverse;
        let s2 = (product - mean * rstd * dr) * inverse;
        for i in 0..w {
            let z = (x[i] - mean) * rstd;
            let d = rstd * (dh[i] * (1.0 + scale[i]) - s1 - z * s2);
            dx[i] = if fresh { d } else { dx[i] + d };
        }
    }
}
