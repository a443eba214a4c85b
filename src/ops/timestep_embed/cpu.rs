//! The CPU version, and the plain linear layer and SiLU that the modulation shares.

use super::FREQUENCIES;
use crate::backend::cpu::gemm::{Mat, MatMut, Write, matmul_parallel};
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::scratch;
use crate::backend::cpu::simd::{add_assign, column_sums, fma, sigmoid, simd_fn, sum_lanes};
use rayon::prelude::*;

/// Cosines, then sines, `[B, 256]`: computed in f64, so that only the last rounding is left of the error that
/// `t * frequency` in f32 makes.
pub fn waves(out: &mut [f32], t: &[u32]) {
    const HALF: usize = FREQUENCIES / 2;
    for (row, &t) in out.chunks_exact_mut(FREQUENCIES).zip(t) {
        for i in 0..HALF {
            let angle = f64::from(t) * (-(10_000f64.ln()) * i as f64 / HALF as f64).exp();
            row[i] = angle.cos() as f32;
            row[HALF + i] = angle.sin() as f32;
        }
    }
}

/// Up to so many rows the time goes into reading the weight: it is read once, in order, and not packed.
const FEW_ROWS: usize = 16;
/// Numbers of a vector of partial sums.
const LANES: usize = 16;
/// Rows, or outputs, that are computed together.
const GROUP: usize = 4;

/// `y = x W^T + b`.
pub fn linear(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32]) {
    let n = bias.len();
    let (rows, k) = (y.len() / n, weight.len() / n);
    let _span = span("linear", Pass::Forward, [k, n], 2 * rows * k * n, rows * (k + n) + k * n);
    if (1..=FEW_ROWS).contains(&rows) {
        const OUTPUTS: usize = 64;
        scratch::with(n * rows, |transposed| {
            transposed
                .par_chunks_mut(OUTPUTS * rows)
                .zip(weight.par_chunks(OUTPUTS * k))
                .for_each(|(y, weight)| dot_products(y, x, weight, rows, k));
            for (b, y) in y.chunks_exact_mut(n).enumerate() {
                for (i, (y, bias)) in y.iter_mut().zip(bias).enumerate() {
                    *y = transposed[i * rows + b] + bias;
                }
            }
        });
        return;
    }
    for y in y.chunks_exact_mut(n) {
        y.copy_from_slice(bias);
    }
    let (x, w) = (Mat::new(x, rows, k, k), Mat::new(weight, n, k, k));
    matmul_parallel(MatMut::new(y, rows, n, n), x, w.t(), Write::Add);
}

/// `dx` (unless it is empty), and weight and bias, which `add` adds to.
pub fn linear_backward(
    dx: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    add: bool,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
) {
    let n = dbias.len();
    let (rows, k) = (dy.len() / n, weight.len() / n);
    let products = if dx.is_empty() { 1 } else { 2 };
    let flops = 2 * products * rows * k * n;
    let _span = span("linear", Pass::Backward, [k, n], flops, rows * (products * k + n) + products * k * n);
    if (1..=FEW_ROWS).contains(&rows) {
        // As many parts on every machine: their sums are added in order.
        const PARTS: usize = 32;
        let outputs = n.div_ceil(PARTS).next_multiple_of(GROUP);
        scratch::with(PARTS * dx.len(), |parts| {
            parts.fill(0.0);
            let chunks = dweight.par_chunks_mut(outputs * k).zip(weight.par_chunks(outputs * k)).enumerate();
            if dx.is_empty() {
                chunks.for_each(|(i, (dw, w))| outer_products(dw, &mut [], add, &dy[i * outputs..], x, w, n, k));
            } else {
                chunks
                    .zip(parts.par_chunks_mut(dx.len()))
                    .for_each(|((i, (dw, w)), part)| outer_products(dw, part, add, &dy[i * outputs..], x, w, n, k));
                dx.fill(0.0);
                parts.chunks_exact(dx.len()).for_each(|part| add_assign(dx, part));
            }
        });
        column_sums(dbias, dy, add);
        return;
    }
    let dy_view = Mat::new(dy, rows, n, n);
    if !dx.is_empty() {
        matmul_parallel(MatMut::new(dx, rows, k, k), dy_view, Mat::new(weight, n, k, k), Write::Set);
    }
    let write = if add { Write::Add } else { Write::Set };
    matmul_parallel(MatMut::new(dweight, n, k, k), dy_view.t(), Mat::new(x, rows, k, k), write);
    column_sums(dbias, dy, add);
}

