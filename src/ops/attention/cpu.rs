//! The CPU version: a head of a sample at a time, a block of queries against all keys, so that its scores stay in cache. Of 16 tokens
//! with AVX-512: [`super::sixteen`]; in bf16, of 32 tokens or more: [`super::bf16`].
//!
//! Scores are kept transposed, `[keys, queries]`: softmax then runs down columns, a vector of queries at a time, and the
//! probabilities are where both kinds of products that follow read them (see [`Rows`]).

#[cfg(target_arch = "x86_64")]
use super::sixteen;
use super::{Dims, bf16};
use crate::backend::DType;
use crate::backend::cpu::pack::{pack_panel, pack_panel_transposed};
use crate::backend::cpu::profile::{Pass, span};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::{add_assign, exp, fetch_rows, simd_fn, sum_by};
use crate::backend::cpu::tile::{
    HALF, PANEL, Rows, STRIP, Segment, Tile, copy_row, multiply, of_panel, of_panel_mut, panels, row_tiles,
};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a block of backward: a multiple of [`PANEL`], at most [`STRIP`], fewer when there are many keys.
pub(super) fn queries_at_once(keys: usize) -> usize {
    match keys {
        0..=384 => 128,
        385..=768 => 64,
        _ => PANEL,
    }
}

/// Most rows of a head that are fetched before they are used: with few tokens the misses would come one after the other, with
/// more the products are long enough to hide them.
pub(super) const FETCHED: usize = 64;

/// Rows of a head from which on they are copied to be multiplied as columns: so many, as far apart as they lie, crowd into few sets
/// of the cache. Measured (Zen 3, 256 tokens): attention takes 3 % less time; with 64 tokens nothing is gained.
const MANY: usize = 128;

/// Columns of one head of one sample in rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) row: usize,    // first row
    pub(super) column: usize, // first column
    pub(super) stride: usize,
    pub(super) size: usize,
}

impl Head {
    pub(super) fn at(self, i: usize) -> Range<usize> {
        let start = (self.row + i) * self.stride + self.column;
        start..start + self.size
    }
}

/// Halves of a panel of `size` columns.
pub(super) fn halves(size: usize, panel: usize) -> usize {
    (size - panel * PANEL).div_ceil(HALF).min(2)
}

/// Rows of a head as columns that are multiplied: `[panels(rows), 2, HS, HALF]`.
fn pack_transposed(to: &mut [f32], from: &[f32], head: Head, rows: Range<usize>) {
    let from = &from[head.at(rows.start).start..];
    for (panel, to) in to.chunks_exact_mut(head.size * PANEL).take(panels(rows.len())).enumerate() {
        pack_panel_transposed(to, from, panel, rows.len(), head.size, head.stride);
    }
}

/// Rows of a head as operand B.
#[derive(Clone, Copy)]
struct Columns<'a> {
    data: &'a [f32],
    stride: usize, // between rows
    half: usize,   // between halves of panels
}

impl<'a> Columns<'a> {
    /// Numbers of room that `rows` rows take: none where they are few and half a panel cannot reach beyond them.
    fn room(size: usize, rows: usize) -> usize {
        if size.is_multiple_of(HALF) && rows < MANY { 0 } else { panels(size) * rows * PANEL }
    }

    /// Where they are, or copied to `room`.
    fn new(room: &'a mut [f32], from: &'a [f32], head: Head, rows: Range<usize>) -> Self {
        let from = &from[head.at(rows.start).start..];
        if room.is_empty() {
            return Columns { data: from, stride: head.stride, half: HALF };
        }
        for (panel, to) in room.chunks_exact_mut(rows.len() * PANEL).take(panels(head.size)).enumerate() {
            pack_panel(of_panel_mut(to), from, panel, head.size, head.stride);
        }
        Columns { data: room, stride: HALF, half: rows.len() * HALF }
    }

    fn panel(self, panel: usize) -> [&'a [f32]; 2] {
        [0, 1].map(|half| self.data.get((2 * panel + half) * self.half..).unwrap_or(&[]))
    }
}

/// Splits `buffer` into parts of these sizes.
pub(super) fn split<const N: usize>(mut buffer: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| buffer.split_off_mut(..size).expect("the sum of the sizes"))
}

