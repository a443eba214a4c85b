//! Attention with products in bf16, for AMX: as [`super::cpu`], with operands packed in parts ([`crate::backend::cpu::split`]).
//!
//! Scores, probabilities and their gradients are in f32, `[keys, queries]` too, and rounded where they are multiplied. As an operand B
//! over keys they are packed as they lie; products over keys then have channels as rows, and are transposed when they are written.

use super::Dims;
use super::cpu::{FETCHED, Head, dot, halves, queries_at_once, softmax, softmax_backward, split};
use crate::backend::cpu::packed::{Format, Kernel};
use crate::backend::cpu::scratch;
use crate::backend::cpu::shared::Shared;
use crate::backend::cpu::simd::{add_assign, fetch_rows};
use crate::backend::cpu::split::{ROUNDED, STEP, pack_columns, pack_panel_transposed, pack_rows, scatter};
use crate::backend::cpu::tile::{HALF, PANEL, STRIP, Segment, Tile, copy_row, panels, write_transposed};
use rayon::prelude::*;
use std::ops::Range;

const FORMAT: Format = Format::Parts(ROUNDED);
/// Rows of a tile.
const ROWS: usize = 2 * STEP;

/// Whether this is for so many tokens and heads of that size: those that fill tiles.
pub(super) fn takes(tokens: usize, size: usize) -> bool {
    tokens >= ROWS && size.is_multiple_of(STEP)
}

/// Inner elements that are multiplied for `len`.
fn whole(len: usize) -> usize {
    FORMAT.inner(0..len, len).len()
}

/// Rows of a head as operand A over its channels.
fn pack_tokens<'a>(room: &'a mut [f32], from: &[f32], head: Head, tokens: usize) -> &'a [f32] {
    pack_rows::<ROUNDED>(room, &from[head.at(0).start..], tokens, head.size, head.stride);
    room
}

/// Channels of a head as operand A over its rows; `lines` is room for `[tokens, HS]`.
fn pack_channels<'a>(room: &'a mut [f32], lines: &mut [f32], from: &[f32], head: Head, tokens: usize) -> &'a [f32] {
    for (i, line) in lines.chunks_exact_mut(head.size).enumerate() {
        line.copy_from_slice(&from[head.at(i)]);
    }
    // SAFETY: the room is borrowed here alone.
    unsafe { scatter::<ROUNDED>(&Shared::new(room), lines, head.size, 0..head.size, 0, tokens) };
    room
}

/// Rows of a head as the columns of operand B over its channels, in panels.
fn pack_queries(to: &mut [f32], from: &[f32], head: Head, rows: Range<usize>) {
    let from = &from[head.at(rows.start).start..];
    for (panel, to) in to.chunks_exact_mut(FORMAT.panel_len(head.size)).take(panels(rows.len())).enumerate() {
        pack_panel_transposed::<ROUNDED>(to, from, panel, rows.len(), head.size, head.stride);
    }
}

/// Lines of `width` numbers, `stride` apart, as operand B over them, in panels.
fn pack_lines(to: &mut [f32], lines: &[f32], width: usize, count: usize, stride: usize) {
    pack_columns::<ROUNDED>(to, FORMAT.half_len(count), lines, 0..width, stride, count, whole(count));
}

/// Packed operands over `inner` elements.
struct Product<'a> {
    a: &'a [f32],
    b: &'a [f32],
    inner: usize,
}

impl Product<'_> {
    /// Of rows of A, the first of which is that of a step, and those of B's `columns` that are in panel `panel`.
    fn tile(&self, kernel: &mut Kernel, to: &mut Tile, rows: &Range<usize>, panel: usize, columns: usize) {
        let len = FORMAT.panel_len(self.inner);
        let a = &self.a[rows.start / STEP * FORMAT.rows_len(STEP, self.inner)..];
        let b = FORMAT.of_panel(&self.b[panel * len..][..len], 0);
        kernel.multiply(to, rows.len(), halves(columns, panel), Segment { a, b, len: whole(self.inner) }, &[]);
    }
}

