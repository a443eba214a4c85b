//! The types that a knob may have, and how their values are read and written.

use crate::backend::DType;
use crate::choice::choice;
use crate::diffusion::{LossWeight, Prediction, ScheduleKind, Timesteps};
use crate::model::dit::Init;
use crate::routing::Routing;

/// A type of knob: text to value and back. The text is that of a flag or of a TOML value without quotes.
pub(super) trait Value: Sized {
    /// Placeholder in help texts.
    const NAME: &'static str;
    /// The value that `text` stands for.
    fn parse(text: &str) -> Option<Self>;
    /// The value in TOML.
    fn to_toml(&self) -> String;
    /// What a text must be, after "it must be".
    fn expected() -> String;
}

macro_rules! number {
    ($type:ty, $name:literal, $expected:literal) => {
        impl Value for $type {
            const NAME: &'static str = $name;
            fn parse(text: &str) -> Option<Self> {
                text.parse().ok()
            }
            // Debug writes the shortest digits that give the same number back, in a form that TOML reads.
            fn to_toml(&self) -> String {
                format!("{self:?}")
            }
            fn expected() -> String {
                $expected.into()
            }
        }
    };
}

number!(f64, "X", "a number such as 0.5 or 1e-4");
number!(bool, "true|false", "true or false");

macro_rules! count {
    ($type:ty) => {
        impl Value for $type {
            const NAME: &'static str = "N";
            // TOML's integers are signed, so the upper half of these types could not be written back.
            fn parse(text: &str) -> Option<Self> {
                text.parse().ok().filter(|&n| i64::try_from(n).is_ok())
            }
            fn to_toml(&self) -> String {
                self.to_string()
            }
            fn expected() -> String {
                format!("a whole number from 0 to {}", i64::MAX)
            }
        }
    };
}

count!(usize);
count!(u64);

impl Value for String {
    const NAME: &'static str = "TEXT";
    fn parse(text: &str) -> Option<Self> {
        Some(text.into())
    }
    fn to_toml(&self) -> String {
        toml::Value::String(self.clone()).to_string()
    }
    fn expected() -> String {
        "a text".into()
    }
}

/// Makes a type that is written as one word a knob's type: its placeholder, and what the word must be.
macro_rules! word {
    ($type:ident, $name:expr, $expected:expr) => {
        impl Value for $type {
            const NAME: &'static str = $name;
            fn parse(text: &str) -> Option<Self> {
                text.parse().ok()
            }
            fn to_toml(&self) -> String {
                format!("\"{self}\"")
            }
            fn expected() -> String {
                $expected.into()
            }
        }
    };
}

word!(LossWeight, "constant|min-snr-5|p2|uw", "one of constant, min-snr-GAMMA, p2, p2-GAMMA-K, uw");
word!(Timesteps, "uniform|logit-normal", "one of uniform, logit-normal, logit-normal-MEAN-STD");

/// Makes enums whose values have names a knob's type.
macro_rules! choices {
    ($($type:ident),+) => { $(word!($type, $type::NAMES, format!("one of {}", $type::NAMES.replace('|', ", ")));)+ };
}

choices!(
    Routing,
    Prediction,
    ScheduleKind,
    Init,
    InitLabels,
    Decay,
    DataKind,
    Precision,
    SamplerKind,
    ValidationWeights
);

/// Learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// It stays.
    Constant,
    /// It falls as a half cosine.
    Cosine,
    /// It falls along a line.
    Linear,
}

choice!(Decay: Constant = "constant", Cosine = "cosine", Linear = "linear");

/// What the samples of a data set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataKind {
    /// What the data say.
    Auto,
    /// Numbers in [-1, 1], which samplers keep inside.
    Images,
    /// Any numbers.
    Latents,
}

choice!(DataKind: Auto = "auto", Images = "images", Latents = "latents");

/// Number format of products, and on a GPU of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE 754 single precision.
    F32,
    /// The upper 16 bits of it; statistics and updates stay in single precision.
    Bf16,
}

choice!(Precision: F32 = "f32", Bf16 = "bf16");

impl Precision {
    /// As the type of numbers.
    pub fn elem(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        }
    }
}

/// Where the rows of classes in the table of labels come from when a run starts from given weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitLabels {
    /// From these weights.
    Given,
    /// They are drawn.
    New,
}

choice!(InitLabels: Given = "given", New = "new");

/// Which weights are validated while a run trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValidationWeights {
    /// Their moving average.
    Ema,
    /// Those of the last step.
    Model,
}

choice!(ValidationWeights: Ema = "ema", Model = "model");

/// Sampling algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// Deterministic, few steps (Song et al., 2021).
    Ddim,
    /// Ancestral sampling (Ho et al., 2020).
    Ddpm,
    /// Deterministic, fewer steps: DPM-Solver++(2M) (Lu et al., 2022).
    DpmPlusPlus,
}

choice!(SamplerKind: Ddim = "ddim", Ddpm = "ddpm", DpmPlusPlus = "dpm++");

/// `; did you mean 'x'?` for the name nearest to `word`, or nothing when none is near.
pub(super) fn did_you_mean<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> String {
    let clean = word.to_lowercase().replace('-', "_");
    let score = |name: &str| {
        let name = name.to_lowercase().replace('-', "_");
        // A word that is part of a name (or the other way round) is near, however long the rest.
        let part = clean.len() >= 3 && (name.contains(&clean) || clean.contains(&name));
        strsim::jaro_winkler(&clean, &name) + if part { 0.2 } else { 0.0 }
    };
    names
        .map(|name| (score(name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|&(score, _)| score > 0.8)
        .map_or(String::new(), |(_, name)| format!("; did you mean '{name}'?"))
}