/// See [`super::attention`].
pub fn forward(
    out: &mut [f32],        // [B, T, C]
    statistics: &mut [f32], // [B, T, NH, 2]: the largest q k^T of a row, and 1 / the sum of its exponentials
    qkv: &[f32],            // [B, T, 3C]
    dims: Dims,
    elem: DType, // in which products are: f32 or bf16
) {
    let Dims { b, t, c, heads } = dims;
    let _span = span("attention", Pass::Forward, [c, heads], 4 * b * t * t * c, 4 * b * t * c);
    let size = c / heads;
    if elem == DType::Bf16 && bf16::takes(t, size) {
        return bf16::forward(out, statistics, qkv, dims);
    }
    #[cfg(target_arch = "x86_64")]
    if sixteen::takes(t, size) {
        return sixteen::forward(out, statistics, qkv, dims);
    }
    let scale = 1.0 / (size as f32).sqrt();
    let sizes = [
        Columns::room(size, t), // v: all values
        PANEL * size,           // q: [2, HS, HALF], a panel of queries
        t * PANEL,              // p: [T, PANEL], their scores, then probabilities
    ];
    let (out, statistics) = (Shared::new(out), Shared::new(statistics));
    (0..b * heads).into_par_iter().for_each_init(Tile::new, |tile, task| {
        let (sample, head) = (task / heads, task % heads);
        let part = |i: usize| Head { row: sample * t, column: i * c + head * size, stride: 3 * c, size };
        let of_out = Head { stride: c, ..part(0) };
        for i in 0..3 {
            fetch_rows(&qkv[part(i).at(0).start..], t.min(FETCHED), size, 3 * c);
        }
        scratch::with(sizes.iter().sum(), |buffer| {
            let [v, q, p] = split(buffer, sizes);
            let v = Columns::new(v, qkv, part(2), 0..t);
            let p = p.as_chunks_mut::<PANEL>().0;
            for first in (0..t).step_by(PANEL) {
                let count = PANEL.min(t - first);
                pack_transposed(q, qkv, part(0), first..first + count);
                for keys in row_tiles(t) {
                    let a = &qkv[part(1).at(keys.start).start..];
                    let segment = Segment { a, b: of_panel(q, 0), len: size };
                    multiply(&mut p[keys], halves(count, 0), Rows::lines(3 * c), HALF, &[segment], &[]);
                }
                let (mut max, mut inverse) = ([0.0; PANEL], [0.0; PANEL]);
                softmax(p, halves(count, 0), scale, &mut max, &mut inverse);
                for queries in row_tiles(count) {
                    for panel in 0..panels(size) {
                        let segment = Segment { a: &p.as_flattened()[queries.start..], b: v.panel(panel), len: t };
                        let (sums, halves) = (&mut tile.rows[..queries.len()], halves(size, panel));
                        multiply(sums, halves, Rows::interleaved(PANEL), v.stride, &[segment], &[]);
                        let width = PANEL.min(size - panel * PANEL);
                        for (i, sums) in queries.clone().zip(&tile.rows) {
                            // SAFETY: this head's columns of a row of this sample: no other task has them.
                            let out = unsafe { out.slice(of_out.at(first + i)) };
                            for (out, sum) in out[panel * PANEL..][..width].iter_mut().zip(sums) {
                                *out = sum * inverse[i];
                            }
                        }
                    }
                }
                for i in 0..count {
                    let at = 2 * ((sample * t + first + i) * heads + head);
                    // SAFETY: the numbers of one head and row.
                    unsafe { statistics.slice(at..at + 2) }.copy_from_slice(&[max[i], inverse[i]]);
                }
            }
        });
    });
}

