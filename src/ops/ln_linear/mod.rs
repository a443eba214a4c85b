//! Mask, LayerNorm, modulate and linear layer in one operation that skips the inactive channels.
//!
//! ```text
//! x [B, T, C] -> read window -> LN (no affine, eps 1e-6, statistics over all C channels, zeros included)
//!             -> h (1 + scale) + shift -> W [N, C], b [N] -> (GELU) -> y [B, T, N]
//! ```
//!
//! After LN and modulate the inactive channels `I` are not zero, but two vectors a sample hold all they do (A active,
//! `z_t = (x_t - mu_t) rstd_t`, and `r_t = -mu_t rstd_t` is what `z` is on every inactive channel):
//!
//! ```text
//! y_t = W[:,A] h_tA + r_t u + v + b      u = W[:,I] (1 + scale_I)    v = W[:,I] shift_I
//! ```
//!
//! so the product runs over the window only, and the result is still exact. (On a CPU with AMX, where very few channels of each
//! sample are inactive, it runs over all channels of the masked row instead.) Backward, with `g` the gradient of `y` (before GELU),
//! `P = sum_t r_t g_t` and `Q = sum_t g_t`:
//!
//! ```text
//! dh_tA      = W[:,A]^T g_t                         dr_t = g_t . u
//! dW[:,A]    = sum_t g_t (x) h_tA                   dW[:,I] = P (x) (1 + scale_I) + Q (x) shift_I      db = Q
//! dscale_A   = sum_t dh_tA z_tA                     dscale_I = W[:,I]^T P
//! dshift_A   = sum_t dh_tA                          dshift_I = W[:,I]^T Q
//! dx_tA      = rstd_t (dz - S1_t / C - z S2_t / C)  dz = dh (1 + scale), S1 = sum dz + dr, S2 = sum dz z + r dr
//! ```

pub(crate) mod cpu;
pub mod cuda;
mod inactive;
pub mod reference;
mod rows;

use crate::autograd::{Tape, Var, Windows};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Buffer, DType};
use crate::error::Result;
use crate::ops::{Node, PerSample, check, check_linear, check_per_sample, dims3};
use crate::params::Linear;
use crate::routing::Window;

/// Added to the variance, as in the published model.
pub const EPS: f64 = 1e-6;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Samples.
    pub b: usize,
    /// Tokens of each.
    pub t: usize,
    /// Channels.
    pub c: usize,
    /// Outputs.
    pub n: usize,
}

/// What follows the linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// GELU, tanh form.
    Gelu,
}

/// What is normalised, modulated and multiplied.
#[derive(Clone, Copy)]
struct Operands {
    x: Var,           // [B, T, C]
    read: Windows,    // B
    shift: PerSample, // [B, C]
    scale: PerSample, // [B, C]
    linear: Linear,   // [N, C], [N]
}

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    operands: Operands,
    dims: Dims,
    computed: Windows,       // B: in main memory those of `read`, or all channels; CUDA: `read`
    mean: Var,               // [B, T]
    rstd: Var,               // [B, T]
    correction: Option<Var>, // [B, 2, N]: u, and v + b (CUDA: v); None when all channels are computed
    pre: Option<Var>,        // [B, T, N] before GELU; None without, and where its one reader sees to it
    h: Option<Var>,          // CUDA: [B, T, C] normalised and modulated
    inactive: Option<Var>,   // CUDA: [B, 2, C]: 1 + scale and shift outside of the windows
}

/// The output of a linear layer on its way through GELU to its only reader, [`linear_residual`](super::linear_residual::linear_residual),
/// which takes it by value.
///
/// In main memory nobody has applied GELU yet: the reader does, to the numbers that it is about to multiply, so that forward stores no
/// result. On a CUDA device both may be stored. In either, backward of the reader also goes through the GELU: it gives the gradient of
/// what that was applied to.
#[derive(Debug)]
pub struct Gelu {
    /// On a CUDA device the GELU; in main memory `pre`.
    pub(crate) value: Var,
    /// What it is applied to; None on a CUDA device when nothing is recorded.
    pub(crate) pre: Option<Var>,
}

