//! A tile in steps, for processors with 16 vector registers: 16 columns of 6 rows, and of the inner dimension so much that its
//! part of a panel stays in the first cache while the steps go down the rows.

use super::{PANEL, Rows, Segment, even_parts};
use crate::backend::cpu::simd::{LINE, fetch};

/// Rows of a step: what the registers hold sums of.
pub(super) const ROWS: usize = 6;
/// Steps down a tile.
pub(super) const AT_ONCE: usize = 6;
/// Most elements of the inner dimension of a step. Measured (Zen 3, AVX2): with 64 attention, which has most of the rows that are
/// not packed, takes 1 to 5 % longer.
const BLOCK: usize = 128;
/// The same of packed rows, and most tokens that a weight gradient of numbers takes at a time. Packed rows are one stream, which the
/// processor fetches ahead, so they need not stay in the first cache from one half of the columns to the other, and with longer blocks
/// sums go to memory and back less often. Measured on Zen 3, packing included: forward products of DiT-S/2 and S/4 took 3 to 9 % less
/// time than from lines in blocks of 128.
pub(super) const PACKED_BLOCK: usize = 384;

/// Adds the products of a block of the inner dimension to 16 columns of a few rows.
pub(super) struct Step<'a> {
    /// Rows of the tile, at most [`ROWS`].
    pub(super) rows: &'a mut [[f32; PANEL]],
    /// Which of the columns, 0 or 1.
    pub(super) half: usize,
    /// Where the first row lies in A.
    pub(super) skip: usize,
    pub(super) layout: Rows,
    pub(super) stride: usize,
    pub(super) segments: &'a [Segment<'a>],
    /// Whether there are sums already.
    pub(super) add: bool,
}

/// Computes sums by calls of `step`; the arguments are those of [`super::sum_products`]. If they are as it checks, every step lies
/// inside of the sums and of the segments.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "operands and sizes")]
pub(super) fn multiply(
    sums: &mut [[f32; PANEL]],
    mut add: bool,
    halves: usize,
    layout: Rows,
    stride: usize,
    segments: &[Segment],
    next: &[f32],
    step: impl Fn(Step),
) {
    // Beside packed rows what is next is packed too, one stream: to fetch it took up to 3 % more time (2 cores of an AMD EPYC with
    // AVX2, forward passes of DiT-S/2).
    let next = if layout.step == 0 { next } else { &[] };
    let steps = halves * sums.len().div_ceil(ROWS);
    let mut shares = next.chunks(next.len().div_ceil(steps).next_multiple_of(LINE).max(LINE));
    let mut block = |segments: &[Segment], add: bool| {
        for half in 0..halves {
            for (number, rows) in even_parts(sums.len(), ROWS, 1).enumerate() {
                let skip = layout.first_of_step(number, rows.start);
                shares.next().into_iter().flat_map(|share| share.chunks(LINE)).for_each(|line| fetch(line.as_ptr()));
                step(Step { rows: &mut sums[rows], half, skip, layout, stride, segments, add });
            }
        }
    };
    let most = if layout.step == 0 { BLOCK } else { PACKED_BLOCK };
    let mut rest = segments;
    while let [first, others @ ..] = rest {
        let parts = first.len.div_ceil(most);
        if parts > 1 {
            for i in 0..parts {
                let part = i * first.len / parts..(i + 1) * first.len / parts;
                let a = &first.a[part.start * layout.inner..];
                let b = first.b.map(|half| half.get(part.start * stride..).unwrap_or(&[]));
                block(&[Segment { a, b, len: part.len() }], add);
                add = true;
            }
            rest = others;
            continue;
        }
        // Short ones together, up to a block.
        let (mut count, mut len) = (1, first.len);
        while count < rest.len() && len + rest[count].len <= most {
            len += rest[count].len;
            count += 1;
        }
        block(&rest[..count], add);
        (rest, add) = (&rest[count..], true);
    }
    if !add {
        block(&[], false);
    }
}
