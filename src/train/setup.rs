//! What is made before the first step: the data, the device, the model with its weights, and whether memory holds them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::config::{DataKind, TrainConfig};
use super::learner::Learner;
use super::plan;
use super::state::{fingerprint_in, labels_in, names_in, names_of_classes, samples_in};
use crate::backend::Compute;
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{DType, Device};
use crate::data::fingerprint::{difference, fingerprint};
use crate::data::renumbered::renumber;
use crate::data::{self, Dataset, OpenOptions, array_file, hold_out};
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::model::memory::{activation_numbers, inference_numbers};
use crate::model::parts::largest_part;
use crate::system_memory::memory_bytes;

/// What a run learns from, and what it is measured on.
pub(super) struct Data {
    pub(super) training: Arc<dyn Dataset>,
    pub(super) validation: Option<Arc<dyn Dataset>>,
    pub(super) fingerprint: String, // of what it learns from
}

impl Data {
    fn new(training: Arc<dyn Dataset>, validation: Option<Arc<dyn Dataset>>) -> Self {
        Data { fingerprint: fingerprint(&*training), training, validation }
    }
}

/// Opens the data set that the configuration names.
pub(super) fn open_data(config: &TrainConfig, resumed: bool) -> Result<Arc<dyn Dataset>> {
    if resumed && config.data != "digits" && !Path::new(&config.data).exists() {
        return Err(Error::file(&config.data, "the data of this run are not there: say where they are with --data"));
    }
    let classes = one_class(config, &config.data).or((config.num_classes > 0).then_some(config.num_classes));
    let pictures = (config.data_kind != DataKind::Auto).then_some(config.data_kind == DataKind::Images);
    let options = OpenOptions {
        image_size: Some(config.folder_image_size()),
        num_classes: classes,
        pictures,
        follow_links: config.follow_links,
    };
    data::open(&config.data, options)
}

/// One class for all samples of the data `what`, if they have no labels and the model learns none.
fn one_class(config: &TrainConfig, what: &str) -> Option<usize> {
    (config.no_classes() && array_file::lacks_labels(Path::new(what))).then_some(1)
}

/// Completes the configuration with what only the data know, and splits them as it says. A run that is `resumed` has learned that already,
/// and keeps it.
pub(super) fn fit_to_data(config: &mut TrainConfig, dataset: Arc<dyn Dataset>, resumed: bool) -> Result<Data> {
    let [channels, height, width] = dataset.shape();
    let (samples, classes) = (dataset.len(), dataset.num_classes());
    if [samples, channels, height, width, classes].contains(&0) {
        return Err(Error::usage(format!(
            "the data '{}' are {samples} samples of {channels} x {height} x {width} in {classes} classes, but none of these numbers may \
             be 0",
            config.data
        )));
    }
    if height != width {
        let last = if channels == height {
            format!("; they look like [N, H, W, C], which should be [N, {width}, {channels}, {height}]")
        } else {
            ": crop them first".into()
        };
        return Err(Error::usage(format!(
            "the data '{}' are {height} x {width}, but the model needs squares{last}",
            config.data
        )));
    }
    let fits = |was: usize, is: usize| was == 0 || was == is;
    let same_shape = fits(config.image_size, height) && fits(config.in_channels, channels);
    if resumed && !(same_shape && (config.num_classes == 0 || classes <= config.num_classes)) {
        return Err(Error::usage(format!(
            "the data '{}' are {channels} x {height} x {width} in {classes} classes, but this run was begun with {} x {} x {} in \
             {}: give it the same data with --data, or start a new run",
            config.data, config.in_channels, config.image_size, config.image_size, config.num_classes
        )));
    }
    let kind = if dataset.is_pictures() { DataKind::Images } else { DataKind::Latents };
    if config.data_kind != DataKind::Auto && config.data_kind != kind {
        return Err(Error::usage(format!(
            "data_kind is {}, but the data '{}' are {kind}: give auto, and call them images or latents in a .safetensors file",
            config.data_kind, config.data
        )));
    }
    config.data_kind = kind;
    config.fit_to_data(height, channels, classes)?;
    if !config.validation_data.is_empty() {
        let what = &config.validation_data;
        if what != "digits" && !Path::new(what).exists() {
            let why =
                "the data to validate on are not there: say where they are with --validation-data (or '', for none)";
            return Err(Error::file(what, why));
        }
        let validation =
            validation_data(config, &config.validation_data, names_of_classes(&*dataset).map(<[String]>::to_vec))?;
        return Ok(Data::new(dataset, Some(validation)));
    }
    let held_out = config.validation_samples;
    if held_out == 0 {
        return Ok(Data::new(dataset, None));
    }
    if held_out >= samples {
        return Err(Error::usage(format!(
            "validation_samples is {held_out}, but the data '{}' have {samples}: leave some to train on",
            config.data
        )));
    }
    let [training, held_out] = hold_out(dataset, held_out, config.validation_seed)?;
    Ok(Data::new(training, Some(held_out)))
}

