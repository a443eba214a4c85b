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
//! so the product runs over the window only, and the result is still exact. Backward, with `g` the gradient of `y` (before
//! GELU), `P = sum_t r_t g_t` and `Q = sum_t g_t`:
//!
//! ```text
//! dh_tA      = W[:,A]^T g_t                         dr_t = g_t . u
//! dW[:,A]    = sum_t g_t (x) h_tA                   dW[:,I] = P (x) (1 + scale_I) + Q (x) shift_I      db = Q
//! dscale_A   = sum_t dh_tA z_tA                     dscale_I = W[:,I]^T P
//! dshift_A   = sum_t dh_tA                          dshift_I = W[:,I]^T Q
//! dx_tA      = rstd_t (dz - S1_t / C - z S2_t / C)  dz = dh (1 + scale), S1 = sum dz + dr, S2 = sum dz z + r dr
//! ```

pub(crate) mod cpu;
pub mod reference;

use crate::autograd::{Tape, Var, Windows};
use crate::error::Result;
use crate::ops::{Node, PerSample, check, check_per_sample, dims3};
use crate::params::Linear;

/// Added to the variance, as in the published model.
pub const EPS: f64 = 1e-6;

/// What follows the linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// GELU, tanh form.
    Gelu,
}

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    x: Var,                  // [B, T, C]
    read: Windows,           // B
    shift: PerSample,        // [B, C]
    scale: PerSample,        // [B, C]
    linear: Linear,          // [N, C], [N]
    mean: Var,               // [B, T]
    rstd: Var,               // [B, T]
    correction: Option<Var>, // [B, 2, N]: u, and v + b; None when every window is full
    pre: Option<Var>,        // [B, T, N] before GELU; None without
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
    const OP: &str = "ln_linear";
    let [b, t, c] = dims3(tape, x, OP, "[batch, tokens, channels]")?;
    let n = linear.outputs;
    check(linear.inputs == c, OP, || format!("x has {c} channels, but the weight is [{n}, {}]", linear.inputs))?;
    check_per_sample(tape, shift, b, c, OP)?;
    check_per_sample(tape, scale, b, c, OP)?;
    check(shift.var == scale.var, OP, || "shift and scale must be columns of one modulation".into())?;
    check(shift.offset.abs_diff(scale.offset) >= c, OP, || {
        format!("shift and scale, columns {} and {} of the modulation, overlap", shift.offset, scale.offset)
    })?;
    let windows = tape.get_windows(read);
    check(windows.len() == b && windows.iter().all(|w| w.width > 0 && w.end() <= c), OP, || {
        format!("needs {b} read windows inside 0..{c}, got {windows:?}")
    })?;
    let full = windows.iter().all(|w| w.width == c);

    let mut y = tape.take(b * t * n);
    let mut mean = tape.take(b * t);
    let mut rstd = tape.take(b * t);
    let mut correction = if full { Vec::new() } else { tape.take(b * 2 * n) };
    let keeps_pre = activation == Activation::Gelu && tape.records();
    let mut pre = if keeps_pre { tape.take(b * t * n) } else { Vec::new() };
    let modulation = tape.value(shift.var);
    let modulation = cpu::Modulation {
        data: modulation,
        stride: modulation.len() / b.max(1),
        shift: shift.offset,
        scale: scale.offset,
    };
    cpu::forward(
        &mut y,
        &mut pre,
        &mut mean,
        &mut rstd,
        &mut correction,
        tape.value(x),
        tape.get_windows(read),
        modulation,
        &tape.weights[linear.weight.range()],
        &tape.weights[linear.bias.range()],
        activation,
        cpu::Dims { b, t, c, n },
    );

    let y = tape.push([b, t, n], y, true);
    let mean = tape.push([b, t], mean, false);
    let rstd = tape.push([b, t], rstd, false);
    let correction = (!full).then(|| tape.push([b, 2, n], correction, false));
    let pre = keeps_pre.then(|| tape.push([b, t, n], pre, false));
    tape.record(y, Node::LnLinear(Saved { x, read, shift, scale, linear, mean, rstd, correction, pre }));
    Ok(y)
}

impl Saved {
    pub(crate) fn backward_cuda(self, _tape: &mut Tape, _grad: crate::backend::cuda::Buffer) -> Result<()> {
        Err(crate::Error::usage("ln_linear does not run on CUDA"))
    }

    pub(crate) fn backward(self, tape: &mut Tape, mut dy: Vec<f32>) {
        let &[b, t, c] = tape.shape(self.x) else { unreachable!("checked by the forward pass") };
        let n = self.linear.outputs;
        let (mut dx, fresh_dx) = tape.take_grad(self.x);
        let (mut dmodulation, fresh) = tape.take_grad(self.shift.var);
        if fresh {
            dmodulation.fill(0.0);
        }
        let mut h = tape.take(b * t * c);
        let mut pq = tape.take(b * 2 * n);
        let mut inactive = tape.take(b * 2 * c);
        let (values, grads) = tape.split();
        let modulation = values.value(self.shift.var);
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        cpu::backward(
            cpu::Gradients { dx: &mut dx, fresh_dx, dmodulation: &mut dmodulation, dweight, dbias, add },
            &mut dy,
            cpu::Scratch { h: &mut h, pq: &mut pq, inactive: &mut inactive },
            values.value(self.x),
            values.windows(self.read),
            cpu::Modulation {
                data: modulation,
                stride: modulation.len() / b.max(1),
                shift: self.shift.offset,
                scale: self.scale.offset,
            },
            values.weight(self.linear.weight),
            values.value(self.mean),
            values.value(self.rstd),
            self.correction.map(|v| values.value(v)),
            self.pre.map(|v| values.value(v)),
            cpu::Dims { b, t, c, n },
        );
        tape.put_grad(self.x, dx);
        tape.put_grad(self.shift.var, dmodulation);
        for buffer in [dy, h, pq, inactive] {
            tape.give(buffer);
        }
    }
}
