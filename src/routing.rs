//! Denoising Task Routing: which channels are active at which timestep. The whole idea of DTR on one page.
//!
//! Every denoising task (one diffusion timestep `t` of `tasks`) owns a contiguous window of channels
//! `start(t)..start(t) + width`, the same in every block (Park et al., ICLR 2024, section 4.1):
//!
//! ```text
//! width    = floor(C * beta)
//! start(t) = round((t / (tasks - 1))^alpha * (C - width))
//! ```
//!
//! Neighbouring timesteps share almost all channels; early and late ones share few. A large `alpha` lets the windows of
//! the noisy timesteps slide faster. Rounding is half to even, as the authors' code does it; the formula printed in the
//! paper may differ from it by one shift.

use crate::choice::choice;
use crate::error::{Error, Result};
use crate::rng::{Philox, Stream};

/// How a block uses the windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// No routing: every channel is active at every timestep (plain DiT).
    Dense,
    /// The published block: the window masks the block's input, and the rest bypasses the block.
    Paper,
    /// Our variant: the window masks the output of each sublayer too, so that all four products shrink.
    Sublayer,
    /// The R-TR baseline: a random subset of channels per task and block. It computes densely.
    Random,
}

choice!(Routing: Paper = "paper", Sublayer = "sublayer", Random = "random", Dense = "dense");

/// The active channels of one sample: `start..start + width`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First active channel.
    pub start: usize,
    /// Number of active channels, at least 1.
    pub width: usize,
}

impl Window {
    /// The window of all `channels`.
    pub fn all(channels: usize) -> Self {
        Window { start: 0, width: channels }
    }

    /// One past the last active channel.
    #[inline]
    pub fn end(self) -> usize {
        self.start + self.width
    }

    /// Whether it is a window of `channels` channels: not empty, and inside.
    #[inline]
    pub fn fits(self, channels: usize) -> bool {
        self.width > 0 && self.width <= channels && self.start <= channels - self.width
    }

    /// The active channels as a range.
    #[inline]
    pub fn range(self) -> std::ops::Range<usize> {
        self.start..self.end()
    }

    /// The smallest window that holds both.
    #[inline]
    pub fn union(self, other: Window) -> Window {
        let start = self.start.min(other.start);
        Window { start, width: self.end().max(other.end()) - start }
    }
}

/// Number of active channels, `floor(channels * beta)`.
///
/// # Errors
/// When `beta` is outside (0, 1] or leaves no channel active, or there are none.
pub fn window_width(channels: usize, beta: f64) -> Result<usize> {
    if !(beta > 0.0 && beta <= 1.0) {
        return Err(Error::usage(format!(
            "beta is {beta}, but it is the share of active channels: give a number above 0 and at most 1"
        )));
    }
    if channels == 0 {
        return Err(Error::usage("there are 0 channels, of which none can be active: give at least 1"));
    }
    // From 2^53 channels on the product may be rounded up.
    match ((channels as f64 * beta).floor() as usize).min(channels) {
        0 => Err(Error::usage(format!(
            "beta {beta} leaves none of {channels} channels active: give at least {:.4}",
            (1e4 / channels as f64).ceil() / 1e4
        ))),
        width => Ok(width),
    }
}

/// Refuses numbers of diffusion timesteps that are none, or for which no table can be made.
fn check_tasks(tasks: usize) -> Result<()> {
    const MOST: usize = 1 << 24;
    match tasks {
        1..=MOST => Ok(()),
        _ => Err(Error::usage(format!(
            "the number of tasks is {tasks}, but it is the number of diffusion timesteps, 1 to {MOST}: give 1000"
        ))),
    }
}

/// The windows of all tasks, indexed by timestep.
///
/// # Errors
/// When `beta` is outside (0, 1], leaves no channel active, `alpha` is not positive, or `tasks` is 0 or more than 2^24.
pub fn windows(tasks: usize, channels: usize, alpha: f64, beta: f64) -> Result<Vec<Window>> {
    let width = window_width(channels, beta)?;
    if !(alpha > 0.0 && alpha.is_finite()) {
        return Err(Error::usage(format!("alpha is {alpha}, but it must be a positive number (the paper uses 4)")));
    }
    check_tasks(tasks)?;
    let last = (tasks - 1).max(1) as f64;
    let start = |t| ((t as f64 / last).powf(alpha) * (channels - width) as f64).round_ties_even() as usize;
    Ok((0..tasks).map(|t| Window { start: start(t), width }).collect())
}

