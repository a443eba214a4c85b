//! `modulation` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::backend::cuda::DType;
use dtr_fused::error::Result;
use dtr_fused::ops::label_embed::label_embed;
use dtr_fused::ops::modulation::{modulation, reference};
use dtr_fused::ops::real::Real;
use dtr_fused::params::{Linear, Param};

struct Case {
    batch: usize,
    channels: usize,
    outputs: usize,
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let &Case { batch, channels: c, outputs: m } = self;
        let mut condition = activation("c", [batch, c]);
        // SiLU on both sides of its minimum and where it is nearly linear.
        condition.data.iter_mut().for_each(|x| *x *= 4.0);
        vec![condition, weight("weight", m * c, c), weight("bias", m, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        modulation(tape, given.var("c"), given.linear("weight", "bias"))
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&inputs[0], &inputs[1], &inputs[2])
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let (dc, dweight, dbias) = reference::backward(&inputs[0], &inputs[1], upstream, self.outputs);
        vec![dc, dweight, dbias]
    }
}

#[test]
fn agrees_with_the_reference() {
    for (batch, channels, outputs) in
        [(1, 1, 1), (1, 60, 37), (7, 60, 130), (3, 1023, 41), (33, 12, 300), (2, 5, 1100), (600, 4, 9)]
    {
        check_operation(&format!("B {batch}, C {channels}, M {outputs}"), &Case { batch, channels, outputs });
    }
}

#[test]
fn on_cuda() {
    for (batch, channels, outputs) in [
        (1, 8, 8),
        (7, 64, 136),
        (33, 16, 304),
        (2, 8, 1104),
        // No whole vectors of one, or of both.
        (3, 13, 37),
        (9, 300, 70),
        (33, 72, 100),
        (5, 20, 16),
        // More samples, inputs and columns than a block has, and less than its last part.
        (1, 264, 136),
        (33, 72, 136),
        (40, 264, 1000),
        (70, 520, 8),
    ] {
        cuda::check_on_cuda(&format!("B {batch}, C {channels}, M {outputs}"), &Case { batch, channels, outputs });
    }
    // Blocks with many turns: one part of dx, and three, the last of which is smaller.
    for multiprocessors in [1, 15] {
        let device = cuda::device().with_multiprocessors(multiprocessors);
        let case = Case { batch: 40, channels: 264, outputs: 1000 };
        cuda::check_on(device, &format!("{multiprocessors} multiprocessors"), &case, DType::Bf16);
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    check_slopes("modulation", &Case { batch: 3, channels: 9, outputs: 11 });
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, c) = (3, 12);
    let layer = any_linear(c, c);
    let mut table = any_param(4 * c);
    table.offset = c * c + c;
    check_used_twice(&activation("c", [b, c]), &numbers(1, c * c + 5 * c), |tape, first, second| {
        let y = modulation(tape, first, layer)?;
        // The same variable again, through another layer and as its own condition.
        let z = modulation(tape, second, layer)?;
        let z = label_embed(tape, z, table, &[0, 3, 1])?;
        blend(tape, y, z)
    });
}

/// An output that depends on both `[B, C]`.
fn blend(tape: &mut Tape, y: Var, z: Var) -> Result<Var> {
    use dtr_fused::ops::PerSample;
    use dtr_fused::ops::linear_residual::{Residual, linear_residual};
    use dtr_fused::routing::Window;
    let &[b, c] = tape.shape(y) else { panic!("two dimensions") };
    let mut stream = tape.input(&numbers(2, b * 4 * c), [b, 4, c], false)?;
    let base_window = tape.windows(vec![Window::all(c); b]);
    for var in [y, z] {
        let residual = Residual { base: stream, base_window, bypass: None };
        stream = linear_residual(tape, stream, any_linear(c, c), PerSample { var, offset: 0 }, residual, base_window)?;
    }
    Ok(stream)
}

#[test]
fn misfits_are_refused() {
    check_refused("modulation", "the condition is [2, 5], expected [batch, 6]", |tape| {
        let c = zeros(tape, [2, 5]);
        modulation(tape, c, any_linear(7, 6))
    });
    check_refused("modulation", "the condition is [2, 1, 6], expected [batch, 6]", |tape| {
        let c = zeros(tape, [2, 1, 6]);
        modulation(tape, c, any_linear(7, 6))
    });
    check_refused("modulation", "at least one input and output", |tape| {
        let c = zeros(tape, [2, 0]);
        modulation(tape, c, any_linear(7, 0))
    });
    check_refused("modulation", "[outputs] side by side", |tape| {
        let (c, layer) = (zeros(tape, [2, 6]), any_linear(7, 6));
        modulation(tape, c, Linear { bias: Param { offset: layer.weight.len - 1, len: 7 }, ..layer })
    });
}