/// See [`super::attention`]. Overwrites `dqkv`.
pub fn backward(
    dqkv: &mut [f32],   // [B, T, 3C]
    dout: &[f32],       // [B, T, C]
    qkv: &[f32],        // [B, T, 3C]
    out: &[f32],        // [B, T, C]
    statistics: &[f32], // [B, T, NH, 2], see `forward`
    dims: Dims,
    elem: DType, // as in `forward`
) {
    let Dims { b, t, c, heads } = dims;
    let span = |of_rows| span("attention", Pass::Backward, [c, heads], 10 * b * t * t * c, of_rows * b * t * c);
    let size = c / heads;
    #[cfg(target_arch = "x86_64")]
    if sixteen::takes(t, size) {
        // It does not read `out`.
        let _span = span(7);
        return sixteen::backward(dqkv, dout, qkv, statistics, dims);
    }
    let _span = span(8);
    if elem == DType::Bf16 && bf16::takes(t, size) {
        return bf16::backward(dqkv, dout, qkv, out, statistics, dims);
    }
    let scale = 1.0 / (size as f32).sqrt();
    let at_once = queries_at_once(t);
    let sizes = [
        Columns::room(size, t),              // k: all keys
        at_once * size,                      // q_transposed: [panels(queries), 2, HS, HALF]
        at_once * size,                      // dy_transposed: as that
        Columns::room(size, at_once.min(t)), // q: the queries
        Columns::room(size, at_once.min(t)), // dy: their rows of dout
        t * STRIP,                           // p: [T, STRIP], the probabilities, transposed
        t * STRIP,                           // ds: [T, STRIP], the gradients of the scores, transposed
        at_once,                             // max: [queries]
        at_once,                             // inverse: [queries]
        at_once,                             // delta: [queries]
    ];
    let dqkv = Shared::new(dqkv);
    (0..b * heads).into_par_iter().for_each_init(
        || [Tile::new(), Tile::new()],
        |[scores, dp], task| {
            let (sample, head) = (task / heads, task % heads);
            let part = |i: usize| Head { row: sample * t, column: i * c + head * size, stride: 3 * c, size };
            let of_out = Head { stride: c, ..part(0) };
            fetch_rows(&dout[of_out.at(0).start..], t.min(FETCHED), size, c);
            fetch_rows(&out[of_out.at(0).start..], t.min(FETCHED), size, c);
            for i in 0..3 {
                fetch_rows(&qkv[part(i).at(0).start..], t.min(FETCHED), size, 3 * c);
            }
            scratch::with(sizes.iter().sum(), |buffer| {
                let [k, q_transposed, dy_transposed, q, dy, p, ds, max, inverse, delta] = split(buffer, sizes);
                let k = Columns::new(k, qkv, part(1), 0..t);
                for first in (0..t).step_by(at_once) {
                    let count = at_once.min(t - first);
                    let queries = first..first + count;
                    pack_transposed(q_transposed, qkv, part(0), queries.clone());
                    pack_transposed(dy_transposed, dout, of_out, queries.clone());
                    let q = Columns::new(q, qkv, part(0), queries.clone());
                    let dy = Columns::new(dy, dout, of_out, queries.clone());
                    for (i, query) in queries.enumerate() {
                        let at = 2 * ((sample * t + query) * heads + head);
                        (max[i], inverse[i]) = (statistics[at], statistics[at + 1]);
                        delta[i] = dot(&dout[of_out.at(query)], &out[of_out.at(query)]);
                    }
                    for of_queries in [&mut *max, inverse, delta] {
                        of_queries[count..].fill(0.0);
                    }

                    // P and dS, transposed.
                    let transposed =
                        q_transposed.chunks_exact(size * PANEL).zip(dy_transposed.chunks_exact(size * PANEL));
                    for (panel, (q, dy)) in transposed.take(panels(count)).enumerate() {
                        let columns = panel * PANEL..(panel + 1) * PANEL;
                        for keys in row_tiles(t) {
                            let [k, v] = [1, 2].map(|i| &qkv[part(i).at(keys.start).start..]);
                            let [q, dy] = [q, dy].map(|panel| of_panel(panel, 0));
                            let layout = Rows::lines(3 * c);
                            let halves = halves(count, panel);
                            for (tile, a, b) in [(&mut *scores, k, q), (&mut *dp, v, dy)] {
                                let (sums, segment) = (&mut tile.rows[..keys.len()], Segment { a, b, len: size });
                                multiply(sums, halves, layout, HALF, &[segment], &[]);
                            }
                            let at = keys.start * STRIP + columns.start;
                            for half in 0..halves {
                                let at = at + half * HALF;
                                let numbers = columns.start + half * HALF..columns.start + (half + 1) * HALF;
                                let queries = [&*max, inverse, delta].map(|of_queries| &of_queries[numbers.clone()]);
                                let (p, ds) = (&mut p[at..], &mut ds[at..]);
                                softmax_backward(p, ds, scores, dp, keys.len(), half, queries, scale);
                            }
                        }
                    }

                    // dv += P^T dout, dk += dS^T q: sums over the queries of the block; dq = dS k: over all keys.
                    let mut product = |tile: Range<usize>, layout, a: &[f32], b: Columns, len, to: Head, set: bool| {
                        for panel in 0..panels(size) {
                            let width = PANEL.min(size - panel * PANEL);
                            let segment = Segment { a, b: b.panel(panel), len };
                            let sums = &mut scores.rows[..tile.len()];
                            multiply(sums, halves(size, panel), layout, b.stride, &[segment], &[]);
                            for (i, sums) in tile.clone().zip(&scores.rows) {
                                // SAFETY: this head's columns of a row of this sample: no other task has them.
                                let to = unsafe { dqkv.slice(to.at(i)) };
                                let to = &mut to[panel * PANEL..][..width];
                                if set {
                                    copy_row(to, sums);
                                } else {
                                    add_assign(to, &sums[..width]);
                                }
                            }
                        }
                    };
                    for keys in row_tiles(t) {
                        let at = keys.start * STRIP;
                        let (p, ds) = (&p[at..], &ds[at..]);
                        product(keys.clone(), Rows::lines(STRIP), p, dy, count, part(2), first == 0);
                        product(keys, Rows::lines(STRIP), ds, q, count, part(1), first == 0);
                    }
                    for queries in row_tiles(count) {
                        let rows = first + queries.start..first + queries.end;
                        product(rows, Rows::interleaved(STRIP), &ds[queries.start..], k, t, part(0), true);
                    }
                }
            });
        },
    );
}

