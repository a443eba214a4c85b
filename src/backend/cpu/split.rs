//! Operands of the kernels for AMX: numbers as sums of numbers of bf16.
//!
//! The first part of x is x rounded to bf16: for products in bf16 there is no other. For those in f32 the second is what that leaves,
//! rounded, the third what is left then. Each has 8 bits, so the three hold all 24 of x. (Below 2^-103 the third may be subnormal,
//! which the tile registers take for zero.)
//!
//! ```text
//! A   steps of 16 rows, each [blocks, parts, 16 rows, 32 inner elements]
//! B   halves of 16 columns, each [pairs of inner elements, parts, 16 columns, 2]
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
/// Numbers of bf16 that a number is the sum of, where products are in f32.
pub const EXACT: usize = 3;
/// The same, where products are in bf16: a number is rounded to one.
pub const ROUNDED: usize = 1;

/// `$call` with the number of parts as a constant of this name.
macro_rules! by_parts {
    ($parts:expr, $name:ident => $call:expr) => {
        match $parts {
            $crate::backend::cpu::split::EXACT => {
                const $name: usize = $crate::backend::cpu::split::EXACT;
                $call
            }
            $crate::backend::cpu::split::ROUNDED => {
                const $name: usize = $crate::backend::cpu::split::ROUNDED;
                $call
            }
            _ => unreachable!("another number of parts"),
        }
    };
}
pub(super) use by_parts;

/// Numbers (of 4 bytes) of a block of a step of A, and of a half of B.
pub const fn block(parts: usize) -> usize {
    parts * STEP * INNER / 2
}

/// Numbers of half a panel, or a step, of `inner` inner elements.
pub fn len(parts: usize, inner: usize) -> usize {
    inner.div_ceil(INNER) * block(parts)
}

/// Where the pair that holds inner element `inner` of half a panel is.
pub fn at(parts: usize, inner: usize) -> usize {
    inner / 2 * parts * HALF
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
fn parts<const P: usize>(x: f32) -> [u32; P] {
    // To the nearest: adds half of the last bit that stays. Numbers beyond 3.39e38 become infinite, and then the rest is NaN.
    let round = |x: f32| x.to_bits().wrapping_add(0x8000) & 0xFFFF_0000;
    if P == ROUNDED {
        // The bits of a NaN must not overflow; where there is a rest, that is NaN too.
        return [if x.is_nan() { x.to_bits() | 0x0040_0000 } else { round(x) } & 0xFFFF_0000; P];
    }
    let mut rest = x;
    std::array::from_fn(|part| {
        if part + 1 == P {
            return rest.to_bits() & 0xFFFF_0000;
        }
        let rounded = round(rest);
        rest -= f32::from_bits(rounded);
        rounded
    })
}

/// A number as products in bf16 read it.
#[cfg(test)]
pub fn rounded(x: f32) -> f32 {
    f32::from_bits(parts::<ROUNDED>(x)[0])
}

/// The bf16 numbers of lines of a block: `[parts * STEP, INNER]`.
fn lines_of(block: &mut [f32]) -> &mut [[u16; INNER]] {
    bytemuck::cast_slice_mut(block).as_chunks_mut().0
}

/// The parts of a line, into line `i` of a block.
#[inline(always)]
fn split_line<const P: usize>(to: &mut [[u16; INNER]], i: usize, line: &[f32; INNER]) {
    for k in 0..INNER {
        let parts = parts::<P>(line[k]);
        for part in 0..P {
            to[part * STEP + i][k] = (parts[part] >> 16) as u16;
        }
    }
}

simd_fn! {
    /// The parts of up to [`STEP`] rows of `width` numbers, and then zeros.
    fn split_lines<F, const P: usize>(to: &mut [[u16; INNER]], from: &[f32], rows: usize, width: usize, stride: usize) {
        for i in 0..rows {
            let line = &from[i * stride..][..width];
            match line.first_chunk() {
                Some(line) => split_line::<P>(to, i, line),
                None => {
                    let mut numbers = [0.0; INNER];
                    numbers[..width].copy_from_slice(line);
                    split_line::<P>(to, i, &numbers);
                }
            }
        }
    }
}

simd_fn! {
    /// As [`split_lines`], of the GELU of the numbers.
    fn split_lines_of_gelu<F, const P: usize>(to: &mut [[u16; INNER]], from: &[f32], rows: usize, width: usize, stride: usize) {
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
            split_line::<P>(to, i, line);
        }
    }
}

/// Packs a tile of rows of `len` numbers, `stride` apart.
pub fn pack_rows<const P: usize>(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    pack_blocks::<P>(to, from, [rows, len, stride], split_lines::<P>);
}

