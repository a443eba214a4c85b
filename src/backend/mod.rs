//! What computes: nothing here knows of diffusion or transformers.

pub mod cpu;
pub mod cuda;

use crate::error::{Error, Result};
use cuda::{DType, Device};
use std::sync::Arc;

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
        let on_cpu = |note| match bf16 {
            true => Err(Error::usage("the CPU computes in f32 only: leave --precision out, or give f32")),
            false => Ok((Compute::Cpu, note)),
        };
        if device == "cpu" {
            return on_cpu(None);
        }
        let ordinal = device.strip_prefix("cuda:").map_or(Some(0), |number| number.parse().ok());
        let ordinal =
            ordinal.ok_or_else(|| Error::usage(format!("device is '{device}': give auto, cpu, cuda or cuda:N")))?;
        let elem = if bf16 { DType::Bf16 } else { DType::F32 };
        // A GPU without its compiler is as good as none.
        match Device::open(ordinal).and_then(|device| cuda::nvrtc::version().map(|_| device)) {
            Ok(device) => Ok((Compute::Cuda { device: Arc::new(device), elem }, None)),
            Err(why) if device == "auto" => on_cpu(Some(format!("computing on the CPU: {why}"))),
            Err(why) => Err(why),
        }
    }
}
