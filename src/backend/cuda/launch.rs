//! A launch and the check of its arguments against the kernel's signature, which the build read from its text.

use super::{Buffer, DType};
use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What a kernel's parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)] // the generated table constructs those that some kernel takes
pub(super) enum Kind {
    /// A buffer of this type; None: of the launch's `elem`.
    Buffer(Option<DType>),
    I32,
    U32,
    F32,
    F64,
    U64,
}

/// A kernel: where it is and what it takes.
pub(super) struct Signature {
    pub(super) file: &'static str,
    pub(super) kernel: &'static str,
    pub(super) parameters: &'static [(&'static str, Kind)],
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// Numbers on the device.
    Buffer(Buffer),
    /// `int`
    I32(i32),
    /// `unsigned int`
    U32(u32),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
    /// `unsigned long long`
    U64(u64),
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Arg::Buffer(buffer)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Arg::I32(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Arg::U32(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}

impl From<f64> for Arg {
    fn from(value: f64) -> Self {
        Arg::F64(value)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Arg::U64(value)
    }
}

/// Which kernel to run, on how many threads.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// `attention` for `kernels/attention.cu`.
    pub file: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// What `elem` is in the kernel: f32 or bf16.
    pub elem: DType,
    /// `-D` definitions that specialise the file.
    pub defines: &'a [(&'static str, i64)],
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// The kernels of the file `file`.
pub fn kernels_of(file: &str) -> impl Iterator<Item = &'static str> {
    SIGNATURES.iter().filter(move |s| s.file == file).map(|s| s.kernel)
}

impl Launch<'_> {
    /// Refuses arguments that are not the kernel's.
    pub(super) fn check(&self, args: &[Arg]) -> Result<()> {
        let wrong = |what: String| Err(Error::Shape { operation: self.kernel, what });
        let Some(signature) = SIGNATURES.iter().find(|s| s.file == self.file && s.kernel == self.kernel) else {
            return wrong(format!("there is no such kernel in kernels/{}.cu", self.file));
        };
        if !matches!(self.elem, DType::F32 | DType::Bf16) {
            return wrong(format!("elem is {:?}, but kernels compute with F32 or Bf16", self.elem));
        }
        if args.len() != signature.parameters.len() {
            return wrong(format!("got {} arguments, expected {}", args.len(), signature.parameters.len()));
        }
        for (arg, (name, kind)) in args.iter().zip(signature.parameters) {
            let fits = match (arg, kind) {
                (Arg::Buffer(buffer), Kind::Buffer(dtype)) => buffer.dtype == dtype.unwrap_or(self.elem),
                (Arg::I32(_), Kind::I32)
                | (Arg::U32(_), Kind::U32)
                | (Arg::F32(_), Kind::F32)
                | (Arg::F64(_), Kind::F64)
                | (Arg::U64(_), Kind::U64) => true,
                _ => false,
            };
            if !fits {
                return wrong(format!("the argument {name} is {arg:?}, expected {kind:?} (elem is {:?})", self.elem));
            }
        }
        if self.grid[1] > 65_535 || self.grid[2] > 65_535 {
            return wrong(format!("a grid of {:?} blocks is too large: at most 65535 in y and z", self.grid));
        }
        if self.grid.contains(&0) || self.block == 0 {
            return wrong(format!("a grid of {:?} blocks of {} threads has no threads", self.grid, self.block));
        }
        Ok(())
    }
}
