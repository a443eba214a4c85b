//! The kernel for AVX-512: 32 columns of 14 rows.

use super::super::simd::{LINE, fetch};
use super::{PANEL, Rows, Segment};
use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_storeu_ps, _mm512_stream_ps,
};

const LANES: usize = 16;
/// Bytes of a cache line.
const LINE_BYTES: usize = LINE * size_of::<f32>();

/// # Safety
/// The processor has AVX-512F; `to` starts at a cache line, and nobody accesses it before this thread's next fence.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) unsafe fn stream(to: &mut [f32; PANEL], row: &[f32; PANEL]) {
    for v in (0..PANEL).step_by(LANES) {
        // SAFETY: in bounds; aligned by the contract.
        unsafe { _mm512_stream_ps(to.as_mut_ptr().add(v), _mm512_loadu_ps(row.as_ptr().add(v))) };
    }
}

/// As [`super::sum_products`].
///
/// # Safety
/// The processor has AVX-512F; rows, halves and segments are as [`super::sum_products`] checks.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) unsafe fn multiply(
    rows: &mut [[f32; PANEL]],
    add: bool,
    halves: usize,
    layout: Rows,
    stride: usize,
    segments: &[Segment],
    next: &[f32],
) {
    let operands = Operands { add, layout, stride, segments, next };
    // SAFETY: the contract is the same; `SIDE_BY_SIDE` and `VECTORS` are what layout and halves say.
    unsafe {
        match (halves, layout.row, next.is_empty()) {
            (1, 1, _) => kernels::<1, true, false>(rows, operands),
            (1, _, true) => kernels::<1, false, false>(rows, operands),
            (1, _, false) => kernels::<1, false, true>(rows, operands),
            (_, 1, true) => kernels::<2, true, false>(rows, operands),
            (_, 1, false) => kernels::<2, true, true>(rows, operands),
            (_, _, true) => kernels::<2, false, false>(rows, operands),
            (_, _, false) => kernels::<2, false, true>(rows, operands),
        }
    }
}

/// What all rows have in common.
struct Operands<'a> {
    add: bool,
    layout: Rows,
    stride: usize,
    segments: &'a [Segment<'a>],
    next: &'a [f32],
}

/// # Safety
/// That of [`kernel`].
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn kernels<const VECTORS: usize, const SIDE_BY_SIDE: bool, const NEXT: bool>(
    rows: &mut [[f32; PANEL]],
    operands: Operands,
) {
    let count = rows.len();
    // SAFETY: the contract is the same.
    unsafe {
        by_rows!(count, N => kernel::<N, VECTORS, SIDE_BY_SIDE, NEXT>(rows, operands), [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
    }
}

/// `SIDE_BY_SIDE`: the rows of A are, so that their distance is a constant. `NEXT`: there is something to fetch.
///
/// # Safety
/// That of [`multiply`]; `SIDE_BY_SIDE` only if `layout.row` is 1, and `VECTORS` at most the halves.
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn kernel<const ROWS: usize, const VECTORS: usize, const SIDE_BY_SIDE: bool, const NEXT: bool>(
    rows: &mut [[f32; PANEL]],
    Operands { add, layout, stride, segments, next }: Operands,
) {
    let rows: &mut [[f32; PANEL]; ROWS] = rows.try_into().expect("as many rows as the kernel is for");
    let mut sums: [[__m512; VECTORS]; ROWS] = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    if add {
        for i in 0..ROWS {
            for v in 0..VECTORS {
                // SAFETY: the columns asked for lie inside of a row.
                sums[i][v] = unsafe { _mm512_loadu_ps(rows[i].as_ptr().add(v * LANES)) };
            }
        }
    }
    let distance = if SIDE_BY_SIDE { 1 } else { layout.row };
    // In even steps, so that the last line is fetched by the last round if there are enough; most more than once, which is free.
    let rounds: usize = segments.iter().map(|segment| segment.len).sum();
    let step = if NEXT { size_of_val(next).div_ceil(rounds.max(1)).min(LINE_BYTES) } else { 0 };
    let mut next = next.as_ptr();
    for segment in segments {
        let (mut a, mut b) = (segment.a.as_ptr(), [segment.b[0].as_ptr(), segment.b[1].as_ptr()]);
        for _ in 0..segment.len {
            if SIDE_BY_SIDE {
                fetch_near(a.wrapping_add(layout.inner.wrapping_mul(AHEAD)));
            }
            for b in &b[..VECTORS] {
                fetch_near(b.wrapping_add(stride.wrapping_mul(AHEAD)));
            }
            if NEXT {
                fetch(next);
                next = next.wrapping_byte_add(step);
            }
            let mut row = a;
            // SAFETY: `sum_products` checked the last element that these reach; the pointers move past it only after the last
            // row and round, by wrapping arithmetic.
            unsafe {
                let columns: [__m512; VECTORS] = std::array::from_fn(|v| _mm512_loadu_ps(b[v]));
                for sums in &mut sums {
                    let factor = _mm512_set1_ps(*row);
                    for v in 0..VECTORS {
                        sums[v] = _mm512_fmadd_ps(factor, columns[v], sums[v]);
                    }
                    row = row.wrapping_add(distance);
                    // Keeps the compiler from loading all rows first, for which there are not enough registers: the sums
                    // would go to memory and back in every round, which takes twice as long.
                    std::arch::asm!("", options(nostack, preserves_flags));
                }
            }
            a = a.wrapping_add(layout.inner);
            b = [b[0].wrapping_add(stride), b[1].wrapping_add(stride)];
        }
    }
    // By index: iterators here put the sums into memory in the loop above.
    for i in 0..ROWS {
        for v in 0..VECTORS {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(rows[i].as_mut_ptr().add(v * LANES), sums[i][v]) };
        }
    }
}

/// Rounds from a fetch to its use: a round of 14 rows takes 14 cycles or more, and a line from the third cache up to a few hundred.
const AHEAD: usize = 16;

/// As [`fetch`], into the first cache.
#[inline(always)]
fn fetch_near(line: *const f32) {
    // SAFETY: SSE is part of x86-64, and a prefetch of any address changes nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
}
