//! The operations of a diffusion transformer: one folder each, forward and backward.
//!
//! ```text
//! x/mod.rs        formula, shapes, what is saved, and the entry on the tape
//! x/reference.rs  plain loops, generic over f32 and f64: the specification
//! x/cpu.rs        the fast version, proven against it in tests/x.rs (in mod.rs where it is a few lines)
//! x/cuda.rs       the launches of kernels/x.cu, proven there too (in mod.rs where they are a few lines)
//!
//! cpu/, cuda/     what several operations share
//! real.rs         the numbers that the references are generic over
//! ```
//!
//! Letters for sizes: `B` samples, `T` tokens a sample, `C` channels, `NH` heads, `HS = C / NH` head size, `N` outputs.

pub mod attention;
pub mod channel_mask;
pub(crate) mod cpu;
pub mod cuda;
pub mod label_embed;
pub mod linear_residual;
pub mod ln_linear;
pub mod modulation;
pub mod patch_embed;
pub mod real;
pub mod timestep_embed;
pub mod unpatchify;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::Buffer;
use crate::error::{Error, Result};
use crate::params::Linear;

/// One vector a sample: columns `offset..offset + C` of an activation `[B, M]`, such as the shift of one LayerNorm in the
/// output of [`modulation`].
#[derive(Clone, Copy, Debug)]
pub struct PerSample {
    /// The activation `[B, M]`.
    pub var: Var,
    /// First column.
    pub offset: usize,
}

/// What an operation saved for its backward pass.
#[derive(Clone, Copy)]
pub(crate) enum Node {
    Attention(attention::Saved),
    ChannelMask(channel_mask::Saved),
    LabelEmbed(label_embed::Saved),
    LinearResidual(linear_residual::Saved),
    LnLinear(ln_linear::Saved),
    Modulation(modulation::Saved),
    PatchEmbed(patch_embed::Saved),
    TimestepEmbed(timestep_embed::Saved),
    Unpatchify(unpatchify::Saved),
}

impl Node {
    /// Adds the gradients of the operation's inputs, given that of its output.
    pub(crate) fn backward(self, tape: &mut Tape, grad: AlignedVec) {
        match self {
            Node::Attention(saved) => saved.backward(tape, grad),
            Node::ChannelMask(saved) => saved.backward(tape, grad),
            Node::LabelEmbed(saved) => saved.backward(tape, grad),
            Node::LinearResidual(saved) => saved.backward(tape, grad),
            Node::LnLinear(saved) => saved.backward(tape, grad),
            Node::Modulation(saved) => saved.backward(tape, grad),
            Node::PatchEmbed(saved) => saved.backward(tape, grad),
            Node::TimestepEmbed(saved) => saved.backward(tape, grad),
            Node::Unpatchify(saved) => saved.backward(tape, grad),
        }
    }

    /// The same on a CUDA device.
    pub(crate) fn backward_cuda(self, tape: &mut Tape, grad: Buffer) -> Result<()> {
        match self {
            Node::Attention(saved) => saved.backward_cuda(tape, grad),
            Node::ChannelMask(saved) => saved.backward_cuda(tape, grad),
            Node::LabelEmbed(saved) => saved.backward_cuda(tape, grad),
            Node::LinearResidual(saved) => saved.backward_cuda(tape, grad),
            Node::LnLinear(saved) => saved.backward_cuda(tape, grad),
            Node::Modulation(saved) => saved.backward_cuda(tape, grad),
            Node::PatchEmbed(saved) => saved.backward_cuda(tape, grad),
            Node::TimestepEmbed(saved) => saved.backward_cuda(tape, grad),
            Node::Unpatchify(saved) => saved.backward_cuda(tape, grad),
        }
    }
}

/// Refuses operands that do not fit.
pub(crate) fn check(fits: bool, operation: &'static str, what: impl FnOnce() -> String) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::Shape { operation, what: what() }) }
}

/// Refuses a layer whose parameters have not its sizes or overlap, or that has no inputs or outputs.
pub(crate) fn check_linear(linear: Linear, operation: &'static str) -> Result<()> {
    let Linear { weight, bias, inputs, outputs } = linear;
    let apart = weight.range().end <= bias.offset || bias.range().end <= weight.offset;
    let sizes = Some(weight.len) == inputs.checked_mul(outputs) && bias.len == outputs;
    let fits = inputs > 0 && outputs > 0 && sizes && apart;
    check(fits, operation, || {
        let (weights, biases) = (weight.len, bias.len);
        format!(
            "a layer of {inputs} inputs and {outputs} outputs has {weights} weights and {biases} biases, expected [outputs, inputs] and \
             [outputs] side by side, and at least one input and output"
        )
    })
}

/// The sizes of an activation that must have three dimensions and hold something.
pub(crate) fn dims3(tape: &Tape, var: Var, operation: &'static str, expected: &str) -> Result<[usize; 3]> {
    tape.check_held(var, operation)?;
    let shape = tape.shape(var);
    let fits = shape.len() == 3 && !shape.contains(&0);
    check(fits, operation, || format!("got {shape:?}, expected {expected}, where no size may be 0"))?;
    Ok([shape[0], shape[1], shape[2]])
}

/// Refuses vectors that are not columns of a `[B, M]` activation.
pub(crate) fn check_per_sample(
    tape: &Tape,
    vector: PerSample,
    batch: usize,
    channels: usize,
    operation: &'static str,
) -> Result<()> {
    tape.check_held(vector.var, operation)?;
    let shape = tape.shape(vector.var);
    let end = vector.offset.saturating_add(channels);
    check(shape.len() == 2 && shape[0] == batch && end <= shape[1], operation, || {
        format!("modulation has the shape {shape:?}, expected [{batch}, at least {end}]")
    })
}
