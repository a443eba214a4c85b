//! The CUDA version (`kernels/attention.cu`), on buffers of the caller.

pub use super::Dims;
use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::{Error, Result};
use crate::ops::cuda::tile::{Operand, check_buffers, check_sizes};

const FILE: &str = "attention";
const OP: &str = "attention";

impl Dims {
    fn head_size(self) -> usize {
        self.c / self.heads
    }

    fn scale(self) -> Arg {
        Arg::F32((1.0 / (self.head_size() as f64).sqrt()) as f32)
    }

    fn sizes(self) -> [Arg; 2] {
        [self.t, self.c].map(|size| Arg::I32(size as i32))
    }

    /// Refuses sizes that the kernels do not know.
    fn check(self, elem: DType) -> Result<()> {
        let Dims { b, t, c, heads } = self;
        let refused = |what| Err(Error::Shape { operation: OP, what });
        let size = c / heads.max(1);
        if heads == 0 || c % heads != 0 || size > 128 || elem == DType::Bf16 && size % 8 != 0 {
            return refused(format!("{heads} heads of {c} channels: a head has up to 128, in bf16 a multiple of 8"));
        }
        check_sizes(OP, elem, [b, t], &[c])?;
        if b > 65535 || heads > 65535 {
            return refused(format!("{b} samples of {heads} heads are too many for one launch"));
        }
        Ok(())
    }
}

/// How the kernels are specialised: what their definitions say.
#[derive(Clone, Copy)]
struct Shape {
    warps: usize,     // of a block
    tile: usize,      // rows of a tile that is walked over
    row_tiles: usize, // of 16 queries, that a warp owns
}

/// Larger heads leave registers and shared memory for fewer rows.
const LARGE_HEAD: usize = 72;

/// Heads larger than this have blocks of their own for the gradients of values.
const SPLIT_HEAD: usize = 104;

/// Warps of a block that owns a whole head.
const HEAD_WARPS: usize = 8;

impl Dims {
    /// Blocks no larger than the sample, small enough for 8 warps on a multiprocessor.
    fn shape(self, elem: DType) -> Shape {
        let shape = |warps, tile, row_tiles| Shape { warps, tile, row_tiles };
        match (elem, self.head_size() > LARGE_HEAD, self.t) {
            (DType::F32, ..) => shape(4, 32, 1),
            (_, _, ..=16) => shape(1, 16, 1),
            (_, _, ..=32) => shape(2, 32, 1),
            (_, false, ..=64) => shape(2, 32, 2),
            (_, false, _) => shape(4, 64, 2),
            (_, true, _) => shape(4, 32, 1),
        }
    }

    /// Whether a block of backward owns a whole head, with 32 keys a warp.
    fn whole_head(self, elem: DType) -> bool {
        elem == DType::Bf16 && self.head_size() <= LARGE_HEAD && (129..=32 * HEAD_WARPS).contains(&self.t)
    }

    fn defines(self, elem: DType) -> Vec<(&'static str, i64)> {
        let Shape { warps, tile, row_tiles } = self.shape(elem);
        match elem {
            DType::Bf16 => {
                let whole = usize::from(self.whole_head(elem));
                let sizes = [
                    ("HS", self.head_size()),
                    ("WARPS", warps),
                    ("TILE", tile),
                    ("ROW_TILES", row_tiles),
                    ("WHOLE_HEAD", whole),
                ];
                sizes.map(|(name, size)| (name, size as i64)).to_vec()
            }
            _ => vec![("HS", self.head_size() as i64)],
        }
    }

    /// Bytes of a row in shared memory.
    fn row_bytes(self, elem: DType) -> usize {
        match elem {
            // An odd number of 16-byte chunks.
            DType::Bf16 => ((self.head_size() / 8) | 1) * 16,
            _ => (self.head_size() + 1) * 4,
        }
    }
}

/// Bytes of a matrix of weights in f32.
const WEIGHTS: usize = 32 * 33 * 4;

/// Launches `blocks` blocks a head, of `warps` warps and `shared` bytes of shared memory.
///
/// # Safety
/// As of [`Device::launch`].
unsafe fn launch(
    device: &Device,
    kernel: &'static str,
    elem: DType,
    dims: Dims,
    [blocks, warps, shared]: [usize; 3],
    args: &[Arg],
) -> Result<()> {
    let defines = dims.defines(elem);
    let grid = [blocks as u32, dims.heads as u32, dims.b as u32];
    let block = 32 * warps as u32;
    let launch = Launch { file: FILE, kernel, elem, defines: &defines, grid, block, shared: shared as u32 };
    // SAFETY: the contract is the same.
    unsafe { device.launch(&launch, args) }
}

