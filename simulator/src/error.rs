//! What can go wrong: loading a module, using memory, running a kernel.

use std::fmt;

/// PTX that was refused, with the place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("PTX line {line}: {message}{}", if text.is_empty() { String::new() } else { format!(": `{text}`") })]
pub struct LoadError {
    /// Line in the PTX text, from 1; 0 where no line is to blame.
    pub line: u32,
    /// The instruction or directive as written.
    pub text: String,
    /// What is wrong with it.
    pub message: String,
}

impl LoadError {
    pub(crate) fn new(line: u32, text: impl Into<String>, message: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if text.len() > 400 {
            let cut = (0..=400).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
            text.truncate(cut);
            text.push_str(" ...");
        }
        LoadError { line, text, message: message.into() }
    }
}

/// A host call that used device memory wrongly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No room: CUDA error 2.
    #[error("out of device memory: asked for {asked} bytes, {free} are free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Not (wholly) inside one live allocation: CUDA error 1.
    #[error("{what} of {bytes} bytes at {address:#x} is not inside one allocation: {nearest}")]
    Invalid {
        /// `read`, `write`, `free`, ...
        what: &'static str,
        /// First byte.
        address: u64,
        /// Length.
        bytes: u64,
        /// Where the nearest allocation lies.
        nearest: String,
    },
}

impl MemoryError {
    /// The `CUresult` of the driver call that failed.
    pub fn cuda_error(&self) -> u32 {
        match self {
            MemoryError::OutOfMemory { .. } => 2,
            MemoryError::Invalid { .. } => 1,
        }
    }
}

/// Classes of faults. [`FaultClass::name`] gives the word used in case manifests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum FaultClass {
    OobGlobal,
    OobShared,
    OobLocal,
    Misaligned,
    DataRaceShared,
    DataRaceGlobal,
    UninitialisedShared,
    UninitialisedGlobal,
    UninitialisedLocal,
    BarrierDivergence,
    AsyncCopyHazard,
    /// No `wgmma.fence` or no `fence.proxy.async` where PTX asks for one.
    MissingFence,
    Timeout,
    /// `trap`, `__assertfail`, a stack overflow, too much that nobody waits for, an invalid operand only known at run time.
    Trap,
    /// The GPU would refuse this launch.
    LaunchRefused,
}

impl FaultClass {
    /// The word for this class in manifests and reports.
    pub fn name(self) -> &'static str {
        match self {
            FaultClass::OobGlobal => "oob_global",
            FaultClass::OobShared => "oob_shared",
            FaultClass::OobLocal => "oob_local",
            FaultClass::Misaligned => "misaligned",
            FaultClass::DataRaceShared => "data_race_shared",
            FaultClass::DataRaceGlobal => "data_race_global",
            FaultClass::UninitialisedShared => "uninitialised_shared",
            FaultClass::UninitialisedGlobal => "uninitialised_global",
            FaultClass::UninitialisedLocal => "uninitialised_local",
            FaultClass::BarrierDivergence => "barrier_divergence",
            FaultClass::AsyncCopyHazard => "async_copy_hazard",
            FaultClass::MissingFence => "missing_fence",
            FaultClass::Timeout => "timeout",
            FaultClass::Trap => "trap",
            FaultClass::LaunchRefused => "launch_refused",
        }
    }

    /// The `CUresult` a GPU would give, or the closest one for what no GPU notices.
    pub fn cuda_error(self) -> u32 {
        match self {
            FaultClass::OobGlobal | FaultClass::OobShared | FaultClass::OobLocal => 700,
            FaultClass::Misaligned => 716,
            FaultClass::Timeout => 702,
            FaultClass::Trap => 719,
            FaultClass::LaunchRefused => 1,
            // A GPU computes garbage here; "unspecified launch failure" keeps a test from passing.
            FaultClass::DataRaceShared
            | FaultClass::DataRaceGlobal
            | FaultClass::UninitialisedShared
            | FaultClass::UninitialisedGlobal
            | FaultClass::UninitialisedLocal
            | FaultClass::BarrierDivergence
            | FaultClass::AsyncCopyHazard
            | FaultClass::MissingFence => 719,
        }
    }
}

impl fmt::Display for FaultClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One finding of the sanitizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What kind of fault.
    pub class: FaultClass,
    /// Readable text: kernel, block, thread, PTX line, address, nearest allocation.
    pub text: String,
    /// PTX line of the instruction, 0 where there is none.
    pub line: u32,
    /// How often the same class was found at the same line.
    pub times: u64,
}

/// A launch that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .text)]
pub struct Fault {
    /// Class of the first report.
    pub class: FaultClass,
    /// The `CUresult` of the launch or of the next synchronisation.
    pub cuda_error: u32,
    /// All reports as text, one below the other.
    pub text: String,
    /// The reports, the first one first.
    pub reports: Vec<Report>,
}

impl Fault {
    pub(crate) fn refused(cuda_error: u32, text: impl Into<String>) -> Fault {
        let text = text.into();
        let class = FaultClass::LaunchRefused;
        Fault { class, cuda_error, text: text.clone(), reports: vec![Report { class, text, line: 0, times: 1 }] }
    }

    /// True for launches that a GPU refuses at once: these leave the context usable, all others poison it.
    pub fn is_refusal(&self) -> bool {
        self.class == FaultClass::LaunchRefused
    }
}
