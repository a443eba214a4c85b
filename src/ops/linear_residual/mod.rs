//! Linear layer, gate, residual and bypass in one operation that computes the written channels only.
//!
//! ```text
//! a [B, T, K] -> W [C, K], b [C] -> z -> out [B, T, C]
//! out_c = (base_c if c in the base window) + (gate_c z_c if c in the write window) + (bypass_c if c outside its window)
//! ```
//!
//! The four uses (m is the window, x the block's input):
//!
//! ```text
//! paper     x1  = m x + gate z                      base window m, write all
//!           out = x1 + gate z + (1 - m) x           base window all, write all, bypass x outside m
//! sublayer  x1  = m (x + gate z)                    base window m, write m
//!           out = m (x1 + gate z) + (1 - m) x       base window m, write m, bypass x outside m
//! ```
//!
//! Backward: `dz = gate dout` on the written channels and 0 elsewhere; `da = dz W` (times `gelu'(pre)` where `a = gelu(pre)` is
//! an [`Input::Gelu`]), `dW = dz^T a`, `db = sum dz`,
//! `dgate = sum_t dout z`; base and bypass get `dout` where they were let through.

pub(crate) mod cpu;
pub mod cuda;
pub mod reference;

use crate::autograd::{Tape, Var, Windows};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Buffer, DType};
use crate::error::Result;
use crate::ops::ln_linear::Gelu;
use crate::ops::{Node, PerSample, check, check_linear, check_per_sample, dims3};
use crate::params::Linear;
use crate::tensor::Storage;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Samples.
    pub b: usize,
    /// Tokens of each.
    pub t: usize,
    /// Inputs.
    pub k: usize,
    /// Channels of the residual stream.
    pub c: usize,
}

/// The residual stream around the linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// `[B, T, C]`, added inside `base_window`.
    pub base: Var,
    /// One window a sample.
    pub base_window: Windows,
    /// `[B, T, C]`, passed through outside its windows; None for nothing.
    pub bypass: Option<(Var, Windows)>,
}

/// What the linear layer multiplies, `[B, T, K]`.
#[derive(Debug)]
pub enum Input {
    /// An activation.
    Rows(Var),
    /// A GELU, of which this is the only reader.
    Gelu(Gelu),
}

impl From<Var> for Input {
    fn from(rows: Var) -> Self {
        Input::Rows(rows)
    }
}

impl From<Gelu> for Input {
    fn from(gelu: Gelu) -> Self {
        Input::Gelu(gelu)
    }
}

/// The linear layer and what is around it.
#[derive(Clone, Copy)]
struct Operands {
    a: Var,             // [B, T, K]
    pre: Option<Var>, // [B, T, K], of which `a` is the GELU; in main memory `a` itself, where backward puts its gradient
    linear: Linear,   // [C, K], [C]
    gate: PerSample,  // [B, C]
    residual: Residual, // [B, T, C]
    write: Windows,   // B
}

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    operands: Operands,
    dims: Dims,
    z: Var, // [B, T, C], defined on the write windows; in main memory backward recycles it
}

const OP: &str = "linear_residual";

/// `out = (base inside its windows) + (gate (a W^T + b) inside the write windows) + (bypass outside its windows)`, `[B, T, C]`.
///
/// `a` is `[B, T, K]`; `write` gives one window a sample: only these channels of the linear layer are computed.
///
/// # Errors
/// When shapes do not fit together.
pub fn linear_residual(
    tape: &mut Tape,
    a: impl Into<Input>,
    linear: Linear,
    gate: PerSample,
    residual: Residual,
    write: Windows,
) -> Result<Var> {
    let (a, pre) = match a.into() {
        Input::Rows(a) => (a, None),
        Input::Gelu(gelu) => (gelu.value, gelu.pre),
    };
    let mut operands = Operands { a, pre, linear, gate, residual, write };
    let dims = operands.check(tape)?;
    let Dims { b, t, c, .. } = dims;
    // Nothing lies outside full windows.
    let bypass = residual.bypass.filter(|&(_, windows)| tape.get_windows(windows).iter().any(|w| w.width < c));
    operands.residual.bypass = bypass;
    if tape.on_cuda() {
        return on_cuda(tape, operands, dims);
    }
    let mut z = if tape.records() { tape.take(b * t * c) } else { AlignedVec::new() };
    let mut out = tape.take(b * t * c);
    let inputs = cpu::Inputs {
        weight: &tape.weights[linear.weight.range()],
        gate: cpu::Gate::new(tape.value(gate.var), b, gate.offset),
        write: tape.get_windows(write),
        dims,
        elem: tape.elem(),
    };
    let around = cpu::Residual {
        base: (tape.value(residual.base), tape.get_windows(residual.base_window)),
        bypass: bypass.map(|(x, windows)| (tape.value(x), tape.get_windows(windows))),
    };
    let bias = &tape.weights[linear.bias.range()];
    cpu::forward(&mut out, &mut z, tape.value(a), pre.is_some(), inputs, bias, around);
    let out = tape.push([b, t, c], out, true);
    if tape.records() {
        let z = tape.push([b, t, c], z, false);
        tape.record(out, Node::LinearResidual(Saved { operands, dims, z }));
    }
    Ok(out)
}

