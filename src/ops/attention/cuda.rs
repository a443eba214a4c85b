//! The CUDA version (`kernels/attention.cu`), on buffers of the caller.

use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::{Error, Result};

const FILE: &str = "attention";
const OP: &str = "attention";
const THREADS: u32 = 128;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Samples.
    pub b: usize,
    /// Tokens of each.
    pub t: usize,
    /// Channels.
    pub c: usize,
    /// Heads.
    pub heads: usize,
}

impl Dims {
    fn head_size(self) -> usize {
        self.c / self.heads
    }

    fn scale(self) -> Arg {
        Arg::F32((1.0 / (self.head_size() as f64).sqrt()) as f32)
    }

    fn sizes(self) -> [Arg; 3] {
        [self.b, self.t, self.c].map(|size| Arg::I32(size as i32))
    }

    /// Refuses sizes that the kernels do not know, and buffers that are too short.
    fn check(self, elem: DType, buffers: &[(&str, Buffer, usize)]) -> Result<()> {
        let Dims { b, t, c, heads } = self;
        let refused = |what| Err(Error::Shape { operation: OP, what });
        let size = c / heads.max(1);
        if heads == 0 || c % heads != 0 || size > 128 || elem == DType::Bf16 && size % 8 != 0 {
            return refused(format!("{heads} heads of {c} channels: a head has up to 128, in bf16 a multiple of 8"));
        }
        if b > 65535 || heads > 65535 || b * t > i32::MAX as usize / 2 {
            return refused(format!("{b} samples of {t} tokens and {heads} heads are too many for one launch"));
        }
        match buffers.iter().find(|(_, buffer, len)| buffer.len < *len) {
            None => Ok(()),
            Some((name, buffer, len)) => {
                refused(format!("{name} has {} numbers, expected {len} for {self:?}", buffer.len))
            }
        }
    }
}

/// Bytes of shared memory for `tiles` tiles of a block, as laid out in the kernels; `scores` matrices of scores in f32.
fn shared(dims: Dims, elem: DType, tiles: usize, scores: usize) -> u32 {
    let size = dims.head_size();
    let bytes = match elem {
        // 64 rows of an odd number of 16-byte chunks, and the statistics of 64 rows.
        DType::Bf16 => tiles * 64 * (size.div_ceil(16) * 2 + 1) * 16 + 2 * 64 * 4,
        _ => (tiles * 32 * (size + 1) + scores * 32 * 33) * 4,
    };
    bytes as u32
}

/// Rows of a block.
fn tile(elem: DType) -> usize {
    if elem == DType::Bf16 { 64 } else { 32 }
}

fn launch<'a>(
    kernel: &'static str,
    elem: DType,
    defines: &'a [(&'static str, i64)],
    dims: Dims,
    shared: u32,
) -> Launch<'a> {
    let grid = [dims.t.div_ceil(tile(elem)) as u32, dims.heads as u32, dims.b as u32];
    Launch { file: FILE, kernel, elem, defines, grid, block: THREADS, shared }
}

/// `out` `[B, T, C]` elem and `lse` `[B, NH, T]` f32 (the log-sum-exp of each row of scores) of `qkv` `[B, T, 3 C]` elem.
///
/// # Errors
/// When a head is larger than 128, in bf16 no multiple of 8, a buffer is too short or of another type, or the device fails.
pub fn forward(device: &Device, out: Buffer, lse: Buffer, qkv: Buffer, dims: Dims) -> Result<()> {
    let Dims { b, t, c, heads } = dims;
    let elem = qkv.dtype;
    dims.check(elem, &[("out", out, b * t * c), ("lse", lse, b * heads * t), ("qkv", qkv, b * t * 3 * c)])?;
    let defines = [("HS", dims.head_size() as i64)];
    // Queries, and two tiles of keys and of values each: one is computed with while the other arrives.
    let shared = shared(dims, elem, if elem == DType::Bf16 { 5 } else { 3 }, 1);
    let [b, t, c] = dims.sizes();
    let args = [out.into(), lse.into(), qkv.into(), dims.scale(), b, t, c];
    device.launch(&launch("attention_fwd", elem, &defines, dims, shared), &args)
}

/// `dqkv` `[B, T, 3 C]` elem, given that of the output, `dout` `[B, T, C]` elem. `rows` is scratch: `[B, NH, T]` f32.
///
/// # Errors
/// As [`forward`].
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
pub fn backward(
    device: &Device,
    dqkv: Buffer,
    rows: Buffer,
    dout: Buffer,
    qkv: Buffer,
    out: Buffer,
    lse: Buffer,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, c, heads } = dims;
    let elem = qkv.dtype;
    dims.check(
        elem,
        &[
            ("dqkv", dqkv, b * t * 3 * c),
            ("rows", rows, b * heads * t),
            ("dout", dout, b * t * c),
            ("qkv", qkv, b * t * 3 * c),
            ("out", out, b * t * c),
            ("lse", lse, b * heads * t),
        ],
    )?;
    let defines = [("HS", dims.head_size() as i64)];
    let sizes = dims.sizes();
    let sums = Launch {
        grid: [(b * t * heads).div_ceil(8) as u32, 1, 1],
        block: 256,
        ..launch("attention_bwd_rows", elem, &defines, dims, 0)
    };
    device.launch(&sums, &[rows.into(), dout.into(), out.into(), sizes[0], sizes[1], sizes[2]])?;
    let tiles = if elem == DType::Bf16 { 2 } else { 4 };
    for (kernel, scores) in [("attention_bwd_keys", 2), ("attention_bwd_queries", 1)] {
        let [b, t, c] = sizes;
        let args = [dqkv.into(), dout.into(), qkv.into(), lse.into(), rows.into(), dims.scale(), b, t, c];
        device.launch(&launch(kernel, elem, &defines, dims, shared(dims, elem, tiles, scores)), &args)?;
    }
    Ok(())
}