/// The masks of random routing for one block: `[tasks, channels]` of 0 and 1 with `floor(channels * beta)` ones a row.
///
/// # Errors
/// When `beta` is outside (0, 1] or leaves no channel active, `tasks` is 0 or more than 2^24, or the masks are more than 2^32 numbers.
pub fn random_masks(tasks: usize, channels: usize, beta: f64, seed: u64, block: usize) -> Result<Vec<f32>> {
    let width = window_width(channels, beta)?;
    check_tasks(tasks)?;
    if channels > (1 << 32) / tasks {
        return Err(Error::usage(format!(
            "masks of {tasks} tasks and {channels} channels are too large: give fewer channels"
        )));
    }
    let rng = Philox::new(seed, Stream::Routing);
    let mut masks = vec![0.0; tasks * channels];
    let mut order: Vec<usize> = Vec::with_capacity(channels);
    for (task, mask) in masks.chunks_mut(channels).enumerate() {
        order.clear();
        order.extend(0..channels);
        // The first `width` entries of a Fisher-Yates shuffle.
        for i in 0..width {
            let j = i + rng.below((channels - i) as u64, task as u64, block as u64, i as u32) as usize;
            order.swap(i, j);
            mask[order[i]] = 1.0;
        }
    }
    Ok(masks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_start_at_the_left_edge_and_end_at_the_right() {
        for (channels, beta, alpha) in [(384, 0.8, 4.0), (1023, 0.3, 1.0), (5, 0.2, 2.0), (64, 1.0, 4.0)] {
            let all = windows(1000, channels, alpha, beta).unwrap();
            assert_eq!((all[0].start, all[999].end()), (0, channels));
            assert!(all.windows(2).all(|pair| pair[0].start <= pair[1].start));
        }
    }

    #[test]
    fn windows_inside_of_the_channels_fit() {
        let fits = |start, width| Window { start, width }.fits(10);
        assert!(fits(0, 10) && fits(3, 7) && fits(9, 1));
        assert!(!fits(0, 0) && !fits(0, 11) && !fits(4, 7) && !fits(10, 1) && !fits(usize::MAX, 2));
    }

    #[test]
    fn bad_routing_is_refused() {
        for (alpha, beta) in
            [(4.0, 0.0), (4.0, 1.5), (4.0, -0.1), (4.0, f64::NAN), (0.0, 0.8), (f64::NAN, 0.8), (4.0, 0.01)]
        {
            assert!(windows(1000, 64, alpha, beta).is_err(), "alpha {alpha} beta {beta}");
        }
        for tasks in [0, 1 << 40, usize::MAX] {
            let message = windows(tasks, 64, 4.0, 0.8).unwrap_err().to_string();
            assert!(message.contains(&format!("tasks is {tasks}, ")), "{message}");
            assert!(random_masks(tasks, 64, 0.8, 1, 0).is_err());
        }
        assert!(random_masks(1000, 1 << 40, 0.8, 1, 0).is_err());
        let message = windows(10, 0, 4.0, 0.8).unwrap_err().to_string();
        assert!(message.contains("there are 0 channels"), "{message}");
        let width = window_width((1 << 53) + 3, 1.0).unwrap();
        assert_eq!(width, (1 << 53) + 3, "more channels are active than there are");
    }

    #[test]
    fn the_share_that_is_advised_is_enough() {
        for channels in [1, 3, 64, 128, 384, 768, 1024, 1152, 4096] {
            let message = window_width(channels, 0.5 / channels as f64).unwrap_err().to_string();
            let advised = message.rsplit(' ').next().unwrap().parse().unwrap();
            assert!(window_width(channels, advised).is_ok(), "{message}");
        }
    }

    /// As scripts/dit_dtr.py draws them.
    #[test]
    fn random_masks_are_those_of_their_seed() {
        let masks = random_masks(1000, 10, 0.4, (7 << 32) + 3, 2).unwrap();
        let of = |task: usize| (0..10).filter(|c| masks[task * 10 + c] == 1.0).collect::<Vec<_>>();
        assert_eq!([0, 1, 500, 999].map(of), [[3, 5, 6, 9], [0, 1, 3, 4], [0, 2, 3, 8], [0, 1, 2, 3]]);
    }

    #[test]
    fn random_masks_have_their_share_and_differ_between_tasks_and_blocks() {
        let a = random_masks(50, 40, 0.8, 1, 0).unwrap();
        assert!(a.chunks(40).all(|m| m.iter().sum::<f32>() == 32.0));
        assert_ne!(a[..40], a[40..80]);
        assert_ne!(a, random_masks(50, 40, 0.8, 1, 1).unwrap());
        assert_eq!(a, random_masks(50, 40, 0.8, 1, 0).unwrap());
        assert_ne!(a, random_masks(50, 40, 0.8, 2, 0).unwrap());
        // Every channel is left out about equally often: 50 tasks x 8 of 40 channels = 10 times each.
        let counts: Vec<f32> = (0..40).map(|c| a.iter().skip(c).step_by(40).sum()).collect();
        assert!(counts.iter().all(|&n| (28.0..=49.0).contains(&n)), "{counts:?}");
    }
}
