//! Operands of the kernel for AMX: numbers as sums of three numbers of bf16.
//!
//! The first part of x is x rounded to bf16, the second what that leaves, rounded, the third what is left then. Each has 8 bits, so
//! they hold all 24 of x. (Below 2^-103 the third may be subnormal, which the tile registers take for zero.)
//!
//! ```text
//! A   steps of 16 rows, each [blocks, 3, 16 rows, 32 inner elements]
//! B   halves of 16 columns, each [pairs of inner elements, 3, 16 columns, 2]
//! ```
//!
//! A block is 32 inner elements, and an operand is padded to whole blocks with zeros. A range of inner elements is multiplied as whole
//! blocks from an even one on; outside of the range the rows have zeros.

use super::pack::interleave;
use super::shared::Shared;
use super::simd::{fetch, fetch_rows, gelu, simd_fn};
use super::tile::{HALF, Segment};
use std::ops::Range;

/// Rows of a step.
pub const STEP: usize = 16;
/// Inner elements of a block.
pub const INNER: usize = 32;
/// Numbers (of 4 bytes) of a block of a step of A, and of a half of B.
pub const BLOCK: usize = PARTS * STEP * INNER / 2;
/// bf16 numbers that a number is the sum of.
const PARTS: usize = 3;

/// Numbers of half a panel, or a step, of `inner` inner elements.
pub fn len(inner: usize) -> usize {
    inner.div_ceil(INNER) * BLOCK
}

/// Where the pair that holds inner element `inner` of half a panel is.
pub fn at(inner: usize) -> usize {
    inner / 2 * PARTS * HALF
}

/// The inner elements that are multiplied for a range of `len`: whole blocks from an even one on.
pub fn padded(range: Range<usize>, len: usize) -> Range<usize> {
    let start = range.start & !1;
    let padded = (range.end - start).next_multiple_of(INNER);
    let start = start.min(len.next_multiple_of(INNER) - padded);
    start..start + padded
}

/// The parts of a number, each in the upper half of its bits.
#[inline(always)]
fn parts(x: f32) -> [u32; PARTS] {
    // To the nearest: adds half of the last bit that stays. Numbers beyond 3.39e38 become infinite,
    // and then the rest is NaN.
    let round = |x: f32| x.to_bits().wrapping_add(0x8000) & 0xFFFF_0000;
    let first = round(x);
    let rest = x - f32::from_bits(first);
    let second = round(rest);
    [first, second, (rest - f32::from_bits(second)).to_bits() & 0xFFFF_0000]
}

/// The bf16 numbers of lines of a block: `[3 * STEP, INNER]`.
fn lines_of(block: &mut [f32; BLOCK]) -> &mut [[u16; INNER]] {
    bytemuck::cast_slice_mut(block.as_mut_slice()).as_chunks_mut().0
}

/// The parts of a line, into line `i` of a block.
#[inline(always)]
fn split_line(to: &mut [[u16; INNER]], i: usize, line: &[f32; INNER]) {
    for k in 0..INNER {
        let parts = parts(line[k]);
        for part in 0..PARTS {
            to[part * STEP + i][k] = (parts[part] >> 16) as u16;
        }
    }
}

simd_fn! {
    /// The parts of up to [`STEP`] rows of `width` numbers, and then zeros.
    fn split_lines<F>(to: &mut [[u16; INNER]], from: &[f32], rows: usize, width: usize, stride: usize) {
        for i in 0..rows {
            let line = &from[i * stride..][..width];
            match line.first_chunk() {
                Some(line) => split_line(to, i, line),
                None => {
                    let mut numbers = [0.0; INNER];
                    numbers[..width].copy_from_slice(line);
                    split_line(to, i, &numbers);
                }
            }
        }
    }
}

simd_fn! {
    /// As [`split_lines`], of the GELU of the numbers.
    fn split_lines_of_gelu<F>(to: &mut [[u16; INNER]], from: &[f32], rows: usize, width: usize, stride: usize) {
        // All of them first. Measured (2 cores of an Intel Xeon): line by line takes a sixth more time.
        let mut lines = [[0.0; INNER]; STEP];
        for (i, to) in lines[..rows].iter_mut().enumerate() {
            let line = &from[i * stride..][..width];
            match line.first_chunk::<INNER>() {
                Some(line) => {
                    for k in 0..INNER {
                        to[k] = gelu::<F>(line[k]);
                    }
                }
                None => to.iter_mut().zip(line).for_each(|(to, &x)| *to = gelu::<F>(x)),
            }
        }
        for (i, line) in lines[..rows].iter().enumerate() {
            split_line(to, i, line);
        }
    }
}

/// Packs a tile of rows of `len` numbers, `stride` apart.
pub fn pack_rows(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    if len == 0 {
        return;
    }
    for (to, first) in to.chunks_mut(len.div_ceil(INNER) * BLOCK).zip((0..rows).step_by(STEP)) {
        let (rows, from) = (STEP.min(rows - first), &from[first * stride..]);
        for (to, k) in to.as_chunks_mut::<BLOCK>().0.iter_mut().zip((0..len).step_by(INNER)) {
            fetch_rows(from.get(k + INNER..).unwrap_or(&[]), rows, INNER, stride);
            split_lines(lines_of(to), &from[k..], rows, INNER.min(len - k), stride);
        }
    }
}

