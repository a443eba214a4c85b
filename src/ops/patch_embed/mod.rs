//! Cuts images into patches, embeds each, and adds the fixed positions.
//!
//! ```text
//! x [B, IC, H, W] -> patches [B, T, IC p p] -> W [C, IC p p], b [C] -> + positions [T, C] -> y [B, T, C]
//! ```
//!
//! Tokens go row by row over the image. Backward: `dW = dy^T patches`, `db = sum dy`, `dx = dy W` put back in place.

pub(crate) mod cpu;
pub mod reference;

use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::ops::{Node, check};
use crate::params::Linear;

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    x: Var,       // [B, IC, H, W]
    patches: Var, // [B, T, IC p p]
    linear: Linear,
    dims: Dims,
}

/// Sizes of the cut.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// B
    pub batch: usize,
    /// IC
    pub image_channels: usize,
    /// H
    pub height: usize,
    /// W
    pub width: usize,
    /// p
    pub patch: usize,
}

impl Dims {
    /// T
    pub fn tokens(&self) -> usize {
        (self.height / self.patch) * (self.width / self.patch)
    }

    /// IC p p
    pub fn patch_len(&self) -> usize {
        self.image_channels * self.patch * self.patch
    }
}

/// `y`, `[B, T, C]`, of images `x` `[B, IC, H, W]`; `positions` is `[T, C]` and not trained.
///
/// # Errors
/// When shapes do not fit together.
pub fn patch_embed(tape: &mut Tape, x: Var, linear: Linear, positions: &[f32], patch: usize) -> Result<Var> {
    const OP: &str = "patch_embed";
    let shape = tape.shape(x);
    let &[batch, image_channels, height, width] = shape else {
        return Err(crate::Error::Shape {
            operation: OP,
            what: format!("images are {shape:?}, expected four dimensions"),
        });
    };
    check(patch > 0 && height % patch == 0 && width % patch == 0, OP, || {
        format!("{height} x {width} images cannot be cut into patches of {patch} x {patch}")
    })?;
    let dims = Dims { batch, image_channels, height, width, patch };
    let (t, c) = (dims.tokens(), linear.outputs);
    check(linear.inputs == dims.patch_len(), OP, || {
        format!("a patch has {} numbers, but the weight is [{c}, {}]", dims.patch_len(), linear.inputs)
    })?;
    check(positions.len() == t * c, OP, || format!("got {} positions, expected [{t}, {c}]", positions.len()))?;
    let mut patches = tape.take(batch * t * dims.patch_len());
    let mut y = tape.take(batch * t * c);
    let (weight, bias) = (&tape.weights[linear.weight.range()], &tape.weights[linear.bias.range()]);
    cpu::forward(&mut y, &mut patches, tape.value(x), weight, bias, positions, dims);
    let y = tape.push([batch, t, c], y, true);
    let patches = tape.push([batch, t, dims.patch_len()], patches, false);
    tape.record(y, Node::PatchEmbed(Saved { x, patches, linear, dims }));
    Ok(y)
}

impl Saved {
    pub(crate) fn backward_cuda(self, _tape: &mut Tape, _grad: crate::backend::cuda::Buffer) -> Result<()> {
        Err(crate::Error::usage("patch_embed does not run on CUDA"))
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: Vec<f32>) {
        let wants_dx = tape.wants_grad(self.x);
        let mut dx = if wants_dx { tape.take(tape.value(self.x).len()) } else { Vec::new() };
        let mut dpatches = if wants_dx { tape.take(tape.value(self.patches).len()) } else { Vec::new() };
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        cpu::backward(dweight, dbias, add, &dy, values.value(self.patches));
        if wants_dx {
            cpu::image_gradient(&mut dx, &mut dpatches, &dy, values.weight(self.linear.weight), self.dims);
            tape.add_grad(self.x, dx);
            tape.give(dpatches);
        }
        tape.give(dy);
    }
}
