//! The default run does what it promises: samples of the class asked for, as varied as the real digits.

use dtr_fused::autograd::{Memory, Weights};
use dtr_fused::data::digits::Digits;
use dtr_fused::generate::Generator;
use dtr_fused::model::dit::Dit;
use dtr_fused::train::config::SamplerKind;
use dtr_fused::train::weights::read_weights;
use dtr_fused::train::{TrainConfig, checkpoint, samples, trainer};
use std::sync::atomic::AtomicBool;

const PIXELS: usize = 64;
const SAMPLES: usize = 300;

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).powi(2))).sum::<f64>().sqrt()
}

/// Mean distance of two images of `class`.
fn spread(images: &[f32], labels: &[u32], class: u32) -> f64 {
    let of_class: Vec<&[f32]> =
        images.chunks(PIXELS).zip(labels).filter(|(_, label)| **label == class).map(|(image, _)| image).collect();
    let pairs = of_class.iter().enumerate().flat_map(|(i, a)| of_class[..i].iter().map(move |b| distance(a, b)));
    let (sum, count) = pairs.fold((0.0, 0), |(sum, count), d| (sum + d, count + 1));
    sum / f64::from(count)
}

#[test]
fn the_default_run_learns_to_write_digits() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run").display().to_string();
    let config = TrainConfig { out, device: "cpu".into(), ..TrainConfig::default() };
    let outcome = trainer::start(config, &AtomicBool::new(false)).unwrap();
    assert!(outcome.finished && outcome.samples.is_some_and(|path| path.exists()));
    assert!(outcome.run.join("loss.png").exists());

    let (_, directory) = checkpoint::latest(&outcome.run).unwrap().unwrap();
    let config = TrainConfig::from_file(&directory.join(checkpoint::CONFIG)).unwrap();
    let dit = Dit::new(config.model_config()).unwrap();
    let mut weights = vec![0.0; dit.layout.len()];
    read_weights(&directory.join(checkpoint::EMA), &dit, &mut weights).unwrap();
    let labels: Vec<u32> = (0..SAMPLES).map(|i| (i * 10 / SAMPLES) as u32).collect();
    let mut memory = Memory::new();
    let mut sampled = |kind, steps, labels: &[u32]| {
        let sampler = samples::sampler(&config, kind, steps, 0.0, 1.5).unwrap();
        let generator = Generator { dit: &dit, weights: Weights::Cpu(&weights), sampler: &sampler, seed: 1 };
        trainer::in_pool(&config, || generator.images(&mut memory, labels, 100, |_| Ok(()))).unwrap()
    };
    let images = sampled(SamplerKind::Ddim, "50", &labels);
    // Both go where many steps go, dpm++ with fewer.
    let few: Vec<u32> = labels.iter().copied().step_by(10).collect();
    let many = sampled(SamplerKind::Ddim, "250", &few);
    let [ddim, dpm] =
        [SamplerKind::Ddim, SamplerKind::DpmPlusPlus].map(|kind| distance(&sampled(kind, "20", &few), &many));
    println!("20 steps of dpm++ are {:.2} times as far from 250 as those of ddim", dpm / ddim);
    assert!(dpm < 0.6 * ddim, "20 steps of dpm++ are {dpm} from 250, those of ddim {ddim}");

    let real = Digits::new().unwrap();
    let nearest = |image: &[f32]| {
        let distances = real.images().chunks(PIXELS).map(|real| distance(image, real));
        distances.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).expect("there are digits").0
    };
    let found: Vec<usize> = images.chunks(PIXELS).map(nearest).collect();
    let right = found.iter().zip(&labels).filter(|(found, label)| real.labels()[**found] == **label).count();
    println!("{right} of {SAMPLES} samples are recognised");
    assert!(right * 100 >= SAMPLES * 95, "a nearest-neighbour classifier recognises only {right} of {SAMPLES}");

    // Neither copies of a few images nor one image a class.
    let mut distinct = found.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert!(distinct.len() >= SAMPLES / 2, "the samples are near only {} of the real digits", distinct.len());
    for class in 0..10 {
        let (made, real) = (spread(&images, &labels, class), spread(real.images(), real.labels(), class));
        println!("class {class}: mean distance of two samples {made:.2}, of two real digits {real:.2}");
        assert!((0.6 * real..1.2 * real).contains(&made), "class {class} spreads {made}, the real digits {real}");
    }
}