/// [`pack_rows`] of the GELU of the rows.
pub fn pack_rows_of_gelu(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    if len == 0 {
        return;
    }
    for (to, first) in to.chunks_mut(len.div_ceil(INNER) * BLOCK).zip((0..rows).step_by(STEP)) {
        let (rows, from) = (STEP.min(rows - first), &from[first * stride..]);
        for (to, k) in to.as_chunks_mut::<BLOCK>().0.iter_mut().zip((0..len).step_by(INNER)) {
            fetch_rows(from.get(k + INNER..).unwrap_or(&[]), rows, INNER, stride);
            split_lines_of_gelu(lines_of(to), &from[k..], rows, INNER.min(len - k), stride);
        }
    }
}

/// Packs panel `panel` `[2, pairs, 3, HALF]` of `B = W^T`, W row-major `[n, len]`, its lines `stride` apart.
pub fn pack_panel_transposed(to: &mut [f32], w: &[f32], panel: usize, n: usize, inner: usize, stride: usize) {
    let mut transposed = [0.0; INNER * HALF];
    let columns = (2 * panel * HALF..n.min(2 * (panel + 1) * HALF)).step_by(HALF);
    for (first, to) in columns.zip(to.chunks_exact_mut(len(inner))) {
        let rows = HALF.min(n - first);
        let w = &w[first * stride..];
        for (block, to) in to.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let k = block * INNER;
            let count = INNER.min(inner - k);
            fetch_rows(w.get(k + INNER..).unwrap_or(&[]), rows, INNER, stride);
            interleave(&mut transposed, HALF, &w[k..], rows, count, stride);
            let (to, rest) = to.split_at_mut(at(count.next_multiple_of(2)));
            pack_pairs(to, &transposed, count, rows, HALF);
            rest.fill(0.0);
        }
    }
}

simd_fn! {
    /// The parts of pairs of rows, as rows of half a panel: of up to [`HALF`] columns of `rows` rows, `stride` apart. Columns that
    /// are not there are zero, and so is a row that the last pair lacks.
    pub fn pack_pairs<F>(to: &mut [f32], from: &[f32], rows: usize, width: usize, stride: usize) {
        for (to, k) in to.as_chunks_mut::<{ PARTS * HALF }>().0.iter_mut().zip((0..rows).step_by(2)) {
            let low = &from[k * stride..][..width];
            let high = if k + 1 < rows { &from[(k + 1) * stride..][..width] } else { &[] };
            split_pair(to, [low, high]);
        }
    }
}

/// Whole panels of some columns of a row-major B `[inner, n]`, side by side: those from `first` on.
pub fn pack_panels(to: &mut [f32], b: &[f32], first: usize, n: usize, inner: usize) {
    let (half, columns) = (len(inner), first..(first + to.len() / len(inner) * HALF).min(n));
    pack_columns(to, half, b, columns, n, inner, inner.next_multiple_of(INNER));
}

simd_fn! {
    /// The parts of pairs of rows of a row-major B of `n` columns, as rows of halves, which start `half` apart: of some columns of
    /// `rows` rows, and then zeros up to `padded`. Lines are read in the order in which they lie.
    pub fn pack_columns<F>(
        to: &mut [f32],
        half: usize,
        b: &[f32],
        columns: Range<usize>,
        n: usize,
        rows: usize,
        padded: usize,
    ) {
        /// Pairs of lines from one that is read to the one that is fetched meanwhile.
        const AHEAD: usize = 4;
        for (pair, k) in (0..padded).step_by(2).enumerate() {
            for (i, start) in columns.clone().step_by(HALF).enumerate() {
                let width = HALF.min(columns.end - start);
                let low = if k < rows { &b[k * n + start..][..width] } else { &[] };
                let high = if k + 1 < rows { &b[(k + 1) * n + start..][..width] } else { &[] };
                for line in [low, high] {
                    fetch(line.as_ptr().wrapping_add(2 * AHEAD * n));
                }
                let to = to[i * half + pair * PARTS * HALF..].first_chunk_mut().expect("a pair of half a panel");
                split_pair(to, [low, high]);
            }
        }
    }
}

/// A pair of lines of up to [`HALF`] numbers: the rest is zero.
#[inline(always)]
fn split_pair(to: &mut [f32; PARTS * HALF], lines: [&[f32]; 2]) {
    match lines.map(<[f32]>::first_chunk) {
        [Some(low), Some(high)] => split_whole_pair(to, [low, high]),
        _ => split_whole_pair(to, lines.map(whole_line).each_ref()),
    }
}

