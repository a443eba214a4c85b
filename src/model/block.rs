//! A DiT block with routing: five fused operations.

use crate::autograd::{Tape, Var, Windows};
use crate::error::Result;
use crate::ops::PerSample;
use crate::ops::attention::attention;
use crate::ops::linear_residual::{Residual, linear_residual};
use crate::ops::ln_linear::{Activation, ln_linear, ln_linear_gelu};
use crate::params::{Layout, Linear};

/// The layers of a block.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    qkv: Linear,  // [3C, C]
    proj: Linear, // [C, C]
    fc1: Linear,  // [H, C], H the MLP size
    fc2: Linear,  // [C, H]
    /// First of the block's six columns of C in the modulation.
    modulation: usize,
    heads: usize,
}

/// Which channels a block reads and writes, one window a sample.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Those of the block's input; the others bypass the block.
    pub active: Windows,
    /// Those that the sublayers write (and the MLP reads): all, or the active ones in sublayer routing.
    pub written: Windows,
}

impl Block {
    /// Adds the layers of block `index` to the layout.
    pub fn new(layout: &mut Layout, index: usize, c: usize, mlp: usize, heads: usize) -> Self {
        let mut linear = |name: &str, n, k| layout.push_linear(&format!("blocks.{index}.{name}"), n, k);
        Block {
            qkv: linear("attn.qkv", 3 * c, c),
            proj: linear("attn.proj", c, c),
            fc1: linear("mlp.fc1", mlp, c),
            fc2: linear("mlp.fc2", c, mlp),
            modulation: index * 6 * c,
            heads,
        }
    }

    /// `x` `[B, T, C]` and `modulation` `[B, M]` -> `[B, T, C]`.
    pub fn forward(&self, tape: &mut Tape, x: Var, modulation: Var, route: Route) -> Result<Var> {
        let c = self.qkv.inputs;
        let [shift1, scale1, gate1, shift2, scale2, gate2] =
            std::array::from_fn(|i| PerSample { var: modulation, offset: self.modulation + i * c });
        let Route { active, written } = route;

        let qkv = ln_linear(tape, x, active, shift1, scale1, self.qkv, Activation::None)?; // [B, T, 3C]
        let a = attention(tape, qkv, self.heads)?; // [B, T, C]
        let stream = Residual { base: x, base_window: active, bypass: None };
        let x1 = linear_residual(tape, a, self.proj, gate1, stream, written)?; // [B, T, C]
        let h = ln_linear_gelu(tape, x1, written, shift2, scale2, self.fc1)?; // [B, T, H]
        let stream = Residual { base: x1, base_window: written, bypass: Some((x, active)) };
        linear_residual(tape, h, self.fc2, gate2, stream, written) // [B, T, C]
    }
}
