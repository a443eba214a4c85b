//! Sinusoidal timestep embedding and its two-layer network.
//!
//! ```text
//! t [B] -> (cos(t f), sin(t f)) [B, 256], f_i = 10000^(-i / 128) -> W0 [C, 256], b0 -> SiLU -> W2 [C, C], b2 -> y [B, C]
//! ```

pub(crate) mod cpu;
pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Buffer, DType};
use crate::error::Result;
use crate::ops::cpu::rows;
use crate::ops::cuda::rows::{Dims, Rows};
use crate::ops::{Node, check, check_linear};
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
    [first, second].into_iter().try_for_each(|layer| check_linear(layer, OP))?;
    check(first.inputs == FREQUENCIES && second.inputs == hidden, OP, || {
        format!(
            "weights are [{hidden}, {}] and [{c}, {}], expected [C, {FREQUENCIES}] and [C, C]",
            first.inputs, second.inputs
        )
    })?;
    if tape.on_cuda() {
        let (rows, elem) = (rows(tape.elem()), DType::F32);
        let mut host_waves = vec![0.0; b * FREQUENCIES];
        cpu::waves(&mut host_waves, t);
        let waves = tape.upload(bytemuck::cast_slice(&host_waves), elem);
        let [pre, active, y] = [hidden, hidden, c].map(|width| tape.take_buffer(b * width, elem));
        let [(w0, b0), (w2, b2)] =
            [first, second].map(|layer| (tape.weight_buffer(layer.weight), tape.full_buffer(layer.bias)));
        let device = tape.device();
        // SAFETY: memory of this pass, taken in these sizes, and the parameters of two layers that were checked to have them.
        unsafe {
            rows.forward(&device, pre, waves, w0, b0, Dims { b, k: FREQUENCIES, n: hidden })?;
            rows.silu(&device, active, pre)?;
            rows.forward(&device, y, active, w2, b2, Dims { b, k: hidden, n: c })?;
        }
        let y = tape.push([b, c], y, true);
        let waves = tape.push([b, FREQUENCIES], waves, false);
        let pre = tape.push([b, hidden], pre, false);
        let active = tape.push([b, hidden], active, false);
        tape.record(y, Node::TimestepEmbed(Saved { waves, hidden: pre, active, first, second }));
        return Ok((y, waves));
    }
    let mut waves = tape.take(b * FREQUENCIES);
    let mut pre = tape.take(b * hidden);
    let mut active = tape.take(b * hidden);
    let mut y = tape.take(b * c);
    cpu::waves(&mut waves, t);
    rows::linear(&mut pre, &waves, &tape.weights[first.weight.range()], &tape.weights[first.bias.range()]);
    rows::silu_to(&mut active, &pre);
    rows::linear(&mut y, &active, &tape.weights[second.weight.range()], &tape.weights[second.bias.range()]);
    let y = tape.push([b, c], y, true);
    let waves = tape.push([b, FREQUENCIES], waves, false);
    let pre = tape.push([b, hidden], pre, false);
    let active = tape.push([b, hidden], active, false);
    tape.record(y, Node::TimestepEmbed(Saved { waves, hidden: pre, active, first, second }));
    Ok((y, waves))
}

/// The kernels of `kernels/timestep_embed.cu`.
fn rows(elem: DType) -> Rows {
    Rows {
        file: "timestep_embed",
        forward: "timestep_embed_fwd",
        silu: "timestep_embed_fwd_silu",
        weight: "timestep_embed_bwd_weight",
        input: "timestep_embed_bwd_input",
        sum_parts: "timestep_embed_bwd_sum_parts",
        elem,
    }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let rows = rows(tape.elem());
        let &[b, hidden] = tape.shape(self.hidden) else { unreachable!("made by the forward pass") };
        let dims = Dims { b, k: hidden, n: self.second.outputs };
        let (dweight, add) = tape.grad_buffer(self.second.weight);
        let (dbias, _) = tape.grad_buffer(self.second.bias);
        let (weight, before, active) =
            (tape.weight_buffer(self.second.weight), tape.buffer(self.hidden), tape.buffer(self.active));
        let dhidden = tape.take_buffer(b * hidden, DType::F32);
        let parts = tape.take_buffer(rows.parts_len(&tape.device(), weight, dims), DType::F32);
        let first = Dims { b, k: FREQUENCIES, n: hidden };
        let (first_dweight, first_add) = tape.grad_buffer(self.first.weight);
        let (first_dbias, _) = tape.grad_buffer(self.first.bias);
        let device = tape.device();
        // SAFETY: memory of this pass: what forward made in these sizes, gradients as long as what they are of, and parts as many as are
        // asked for.
        unsafe {
            rows.backward_weight(&device, dweight, dbias, dy, active, add, dims)?;
            rows.backward_input(&device, dhidden, parts, dy, weight, before, false, dims)?;
            let waves = tape.buffer(self.waves);
            rows.backward_weight(&device, first_dweight, first_dbias, dhidden, waves, first_add, first)?;
        }
        for buffer in [dy, dhidden, parts] {
            tape.give_buffer(buffer);
        }
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let mut dhidden = tape.take(tape.value(self.hidden).len());
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.second);
        let of_second = rows::linear_backward(
            &mut dhidden,
            dweight,
            dbias,
            add,
            &dy,
            values.value(self.active),
            values.weight(self.second.weight),
        );
        rows::silu_backward(&mut dhidden, values.value(self.hidden));
        let (dweight, dbias) = grads.of_linear(self.first);
        let of_first = rows::linear_backward(
            &mut [],
            dweight,
            dbias,
            add,
            &dhidden,
            values.value(self.waves),
            values.weight(self.first.weight),
        );
        tape.note_squares(self.second.weight, of_second);
        tape.note_squares(self.first.weight, of_first);
        tape.give(dhidden);
        tape.give(dy);
    }
}