/// `out` `[B, T, C]` elem and `lse` `[B, NH, T]` f32 (the log-sum-exp of each row of scores) of `qkv` `[B, T, 3 C]` elem.
///
/// # Safety
/// The buffers are as [`Buffer`] says. Their lengths are checked.
///
/// # Errors
/// When a head is larger than 128, in bf16 no multiple of 8, a buffer is too short or of another type, or the device fails.
pub unsafe fn forward(device: &Device, out: Buffer, lse: Buffer, qkv: Buffer, dims: Dims) -> Result<()> {
    let Dims { b, t, c, heads } = dims;
    let elem = qkv.dtype;
    dims.check(elem)?;
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("out", out, b * t * c),
            Operand::new("lse", lse, b * heads * t),
            Operand::new("qkv", qkv, b * t * 3 * c),
        ],
    )?;
    let shape = dims.shape(elem);
    let tile = shape.tile * dims.row_bytes(elem);
    let (owned, shared) = match elem {
        // Two tiles of keys and of values each: one is computed with while the other arrives.
        DType::Bf16 => (16 * shape.warps * shape.row_tiles, 4 * tile),
        _ => (shape.tile, 3 * tile + WEIGHTS),
    };
    let [size_t, size_c] = dims.sizes();
    let args = [out.into(), lse.into(), qkv.into(), dims.scale(), size_t, size_c];
    // SAFETY: the buffers were found to be as long as these sizes ask for, and the caller answers for their memory.
    unsafe { launch(device, "attention_fwd", elem, dims, [t.div_ceil(owned), shape.warps, shared], &args) }
}

/// `dqkv` `[B, T, 3 C]` elem, given that of the output, `dout` `[B, T, C]` elem, and what [`forward`] wrote.
///
/// # Safety
/// As [`forward`].
///
/// # Errors
/// As [`forward`].
pub unsafe fn backward(
    device: &Device,
    dqkv: Buffer,
    dout: Buffer,
    qkv: Buffer,
    out: Buffer,
    lse: Buffer,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, c, heads } = dims;
    let elem = qkv.dtype;
    dims.check(elem)?;
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("dqkv", dqkv, b * t * 3 * c),
            Operand::new("dout", dout, b * t * c),
            Operand::new("qkv", qkv, b * t * 3 * c),
            Operand::new("out", out, b * t * c),
            Operand::new("lse", lse, b * heads * t),
        ],
    )?;
    let shape = dims.shape(elem);
    let tile = shape.tile * dims.row_bytes(elem);
    let (blocks, warps, shared) = match elem {
        DType::Bf16 if dims.whole_head(elem) => {
            let keys = 32 * HEAD_WARPS;
            // Keys and six times 32 rows; dS with 32 queries and one chunk a key, lse of all queries; two statistics of 32.
            (1, HEAD_WARPS, (keys + 6 * 32) * dims.row_bytes(elem) + keys * (32 * 2 + 16 + 4) + 2 * 4 * 32)
        }
        DType::Bf16 => {
            let of_keys = t.div_ceil(16 * shape.warps) * if dims.head_size() > SPLIT_HEAD { 2 } else { 1 };
            let of_queries = t.div_ceil(16 * shape.warps * shape.row_tiles);
            // Two tiles each of what is walked over, one of outputs, and two statistics a row.
            (of_keys + of_queries, shape.warps, 5 * tile + 2 * 4 * shape.tile)
        }
        _ => (2 * t.div_ceil(shape.tile), shape.warps, 4 * tile + 2 * WEIGHTS + 4 * shape.tile),
    };
    let [size_t, size_c] = dims.sizes();
    let args = [dqkv.into(), dout.into(), qkv.into(), out.into(), lse.into(), dims.scale(), size_t, size_c];
    // SAFETY: as in `forward`.
    unsafe { launch(device, "attention_bwd", elem, dims, [blocks, warps, shared], &args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_refused_before_they_are_multiplied() {
        let device = Device::on_paper("H100", 90, 132);
        let says = |elem, [b, t, c, heads]: [usize; 4]| {
            let (x, lse, dims) = (Buffer::none(elem), Buffer::none(DType::F32), Dims { b, t, c, heads });
            // SAFETY: nothing runs on paper.
            let passes = unsafe { [forward(&device, x, lse, x, dims), backward(&device, x, x, x, x, lse, dims)] };
            let [forward, backward] = passes.map(|pass| pass.unwrap_err().to_string());
            // Only of buffers each tells its own.
            assert!(forward == backward || forward.contains("has 0 numbers"), "{forward}, {backward}");
            forward
        };
        for elem in [DType::F32, DType::Bf16] {
            assert!(says(elem, [2, 16, 64, 2]).contains("out has 0 numbers, expected 2048"));
            for dims in [[0, 16, 64, 2], [2, 0, 64, 2], [2, 16, 0, 2]] {
                assert!(says(elem, dims).contains("there is nothing to compute"), "{dims:?}");
            }
            for dims in [[2, 16, 64, 0], [2, 16, 64, 3], [2, 16, 136, 1], [2, 16, usize::MAX, 2]] {
                assert!(says(elem, dims).contains("a head has up to 128"), "{dims:?}");
            }
            // In some, B T or B T C would wrap around to 0.
            let quarter = usize::MAX / 4 + 1;
            for dims in [
                [65536, 16, 64, 2],
                [2, 16, 65536 * 8, 65536],
                [65535, 65535, 64, 2],
                [4, quarter, 64, 2],
                [quarter, 4, 64, 2],
                [2, usize::MAX, 64, 2],
                [1, 1, quarter, quarter / 8],
                [1, 4, quarter, quarter / 8],
            ] {
                assert!(says(elem, dims).contains("too many for one launch"), "{dims:?}");
            }
        }
        assert!(says(DType::Bf16, [2, 16, 12, 3]).contains("in bf16 a multiple of 8"));
    }
}
