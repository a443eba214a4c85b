//! Products of row-major matrices for the layers that have no windows: `x` `[rows, k]`, `weight` `[n, k]`, `y` `[rows, n]`.
//!
//! All run on the threads of the current pool, and sum in an order that depends on the shapes alone.

use super::pack::{pack_panel_transposed, whole_halves, whole_halves_len};
use super::scratch;
use super::shared::Shared;
use super::simd::{add_assign, fetch_rows, simd_fn};
use super::tile::{
    HALF, PANEL, Rows, Segment, Streams, Tile, add_tile, copy_row, multiply, multiply_add, of_matrix, of_panel, panels,
    row_tiles, squares, write_rows, write_transposed,
};
use rayon::prelude::*;

/// Outputs of one task: a few tiles.
const OUTPUTS: usize = 56;
/// Rows of one task, where there are many.
const ROWS: usize = 56;
/// Outputs whose part of a sum over all is computed by itself.
const PART: usize = 256;
/// Outputs whose weights are read while those of as many more are fetched, in the order in which they lie in memory.
const AT_ONCE: usize = 64;

/// `y = x weight^T + bias`.
pub fn linear(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32]) {
    let n = bias.len();
    if n == 0 {
        return;
    }
    let (rows, k) = (y.len() / n, weight.len() / n);
    if rows > n { linear_of_many(y, x, weight, bias, k) } else { linear_of_few(y, x, weight, bias, k) }
}

/// Rows are those of a tile.
fn linear_of_many(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], k: usize) {
    let n = bias.len();
    scratch::with(panels(n) * k * PANEL, |panels_of_w| {
        for (panel, to) in panels_of_w.chunks_exact_mut((k * PANEL).max(1)).enumerate() {
            pack_panel_transposed(to, weight, panel, n, k, k);
        }
        let panels_of_w = &*panels_of_w;
        y.par_chunks_mut(ROWS * n).enumerate().for_each(|(task, y)| {
            let mut tile = Tile::new();
            for rows in row_tiles(y.len() / n) {
                for panel in 0..panels(n) {
                    let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
                    let b = of_panel(&panels_of_w[panel * k * PANEL..][..k * PANEL], 0);
                    let segment = Segment { a: &x[(task * ROWS + rows.start) * k..], b, len: k };
                    let (sums, halves) = (&mut tile.rows[..rows.len()], columns.len().div_ceil(HALF));
                    multiply(sums, halves, Rows::lines(k), HALF, &[segment], &[]);
                    add_to_rows(&mut y[rows.start * n + columns.start..], n, sums, &bias[columns]);
                }
            }
        });
    });
}

/// Outputs are the rows of a tile, so that the weight is read once and as it lies.
fn linear_of_few(y: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], k: usize) {
    let n = bias.len();
    let rows = y.len() / n;
    let y = Shared::new(y);
    scratch::with(panels(rows) * k * PANEL, |panels_of_x| {
        for (panel, to) in panels_of_x.chunks_exact_mut(k * PANEL).enumerate() {
            pack_panel_transposed(to, x, panel, rows, k, k);
        }
        let panels_of_x = &*panels_of_x;
        bias.par_chunks(OUTPUTS).enumerate().for_each(|(task, bias)| {
            let (first, count) = (task * OUTPUTS, bias.len());
            let mut tile = Tile::new();
            scratch::with(PANEL * count, |part| {
                for (panel, b) in panels_of_x.chunks_exact(k * PANEL).enumerate() {
                    let rows = panel * PANEL..((panel + 1) * PANEL).min(rows);
                    for outputs in row_tiles(count) {
                        let segment = Segment { a: &weight[(first + outputs.start) * k..], b: of_panel(b, 0), len: k };
                        let halves = rows.len().div_ceil(HALF);
                        // Their lines lie side by side, of which the processor makes out few on its own.
                        let next = weight.get((first + outputs.end) * k..).unwrap_or(&[]);
                        let next = &next[..(outputs.len() * k).min(next.len())];
                        multiply(&mut tile.rows[..outputs.len()], halves, Rows::lines(k), HALF, &[segment], next);
                        write_transposed(
                            &mut part[outputs.start..],
                            &tile.rows[..outputs.len()],
                            rows.len(),
                            count,
                            false,
                        );
                    }
                    for (row, sums) in rows.zip(part.chunks_exact(count)) {
                        // SAFETY: these outputs belong to this task alone.
                        let y = unsafe { y.slice(row * n + first..row * n + first + count) };
                        add_to(y, sums, bias);
                    }
                }
            });
        });
    });
}

