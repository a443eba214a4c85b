//! Attention of 16 tokens with AVX-512: a row of scores is a vector, all of a head's scores are half the registers.
//!
//! The general version spends two thirds of its time around such small products.

use super::Dims;
use crate::backend::cpu::pack::interleave;
use crate::backend::cpu::scratch;
use crate::backend::cpu::simd::{Level, exp, fetch_rows, level};
use rayon::prelude::*;
use std::arch::x86_64::{
    __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

/// Tokens, and numbers of a vector.
const T: usize = 16;
/// Numbers of the inner dimension that are multiplied at once.
const INNER: usize = 4;

/// Numbers of all pairs of tokens.
type Square = [[f32; T]; T];

/// Whether this is for so many tokens, heads of that size, and this processor.
pub fn takes(tokens: usize, size: usize) -> bool {
    tokens == T && size.is_multiple_of(T) && level() >= Level::Avx512
}

/// As [`super::cpu::forward`].
pub fn forward(out: &mut [f32], statistics: &mut [f32], qkv: &[f32], Dims { c, heads, .. }: Dims) {
    let size = c / heads;
    out.par_chunks_mut(T * c).zip(statistics.par_chunks_mut(T * heads * 2)).enumerate().for_each(
        |(sample, (out, statistics))| {
            scratch::with(size * T, |transposed| {
                for head in 0..heads {
                    let [q, k, v] = [0, 1, 2].map(|part| rows_of(qkv, 3 * c, sample, part * c, [head, heads], size));
                    interleave(transposed, T, q, T, size, 3 * c);
                    let out = &mut out[head * size..][..(T - 1) * c + size];
                    // SAFETY: `takes` found AVX-512 and whole vectors; the rows are as long as was cut.
                    let [max, inverse] = unsafe { head_forward(out, transposed, [k, v], size, c) };
                    for (statistics, (max, inverse)) in
                        statistics.chunks_exact_mut(heads * 2).zip(max.into_iter().zip(inverse))
                    {
                        statistics[2 * head..][..2].copy_from_slice(&[max, inverse]);
                    }
                }
            });
        },
    );
}

/// As [`super::cpu::backward`].
pub fn backward(dqkv: &mut [f32], dout: &[f32], qkv: &[f32], statistics: &[f32], Dims { c, heads, .. }: Dims) {
    let size = c / heads;
    dqkv.par_chunks_mut(T * 3 * c).enumerate().for_each(|(sample, dqkv)| {
        scratch::with(2 * size * T, |transposed| {
            let (q_transposed, dout_transposed) = transposed.split_at_mut(size * T);
            for head in 0..heads {
                let [q, k, v] = [0, 1, 2].map(|part| rows_of(qkv, 3 * c, sample, part * c, [head, heads], size));
                let dout = rows_of(dout, c, sample, 0, [head, heads], size);
                let dqkv = &mut dqkv[head * size..][..(T - 1) * 3 * c + 2 * c + size];
                for part in [0, 1, 2] {
                    fetch_rows(&dqkv[part * c..], T, size, 3 * c);
                }
                interleave(q_transposed, T, q, T, size, 3 * c);
                interleave(dout_transposed, T, dout, T, size, c);
                let of_row =
                    |which: usize| std::array::from_fn(|i| statistics[2 * ((sample * T + i) * heads + head) + which]);
                let (max, inverse) = (of_row(0), of_row(1));
                // SAFETY: `takes` found AVX-512 and whole vectors; the rows are as long as was cut.
                unsafe {
                    head_backward(dqkv, dout, [q, k, v], [q_transposed, dout_transposed], [&max, &inverse], size, c)
                };
            }
        });
    });
}

/// The columns of a head of a sample, from `first + head * size` on, in rows `stride` apart: as long as they all need. Those of the
/// head that comes next are fetched meanwhile.
fn rows_of(all: &[f32], stride: usize, sample: usize, first: usize, [head, heads]: [usize; 2], size: usize) -> &[f32] {
    let rows = &all[sample * T * stride + first + head * size..];
    let next = if head + 1 < heads { size } else { T * stride - head * size };
    fetch_rows(rows.get(next..).unwrap_or(&[]), T, size, stride);
    &rows[..(T - 1) * stride + size]
}

/// `$body` for every row, with its number as a constant: the compiler leaves a loop a loop, and its vectors in memory.
macro_rules! for_each_row {
    ($i:ident => $body:block) => {
        for_each_row!($i => $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($i:ident => $body:block, $($n:literal)*) => {
        $({
            const $i: usize = $n;
            $body
        })*
    };
}

/// The sums over `len` inner elements, a multiple of [`INNER`], of what 16 rows have there times the vector there: (row i, inner k) is
/// at `a + i * row + k`, or if it is `TRANSPOSED` at `a + i + k * row`, and vector k at `b + k * stride`.
///
/// # Safety
/// The processor has AVX-512F, and all of that lies inside of the operands.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn product<const TRANSPOSED: bool>(
    a: *const f32,
    row: usize,
    b: *const f32,
    stride: usize,
    len: usize,
) -> [__m512; T] {
    let (row, inner) = if TRANSPOSED { (1, row) } else { (row, 1) };
    let mut sums = [_mm512_setzero_ps(); T];
    for k in (0..len).step_by(INNER) {
        // SAFETY: the contract is the same.
        unsafe {
            let vectors: [__m512; INNER] = std::array::from_fn(|i| _mm512_loadu_ps(b.add((k + i) * stride)));
            let mut a = a.add(k * inner);
            for_each_row!(I => {
                for (l, &vector) in vectors.iter().enumerate() {
                    sums[I] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(l * inner)), vector, sums[I]);
                }
                a = a.wrapping_add(row);
            });
        }
    }
    sums
}

