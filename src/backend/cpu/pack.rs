//! Operands of products in the layouts that [`super::tile`] reads.

use super::shared::Shared;
#[cfg(target_arch = "x86_64")]
use super::simd::{Level, level};
use super::simd::{fetch, fetch_rows, gelu, simd_fn};
use super::tile::{HALF, MAX_ROWS, PANEL, packed_stride, step_rows, steps_of};
use crate::routing::Window;

/// Interleaves `rows` rows (`stride` apart) of `len` elements: `to[k * to_stride + i] = from[i * stride + k]`. Elements of
/// `to` that belong to no row, up to the next multiple of 8, may be overwritten. `to_stride` is at least that multiple; for up to
/// 8 rows it need only be their number, and then up to 7 elements behind the last are overwritten.
#[inline]
pub fn interleave(to: &mut [f32], to_stride: usize, from: &[f32], rows: usize, len: usize, stride: usize) {
    if rows == 0 || len == 0 {
        return;
    }
    // Saturated, so that no stride wraps round to a place inside: no slice is that long.
    let end = |lines: usize, stride: usize, last: usize| (lines - 1).saturating_mul(stride).saturating_add(last);
    let width = rows.div_ceil(8).saturating_mul(8);
    // Of up to 8 rows each element is written in turn, and what an earlier one wrote beyond its rows is overwritten.
    let apart = width <= to_stride || width == 8 && rows <= to_stride;
    assert!(apart && end(len, to_stride, width) <= to.len(), "too small for interleaved rows");
    assert!(end(rows, stride, len) <= from.len(), "interleaved rows exceed their data");
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Baseline {
        // SAFETY: the processor has AVX2, or AVX-512 where it is asked for, and the bounds were checked.
        unsafe {
            if rows == 16 && level() != Level::Avx2 {
                transpose::interleave16(to, to_stride, from, len, stride);
            } else {
                transpose::interleave(to, to_stride, from, rows, len, stride);
            }
        }
        return;
    }
    for i in 0..rows {
        for k in 0..len {
            to[k * to_stride + i] = from[i * stride + k];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod transpose {
    use std::arch::x86_64::{
        __m256, _mm_loadu_ps, _mm256_castps128_ps256, _mm256_insertf128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_castps128_ps512, _mm512_insertf32x4, _mm512_shuffle_ps,
        _mm512_storeu_ps, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    };

    /// # Safety
    /// The processor has AVX2; see [`super::interleave`] for the bounds.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn interleave(
        to: &mut [f32],
        to_stride: usize,
        from: &[f32],
        rows: usize,
        len: usize,
        stride: usize,
    ) {
        let whole = len / 4 * 4;
        for first in (0..rows).step_by(8) {
            // Rows beyond the last are the last one again: their place in `to` is of no meaning.
            let row: [usize; 8] = std::array::from_fn(|i| (first + i).min(rows - 1) * stride);
            for k in (0..whole).step_by(4) {
                // SAFETY: `row[i] + k + 4 <= (rows - 1) * stride + len`; the last store ends at
                // `(k + 3) * to_stride + first + 8 <= (len - 1) * to_stride + width`.
                unsafe {
                    let four = |i: usize| _mm_loadu_ps(from.as_ptr().add(row[i] + k));
                    let pair = |i: usize| _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(four(i)), four(i + 4));
                    let columns = transpose4([pair(0), pair(1), pair(2), pair(3)]);
                    for (i, &column) in columns.iter().enumerate() {
                        _mm256_storeu_ps(to.as_mut_ptr().add((k + i) * to_stride + first), column);
                    }
                }
            }
            for k in whole..len {
                for i in first..(first + 8).min(rows) {
                    to[k * to_stride + i] = from[i * stride + k];
                }
            }
        }
    }

    /// 16 rows.
    ///
    /// # Safety
    /// The processor has AVX-512F; see [`super::interleave`] for the bounds.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn interleave16(to: &mut [f32], to_stride: usize, from: &[f32], len: usize, stride: usize) {
        let whole = len / 4 * 4;
        for k in (0..whole).step_by(4) {
            // SAFETY: the loads end at `15 * stride + len` or before, the last store at `(len - 1) * to_stride + 16`.
            unsafe {
                let from = from.as_ptr().add(k);
                let four = |i: usize| _mm_loadu_ps(from.add(i * stride));
                let lines = [0, 1, 2, 3].map(|i| {
                    let line = _mm512_castps128_ps512(four(i));
                    let line = _mm512_insertf32x4::<1>(line, four(i + 4));
                    let line = _mm512_insertf32x4::<2>(line, four(i + 8));
                    _mm512_insertf32x4::<3>(line, four(i + 12))
                });
                let (a, b) = (_mm512_unpacklo_ps(lines[0], lines[1]), _mm512_unpacklo_ps(lines[2], lines[3]));
                let (c, d) = (_mm512_unpackhi_ps(lines[0], lines[1]), _mm512_unpackhi_ps(lines[2], lines[3]));
                let columns = [
                    _mm512_shuffle_ps::<0x44>(a, b),
                    _mm512_shuffle_ps::<0xEE>(a, b),
                    _mm512_shuffle_ps::<0x44>(c, d),
                    _mm512_shuffle_ps::<0xEE>(c, d),
                ];
                for (i, &column) in columns.iter().enumerate() {
                    _mm512_storeu_ps(to.as_mut_ptr().add((k + i) * to_stride), column);
                }
            }
        }
        for k in whole..len {
            for i in 0..16 {
                to[k * to_stride + i] = from[i * stride + k];
            }
        }
    }

    /// Transposes the 4 x 4 numbers in each half of the vectors.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose4(r: [__m256; 4]) -> [__m256; 4] {
        let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpacklo_ps(r[2], r[3]));
        let (c, d) = (_mm256_unpackhi_ps(r[0], r[1]), _mm256_unpackhi_ps(r[2], r[3]));
        [
            _mm256_shuffle_ps::<0x44>(a, b),
            _mm256_shuffle_ps::<0xEE>(a, b),
            _mm256_shuffle_ps::<0x44>(c, d),
            _mm256_shuffle_ps::<0xEE>(c, d),
        ]
    }
}