/// `dweight (+)= dy^T x`. Gives the sum of squares of what is written, or added, to it.
pub fn weight_gradient(dweight: &mut [f32], add: bool, dy: &[f32], x: &[f32], k: usize) -> f64 {
    let (rows, n) = (x.len() / k, dweight.len() / k);
    let len = dweight.len();
    scratch::with(whole_halves_len(rows, k), |room| {
        let (x, stride) = whole_halves(room, x, k);
        scratch::sum(n.div_ceil(OUTPUTS), |sums| {
            dweight.par_chunks_mut(OUTPUTS * k).zip(sums).enumerate().for_each(|(task, (dweight, sum))| {
                let mut tile = Tile::new();
                let streams = Streams::of(len).filter(|_| !add);
                for outputs in row_tiles(dweight.len() / k) {
                    let dweight = &mut dweight[outputs.start * k..outputs.end * k];
                    for first in (0..k).step_by(PANEL) {
                        let width = PANEL.min(k - first);
                        let (a, b) = (dy.get(task * OUTPUTS + outputs.start..), x.get(first..));
                        let segment = Segment { a: a.unwrap_or(&[]), b: of_matrix(b.unwrap_or(&[])), len: rows };
                        let halves = width.div_ceil(HALF);
                        multiply(
                            &mut tile.rows[..outputs.len()],
                            halves,
                            Rows::interleaved(n),
                            stride,
                            &[segment],
                            &[],
                        );
                        *sum += squares(&tile.rows[..outputs.len()], width);
                        let to = &mut dweight[first..];
                        match &streams {
                            // SAFETY: each place is written once, and read by nobody before all tasks are done.
                            Some(streams) => unsafe { streams.write_tile(to, &tile, outputs.len(), width, k) },
                            None if add => add_tile(to, &tile, outputs.len(), width, k),
                            None => write_rows(to, &tile.rows[..outputs.len()], width, k),
                        }
                    }
                }
            });
        })
    })
}

/// `dx = dy weight`. The sum over outputs is that of its parts, in their order.
pub fn input_gradient(dx: &mut [f32], dy: &[f32], weight: &[f32], k: usize) {
    let (rows, n) = (dx.len() / k, weight.len() / k);
    let room = whole_halves_len(n, k);
    scratch::with(room + n.div_ceil(PART) * dx.len(), |buffer| {
        let (room, parts) = buffer.split_at_mut(room);
        let (weight, stride) = whole_halves(room, weight, k);
        parts.par_chunks_mut(dx.len().max(1)).enumerate().for_each(|(part, dx)| {
            let (first, count) = (part * PART, PART.min(n - part * PART));
            for of_tile in row_tiles(rows) {
                scratch::with(panels(k) * of_tile.len() * PANEL, |sums| {
                    sums.fill(0.0);
                    for start in (first..first + count).step_by(AT_ONCE) {
                        let end = (start + AT_ONCE).min(first + count);
                        for (panel, sums) in sums.chunks_exact_mut(of_tile.len() * PANEL).enumerate() {
                            let column = panel * PANEL;
                            let next = weight.get(end * stride + panel * AT_ONCE * PANEL..).unwrap_or(&[]);
                            fetch_rows(next, 1, AT_ONCE * PANEL, next.len().max(1));
                            let (a, b) =
                                (&dy[of_tile.start * n + start..], of_matrix(&weight[start * stride + column..]));
                            let segment = Segment { a, b, len: end - start };
                            let halves = PANEL.min(k - column).div_ceil(HALF);
                            multiply_add(sums.as_chunks_mut().0, halves, Rows::lines(n), stride, &[segment], &[]);
                        }
                    }
                    for (panel, sums) in sums.chunks_exact(of_tile.len() * PANEL).enumerate() {
                        let column = panel * PANEL;
                        for (i, sums) in sums.as_chunks().0.iter().enumerate() {
                            copy_row(&mut dx[(of_tile.start + i) * k + column..][..PANEL.min(k - column)], sums);
                        }
                    }
                });
            }
        });
        dx.fill(0.0);
        parts.chunks_exact(dx.len().max(1)).for_each(|part| add_assign(dx, part));
    });
}