impl Operands {
    /// Refuses those that do not fit; their sizes.
    fn check(self, tape: &Tape) -> Result<Dims> {
        let Operands { a, linear, gate, residual, write, .. } = self;
        let [b, t, k] = dims3(tape, a, OP, "[batch, tokens, inputs]")?;
        let c = linear.outputs;
        check_linear(linear, OP)?;
        check(linear.inputs == k, OP, || format!("a has {k} inputs, but the weight is [{c}, {}]", linear.inputs))?;
        check_per_sample(tape, gate, b, c, OP)?;
        for var in [Some(residual.base), residual.bypass.map(|(x, _)| x)].into_iter().flatten() {
            tape.check_held(var, OP)?;
            check(tape.shape(var) == [b, t, c], OP, || {
                format!("the residual stream is {:?}, expected {:?}", tape.shape(var), [b, t, c])
            })?;
        }
        let all_windows = [Some(write), Some(residual.base_window), residual.bypass.map(|(_, w)| w)];
        for windows in all_windows.into_iter().flatten() {
            let windows = tape.get_windows(windows);
            check(windows.len() == b && windows.iter().all(|w| w.fits(c)), OP, || {
                format!("needs {b} windows inside 0..{c}, got {windows:?}")
            })?;
        }
        Ok(Dims { b, t, k, c })
    }

    fn cuda_inputs(self, tape: &Tape) -> cuda::Inputs {
        let modulation = tape.buffer(self.gate.var);
        let gate = modulation.slice(self.gate.offset..modulation.len);
        let bypass = self.residual.bypass;
        cuda::Inputs {
            a: tape.buffer(self.a),
            weight: tape.weight_buffer(self.linear.weight),
            gate: cuda::Gate { gate, stride: tape.shape(self.gate.var)[1] },
            windows: cuda::Windows {
                base: tape.window_buffer(self.residual.base_window),
                bypass: bypass.map_or(Buffer::none(DType::I32), |(_, windows)| tape.window_buffer(windows)),
                write: tape.window_buffer(self.write),
            },
        }
    }
}

