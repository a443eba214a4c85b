//! The specification of [`channel_mask`](super::channel_mask): plain loops.

use super::Keep;
use crate::ops::real::Real;

/// `y`, `[B, T, C]`, of `x` `[B, T, C]` and `mask` `[B, C]`; its gradient with respect to `x` is the same function of `dy`
/// without a base.
pub fn forward<R: Real>(base: Option<&[R]>, x: &[R], mask: &[R], tokens: usize, channels: usize, keep: Keep) -> Vec<R> {
    let mut y = Vec::new();
    for (i, &x) in x.iter().enumerate() {
        let (sample, channel) = (i / (tokens * channels), i % channels);
        let m = mask[sample * channels + channel];
        let kept = if keep == Keep::Active { m * x } else { (R::one() - m) * x };
        y.push((kept + base.map_or(R::zero(), |base| base[i])).stored());
    }
    y
}
