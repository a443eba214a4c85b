//! Multi-head self-attention over packed queries, keys and values.
//!
//! ```text
//! qkv [B, T, 3C] = q | k | v, each [NH, HS] a token
//! S = q k^T / sqrt(HS)    P = softmax(S)    out = P v    [B, T, C]
//! ```
//!
//! Of P only statistics of each row of S are saved: on the CPU the largest `q k^T` and 1 / the sum of exponentials, on CUDA the
//! log-sum-exp. Backward computes P again, with `D_t = dout_t . out_t` (which is `P_t . dP_t`, and `delta` in code): `dv = P^T dout`,
//! `dS = P (dout v^T - D) / sqrt(HS)`, `dq = dS k`, `dk = dS^T q`.

mod bf16;
pub(crate) mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(target_arch = "x86_64")]
mod sixteen;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cuda::{Buffer, DType};
use crate::error::Result;
use crate::ops::{Node, check, dims3};

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Samples.
    pub b: usize,
    /// Tokens of each.
    pub t: usize,
    /// Channels.
    pub c: usize,
    /// Heads.
    pub heads: usize,
}

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    qkv: Var,        // [B, T, 3C]
    out: Var,        // [B, T, C]
    statistics: Var, // of the rows of S: [B, T, NH, 2]; on CUDA [B, NH, T]
    heads: usize,
}

/// `out`, `[B, T, C]`, of `qkv` `[B, T, 3C]`.
///
/// # Errors
/// When the last dimension of `qkv` is not three times a multiple of `heads`.
pub fn attention(tape: &mut Tape, qkv: Var, heads: usize) -> Result<Var> {
    const OP: &str = "attention";
    let [b, t, c3] = dims3(tape, qkv, OP, "[batch, tokens, 3 x channels]")?;
    check(heads.checked_mul(3).is_some_and(|parts| c3.is_multiple_of(parts)), OP, || {
        format!("{c3} is not 3 x channels of {heads} equal heads")
    })?;
    let c = c3 / 3;
    if tape.on_cuda() {
        let elem = tape.elem();
        let (out, statistics) = (tape.take_buffer(b * t * c, elem), tape.take_buffer(b * t * heads, DType::F32));
        // SAFETY: memory of this pass.
        unsafe { cuda::forward(&tape.device(), out, statistics, tape.buffer(qkv), Dims { b, t, c, heads }) }?;
        let out = tape.push([b, t, c], out, true);
        let statistics = tape.push([b, heads, t], statistics, false);
        tape.record(out, Node::Attention(Saved { qkv, out, statistics, heads }));
        return Ok(out);
    }
    let mut out = tape.take(b * t * c);
    let mut statistics = tape.take(b * t * heads * 2);
    cpu::forward(&mut out, &mut statistics, tape.value(qkv), Dims { b, t, c, heads }, tape.elem());
    let out = tape.push([b, t, c], out, true);
    let statistics = tape.push([b, t, heads, 2], statistics, false);
    tape.record(out, Node::Attention(Saved { qkv, out, statistics, heads }));
    Ok(out)
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dout: Buffer) -> Result<()> {
        let &[b, t, c] = tape.shape(self.out) else { unreachable!("made by the forward pass") };
        let dqkv = tape.take_buffer(b * t * 3 * c, dout.dtype);
        let (qkv, out, statistics) = (tape.buffer(self.qkv), tape.buffer(self.out), tape.buffer(self.statistics));
        let dims = Dims { b, t, c, heads: self.heads };
        // SAFETY: memory of this pass.
        unsafe { cuda::backward(&tape.device(), dqkv, dout, qkv, out, statistics, dims) }?;
        tape.add_grad_buffer(self.qkv, dqkv)?;
        tape.give_buffer(dout);
        Ok(())
    }

    pub(crate) fn backward(self, tape: &mut Tape, dout: AlignedVec) {
        let &[b, t, c] = tape.shape(self.out) else { unreachable!("made by the forward pass") };
        let mut dqkv = tape.take(b * t * 3 * c);
        cpu::backward(
            &mut dqkv,
            &dout,
            tape.value(self.qkv),
            tape.value(self.out),
            tape.value(self.statistics),
            Dims { b, t, c, heads: self.heads },
            tape.elem(),
        );
        tape.add_grad(self.qkv, dqkv);
        tape.give(dout);
    }
}
