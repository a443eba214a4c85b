//! The configuration of a training run: one flat struct, one line of documentation per knob.
//!
//! The struct, the keys of the TOML file, the flags of `dtr-fused train` (a key with `-` for `_`), their help texts and the comments of
//! `--print-config` all come from the list below: a knob that is added there needs a default, and no more.

mod check;
mod source;
mod value;

pub use source::{Assignment, Layer};
pub use value::{DataKind, Decay, InitLabels, Precision, SamplerKind, ValidationWeights};

use super::optimizer::Update;
use crate::diffusion::{LossWeight, Prediction, Schedule, ScheduleKind, Timesteps};
use crate::error::Result;
use crate::model::config::{ModelConfig, TASKS};
use crate::model::dit::Init;
use crate::routing::Routing;
use value::Value;

/// One key of the configuration, as help texts and files show it.
#[derive(Clone, Copy, Debug)]
pub struct Knob {
    /// The key; the flag is the same with `-` for `_`.
    pub name: &'static str,
    /// What it does, with unit and range.
    pub help: &'static str,
    /// The group it is shown in.
    pub section: &'static str,
    /// Whether a run keeps it for life: resuming with another value would not be the same run.
    pub fixed: bool,
    /// What a value looks like, for help texts.
    pub value_name: &'static str,
}