/// The samples that the run of `checkpoint` was validated on.
pub(crate) fn validated_data(config: &TrainConfig, checkpoint: &Path) -> Result<Arc<dyn Dataset>> {
    let (names, held_out) = (names_in(checkpoint), config.validation_samples);
    if !config.validation_data.is_empty() {
        return validation_data(config, &config.validation_data, names);
    }
    if held_out == 0 {
        return Err(Error::usage("this run was not validated: say with --data what to measure the loss on"));
    }
    let others = "give the same data, or others with --data, of which all samples are measured";
    if config.data != "digits" && !Path::new(&config.data).exists() {
        let what = format!("the data of which this run held out {held_out} samples are not there: {others}");
        return Err(Error::file(&config.data, what));
    }
    let dataset = validation_data(config, &config.data, names)?;
    let (were, are) = (samples_in(checkpoint).map(|left| left.saturating_add(held_out)), dataset.len());
    if were.is_some_and(|were| were != are) {
        return Err(Error::usage(format!(
            "the data '{}' have {are} samples, but had {} in training, of which others were held out: {others}",
            config.data,
            were.unwrap_or_default()
        )));
    }
    let [left, held_out] = hold_out(dataset, held_out, config.validation_seed)?;
    if let Some(how) = fingerprint_in(checkpoint).and_then(|were| difference(&were, &fingerprint(&*left))) {
        return Err(Error::usage(format!(
            "the data '{}' are others than in training ({how}), so others would be held out: {others}",
            config.data
        )));
    }
    Ok(held_out)
}

/// The data `what`, to validate a model of this configuration on. Unless it learns none, their classes must be some of those of training,
/// and are found by their `names`, if they have some.
pub(crate) fn validation_data(
    config: &TrainConfig,
    what: &str,
    names: Option<Vec<String>>,
) -> Result<Arc<dyn Dataset>> {
    let known = (!config.no_classes()).then_some(config.num_classes);
    let options = OpenOptions {
        image_size: Some(config.image_size),
        num_classes: one_class(config, what).or(known),
        pictures: Some(config.are_images()),
        follow_links: config.follow_links,
    };
    let dataset = data::open(what, options)?;
    let kind = |pictures| if pictures { DataKind::Images } else { DataKind::Latents };
    let ([channels, height, width], classes) = (dataset.shape(), dataset.num_classes());
    let side = config.image_size;
    let same = [channels, height, width] == [config.in_channels, side, side];
    if !same || known.is_some_and(|known| classes > known) || dataset.is_pictures() != config.are_images() {
        return Err(Error::usage(format!(
            "the data '{what}' are {} of {channels} x {height} x {width} in {classes} classes, but this model learned {} of {} x {side} x {side} \
             in {} classes: validate it on such",
            kind(dataset.is_pictures()),
            kind(config.are_images()),
            config.in_channels,
            config.num_classes
        )));
    }
    let Some(known) = known else { return Ok(dataset) };
    // Labels that never had names are numbers, and those of arrays too.
    if names.is_none() && data::is_array_file(Path::new(what)) {
        return Ok(dataset);
    }
    let both_named = names.is_some() && names_of_classes(&*dataset).is_some();
    let learned = names.unwrap_or_else(|| (0..known).map(|label| label.to_string()).collect());
    let (learned, found) = match (labels_in(&learned), labels_in(dataset.class_names())) {
        (Some(learned), Some(found)) => (learned, found),
        _ if both_named => (learned, dataset.class_names().to_vec()),
        // Labels and names say nothing of each other.
        _ => return Ok(dataset),
    };
    let numbers: HashMap<&String, u32> = learned.iter().zip(0..).collect();
    let number = |name| {
        numbers.get(name).copied().ok_or_else(|| {
            let (some, more) = (learned.len().min(3), if learned.len() > 3 { ", .." } else { "" });
            Error::usage(format!(
                "the data '{what}' have a class '{name}', but the model learned {}{more}: leave out other classes",
                learned[..some].join(", ")
            ))
        })
    };
    let labels: Vec<u32> = found.iter().map(number).collect::<Result<_>>()?;
    if labels.iter().zip(0..).all(|(&label, place)| label == place) {
        return Ok(dataset);
    }
    Ok(renumber(dataset, labels, learned))
}

