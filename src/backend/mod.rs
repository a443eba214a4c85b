//! What computes: nothing here knows of diffusion or transformers.

pub mod cpu;
pub mod cuda;
mod dtype;

pub use dtype::DType;

use crate::error::{Error, Result};
use cuda::Device;
use std::sync::Arc;

/// Why bf16 is refused on a CPU.
const NEEDS_AMX: &str =
    "the CPU computes in bf16 only with AMX, which this one has not, or DTR_CPU leaves out: give --precision f32";

/// Where to compute, and in which precision.
#[derive(Clone)]
pub enum Compute {
    /// On the processor.
    Cpu {
        /// Type of the factors of products: f32 or bf16, see [`Memory::on_cpu`](crate::autograd::Memory::on_cpu).
        elem: DType,
    },
    /// On a CUDA device.
    Cuda {
        /// The device.
        device: Arc<Device>,
        /// Type of activations and of the weights that products read: f32 or bf16.
        elem: DType,
    },
}

impl Compute {
    /// What `--device` (`auto`, `cpu`, `cuda` or `cuda:N`) and `--precision` (as `elem`, f32 or bf16) ask for, and a note where `auto` had
    /// to do with the processor.
    ///
    /// # Errors
    /// When the device is not there, or cannot compute in this precision.
    pub fn open(device: &str, elem: DType) -> Result<(Self, Option<String>)> {
        let (compute, why) = Self::find(device, elem)?;
        if compute.takes_long() {
            let why = why.map_or_else(String::new, |why| format!("{why}; "));
            return Err(Error::usage(format!("{why}{NEEDS_AMX}")));
        }
        Ok((compute, why.map(|why| format!("computing on the CPU: {why}"))))
    }

    /// As [`open`](Self::open), but in f32 where that is a CPU without AMX: for weights that were trained in bf16 elsewhere.
    ///
    /// # Errors
    /// When the device is not there.
    pub fn open_or_f32(device: &str, elem: DType) -> Result<(Self, Option<String>)> {
        let (compute, why) = Self::find(device, elem)?;
        if !compute.takes_long() {
            return Ok((compute, why.map(|why| format!("computing on the CPU: {why}"))));
        }
        let note = match why {
            Some(why) => format!("computing on the CPU in f32: {why}"),
            None => "computing in f32: without AMX the CPU takes longer in bf16".into(),
        };
        Ok((Compute::Cpu { elem: DType::F32 }, Some(note)))
    }

    /// Whether it is bf16 on a CPU without AMX.
    fn takes_long(&self) -> bool {
        matches!(self, Compute::Cpu { elem: DType::Bf16 }) && !cpu::has_bf16()
    }

    /// The device, and why it is the CPU where `auto` had to do with it.
    fn find(device: &str, elem: DType) -> Result<(Self, Option<Error>)> {
        if device == "cpu" {
            return Ok((Compute::Cpu { elem }, None));
        }
        let ordinal = match device.strip_prefix("cuda:") {
            Some(number) => number.parse().ok(),
            None => ["auto", "cuda"].contains(&device).then_some(0),
        };
        let ordinal =
            ordinal.ok_or_else(|| Error::usage(format!("device is '{device}': give auto, cpu, cuda or cuda:N")))?;
        // A GPU without its compiler is as good as none.
        match Device::open(ordinal).and_then(|device| cuda::nvrtc::version().map(|_| device)) {
            Ok(device) => Ok((Compute::Cuda { device: Arc::new(device), elem }, None)),
            Err(why) if device == "auto" => Ok((Compute::Cpu { elem }, Some(why))),
            Err(why) => Err(why),
        }
    }
}