macro_rules! knobs {
    (@is fixed) => { true };
    (@is) => { false };
    ($($section:literal { $(#[doc = $help:literal] $name:ident : $type:ty $(= $fixed:ident)?;)+ })+) => {
        /// Every knob of a training run. Build one with [`TrainConfig::preset`] or [`TrainConfig::from_layers`].
        #[derive(Clone, Debug, PartialEq)]
        pub struct TrainConfig {
            $($(#[doc = $help] pub $name: $type,)+)+
        }

        /// Every key, in the order in which files and help texts show them.
        pub const KNOBS: &[Knob] = &[$($(Knob {
            name: stringify!($name),
            help: $help.trim_ascii(),
            section: $section,
            fixed: knobs!(@is $($fixed)?),
            value_name: <$type as Value>::NAME,
        },)+)+];

        impl TrainConfig {
            /// Sets `name` from its text; `Ok(false)` when there is no such key, the expected form when the text has another.
            fn assign(&mut self, name: &str, text: &str) -> std::result::Result<bool, String> {
                match name {
                    $($(stringify!($name) => self.$name = Value::parse(text).ok_or_else(<$type as Value>::expected)?,)+)+
                    _ => return Ok(false),
                }
                Ok(true)
            }

            /// The value of `name` as TOML writes it.
            ///
            /// # Panics
            /// When no knob has this name.
            pub fn toml_of(&self, name: &str) -> String {
                match name {
                    $($(stringify!($name) => self.$name.to_toml(),)+)+
                    _ => panic!("{name} is no knob"),
                }
            }
        }
    };
}

knobs! {
    "Model" {
        /// Size of the network: digits (small), DiT-S/2 and its kin (sizes S, B, L, XL; patches 2, 4, 8), or custom (give the next four)
        model: String = fixed;
        /// Channels C of the residual stream, a multiple of 4
        hidden_size: usize = fixed;
        /// Number of transformer blocks
        depth: usize = fixed;
        /// Attention heads; they divide hidden_size
        num_heads: usize = fixed;
        /// Side of the square of pixels that becomes one token; it divides image_size
        patch_size: usize = fixed;
        /// Width of the MLP, in hidden sizes
        mlp_ratio: f64 = fixed;
        /// Initial weights: published (DiT's), or small (timestep MLP Xavier, label table std 0.5: learns labels within a few hundred steps)
        init: Init = fixed;
        /// Weights to start from instead: a model.safetensors or ema.safetensors, or other weights with the official names and these sizes
        init_from: String = fixed;
        /// Label table with init_from: given (that of the file), or new (for other classes: drawn, but for the row of "no class")
        init_labels: InitLabels = fixed;
    }
    "Routing" {
        /// Which channels a block computes: paper (as published), sublayer (skips in every product), random (baseline), dense (no routing)
        routing: Routing = fixed;
        /// Share of active channels, above 0 and at most 1
        beta: f64 = fixed;
        /// How fast the windows slide with the timestep: (t/999)^alpha
        alpha: f64 = fixed;
    }
    "Data" {
        /// Training images: digits (built in), a folder with one subfolder of images per class, or an array file (.npy, .safetensors; images as bytes or numbers from -1 to 1)
        data: String;
        /// Side of the images in pixels; 0 = that of the data (folders of images are scaled to 32)
        image_size: usize = fixed;
        /// Channels of the images or latents; 0 = those of the data
        in_channels: usize = fixed;
        /// Number of classes; 0 = those of the data
        num_classes: usize = fixed;
        /// What the samples are: images (in [-1, 1]), latents (any numbers), or auto (what the data say)
        data_kind: DataKind = fixed;
        /// Follow links that lead out of a folder of images, which then may be made of links to folders or files elsewhere
        follow_links: bool;
        /// Mirror half of the training images left to right
        flip: bool;
        /// Share of labels replaced by "no class", which classifier-free guidance needs; 0 to 1, with 1 the model learns no classes
        label_dropout: f64;
        /// Samples that are kept from training, drawn by validation_seed, to measure the validation loss on; 0 = none
        validation_samples: usize = fixed;
        /// Data to measure the validation loss on instead, as data; "" = none
        validation_data: String;
        /// Seed of the choice of these samples, and of the noise on what is validated on: with one, runs of any seed can be compared
        validation_seed: u64 = fixed;
    }
    "Diffusion" {
        /// What the model predicts: noise, v (Salimans and Ho, 2022), or flow (the velocity of a rectified flow, as SiT)
        prediction: Prediction = fixed;
        /// Learn the variance too, from the variational bound (Nichol and Dhariwal, 2021), as published DiTs do
        learn_sigma: bool = fixed;
        /// Noise schedule over 1000 timesteps: linear or cosine; a flow has its own
        schedule: ScheduleKind = fixed;
        /// Timesteps that are trained on: uniform, or logit-normal (or logit-normal-MEAN-STD; Esser et al., 2024: more in the middle)
        timesteps: Timesteps = fixed;
        /// Weight of the loss by timestep: constant, min-snr-5 (any number), p2 (or p2-GAMMA-K) or uw (learned, over 8 groups of timesteps)
        loss_weight: LossWeight = fixed;
        /// Learning rate of the log-variances of uw
        uw_lr: f64;
    }
    "Training" {
        /// Number of training steps (weight updates)
        steps: u64;
        /// Images per step
        batch_size: usize;
        /// Parts that a batch is computed in, one after the other, to need less memory; it divides batch_size
        grad_accumulation: usize;
        /// Learning rate of AdamW after the warm-up
        lr: f64;
        /// Steps over which the learning rate grows from 0 to lr
        warmup_steps: u64;
        /// Learning rate after the warm-up: constant, or cosine or linear (falls to lr times min_lr_ratio at the last step)
        lr_decay: Decay;
        /// Steps after which it begins to fall, being constant before; 0 = right after the warm-up
        decay_start: u64;
        /// Where the decay ends, as a share of lr; 0 to 1
        min_lr_ratio: f64;
        /// Decoupled weight decay of AdamW, per step and lr, of all weights: biases and embeddings too, as plain AdamW of PyTorch has it
        weight_decay: f64;
        /// Decay of AdamW's mean of gradients, per step
        adam_beta1: f64;
        /// Decay of AdamW's mean of squared gradients, per step
        adam_beta2: f64;
        /// Added to the root in AdamW's denominator
        adam_eps: f64;
        /// Longest gradient (L2 norm over all parameters); longer ones are scaled down to it; 0 = off
        grad_clip: f64;
        /// Decay of the moving average of the weights, per step
        ema_decay: f64;
        /// Let the moving average forget faster at first: decay = min(ema_decay, (1+n)/(10+n)) at step n
        ema_warmup: bool;
        /// Steps in a row with a non-finite loss or gradient (each is skipped) after which training stops
        max_nonfinite_steps: u64;
        /// Seed of everything random in training and its samples: weights, order, timesteps, noise, dropout
        seed: u64 = fixed;
    }
    "Machine" {
        /// Where to compute: auto, cpu, cuda or cuda:N
        device: String;
        /// Number format of products, and on a GPU of activations: f32, or bf16 (on the CPU with AMX only)
        precision: Precision;
        /// Keep only the input of each block for the backward pass and compute the rest again: less memory, a third more work, the same bits
        checkpoint_activations: bool;
        /// Threads on the CPU; 0 = one per core (the result is the same)
        threads: usize;
    }
    "Output" {
        /// Directory of the run, new or empty; "" = runs/MODEL-ROUTING-NUMBER
        out: String = fixed;
        /// Steps from one line of metrics.jsonl to the next; a validation loss has a line in any case
        log_every: u64;
        /// Steps from one validation loss to the next (and one at the end); 0 = only at the end
        validation_every: u64;
        /// Weights it is measured with: ema (their moving average), or model (the weights themselves)
        validation_weights: ValidationWeights;
        /// Times that each sample is measured for it, with other noise and timesteps: the mean over more is less noisy
        validation_repeats: usize;
        /// Steps from one checkpoint to the next (and one at the end); 0 = only at the end
        checkpoint_every: u64;
        /// Latest checkpoints that are kept
        keep_checkpoints: usize;
        /// Checkpoints whose step is a multiple of this are kept for ever; 0 = none
        keep_every: u64;
        /// Keep the checkpoint with the lowest validation loss so far too, of the steps that have both; sample and validate take it with --best
        keep_best: bool;
        /// Steps from one grid of samples to the next (and one at the end); 0 = only at the end
        sample_every: u64;
        /// Images per class in a grid of samples
        samples_per_class: usize;
        /// Classes in a grid of samples, from the first on
        sample_classes: usize;
        /// Sampler of the grids: ddim, dpm++ (fewer steps) or ddpm
        sample_sampler: SamplerKind;
        /// Denoising steps of the grids, 1 to 1000
        sample_steps: usize;
        /// Strength of classifier-free guidance in the grids; 1 = none, as always with label_dropout 0 or 1
        sample_cfg: f64;
    }
}

/// Most times that a sample is validated.
pub(crate) const MOST_REPEATS: usize = 1 << 10;

/// Guidance where nothing is said.
const GUIDANCE: f64 = 1.5;

/// Shape of a network: hidden size, depth, heads, patch size.
fn shape_of(model: &str) -> Option<[usize; 4]> {
    if model == "digits" || model == "custom" {
        return Some([128, 4, 4, 2]);
    }
    ModelConfig::published(model).map(|of| [of.hidden_size, of.depth, of.num_heads, of.patch_size])
}

impl Default for TrainConfig {
    /// The `digits` model on the built-in digits.
    fn default() -> Self {
        TrainConfig {
            model: "digits".into(),
            hidden_size: 128,
            depth: 4,
            num_heads: 4,
            patch_size: 2,
            mlp_ratio: 4.0,
            init: Init::Small,
            init_from: String::new(),
            init_labels: InitLabels::Given,
            routing: Routing::Paper,
            beta: 0.8,
            alpha: 4.0,
            data: "digits".into(),
            image_size: 0,
            in_channels: 0,
            num_classes: 0,
            data_kind: DataKind::Auto,
            follow_links: false,
            flip: false,
            label_dropout: 0.1,
            validation_samples: 0,
            validation_data: String::new(),
            validation_seed: 0,
            prediction: Prediction::Noise,
            learn_sigma: true,
            schedule: ScheduleKind::Cosine,
            timesteps: Timesteps::Uniform,
            loss_weight: LossWeight::Constant,
            uw_lr: 0.025,
            steps: 600,
            batch_size: 128,
            grad_accumulation: 1,
            lr: 3e-3,
            warmup_steps: 50,
            lr_decay: Decay::Cosine,
            decay_start: 0,
            min_lr_ratio: 0.1,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_eps: 1e-8,
            grad_clip: 0.0,
            ema_decay: 0.999,
            ema_warmup: true,
            max_nonfinite_steps: 10,
            seed: 0,
            device: "auto".into(),
            precision: Precision::F32,
            checkpoint_activations: false,
            threads: 0,
            out: String::new(),
            log_every: 10,
            validation_every: 100,
            validation_weights: ValidationWeights::Ema,
            validation_repeats: 1,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            keep_every: 0,
            keep_best: false,
            sample_every: 200,
            samples_per_class: 10,
            sample_classes: 10,
            sample_sampler: SamplerKind::Ddim,
            sample_steps: 50,
            sample_cfg: GUIDANCE,
        }
    }
}

impl TrainConfig {
    /// The defaults for a model and its data.
    ///
    /// `digits` and `custom` are made for small images and few steps. The `DiT` models train as the DTR paper does: AdamW at a
    /// constant 1e-4, no weight decay, batches of 256, 400,000 steps, cosine schedule, moving average 0.9999, mirrored images
    /// (Park et al., ICLR 2024, section 5.1 and the authors' configuration files).
    ///
    /// # Errors
    /// When there is no such model.
    pub fn preset(model: &str, data: &str) -> Result<Self> {
        let mut config = TrainConfig::default();
        config.set_model(model)?;
        if model.starts_with("DiT-") {
            config = TrainConfig {
                init: Init::Published,
                steps: 400_000,
                batch_size: 256,
                lr: 1e-4,
                warmup_steps: 0,
                lr_decay: Decay::Constant,
                ema_decay: 0.9999,
                ema_warmup: false,
                log_every: 100,
                validation_every: 5_000,
                checkpoint_every: 5_000,
                keep_every: 50_000,
                sample_every: 5_000,
                samples_per_class: 4,
                ..config
            };
        }
        config.flip = crate::data::may_flip(data);
        config.data = data.into();
        Ok(config)
    }

    /// The names that `model` may have.
    pub fn model_names() -> Vec<String> {
        let published = ["S", "B", "L", "XL"].into_iter().flat_map(|s| [2, 4, 8].map(|p| format!("DiT-{s}/{p}")));
        published.chain(["digits".into(), "custom".into()]).collect()
    }

    /// Names the model and takes its shape.
    fn set_model(&mut self, model: &str) -> Result<()> {
        let Some(shape) = shape_of(model) else {
            let names = Self::model_names();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let near = value::did_you_mean(model, names.iter().copied());
            return Err(crate::Error::usage(format!(
                "there is no model '{model}'{near} (give one of {})",
                names.join(", ")
            )));
        };
        [self.hidden_size, self.depth, self.num_heads, self.patch_size] = shape;
        self.mlp_ratio = 4.0;
        self.model = model.into();
        Ok(())
    }

    /// Whether the samples are images. Runs that were begun when this was not written down tell by their channels.
    pub fn are_images(&self) -> bool {
        match self.data_kind {
            DataKind::Auto => matches!(self.in_channels, 1 | 3),
            kind => kind == DataKind::Images,
        }
    }

    /// Guidance of samples where nothing is said: none for a model that never saw a sample without its label, or with it.
    pub fn default_cfg(&self) -> f64 {
        if self.label_dropout == 0.0 || self.no_classes() { 1.0 } else { GUIDANCE }
    }

    /// Whether the model never sees a label: then what is asked of it is of no class, too.
    pub fn no_classes(&self) -> bool {
        self.label_dropout == 1.0
    }

    /// The decay of the moving average at update `n` (the first update is 0).
    pub fn ema_decay_at(&self, n: u64) -> f64 {
        let warm = (1.0 + n as f64) / (10.0 + n as f64);
        if self.ema_warmup { self.ema_decay.min(warm) } else { self.ema_decay }
    }

    /// The share of the initial weights that the moving average holds after `n` updates; with a warm-up, of which the first update leaves a
    /// tenth, at most.
    pub fn initial_share_after(&self, n: u64) -> f64 {
        match self.ema_warmup {
            true => self.ema_decay_at(0).powf(n.min(1) as f64),
            false => self.ema_decay.powf(n as f64),
        }
    }

    /// The learning rate of step `step` (the first step is 0).
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let start = self.decay_start.max(self.warmup_steps);
        let last = (self.steps.saturating_sub(1)).saturating_sub(start).max(1) as f64;
        let progress = (step.saturating_sub(start) as f64 / last).min(1.0);
        let left = match self.lr_decay {
            Decay::Constant => return self.lr,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
        };
        self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)
    }

    /// The update of step `step` (the first is 0), after `n` updates before it; they are fewer where steps were skipped.
    pub fn update_at(&self, step: u64, n: u64) -> Update {
        Update {
            lr: self.lr_at(step),
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_eps,
            weight_decay: self.weight_decay,
            ema_decay: self.ema_decay_at(n),
            grad_scale: 1.0,
        }
    }

    /// The noise schedule over all timesteps, for what the model predicts.
    ///
    /// # Errors
    /// As [`Schedule::predicting`].
    pub fn noise_schedule(&self) -> Result<Schedule> {
        Schedule::predicting(self.prediction, self.schedule, TASKS)
    }

    /// The model, once the data have filled in what they decide ([`TrainConfig::fit_to_data`]).
    pub fn model_config(&self) -> ModelConfig {
        ModelConfig {
            hidden_size: self.hidden_size,
            depth: self.depth,
            num_heads: self.num_heads,
            patch_size: self.patch_size,
            input_size: self.image_size,
            in_channels: self.in_channels,
            num_classes: self.num_classes,
            null_class: true,
            mlp_ratio: self.mlp_ratio,
            learn_sigma: self.learn_sigma,
            routing: self.routing,
            beta: self.beta,
            alpha: self.alpha,
            routing_seed: self.seed,
        }
    }
}
