//! The adaLN modulation of all blocks and the final layer as one product.
//!
//! ```text
//! c [B, C] -> SiLU -> W [M, C], b [M] -> y [B, M]      M = 6 C depth + 2 C
//! ```
//!
//! A block's six columns of C are shift, scale and gate of attention, then of the MLP; the final layer has shift and scale.

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Buffer, DType};
use crate::error::Result;
use crate::ops::cpu::rows::{linear, linear_backward, silu_backward, silu_to};
use crate::ops::cuda::rows::{Dims, Rows};
use crate::ops::{Node, check, check_linear};
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
    check_linear(layer, "modulation")?;
    tape.check_held(c, "modulation")?;
    let shape = tape.shape(c);
    check(shape.len() == 2 && shape[1] == layer.inputs, "modulation", || {
        format!("the condition is {shape:?}, expected [batch, {}]", layer.inputs)
    })?;
    let (b, channels) = (shape[0], shape[1]);
    if tape.on_cuda() {
        let rows = rows(tape.elem());
        let active = tape.take_buffer(b * channels, DType::F32);
        let y = tape.take_buffer(b * layer.outputs, DType::F32);
        let (weight, bias) = (tape.weight_buffer(layer.weight), tape.full_buffer(layer.bias));
        let device = tape.device();
        // SAFETY: memory of this pass, in these sizes, and the parameters of a layer that was checked to have them.
        unsafe {
            rows.silu(&device, active, tape.buffer(c))?;
            rows.forward(&device, y, active, weight, bias, Dims { b, k: channels, n: layer.outputs })?;
        }
        let y = tape.push([b, layer.outputs], y, true);
        let active = tape.push([b, channels], active, false);
        tape.record(y, Node::Modulation(Saved { c, active, linear: layer }));
        return Ok(y);
    }
    let mut active = tape.take(b * channels);
    let mut y = tape.take(b * layer.outputs);
    silu_to(&mut active, tape.value(c));
    linear(&mut y, &active, &tape.weights[layer.weight.range()], &tape.weights[layer.bias.range()]);
    let y = tape.push([b, layer.outputs], y, true);
    let active = tape.push([b, channels], active, false);
    tape.record(y, Node::Modulation(Saved { c, active, linear: layer }));
    Ok(y)
}

/// The kernels of `kernels/modulation.cu`.
fn rows(elem: DType) -> Rows {
    Rows {
        file: "modulation",
        forward: "modulation_fwd",
        silu: "modulation_fwd_silu",
        weight: "modulation_bwd_weight",
        input: "modulation_bwd_input",
        sum_parts: "modulation_bwd_sum_parts",
        elem,
    }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let rows = rows(tape.elem());
        let &[b, k] = tape.shape(self.c) else { unreachable!("checked by the forward pass") };
        let dims = Dims { b, k, n: self.linear.outputs };
        let (dweight, add) = tape.grad_buffer(self.linear.weight);
        let (dbias, _) = tape.grad_buffer(self.linear.bias);
        let (weight, c) = (tape.weight_buffer(self.linear.weight), tape.buffer(self.c));
        let parts = tape.take_buffer(rows.parts_len(&tape.device(), weight, dims), DType::F32);
        let (dc, fresh) = tape.take_grad_buffer(self.c);
        let device = tape.device();
        // SAFETY: memory of this pass: what forward made in these sizes, gradients as long as what they are of, and parts as many as are
        // asked for.
        unsafe {
            rows.backward_weight(&device, dweight, dbias, dy, tape.buffer(self.active), add, dims)?;
            rows.backward_input(&device, dc, parts, dy, weight, c, !fresh, dims)?;
        }
        tape.put_grad_buffer(self.c, dc);
        tape.give_buffer(parts);
        tape.give_buffer(dy);
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let mut dc = tape.take(tape.value(self.c).len());
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        let squares = linear_backward(
            &mut dc,
            dweight,
            dbias,
            add,
            &dy,
            values.value(self.active),
            values.weight(self.linear.weight),
        );
        silu_backward(&mut dc, values.value(self.c));
        tape.note_squares(self.linear.weight, squares);
        tape.add_grad(self.c, dc);
        tape.give(dy);
    }
}