/// [`pack_rows`] of the GELU of the rows.
pub fn pack_rows_of_gelu<const P: usize>(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    pack_blocks::<P>(to, from, [rows, len, stride], split_lines_of_gelu::<P>);
}

/// Packs a tile of rows block by block: `split` makes the parts of a block's lines.
#[inline(always)]
fn pack_blocks<const P: usize>(
    to: &mut [f32],
    from: &[f32],
    [rows, len, stride]: [usize; 3],
    split: impl Fn(&mut [[u16; INNER]], &[f32], usize, usize, usize),
) {
    if len == 0 {
        return;
    }
    for (to, first) in to.chunks_mut(self::len(P, len)).zip((0..rows).step_by(STEP)) {
        let (rows, from) = (STEP.min(rows - first), &from[first * stride..]);
        for (to, k) in to.chunks_exact_mut(block(P)).zip((0..len).step_by(INNER)) {
            fetch_rows(from.get(k + INNER..).unwrap_or(&[]), rows, INNER, stride);
            split(lines_of(to), &from[k..], rows, INNER.min(len - k), stride);
        }
    }
}

/// Packs panel `panel` `[2, pairs, parts, HALF]` of `B = W^T`, W row-major `[n, len]`, its lines `stride` apart.
pub fn pack_panel_transposed<const P: usize>(
    to: &mut [f32],
    w: &[f32],
    panel: usize,
    n: usize,
    inner: usize,
    stride: usize,
) {
    let mut transposed = [0.0; INNER * HALF];
    let columns = (2 * panel * HALF..n.min(2 * (panel + 1) * HALF)).step_by(HALF);
    for (first, to) in columns.zip(to.chunks_exact_mut(len(P, inner))) {
        let rows = HALF.min(n - first);
        let w = &w[first * stride..];
        for (number, to) in to.chunks_exact_mut(block(P)).enumerate() {
            let k = number * INNER;
            let count = INNER.min(inner - k);
            fetch_rows(w.get(k + INNER..).unwrap_or(&[]), rows, INNER, stride);
            interleave(&mut transposed, HALF, &w[k..], rows, count, stride);
            let (to, rest) = to.split_at_mut(at(P, count.next_multiple_of(2)));
            pack_pairs::<P>(to, &transposed, count, rows, HALF);
            rest.fill(0.0);
        }
    }
}

simd_fn! {
    /// The parts of pairs of rows, as rows of half a panel: of up to [`HALF`] columns of `rows` rows, `stride` apart. Columns that
    /// are not there are zero, and so is a row that the last pair lacks.
    pub fn pack_pairs<F, const P: usize>(to: &mut [f32], from: &[f32], rows: usize, width: usize, stride: usize) {
        for (to, k) in pairs_of(to).iter_mut().zip((0..rows).step_by(2)) {
            let low = &from[k * stride..][..width];
            let high = if k + 1 < rows { &from[(k + 1) * stride..][..width] } else { &[] };
            split_pair::<P>(to, [low, high]);
        }
    }
}

/// The pairs of rows of half a panel.
#[inline(always)]
fn pairs_of<const P: usize>(half: &mut [f32]) -> &mut [[[f32; HALF]; P]] {
    half.as_chunks_mut().0.as_chunks_mut().0
}

/// Whole panels of some columns of a row-major B `[inner, n]`, side by side: those from `first` on.
pub fn pack_panels<const P: usize>(to: &mut [f32], b: &[f32], first: usize, n: usize, inner: usize) {
    let half = len(P, inner);
    let columns = first..(first + to.len() / half * HALF).min(n);
    pack_columns::<P>(to, half, b, columns, n, inner, inner.next_multiple_of(INNER));
}

simd_fn! {
    /// The parts of pairs of rows of a row-major B of `n` columns, as rows of halves, which start `half` apart: of some columns of
    /// `rows` rows, and then zeros up to `padded`. Lines are read in the order in which they lie.
    pub fn pack_columns<F, const P: usize>(
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
                let to = &mut pairs_of(&mut to[i * half + pair * P * HALF..][..P * HALF])[0];
                split_pair::<P>(to, [low, high]);
            }
        }
    }
}

