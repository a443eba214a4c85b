//! `label_embed` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::PerSample;
use dtr_fused::ops::label_embed::{label_embed, reference};
use dtr_fused::ops::linear_residual::{Residual, linear_residual};
use dtr_fused::ops::real::Real;
use dtr_fused::routing::Window;

struct Case {
    channels: usize,
    rows: usize,
    labels: Vec<u32>,
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let c = self.channels;
        vec![activation("base", [self.labels.len(), c]), weight("table", self.rows * c, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        label_embed(tape, given.var("base"), given.param("table"), &self.labels)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&inputs[0], &inputs[1], &self.labels)
    }

    fn backward<R: Real>(&self, _: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        vec![upstream.to_vec(), reference::backward(self.rows, &self.labels, upstream)]
    }
}

#[test]
fn agrees_with_the_reference() {
    let same = vec![2; 40];
    let mixed: Vec<u32> = (0..65).map(|i| below(1, i, 11) as u32).collect();
    for (channels, rows, labels) in
        [(1, 1, vec![0]), (60, 11, vec![10]), (60, 11, vec![0, 10, 0, 3, 10]), (28, 4, same), (1023, 11, mixed)]
    {
        check_operation(&format!("C {channels}, labels {labels:?}"), &Case { channels, rows, labels });
    }
}

#[test]
fn on_cuda() {
    for (channels, rows, labels) in [(1, 1, vec![0]), (300, 11, vec![0, 10, 0, 3, 10]), (28, 4, vec![2; 40])] {
        cuda::check_on_cuda(&format!("C {channels}, labels {labels:?}"), &Case { channels, rows, labels });
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    check_slopes("label_embed", &Case { channels: 5, rows: 4, labels: vec![3, 0, 3] });
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, c) = (3, 12);
    let layer = any_linear(c, c);
    check_used_twice(&activation("base", [b, c]), &numbers(1, c * c + c), |tape, first, second| {
        let y = label_embed(tape, first, any_param(4 * c), &[0, 3, 0])?;
        let mut stream = tape.input(&numbers(2, b * 4 * c), [b, 4, c], false)?;
        let base_window = tape.windows(vec![Window::all(c); b]);
        for var in [y, second] {
            let residual = Residual { base: stream, base_window, bypass: None };
            stream = linear_residual(tape, stream, layer, PerSample { var, offset: 0 }, residual, base_window)?;
        }
        Ok(stream)
    });
}

#[test]
fn misfits_are_refused() {
    let refused = |what: &str, rows: usize, c: usize, table: usize, labels: &[u32]| {
        check_refused("label_embed", what, |tape| {
            let base = zeros(tape, [rows, c]);
            label_embed(tape, base, any_param(table), labels)
        });
    };
    refused("base is [2, 5], expected [3, channels]", 2, 5, 20, &[0, 1, 2]);
    refused("a table of 21 is not [classes, 5]", 3, 5, 21, &[0, 1, 2]);
    refused("label 4 is outside 0..4", 3, 5, 20, &[0, 4, 2]);
    refused("label 4294967295 is outside 0..4", 3, 5, 20, &[0, 1, u32::MAX]);
    check_refused("label_embed", "base is [2, 1, 5], expected [2, channels]", |tape| {
        let base = zeros(tape, [2, 1, 5]);
        label_embed(tape, base, any_param(20), &[0, 1])
    });
}