/// `y = activation(linear(modulate(LN(x in its windows))))`, `[B, T, N]`.
///
/// `x` is `[B, T, C]`; `read` gives one window a sample; `shift` and `scale` one vector of C a sample.
///
/// # Errors
/// When shapes do not fit together.
pub fn ln_linear(
    tape: &mut Tape,
    x: Var,
    read: Windows,
    shift: PerSample,
    scale: PerSample,
    linear: Linear,
    activation: Activation,
) -> Result<Var> {
    let operands = Operands { x, read, shift, scale, linear };
    let (dims, full) = operands.check(tape)?;
    if tape.on_cuda() {
        let (y, pre, saved) = on_cuda(tape, operands, activation, dims, full)?;
        tape.record(y, Node::LnLinear(Saved { pre, ..saved }));
        return Ok(y);
    }
    let Dims { b, t, c, n } = dims;
    let all = cpu::computes_all(tape.get_windows(read), dims, tape.elem());
    let computed = if all && !full { tape.windows(std::iter::repeat_n(Window::all(c), b)) } else { read };
    let mut y = tape.take(b * t * n);
    let mut mean = tape.take(b * t);
    let mut rstd = tape.take(b * t);
    let mut correction = if all { AlignedVec::new() } else { tape.take(b * 2 * n) };
    let inputs = cpu::Inputs {
        x: tape.value(x),
        read: tape.get_windows(read),
        computed: tape.get_windows(computed),
        modulation: cpu::Modulation::new(tape.value(shift.var), b, shift.offset, scale.offset),
        weight: &tape.weights[linear.weight.range()],
        dims,
        elem: tape.elem(),
    };
    let bias = &tape.weights[linear.bias.range()];
    cpu::forward(&mut y, &mut mean, &mut rstd, &mut correction, inputs, bias);
    let mut pre = None;
    if activation == Activation::Gelu {
        let before = std::mem::replace(&mut y, tape.take(b * t * n));
        cpu::gelu_forward(&mut y, &before);
        if tape.records() {
            pre = Some(tape.push([b, t, n], before, false));
        } else {
            tape.give(before);
        }
    }
    let y = tape.push([b, t, n], y, true);
    let mean = tape.push([b, t], mean, false);
    let rstd = tape.push([b, t], rstd, false);
    let correction = (!all).then(|| tape.push([b, 2, n], correction, false));
    let saved = Saved { operands, dims, computed, mean, rstd, correction, pre, h: None, inactive: None };
    tape.record(y, Node::LnLinear(saved));
    Ok(y)
}

/// [`ln_linear`] with GELU, for one reader.
///
/// # Errors
/// When shapes do not fit together.
pub fn ln_linear_gelu(
    tape: &mut Tape,
    x: Var,
    read: Windows,
    shift: PerSample,
    scale: PerSample,
    linear: Linear,
) -> Result<Gelu> {
    if !tape.on_cuda() {
        let value = ln_linear(tape, x, read, shift, scale, linear, Activation::None)?;
        return Ok(Gelu { value, pre: Some(value) });
    }
    let operands = Operands { x, read, shift, scale, linear };
    let (dims, full) = operands.check(tape)?;
    let (value, pre, saved) = on_cuda(tape, operands, Activation::Gelu, dims, full)?;
    tape.record(value, Node::LnLinear(saved));
    Ok(Gelu { value, pre })
}

const OP: &str = "ln_linear";

impl Operands {
    /// Refuses those that do not fit; their sizes, and whether every window is full.
    fn check(self, tape: &Tape) -> Result<(Dims, bool)> {
        let Operands { x, read, shift, scale, linear } = self;
        let [b, t, c] = dims3(tape, x, OP, "[batch, tokens, channels]")?;
        let (n, inputs) = (linear.outputs, linear.inputs);
        check_linear(linear, OP)?;
        check(inputs == c, OP, || format!("x has {c} channels, but the weight is [{n}, {inputs}]"))?;
        check_per_sample(tape, shift, b, c, OP)?;
        check_per_sample(tape, scale, b, c, OP)?;
        check(shift.var == scale.var, OP, || "shift and scale must be columns of one modulation".into())?;
        check(shift.offset.abs_diff(scale.offset) >= c, OP, || {
            format!("shift and scale, columns {} and {} of the modulation, overlap", shift.offset, scale.offset)
        })?;
        let windows = tape.get_windows(read);
        check(windows.len() == b && windows.iter().all(|w| w.fits(c)), OP, || {
            format!("needs {b} read windows inside 0..{c}, got {windows:?}")
        })?;
        Ok((Dims { b, t, c, n }, windows.iter().all(|w| w.width == c)))
    }

    fn cuda_inputs(self, tape: &Tape, full: bool) -> cuda::Inputs {
        let modulation = tape.buffer(self.shift.var);
        let from = |offset| modulation.slice(offset..modulation.len);
        cuda::Inputs {
            x: tape.buffer(self.x),
            windows: tape.window_buffer(self.read),
            full,
            modulation: cuda::Modulation {
                shift: from(self.shift.offset),
                scale: from(self.scale.offset),
                stride: tape.shape(self.shift.var)[1],
            },
            weight: tape.weight_buffer(self.linear.weight),
        }
    }
}