simd_fn! {
    pub(super) fn dot<F>(a: &[f32], b: &[f32]) -> f32 {
        let [dot] = sum_by([a, b], |[a, b]| [a * b]);
        dot
    }
}

simd_fn! {
    /// The first `halves` halves of the columns of `p` `[keys, PANEL]` become `exp(scale (p - max))`, with the largest of each column;
    /// `inverse` is one over their sum.
    pub(super) fn softmax<F>(
        p: &mut [[f32; PANEL]],
        halves: usize,
        scale: f32,
        max: &mut [f32; PANEL],
        inverse: &mut [f32; PANEL],
    ) {
        if halves == 1 {
            softmax_of::<F, HALF>(p, scale, max, inverse)
        } else {
            softmax_of::<F, PANEL>(p, scale, max, inverse)
        }
    }
}

/// [`softmax`] of the first `N` columns.
#[inline(always)]
fn softmax_of<const FMA: bool, const N: usize>(
    p: &mut [[f32; PANEL]],
    scale: f32,
    max_of: &mut [f32; PANEL],
    inverse: &mut [f32; PANEL],
) {
    let mut max = [f32::NEG_INFINITY; N];
    for row in &*p {
        for j in 0..N {
            max[j] = if row[j] > max[j] { row[j] } else { max[j] };
        }
    }
    let mut sum = [0.0f32; N];
    for row in p {
        for j in 0..N {
            row[j] = exp::<FMA>((row[j] - max[j]) * scale);
            sum[j] += row[j];
        }
    }
    for j in 0..N {
        max_of[j] = max[j];
        inverse[j] = 1.0 / sum[j];
    }
}

simd_fn! {
    /// Half `half` of the queries of a tile of keys: the probabilities and the gradient of the scores, rows [`STRIP`] apart. The
    /// tiles are whole; `queries` are `max`, `inverse` and `delta` of that half.
    pub(super) fn softmax_backward<F>(
        p: &mut [f32],
        ds: &mut [f32],
        scores: &Tile,
        dp: &Tile,
        keys: usize,
        half: usize,
        queries: [&[f32]; 3],
        scale: f32,
    ) {
        let [max, inverse, delta]: [&[f32; HALF]; 3] =
            queries.map(|of_queries| of_queries.try_into().expect("half a panel of queries"));
        for i in 0..keys {
            let (p, ds) = (&mut p[i * STRIP..][..HALF], &mut ds[i * STRIP..][..HALF]);
            let (scores, dp) = (&scores.rows[i][half * HALF..][..HALF], &dp.rows[i][half * HALF..][..HALF]);
            for j in 0..HALF {
                let probability = exp::<F>((scores[j] - max[j]) * scale) * inverse[j];
                p[j] = probability;
                ds[j] = probability * (dp[j] - delta[j]) * scale;
            }
        }
    }
}
