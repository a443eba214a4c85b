//! The CUDA version (`kernels/ln_linear.cu`), on buffers of the caller.

use super::Activation;
pub use super::Dims;
use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::{Error, Result};
use crate::ops::check;
use crate::ops::cuda::shares::{Gradient, Lengths, Planner, Shares, check_windows};
use crate::ops::cuda::tile::{
    Operand, SMALL, SPLIT_BF16, check_buffers, check_sizes, check_stride, overlapped_tiling, tiling,
};
use crate::routing::Window;

const FILE: &str = "ln_linear";
const OP: &str = "ln_linear";
// As in kernels/ln_linear_rows.cuh.
/// Most threads of a block of the kernels with a thread for every 16 bytes of a row.
const ROW_THREADS: usize = 320;
/// Tokens of such a block.
const ROW_TOKENS: usize = 16;
/// Columns of a block of the kernel that sums over all tokens.
const COLUMNS: usize = 128;
/// Threads of such a block.
const COLUMN_THREADS: u32 = 128;
/// Threads of a block of the element-wise kernel.
const ELEMENTS: usize = 256;

impl Dims {
    /// Parts of [`Scratch::dr`].
    fn dr_parts(self) -> usize {
        self.n.div_ceil(COLUMNS)
    }

    /// Grid of the kernels that go over rows.
    fn row_blocks(self) -> [u32; 3] {
        [self.t.div_ceil(ROW_TOKENS) as u32, self.b as u32, 1]
    }

    /// Threads of their blocks, a whole number of warps.
    fn row_threads(self, elem: DType) -> u32 {
        (self.c * elem.bytes()).div_ceil(16).next_multiple_of(32).min(ROW_THREADS) as u32
    }
}

/// Halves into which P and Q are split for products in `elem`.
fn split(elem: DType) -> usize {
    if elem == DType::Bf16 { SPLIT_BF16 } else { 1 }
}

/// Shift and scale of a sample: f32 columns of `[B, stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Modulation {
    /// From the first sample's shift on.
    pub shift: Buffer,
    /// From the first sample's scale on.
    pub scale: Buffer,
    /// Columns in all.
    pub stride: usize,
}

impl Modulation {
    /// Numbers from the first sample's shift, or scale, to the end of the last one's.
    fn reach(self, dims: Dims) -> usize {
        (dims.b - 1) * self.stride + dims.c
    }
}

/// Inputs of both passes; `elem` is f32 or bf16, the same for all.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[B, T, C]` elem
    pub x: Buffer,
    /// `[B, 2]` i32: start and width of each sample's window.
    pub windows: Buffer,
    /// Whether every window holds all channels.
    pub full: bool,
    /// Shift and scale.
    pub modulation: Modulation,
    /// `[N, C]` elem
    pub weight: Buffer,
}

/// What the forward pass writes and the backward pass reads again.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// `[B, T, C]` elem: normalised and modulated, 0 outside of the windows.
    pub h: Buffer,
    /// `[B, T]` f32
    pub mean: Buffer,
    /// `[B, T]` f32
    pub rstd: Buffer,
    /// `[B, 2, C]` elem: `1 + scale` and `shift` outside of the windows.
    pub inactive: Buffer,
    /// `[B, 2, N]` f32: u and v; none when every window is full.
    pub uv: Buffer,
}

impl Saved {
    /// Those of a forward pass; `full` as in [`Inputs`]. `take` gives memory for so many numbers of a type, with arbitrary contents.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn take<E>(
        dims: Dims,
        elem: DType,
        full: bool,
        mut take: impl FnMut(usize, DType) -> std::result::Result<Buffer, E>,
    ) -> std::result::Result<Self, E> {
        let Dims { b, t, c, n } = dims;
        Ok(Saved {
            h: take(b * t * c, elem)?,
            mean: take(b * t, DType::F32)?,
            rstd: take(b * t, DType::F32)?,
            inactive: take(b * 2 * c, elem)?,
            uv: if full { Buffer::none(DType::F32) } else { take(b * 2 * n, DType::F32)? },
        })
    }
}

