//! What computes: nothing here knows of diffusion or transformers.

pub mod cpu;
pub mod cuda;

use crate::error::{Error, Result};
use cuda::{DType, Device};
use std::sync::Arc;

const ONLY_F32: &str = "the CPU computes in f32 only: give --precision f32";

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
        let (compute, why) = Self::find(device, bf16)?;
        match (&compute, why) {
            (Compute::Cpu, None) if bf16 => Err(Error::usage(ONLY_F32)),
            (Compute::Cpu, Some(why)) if bf16 => Err(Error::usage(format!("{why}; {ONLY_F32}"))),
            (_, why) => Ok((compute, why.map(|why| format!("computing on the CPU: {why}")))),
        }
    }

    /// As [`open`](Self::open), but in f32 where that is the CPU: for weights that a device may have trained in bf16.
    ///
    /// # Errors
    /// When the device is not there.
    pub fn open_or_f32(device: &str, bf16: bool) -> Result<(Self, Option<String>)> {
        let (compute, why) = Self::find(device, bf16)?;
        let in_f32 = if bf16 { " in f32" } else { "" };
        let note = match (&compute, why) {
            (_, Some(why)) => Some(format!("computing on the CPU{in_f32}: {why}")),
            (Compute::Cpu, None) if bf16 => Some("computing in f32: the CPU has no bf16".into()),
            _ => None,
        };
        Ok((compute, note))
    }

    /// The device, and why it is the CPU where `auto` had to do with it.
    fn find(device: &str, bf16: bool) -> Result<(Self, Option<Error>)> {
        if device == "cpu" {
            return Ok((Compute::Cpu, None));
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
            Err(why) if device == "auto" => Ok((Compute::Cpu, Some(why))),
            Err(why) => Err(why),
        }
    }
}
