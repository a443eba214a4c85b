//! Linear layers of few rows on a CUDA device (`kernels/rows.cuh`): the timestep network and the modulation.
//!
//! What the functions here are given must be as [`Buffer`] says, and as long as the formulas ask of `[B, K]` inputs, `[N, K]` weights and
//! `[B, N]` outputs: that is their `# Safety`.

use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::Result;
use crate::ops::cuda::tile::check_counts;

// As in kernels/rows.cuh.
/// Samples that one block computes.
const ROWS: usize = 8;
const THREADS: usize = 256;
/// Outputs of a block of the forward pass.
const OUTPUTS: usize = 32;
/// Inputs of a block of the gradient of the input.
const K_COLUMNS: usize = 256;
/// Outputs and inputs of a block of the gradient of the weight.
const WEIGHT_TILE: [usize; 2] = [128, 128];

// As in kernels/rows_mma.cuh.
const MMA_THREADS: usize = 128;
/// Samples that one block computes.
const MMA_SAMPLES: usize = 32;
/// Outputs of a block of the forward pass.
const MMA_BLOCK_OUTPUTS: usize = 64;
/// Inputs of a block of the gradient of the input.
const MMA_COLUMNS: usize = 64;
/// Outputs of a turn of its warps.
const MMA_TURN_OUTPUTS: usize = 128;
/// Such blocks that a multiprocessor has at once, at least.
const INPUT_BLOCKS: usize = 2;

// Of the gradient of the input:
/// Outputs that one part sums by FMA, where there are few parts.
const PART: usize = 256;
/// Most parts by FMA, and by `mma.sync`: they are written and read again.
const MOST_SPLITS: [usize; 2] = [64, 32];

/// Names of a file's kernels.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) file: &'static str,
    pub(crate) forward: &'static str,
    pub(crate) silu: &'static str,
    pub(crate) weight: &'static str,
    pub(crate) input: &'static str,
    pub(crate) sum_parts: &'static str,
    /// What `elem` is.
    pub(crate) elem: DType,
}

/// Sizes: samples, inputs, outputs.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
}

impl Dims {
    /// As kernels take them.
    fn args(self, operation: &'static str) -> Result<[Arg; 3]> {
        let sizes = [self.b, self.k, self.n];
        check_counts(operation, &sizes)?;
        Ok(sizes.map(|size| Arg::I32(size as i32)))
    }
}

impl Rows {
    /// Whether products are by `mma.sync`: rows can be read in vectors.
    fn by_mma(&self, weight: Buffer, dims: Dims) -> bool {
        let are_vectors = dims.k.is_multiple_of(8) && dims.n.is_multiple_of(8) && weight.address.is_multiple_of(16);
        self.elem == DType::Bf16 && are_vectors
    }

    /// Grid and threads of the gradient of the input: its third size is the number of parts.
    fn input_blocks(&self, device: &Device, weight: Buffer, dims: Dims) -> ([usize; 3], usize) {
        if !self.by_mma(weight, dims) {
            let splits = dims.n.div_ceil(PART).clamp(1, MOST_SPLITS[0]);
            return ([dims.k.div_ceil(K_COLUMNS), dims.b.div_ceil(ROWS), splits], THREADS);
        }
        let [x, y] = [dims.k.div_ceil(MMA_COLUMNS), dims.b.div_ceil(MMA_SAMPLES)];
        // As many as are resident at once; turns are shared out evenly.
        let (at_once, turns) = (INPUT_BLOCKS * device.multiprocessors() as usize, dims.n.div_ceil(MMA_TURN_OUTPUTS));
        let splits = (at_once / (x * y)).clamp(1, MOST_SPLITS[1]);
        ([x, y, turns.div_ceil(turns.div_ceil(splits))], MMA_THREADS)
    }

    /// Elements of the parts of the input's gradient.
    pub(crate) fn parts_len(&self, device: &Device, weight: Buffer, dims: Dims) -> usize {
        self.input_blocks(device, weight, dims).0[2] * dims.b * dims.k
    }

