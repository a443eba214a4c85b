//! `channel_mask` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::channel_mask::{Keep, channel_mask, reference};
use dtr_fused::ops::real::Real;
use dtr_fused::routing::random_masks;

struct Case {
    batch: usize,
    tokens: usize,
    channels: usize,
    base: bool,
    keep: Keep,
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let &Case { batch: b, tokens: t, channels: c, base, .. } = self;
        let mask = random_masks(b, c, 0.6, 1, 0).expect("a share above 0");
        let mut inputs =
            vec![activation("x", [b, t, c]), Input { name: "mask", data: mask, place: Place::Constant([b, c].into()) }];
        inputs.extend(base.then(|| activation("base", [b, t, c])));
        inputs
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        let base = self.base.then(|| given.var("base"));
        channel_mask(tape, base, given.var("x"), given.var("mask"), self.keep)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        // The mask stays 0 and 1 whatever the test does to the last bits of inputs.
        let mask: Vec<R> = cast(&self.inputs()[1].data);
        let base = self.base.then(|| &inputs[2][..]);
        reference::forward(base, &inputs[0], &mask, self.tokens, self.channels, self.keep)
    }

    fn backward<R: Real>(&self, _: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let mask: Vec<R> = cast(&self.inputs()[1].data);
        let dx = reference::forward(None, upstream, &mask, self.tokens, self.channels, self.keep);
        let mut grads = vec![dx, Vec::new()];
        grads.extend(self.base.then(|| upstream.to_vec()));
        grads
    }
}

fn each(mut check: impl FnMut(&str, &Case), shapes: &[[usize; 3]]) {
    for &[batch, tokens, channels] in shapes {
        for base in [false, true] {
            for keep in [Keep::Active, Keep::Inactive] {
                let label = format!("B {batch}, T {tokens}, C {channels}, base {base}, {keep:?}");
                check(&label, &Case { batch, tokens, channels, base, keep });
            }
        }
    }
}

#[test]
fn on_cuda() {
    each(cuda::check_on_cuda, &[[1, 1, 2], [3, 7, 60], [2, 65, 40]]);
}

#[test]
fn agrees_with_the_reference() {
    each(|label, case| check_operation(label, case), &[[1, 1, 2], [3, 7, 60], [20, 16, 60], [2, 65, 1023]]);
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    each(|label, case| check_slopes(label, case), &[[3, 4, 5]]);
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (2, 3, 8);
    for keep in [Keep::Active, Keep::Inactive] {
        // As base and as x; as x twice; as base twice.
        check_used_twice(&activation("x", [b, t, c]), &[], |tape, first, second| {
            let mask = tape.input(&numbers(6, b * c), [b, c], false)?;
            let y = channel_mask(tape, Some(first), second, mask, keep)?;
            let y = channel_mask(tape, Some(y), first, mask, keep)?;
            let z = channel_mask(tape, Some(second), y, mask, keep)?;
            channel_mask(tape, Some(first), z, mask, keep)
        });
    }
}

#[test]
fn misfits_are_refused() {
    let refused = |what: &str, mask: [usize; 2], base: [usize; 3]| {
        check_refused("channel_mask", what, |tape| {
            let (x, mask, base) = (zeros(tape, [2, 3, 4]), zeros(tape, mask), zeros(tape, base));
            channel_mask(tape, Some(base), x, mask, Keep::Active)
        });
    };
    refused("x is [2, 3, 4], mask [2, 5]", [2, 5], [2, 3, 4]);
    refused("x is [2, 3, 4], mask [3, 4]", [3, 4], [2, 3, 4]);
    refused("base Some([2, 4, 4])", [2, 4], [2, 4, 4]);
    check_refused("channel_mask", "got [2, 4], expected [batch, tokens, channels]", |tape| {
        let (x, mask) = (zeros(tape, [2, 4]), zeros(tape, [2, 4]));
        channel_mask(tape, None, x, mask, Keep::Active)
    });
}