/// See [`super::cpu::forward`].
pub(super) fn forward(out: &mut [f32], statistics: &mut [f32], qkv: &[f32], dims: Dims) {
    let Dims { b, t, c, heads } = dims;
    let size = c / heads;
    let scale = 1.0 / (size as f32).sqrt();
    let sizes = [
        FORMAT.rows_len(t, size), // k: rows over channels
        FORMAT.rows_len(size, t), // v: channels over rows
        FORMAT.panel_len(size),   // q: a panel of queries
        t * PANEL,                // p: [T, PANEL], their scores, then exponentials
        FORMAT.panel_len(t),      // packed_p: a panel over keys
        t.max(PANEL) * size,      // lines: v as [T, HS], then the output as [PANEL, HS]
    ];
    let (out, statistics) = (Shared::new(out), Shared::new(statistics));
    (0..b * heads).into_par_iter().for_each(|task| {
        let (sample, head) = (task / heads, task % heads);
        let part = |i: usize| Head { row: sample * t, column: i * c + head * size, stride: 3 * c, size };
        let of_out = Head { stride: c, ..part(0) };
        for i in 0..3 {
            fetch_rows(&qkv[part(i).at(0).start..], t.min(FETCHED), size, 3 * c);
        }
        let (mut kernel, mut tile) = (FORMAT.kernel(), Tile::new());
        scratch::with(sizes.iter().sum(), |buffer| {
            let [k, v, q, p, packed_p, lines] = split(buffer, sizes);
            let k = pack_tokens(k, qkv, part(1), t);
            let v = pack_channels(v, &mut lines[..t * size], qkv, part(2), t);
            let p = p.as_chunks_mut::<PANEL>().0;
            for first in (0..t).step_by(PANEL) {
                let count = PANEL.min(t - first);
                pack_queries(q, qkv, part(0), first..first + count);
                for keys in FORMAT.row_tiles(t) {
                    Product { a: k, b: q, inner: size }.tile(&mut kernel, &mut tile, &keys, 0, count);
                    p[keys.clone()].copy_from_slice(&tile.rows[..keys.len()]);
                }
                let (mut max, mut inverse) = ([0.0; PANEL], [0.0; PANEL]);
                softmax(p, halves(count, 0), scale, &mut max, &mut inverse);
                pack_lines(packed_p, p.as_flattened(), count, t, PANEL);
                for channels in FORMAT.row_tiles(size) {
                    Product { a: v, b: packed_p, inner: t }.tile(&mut kernel, &mut tile, &channels, 0, count);
                    write_transposed(&mut lines[channels.start..], &tile.rows[..channels.len()], count, size, false);
                }
                for (i, line) in lines.chunks_exact(size).take(count).enumerate() {
                    // SAFETY: this head's columns of a row of this sample: no other task has them.
                    let out = unsafe { out.slice(of_out.at(first + i)) };
                    for (out, sum) in out.iter_mut().zip(line) {
                        *out = sum * inverse[i];
                    }
                    let at = 2 * ((sample * t + first + i) * heads + head);
                    // SAFETY: the numbers of one head and row.
                    unsafe { statistics.slice(at..at + 2) }.copy_from_slice(&[max[i], inverse[i]]);
                }
            }
        });
    });
}