/// Memory of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    dh: Buffer,             // [B, T, C] elem
    pq: Buffer,             // pq_len elem; this and the next three: none when every window is full
    q: Buffer,              // [B, N] f32
    dr: Buffer,             // dr_len f32
    inactive_grads: Buffer, // inactive_grads_len f32
    sums: Buffer,           // sums_len f32
    counters: Buffer,       // u32: one for each sample, then as of linear_residual
    shares: Shares,
}

impl Scratch {
    /// That of a backward pass with this [`plan`], i32; `full` as in [`Inputs`]. `take` gives memory for so many numbers of a type, with
    /// arbitrary contents.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn take<E>(
        device: &Device,
        dims: Dims,
        elem: DType,
        full: bool,
        plan: Buffer,
        mut take: impl FnMut(usize, DType) -> std::result::Result<Buffer, E>,
    ) -> std::result::Result<Self, E> {
        let Dims { b, t, c, n } = dims;
        let Lengths { parts, counters, .. } = planner(device, elem, dims, full).lengths();
        let mut unless_full = |len, dtype| if full { Ok(Buffer::none(dtype)) } else { take(len, dtype) };
        let pq = unless_full(pq_len(dims, elem), elem)?;
        let q = unless_full(b * n, DType::F32)?;
        let dr = unless_full(dr_len(dims), DType::F32)?;
        let inactive_grads = unless_full(inactive_grads_len(dims, elem), DType::F32)?;
        Ok(Scratch {
            dh: take(b * t * c, elem)?,
            pq,
            q,
            dr,
            inactive_grads,
            sums: take(sums_len(dims), DType::F32)?,
            counters: take(dims.b + counters, DType::U32)?,
            shares: Shares { plan, parts: take(parts, DType::F32)? },
        })
    }
}

/// Where gradients go.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// `[B, T, C]` elem, inside the windows.
    pub dx: Buffer,
    /// Whether dx is overwritten (and 0 outside of the windows); else it is added to.
    pub fresh_dx: bool,
    /// As the modulation; added to.
    pub dshift: Buffer,
    /// As the modulation; added to.
    pub dscale: Buffer,
    /// `[N, C]` f32
    pub dweight: Buffer,
    /// `[N]` f32
    pub dbias: Buffer,
    /// Whether to add to dweight and dbias.
    pub add: bool,
}

/// Elements of [`Scratch::pq`].
fn pq_len(dims: Dims, elem: DType) -> usize {
    split(elem) * dims.b * 2 * dims.n
}

/// Elements of [`Scratch::dr`].
fn dr_len(dims: Dims) -> usize {
    dims.dr_parts() * dims.b * dims.t
}

/// Elements of [`Scratch::inactive_grads`].
fn inactive_grads_len(dims: Dims, elem: DType) -> usize {
    split(elem) * dims.b * 2 * dims.c
}

/// Elements of [`Scratch::sums`].
fn sums_len(dims: Dims) -> usize {
    dims.b * dims.t.div_ceil(ROW_TOKENS) * 2 * dims.c
}

/// How the weight's gradient is shared out.
pub(crate) fn planner(device: &Device, elem: DType, dims: Dims, full: bool) -> Planner {
    let Dims { b, t, c, n } = dims;
    let corrections = if full { 0 } else { split(elem) };
    let gradient = Gradient { rows: n, columns: c, windows_of_rows: false, b, t, corrections, bias: full };
    Planner::new(device, elem, gradient)
}