/// # Safety
/// The processor has AVX-512F, and rows of a vector are at `to`, `stride` apart.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(to: *mut f32, stride: usize, rows: [__m512; T]) {
    for (i, row) in rows.into_iter().enumerate() {
        // SAFETY: the contract is the same.
        unsafe { _mm512_storeu_ps(to.add(i * stride), row) };
    }
}

/// A head's rows of the output, and of each query the largest `q k^T` and 1 / the sum of exponentials.
///
/// # Safety
/// The processor has what [`Level::Avx512`] stands for; keys and values are rows of `size` numbers, a multiple of 16, `3 * c` apart,
/// the output's are `c` apart, and queries are columns of 16.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn head_forward(out: &mut [f32], q: &[f32], [k, v]: [&[f32]; 2], size: usize, c: usize) -> [[f32; T]; 2] {
    let scale = 1.0 / (size as f32).sqrt();
    // `[keys, queries]`: softmax runs down columns, a vector of queries at a time.
    let mut p: Square = [[0.0; T]; T];
    // SAFETY: the contract is the same.
    unsafe { store(p.as_mut_ptr().cast(), T, product::<false>(k.as_ptr(), 3 * c, q.as_ptr(), T, size)) };
    let mut max = p[0];
    for row in &p[1..] {
        for i in 0..T {
            max[i] = if row[i] > max[i] { row[i] } else { max[i] };
        }
    }
    let mut sum = [0.0f32; T];
    for row in &mut p {
        for i in 0..T {
            row[i] = exp::<true>((row[i] - max[i]) * scale);
            sum[i] += row[i];
        }
    }
    let inverse = sum.map(|sum| 1.0 / sum);
    for first in (0..size).step_by(T) {
        // SAFETY: the contract is the same.
        unsafe {
            let mut rows = product::<true>(p.as_ptr().cast(), T, v.as_ptr().add(first), 3 * c, T);
            for (row, inverse) in rows.iter_mut().zip(inverse) {
                *row = _mm512_mul_ps(*row, _mm512_set1_ps(inverse));
            }
            store(out.as_mut_ptr().add(first), c, rows);
        }
    }
    [max, inverse]
}

/// A head's columns of `dqkv`.
///
/// # Safety
/// The processor has what [`Level::Avx512`] stands for; queries, keys and values, and what is written, are rows of `size` numbers, a
/// multiple of 16, `3 * c` apart, those of `dout` are `c` apart, and the transposed ones are columns of 16.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn head_backward(
    dqkv: &mut [f32],
    dout: &[f32],
    [q, k, v]: [&[f32]; 3],
    [q_transposed, dout_transposed]: [&[f32]; 2],
    [max, inverse]: [&[f32; T]; 2],
    size: usize,
    c: usize,
) {
    let scale = 1.0 / (size as f32).sqrt();
    // `[keys, queries]`, as in the forward pass.
    let (mut p, mut ds): (Square, Square) = ([[0.0; T]; T], [[0.0; T]; T]);
    // SAFETY: the contract is the same.
    unsafe {
        store(p.as_mut_ptr().cast(), T, product::<false>(k.as_ptr(), 3 * c, q_transposed.as_ptr(), T, size));
        store(ds.as_mut_ptr().cast(), T, product::<false>(v.as_ptr(), 3 * c, dout_transposed.as_ptr(), T, size));
    }
    let mut delta = [0.0f32; T];
    for (p, ds) in p.iter_mut().zip(&ds) {
        for i in 0..T {
            p[i] = exp::<true>((p[i] - max[i]) * scale) * inverse[i];
            // P . dP is dout . out, so out need not be read.
            delta[i] = p[i].mul_add(ds[i], delta[i]);
        }
    }
    for (p, ds) in p.iter().zip(&mut ds) {
        for i in 0..T {
            ds[i] = p[i] * (ds[i] - delta[i]) * scale;
        }
    }
    let (p, of_ds) = (p.as_ptr().cast(), ds.as_ptr().cast());
    for first in (0..size).step_by(T) {
        // SAFETY: the contract is the same.
        unsafe {
            let [q, k, dout] = [q, k, dout].map(|rows| rows.as_ptr().add(first));
            let to = dqkv.as_mut_ptr().add(first);
            store(to.add(2 * c), 3 * c, product::<false>(p, T, dout, c, T));
            store(to.add(c), 3 * c, product::<false>(of_ds, T, q, 3 * c, T));
            store(to, 3 * c, product::<true>(of_ds, T, k, 3 * c, T));
        }
    }
}
