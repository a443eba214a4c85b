//! Keeps some channels of the residual stream: what random routing needs around a dense block.
//!
//! ```text
//! x [B, T, C], mask [B, C] of 0 and 1 -> y = base + mask x          (Keep::Active)
//!                                        y = base + (1 - mask) x    (Keep::Inactive)
//! ```

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Arg, Buffer, Launch};
use crate::error::Result;
use crate::ops::cuda::tile::check_counts;
use crate::ops::{Node, check, dims3};
use rayon::prelude::*;

/// Which channels are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those where the mask is 1.
    Active,
    /// Those where the mask is 0.
    Inactive,
}

impl Keep {
    /// The factor of a channel.
    fn factor(self, mask: f32) -> f32 {
        match self {
            Keep::Active => mask,
            Keep::Inactive => 1.0 - mask,
        }
    }
}

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    base: Option<Var>, // [B, T, C]
    x: Var,            // [B, T, C]
    mask: Var,         // [B, C]
    keep: Keep,
}

/// `y`, `[B, T, C]`; without a `base` it is 0. The mask has no gradient.
///
/// # Errors
/// When shapes do not fit together.
pub fn channel_mask(tape: &mut Tape, base: Option<Var>, x: Var, mask: Var, keep: Keep) -> Result<Var> {
    const OP: &str = "channel_mask";
    let [b, t, c] = dims3(tape, x, OP, "[batch, tokens, channels]")?;
    [Some(mask), base].into_iter().flatten().try_for_each(|var| tape.check_held(var, OP))?;
    let base_shape = base.map(|base| tape.shape(base));
    check(tape.shape(mask) == [b, c] && base_shape.is_none_or(|s| s == [b, t, c]), OP, || {
        format!("x is {:?}, mask {:?}, base {base_shape:?}", [b, t, c], tape.shape(mask))
    })?;
    if tape.on_cuda() {
        let y = tape.take_buffer(b * t * c, tape.elem());
        let base_buffer = base.map_or(Buffer::none(tape.elem()), |base| tape.buffer(base));
        check_counts(OP, &[b * t, c])?;
        // SAFETY: memory of this pass; x, base and mask were checked to have these sizes.
        unsafe { launch(tape, y, base_buffer, tape.buffer(x), tape.buffer(mask), keep, [b, t, c]) }?;
        let y = tape.push([b, t, c], y, true);
        tape.record(y, Node::ChannelMask(Saved { base, x, mask, keep }));
        return Ok(y);
    }
    let mut y = tape.take(b * t * c);
    write_kept(&mut y, base.map(|base| tape.value(base)), tape.value(x), tape.value(mask), [t, c], keep);
    let y = tape.push([b, t, c], y, true);
    tape.record(y, Node::ChannelMask(Saved { base, x, mask, keep }));
    Ok(y)
}

/// Threads of a block of the CUDA kernel, which takes a row.
const THREADS: u32 = 128;

/// `y = base + kept channels of x` on a CUDA device.
///
/// # Safety
/// The buffers are as [`Buffer`] says, `[B, T, C]` and the mask `[B, C]`, in sizes that fit an `int`; base may be left out, or be y.
unsafe fn launch(
    tape: &Tape,
    y: Buffer,
    base: Buffer,
    x: Buffer,
    mask: Buffer,
    keep: Keep,
    [b, t, c]: [usize; 3],
) -> Result<()> {
    let grid = [(b * t) as u32, 1, 1];
    let kernel = "channel_mask_fwd";
    let launch = Launch { file: "channel_mask", kernel, elem: y.dtype, defines: &[], grid, block: THREADS, shared: 0 };
    let sizes = [usize::from(keep == Keep::Inactive), t, c].map(|size| Arg::I32(size as i32));
    // SAFETY: the sizes are those of the buffers, as the caller answers for; each row has a block.
    unsafe { tape.device().launch(&launch, &[&[y.into(), base.into(), x.into(), mask.into()], &sizes[..]].concat()) }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let &[b, t, c] = tape.shape(self.x) else { unreachable!("checked by the forward pass") };
        let (dx, fresh) = tape.take_grad_buffer(self.x);
        let start = if fresh { Buffer::none(dx.dtype) } else { dx };
        // SAFETY: memory of this pass: gradients are as long as what they are of, which forward checked.
        unsafe { launch(tape, dx, start, dy, tape.buffer(self.mask), self.keep, [b, t, c]) }?;
        tape.put_grad_buffer(self.x, dx);
        match self.base {
            Some(base) => tape.add_grad_buffer(base, dy),
            None => {
                tape.give_buffer(dy);
                Ok(())
            }
        }
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let &[_, t, c] = tape.shape(self.x) else { unreachable!("checked by the forward pass") };
        let (mut dx, fresh) = tape.take_grad(self.x);
        match fresh {
            true => write_kept(&mut dx, None, &dy, tape.value(self.mask), [t, c], self.keep),
            false => add_kept(&mut dx, &dy, tape.value(self.mask), [t, c], self.keep),
        }
        tape.put_grad(self.x, dx);
        match self.base {
            Some(base) => tape.add_grad(base, dy),
            None => tape.give(dy),
        }
    }
}

/// Rows that a thread computes at a time.
const ROWS: usize = 64;

/// `y = base + kept channels of x`.
fn write_kept(y: &mut [f32], base: Option<&[f32]>, x: &[f32], mask: &[f32], [t, c]: [usize; 2], keep: Keep) {
    y.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).enumerate().for_each(|(block, (y, x))| {
        for (i, (y, x)) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            let row = block * ROWS + i;
            let mask = &mask[row / t * c..][..c];
            match base {
                Some(base) => {
                    let base = &base[row * c..][..c];
                    (0..c).for_each(|j| y[j] = base[j] + keep.factor(mask[j]) * x[j]);
                }
                // The sum makes 0 of -0, as that with a base of zeros.
                None => (0..c).for_each(|j| y[j] = 0.0 + keep.factor(mask[j]) * x[j]),
            }
        }
    });
}

/// `y += kept channels of x`.
fn add_kept(y: &mut [f32], x: &[f32], mask: &[f32], [t, c]: [usize; 2], keep: Keep) {
    y.par_chunks_mut(ROWS * c).zip(x.par_chunks(ROWS * c)).enumerate().for_each(|(block, (y, x))| {
        for (i, (y, x)) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            let mask = &mask[(block * ROWS + i) / t * c..][..c];
            (0..c).for_each(|j| y[j] += keep.factor(mask[j]) * x[j]);
        }
    });
}
