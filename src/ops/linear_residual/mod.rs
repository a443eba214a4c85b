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

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    a: Var,             // [B, T, K]
    pre: Option<Var>, // [B, T, K], of which `a` is the GELU; in main memory `a` itself, and backward puts its gradient there
    linear: Linear,   // [C, K], [C]
    gate: PerSample,  // [B, C]
    residual: Residual, // [B, T, C]
    write: Windows,   // B
    z: Var,           // [B, T, C], defined on the write windows; in main memory backward recycles it
}

/// `out`, `[B, T, C]`.
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
    mut residual: Residual,
    write: Windows,
) -> Result<Var> {
    const OP: &str = "linear_residual";
    let (a, pre) = match a.into() {
        Input::Rows(a) => (a, None),
        Input::Gelu(gelu) => (gelu.value, gelu.pre),
    };
    let [b, t, k] = dims3(tape, a, OP, "[batch, tokens, inputs]")?;
    let c = linear.outputs;
    check_linear(linear, OP)?;
    check(linear.inputs == k, OP, || format!("a has {k} inputs, but the weight is [{c}, {}]", linear.inputs))?;
    check_per_sample(tape, gate, b, c, OP)?;
    for var in [Some(residual.base), residual.bypass.map(|(x, _)| x)].into_iter().flatten() {
        check(tape.shape(var) == [b, t, c], OP, || {
            format!("the residual stream is {:?}, expected {:?}", tape.shape(var), [b, t, c])
        })?;
    }
    for windows in [Some(write), Some(residual.base_window), residual.bypass.map(|(_, w)| w)].into_iter().flatten() {
        let windows = tape.get_windows(windows);
        check(windows.len() == b && windows.iter().all(|w| w.fits(c)), OP, || {
            format!("needs {b} windows inside 0..{c}, got {windows:?}")
        })?;
    }

    // Nothing lies outside full windows.
    residual.bypass = residual.bypass.filter(|&(_, windows)| tape.get_windows(windows).iter().any(|w| w.width < c));
    if tape.on_cuda() {
        return on_cuda(tape, a, pre, linear, gate, residual, write, [b, t, k, c]);
    }
    let mut z = tape.take(b * t * c);
    let mut out = tape.take(b * t * c);
    let modulation = tape.value(gate.var);
    cpu::forward(
        &mut out,
        &mut z,
        tape.value(a),
        pre.is_some(),
        &tape.weights[linear.weight.range()],
        &tape.weights[linear.bias.range()],
        cpu::Gate { data: modulation, stride: modulation.len() / b.max(1), offset: gate.offset },
        (tape.value(residual.base), tape.get_windows(residual.base_window)),
        residual.bypass.map(|(x, w)| (tape.value(x), tape.get_windows(w))),
        tape.get_windows(write),
        Dims { b, t, c, k },
    );
    let out = tape.push([b, t, c], out, true);
    if tape.records() {
        let z = tape.push([b, t, c], z, false);
        tape.record(out, Node::LinearResidual(Saved { a, pre, linear, gate, residual, write, z }));
    } else {
        tape.give(z);
    }
    Ok(out)
}

/// [`linear_residual`] on a CUDA device.
#[expect(clippy::too_many_arguments, reason = "those of linear_residual, checked")]
fn on_cuda(
    tape: &mut Tape,
    a: Var,
    pre: Option<Var>,
    linear: Linear,
    gate: PerSample,
    residual: Residual,
    write: Windows,
    [b, t, k, c]: [usize; 4],
) -> Result<Var> {
    let (elem, device) = (tape.elem(), tape.device());
    let out = tape.take_buffer(b * t * c, elem);
    let z = if tape.records() { tape.take_buffer(b * t * c, elem) } else { Buffer::none(elem) };
    cuda::forward(
        &device,
        out,
        z,
        tape.buffer(a),
        tape.weight_buffer(linear.weight),
        tape.full_buffer(linear.bias),
        cuda_gate(tape, gate),
        tape.buffer(residual.base),
        residual.bypass.map_or(Buffer::none(elem), |(x, _)| tape.buffer(x)),
        cuda_windows(tape, residual, write),
        Dims { b, t, k, c },
    )?;
    let out = tape.push([b, t, c], out, true);
    if tape.records() {
        let z = tape.push([b, t, c], z, false);
        tape.record(out, Node::LinearResidual(Saved { a, pre, linear, gate, residual, write, z }));
    }
    Ok(out)
}

fn cuda_gate(tape: &Tape, gate: PerSample) -> cuda::Gate {
    let modulation = tape.buffer(gate.var);
    cuda::Gate { gate: modulation.slice(gate.offset..modulation.len), stride: tape.shape(gate.var)[1] }
}

