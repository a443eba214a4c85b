//! Sinusoidal timestep embedding and its two-layer network.
//!
//! ```text
//! t [B] -> (cos(t f), sin(t f)) [B, 256], f_i = 10000^(-i / 128) -> W0 [C, 256], b0 -> SiLU -> W2 [C, C], b2 -> y [B, C]
//! ```

pub(crate) mod cpu;
pub mod reference;

use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::ops::{Node, check};
use crate::params::Linear;

/// Size of the sinusoidal embedding.
pub const FREQUENCIES: usize = 256;

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    waves: Var,  // [B, 256]
    hidden: Var, // [B, C] before SiLU
    active: Var, // [B, C] after SiLU
    first: Linear,
    second: Linear,
}

/// `y`, `[B, C]`, of the timesteps `t` `[B]`; also the sinusoidal embedding `[B, 256]`.
///
/// # Errors
/// When shapes do not fit together.
pub fn timestep_embed(tape: &mut Tape, t: &[u32], first: Linear, second: Linear) -> Result<(Var, Var)> {
    const OP: &str = "timestep_embed";
    let (b, hidden, c) = (t.len(), first.outputs, second.outputs);
    check(first.inputs == FREQUENCIES && second.inputs == hidden, OP, || {
        format!(
            "weights are [{hidden}, {}] and [{c}, {}], expected [C, {FREQUENCIES}] and [C, C]",
            first.inputs, second.inputs
        )
    })?;
    let mut waves = tape.take(b * FREQUENCIES);
    let mut pre = tape.take(b * hidden);
    let mut active = tape.take(b * hidden);
    let mut y = tape.take(b * c);
    cpu::waves(&mut waves, t);
    cpu::linear(&mut pre, &waves, &tape.weights[first.weight.range()], &tape.weights[first.bias.range()]);
    cpu::silu_to(&mut active, &pre);
    cpu::linear(&mut y, &active, &tape.weights[second.weight.range()], &tape.weights[second.bias.range()]);
    let y = tape.push([b, c], y, true);
    let waves = tape.push([b, FREQUENCIES], waves, false);
    let pre = tape.push([b, hidden], pre, false);
    let active = tape.push([b, hidden], active, false);
    tape.record(y, Node::TimestepEmbed(Saved { waves, hidden: pre, active, first, second }));
    Ok((y, waves))
}

impl Saved {
    pub(crate) fn backward_cuda(self, _tape: &mut Tape, _grad: crate::backend::cuda::Buffer) -> Result<()> {
        Err(crate::Error::usage("timestep_embed does not run on CUDA"))
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: Vec<f32>) {
        let mut dhidden = tape.take(tape.value(self.hidden).len());
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.second);
        cpu::linear_backward(
            &mut dhidden,
            dweight,
            dbias,
            add,
            &dy,
            values.value(self.active),
            values.weight(self.second.weight),
        );
        cpu::silu_backward(&mut dhidden, values.value(self.hidden));
        let (dweight, dbias) = grads.of_linear(self.first);
        cpu::linear_backward(
            &mut [],
            dweight,
            dbias,
            add,
            &dhidden,
            values.value(self.waves),
            values.weight(self.first.weight),
        );
        tape.give(dhidden);
        tape.give(dy);
    }
}