/// How the weight's gradient is shared out for these windows, `[B]`: what [`Scratch::take`] takes; `full` as in [`Inputs`].
///
/// # Errors
/// When there are not as many windows as samples, one is not inside of the channels, or `full` does not say what they are.
pub fn plan(device: &Device, elem: DType, dims: Dims, windows: &[Window], full: bool) -> Result<Vec<i32>> {
    check_windows(OP, windows, dims.b, dims.c)?;
    check(full == windows.iter().all(|w| w.width == dims.c), OP, || {
        format!("full is {full}, but the windows of {} channels are {windows:?}", dims.c)
    })?;
    Ok(planner(device, elem, dims, full).plan(windows))
}

/// `y` `[B, T, N]` elem; with GELU also `pre`, what it was before (none: not kept). `bias` is `[N]` f32.
///
/// # Safety
/// The buffers are as [`Buffer`] says; their lengths are checked, but not what is in the windows: each starts and ends inside of the `C`
/// channels, and is at least one wide; with `inputs.full` each is all of them.
///
/// # Errors
/// When a buffer is too short or of another type, or the device fails.
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, sizes: one list, in that order")]
pub unsafe fn forward(
    device: &Device,
    y: Buffer,
    pre: Buffer,
    saved: Saved,
    inputs: Inputs,
    bias: Buffer,
    activation: Activation,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, c, n } = dims;
    let elem = inputs.x.dtype;
    check_sizes(OP, elem, [b, t], &[c, n])?;
    check_stride(OP, inputs.modulation.stride)?;
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("y", y, b * t * n),
            Operand::new("pre", pre, if pre.is_none() { 0 } else { b * t * n }),
            Operand::new("h", saved.h, b * t * c),
            Operand::new("mean", saved.mean, b * t),
            Operand::new("rstd", saved.rstd, b * t),
            Operand::new("inactive", saved.inactive, b * 2 * c),
            Operand::new("uv", saved.uv, if inputs.full { 0 } else { b * 2 * n }),
            Operand::new("x", inputs.x, b * t * c),
            Operand::new("windows", inputs.windows, b * 2),
            Operand::columns("shift", inputs.modulation.shift, inputs.modulation.reach(dims)),
            Operand::columns("scale", inputs.modulation.scale, inputs.modulation.reach(dims)),
            Operand::weight("weight", inputs.weight, n * c),
            Operand::weight("bias", bias, n),
        ],
    )?;
    // SAFETY: the buffers were found to be as long as these sizes ask for; the caller answers for their memory and for the windows.
    let launch = |launch: &Launch, args: &[Arg]| unsafe { device.launch(launch, args) };
    let [b32, t32, c32, n32] = [b, t, c, n].map(|size| Arg::I32(size as i32));
    let Modulation { shift, scale, stride } = inputs.modulation;
    let rows = Launch {
        file: FILE,
        kernel: "ln_linear_fwd_normalise",
        elem,
        defines: &SMALL,
        grid: dims.row_blocks(),
        block: dims.row_threads(elem),
        shared: 0,
    };
    launch(
        &rows,
        &[
            saved.h.into(),
            saved.mean.into(),
            saved.rstd.into(),
            saved.inactive.into(),
            inputs.x.into(),
            inputs.windows.into(),
            shift.into(),
            scale.into(),
            Arg::I32(stride as i32),
            t32,
            c32,
        ],
    )?;
    if !inputs.full {
        let tiles = tiling(device, elem, 2 * b, n);
        let args = [
            saved.uv.into(),
            saved.inactive.into(),
            inputs.weight.into(),
            tiles.operand(saved.inactive, 2 * b, c),
            tiles.operand(inputs.weight, n, c),
            b32,
            c32,
            n32,
        ];
        launch(&tiles.launch(FILE, "ln_linear_fwd_inactive", elem), &args)?;
    }
    let tiles = overlapped_tiling(device, elem, b * t, n);
    launch(
        &tiles.launch(FILE, "ln_linear_fwd", elem),
        &[
            y.into(),
            pre.into(),
            saved.h.into(),
            inputs.windows.into(),
            inputs.weight.into(),
            bias.into(),
            if inputs.full { Buffer::none(DType::F32) } else { saved.uv }.into(),
            saved.mean.into(),
            saved.rstd.into(),
            tiles.operand(saved.h, b * t, c),
            tiles.operand(inputs.weight, n, c),
            Arg::I32(i32::from(activation == Activation::Gelu)),
            b32,
            t32,
            c32,
            n32,
        ],
    )
}

