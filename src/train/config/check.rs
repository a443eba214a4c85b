//! What a configuration must satisfy, and what it becomes when the data are known.

use super::{Decay, InitLabels, MOST_REPEATS, TrainConfig};
use crate::data::array_file::MAX_SAMPLE;
use crate::diffusion::{LossWeight, Timesteps};
use crate::error::{Error, Result};
use crate::model::config::TASKS;

/// Side that a folder of images is scaled to when the configuration says nothing.
const FOLDER_IMAGE_SIZE: usize = 32;

/// Tokens per image: attention compares each with each.
const MOST_TOKENS: usize = 1 << 16;

impl TrainConfig {
    /// Checks every value and how they fit together.
    ///
    /// # Errors
    /// [`Error::Usage`]: one sentence for the first value that is wrong.
    pub fn validate(&self) -> Result<()> {
        self.check_model()?;
        self.check_data()?;
        self.check_training()?;
        self.check_output()
    }

    /// Fills in what the data decide (a side, channels or classes of 0) and checks that the rest fits them.
    ///
    /// `size`, `channels`, `classes`: side of the square images, their channels and number of classes as the data have them.
    ///
    /// # Errors
    /// [`Error::Usage`] when the configuration says something else than the data, and as [`validate`](Self::validate).
    pub fn fit_to_data(&mut self, size: usize, channels: usize, classes: usize) -> Result<()> {
        let data = &self.data;
        for (key, value, found) in [
            ("image_size", &mut self.image_size, size),
            ("in_channels", &mut self.in_channels, channels),
            ("num_classes", &mut self.num_classes, classes),
        ] {
            // More classes than the data show are allowed: a part of a data set can be trained on.
            if *value == 0 || key == "num_classes" && *value > found {
                *value = (*value).max(found);
            } else if *value != found {
                return Err(Error::usage(format!(
                    "{key} is {value}, but the data '{data}' have {found}: give {key} 0 to take it from the data"
                )));
            }
        }
        self.validate()
    }

    /// Checks a strength of guidance, which `key` names, for samples of a model trained like this.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is not 0 to 1000, or the model cannot be guided: without label dropout it has not
    /// learned what an image without a class is, and with nothing else no class.
    pub fn check_cfg(&self, key: &str, cfg: f64) -> Result<()> {
        guidance(key, cfg)?;
        if self.label_dropout == 0.0 && cfg != 1.0 {
            return Err(Error::usage(format!(
                "{key} is {cfg}, but guidance needs a model that was trained with label_dropout above 0: give 1"
            )));
        }
        if self.no_classes() && cfg != 1.0 {
            return Err(Error::usage(format!(
                "{key} is {cfg}, but a model that is trained with label_dropout 1 knows no class to guide to: give 1"
            )));
        }
        Ok(())
    }

    /// The side in pixels to which a folder of images is scaled.
    pub fn folder_image_size(&self) -> usize {
        if self.image_size == 0 { FOLDER_IMAGE_SIZE } else { self.image_size }
    }

    fn check_model(&self) -> Result<()> {
        let mut model = self.model_config();
        // What the data decide is checked when they are known.
        model.input_size = if self.image_size == 0 { self.patch_size } else { self.image_size };
        model.in_channels = self.in_channels.max(1);
        model.num_classes = self.num_classes.max(1);
        model.check()?;
        if model.tokens() > MOST_TOKENS {
            return Err(Error::usage(format!(
                "image_size {} and patch_size {} make {} tokens per image, but at most {MOST_TOKENS} are possible",
                model.input_size,
                model.patch_size,
                model.tokens()
            )));
        }
        let numbers = model.in_channels.saturating_mul(model.input_size).saturating_mul(model.input_size);
        if numbers > MAX_SAMPLE {
            return Err(Error::usage(format!(
                "in_channels {} and image_size {} make {numbers} numbers per image, but at most {MAX_SAMPLE} are possible",
                model.in_channels, model.input_size
            )));
        }
        Ok(())
    }

    fn check_data(&self) -> Result<()> {
        if self.data.is_empty() {
            return Err(Error::usage("data is empty: give digits, a folder of images, or an array file"));
        }
        share("label_dropout", self.label_dropout)?;
        not_negative("uw_lr", self.uw_lr)?;
        if self.loss_weight == LossWeight::Uncertainty && self.timesteps != Timesteps::Uniform {
            return Err(Error::usage(format!(
                "timesteps is {}, but loss_weight uw draws as many of each group of timesteps: give timesteps uniform",
                self.timesteps
            )));
        }
        self.loss_weight.check_batch(self.batch_size)
    }

