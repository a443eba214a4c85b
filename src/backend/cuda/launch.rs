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
    Map,
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

/// A matrix in bf16 of which kernels copy squares of 64 by 64 into shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// `[rows, columns]`
    pub buffer: Buffer,
    /// Rows.
    pub rows: usize,
    /// Columns, side by side in memory.
    pub columns: usize,
}

impl Matrix {
    /// Why it cannot be copied, if so.
    fn misfit(&self) -> Option<String> {
        let Matrix { buffer, rows, columns } = *self;
        if rows.checked_mul(columns).is_none_or(|len| len > buffer.len) {
            return Some(format!("a matrix of {rows} x {columns} in {} numbers", buffer.len));
        }
        if buffer.dtype != DType::Bf16 || !columns.is_multiple_of(8) || !buffer.address.is_multiple_of(16) {
            return Some(format!(
                "rows of {columns} {:?} from {:#x} on, but copies are of 8 Bf16, 16 bytes that start at a multiple of 16",
                buffer.dtype, buffer.address
            ));
        }
        None
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// Numbers on the device.
    Buffer(Buffer),
    /// `TensorMap`; None where the kernel needs none.
    Map(Option<Matrix>),
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
                (Arg::Map(_), Kind::Map)
                | (Arg::I32(_), Kind::I32)
                | (Arg::U32(_), Kind::U32)
                | (Arg::F32(_), Kind::F32)
                | (Arg::F64(_), Kind::F64)
                | (Arg::U64(_), Kind::U64) => true,
                _ => false,
            };
            if !fits {
                return wrong(format!("the argument {name} is {arg:?}, expected {kind:?} (elem is {:?})", self.elem));
            }
            if let Arg::Map(Some(matrix)) = arg
                && let Some(what) = matrix.misfit()
            {
                return wrong(format!("{name}: {what}"));
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