/// Where this configuration computes, and a note where `auto` had to do with the processor.
///
/// # Errors
/// When the device is not there, or cannot compute in the precision or with the model's sizes.
pub fn compute(config: &TrainConfig) -> Result<(Compute, Option<String>)> {
    let (compute, note) = Compute::open(&config.device, config.precision.elem())?;
    if let Compute::Cuda { elem, .. } = &compute {
        config.model_config().check_cuda(*elem)?;
    }
    Ok((compute, note))
}

/// The model with its initial weights, where the configuration computes, and what there is to say about that.
pub(super) fn learner_on(config: &TrainConfig) -> Result<(Learner, Vec<String>)> {
    let (compute, note) = compute(config)?;
    let mut notes: Vec<String> = note.into_iter().collect();
    let mut dit = model(config)?;
    let (device, elem) = match &compute {
        Compute::Cuda { device, elem } => (device, elem),
        Compute::Cpu { elem } => {
            if *elem == DType::Bf16 {
                notes.push("the products of the blocks are in bf16".into());
            }
            return Ok((learner_of(config, dit, *elem)?, notes));
        }
    };
    let plan = plan::check(config, &mut dit, device, *elem)?;
    let (free, total) = device.memory()?;
    notes.push(format!("computing on {} in {}", device.name(), config.precision));
    let [free, total] = [free, total].map(plan::readable);
    notes.push(format!("memory of the device: {plan}; {free} of {total} were free"));
    Ok((learner_on_device(config, dit, device, *elem, |dit| dit.init(config.seed, config.init))?, notes))
}

/// A model on a device. Its weights are made while the kernels of its training step are compiled.
///
/// # Errors
/// When it does not fit the device or main memory, or the kernels do not compile.
pub fn learner_on_device(
    config: &TrainConfig,
    dit: Dit,
    device: &Arc<Device>,
    elem: DType,
    weights: impl FnOnce(&Dit) -> AlignedVec + Send,
) -> Result<Learner> {
    check_memory(config, &dit, 0)?;
    let (launches, _) = plan::launches(&dit, device, elem, config.batch_size / config.grad_accumulation)?;
    let schedule = config.noise_schedule()?;
    let learner = || {
        let weights = weights(&dit);
        Learner::on_device(dit, schedule, config.loss_weight, weights, device, elem)
    };
    let (prepared, learner) = rayon::join(|| device.prepare(&launches), learner);
    prepared.and(learner)
}

/// The model, without weights.
pub(super) fn model(config: &TrainConfig) -> Result<Dit> {
    let of_data =
        [("image_size", config.image_size), ("in_channels", config.in_channels), ("num_classes", config.num_classes)];
    if let Some((name, _)) = of_data.into_iter().find(|(_, size)| *size == 0) {
        return Err(Error::usage(format!(
            "{name} is 0, as the data are not known yet: call TrainConfig::fit_to_data first"
        )));
    }
    let mut dit = Dit::new(config.model_config())?;
    dit.checkpoint_activations = config.checkpoint_activations;
    Ok(dit)
}

/// The model with its initial weights, in main memory. (In bf16 it takes long without AMX: [`compute`] refuses that.)
///
/// # Errors
/// When the configuration contradicts itself, [`TrainConfig::fit_to_data`] was not called, or memory cannot hold it.
pub fn learner(config: &TrainConfig) -> Result<Learner> {
    learner_of(config, model(config)?, config.precision.elem())
}