/// Packs a tile of rows of `len` numbers, `stride` apart, as [`Rows::packed`](super::tile::Rows::packed) says; `to` has
/// [`packed_len`](super::tile::packed_len) numbers.
pub fn pack_rows(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    let of_step = packed_stride();
    for (number, step) in steps_of(rows).enumerate() {
        let from = &from[step.start * stride..];
        interleave(&mut to[number * of_step * len..], of_step, from, step.len(), len, stride);
    }
}

/// Inner elements that are transposed while the next ones are fetched, which are far apart in memory. Measured (2 cores of an Intel
/// Xeon): a step of DiT-S/4 takes 5 % less time than when the rows are fetched whole beforehand.
const BLOCK: usize = 64;
/// Lines that are copied while the next one is fetched, for the same reason: 2 to 3 %.
const LINES: usize = 16;

/// [`pack_rows`] of the GELU of the rows.
pub fn pack_rows_of_gelu(to: &mut [f32], from: &[f32], rows: usize, len: usize, stride: usize) {
    let of_step = packed_stride();
    let mut lines = [[0.0; BLOCK]; MAX_ROWS];
    for (number, step) in steps_of(rows).enumerate() {
        let (to, from) = (&mut to[number * of_step * len..], &from[step.start * stride..]);
        let lines = &mut lines[..step.len()];
        for k in (0..len).step_by(BLOCK) {
            fetch_rows(from.get(k + BLOCK..).unwrap_or(&[]), step.len(), BLOCK, stride);
            let width = BLOCK.min(len - k);
            gelu_of_rows(lines, &from[k..], width, stride);
            interleave(&mut to[k * of_step..], of_step, lines.as_flattened(), step.len(), width, BLOCK);
        }
    }
}

