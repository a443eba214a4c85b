//! What of a batch is computed at once on the CPU.
//!
//! Training computes a batch whose activations would take much memory in parts, one after the other ([`parts`]).
//!
//! Of a small model, two halves are computed side by side ([`halves`]). No half then waits for the last thread of every product of the
//! other, and with two threads each finds the activations of its half in its own caches. But weights are prepared for products twice,
//! and training has gradients of each half to add. Measured (2 cores of an Intel Xeon, batches of 16 and 64): training steps of models
//! with up to 4 M parameters take 3 to 27 % less time, digits (1.3 M) 10 %; with 5 M it depends, and of DiT-S/4 (33 M) they take 12 %
//! more. One thread takes 5 to 8 % more. With batches of 2 to 8 digits a training step takes 5 to 15 % more, but a step of sampling 9
//! to 20 % less.

use super::dit::Dit;
use super::memory::activation_numbers;
use std::ops::Range;

/// How many numbers the activations of a part may take: a GiB of them.
const ACTIVATIONS: f64 = (1u32 << 28) as f64;
/// How many rows, of tokens of all samples, a part may have in any case. Measured (2 cores of an AMD EPYC, batch 32 of DiT-S/2, which has
/// 8192 rows): in parts of 2048 a step takes 3 % more time, since weights are prepared and gradients added for each; in parts of 4096 it
/// takes 1 to 2 % more.
const ROWS_OF_PART: usize = 2048;

/// Most samples that training computes at once.
pub(crate) fn samples_at_once(dit: &Dit) -> usize {
    // As if blocks kept all activations: `checkpoint_activations` must change no bit.
    let of_each = activation_numbers(&dit.config, 1, false);
    ((ACTIVATIONS / of_each) as usize).max(ROWS_OF_PART / dit.config.tokens()).max(1)
}

/// The samples of each part of `batch` samples, of which at most `at_once` are computed at once. The parts are even, and the first is the
/// largest, since most of its buffers can then be used for all.
pub(crate) fn parts(at_once: usize, batch: usize) -> impl Iterator<Item = Range<usize>> {
    let count = batch.div_ceil(at_once).max(1);
    let bound = move |part: usize| (part * batch).div_ceil(count);
    (0..count).map(move |part| bound(part)..bound(part + 1))
}

/// Samples of the largest part of `batch` samples.
pub(crate) fn largest_part(dit: &Dit, batch: usize) -> usize {
    batch.div_ceil(batch.div_ceil(samples_at_once(dit)).max(1))
}

/// Most parameters of a small model.
const SMALL: usize = 1 << 22;

/// Whether a model is one whose batches are computed in halves.
pub(crate) fn is_small(dit: &Dit) -> bool {
    dit.layout.len() <= SMALL
}

/// Fewest rows of a batch, of tokens of all samples, for which training's gradients of each half are worth adding.
const ROWS_OF_HALVES: usize = 256;

/// Whether training computes the halves of `batch` samples side by side.
pub(crate) fn trains_in_halves(dit: &Dit, batch: usize) -> bool {
    in_halves(dit, batch) && batch * dit.config.tokens() >= ROWS_OF_HALVES
}

/// Whether the halves of `batch` samples are computed side by side where nothing is learned. It depends on nothing else, as results never
/// depend on the number of threads.
pub(crate) fn in_halves(dit: &Dit, batch: usize) -> bool {
    batch > 1 && is_small(dit)
}

/// Samples of the first half of a batch.
pub(crate) fn first_half(batch: usize) -> usize {
    batch.div_ceil(2)
}

/// The numbers of the samples of either half, if each of `batch` samples, at least one, has as many. (If not, what takes them will say so.)
pub(crate) fn halves<T>(numbers: &[T], batch: usize) -> (&[T], &[T]) {
    numbers.split_at(numbers.len() / batch * first_half(batch))
}

/// [`halves`] to write to.
pub(crate) fn halves_mut<T>(numbers: &mut [T], batch: usize) -> (&mut [T], &mut [T]) {
    numbers.split_at_mut(numbers.len() / batch * first_half(batch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;

    #[test]
    fn parts_hold_each_sample_once() {
        for at_once in [1, 2, 7, 32] {
            for batch in [0, 1, 8, 9, 31, 128, 129, 1000] {
                let parts: Vec<_> = parts(at_once, batch).collect();
                assert!(parts.iter().cloned().flatten().eq(0..batch), "{batch}, {at_once} at once: {parts:?}");
                let most = parts[0].len();
                let even = |part: &Range<usize>| part.len() == most || part.len() + 1 == most;
                assert!(most <= at_once && parts.iter().all(even), "{batch}, {at_once} at once: {parts:?}");
            }
        }
        assert_eq!(parts(8, 20).collect::<Vec<_>>(), [0..7, 7..14, 14..20]);
    }

    /// A GiB of activations or, if that is more, 2048 tokens; whether blocks keep activations or not.
    #[test]
    fn more_samples_of_small_models_are_computed_at_once() {
        for (name, input_size, expected) in
            [("DiT-S/4", 32, 68), ("DiT-S/2", 32, 17), ("DiT-B/2", 32, 8), ("DiT-XL/2", 32, 8), ("DiT-S/2", 256, 1)]
        {
            let config = ModelConfig { input_size, ..ModelConfig::published(name).unwrap() };
            let mut dit = Dit::new(config).unwrap();
            for checkpointed in [false, true] {
                dit.checkpoint_activations = checkpointed;
                assert_eq!(samples_at_once(&dit), expected, "{name}, {input_size} x {input_size}");
                for batch in [1, expected, expected + 1, 100] {
                    assert_eq!(Some(0..largest_part(&dit, batch)), parts(expected, batch).next());
                }
            }
        }
    }

    #[test]
    fn each_sample_is_in_one_half() {
        for (batch, of_first) in [(1, 1), (2, 1), (3, 2), (8, 4)] {
            let mut numbers: Vec<_> = (0..5 * batch).collect();
            let (first, second) = halves(&numbers, batch);
            assert_eq!((first.len(), [first, second].concat()), (5 * of_first, numbers.clone()));
            assert_eq!(halves_mut(&mut numbers, batch).0.len(), 5 * of_first);
        }
        assert_eq!(halves(&[7; 5], 3), (&[7; 2][..], &[7; 3][..]));
    }
}