/// [`linear_residual`] on a CUDA device.
fn on_cuda(tape: &mut Tape, operands: Operands, dims: Dims) -> Result<Var> {
    let Operands { linear, residual, .. } = operands;
    let Dims { b, t, c, .. } = dims;
    let elem = tape.elem();
    let out = tape.take_buffer(b * t * c, elem);
    let z = if tape.records() { tape.take_buffer(b * t * c, elem) } else { Buffer::none(elem) };
    let around = cuda::Residual {
        base: tape.buffer(residual.base),
        bypass: residual.bypass.map_or(Buffer::none(elem), |(x, _)| tape.buffer(x)),
    };
    let (inputs, bias) = (operands.cuda_inputs(tape), tape.full_buffer(linear.bias));
    // SAFETY: memory of this pass and parameters; the windows were checked to fit.
    unsafe { cuda::forward(&tape.device(), out, z, inputs, bias, around, dims) }?;
    let out = tape.push([b, t, c], out, true);
    if tape.records() {
        let z = tape.push([b, t, c], z, false);
        tape.record(out, Node::LinearResidual(Saved { operands, dims, z }));
    }
    Ok(out)
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dout: Buffer) -> Result<()> {
        let (Operands { a, pre, linear, gate, residual, write }, dims) = (self.operands, self.dims);
        let Dims { b, t, k, c } = dims;
        let (elem, device) = (tape.elem(), tape.device());
        let da = tape.take_buffer(b * t * k, elem);
        let dmodulation = tape.take_zeroed_grad_buffer(gate.var)?;
        let (mut dbase, fresh_base) = tape.take_grad_buffer(residual.base);
        if fresh_base {
            // The gradient passes on inside the window, so its buffer does.
            tape.give_buffer(std::mem::replace(&mut dbase, dout));
        }
        let (dbypass, fresh_bypass) = match residual.bypass {
            Some((x, _)) if x == residual.base => (tape.take_buffer(b * t * c, elem), true),
            Some((x, _)) => tape.take_grad_buffer(x),
            None => (Buffer::none(elem), false),
        };
        let mut taken = Vec::new();
        let plan = tape.plan_buffer(write, &cuda::planner(&device, elem, dims));
        let scratch = cuda::Scratch::take(&device, dims, elem, plan, tape.taker(&mut taken))?;
        let (dweight, add) = tape.grad_buffer(linear.weight);
        let (dbias, _) = tape.grad_buffer(linear.bias);
        let dgate = dmodulation.slice(gate.offset..dmodulation.len);
        let grads = cuda::Gradients { da, dgate, dbase, fresh_base, dbypass, fresh_bypass, dweight, dbias, add };
        let saved = cuda::Saved { z: tape.buffer(self.z), pre: pre.map_or(Buffer::none(elem), |pre| tape.buffer(pre)) };
        let inputs = self.operands.cuda_inputs(tape);
        // SAFETY: memory of this pass, parameters and their gradients; the windows are those of forward, and the plan is made of the
        // write windows.
        unsafe { cuda::backward(&tape.device(), grads, scratch, dout, inputs, saved, dims) }?;
        tape.put_grad_buffer(residual.base, dbase);
        if let Some((x, _)) = residual.bypass {
            if x == residual.base {
                tape.add_grad_buffer(x, dbypass)?;
            } else {
                tape.put_grad_buffer(x, dbypass);
            }
        }
        tape.put_grad_buffer(gate.var, dmodulation);
        tape.add_grad_buffer(a, da)?;
        if !fresh_base {
            tape.give_buffer(dout);
        }
        taken.into_iter().for_each(|buffer| tape.give_buffer(buffer));
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, mut dout: AlignedVec) {
        let Operands { a, pre, linear, gate, residual, write } = self.operands;
        let Dims { b, t, k, c } = self.dims;
        // The gradient of a GELU is handed on as that of its input, in the place of that.
        let (mut da, fresh_da) = match pre.map(|pre| tape.take_value(pre)) {
            Some(Storage::Cpu(pre)) => (pre, true),
            Some(Storage::Cuda(_)) => unreachable!("a backward pass in main memory"),
            None => tape.take_grad(a),
        };
        let mut room = pre.map_or_else(AlignedVec::new, |_| tape.take(cpu::panels_len([b, t, k])));
        let (mut dmodulation, fresh) = tape.take_grad(gate.var);
        if fresh {
            dmodulation.fill(0.0);
        }
        let mut dbias_parts = tape.take(b * c);
        let elem = tape.elem();
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(linear);
        let inputs = cpu::Inputs {
            weight: values.weight(linear.weight),
            gate: cpu::Gate::new(values.value(gate.var), b, gate.offset),
            write: values.windows(write),
            dims: self.dims,
            elem,
        };
        let squares = cpu::backward(
            cpu::Gradients { da: &mut da, fresh_da, dmodulation: &mut dmodulation, dweight, dbias, add },
            &mut dbias_parts,
            &dout,
            match pre {
                Some(_) => cpu::Activation::GeluOfDa(&mut room),
                None => cpu::Activation::Rows(values.value(a)),
            },
            values.value(self.z),
            inputs,
        );
        tape.note_squares(linear.weight, squares);
        tape.put_grad(a, da);
        tape.put_grad(gate.var, dmodulation);
        tape.give(dbias_parts);
        tape.give(room);
        tape.release(self.z);

        if let Some((x, windows)) = residual.bypass {
            let (mut dx, fresh) = tape.take_grad(x);
            cpu::bypass_backward(&mut dx, fresh, &dout, tape.get_windows(windows), t, c);
            tape.put_grad(x, dx);
        }
        let windows = residual.base_window;
        let (mut dbase, fresh) = tape.take_grad(residual.base);
        if fresh {
            // The gradient passes on unchanged in the windows, so its buffer does.
            cpu::clear_outside(&mut dout, tape.get_windows(windows), t, c);
            std::mem::swap(&mut dbase, &mut dout);
        } else {
            cpu::base_backward(&mut dbase, &dout, tape.get_windows(windows), t, c);
        }
        tape.put_grad(residual.base, dbase);
        tape.give(dout);
    }
}