    fn check_training(&self) -> Result<()> {
        if self.validation_samples > 0 && !self.validation_data.is_empty() {
            return Err(Error::usage(format!(
                "validation_samples is {} and validation_data is '{}', but a run has one of them: leave one out (a run \
                 that was begun with validation_samples keeps them)",
                self.validation_samples, self.validation_data
            )));
        }
        if self.init_labels == InitLabels::New && self.init_from.is_empty() {
            return Err(Error::usage(
                "init_labels is new, but no weights are given to start from: give --init-from FILE",
            ));
        }
        at_least_one("validation_repeats", self.validation_repeats)?;
        at_most("validation_repeats", self.validation_repeats, MOST_REPEATS)?;
        at_least_one("steps", self.steps as usize)?;
        at_least_one("batch_size", self.batch_size)?;
        at_most("batch_size", self.batch_size, 1 << 20)?;
        at_least_one("grad_accumulation", self.grad_accumulation)?;
        if !self.batch_size.is_multiple_of(self.grad_accumulation) {
            return Err(Error::usage(format!(
                "grad_accumulation is {}, but it must divide batch_size {}: change one of the two",
                self.grad_accumulation, self.batch_size
            )));
        }
        require("lr", self.lr, self.lr > 0.0 && self.lr <= 1e3, "a number above 0 and at most 1000")?;
        if self.lr_decay != Decay::Constant && self.decay_start >= self.steps {
            return Err(Error::usage(format!(
                "decay_start is {}, but it must be below steps, {}: give lr_decay constant where nothing is to fall",
                self.decay_start, self.steps
            )));
        }
        share("min_lr_ratio", self.min_lr_ratio)?;
        not_negative("weight_decay", self.weight_decay)?;
        not_negative("grad_clip", self.grad_clip)?;
        // The update reads it as f32: smaller ones would be 0 there, and divide by it.
        let in_f32 = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
        require("adam_eps", self.adam_eps, in_f32.contains(&self.adam_eps), "at least 1.2e-38 and at most 3.4e38")?;
        decay("adam_beta1", self.adam_beta1)?;
        decay("adam_beta2", self.adam_beta2)?;
        decay("ema_decay", self.ema_decay)?;
        at_least_one("max_nonfinite_steps", self.max_nonfinite_steps as usize)
    }

    fn check_output(&self) -> Result<()> {
        let cuda = self.device.strip_prefix("cuda");
        let numbered = |rest: &str| rest.is_empty() || rest.strip_prefix(':').is_some_and(|n| n.parse::<u16>().is_ok());
        if !matches!(self.device.as_str(), "auto" | "cpu") && !cuda.is_some_and(numbered) {
            return Err(Error::usage(format!("device is '{}', but it must be auto, cpu, cuda or cuda:N", self.device)));
        }
        at_most("threads", self.threads, 4096)?;
        at_least_one("log_every", self.log_every as usize)?;
        at_least_one("keep_checkpoints", self.keep_checkpoints)?;
        at_least_one("samples_per_class", self.samples_per_class)?;
        at_least_one("sample_classes", self.sample_classes)?;
        at_most("samples_per_class", self.samples_per_class, 1000)?;
        at_most("sample_classes", self.sample_classes, 1000)?;
        at_least_one("sample_steps", self.sample_steps)?;
        at_most("sample_steps", self.sample_steps, TASKS)?;
        guidance("sample_cfg", self.sample_cfg)
    }
}

fn at_least_one(key: &str, value: usize) -> Result<()> {
    if value == 0 { Err(Error::usage(format!("{key} is 0, but it must be at least 1"))) } else { Ok(()) }
}

fn at_most(key: &str, value: usize, most: usize) -> Result<()> {
    if value > most { Err(Error::usage(format!("{key} is {value}, but it may be at most {most}"))) } else { Ok(()) }
}

/// Written so that NaN is refused.
fn require(key: &str, value: f64, good: bool, range: &str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::usage(format!("{key} is {value}, but it must be {range}"))) }
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    require(key, value, value >= 0.0 && value.is_finite(), "a number, 0 or more")
}

/// The strength of guidance. Beyond 1000 every pixel would be black or white.
fn guidance(key: &str, value: f64) -> Result<()> {
    require(key, value, (0.0..=1e3).contains(&value), "0 to 1000")
}

fn share(key: &str, value: f64) -> Result<()> {
    require(key, value, (0.0..=1.0).contains(&value), "a share from 0 to 1")
}

fn decay(key: &str, value: f64) -> Result<()> {
    require(key, value, (0.0..1.0).contains(&value), "at least 0 and below 1")
}

#[cfg(test)]
mod tests {
    use super::super::KNOBS;
    use super::*;

