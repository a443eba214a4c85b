//! The CUDA version (`kernels/linear_residual.cu`), on buffers of the caller.

pub use super::Dims;
use crate::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use crate::error::Result;
use crate::ops::cuda::shares::{Gradient, Lengths, Planner, Shares, check_windows};
use crate::ops::cuda::tile::{Operand, SMALL, check_buffers, check_sizes, check_stride, overlapped_tiling, tiling};
use crate::routing::Window;

const FILE: &str = "linear_residual";
const OP: &str = "linear_residual";
/// Columns of a block of the kernel that sums over tokens, and its threads.
const COLUMNS: usize = 64;
const COLUMN_THREADS: u32 = 128;

/// The gate of a sample: f32 columns of `[B, stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// From the first sample's gate on.
    pub gate: Buffer,
    /// Columns in all.
    pub stride: usize,
}

impl Gate {
    /// Numbers from the first sample's gate to the end of the last one's.
    fn reach(self, dims: Dims) -> usize {
        (dims.b - 1) * self.stride + dims.c
    }
}

/// Windows, `[B, 2]` i32: start and width for each sample.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Where the base is added.
    pub base: Buffer,
    /// Outside of these the bypass is; none without a bypass.
    pub bypass: Buffer,
    /// What the linear layer writes.
    pub write: Buffer,
}

/// Inputs of both passes; `elem` is f32 or bf16, the same for all.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[B, T, K]` elem
    pub a: Buffer,
    /// `[C, K]` elem
    pub weight: Buffer,
    /// The gate.
    pub gate: Gate,
    /// All windows.
    pub windows: Windows,
}

/// What is added to the gated output of the linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// `[B, T, C]` elem, added inside the base windows.
    pub base: Buffer,
    /// `[B, T, C]` elem, added outside of the bypass windows; none without a bypass.
    pub bypass: Buffer,
}

/// What the backward pass reads of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// `[B, T, C]` elem: the linear layer's output in the write windows, as [`forward`] wrote it.
    pub z: Buffer,
    /// `[B, T, K]` elem, of which `a` is the GELU; none where it is not one.
    pub pre: Buffer,
}

/// The length of a buffer that may be left out.
fn unless_none(buffer: Buffer, len: usize) -> usize {
    if buffer.is_none() { 0 } else { len }
}

/// `out` `[B, T, C]` elem; also `z` `[B, T, C]` elem, the linear layer's output in the write windows (none: not kept). `bias` is `[C]`
/// f32.
///
/// # Safety
/// The buffers are as [`Buffer`] says; their lengths are checked, but not what is in the windows: each starts and ends inside of the `C`
/// channels, and is at least one wide.
///
/// # Errors
/// When a buffer is too short or of another type, or the device fails.
pub unsafe fn forward(
    device: &Device,
    out: Buffer,
    z: Buffer,
    inputs: Inputs,
    bias: Buffer,
    residual: Residual,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, k, c } = dims;
    let Inputs { a, weight, gate, windows } = inputs;
    let Residual { base, bypass } = residual;
    let elem = a.dtype;
    check_sizes(OP, elem, [b, t], &[c, k])?;
    check_stride(OP, inputs.gate.stride)?;
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("out", out, b * t * c),
            Operand::new("z", z, unless_none(z, b * t * c)),
            Operand::new("a", a, b * t * k),
            Operand::weight("weight", weight, c * k),
            Operand::weight("bias", bias, c),
            Operand::columns("gate", gate.gate, gate.reach(dims)),
            Operand::new("base", base, b * t * c),
            Operand::new("bypass", bypass, unless_none(bypass, b * t * c)),
            Operand::new("base windows", windows.base, b * 2),
            Operand::new("bypass windows", windows.bypass, unless_none(bypass, b * 2)),
            Operand::new("write windows", windows.write, b * 2),
        ],
    )?;
    let tiles = tiling(device, elem, b * t, c);
    let launch = tiles.launch(FILE, "linear_residual_fwd", elem);
    let args = [
        out.into(),
        z.into(),
        a.into(),
        weight.into(),
        bias.into(),
        gate.gate.into(),
        base.into(),
        bypass.into(),
        windows.base.into(),
        windows.bypass.into(),
        windows.write.into(),
        tiles.operand(a, b * t, k),
        tiles.operand(weight, c, k),
        Arg::I32(gate.stride as i32),
        Arg::I32(b as i32),
        Arg::I32(t as i32),
        Arg::I32(k as i32),
        Arg::I32(c as i32),
    ];
    // SAFETY: the buffers were found to be as long as these sizes ask for; the caller answers for their memory and for the windows.
    unsafe { device.launch(&launch, &args) }
}

