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
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Arg, Buffer, DType, Launch};
use crate::error::Result;
use crate::ops::cuda::tile::check_counts;
use crate::ops::{Node, check, check_linear};
use crate::params::Linear;

const OP: &str = "patch_embed";

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
    tape.check_held(x, OP)?;
    let shape = tape.shape(x);
    let &[batch, image_channels, height, width] = shape else {
        return Err(crate::Error::Shape {
            operation: OP,
            what: format!("images are {shape:?}, expected four dimensions"),
        });
    };
    let whole = |side: usize| side > 0 && side.is_multiple_of(patch);
    check(patch > 0 && image_channels > 0 && whole(height) && whole(width), OP, || {
        format!("{image_channels} x {height} x {width} images cannot be cut into patches of {patch} x {patch}")
    })?;
    check_linear(linear, OP)?;
    let dims = Dims { batch, image_channels, height, width, patch };
    let (t, c) = (dims.tokens(), linear.outputs);
    check(linear.inputs == dims.patch_len(), OP, || {
        format!("a patch has {} numbers, but the weight is [{c}, {}]", dims.patch_len(), linear.inputs)
    })?;
    check(positions.len() == t * c, OP, || format!("got {} positions, expected [{t}, {c}]", positions.len()))?;
    if tape.on_cuda() {
        return on_cuda(tape, x, linear, positions, dims);
    }
    let mut patches = tape.take(batch * t * dims.patch_len());
    let mut y = tape.take(batch * t * c);
    let (weight, bias) = (&tape.weights[linear.weight.range()], &tape.weights[linear.bias.range()]);
    cpu::forward(&mut y, &mut patches, tape.value(x), weight, bias, positions, dims);
    let y = tape.push([batch, t, c], y, true);
    let patches = tape.push([batch, t, dims.patch_len()], patches, false);
    tape.record(y, Node::PatchEmbed(Saved { x, patches, linear, dims }));
    Ok(y)
}

// As in kernels/patch_embed.cu.
/// Channels of a block.
const CHANNELS: usize = 128;
/// Elements of a patch that a block of the gradient's sums takes.
const K_PART: usize = 16;
/// Tokens of a block, forward.
const ROWS: usize = 64;
/// Tokens whose gradients a block adds up.
const PART_ROWS: usize = 128;

/// Launches a kernel on the tape's device.
///
/// # Safety
/// As of [`Device::launch`](crate::backend::cuda::Device::launch); blocks have 256 threads.
unsafe fn launch(tape: &Tape, kernel: &'static str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
    let grid = grid.map(|blocks| blocks as u32);
    let launch = Launch { file: "patch_embed", kernel, elem: tape.elem(), defines: &[], grid, block: 256, shared: 0 };
    // SAFETY: the contract is the same.
    unsafe { tape.device().launch(&launch, args) }
}