simd_fn! {
    /// The first columns of some rows, to each of which `bias` is added, as lines `stride` apart.
    fn add_to_rows<F>(y: &mut [f32], stride: usize, rows: &[[f32; PANEL]], bias: &[f32]) {
        for (y, row) in y.chunks_mut(stride).zip(rows) {
            match (y.first_chunk_mut::<PANEL>(), bias.first_chunk::<PANEL>()) {
                (Some(y), Some(bias)) => {
                    for j in 0..PANEL {
                        y[j] = row[j] + bias[j];
                    }
                }
                _ => y.iter_mut().zip(row).zip(bias).for_each(|((y, sum), bias)| *y = sum + bias),
            }
        }
    }
}

simd_fn! {
    /// `y = a + b`.
    fn add_to<F>(y: &mut [f32], a: &[f32], b: &[f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::*;

    /// `sum over i of a[i] b[i]` in f64.
    fn dot(pairs: impl Iterator<Item = (f32, f32)>) -> f64 {
        pairs.map(|(a, b)| f64::from(a) * f64::from(b)).sum()
    }

    fn close(got: &[f32], expected: impl Fn(usize) -> f64, what: &str) {
        for (i, &got) in got.iter().enumerate() {
            let expected = expected(i);
            assert!((f64::from(got) - expected).abs() <= 2e-3, "{what}: {got} for {expected} at {i}");
        }
    }

    #[test]
    fn products_agree_with_loops() {
        let few = [(1, 1, 1), (8, 384, 300), (64, 33, 70), (33, 60, 600), (2, 4, 57)];
        let many = [(5, 7, 3), (70, 16, 9), (57, 4, 56), (200, 4, 32), (113, 64, 112), (60, 5, 33)];
        for (rows, k, n) in few.into_iter().chain(many) {
            let (x, weight, bias, dy) = (numbers(1, rows * k), numbers(2, n * k), numbers(3, n), numbers(4, rows * n));
            let what = format!("{rows} rows, {k} -> {n}");
            let mut y = vec![f32::NAN; rows * n];
            linear(&mut y, &x, &weight, &bias);
            let expected = |i: usize| {
                let (row, out) = (i / n, i % n);
                f64::from(bias[out]) + dot((0..k).map(|j| (x[row * k + j], weight[out * k + j])))
            };
            close(&y, expected, &what);
            for add in [false, true] {
                let mut dweight = vec![if add { 3.0 } else { f32::NAN }; n * k];
                let squares = weight_gradient(&mut dweight, add, &dy, &x, k);
                let old = if add { 3.0 } else { 0.0 };
                let sum: f64 = dweight.iter().map(|&x| (f64::from(x) - old).powi(2)).sum();
                let tolerance = if add { 1e-5 * (sum + 1.0) } else { 1e-12 * sum };
                assert!((squares - sum).abs() <= tolerance, "{what}: squares sum to {squares}, expected {sum}");
                let expected = |i: usize| old + dot((0..rows).map(|row| (dy[row * n + i / k], x[row * k + i % k])));
                close(&dweight, expected, &what);
            }
            let mut dx = vec![f32::NAN; rows * k];
            input_gradient(&mut dx, &dy, &weight, k);
            close(&dx, |i| dot((0..n).map(|out| (dy[i / k * n + out], weight[out * k + i % k]))), &what);
        }
    }

    #[test]
    fn no_rows_have_no_gradient() {
        let (mut dweight, weight) = ([f32::NAN; 12], [1.0; 12]);
        weight_gradient(&mut dweight, false, &[], &[], 4);
        assert_eq!(dweight, [0.0; 12]);
        assert_eq!(weight_gradient(&mut [], false, &[], &[], 4), 0.0);
        linear(&mut [], &[], &weight, &[0.0; 3]);
        input_gradient(&mut [], &[], &weight, 4);
    }

    /// A weight large enough to be written past the caches.
    #[test]
    fn large_gradients_are_whole() {
        let (rows, k, n) = (3, 64, (8 << 20) / 4 / 64 + 5);
        let (x, dy) = (numbers(1, rows * k), numbers(4, rows * n));
        let mut dweight = crate::backend::cpu::aligned::AlignedVec::zeros(n * k);
        let squares = weight_gradient(&mut dweight, false, &dy, &x, k);
        let expected = |i: usize| dot((0..rows).map(|row| (dy[row * n + i / k], x[row * k + i % k])));
        close(&dweight, expected, "large");
        let sum: f64 = dweight.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((squares - sum).abs() <= 1e-12 * sum, "squares sum to {squares}, expected {sum}");
    }
}
