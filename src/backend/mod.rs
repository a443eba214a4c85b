//! What computes: nothing here knows of diffusion or transformers.

pub mod cpu;
pub mod cuda;

use crate::error::{Error, Result};
use cuda::{DType, Device};
use std::sync::Arc;

const ONLY_F32: &str = "the CPU computes in f32 only: leave --precision out, or give f32";

/// Where to compute, and in which precision.
#[derive(Clone)]
pub enum Compute {
    /// On the processor, in f32.
    Cpu,
    /// On a CUDA device.
    Cuda {
        /// The device.
        device: Arc<Device>,
        /// Type of activations and of the weights that products read: f32 or bf16.
        elem: DType,
    },
}

impl Compute {
    /// What `--device` (`auto`, `cpu`, `cuda` or `cuda:N`) and `--precision` ask for, and a note where `auto` had to do with
    /// the processor.
    ///
    /// # Errors
    /// When the device is not there, or cannot compute in this precision.
    pub fn open(device: &str, bf16: bool) -> Result<(Self, Option<String>)> {
        let on_cpu = |why: Option<Error>| match (bf16, why) {
            (false, why) => Ok((Compute::Cpu, why.map(|why| format!("computing on the CPU: {why}")))),
            (true, None) => Err(Error::usage(ONLY_F32)),
            (true, Some(why)) => Err(Error::usage(format!("{why}; {ONLY_F32}"))),
        };
        if device == "cpu" {
            return on_cpu(None);
        }
        let ordinal = match device.strip_prefix("cuda:") {
            Some(number) => number.parse().ok(),
            None => ["auto", "cuda"].contains(&device).then_some(0),
        };
        let ordinal =
            ordinal.ok_or_else(|| Error::usage(format!("device is '{device}': give auto, cpu, cuda or cuda:N")))?;
        let elem = if bf16 { DType::Bf16 } else { DType::F32 };
        // A GPU without its compiler is as good as none.
        match Device::open(ordinal).and_then(|device| cuda::nvrtc::version().map(|_| device)) {
            Ok(device) => Ok((Compute::Cuda { device: Arc::new(device), elem }, None)),
            Err(why) if device == "auto" => on_cpu(Some(why)),
            Err(why) => Err(why),
        }
    }
}