simd_fn! {
    fn gelu_of_rows<F>(to: &mut [[f32; BLOCK]], from: &[f32], width: usize, stride: usize) {
        for (i, to) in to.iter_mut().enumerate() {
            for (to, &x) in to[..width].iter_mut().zip(&from[i * stride..][..width]) {
                *to = gelu::<F>(x);
            }
        }
    }
}

/// Packs panel `panel` `[2, len, HALF]` of `B = W^T`, W row-major `[n, len]`, its lines `stride` apart: column j of a half is
/// row `panel * PANEL + half * HALF + j` of W.
pub fn pack_panel_transposed(to: &mut [f32], w: &[f32], panel: usize, n: usize, len: usize, stride: usize) {
    let columns = panel * PANEL..((panel + 1) * PANEL).min(n);
    for (first, to) in columns.clone().step_by(HALF).zip(to.chunks_exact_mut(len * HALF)) {
        let rows = HALF.min(columns.end - first);
        let w = &w[first * stride..];
        if rows < HALF {
            // The columns that are not there are multiplied too, and small numbers in them could take many times as long.
            to.fill(0.0);
        }
        if first == columns.start {
            fetch_rows(w, rows, BLOCK.min(len), stride);
        }
        for k in (0..len).step_by(BLOCK) {
            // At the end of a half the next half, be it of this panel or of the next.
            let next = if k + BLOCK < len { k + BLOCK } else { HALF * stride };
            fetch_rows(w.get(next..).unwrap_or(&[]), rows, BLOCK.min(len), stride);
            interleave(&mut to[k * HALF..], HALF, &w[k..], rows, BLOCK.min(len - k), stride);
        }
    }
}

simd_fn! {
    /// Packs panel `panel` of a row-major B of `n` columns (lines `stride` apart): a copy of as many lines as the halves hold.
    pub fn pack_panel<F>(halves: [&mut [f32]; 2], b: &[f32], panel: usize, n: usize, stride: usize) {
        let first = panel * PANEL;
        let width = PANEL.min(n - first);
        let [left, right] = halves;
        let halves = left.as_chunks_mut::<HALF>().0.iter_mut().zip(right.as_chunks_mut::<HALF>().0);
        fetch_rows(b.get(first..).unwrap_or(&[]), LINES, width, stride);
        for (k, (left, right)) in halves.enumerate() {
            let from = &b[k * stride + first..];
            if let Some(ahead) = from.get(LINES * stride..) {
                fetch_rows(ahead, 1, width, stride);
            }
            match from.first_chunk::<PANEL>() {
                Some(from) if width == PANEL => {
                    left.copy_from_slice(&from[..HALF]);
                    right.copy_from_slice(&from[HALF..]);
                }
                _ => {
                    let (of_left, of_right) = from[..width].split_at(HALF.min(width));
                    left[..of_left.len()].copy_from_slice(of_left);
                    left[of_left.len()..].fill(0.0);
                    right[..of_right.len()].copy_from_slice(of_right);
                    right[of_right.len()..].fill(0.0);
                }
            }
        }
    }
}

/// Lines from one that is copied to the one that is fetched meanwhile.
const LINES_AHEAD: usize = 8;

simd_fn! {
    /// The panels of the columns of a row-major B `[len, n]` from `first` on, as many as `to` holds, side by side: longer parts of
    /// lines come faster from memory.
    pub fn pack_panels<F>(to: &mut [f32], b: &[f32], first: usize, n: usize, len: usize) {
        let columns = first..(first + to.len() / len).min(n);
        for k in 0..len {
            for (half, from) in b[k * n..][columns.clone()].chunks(HALF).enumerate() {
                fetch(from.as_ptr().wrapping_add(LINES_AHEAD * n));
                let to = &mut to[(half * len + k) * HALF..][..HALF];
                match from.first_chunk::<HALF>() {
                    Some(from) => to.copy_from_slice(from),
                    None => {
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(0.0);
                    }
                }
            }
        }
    }
}

