//! The specification of [`label_embed`](super::label_embed): plain loops.

use crate::ops::real::Real;

/// `y`, `[B, C]`, of `base` `[B, C]` and `table` `[rows, C]`.
pub fn forward<R: Real>(base: &[R], table: &[R], labels: &[u32]) -> Vec<R> {
    let c = base.len() / labels.len();
    (0..base.len()).map(|i| base[i] + table[labels[i / c] as usize * c + i % c]).collect()
}

/// Gradient of `sum(y * dy)` with respect to the table, `[rows, C]` (that of `base` is `dy`).
pub fn backward<R: Real>(rows: usize, labels: &[u32], dy: &[R]) -> Vec<R> {
    let c = dy.len() / labels.len();
    let mut dtable = vec![R::zero(); rows * c];
    for (i, &dy) in dy.iter().enumerate() {
        dtable[labels[i / c] as usize * c + i % c] += dy;
    }
    dtable
}
