//! The CPU version: blocks of query rows against all keys of a head, so that a block of S stays in cache.

use crate::backend::cpu::gemm::{Mat, MatMut, Write, matmul};
use crate::backend::cpu::scratch;
use crate::backend::cpu::simd::{exp, fma, simd_fn, sum_by};
use rayon::prelude::*;

/// Query rows of one block.
const ROWS: usize = 128;

#[derive(Clone, Copy)]
pub struct Dims {
    pub b: usize,
    pub t: usize,
    pub c: usize,
    pub heads: usize,
}

/// See [`super::attention`].
pub fn forward(
    out: &mut [f32], // [B, T, C]
    lse: &mut [f32], // [B, T, NH]
    qkv: &[f32],     // [B, T, 3C]
    Dims { b, t, c, heads }: Dims,
) {
    if b * t == 0 {
        return;
    }
    let size = c / heads;
    let scale = 1.0 / (size as f32).sqrt();
    // Blocks inside a sample, all of about one size.
    let rows = t.div_ceil(t.div_ceil(ROWS));
    let blocks = t.div_ceil(rows);
    let tasks = out.par_chunks_mut(t * c).zip(lse.par_chunks_mut(t * heads)).enumerate();
    tasks.for_each(|(sample, (out, lse))| {
        let qkv = &qkv[sample * t * 3 * c..][..t * 3 * c];
        let inner = out.par_chunks_mut(rows * c).zip(lse.par_chunks_mut(rows * heads)).enumerate();
        let work = |(block, (out, lse)): (usize, (&mut [f32], &mut [f32]))| {
            let count = out.len() / c;
            scratch::with(count * t, |s| {
                for head in 0..heads {
                    let q = Mat::new(&qkv[block * rows * 3 * c + head * size..], count, size, 3 * c);
                    let k = Mat::new(&qkv[c + head * size..], t, size, 3 * c);
                    let v = Mat::new(&qkv[2 * c + head * size..], t, size, 3 * c);
                    matmul(MatMut::new(s, count, t, t), q, k.t(), Write::Set);
                    for (i, row) in s.chunks_exact_mut(t).enumerate() {
                        lse[i * heads + head] = softmax(row, scale);
                    }
                    matmul(
                        MatMut::new(&mut out[head * size..], count, size, c),
                        Mat::new(s, count, t, t),
                        v,
                        Write::Set,
                    );
                }
            });
        };
        if blocks == 1 {
            inner.for_each(work);
        } else {
            inner.with_max_len(1).for_each(work);
        }
    });
}

/// See [`super::attention`]. Overwrites `dqkv`.
pub fn backward(
    dqkv: &mut [f32], // [B, T, 3C]
    dout: &[f32],     // [B, T, C]
    qkv: &[f32],      // [B, T, 3C]
    out: &[f32],      // [B, T, C]
    lse: &[f32],      // [B, T, NH]
    Dims { b, t, c, heads }: Dims,
) {
    if b * t == 0 {
        return;
    }
    let size = c / heads;
    let scale = 1.0 / (size as f32).sqrt();
    let rows = t.div_ceil(t.div_ceil(ROWS));
    dqkv.par_chunks_mut(t * 3 * c).enumerate().for_each(|(sample, dqkv)| {
        let qkv = &qkv[sample * t * 3 * c..][..t * 3 * c];
        let (dout, out) = (&dout[sample * t * c..][..t * c], &out[sample * t * c..][..t * c]);
        let lse = &lse[sample * t * heads..][..t * heads];
        scratch::with(2 * rows * t, |buffer| {
            for head in 0..heads {
                let k = Mat::new(&qkv[c + head * size..], t, size, 3 * c);
                let v = Mat::new(&qkv[2 * c + head * size..], t, size, 3 * c);
                for first in (0..t).step_by(rows) {
                    let count = rows.min(t - first);
                    let (p, ds) = buffer.split_at_mut(rows * t);
                    let (p, ds) = (&mut p[..count * t], &mut ds[..count * t]);
                    let q = Mat::new(&qkv[first * 3 * c + head * size..], count, size, 3 * c);
                    let dy = Mat::new(&dout[first * c + head * size..], count, size, c);
                    matmul(MatMut::new(p, count, t, t), q, k.t(), Write::Set);
                    matmul(MatMut::new(ds, count, t, t), dy, v.t(), Write::Set);
                    for (i, (p, ds)) in p.chunks_exact_mut(t).zip(ds.chunks_exact_mut(t)).enumerate() {
                        let at = (first + i) * c + head * size;
                        softmax_backward(
                            p,
                            ds,
                            &dout[at..][..size],
                            &out[at..][..size],
                            lse[(first + i) * heads + head],
                            scale,
                        );
                    }
                    let (p, ds) = (Mat::new(p, count, t, t), Mat::new(ds, count, t, t));
                    let write = if first == 0 { Write::Set } else { Write::Add };
                    matmul(
                        MatMut::new(&mut dqkv[first * 3 * c + head * size..], count, size, 3 * c),
                        ds,
                        k,
                        Write::Set,
                    );
                    matmul(MatMut::new(&mut dqkv[c + head * size..], t, size, 3 * c), ds.t(), q, write);
                    matmul(MatMut::new(&mut dqkv[2 * c + head * size..], t, size, 3 * c), p.t(), dy, write);
                }
            }
        });
    });
}

simd_fn! {
    /// Softmax of `scale * row` in place; returns its log-sum-exp.
    fn softmax<F>(row: &mut [f32], scale: f32) -> f32 {
        let n = row.len();
        let mut lanes = [f32::NEG_INFINITY; 16];
        let mut chunks = row.chunks_exact(16);
        for chunk in &mut chunks {
            for l in 0..16 {
                lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
            }
        }
        let max = lanes.iter().chain(chunks.remainder()).copied().fold(f32::NEG_INFINITY, f32::max);
        for x in row.iter_mut() {
            *x = exp::<F>((*x - max) * scale);
        }
        let sum = sum_by(n, |i| row[i]);
        let inverse = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        max * scale + sum.ln()
    }
}

simd_fn! {
    /// One row: `p` holds S and becomes the probabilities, `ds` holds dP and becomes the gradient of S.
    fn softmax_backward<F>(p: &mut [f32], ds: &mut [f32], dout: &[f32], out: &[f32], lse: f32, scale: f32) {
        let size = out.len();
        let mean = sum_by(size, |i| dout[i] * out[i]);
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<F>(fma::<F>(*p, scale, -lse));
            *ds = *p * (*ds - mean) * scale;
        }
    }
}
