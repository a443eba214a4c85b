//! `patch_embed` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::channel_mask::{Keep, channel_mask};
use dtr_fused::ops::patch_embed::{Dims, patch_embed, reference};
use dtr_fused::ops::real::Real;

struct Case {
    dims: Dims,
    channels: usize,
}

impl Case {
    fn positions(&self) -> Vec<f32> {
        numbers(3, self.dims.tokens() * self.channels)
    }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let (d, c, k) = (self.dims, self.channels, self.dims.patch_len());
        let x = activation("x", [d.batch, d.image_channels, d.height, d.width]);
        vec![x, weight("weight", c * k, k), weight("bias", c, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        patch_embed(tape, given.var("x"), given.linear("weight", "bias"), &self.positions(), self.dims.patch)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&inputs[0], &inputs[1], &inputs[2], &cast::<R>(&self.positions()), self.dims)
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let (dx, dweight, dbias) = reference::backward(&inputs[0], &inputs[1], upstream, self.dims);
        vec![dx, dweight, dbias]
    }
}

fn case(batch: usize, image_channels: usize, height: usize, width: usize, patch: usize, channels: usize) -> Case {
    Case { dims: Dims { batch, image_channels, height, width, patch }, channels }
}

#[test]
fn agrees_with_the_reference() {
    for (b, ic, h, w, p, c) in [
        (1, 1, 1, 1, 1, 1),
        (1, 3, 4, 4, 4, 60),
        (3, 4, 6, 10, 2, 60),
        (2, 1, 9, 3, 3, 33),
        (5, 3, 8, 4, 4, 300),
        (2, 4, 34, 32, 2, 28),
        (1, 2, 5, 7, 1, 1023),
    ] {
        check_operation(&format!("B {b}, IC {ic}, {h} x {w}, patch {p}, C {c}"), &case(b, ic, h, w, p, c));
    }
}

#[test]
fn on_cuda() {
    for (b, ic, h, w, p, c) in
        [(1, 1, 2, 2, 2, 8), (3, 4, 6, 10, 2, 56), (5, 3, 8, 4, 4, 136), (2, 4, 34, 32, 2, 24), (2, 1, 6, 9, 3, 37)]
    {
        cuda::check_on_cuda(&format!("B {b}, IC {ic}, {h} x {w}, patch {p}, C {c}"), &case(b, ic, h, w, p, c));
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    check_slopes("patch_embed", &case(2, 3, 4, 6, 2, 5));
}

#[test]
fn the_gradient_of_images_is_only_made_when_asked_for() {
    let case = case(2, 3, 4, 6, 2, 5);
    let inputs = case.inputs();
    let weights = numbers(1, 5 * 12 + 5);
    let layer = any_linear(5, 12);
    let gradients = |wanted: bool| {
        let (mut grads, mut memory) = (vec![0.0; weights.len()], Memory::new());
        let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
        let x = tape.input(&inputs[0].data, [2, 3, 4, 6], wanted).unwrap();
        let y = patch_embed(&mut tape, x, layer, &case.positions(), 2).unwrap();
        tape.backward(y, &numbers(2, 2 * 6 * 5)).unwrap();
        assert_eq!(tape.gradient(x).is_some(), wanted);
        grads
    };
    assert_eq!(gradients(true), gradients(false));
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (2, 6, 5);
    let weights = numbers(1, c * 12 + c);
    let layer = any_linear(c, 12);
    check_used_twice(&activation("x", [b, 3, 4, 6]), &weights, |tape, first, second| {
        let y = patch_embed(tape, first, layer, &numbers(4, t * c), 2)?;
        let z = patch_embed(tape, second, layer, &numbers(5, t * c), 2)?;
        let mask = tape.input(&numbers(6, b * c), [b, c], false)?;
        channel_mask(tape, Some(y), z, mask, Keep::Active)
    });
}

#[test]
fn misfits_are_refused() {
    let refused = |what: &str, size: [usize; 2], inputs: usize, positions: usize, patch: usize| {
        check_refused("patch_embed", what, |tape| {
            let x = zeros(tape, [2, 3, size[0], size[1]]);
            patch_embed(tape, x, any_linear(5, inputs), &vec![0.0; positions], patch)
        });
    };
    refused("4 x 5 images cannot be cut into patches of 2 x 2", [4, 5], 12, 20, 2);
    refused("5 x 4 images cannot be cut into patches of 2 x 2", [5, 4], 12, 20, 2);
    refused("4 x 4 images cannot be cut into patches of 0 x 0", [4, 4], 12, 20, 0);
    refused("0 x 4 images cannot be cut into patches of 2 x 2", [0, 4], 12, 0, 2);
    refused("a patch has 12 numbers, but the weight is [5, 13]", [4, 4], 13, 20, 2);
    refused("got 21 positions, expected [4, 5]", [4, 4], 12, 21, 2);
    check_refused("patch_embed", "images are [2, 4, 4], expected four dimensions", |tape| {
        let x = zeros(tape, [2, 4, 4]);
        patch_embed(tape, x, any_linear(5, 4), &[0.0; 20], 2)
    });
}