/// [`patch_embed`] on a CUDA device.
fn on_cuda(tape: &mut Tape, x: Var, linear: Linear, positions: &[f32], dims: Dims) -> Result<Var> {
    let elem = tape.elem();
    let (batch, t, c, k) = (dims.batch, dims.tokens(), linear.outputs, dims.patch_len());
    check_counts(OP, &[batch * t, (k + 1) * c, dims.height, dims.width])?;
    let patches = tape.take_buffer(batch * t * k, DType::F32);
    let y = tape.take_buffer(batch * t * c, elem);
    let positions = tape.upload(bytemuck::cast_slice(positions), DType::F32);
    let Dims { image_channels, height, width, patch, .. } = dims;
    let sizes = [batch * t, image_channels, height, width, patch].map(|size| Arg::I32(size as i32));
    let args = [&[patches.into(), tape.buffer(x).into()], &sizes[..]].concat();
    // SAFETY: memory of this pass; the images were checked to be `[B, IC, H, W]`, which are whole patches.
    unsafe { launch(tape, "patch_embed_fwd_cut", [(batch * t * k).div_ceil(256), 1, 1], &args) }?;
    let (weight, bias) = (tape.weight_buffer(linear.weight), tape.full_buffer(linear.bias));
    let sizes = [batch, t, c, k].map(|size| Arg::I32(size as i32));
    let args = [&[y.into(), patches.into(), weight.into(), bias.into(), positions.into()], &sizes[..]].concat();
    let grid = [c.div_ceil(CHANNELS), (batch * t).div_ceil(ROWS), 1];
    // SAFETY: memory of this pass and weights `[C, k]`, `[C]`, in these sizes; the positions were checked to be `[T, C]`.
    unsafe { launch(tape, "patch_embed_fwd", grid, &args) }?;
    let y = tape.push([batch, t, c], y, true);
    let patches = tape.push([batch, t, k], patches, false);
    tape.record(y, Node::PatchEmbed(Saved { x, patches, linear, dims }));
    Ok(y)
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let (c, k, rows) = (self.linear.outputs, self.dims.patch_len(), self.dims.batch * self.dims.tokens());
        let count = rows.div_ceil(PART_ROWS);
        let parts = tape.take_buffer(count * (k + 1) * c, DType::F32);
        let [rows32, c32, k32, count32] = [rows, c, k, count].map(|size| Arg::I32(size as i32));
        let blocks = [c.div_ceil(CHANNELS), count, k.div_ceil(K_PART)];
        let args = [parts.into(), dy.into(), tape.buffer(self.patches).into(), rows32, c32, k32];
        // SAFETY: dy is `[B T, C]` as y, the patches are those of forward, and there is a part for every PART_ROWS rows.
        unsafe { launch(tape, "patch_embed_bwd_parts", blocks, &args) }?;
        let (dweight, add) = tape.grad_buffer(self.linear.weight);
        let (dbias, _) = tape.grad_buffer(self.linear.bias);
        let add = Arg::I32(i32::from(add));
        let args = [dweight.into(), dbias.into(), parts.into(), count32, add, c32, k32];
        // SAFETY: the gradients are as long as weight and bias, and all parts were taken above.
        unsafe { launch(tape, "patch_embed_bwd_weight", [((k + 1) * c).div_ceil(256), 1, 1], &args) }?;
        if tape.wants_grad(self.x) {
            let (dx, fresh) = tape.take_grad_buffer(self.x);
            let Dims { image_channels, height, width, patch, .. } = self.dims;
            let [ic, h, w, p] = [image_channels, height, width, patch].map(|size| Arg::I32(size as i32));
            let weight = tape.weight_buffer(self.linear.weight);
            let add = Arg::I32(i32::from(!fresh));
            let args = [dx.into(), dy.into(), weight.into(), add, rows32, c32, ic, h, w, p];
            // SAFETY: dx is as long as the images, whose sizes forward checked.
            unsafe { launch(tape, "patch_embed_bwd_input", [(rows * k).div_ceil(8), 1, 1], &args) }?;
            tape.put_grad_buffer(self.x, dx);
        }
        tape.give_buffer(parts);
        tape.give_buffer(dy);
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let wants_dx = tape.wants_grad(self.x);
        let mut dx = if wants_dx { tape.take(tape.value(self.x).len()) } else { AlignedVec::new() };
        let mut dpatches = if wants_dx { tape.take(tape.value(self.patches).len()) } else { AlignedVec::new() };
        let (values, grads) = tape.split();
        let add = grads.add;
        let (dweight, dbias) = grads.of_linear(self.linear);
        let squares = cpu::backward(dweight, dbias, add, &dy, values.value(self.patches));
        if wants_dx {
            cpu::image_gradient(&mut dx, &mut dpatches, &dy, values.weight(self.linear.weight), self.dims);
            tape.add_grad(self.x, dx);
            tape.give(dpatches);
        }
        tape.note_squares(self.linear.weight, squares);
        tape.give(dy);
    }
}