/// Where gradients go.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// `[B, T, K]` elem, overwritten: gradient of `a`, or of `pre` where that is given.
    pub da: Buffer,
    /// As the gate; added to.
    pub dgate: Buffer,
    /// `[B, T, C]` elem inside the base windows, none where nobody wants it; may be `dout` itself, which is then not copied.
    pub dbase: Buffer,
    /// Whether dbase is overwritten (0 outside of the windows); else it is added to.
    pub fresh_base: bool,
    /// `[B, T, C]` elem outside of the bypass windows; none without a bypass. Not dbase: what one adds the other may overwrite.
    pub dbypass: Buffer,
    /// Whether dbypass is overwritten (0 inside of the windows); else it is added to.
    pub fresh_bypass: bool,
    /// `[C, K]` f32
    pub dweight: Buffer,
    /// `[C]` f32
    pub dbias: Buffer,
    /// Whether to add to dweight and dbias.
    pub add: bool,
}

/// Memory of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    dz: Buffer,       // [B, T, C] elem
    dz_sums: Buffer,  // [B, C] f32
    counters: Buffer, // u32: lists that were taken, then one for each part of the shares
    shares: Shares,
}

impl Scratch {
    /// That of a backward pass with this [`plan`], i32. `take` gives memory for so many numbers of a type, with arbitrary contents.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn take<E>(
        device: &Device,
        dims: Dims,
        elem: DType,
        plan: Buffer,
        mut take: impl FnMut(usize, DType) -> std::result::Result<Buffer, E>,
    ) -> std::result::Result<Self, E> {
        let Dims { b, t, c, .. } = dims;
        let Lengths { parts, counters, .. } = planner(device, elem, dims).lengths();
        Ok(Scratch {
            dz: take(b * t * c, elem)?,
            dz_sums: take(b * c, DType::F32)?,
            counters: take(counters, DType::U32)?,
            shares: Shares { plan, parts: take(parts, DType::F32)? },
        })
    }
}

/// How the weight's gradient is shared out.
pub(crate) fn planner(device: &Device, elem: DType, dims: Dims) -> Planner {
    let Dims { b, t, k, c } = dims;
    let gradient = Gradient { rows: c, columns: k, windows_of_rows: true, b, t, corrections: 0, bias: false };
    Planner::new(device, elem, gradient)
}

/// How the weight's gradient is shared out for these write windows, `[B]`: what [`Scratch::take`] takes.
///
/// # Errors
/// When there are not as many windows as samples, or one is not inside of the channels.
pub fn plan(device: &Device, elem: DType, dims: Dims, write: &[Window]) -> Result<Vec<i32>> {
    check_windows(OP, write, dims.b, dims.c)?;
    Ok(planner(device, elem, dims).plan(write))
}

