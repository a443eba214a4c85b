//! What the CPU version does with single rows, and with single numbers.

use super::EPS;
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::simd::{fma, gelu, gelu_derivative, simd_fn, sum_by};
use crate::backend::cpu::tile::{MAX_ROWS, PANEL};
use crate::routing::Window;
use rayon::prelude::*;

/// The row of x to normalise: `x` where its window is all that is computed, else its window, copied into `room`, which is zero elsewhere.
pub(super) fn masked<'a>(room: &'a mut [f32], x: &'a [f32], window: Window, computed: Window) -> &'a [f32] {
    if window == computed {
        return x;
    }
    room[window.range()].copy_from_slice(&x[window.range()]);
    room
}

simd_fn! {
    /// One row: mean and rstd of the masked row; `h` is its modulated window.
    pub(super) fn normalise<F>(h: &mut [f32], x: &[f32], window: Window, shift: &[f32], scale: &[f32]) -> (f32, f32) {
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
    pub(super) fn correct_rows<F>(rows: &mut [[f32; PANEL]], r: &[f32; MAX_ROWS], u: &[f32], v: &[f32]) {
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
    pub(super) fn sums_over_tokens<F>(pq: &mut [f32], dr: &mut [f32], g: &[f32], mean: &[f32], rstd: &[f32], u: &[f32]) {
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

/// What the gradients of a row depend on.
pub(super) struct Row<'a> {
    pub(super) x: &'a [f32],     // [C], see masked
    pub(super) shift: &'a [f32], // [C]
    pub(super) scale: &'a [f32], // [C]
    pub(super) window: Window,
    pub(super) computed: Window,
    pub(super) mean: f32,
    pub(super) rstd: f32,
}

simd_fn! {
    /// One row of the LayerNorm backward; also the window of `h` again, and the row's part of `dshift` and `dscale` on the window.
    pub(super) fn normalise_backward<F>(
        dx: &mut [f32],
        fresh: bool,
        h: &mut [f32],
        dshift: &mut [f32],
        dscale: &mut [f32],
        dh: &[f32],
        dr: f32,
        row: &Row,
    ) {
        let &Row { x, shift, scale, window, computed, mean, rstd } = row;
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