fn cuda_windows(tape: &Tape, residual: Residual, write: Windows) -> cuda::Windows {
    cuda::Windows {
        base: tape.window_buffer(residual.base_window),
        bypass: residual.bypass.map_or(Buffer::none(DType::I32), |(_, windows)| tape.window_buffer(windows)),
        write: tape.window_buffer(write),
    }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dout: Buffer) -> Result<()> {
        let &[b, t, k] = tape.shape(self.a) else { unreachable!("checked by the forward pass") };
        let (c, elem, device) = (self.linear.outputs, tape.elem(), tape.device());
        let da = tape.take_buffer(b * t * k, elem);
        let dmodulation = tape.take_zeroed_grad_buffer(self.gate.var)?;
        let (mut dbase, fresh_base) = tape.take_grad_buffer(self.residual.base);
        if fresh_base {
            // The gradient passes on inside the window, so its buffer does.
            tape.give_buffer(std::mem::replace(&mut dbase, dout));
        }
        let (dbypass, fresh_bypass) = match self.residual.bypass {
            Some((x, _)) if x == self.residual.base => (tape.take_buffer(b * t * c, elem), true),
            Some((x, _)) => tape.take_grad_buffer(x),
            None => (Buffer::none(elem), false),
        };
        let dims = Dims { b, t, k, c };
        let scratch = cuda::Scratch {
            dz: tape.take_buffer(b * t * c, elem),
            dz_sums: tape.take_buffer(b * c, DType::F32),
            counters: tape.take_buffer(cuda::counters_len(&device, elem, dims), DType::U32),
            shares: tape.take_shares(self.write, &cuda::planner(&device, elem, dims)),
        };
        let (dweight, add) = tape.grad_buffer(self.linear.weight);
        let (dbias, _) = tape.grad_buffer(self.linear.bias);
        let pre = self.pre.map_or(Buffer::none(elem), |pre| tape.buffer(pre));
        let dgate = dmodulation.slice(self.gate.offset..dmodulation.len);
        cuda::backward(
            &device,
            cuda::Gradients { da, dgate, dbase, fresh_base, dbypass, fresh_bypass, dweight, dbias, add },
            scratch,
            dout,
            tape.buffer(self.a),
            pre,
            tape.buffer(self.z),
            tape.weight_buffer(self.linear.weight),
            cuda_gate(tape, self.gate),
            cuda_windows(tape, self.residual, self.write),
            dims,
        )?;
        tape.put_grad_buffer(self.residual.base, dbase);
        if let Some((x, _)) = self.residual.bypass {
            if x == self.residual.base {
                tape.add_grad_buffer(x, dbypass)?;
            } else {
                tape.put_grad_buffer(x, dbypass);
            }
        }
        tape.put_grad_buffer(self.gate.var, dmodulation);
        tape.add_grad_buffer(self.a, da)?;
        if !fresh_base {
            tape.give_buffer(dout);
        }
        for buffer in [scratch.dz, scratch.dz_sums, scratch.counters, scratch.shares.parts] {
            tape.give_buffer(buffer);
        }
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, mut dout: AlignedVec) {
        let &[b, t, k] = tape.shape(self.a) else { unreachable!("checked by the forward pass") };
        let c = self.linear.outputs;
        // The gradient of a GELU is handed on as that of its input, in the place of that.
        let (mut da, fresh_da) = match self.pre.map(|pre| tape.take_value(pre)) {
            Some(Storage::Cpu(pre)) => (pre, true),
            Some(Storage::Cuda(_)) => unreachable!("a backward pass in main memory"),
            None => tape.take_grad(self.a),
        };
        let mut room = self.pre.map_or_else(AlignedVec::new, |_| tape.take(cpu::panels_len([b, t, k])));
        let (mut dmodulation, fresh) = tape.take_grad(self.gate.var);
        if fresh {
            dmodulation.fill(0.0);
        }
        let mut dbias_parts = tape.take(b * c);
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        let modulation = values.value(self.gate.var);
        let squares = cpu::backward(
            cpu::Gradients { da: &mut da, fresh_da, dmodulation: &mut dmodulation, dweight, dbias, add },
            &mut dbias_parts,
            &dout,
            match self.pre {
                Some(_) => cpu::Activation::GeluOfDa(&mut room),
                None => cpu::Activation::Rows(values.value(self.a)),
            },
            values.weight(self.linear.weight),
            cpu::Gate { data: modulation, stride: modulation.len() / b.max(1), offset: self.gate.offset },
            values.value(self.z),
            values.windows(self.write),
            Dims { b, t, c, k },
        );
        tape.note_squares(self.linear.weight, squares);
        tape.put_grad(self.a, da);
        tape.put_grad(self.gate.var, dmodulation);
        tape.give(dbias_parts);
        tape.give(room);
        tape.release(self.z);

        if let Some((x, windows)) = self.residual.bypass {
            let (mut dx, fresh) = tape.take_grad(x);
            cpu::bypass_backward(&mut dx, fresh, &dout, tape.get_windows(windows), t, c);
            tape.put_grad(x, dx);
        }
        let windows = self.residual.base_window;
        let (mut dbase, fresh) = tape.take_grad(self.residual.base);
        if fresh {
            // The gradient passes on unchanged in the windows, so its buffer does.
            cpu::clear_outside(&mut dout, tape.get_windows(windows), t, c);
            std::mem::swap(&mut dbase, &mut dout);
        } else {
            cpu::base_backward(&mut dbase, &dout, tape.get_windows(windows), t, c);
        }
        tape.put_grad(self.residual.base, dbase);
        tape.give(dout);
    }
}