/// A pair of lines of up to [`HALF`] numbers: the rest is zero.
#[inline(always)]
fn split_pair<const P: usize>(to: &mut [[f32; HALF]; P], lines: [&[f32]; 2]) {
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
fn split_whole_pair<const P: usize>(to: &mut [[f32; HALF]; P], [low, high]: [&[f32; HALF]; 2]) {
    for j in 0..HALF {
        let (low, high) = (parts::<P>(low[j]), parts::<P>(high[j]));
        for part in 0..P {
            to[part][j] = f32::from_bits(low[part] >> 16 | high[part]);
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
pub unsafe fn scatter<const P: usize>(
    to: &Shared,
    lines: &[f32],
    stride: usize,
    channels: Range<usize>,
    first: usize,
    rows: usize,
) {
    let end = first + lines.len() / stride;
    assert!(first.is_multiple_of(2) && end <= rows, "lines of more rows than there are");
    let [mut pairs, mut columns] = [[0.0; block(EXACT)]; 2];
    let [pairs, columns] = [&mut pairs, &mut columns].map(|room| &mut room[..block(P)]);
    for step in channels.start / STEP..channels.end.div_ceil(STEP) {
        let mut row = first;
        while row < end {
            let (number, before) = (row / INNER, row % INNER / 2);
            let count = ((number + 1) * INNER).min(end) - row;
            let after = if row + count == rows { INNER / 2 } else { before + count.div_ceil(2) };
            let (of_rows, rest) = pairs.split_at_mut(at(P, count.next_multiple_of(2)));
            pack_pairs::<P>(of_rows, &lines[(row - first) * stride + step * STEP..], count, STEP, stride);
            rest.fill(0.0);
            let at = step * len(P, rows) + number * block(P);
            if before == 0 && after == INNER / 2 {
                // SAFETY: all of a block.
                transpose_pairs::<P>(unsafe { to.slice(at..at + block(P)) }, pairs);
            } else {
                transpose_pairs::<P>(columns, pairs);
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
fn transpose_pairs<const P: usize>(to: &mut [f32], pairs: &[f32]) {
    for (part, to) in to.chunks_exact_mut(block(ROUNDED)).enumerate() {
        interleave(to, INNER / 2, &pairs[part * HALF..], INNER / 2, STEP, P * HALF);
    }
}

simd_fn! {
    /// What the kernels for AMX compute, bit for bit: their specification, and what there is where there are none. See
    /// [`super::tile::multiply_split`].
    pub fn multiply<F>(
        parts: usize,
        sums: &mut [[f32; 2 * HALF]],
        add: bool,
        steps_and_halves: [usize; 2],
        step: usize,
        segment: Segment,
        blocks: usize,
    ) {
        let ([steps, halves], Segment { a, b, .. }) = (steps_and_halves, segment);
        let products_of: &[_] =
            if parts == EXACT { &[[0, 2], [0, 1], [1, 1], [1, 0], [2, 0], [0, 0]] } else { &[[0, 0]] };
        // The tile registers take subnormal numbers for zero, and make none.
        let flush = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
        let of_pair =
            |pair: f32| [pair.to_bits() << 16, pair.to_bits() & 0xFFFF_0000].map(|bits| flush(f32::from_bits(bits)));
        for (i, half) in (0..steps * STEP).flat_map(|i| (0..halves).map(move |half| (i, half))) {
            let to = &mut sums[i].as_chunks_mut::<HALF>().0[half];
            let mut of_half = if add { *to } else { [0.0; HALF] };
            for (block, &[of_a, of_b]) in (0..blocks).flat_map(|block| products_of.iter().map(move |of| (block, of))) {
                let lines = a[i / STEP * step + block * self::block(parts)..].as_chunks::<{ INNER / 2 }>().0;
                let pairs = b[half][block * self::block(parts)..].as_chunks::<HALF>().0;
                let mut products = [[0.0f32; HALF]; 2];
                for (pair, &of_line) in lines[of_a * STEP + i % STEP].iter().enumerate() {
                    let (of_line, pairs) = (of_pair(of_line), &pairs[pair * parts + of_b]);
                    for j in 0..HALF {
                        let pair = of_pair(pairs[j]);
                        for k in 0..2 {
                            products[k][j] = flush(of_line[k].mul_add(pair[k], products[k][j]));
                        }
                    }
                }
                for j in 0..HALF {
                    of_half[j] = flush(flush(products[0][j] + products[1][j]) + flush(of_half[j]));
                }
            }
            *to = of_half;
        }
    }
}

/// Inner element `k` of column `j` of half a panel: the sum of its parts, the smallest first.
#[cfg(test)]
pub fn in_half(parts: usize, half: &[f32], k: usize, j: usize) -> f32 {
    let part = |part: usize| {
        let pair = half[k / 2 * parts * HALF + part * HALF + j].to_bits();
        f32::from_bits(if k.is_multiple_of(2) { pair << 16 } else { pair & 0xFFFF_0000 })
    };
    (0..parts).rev().map(part).sum()
}
