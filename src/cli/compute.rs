//! Where to compute with a trained model.

use clap::Args;

use super::offered::{Offered, offered};
use crate::backend::Compute;
use crate::error::Result;
use crate::train::TrainConfig;
use crate::train::config::Precision;

/// The flags that say it.
#[derive(Debug, Args)]
pub(super) struct ComputeArgs {
    /// Threads; 0 = one per core (the result is the same)
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    threads: usize,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = Offered("auto|cpu|cuda".into(), clap::builder::StringValueParser::new()), hide_possible_values = true)]
    device: String,
    /// Number format of products [default: that of training if it is told, but f32 on a CPU without AMX]
    #[arg(long, value_name = Precision::NAMES, value_parser = offered::<Precision>(Precision::NAMES), hide_possible_values = true)]
    precision: Option<Precision>,
}

impl ComputeArgs {
    /// Puts them in the place of what `config` says, and checks them.
    pub(super) fn put_into(&self, config: &mut TrainConfig) -> Result<()> {
        config.threads = self.threads;
        config.device = self.device.clone();
        config.validate()
    }

    /// The device, and what there is to note about it, for a model of `config`.
    pub(super) fn open(&self, config: &TrainConfig) -> Result<(Compute, Option<String>)> {
        // Checkpoints hold f32, so what was trained in bf16 can be computed anywhere.
        match self.precision {
            Some(precision) => Compute::open(&self.device, precision.elem()),
            None => Compute::open_or_f32(&self.device, config.precision.elem()),
        }
    }
}
