//! Puts the patches of the final layer back together.
//!
//! ```text
//! x [B, T, p p OC] (row, column, channel inside a patch) -> y [B, OC, H, W]
//! ```
//!
//! Backward is the same walk the other way.

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Arg, Buffer, DType, Launch};
use crate::error::Result;
use crate::ops::cuda::tile::check_counts;
use crate::ops::{Node, check, dims3};

const OP: &str = "unpatchify";

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    x: Var, // [B, T, p p OC]
    channels: usize,
    size: [usize; 2], // height, width
    patch: usize,
}

/// `y`, `[B, channels, height, width]`.
///
/// # Errors
/// When the patches are not those of an image of this size.
pub fn unpatchify(tape: &mut Tape, x: Var, channels: usize, height: usize, width: usize, patch: usize) -> Result<Var> {
    let [b, t, k] = dims3(tape, x, OP, "[batch, tokens, patch x patch x channels]")?;
    let divides = patch > 0 && height.is_multiple_of(patch) && width.is_multiple_of(patch);
    let product = |sizes: [usize; 3]| sizes.into_iter().try_fold(1, |len: usize, size| len.checked_mul(size));
    let fits = |of_image, of_patch| Some(t) == product(of_image) && Some(k) == product(of_patch);
    check(divides && fits([height / patch, width / patch, 1], [patch, patch, channels]), OP, || {
        format!("{t} patches of {k} do not make {channels} x {height} x {width} images of patch {patch}")
    })?;
    if tape.on_cuda() {
        let y = tape.take_buffer(b * t * k, DType::F32);
        check_counts(OP, &[b * t * k / channels, channels, height, width])?;
        // SAFETY: memory of this pass, `[B, T, p p OC]` as checked above.
        unsafe { launch(tape, "unpatchify_fwd", [y, tape.buffer(x)], channels, [height, width], patch) }?;
        let y = tape.push([b, channels, height, width], y, true);
        tape.record(y, Node::Unpatchify(Saved { x, channels, size: [height, width], patch }));
        return Ok(y);
    }
    let mut y = tape.take(b * t * k);
    let from = tape.value(x);
    each_pair(b, channels, [height, width], patch, |token, pixel| y[pixel] = from[token]);
    let y = tape.push([b, channels, height, width], y, true);
    tape.record(y, Node::Unpatchify(Saved { x, channels, size: [height, width], patch }));
    Ok(y)
}

/// From patches to images, or back.
///
/// # Safety
/// Both buffers are as [`Buffer`] says, of one length, and hold images of this size in whole patches; their sizes fit an `int`.
unsafe fn launch(
    tape: &Tape,
    kernel: &'static str,
    [to, from]: [Buffer; 2],
    channels: usize,
    [height, width]: [usize; 2],
    patch: usize,
) -> Result<()> {
    let pixels = to.len / channels;
    let grid = [pixels.div_ceil(256) as u32, 1, 1];
    let launch = Launch { file: "unpatchify", kernel, elem: tape.elem(), defines: &[], grid, block: 256, shared: 0 };
    let [oc, h, w, p] = [channels, height, width, patch].map(|size| Arg::I32(size as i32));
    // SAFETY: the sizes are those of the buffers, as the caller answers for; each pixel has a thread.
    unsafe { tape.device().launch(&launch, &[to.into(), from.into(), oc, h, w, p, Arg::U32(pixels as u32)]) }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let dx = tape.take_buffer(dy.len, tape.elem());
        // SAFETY: memory of this pass, as long as what forward checked.
        unsafe { launch(tape, "unpatchify_bwd", [dx, dy], self.channels, self.size, self.patch) }?;
        tape.add_grad_buffer(self.x, dx)?;
        tape.give_buffer(dy);
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let b = tape.shape(self.x)[0];
        let mut dx = tape.take(dy.len());
        each_pair(b, self.channels, self.size, self.patch, |token, pixel| dx[token] = dy[pixel]);
        tape.add_grad(self.x, dx);
        tape.give(dy);
    }
}

/// Calls `pair` with every place in the patches and its place in the images.
fn each_pair(b: usize, channels: usize, size: [usize; 2], p: usize, mut pair: impl FnMut(usize, usize)) {
    let [height, width] = size;
    let mut token = 0;
    for b in 0..b {
        for row in (0..height).step_by(p) {
            for column in (0..width).step_by(p) {
                for i in 0..p {
                    for j in 0..p {
                        for channel in 0..channels {
                            pair(token, ((b * channels + channel) * height + row + i) * width + column + j);
                            token += 1;
                        }
                    }
                }
            }
        }
    }
}