/// [`ln_linear`] on a CUDA device, not yet recorded: the output, what GELU was applied to, and what backward needs but that.
fn on_cuda(
    tape: &mut Tape,
    operands: Operands,
    activation: Activation,
    dims: Dims,
    full: bool,
) -> Result<(Var, Option<Var>, Saved)> {
    let Dims { b, t, c, n } = dims;
    let elem = tape.elem();
    let y = tape.take_buffer(b * t * n, elem);
    let keeps_pre = activation == Activation::Gelu && tape.records();
    let pre = if keeps_pre { tape.take_buffer(b * t * n, elem) } else { Buffer::none(elem) };
    let saved = cuda::Saved::take(dims, elem, full, tape.taker(&mut Vec::new()))?;
    let (inputs, bias) = (operands.cuda_inputs(tape, full), tape.full_buffer(operands.linear.bias));
    // SAFETY: memory of this pass and parameters; the windows were checked to fit, and `full` says whether they are all.
    unsafe { cuda::forward(&tape.device(), y, pre, saved, inputs, bias, activation, dims) }?;
    let y = tape.push([b, t, n], y, true);
    let mean = tape.push([b, t], saved.mean, false);
    let rstd = tape.push([b, t], saved.rstd, false);
    let correction = (!full).then(|| tape.push([b, 2, n], saved.uv, false));
    let pre = keeps_pre.then(|| tape.push([b, t, n], pre, false));
    let h = Some(tape.push([b, t, c], saved.h, false));
    let inactive = Some(tape.push([b, 2, c], saved.inactive, false));
    let computed = operands.read;
    Ok((y, pre, Saved { operands, dims, computed, mean, rstd, correction, pre: None, h, inactive }))
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let (Operands { x, read, shift, scale, linear }, dims) = (self.operands, self.dims);
        let (full, elem, device) = (self.correction.is_none(), tape.elem(), tape.device());
        if let Some(pre) = self.pre {
            // SAFETY: memory of this pass.
            unsafe { cuda::gelu_backward(&tape.device(), dy, tape.buffer(pre)) }?;
        }
        let (dx, fresh_dx) = tape.take_grad_buffer(x);
        let dmodulation = tape.take_zeroed_grad_buffer(shift.var)?;
        let mut taken = vec![dy];
        let plan = tape.plan_buffer(read, &cuda::planner(&device, elem, dims, full));
        let scratch = cuda::Scratch::take(&device, dims, elem, full, plan, tape.taker(&mut taken))?;
        let (dweight, add) = tape.grad_buffer(linear.weight);
        let (dbias, _) = tape.grad_buffer(linear.bias);
        let from = |offset| dmodulation.slice(offset..dmodulation.len);
        let grads = cuda::Gradients {
            dx,
            fresh_dx,
            dshift: from(shift.offset),
            dscale: from(scale.offset),
            dweight,
            dbias,
            add,
        };
        let of = |var: Option<Var>| var.map_or(Buffer::none(DType::F32), |var| tape.buffer(var));
        let saved = cuda::Saved {
            h: of(self.h),
            mean: tape.buffer(self.mean),
            rstd: tape.buffer(self.rstd),
            inactive: of(self.inactive),
            uv: of(self.correction),
        };
        let inputs = self.operands.cuda_inputs(tape, full);
        // SAFETY: memory of this pass, parameters and their gradients; the windows are those of forward, and the plan is made of them.
        unsafe { cuda::backward(&tape.device(), grads, scratch, dy, inputs, saved, dims) }?;
        tape.put_grad_buffer(x, dx);
        tape.put_grad_buffer(shift.var, dmodulation);
        taken.into_iter().for_each(|buffer| tape.give_buffer(buffer));
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, mut dy: AlignedVec) {
        let Operands { x, read, shift, scale, linear } = self.operands;
        if let Some(pre) = self.pre {
            cpu::gelu_backward(&mut dy, tape.value(pre));
        }
        let (mut dx, fresh_dx) = tape.take_grad(x);
        let (mut dmodulation, fresh) = tape.take_grad(shift.var);
        if fresh {
            dmodulation.fill(0.0);
        }
        let elem = tape.elem();
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(linear);
        let inputs = cpu::Inputs {
            x: values.value(x),
            read: values.windows(read),
            computed: values.windows(self.computed),
            modulation: cpu::Modulation::new(values.value(shift.var), self.dims.b, shift.offset, scale.offset),
            weight: values.weight(linear.weight),
            dims: self.dims,
            elem,
        };
        let squares = cpu::backward(
            cpu::Gradients { dx: &mut dx, fresh_dx, dmodulation: &mut dmodulation, dweight, dbias, add },
            &dy,
            inputs,
            values.value(self.mean),
            values.value(self.rstd),
            self.correction.map(|v| values.value(v)),
        );
        tape.note_squares(linear.weight, squares);
        tape.put_grad(x, dx);
        tape.put_grad(shift.var, dmodulation);
        tape.give(dy);
    }
}