/// Numbers that [`whole_halves`] needs.
pub fn whole_halves_len(rows: usize, columns: usize) -> usize {
    if columns.is_multiple_of(HALF) { 0 } else { rows * columns.next_multiple_of(HALF) }
}

/// A row-major matrix whose rows hold a multiple of [`HALF`] columns, as operand B, and the distance between its rows: where
/// it is, or copied to `room` with longer rows.
pub fn whole_halves<'a>(room: &'a mut [f32], matrix: &'a [f32], columns: usize) -> (&'a [f32], usize) {
    if columns.is_multiple_of(HALF) {
        return (matrix, columns);
    }
    let stride = columns.next_multiple_of(HALF);
    for (to, row) in room.chunks_exact_mut(stride).zip(matrix.chunks_exact(columns)) {
        to[..columns].copy_from_slice(row);
        to[columns..].fill(0.0);
    }
    (room, stride)
}

/// Lines of channels as a part of `[groups(C), rows, packed_stride()]`, which are the packed rows of an operand A whose rows are
/// the channels: of those groups that the window meets, all columns. Lines are `stride` apart and hold whole groups; the first is
/// row `first`.
///
/// # Safety
/// Nobody else may access these rows.
pub unsafe fn scatter(to: &Shared, lines: &[f32], stride: usize, window: Window, first: usize, rows: usize) {
    match step_rows() {
        // SAFETY: the contract is the same.
        6 => unsafe { scatter_groups::<6>(to, lines, stride, window, first, rows) },
        // SAFETY: the contract is the same.
        14 => unsafe { scatter_groups::<14>(to, lines, stride, window, first, rows) },
        _ => unreachable!("a step of another height"),
    }
}