fn learner_of(config: &TrainConfig, dit: Dit, elem: DType) -> Result<Learner> {
    let part = config.batch_size / config.grad_accumulation;
    check_memory(config, &dit, largest_part(&dit, part))?;
    let weights = dit.init(config.seed, config.init);
    let schedule = config.noise_schedule()?;
    Ok(Learner::new(dit, schedule, config.loss_weight, weights).with_products_in(elem))
}

/// Refuses what main memory surely cannot hold: weights and what goes with them, and the activations of `at_once` images, an estimate.
fn check_memory(config: &TrainConfig, dit: &Dit, at_once: usize) -> Result<()> {
    memory_bytes().map_or(Ok(()), |there| check_fits(config, dit, at_once, there as f64))
}

/// [`check_memory`] on a machine with `there` bytes.
fn check_fits(config: &TrainConfig, dit: &Dit, at_once: usize, there: f64) -> Result<()> {
    // Weights, gradients, two moments and the moving average.
    let weights = 5.0 * size_of::<f32>() as f64 * dit.layout.len() as f64;
    let checkpointed = dit.checkpoint_activations;
    let activations = size_of::<f32>() as f64 * activation_numbers(&dit.config, at_once, checkpointed);
    if weights.max((weights + activations) / 1.25) <= there {
        return Ok(());
    }
    let weights_fit = weights <= there;
    let [weights, activations, there] = [weights, activations, there].map(|bytes| bytes / 1e9);
    let model = &config.model;
    if !weights_fit {
        return Err(Error::usage(format!(
            "training {model} takes {weights:.1} GB for the weights and what goes with them, but it may take {there:.1} GB here: \
             choose a smaller model"
        )));
    }
    let images = if at_once == 1 { "one image".into() } else { format!("{at_once} images") };
    let mut remedies = Vec::new();
    if !checkpointed {
        remedies.push("give --checkpoint-activations".to_string());
    }
    if at_once > 1 {
        remedies.push(format!("give --grad-accumulation N for parts of fewer than {images}"));
    }
    remedies.push("choose a smaller model".to_string());
    Err(Error::usage(format!(
        "training {model} with {images} at a time takes about {:.1} GB (weights and what goes with them {weights:.1}, activations \
         {activations:.1}), but it may take {there:.1} GB here: {}",
        weights + activations,
        remedies.join(", or ")
    )))
}

/// Refuses to sample or validate (`doing`) where main memory surely cannot hold the weights and what a forward pass over `images` images
/// computes with, an estimate. If fewer would do, `remedy` says how.
///
/// # Errors
/// When that is more than this process may take.
pub fn check_inference_memory(config: &TrainConfig, images: usize, doing: &str, remedy: &str) -> Result<()> {
    memory_bytes().map_or(Ok(()), |there| check_inference_fits(config, images, there as f64, doing, remedy))
}