/// The gradients, given that of the output, `dout` `[B, T, C]` elem.
///
/// # Safety
/// As [`forward`], and the plan is what [`plan`] makes of the write windows on a device like this one.
///
/// # Errors
/// When a buffer is too short or of another type, or the device fails.
pub unsafe fn backward(
    device: &Device,
    grads: Gradients,
    scratch: Scratch,
    dout: Buffer,
    inputs: Inputs,
    saved: Saved,
    dims: Dims,
) -> Result<()> {
    let Dims { b, t, k, c } = dims;
    let Inputs { a, weight, gate, windows } = inputs;
    let Saved { z, pre } = saved;
    let elem = dout.dtype;
    check_sizes(OP, elem, [b, t], &[c, k])?;
    check_stride(OP, inputs.gate.stride)?;
    let planner = planner(device, elem, dims);
    let Lengths { plan, parts, counters } = planner.lengths();
    check_buffers(
        OP,
        elem,
        &[
            Operand::new("da", grads.da, b * t * k),
            Operand::columns("dgate", grads.dgate, gate.reach(dims)),
            Operand::new("dbase", grads.dbase, unless_none(grads.dbase, b * t * c)),
            Operand::new("dbypass", grads.dbypass, unless_none(grads.dbypass, b * t * c)),
            Operand::weight("dweight", grads.dweight, c * k),
            Operand::weight("dbias", grads.dbias, c),
            Operand::new("dz", scratch.dz, b * t * c),
            Operand::new("dz_sums", scratch.dz_sums, b * c),
            Operand::new("counters", scratch.counters, counters),
            Operand::new("plan", scratch.shares.plan, plan),
            Operand::new("parts", scratch.shares.parts, parts),
            Operand::new("dout", dout, b * t * c),
            Operand::new("a", a, b * t * k),
            Operand::weight("weight", weight, c * k),
            Operand::columns("gate", gate.gate, gate.reach(dims)),
            Operand::new("base windows", windows.base, b * 2),
            Operand::new("bypass windows", windows.bypass, unless_none(grads.dbypass, b * 2)),
            Operand::new("write windows", windows.write, b * 2),
            Operand::new("z", z, b * t * c),
            Operand::new("pre", pre, unless_none(pre, b * t * k)),
        ],
    )?;
    // SAFETY: the buffers were found to be as long as these sizes ask for; the caller answers for their memory, the windows and the
    // plan.
    let launch = |launch: &Launch, args: &[Arg]| unsafe { device.launch(launch, args) };
    let [b32, t32, k32, c32] = [b, t, k, c].map(|size| Arg::I32(size as i32));
    let flag = |flag: bool| Arg::I32(i32::from(flag));
    let split = Launch {
        file: FILE,
        kernel: "linear_residual_bwd_split",
        elem,
        defines: &SMALL,
        grid: [c.div_ceil(COLUMNS) as u32, b as u32, 1],
        block: COLUMN_THREADS,
        shared: 0,
    };
    launch(
        &split,
        &[
            scratch.dz.into(),
            scratch.dz_sums.into(),
            grads.dgate.into(),
            grads.dbase.into(),
            grads.dbypass.into(),
            dout.into(),
            z.into(),
            gate.gate.into(),
            windows.base.into(),
            windows.bypass.into(),
            windows.write.into(),
            Arg::I32(gate.stride as i32),
            flag(grads.fresh_base),
            flag(grads.fresh_bypass),
            t32,
            c32,
        ],
    )?;
    let tiles = overlapped_tiling(device, elem, b * t, k);
    launch(
        &tiles.launch(FILE, "linear_residual_bwd_input", elem),
        &[
            grads.da.into(),
            scratch.counters.into(),
            scratch.dz.into(),
            weight.into(),
            pre.into(),
            windows.write.into(),
            tiles.operand(scratch.dz, b * t, c),
            tiles.operand(weight, c, k),
            Arg::I32(counters as i32),
            b32,
            t32,
            k32,
            c32,
        ],
    )?;
    launch(
        &planner.tiling.launch(FILE, "linear_residual_bwd_weight", elem),
        &[
            grads.dweight.into(),
            grads.dbias.into(),
            scratch.shares.parts.into(),
            scratch.counters.into(),
            scratch.shares.plan.into(),
            scratch.dz.into(),
            a.into(),
            scratch.dz_sums.into(),
            windows.write.into(),
            planner.tiling.operand(scratch.dz, b * t, c),
            planner.tiling.operand(a, b * t, k),
            flag(grads.add),
            b32,
            t32,
            k32,
            c32,
        ],
    )
}
