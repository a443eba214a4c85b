//! Samples that are kept from training, to measure on them what was learned.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Dataset;
use crate::error::{Error, Result};
use crate::rng::{Philox, Stream};

/// Splits a data set in two: what is left to train on, and `count` samples drawn by `seed` alone. Both have all its classes, and keep the
/// order of its samples.
///
/// # Errors
/// [`Error::Usage`] when nothing would be left, or nothing held out.
pub fn hold_out(dataset: Arc<dyn Dataset>, count: usize, seed: u64) -> Result<[Arc<dyn Dataset>; 2]> {
    let len = dataset.len();
    if count == 0 || count >= len {
        return Err(Error::usage(format!(
            "{count} of {len} samples cannot be held out: give at least 1, and leave some to train on"
        )));
    }
    let rng = Philox::new(seed, Stream::HeldOut);
    let mut drawn = BTreeSet::new();
    // Floyd's algorithm: every subset of this size is as likely (Bentley and Floyd, "A sample of brilliance", CACM 1987).
    for last in len - count..len {
        let index = rng.below(last as u64 + 1, 0, last as u64, 0) as usize;
        if !drawn.insert(index) {
            drawn.insert(last);
        }
    }
    let held_out: Vec<usize> = drawn.into_iter().collect();
    let kept_before = held_out.iter().enumerate().map(|(number, index)| index - number).collect();
    let [left, held_out] = [Part::Left { kept_before }, Part::HeldOut(held_out)]
        .map(|part| Arc::new(Subset { dataset: dataset.clone(), part }) as Arc<dyn Dataset>);
    Ok([left, held_out])
}

/// Some samples of a data set.
struct Subset {
    dataset: Arc<dyn Dataset>,
    part: Part,
}

/// Which ones.
enum Part {
    HeldOut(Vec<usize>), // indices, rising
    /// All others. There may be very many, so they are told by those that are missing.
    Left {
        kept_before: Vec<usize>, // each that is held out, how many before it are not
    },
}

impl Subset {
    /// Place of sample `index` in the whole.
    fn index(&self, index: usize) -> usize {
        assert!(index < self.len(), "sample {index} of {}", self.len());
        match &self.part {
            Part::HeldOut(indices) => indices[index],
            Part::Left { kept_before } => index + kept_before.partition_point(|&kept| kept <= index),
        }
    }
}

impl Dataset for Subset {
    fn shape(&self) -> [usize; 3] {
        self.dataset.shape()
    }

    fn class_names(&self) -> &[String] {
        self.dataset.class_names()
    }

    fn num_classes(&self) -> usize {
        self.dataset.num_classes()
    }

    fn len(&self) -> usize {
        match &self.part {
            Part::HeldOut(indices) => indices.len(),
            Part::Left { kept_before } => self.dataset.len() - kept_before.len(),
        }
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        self.dataset.read(self.index(index), flip, out)
    }

    fn read_std(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<bool> {
        self.dataset.read_std(self.index(index), flip, out)
    }

    fn number_of(&self, index: usize) -> usize {
        self.dataset.number_of(self.index(index))
    }

    fn is_pictures(&self) -> bool {
        self.dataset.is_pictures()
    }

    fn note(&self) -> Option<&str> {
        self.dataset.note()
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::made;
    use super::*;

    /// Samples that say who they are.
    fn told(samples: usize) -> Arc<dyn Dataset> {
        made(samples, 3, |index, flip, out| {
            out.fill(index as f32 + if flip { 0.5 } else { 0.0 });
            Ok(index as u32 % 3)
        })
    }

    /// Which samples of the whole a part has.
    fn indices(part: &Arc<dyn Dataset>) -> Vec<usize> {
        let read = |index| {
            let mut out = [0.0; 16];
            let label = part.read(index, false, &mut out).unwrap();
            assert_eq!((label, part.number_of(index)), (out[0] as u32 % 3, out[0] as usize));
            out[0] as usize
        };
        (0..part.len()).map(read).collect()
    }

    #[test]
    fn every_sample_is_in_one_of_both_parts() {
        for len in [2, 3, 7, 50] {
            let dataset = told(len);
            for count in 1..len {
                let [left, held_out] = hold_out(dataset.clone(), count, 5).unwrap();
                let [of_left, of_held_out] = [&left, &held_out].map(indices);
                assert_eq!((of_left.len(), of_held_out.len()), (len - count, count));
                assert!(of_left.is_sorted() && of_held_out.is_sorted());
                let mut all = [of_left, of_held_out].concat();
                all.sort_unstable();
                assert!(all.into_iter().eq(0..len), "{count} of {len}");
            }
        }
        let [left, held_out] = hold_out(told(7), 2, 5).unwrap();
        for part in [left, held_out] {
            assert_eq!((part.shape(), part.num_classes(), part.class_names().len()), ([1, 4, 4], 3, 3));
            assert!(part.is_pictures());
            let mut out = [0.0; 16];
            part.read(0, true, &mut out).unwrap();
            assert_eq!(out[0].fract(), 0.5, "mirrored");
        }
    }

    /// Each sample as often as any other, and every seed its own.
    #[test]
    fn samples_are_drawn_evenly_and_by_the_seed_alone() {
        let dataset = told(20);
        let mut counts = [0; 20];
        let mut draws = BTreeSet::new();
        for seed in 0..2000 {
            let drawn = indices(&hold_out(dataset.clone(), 5, seed).unwrap()[1]);
            drawn.iter().for_each(|&index| counts[index] += 1);
            draws.insert(drawn);
        }
        // 500 each; the standard deviation is 19.
        assert!(counts.iter().all(|count| (410..590).contains(count)), "{counts:?}");
        assert!(draws.len() > 1700, "{} of 15504 subsets", draws.len());
        let [once, again] = [3, 3].map(|seed| indices(&hold_out(dataset.clone(), 5, seed).unwrap()[1]));
        assert_eq!(once, again);
    }

    #[test]
    fn something_is_left_and_something_held_out() {
        for count in [0, 7, 8, usize::MAX] {
            let message = hold_out(told(7), count, 0).err().expect("refused").to_string();
            assert!(message.contains(&format!("{count} of 7 samples")), "{message}");
        }
    }
}