/// [`check_inference_memory`] on a machine with `there` bytes.
fn check_inference_fits(config: &TrainConfig, images: usize, there: f64, doing: &str, remedy: &str) -> Result<()> {
    let model = config.model_config();
    let tables = model.table_rows().map(|rows| (rows * model.hidden_size) as f64);
    let weights = model.parameters() as f64 + tables[0] + tables[1];
    let [weights, activations] = [weights, inference_numbers(&model, images)].map(|n| n * size_of::<f32>() as f64);
    if weights.max((weights + activations) / 1.25) <= there {
        return Ok(());
    }
    // One image is two samples with guidance.
    let remedy = if weights > there || images <= 2 { "a machine with more memory can" } else { remedy };
    Err(Error::usage(format!(
        "{doing} {} takes about {:.1} GB (weights {:.1}, {images} samples at a time {:.1}), but it may take {:.1} GB here: {remedy}",
        config.model,
        (weights + activations) / 1e9,
        weights / 1e9,
        activations / 1e9,
        there / 1e9,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_found_by_their_names() {
        let place = tempfile::tempdir().unwrap();
        let labels = |learned: &[&str], found: &[&str]| -> Result<Vec<u32>> {
            let folder = place.path().join(found.join("-"));
            for class in found {
                std::fs::create_dir_all(folder.join(class)).unwrap();
                image::RgbImage::new(4, 4).save(folder.join(class).join("a.png")).unwrap();
            }
            let (image_size, data_kind) = (4, DataKind::Images);
            let config =
                TrainConfig { image_size, in_channels: 3, num_classes: learned.len(), data_kind, ..Default::default() };
            let names = Some(learned.iter().map(|name| name.to_string()).collect());
            let data = validation_data(&config, folder.to_str().unwrap(), names)?;
            (0..data.len()).map(|index| data.read(index, false, &mut [0.0; 48])).collect()
        };
        assert_eq!(labels(&["cat", "dog"], &["cat", "dog"]).unwrap(), [0, 1]);
        assert_eq!(labels(&["cat", "cow", "dog"], &["cow", "dog"]).unwrap(), [1, 2]);
        assert_eq!(labels(&["0", "1", "2", "none"], &["1", "2"]).unwrap(), [1, 2]);
        assert_eq!(labels(&["07", "08"], &["8"]).unwrap(), [1]);
        assert_eq!(labels(&["07", "7"], &["7"]).unwrap(), [1]);
        for (learned, found) in [(["cat", "dog"], ["cow", "dog"]), (["07", "08"], ["08", "cow"])] {
            let error = labels(&learned, &found).unwrap_err().to_string();
            assert!(
                error.contains(&format!("have a class 'cow', but the model learned {}, {}", learned[0], learned[1]))
            );
        }
    }

    #[test]
    fn another_seed_draws_other_weights() {
        let weights = |seed| {
            let mut config = TrainConfig { seed, ..TrainConfig::default() };
            config.fit_to_data(8, 1, 10).unwrap();
            assert_eq!(config.model_config().routing_seed, seed);
            learner(&config).unwrap().weights
        };
        let [a, again, b] = [0, 0, 1].map(weights);
        assert!(*a == *again && *a != *b);
    }

    #[test]
    fn what_memory_cannot_hold_is_refused_with_what_would_help() {
        let config = TrainConfig {
            hidden_size: 256,
            image_size: 128,
            in_channels: 3,
            num_classes: 10,
            ..TrainConfig::default()
        };
        let mut dit = model(&config).unwrap();
        let says = |dit: &Dit, at_once, there| check_fits(&config, dit, at_once, there).unwrap_err().to_string();
        assert!(check_fits(&config, &dit, 64, 16e9).is_ok());
        assert_eq!(
            says(&dit, 64, 1e9),
            "training digits with 64 images at a time takes about 15.5 GB (weights and what goes with them 0.1, activations 15.4), but \
             it may take 1.0 GB here: give --checkpoint-activations, or give --grad-accumulation N for parts of fewer than 64 images, \
             or choose a smaller model"
        );
        dit = model(&TrainConfig { checkpoint_activations: true, ..config.clone() }).unwrap();
        let weights = 20.0 * dit.layout.len() as f64;
        let of_one = says(&dit, 1, weights);
        assert!(
            of_one.contains(" with one image at a time ") && of_one.ends_with("0.1 GB here: choose a smaller model"),
            "{of_one}"
        );
        assert!(says(&dit, 1, weights - 1.0).starts_with("training digits takes 0.1 GB for the weights and what"));
    }

    #[test]
    fn sizes_that_only_the_data_know_are_asked_for() {
        let mut config = TrainConfig::default();
        let message = learner(&config).err().expect("no data").to_string();
        assert_eq!(message, "image_size is 0, as the data are not known yet: call TrainConfig::fit_to_data first");
        config.fit_to_data(8, 1, 10).unwrap();
        assert!(learner(&config).is_ok());
    }

    #[test]
    fn samples_that_memory_cannot_hold_are_refused_with_what_would_help() {
        let config = TrainConfig { image_size: 128, in_channels: 3, num_classes: 10, ..TrainConfig::default() };
        let dit = model(&config).unwrap();
        let check =
            |images, there| check_inference_fits(&config, images, there, "sampling", "give a smaller --batch-size");
        assert!(check(128, 16e9).is_ok());
        let says = |images, there| check(images, there).unwrap_err().to_string();
        assert_eq!(
            says(2048, 1e9),
            "sampling digits takes about 62.6 GB (weights 0.0, 2048 samples at a time 62.6), but it may take 1.0 GB here: give a \
             smaller --batch-size"
        );
        let weights = 4.0 * dit.layout.len() as f64;
        assert!(says(2, weights - 1.0).ends_with(": a machine with more memory can"));
    }
}