simd_fn! {
    /// `y[i, b] = w[i] . x[b]`: `y` `[outputs, rows]`, `x` `[rows, k]`, `w` `[outputs, k]`.
    fn dot_products<F>(y: &mut [f32], x: &[f32], w: &[f32], rows: usize, k: usize) {
        let whole = k / LANES * LANES;
        for (y, w) in y.chunks_exact_mut(rows).zip(w.chunks_exact(k)) {
            for (y, x) in y.chunks_mut(GROUP).zip(x.chunks(GROUP * k)) {
                // Rows beyond the last are the last one again.
                let row: [&[f32]; GROUP] = std::array::from_fn(|r| &x[r.min(y.len() - 1) * k..][..k]);
                let mut sums = [[0.0f32; LANES]; GROUP];
                for i in (0..whole).step_by(LANES) {
                    let w: &[f32; LANES] = w[i..i + LANES].try_into().expect("a slice of LANES");
                    for r in 0..GROUP {
                        let x: &[f32; LANES] = row[r][i..i + LANES].try_into().expect("a slice of LANES");
                        for l in 0..LANES {
                            sums[r][l] = fma::<F>(w[l], x[l], sums[r][l]);
                        }
                    }
                }
                for (r, y) in y.iter_mut().enumerate() {
                    let rest: f32 = (whole..k).map(|i| w[i] * row[r][i]).sum();
                    *y = sum_lanes(sums[r]) + rest;
                }
            }
        }
    }
}

/// `y += sum over i of factors[i] x[i]`, for rows of x `[_, y.len()]`.
#[inline(always)]
fn add_scaled<const FMA: bool>(y: &mut [f32], factors: impl ExactSizeIterator<Item = f32>, x: &[f32]) {
    let k = y.len();
    if factors.len() < GROUP {
        for (factor, x) in factors.zip(x.chunks_exact(k)) {
            for j in 0..k {
                y[j] = fma::<FMA>(factor, x[j], y[j]);
            }
        }
        return;
    }
    let mut f = [0.0f32; GROUP];
    f.iter_mut().zip(factors).for_each(|(f, factor)| *f = factor);
    let [x0, x1, x2, x3]: [&[f32]; GROUP] = std::array::from_fn(|i| &x[i * k..][..k]);
    for j in 0..k {
        let pair = fma::<FMA>(f[0], x0[j], f[1] * x1[j]);
        y[j] += fma::<FMA>(f[2], x2[j], fma::<FMA>(f[3], x3[j], pair));
    }
}

simd_fn! {
    /// `dw[i] (+)= sum over b of dy[b, i] x[b]` and, unless `dx` is empty, `dx[b] += sum over i of dy[b, i] w[i]`. `dw` and
    /// `w` `[outputs, k]`, `dx` and `x` `[rows, k]`, rows of `dy` are `n` apart.
    fn outer_products<F>(
        dw: &mut [f32],
        dx: &mut [f32],
        add: bool,
        dy: &[f32],
        x: &[f32],
        w: &[f32],
        n: usize,
        k: usize,
    ) {
        for (group, (dw, w)) in dw.chunks_mut(GROUP * k).zip(w.chunks(GROUP * k)).enumerate() {
            let first = group * GROUP;
            if !add {
                dw.fill(0.0);
            }
            for (i, dw) in dw.chunks_exact_mut(k).enumerate() {
                for (part, x) in x.chunks(GROUP * k).enumerate() {
                    let rows = part * GROUP..part * GROUP + x.len() / k;
                    add_scaled::<F>(dw, rows.map(|b| dy[b * n + first + i]), x);
                }
            }
            for (b, dx) in dx.chunks_exact_mut(k).enumerate() {
                add_scaled::<F>(dx, dy[b * n + first..][..w.len() / k].iter().copied(), w);
            }
        }
    }
}

simd_fn! {
    /// `y = x / (1 + e^-x)`.
    pub fn silu_to<F>(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid::<F>(x);
        }
    }
}

simd_fn! {
    /// `d *= silu'(x)`.
    pub fn silu_backward<F>(d: &mut [f32], x: &[f32]) {
        for (d, &x) in d.iter_mut().zip(x) {
            let s = sigmoid::<F>(x);
            *d *= s * fma::<F>(x, 1.0 - s, 1.0);
        }
    }
}
