//! The kernel for any processor.

use super::super::simd::fma;
use super::HALF;
use super::steps::Step;

pub(super) fn step(step: Step) {
    match step.rows.len() {
        1 => kernel::<1>(step),
        2 => kernel::<2>(step),
        3 => kernel::<3>(step),
        4 => kernel::<4>(step),
        5 => kernel::<5>(step),
        6 => kernel::<6>(step),
        _ => unreachable!("more rows than a step has"),
    }
}

fn kernel<const ROWS: usize>(Step { rows, half, skip, layout, stride, segments, add, .. }: Step) {
    let column = half * HALF;
    let mut sums = [[0.0f32; HALF]; ROWS];
    if add {
        for (sums, row) in sums.iter_mut().zip(&*rows) {
            sums.copy_from_slice(&row[column..][..HALF]);
        }
    }
    for segment in segments {
        for k in 0..segment.len {
            let columns = segment.b[half][k * stride..].first_chunk::<HALF>().expect("half a panel");
            let a = &segment.a[skip + k * layout.inner..];
            for i in 0..ROWS {
                for j in 0..HALF {
                    sums[i][j] = fma::<{ cfg!(target_arch = "aarch64") }>(a[i * layout.row], columns[j], sums[i][j]);
                }
            }
        }
    }
    for (row, sums) in rows.iter_mut().zip(&sums) {
        row[column..][..HALF].copy_from_slice(sums);
    }
}