    /// Sets keys of the default configuration and validates it.
    fn with(pairs: &[(&str, &str)]) -> Result<()> {
        let mut config = TrainConfig::default();
        for (key, text) in pairs {
            assert_eq!(config.assign(key, text), Ok(true), "{key}={text}");
        }
        config.validate()
    }

    #[test]
    fn every_preset_is_valid() {
        let names = TrainConfig::model_names();
        assert_eq!(names.len(), 14);
        for name in &names {
            let mut config = TrainConfig::preset(name, "digits").unwrap();
            config.validate().unwrap();
            config.fit_to_data(32, 4, 1000).unwrap();
            assert_eq!((config.image_size, config.in_channels, config.num_classes), (32, 4, 1000));
        }
    }

    /// Park et al., ICLR 2024, section 5.1, and the authors' configuration files.
    #[test]
    fn published_models_train_as_published() {
        let config = TrainConfig::preset("DiT-B/2", "latents.npy").unwrap();
        assert_eq!((config.lr, config.weight_decay, config.batch_size, config.steps), (1e-4, 0.0, 256, 400_000));
        assert_eq!([config.lr_at(0), config.lr_at(399_999)], [1e-4; 2]);
        assert_eq!([config.ema_decay_at(0), config.ema_decay_at(399_999)], [0.9999; 2]);
        assert_eq!((config.adam_beta1, config.adam_beta2, config.adam_eps), (0.9, 0.999, 1e-8));
        assert_eq!((config.alpha, config.beta, config.label_dropout, config.grad_clip), (4.0, 0.8, 0.1, 0.0));
    }

    #[test]
    fn bad_values_are_refused_in_one_sentence_that_names_the_key() {
        for (key, text) in [
            ("beta", "0"),
            ("beta", "1.5"),
            ("beta", "-0.1"),
            ("beta", "NaN"),
            ("beta", "0.001"),
            ("alpha", "0"),
            ("alpha", "inf"),
            ("batch_size", "0"),
            ("steps", "0"),
            ("num_heads", "0"),
            ("num_heads", "3"),
            ("hidden_size", "126"),
            ("hidden_size", "0"),
            ("hidden_size", "4000000000000"),
            ("hidden_size", "1000000"),
            ("image_size", "100000"),
            ("in_channels", "4000000"),
            ("patch_size", "0"),
            ("depth", "0"),
            ("mlp_ratio", "0"),
            ("mlp_ratio", "NaN"),
            ("lr", "0"),
            ("lr", "NaN"),
            ("lr", "inf"),
            ("decay_start", "600"),
            ("min_lr_ratio", "2"),
            ("adam_beta1", "1"),
            ("adam_beta2", "-1"),
            ("adam_eps", "0"),
            ("ema_decay", "1"),
            ("ema_decay", "NaN"),
            ("label_dropout", "1.1"),
            ("grad_clip", "-1"),
            ("weight_decay", "-1"),
            ("grad_accumulation", "0"),
            ("grad_accumulation", "3"),
            ("device", "gpu"),
            ("device", "cuda:x"),
            ("device", "cudax"),
            ("threads", "100000"),
            ("log_every", "0"),
            ("keep_checkpoints", "0"),
            ("sample_steps", "0"),
            ("sample_steps", "1001"),
            ("samples_per_class", "0"),
            ("sample_cfg", "NaN"),
            ("uw_lr", "NaN"),
            ("max_nonfinite_steps", "0"),
            ("data", ""),
        ] {
            let message = with(&[(key, text)]).expect_err(key).to_string();
            assert!(message.contains(key) && !message.contains('\n'), "{key}={text}: {message}");
        }
        assert!(
            with(&[("loss_weight", "uw"), ("batch_size", "12")]).unwrap_err().to_string().contains("a multiple of 8")
        );
        let clustered = with(&[("loss_weight", "uw"), ("timesteps", "logit-normal")]).unwrap_err().to_string();
        assert!(clustered.contains("give timesteps uniform"), "{clustered}");
        assert!(with(&[("routing", "dense"), ("beta", "1.5")]).is_err());
        assert!(with(&[("image_size", "9")]).unwrap_err().to_string().contains("patch_size 2 does not divide"));
    }

    #[test]
    fn good_values_are_taken() {
        for pairs in [
            &[("beta", "1")][..],
            &[("hidden_size", "72"), ("num_heads", "3")],
            &[("device", "cuda:1")],
            &[("device", "cuda")],
            &[("loss_weight", "uw")],
            &[("timesteps", "logit-normal--0.5-1.2")],
            &[("routing", "dense"), ("beta", "0.1")],
            &[("min_lr_ratio", "0")],
            &[("decay_start", "599"), ("lr_decay", "linear")],
            &[("decay_start", "600"), ("lr_decay", "constant")],
            &[("sample_every", "0")],
            &[("grad_accumulation", "4")],
            &[("image_size", "16")],
            &[("label_dropout", "0")],
            &[("warmup_steps", "100000")],
        ] {
            with(pairs).unwrap();
        }
    }