/// A line as [`HALF`] numbers, of which those that it has not are zero.
#[cold]
fn whole_line(line: &[f32]) -> [f32; HALF] {
    let mut whole = [0.0; HALF];
    whole[..line.len()].copy_from_slice(line);
    whole
}

#[inline(always)]
fn split_whole_pair(to: &mut [f32; PARTS * HALF], [low, high]: [&[f32; HALF]; 2]) {
    for j in 0..HALF {
        let (low, high) = (parts(low[j]), parts(high[j]));
        for part in 0..PARTS {
            to[part * HALF + j] = f32::from_bits(low[part] >> 16 | high[part]);
        }
    }
    // As in `products::mix_halves`.
    std::hint::black_box(());
}

/// Puts lines of channels into steps of A whose rows are channels and whose inner elements are `rows` rows: into those steps that
/// `channels` meet. Lines are `stride` apart and hold whole steps; the first is row `first`, an even one. After the last of all rows
/// come zeros to the end of its block.
///
/// # Safety
/// Nobody else may access these rows.
pub unsafe fn scatter(to: &Shared, lines: &[f32], stride: usize, channels: Range<usize>, first: usize, rows: usize) {
    let end = first + lines.len() / stride;
    assert!(first.is_multiple_of(2) && end <= rows, "lines of more rows than there are");
    let (mut pairs, mut columns) = ([0.0; BLOCK], [0.0; BLOCK]);
    for step in channels.start / STEP..channels.end.div_ceil(STEP) {
        let mut row = first;
        while row < end {
            let (block, before) = (row / INNER, row % INNER / 2);
            let count = ((block + 1) * INNER).min(end) - row;
            let after = if row + count == rows { INNER / 2 } else { before + count.div_ceil(2) };
            let (of_rows, rest) = pairs.split_at_mut(count.div_ceil(2) * PARTS * HALF);
            pack_pairs(of_rows, &lines[(row - first) * stride + step * STEP..], count, STEP, stride);
            rest.fill(0.0);
            let at = (step * rows.div_ceil(INNER) + block) * BLOCK;
            if before == 0 && after == INNER / 2 {
                // SAFETY: all of a block.
                transpose_pairs(unsafe { to.slice(at..at + BLOCK) }, &pairs);
            } else {
                transpose_pairs(&mut columns, &pairs);
                for (line, from) in columns.chunks_exact(INNER / 2).enumerate() {
                    let at = at + line * INNER / 2;
                    // SAFETY: these rows of a block.
                    unsafe { to.slice(at + before..at + after) }.copy_from_slice(&from[..after - before]);
                }
            }
            row += count;
        }
    }
}

/// The parts of 16 pairs of 16 columns, as those of 16 lines of 16 pairs.
fn transpose_pairs(to: &mut [f32], pairs: &[f32; BLOCK]) {
    for (part, to) in to.chunks_exact_mut(BLOCK / PARTS).enumerate() {
        interleave(to, INNER / 2, &pairs[part * HALF..], INNER / 2, STEP, PARTS * HALF);
    }
}

/// What the kernel for AMX computes, bit for bit: its specification, and what tests have where there is none. See
/// [`super::tile::multiply_split`].
pub fn multiply(
    sums: &mut [[f32; 2 * HALF]],
    add: bool,
    [steps, halves]: [usize; 2],
    step: usize,
    Segment { a, b, .. }: Segment,
    blocks: usize,
) {
    // The tile registers take subnormal numbers for zero, and make none.
    let flush = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    let of_pair =
        |pair: f32| [pair.to_bits() << 16, pair.to_bits() & 0xFFFF_0000].map(|bits| flush(f32::from_bits(bits)));
    for (i, j) in (0..steps * STEP).flat_map(|i| (0..halves * HALF).map(move |j| (i, j))) {
        let mut sum = if add { sums[i][j] } else { 0.0 };
        for block in 0..blocks {
            for [of_a, of_b] in [[0, 2], [0, 1], [1, 1], [1, 0], [2, 0], [0, 0]] {
                let mut products = [0.0f32; 2];
                for pair in 0..INNER / 2 {
                    let a = of_pair(a[i / STEP * step + block * BLOCK + (of_a * STEP + i % STEP) * INNER / 2 + pair]);
                    let b = of_pair(b[j / HALF][block * BLOCK + (pair * PARTS + of_b) * HALF + j % HALF]);
                    for k in 0..2 {
                        products[k] = flush(a[k].mul_add(b[k], products[k]));
                    }
                }
                sum = flush(flush(products[0] + products[1]) + flush(sum));
            }
        }
        sums[i][j] = sum;
    }
}

/// Inner element `k` of column `j` of half a panel: the sum of its parts.
#[cfg(test)]
pub fn in_half(half: &[f32], k: usize, j: usize) -> f32 {
    let part = |part: usize| {
        let pair = half[k / 2 * PARTS * HALF + part * HALF + j].to_bits();
        f32::from_bits(if k.is_multiple_of(2) { pair << 16 } else { pair & 0xFFFF_0000 })
    };
    (part(2) + part(1)) + part(0)
}