/// # Safety
/// That of [`scatter`].
unsafe fn scatter_groups<const N: usize>(
    to: &Shared,
    lines: &[f32],
    stride: usize,
    window: Window,
    first: usize,
    rows: usize,
) {
    let (width, count) = (packed_stride(), lines.len() / stride);
    assert!(first + count <= rows, "lines of more rows than there are");
    for group in window.start / N..window.end().div_ceil(N) {
        let at = (group * rows + first) * width;
        // SAFETY: a part of these rows of the group.
        let to = unsafe { to.slice(at..at + count * width) };
        for (to, line) in to.chunks_exact_mut(width).zip(lines.chunks_exact(stride)) {
            let from: &[f32; N] = line[group * N..].first_chunk().expect("a line holds whole groups");
            *to.first_chunk_mut().expect("a group fits into its distance") = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::numbers;
    use super::super::packed::Format;
    use super::super::tile::{of_panel_mut, packed_len, panels, tile_rows};
    use super::*;

    #[test]
    fn packed_operands_hold_the_matrix() {
        let lens = [1, 8, 9, 24, 13, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3];
        for (n, len) in [1, 3, 16, 33, 70].into_iter().flat_map(|n| lens.map(|len| (n, len))) {
            // Lines that end with the matrix, and lines that go on.
            for (stride, of_b) in [(len, n), (len + 5, n + 3)] {
                let (w, b) = (numbers(3, n * stride), numbers(4, len * of_b));
                for panel in 0..panels(n) {
                    let (mut transposed, mut copied) = (vec![f32::NAN; len * PANEL], vec![f32::NAN; len * PANEL]);
                    pack_panel_transposed(&mut transposed, &w, panel, n, len, stride);
                    pack_panel(of_panel_mut(&mut copied), &b, panel, n, of_b);
                    for (k, j) in (0..len).flat_map(|k| (0..PANEL.min(n - panel * PANEL)).map(move |j| (k, j))) {
                        let (column, at) = (panel * PANEL + j, (j / HALF * len + k) * HALF + j % HALF);
                        let expected = [w[column * stride + k], b[k * of_b + column]];
                        assert_eq!([transposed[at], copied[at]], expected, "panel {panel} of {n} x {len}, {stride}");
                    }
                    let width = PANEL.min(n - panel * PANEL);
                    for (k, j) in (0..len).flat_map(|k| (width..width.next_multiple_of(HALF)).map(move |j| (k, j))) {
                        let at = (j / HALF * len + k) * HALF + j % HALF;
                        let known = [0.0, w[(panel * PANEL + width - 1) * stride + k]];
                        assert!(known.contains(&transposed[at]), "column {j} of {width} is multiplied too");
                        assert_eq!(copied[at], 0.0, "column {j} of {width} is multiplied too");
                    }
                }
            }
        }
    }

    #[test]
    fn packed_rows_are_in_the_order_of_steps() {
        for (rows, len) in (1..=tile_rows()).flat_map(|rows| [0, 1, 3, 4, 9, 16].map(|len| (rows, len))) {
            let stride = len + 2;
            let (from, mut to) = (numbers(5, rows * stride), vec![f32::NAN; packed_len(rows, len)]);
            pack_rows(&mut to, &from, rows, len, stride);
            let mut first = 0;
            for step in steps_of(rows) {
                for (i, k) in step.clone().enumerate().flat_map(|(i, _)| (0..len).map(move |k| (i, k))) {
                    let expected = from[(step.start + i) * stride + k];
                    assert_eq!(to[first + k * packed_stride() + i], expected, "{rows} rows of {len}: {step:?}, {k}");
                }
                first += len * packed_stride();
            }
        }
    }

    #[test]
    fn channels_are_scattered_to_the_groups_that_the_window_meets() {
        let (c, rows, count) = (5 * step_rows() - 3, 7, 4);
        let stride = Format::Numbers.padded_columns(c);
        let lines = numbers(8, count * stride);
        for (start, width) in [(0, 1), (0, c), (c - 1, 1), (step_rows() - 1, 2), (step_rows(), step_rows())] {
            let window = Window { start, width };
            let mut to = vec![f32::NAN; Format::Numbers.groups(c) * rows * packed_stride()];
            // SAFETY: nobody else has it.
            unsafe { scatter(&Shared::new(&mut to), &lines, stride, window, 2, rows) };
            for (at, &got) in to.iter().enumerate() {
                let (group, row, i) = (at / packed_stride() / rows, at / packed_stride() % rows, at % packed_stride());
                let met = (window.start / step_rows()..=(window.end() - 1) / step_rows()).contains(&group);
                if met && (2..2 + count).contains(&row) && i < step_rows() {
                    assert_eq!(got, lines[(row - 2) * stride + group * step_rows() + i], "{at} for {window:?}");
                } else {
                    assert!(got.is_nan(), "{at} is written for {window:?}");
                }
            }
        }
    }

    /// Three numbers of each row.
    fn is_refused(to_stride: usize, rows: usize, stride: usize) -> bool {
        let result = std::panic::catch_unwind(|| interleave(&mut [0.0; 64], to_stride, &[0.0; 64], rows, 3, stride));
        let message = |why: Box<dyn std::any::Any + Send>| why.downcast::<&str>().expect("a message without numbers");
        result.is_err_and(|why| message(why).contains("interleaved rows"))
    }

    #[test]
    fn rows_that_would_overwrite_each_other_are_refused() {
        for (to_stride, rows, refused) in
            [(2, 3, true), (3, 3, false), (7, 8, true), (8, 8, false), (12, 9, true), (16, 9, false), (16, 17, true)]
        {
            assert_eq!(is_refused(to_stride, rows, 3), refused, "{rows} rows, {to_stride} apart");
        }
    }

    /// Distances whose product is 0, were it to wrap.
    #[test]
    fn strides_that_overflow_are_refused() {
        const FAR: usize = 1 << (usize::BITS - 1);
        for [to_stride, stride] in [[FAR, 4], [8, FAR]] {
            assert!(is_refused(to_stride, 3, stride), "{to_stride}, {stride}");
        }
    }
}