    /// Launches one of the kernels.
    ///
    /// # Safety
    /// The buffers are as [`Buffer`] says, as long as the kernel's other arguments say.
    unsafe fn run(
        &self,
        device: &Device,
        kernel: &'static str,
        grid: [usize; 3],
        block: usize,
        args: &[Arg],
    ) -> Result<()> {
        let (grid, block) = (grid.map(|blocks| blocks as u32), block as u32);
        let launch = Launch { file: self.file, kernel, elem: self.elem, defines: &[], grid, block, shared: 0 };
        // SAFETY: the caller answers for the arguments; grids and threads of all kernels are chosen here.
        unsafe { device.launch(&launch, args) }
    }

    /// `y = x W^T + b`.
    ///
    /// # Safety
    /// As above.
    pub(crate) unsafe fn forward(
        &self,
        device: &Device,
        y: Buffer,
        x: Buffer,
        weight: Buffer,
        bias: Buffer,
        dims: Dims,
    ) -> Result<()> {
        let [b, k, n] = dims.args(self.file)?;
        let (outputs, samples, threads) = match self.by_mma(weight, dims) {
            true => (MMA_BLOCK_OUTPUTS, MMA_SAMPLES, MMA_THREADS),
            false => (OUTPUTS, ROWS, THREADS),
        };
        let grid = [dims.n.div_ceil(outputs), dims.b.div_ceil(samples), 1];
        // SAFETY: the caller answers for the buffers.
        unsafe {
            self.run(device, self.forward, grid, threads, &[y.into(), x.into(), weight.into(), bias.into(), b, k, n])
        }
    }

    /// `y = silu(x)`.
    ///
    /// # Safety
    /// As above.
    pub(crate) unsafe fn silu(&self, device: &Device, y: Buffer, x: Buffer) -> Result<()> {
        let blocks = [x.len.div_ceil(THREADS), 1, 1];
        check_counts(self.file, &[x.len])?;
        // SAFETY: the caller answers for the buffers.
        unsafe { self.run(device, self.silu, blocks, THREADS, &[y.into(), x.into(), Arg::U32(x.len as u32)]) }
    }

    /// `dW`, `db`.
    ///
    /// # Safety
    /// As above.
    #[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
    pub(crate) unsafe fn backward_weight(
        &self,
        device: &Device,
        dweight: Buffer,
        dbias: Buffer,
        dy: Buffer,
        x: Buffer,
        add: bool,
        dims: Dims,
    ) -> Result<()> {
        let [b, k, n] = dims.args(self.file)?;
        let [rows, columns] = WEIGHT_TILE;
        let blocks = [dims.k.div_ceil(columns), dims.n.div_ceil(rows), 1];
        let args = [dweight.into(), dbias.into(), dy.into(), x.into(), Arg::I32(i32::from(add)), b, k, n];
        // SAFETY: the caller answers for the buffers.
        unsafe { self.run(device, self.weight, blocks, THREADS, &args) }
    }

    /// `dx = (silu'(before_silu)) dy W`, with `parts` of [`Rows::parts_len`] in between; `before_silu` none: no SiLU.
    ///
    /// # Safety
    /// As above.
    #[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
    pub(crate) unsafe fn backward_input(
        &self,
        device: &Device,
        dx: Buffer,
        parts: Buffer,
        dy: Buffer,
        weight: Buffer,
        before_silu: Buffer,
        add: bool,
        dims: Dims,
    ) -> Result<()> {
        let [b, k, n] = dims.args(self.file)?;
        let (grid, block) = self.input_blocks(device, weight, dims);
        let len = dims.b * dims.k;
        check_counts(self.file, &[len])?;
        let (splits, add) = (Arg::I32(grid[2] as i32), Arg::I32(i32::from(add)));
        let sum = [dx.into(), parts.into(), before_silu.into(), splits, add, Arg::U32(len as u32)];
        // SAFETY: the caller answers for the buffers; the parts are as many as the first kernel has blocks along z.
        unsafe {
            self.run(device, self.input, grid, block, &[parts.into(), dy.into(), weight.into(), b, k, n])?;
            self.run(device, self.sum_parts, [len.div_ceil(THREADS), 1, 1], THREADS, &sum)
        }
    }
}