/// `g = dy gelu'(pre)` in place: for gradients that were not multiplied on their way.
///
/// # Safety
/// The buffers are as [`Buffer`] says. Their lengths are checked.
///
/// # Errors
/// When the buffers differ in length or type, or the device fails.
pub unsafe fn gelu_backward(device: &Device, dy: Buffer, pre: Buffer) -> Result<()> {
    if dy.len != pre.len {
        let what = format!("a gradient of {} numbers for {} values", dy.len, pre.len);
        return Err(Error::Shape { operation: OP, what });
    }
    check_buffers(OP, dy.dtype, &[Operand::new("dy", dy, dy.len), Operand::new("pre", pre, dy.len)])?;
    let grid = [dy.len.div_ceil(ELEMENTS * 16 / dy.dtype.bytes()) as u32, 1, 1];
    let kernel = "ln_linear_bwd_gelu";
    let block = ELEMENTS as u32;
    let launch = Launch { file: FILE, kernel, elem: dy.dtype, defines: &SMALL, grid, block, shared: 0 };
    // SAFETY: both were found to have that many numbers, and the caller answers for their memory.
    unsafe { device.launch(&launch, &[dy.into(), pre.into(), Arg::U64(dy.len as u64)]) }
}

/// The gradients, given that of the output before GELU, `g` `[B, T, N]` elem.
///
/// # Safety
/// As [`forward`], and the plan is what [`plan`] makes of the windows on a device like this one.
///
/// # Errors
/// When a buffer is too short or of another type, or the device fails.
pub unsafe fn backward(
    device: &Device,
    grads: Gradients,
    scratch: Scratch,
    g: Buffer,
    inputs: Inputs,
    saved: Saved,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, c, n } = dims;
    let elem = g.dtype;
    let unless_full = |len| if inputs.full { 0 } else { len };
    check_sizes(OP, elem, [b, t], &[c, n])?;
    check_stride(OP, inputs.modulation.stride)?;
    let planner = planner(device, elem, dims, inputs.full);
    let Lengths { plan, parts, counters } = planner.lengths();
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("dx", grads.dx, b * t * c),
            Operand::columns("dshift", grads.dshift, inputs.modulation.reach(dims)),
            Operand::columns("dscale", grads.dscale, inputs.modulation.reach(dims)),
            Operand::weight("dweight", grads.dweight, n * c),
            Operand::weight("dbias", grads.dbias, n),
            Operand::new("dh", scratch.dh, b * t * c),
            Operand::new("pq", scratch.pq, unless_full(pq_len(dims, elem))),
            Operand::new("q", scratch.q, unless_full(b * n)),
            Operand::new("dr", scratch.dr, unless_full(dr_len(dims))),
            Operand::new("inactive_grads", scratch.inactive_grads, unless_full(inactive_grads_len(dims, elem))),
            Operand::new("sums", scratch.sums, sums_len(dims)),
            Operand::new("counters", scratch.counters, b + counters),
            Operand::new("plan", scratch.shares.plan, plan),
            Operand::new("parts", scratch.shares.parts, parts),
            Operand::new("g", g, b * t * n),
            Operand::new("x", inputs.x, b * t * c),
            Operand::new("windows", inputs.windows, b * 2),
            Operand::columns("scale", inputs.modulation.scale, inputs.modulation.reach(dims)),
            Operand::weight("weight", inputs.weight, n * c),
            Operand::new("h", saved.h, b * t * c),
            Operand::new("mean", saved.mean, b * t),
            Operand::new("rstd", saved.rstd, b * t),
            Operand::new("inactive", saved.inactive, b * 2 * c),
            Operand::new("uv", saved.uv, unless_full(b * 2 * n)),
        ],
    )?;
    // SAFETY: the buffers were found to be as long as these sizes ask for; the caller answers for their memory, the windows and the
    // plan.
    let launch = |launch: &Launch, args: &[Arg]| unsafe { device.launch(launch, args) };
    let [b32, t32, c32, n32] = [b, t, c, n].map(|size| Arg::I32(size as i32));
    let stride = Arg::I32(inputs.modulation.stride as i32);
    let none = Buffer::none(DType::F32);
    let [uv, q, dr, inactive_grads] =
        [saved.uv, scratch.q, scratch.dr, scratch.inactive_grads].map(|buffer| if inputs.full { none } else { buffer });
    let pq = if inputs.full { Buffer::none(elem) } else { scratch.pq };
    let columns = Launch {
        file: FILE,
        kernel: "ln_linear_bwd_columns",
        elem,
        defines: &SMALL,
        grid: [n.div_ceil(COLUMNS) as u32, b as u32, 1],
        block: COLUMN_THREADS,
        shared: 0,
    };
    if !inputs.full {
        let statistics = [saved.mean.into(), saved.rstd.into(), uv.into()];
        let outputs = [pq.into(), q.into(), dr.into(), g.into()];
        launch(&columns, &[&outputs[..], &statistics, &[b32, t32, n32]].concat())?;
    }
    let (finished, counters) = (scratch.counters.slice(0..b), scratch.counters.slice(b..b + counters));
    let mut tiles = tiling(device, elem, b * t, c);
    if !inputs.full {
        tiles.grid[1] += (split(elem) * 2 * b).div_ceil(tiles.tile.m) as u32;
    }
    launch(
        &tiles.launch(FILE, "ln_linear_bwd_input", elem),
        &[
            scratch.dh.into(),
            inactive_grads.into(),
            scratch.counters.into(),
            g.into(),
            pq.into(),
            inputs.weight.into(),
            inputs.windows.into(),
            tiles.operand(g, b * t, n),
            tiles.operand(pq, split(elem) * 2 * b, n),
            tiles.operand(inputs.weight, n, c),
            Arg::I32((b + counters.len) as i32),
            b32,
            t32,
            c32,
            n32,
        ],
    )?;
    let rows =
        Launch { kernel: "ln_linear_bwd_normalise", grid: dims.row_blocks(), block: dims.row_threads(elem), ..columns };
    launch(
        &rows,
        &[
            grads.dx.into(),
            grads.dshift.into(),
            grads.dscale.into(),
            scratch.sums.into(),
            finished.into(),
            scratch.dh.into(),
            inputs.x.into(),
            inputs.windows.into(),
            inputs.modulation.scale.into(),
            saved.mean.into(),
            saved.rstd.into(),
            dr.into(),
            inactive_grads.into(),
            Arg::I32(dims.dr_parts() as i32),
            stride,
            Arg::I32(i32::from(grads.fresh_dx)),
            b32,
            t32,
            c32,
        ],
    )?;
    launch(
        &planner.tiling.launch(FILE, "ln_linear_bwd_weight", elem),
        &[
            grads.dweight.into(),
            grads.dbias.into(),
            scratch.shares.parts.into(),
            counters.into(),
            scratch.shares.plan.into(),
            g.into(),
            saved.h.into(),
            inputs.windows.into(),
            pq.into(),
            saved.inactive.into(),
            q.into(),
            planner.tiling.operand(g, b * t, n),
            planner.tiling.operand(saved.h, b * t, c),
            planner.tiling.operand(pq, split(elem) * 2 * b, n),
            planner.tiling.operand(saved.inactive, 2 * b, c),
            Arg::I32(i32::from(grads.add)),
            b32,
            t32,
            c32,
            n32,
        ],
    )
}
