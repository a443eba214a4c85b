//! `unpatchify` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::channel_mask::{Keep, channel_mask};
use dtr_fused::ops::patch_embed::patch_embed;
use dtr_fused::ops::real::Real;
use dtr_fused::ops::unpatchify::{reference, unpatchify};

struct Case {
    batch: usize,
    channels: usize,
    height: usize,
    width: usize,
    patch: usize,
}

impl Case {
    fn tokens(&self) -> usize {
        (self.height / self.patch) * (self.width / self.patch)
    }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        vec![activation("x", [self.batch, self.tokens(), self.patch * self.patch * self.channels])]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        unpatchify(tape, given.var("x"), self.channels, self.height, self.width, self.patch)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&inputs[0], self.batch, self.channels, self.height, self.width, self.patch)
    }

    /// The transpose of a permutation: element i of the gradient is the upstream gradient where element i of x went.
    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let places: Vec<usize> = (0..inputs[0].len()).collect();
        let from = reference::forward(&places, self.batch, self.channels, self.height, self.width, self.patch);
        let mut dx = vec![R::zero(); inputs[0].len()];
        for (&from, &d) in from.iter().zip(upstream) {
            dx[from] += d;
        }
        vec![dx]
    }
}

#[test]
fn agrees_with_the_reference() {
    for (batch, channels, height, width, patch) in
        [(1, 1, 1, 1, 1), (1, 8, 4, 4, 4), (3, 6, 6, 10, 2), (2, 3, 9, 3, 3), (2, 2, 5, 7, 1)]
    {
        let label = format!("B {batch}, OC {channels}, {height} x {width}, patch {patch}");
        check_operation(&label, &Case { batch, channels, height, width, patch });
    }
}

#[test]
fn on_cuda() {
    for (batch, channels, height, width, patch) in [(1, 8, 4, 4, 4), (3, 6, 6, 10, 2), (2, 2, 5, 7, 1)] {
        let label = format!("B {batch}, OC {channels}, {height} x {width}, patch {patch}");
        cuda::check_on_cuda(&label, &Case { batch, channels, height, width, patch });
    }
}

#[test]
fn every_patch_lands_in_its_corner() {
    // Two channels, 2 x 4 images, patches of 2: the second patch's second row, first column, second channel.
    let case = Case { batch: 1, channels: 2, height: 2, width: 4, patch: 2 };
    let x: Vec<f64> = (0..16).map(f64::from).collect();
    let y = case.forward(&[x]);
    assert_eq!(y, [0.0, 2.0, 8.0, 10.0, 4.0, 6.0, 12.0, 14.0, 1.0, 3.0, 9.0, 11.0, 5.0, 7.0, 13.0, 15.0]);
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    check_slopes("unpatchify", &Case { batch: 2, channels: 3, height: 4, width: 6, patch: 2 });
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (2, 6, 12);
    let weights = numbers(1, c * c + c);
    let layer = any_linear(c, c);
    check_used_twice(&activation("x", [b, t, c]), &weights, |tape, first, second| {
        let images = unpatchify(tape, first, 3, 4, 6, 2)?;
        let y = patch_embed(tape, images, layer, &numbers(4, t * c), 2)?;
        let mask = tape.input(&numbers(6, b * c), [b, c], false)?;
        channel_mask(tape, Some(y), second, mask, Keep::Active)
    });
}

#[test]
fn misfits_are_refused() {
    let refused = |what: &str, tokens: usize, k: usize, size: [usize; 2], patch: usize| {
        check_refused("unpatchify", what, |tape| {
            let x = zeros(tape, [2, tokens, k]);
            unpatchify(tape, x, 3, size[0], size[1], patch)
        });
    };
    refused("5 patches of 12 do not make 3 x 4 x 6 images of patch 2", 5, 12, [4, 6], 2);
    refused("6 patches of 13 do not make 3 x 4 x 6 images of patch 2", 6, 13, [4, 6], 2);
    refused("6 patches of 12 do not make 3 x 4 x 6 images of patch 0", 6, 12, [4, 6], 0);
    refused("6 patches of 12 do not make 3 x 4 x 7 images of patch 2", 6, 12, [4, 7], 2);
    // The square of its side would wrap around to 1.
    let side = (1 << 63) + 1;
    refused("images of patch 9223372036854775809", 1, 3, [side, side], side);
    refused("6 patches of 12 do not make 3 x 5 x 6 images of patch 2", 6, 12, [5, 6], 2);
    check_refused("unpatchify", "got [6, 12], expected [batch, tokens, patch x patch x channels]", |tape| {
        let x = zeros(tape, [6, 12]);
        unpatchify(tape, x, 3, 4, 6, 2)
    });
}
