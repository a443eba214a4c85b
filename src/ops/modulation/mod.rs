//! The adaLN modulation of all blocks and the final layer as one product.
//!
//! ```text
//! c [B, C] -> SiLU -> W [M, C], b [M] -> y [B, M]      M = 6 C depth + 2 C
//! ```
//!
//! A block's six columns of C are shift, scale and gate of attention, then of the MLP; the final layer has shift and scale.

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::ops::timestep_embed::cpu::{linear, linear_backward, silu_backward, silu_to};
use crate::ops::{Node, check};
use crate::params::Linear;

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    c: Var,      // [B, C]
    active: Var, // [B, C] after SiLU
    linear: Linear,
}

/// `y`, `[B, M]`, of the condition `c` `[B, C]`.
///
/// # Errors
/// When shapes do not fit together.
pub fn modulation(tape: &mut Tape, c: Var, layer: Linear) -> Result<Var> {
    let shape = tape.shape(c);
    check(shape.len() == 2 && shape[1] == layer.inputs, "modulation", || {
        format!("the condition is {shape:?}, expected [batch, {}]", layer.inputs)
    })?;
    let (b, channels) = (shape[0], shape[1]);
    let mut active = tape.take(b * channels);
    let mut y = tape.take(b * layer.outputs);
    silu_to(&mut active, tape.value(c));
    linear(&mut y, &active, &tape.weights[layer.weight.range()], &tape.weights[layer.bias.range()]);
    let y = tape.push([b, layer.outputs], y, true);
    let active = tape.push([b, channels], active, false);
    tape.record(y, Node::Modulation(Saved { c, active, linear: layer }));
    Ok(y)
}

impl Saved {
    pub(crate) fn backward_cuda(self, _tape: &mut Tape, _grad: crate::backend::cuda::Buffer) -> Result<()> {
        Err(crate::Error::usage("modulation does not run on CUDA"))
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: Vec<f32>) {
        let mut dc = tape.take(tape.value(self.c).len());
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        linear_backward(
            &mut dc,
            dweight,
            dbias,
            add,
            &dy,
            values.value(self.active),
            values.weight(self.linear.weight),
        );
        silu_backward(&mut dc, values.value(self.c));
        tape.add_grad(self.c, dc);
        tape.give(dy);
    }
}