    #[test]
    fn data_that_contradict_the_configuration_are_refused() {
        let mut config = TrainConfig { image_size: 16, ..TrainConfig::default() };
        assert!(config.fit_to_data(8, 1, 10).unwrap_err().to_string().contains("image_size is 16"));
        let mut config = TrainConfig { num_classes: 5, ..TrainConfig::default() };
        assert!(config.fit_to_data(8, 1, 10).unwrap_err().to_string().contains("num_classes is 5"));
        let mut config = TrainConfig { num_classes: 50, ..TrainConfig::default() };
        config.fit_to_data(8, 1, 10).unwrap();
        assert_eq!(config.num_classes, 50);
        let mut config = TrainConfig { patch_size: 3, ..TrainConfig::default() };
        assert!(config.fit_to_data(8, 1, 10).unwrap_err().to_string().contains("patch_size 3 does not divide"));
    }

    #[test]
    fn guidance_needs_label_dropout() {
        let mut config = TrainConfig::default();
        assert_eq!(config.default_cfg(), 1.5);
        config.check_cfg("cfg", 4.0).unwrap();
        assert!(config.check_cfg("cfg", -1.0).is_err() && config.check_cfg("cfg", f64::NAN).is_err());
        config.label_dropout = 0.0;
        assert_eq!(config.default_cfg(), 1.0);
        config.check_cfg("cfg", 1.0).unwrap();
        assert!(config.check_cfg("cfg", 1.5).unwrap_err().to_string().contains("cfg is 1.5, but guidance needs"));
        config.label_dropout = 1.0;
        assert_eq!(config.default_cfg(), 1.0);
        assert!(config.check_cfg("cfg", 0.0).unwrap_err().to_string().contains("label_dropout 1 knows no class"));
    }

    #[test]
    fn learning_rate_and_average_follow_their_formulas() {
        let config = TrainConfig { steps: 101, warmup_steps: 10, lr: 1.0, min_lr_ratio: 0.1, ..TrainConfig::default() };
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12;
        assert!(close(config.lr_at(0), 0.1) && close(config.lr_at(9), 1.0) && close(config.lr_at(10), 1.0));
        assert!(close(config.lr_at(55), 0.55) && close(config.lr_at(100), 0.1) && close(config.lr_at(500), 0.1));
        let constant = TrainConfig { lr_decay: Decay::Constant, ..config.clone() };
        assert!(close(constant.lr_at(100), 1.0));
        let linear = TrainConfig { lr_decay: Decay::Linear, ..config.clone() };
        assert!(close(linear.lr_at(10), 1.0) && close(linear.lr_at(28), 0.82) && close(linear.lr_at(100), 0.1));
        for lr_decay in [Decay::Cosine, Decay::Linear] {
            let late = TrainConfig { lr_decay, decay_start: 61, steps: 102, ..config.clone() };
            assert!(close(late.lr_at(4), 0.5) && (9..62).all(|step| late.lr_at(step) == 1.0), "{lr_decay}");
            assert!(close(late.lr_at(81), 0.55) && close(late.lr_at(101), 0.1), "{lr_decay}");
            // A start amid the warm-up is its end.
            let early = TrainConfig { decay_start: 5, ..config.clone() };
            assert!((0..101).all(|step| early.lr_at(step) == config.lr_at(step)));
        }
        // A constant rate that is made to fall begins where it was, and falls a step like any other.
        let begun = TrainConfig { steps: 60, ..constant.clone() };
        let cooled = TrainConfig { steps: 130, lr_decay: Decay::Linear, decay_start: 60, ..begun.clone() };
        assert!((0..61).all(|step| cooled.lr_at(step) == begun.lr_at(step)));
        assert!((60..129).all(|step| close(cooled.lr_at(step) - cooled.lr_at(step + 1), 0.9 / 69.0)));
        let short = TrainConfig { steps: 1, ..config.clone() };
        assert!(short.lr_at(0).is_finite());
        assert!(close(config.ema_decay_at(0), 0.1) && close(config.ema_decay_at(1_000_000), 0.999));
        assert!(close(TrainConfig { ema_warmup: false, ..config }.ema_decay_at(0), 0.999));
    }

    #[test]
    fn names_of_knobs_are_unique() {
        for (i, knob) in KNOBS.iter().enumerate() {
            assert!(KNOBS[..i].iter().all(|other| other.name != knob.name), "{}", knob.name);
        }
    }
}