/// See [`super::cpu::backward`].
pub(super) fn backward(dqkv: &mut [f32], dout: &[f32], qkv: &[f32], out: &[f32], statistics: &[f32], dims: Dims) {
    let Dims { b, t, c, heads } = dims;
    let size = c / heads;
    let scale = 1.0 / (size as f32).sqrt();
    let at_once = queries_at_once(t);
    let of_queries = panels(at_once) * FORMAT.panel_len(size);
    let over_queries = panels(size) * FORMAT.panel_len(at_once);
    let sizes = [
        FORMAT.rows_len(t, size),              // k: rows over channels
        FORMAT.rows_len(t, size),              // v: as that
        FORMAT.rows_len(size, t),              // k_channels: channels over rows
        of_queries,                            // q: panels of queries over channels
        of_queries,                            // dy: as that, of dout
        over_queries,                          // q_lines: panels of channels over queries
        over_queries,                          // dy_lines: as that, of dout
        t * STRIP,                             // p: [T, STRIP], the probabilities, transposed
        t * STRIP,                             // ds: [T, STRIP], the gradients of the scores, transposed
        FORMAT.rows_len(ROWS, at_once),        // rows: a tile of keys over queries
        panels(at_once) * FORMAT.panel_len(t), // ds_lines: panels of queries over keys
        t.max(at_once) * size,                 // lines: k as [T, HS], then dq as [queries, HS]
        at_once,                               // max: [queries]
        at_once,                               // inverse: [queries]
        at_once,                               // delta: [queries]
    ];
    let dqkv = Shared::new(dqkv);
    (0..b * heads).into_par_iter().for_each(|task| {
        let (sample, head) = (task / heads, task % heads);
        let part = |i: usize| Head { row: sample * t, column: i * c + head * size, stride: 3 * c, size };
        let of_out = Head { stride: c, ..part(0) };
        for (numbers, head) in [(dout, of_out), (out, of_out), (qkv, part(0)), (qkv, part(1)), (qkv, part(2))] {
            fetch_rows(&numbers[head.at(0).start..], t.min(FETCHED), size, head.stride);
        }
        let (mut kernel, mut scores, mut dp) = (FORMAT.kernel(), Tile::new(), Tile::new());
        scratch::with(sizes.iter().sum(), |buffer| {
            let [k, v, k_channels, q, dy, q_lines, dy_lines, p, ds, rows, ds_lines, lines, max, inverse, delta] =
                split(buffer, sizes);
            let (k, v) = (pack_tokens(k, qkv, part(1), t), pack_tokens(v, qkv, part(2), t));
            let k_channels = pack_channels(k_channels, &mut lines[..t * size], qkv, part(1), t);
            for first in (0..t).step_by(at_once) {
                let count = at_once.min(t - first);
                let queries = first..first + count;
                pack_queries(q, qkv, part(0), queries.clone());
                pack_queries(dy, dout, of_out, queries.clone());
                pack_lines(q_lines, &qkv[part(0).at(first).start..], size, count, 3 * c);
                pack_lines(dy_lines, &dout[of_out.at(first).start..], size, count, c);
                for (i, query) in queries.enumerate() {
                    let at = 2 * ((sample * t + query) * heads + head);
                    (max[i], inverse[i]) = (statistics[at], statistics[at + 1]);
                    delta[i] = dot(&dout[of_out.at(query)], &out[of_out.at(query)]);
                }
                for of_queries in [&mut *max, inverse, delta] {
                    of_queries[count..].fill(0.0);
                }

                // P and dS, transposed.
                for (panel, keys) in
                    (0..panels(count)).flat_map(|panel| FORMAT.row_tiles(t).map(move |keys| (panel, keys)))
                {
                    for (to, a, b) in [(&mut scores, k, &*q), (&mut dp, v, &*dy)] {
                        Product { a, b, inner: size }.tile(&mut kernel, to, &keys, panel, count);
                    }
                    for half in 2 * panel..2 * panel + halves(count, panel) {
                        let columns = half * HALF..(half + 1) * HALF;
                        let at = keys.start * STRIP + columns.start;
                        let queries = [&*max, inverse, delta].map(|of_queries| &of_queries[columns.clone()]);
                        let (p, ds) = (&mut p[at..], &mut ds[at..]);
                        softmax_backward(p, ds, &scores, &dp, keys.len(), half % 2, queries, scale);
                    }
                }

                // dv += P^T dout, dk += dS^T q: sums over the queries of the block.
                for ((from, b, to), keys) in [(&*p, &*dy_lines, part(2)), (&*ds, q_lines, part(1))]
                    .into_iter()
                    .flat_map(|product| FORMAT.row_tiles(t).map(move |keys| (product, keys)))
                {
                    pack_rows::<ROUNDED>(rows, &from[keys.start * STRIP..], keys.len(), count, STRIP);
                    for panel in 0..panels(size) {
                        let columns = panel * PANEL..size.min((panel + 1) * PANEL);
                        let product = Product { a: rows, b, inner: count };
                        product.tile(&mut kernel, &mut scores, &(0..keys.len()), panel, size);
                        for (key, sums) in keys.clone().zip(&scores.rows) {
                            // SAFETY: this head's columns of a row of this sample: no other task has them.
                            let to = &mut unsafe { dqkv.slice(to.at(key)) }[columns.clone()];
                            if first == 0 {
                                copy_row(to, sums);
                            } else {
                                add_assign(to, &sums[..to.len()]);
                            }
                        }
                    }
                }
                // dq = dS k: over all keys.
                pack_lines(ds_lines, ds, count, t, STRIP);
                for (panel, channels) in
                    (0..panels(count)).flat_map(|panel| FORMAT.row_tiles(size).map(move |rows| (panel, rows)))
                {
                    let width = PANEL.min(count - panel * PANEL);
                    let product = Product { a: k_channels, b: ds_lines, inner: t };
                    product.tile(&mut kernel, &mut scores, &channels, panel, count);
                    let to = &mut lines[panel * PANEL * size + channels.start..];
                    write_transposed(to, &scores.rows[..channels.len()], width, size, false);
                }
                for (i, line) in lines.chunks_exact(size).take(count).enumerate() {
                    // SAFETY: this head's columns of a row of this sample: no other task has them.
                    unsafe { dqkv.slice(part(0).at(first + i)) }.copy_from_slice(line);
                }
            }
        });
    });
}
