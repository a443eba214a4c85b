//! Adds the embedding of each sample's class to its timestep embedding.
//!
//! ```text
//! base [B, C], labels [B] in 0..rows, table [rows, C] -> y = base + table[labels]   [B, C]
//! ```
//!
//! The last row of the table is the null class of classifier-free guidance. Backward: `dbase = dy`, and each row of
//! `dtable` gets the sum over the samples of its class.

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::simd::add_assign;
use crate::error::Result;
use crate::ops::{Node, check};
use crate::params::Param;

/// What backward needs.
#[derive(Clone, Copy)]
pub(crate) struct Saved {
    base: Var,   // [B, C]
    labels: Var, // [B], whole numbers
    table: Param,
}

/// `y`, `[B, C]`.
///
/// # Errors
/// When shapes do not fit together or a label is outside the table.
pub fn label_embed(tape: &mut Tape, base: Var, table: Param, labels: &[u32]) -> Result<Var> {
    const OP: &str = "label_embed";
    let shape = tape.shape(base);
    check(shape.len() == 2 && shape[0] == labels.len(), OP, || {
        format!("base is {shape:?}, expected [{}, channels]", labels.len())
    })?;
    let c = shape[1];
    let rows = table.len / c.max(1);
    check(table.len == rows * c && rows < 1 << 24, OP, || format!("a table of {} is not [classes, {c}]", table.len))?;
    if let Some(label) = labels.iter().find(|&&label| label as usize >= rows) {
        let what = format!("label {label} is outside 0..{rows} (the last of these is the null class)");
        return Err(crate::Error::Shape { operation: OP, what });
    }
    let mut y = tape.take(labels.len() * c);
    let mut saved = tape.take(labels.len());
    y.copy_from_slice(tape.value(base));
    for ((y, saved), &label) in y.chunks_exact_mut(c).zip(&mut saved).zip(labels) {
        add_assign(y, &tape.weights[table.range()][label as usize * c..][..c]);
        *saved = label as f32;
    }
    let batch = labels.len();
    let y = tape.push([batch, c], y, true);
    let labels = tape.push([batch], saved, false);
    tape.record(y, Node::LabelEmbed(Saved { base, labels, table }));
    Ok(y)
}

impl Saved {
    pub(crate) fn backward_cuda(self, _tape: &mut Tape, _grad: crate::backend::cuda::Buffer) -> Result<()> {
        Err(crate::Error::usage("label_embed does not run on CUDA"))
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: Vec<f32>) {
        let (values, grads) = tape.split();
        let labels = values.value(self.labels);
        let c = dy.len() / labels.len().max(1);
        if !grads.add {
            grads.of(self.table).fill(0.0);
        }
        for (dy, &label) in dy.chunks_exact(c).zip(labels) {
            add_assign(&mut grads.of(self.table)[label as usize * c..][..c], dy);
        }
        tape.add_grad(self.base, dy);
    }
}
