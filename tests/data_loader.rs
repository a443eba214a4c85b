//! The digits, and the loader: batches depend on the seed and the step alone.

use std::sync::Arc;

use dtr_fused::data::digits::Digits;
use dtr_fused::data::{Dataset, Loader, LoaderOptions, OpenOptions, open};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::{Error, Result};

#[test]
fn digits_are_those_of_scikit_learn() {
    let digits = Digits::new().unwrap();
    assert_eq!((digits.len(), digits.shape(), digits.num_classes()), (1797, [1, 8, 8], 10));
    let mut counts = [0; 10];
    digits.labels().iter().for_each(|&label| counts[label as usize] += 1);
    assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    assert_eq!(digits.labels()[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let ink = |x: f32| (x + 1.0) * 8.0;
    assert!(digits.images().iter().all(|&x| ink(x).fract() == 0.0 && (0.0..=16.0).contains(&ink(x))));
    assert_eq!(digits.images().iter().map(|&x| f64::from(ink(x))).sum::<f64>(), 561_718.0);
    let mut last = [f32::NAN; 64];
    assert_eq!(digits.read(1796, false, &mut last).unwrap(), 8);
    assert_eq!(last[..8].iter().map(|&x| ink(x)).collect::<Vec<_>>(), [0.0, 0.0, 10.0, 14.0, 8.0, 1.0, 0.0, 0.0]);
    let mut mirrored = [f32::NAN; 64];
    digits.read(1796, true, &mut mirrored).unwrap();
    assert_eq!(mirrored[..8].iter().map(|&x| ink(x)).collect::<Vec<_>>(), [0.0, 0.0, 1.0, 8.0, 14.0, 10.0, 0.0, 0.0]);
    assert_eq!(open("digits", OpenOptions::default()).unwrap().len(), 1797);
}

/// Samples that say who they are: `[index, mirrored]`, label `index % 3`; some cannot be read.
struct Named {
    len: usize,
    bad: Vec<usize>,
    classes: Vec<String>,
}

impl Named {
    fn new(len: usize, bad: &[usize]) -> Arc<Self> {
        Arc::new(Named { len, bad: bad.to_vec(), classes: vec!["a".into(), "b".into(), "c".into()] })
    }
}

impl Dataset for Named {
    fn shape(&self) -> [usize; 3] {
        [1, 1, 2]
    }

    fn class_names(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        if self.bad.contains(&index) {
            return Err(Error::file(format!("{index}.png"), "is damaged"));
        }
        out.copy_from_slice(&[index as f32, f32::from(u8::from(flip))]);
        Ok(index as u32 % 3)
    }
}

fn loader(dataset: Arc<Named>, batch: usize, seed: u64, threads: usize) -> Loader {
    Loader::new(dataset, LoaderOptions { batch, seed, flip: true, threads }).unwrap()
}

/// Indices and flips of a batch.
fn samples(loader: &mut Loader, step: u64) -> Vec<(usize, bool)> {
    let batch = loader.next(step).unwrap();
    let samples: Vec<_> = batch.pixels.chunks(2).map(|s| (s[0] as usize, s[1] == 1.0)).collect();
    assert!(samples.iter().zip(&batch.labels).all(|((index, _), &label)| *index as u32 % 3 == label));
    samples
}

#[test]
fn every_epoch_has_every_sample_once_in_an_order_of_its_own() {
    let mut loader = loader(Named::new(10, &[]), 4, 1, 2);
    let run: Vec<usize> = (0..10).flat_map(|step| samples(&mut loader, step)).map(|(index, _)| index).collect();
    let epochs: Vec<&[usize]> = run.chunks(10).collect();
    for epoch in &epochs {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    assert!(epochs.windows(2).all(|pair| pair[0] != pair[1]), "epochs repeat: {epochs:?}");
    assert_ne!(epochs[0], (0..10).collect::<Vec<_>>());
}

#[test]
fn the_order_is_uniform() {
    // Each of 4 samples should be first in a quarter of 4000 epochs: standard deviation 27.
    let mut loader = loader(Named::new(4, &[]), 4000, 5, 1);
    let mut first = [0; 4];
    for step in 0..4 {
        samples(&mut loader, step).chunks(4).for_each(|epoch| first[epoch[0].0] += 1);
    }
    assert!(first.iter().all(|&count: &i32| (count - 1000).abs() < 150), "{first:?}");
}

#[test]
fn a_step_gives_the_same_batch_for_any_number_of_threads_and_after_any_other() {
    let set = || Named::new(23, &[]);
    let mut straight = loader(set(), 7, 42, 1);
    let run: Vec<_> = (0..30).map(|step| samples(&mut straight, step)).collect();
    let mut threads = loader(set(), 7, 42, 4);
    for (step, batch) in run.iter().enumerate() {
        assert_eq!(&samples(&mut threads, step as u64), batch, "step {step} with 4 threads");
    }
    let mut resumed = loader(set(), 7, 42, 2);
    for step in [17, 18, 19, 3, 3, 2, 29, 0, 1, 2, 4, 5] {
        assert_eq!(samples(&mut resumed, step), run[step as usize], "step {step} after others");
    }
    assert_ne!(samples(&mut loader(set(), 7, 43, 1), 0), run[0], "another seed");
    // However far a damaged checkpoint says the run had come.
    assert_eq!(samples(&mut resumed, u64::MAX).len(), 7);
}

#[test]
fn half_of_the_samples_are_mirrored_where_that_is_wanted() {
    let mut with = loader(Named::new(10, &[]), 1000, 9, 1);
    let flips: Vec<bool> = samples(&mut with, 0).into_iter().map(|(_, flip)| flip).collect();
    let count = flips.iter().filter(|&&flip| flip).count();
    assert!((420..580).contains(&count), "{count} of 1000");
    assert_ne!(flips[..500], flips[500..], "flips repeat");
    let options = LoaderOptions { batch: 1000, seed: 9, flip: false, threads: 1 };
    let mut without = Loader::new(Named::new(10, &[]), options).unwrap();
    assert!(samples(&mut without, 0).iter().all(|(_, flip)| !flip));
}

#[test]
fn batches_may_be_kept_and_their_memory_comes_back() {
    let mut loader = loader(Named::new(10, &[]), 4, 1, 1);
    let kept: Vec<_> = (0..8).map(|step| loader.next(step).unwrap()).collect();
    let first = kept[0].pixels.clone();
    drop(kept);
    assert_eq!(loader.next(0).unwrap().pixels, first);
    let mut places = std::collections::HashSet::new();
    for step in 1..50 {
        places.insert(loader.next(step).unwrap().pixels.as_ptr());
    }
    assert!(places.len() <= 6, "49 batches in {} places", places.len());
}

#[test]
fn bad_samples_are_replaced_in_the_same_way_always() {
    // 3, 4 and 9 are bad: 5 stands in for the first two, 0 for the last.
    let run = |threads, steps: &[u64]| -> Vec<Vec<(usize, bool)>> {
        let mut loader = loader(Named::new(10, &[3, 4, 9]), 10, 7, threads);
        let run = steps.iter().map(|&step| samples(&mut loader, step)).collect();
        assert_eq!(loader.bad_samples(), 3);
        let mut warnings = loader.take_warnings();
        warnings.sort();
        assert_eq!(warnings, ["3.png: is damaged", "4.png: is damaged", "9.png: is damaged"]);
        run
    };
    let straight = run(1, &[0, 1, 2, 3]);
    for batch in &straight {
        let mut indices: Vec<usize> = batch.iter().map(|s| s.0).collect();
        indices.sort_unstable();
        assert_eq!(indices, [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]);
    }
    assert_eq!(run(3, &[0, 1, 2, 3]), straight);
    assert_eq!(run(2, &[2, 3]), straight[2..]);
}

#[test]
fn samples_that_are_there_in_place_of_others_are_told() {
    let [mut good, mut bad] = [&[][..], &[3, 4, 9]].map(|bad| loader(Named::new(10, bad), 4, 7, 2));
    for step in 0..10 {
        let (planned, batch) = (samples(&mut good, step), bad.next(step).unwrap());
        let replaced: Vec<bool> = planned.iter().map(|(index, _)| [3, 4, 9].contains(index)).collect();
        assert_eq!(batch.replaced, replaced, "step {step}");
        assert_eq!(good.next(step).unwrap().replaced, [false; 4]);
    }
}

#[test]
fn of_many_bad_samples_the_first_are_named_and_all_are_counted() {
    let bad: Vec<usize> = (0..40).map(|i| 2 * i).collect();
    let mut loader = loader(Named::new(100, &bad), 100, 7, 2);
    loader.next(0).unwrap();
    assert_eq!((loader.bad_samples(), loader.take_warnings().len(), loader.take_warnings().len()), (40, 16, 0));
}

#[test]
fn too_many_bad_samples_are_an_error() {
    let refusal = |len: usize, bad: &[usize]| loader(Named::new(len, bad), 50, 7, 2).next(0).unwrap_err().to_string();
    assert!(refusal(1, &[0]).contains("1 of 1 samples cannot be read, the last: 0.png: is damaged"));
    assert!(refusal(5, &[0, 2, 3]).contains("3 of 5 samples cannot be read"));
    let mut half = loader(Named::new(4, &[0, 2]), 50, 7, 2);
    assert!(half.next(0).unwrap().pixels.chunks(2).all(|s| s[0] == 1.0 || s[0] == 3.0));
}

#[test]
fn batches_that_cannot_be_are_refused() {
    let refusal = |batch| {
        let options = LoaderOptions { batch, seed: 0, flip: false, threads: 1 };
        Loader::new(Named::new(4, &[]), options).err().expect("should be refused").to_string()
    };
    assert!(refusal(0).contains("batch_size is 0"));
    let options = LoaderOptions { batch: 1, seed: 0, flip: false, threads: usize::MAX };
    let message = Loader::new(Named::new(4, &[]), options).err().expect("should be refused").to_string();
    assert!(message.contains("give at most 1024"), "{message}");
    assert!(refusal(usize::MAX / 3).contains("cannot be one batch"));
}

/// Distributions with the means `100 index + column` and standard deviations `column + index`; some have damaged ones.
struct Spread {
    bad: Vec<usize>,
    classes: Vec<String>,
}

impl Spread {
    const WIDTH: usize = 6;

    fn new(bad: &[usize]) -> Arc<Self> {
        Arc::new(Spread { bad: bad.to_vec(), classes: vec!["a".into()] })
    }

    /// Mean and standard deviation at a place of a sample that may be mirrored.
    fn at(index: usize, flip: bool, place: usize) -> [f32; 2] {
        let column = if flip { Self::WIDTH - 1 - place } else { place };
        [(100 * index + column) as f32, (column + index) as f32]
    }
}

impl Dataset for Spread {
    fn shape(&self) -> [usize; 3] {
        [1, 1, Self::WIDTH]
    }

    fn class_names(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        5
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        out.iter_mut().enumerate().for_each(|(place, x)| *x = Self::at(index, flip, place)[0]);
        Ok(0)
    }

    fn read_std(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<bool> {
        if self.bad.contains(&index) {
            return Err(Error::file(index.to_string(), "is no distribution"));
        }
        out.iter_mut().enumerate().for_each(|(place, x)| *x = Self::at(index, flip, place)[1]);
        Ok(true)
    }
}

/// Batches of four of [`Spread`].
fn draws(bad: &[usize], seed: u64, threads: usize, steps: &[u64]) -> Vec<Vec<f32>> {
    let mut loader = Loader::new(Spread::new(bad), LoaderOptions { batch: 4, seed, flip: true, threads }).unwrap();
    let draws = steps.iter().map(|&step| loader.next(step).unwrap().pixels.clone()).collect();
    assert_eq!(loader.bad_samples(), bad.len());
    draws
}

/// To the bit what the seed and the number of the sample in the run say, in every epoch anew.
#[test]
fn samples_that_are_distributions_are_drawn_from_them() {
    for seed in [3, 4] {
        // Which sample is where, and whether it is mirrored, is that of any data set of this length.
        let mut order = loader(Named::new(5, &[]), 4, seed, 1);
        for (step, pixels) in (0..6).zip(draws(&[], seed, 2, &[0, 1, 2, 3, 4, 5])) {
            for ((index, flip), (i, drawn)) in samples(&mut order, step).into_iter().zip((0..).zip(pixels.chunks(6))) {
                let mut z = [f32::NAN; Spread::WIDTH];
                Philox::new(seed, Stream::Latent).normal(&mut z, 0, 4 * step + i);
                for (place, z) in z.into_iter().enumerate() {
                    let [mean, std] = Spread::at(index, flip, place);
                    assert_eq!(drawn[place], mean + std * z, "place {place} of sample {i} of step {step}");
                }
            }
        }
    }
}

#[test]
fn draws_are_the_same_for_any_number_of_threads_and_after_any_other() {
    let run = draws(&[], 42, 1, &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(draws(&[], 42, 4, &[0, 1, 2, 3, 4, 5, 6, 7, 8]), run);
    let other = [7, 8, 3, 3, 2, 0, 6];
    assert_eq!(draws(&[], 42, 2, &other), other.map(|step: u64| run[step as usize].clone()));
}

/// 1 and 4 are bad: 2 stands in for the first, 0 for the second, with draws of their own.
#[test]
fn a_sample_of_which_the_deviations_are_damaged_is_replaced() {
    let run = draws(&[1, 4], 7, 1, &[0, 1, 2, 3, 4]).concat();
    // Standard deviations are 5 at most, and means of others 100 away.
    let indices: Vec<usize> = run.chunks(6).map(|drawn| ((drawn[0] + 50.0) / 100.0) as usize).collect();
    for epoch in indices.chunks(5) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 0, 2, 2, 3]);
    }
    let once: std::collections::HashSet<_> =
        run.chunks(6).map(|drawn| drawn.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect();
    assert_eq!(once.len(), 20, "no sample is drawn alike twice");
    assert_eq!(draws(&[1, 4], 7, 3, &[0, 1, 2, 3, 4]).concat(), run);
}

/// Two samples, of which the second is anything but a sample.
struct Wrong {
    read: fn() -> u32,
    classes: Vec<String>,
}

impl Dataset for Wrong {
    fn shape(&self) -> [usize; 3] {
        [1, 1, 1]
    }

    fn class_names(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        2
    }

    fn read(&self, index: usize, _flip: bool, _out: &mut [f32]) -> Result<u32> {
        Ok(if index == 1 { (self.read)() } else { 0 })
    }
}

#[test]
fn what_a_data_set_does_wrong_is_named() {
    for (read, what) in [
        ((|| panic!("no more {}", "room")) as fn() -> u32, "panicked when it read sample 1: no more room"),
        (|| panic!("a bare word"), "panicked when it read sample 1: a bare word"),
        (|| std::panic::panic_any(5), "panicked when it read sample 1"),
        (|| 3, "sample 1 has the label 3, but the data set has 3 classes"),
    ] {
        let set = Arc::new(Wrong { read, classes: vec!["a".into(), "b".into(), "c".into()] });
        let mut loader = Loader::new(set, LoaderOptions { batch: 2, seed: 0, flip: false, threads: 2 }).unwrap();
        // It says so whenever it is asked.
        for step in [0, 1, 7] {
            let message = loader.next(step).unwrap_err().to_string();
            assert!(message.contains(what), "{message}");
        }
    }
}
