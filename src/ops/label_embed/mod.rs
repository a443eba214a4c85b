//! Adds the embedding of each sample's class to its timestep embedding.
//!
//! ```text
//! base [B, C], labels [B] in 0..rows, table [rows, C] -> y = base + table[labels]   [B, C]
//! ```
//!
//! The last row of the table is the null class of classifier-free guidance, of models that have one. Backward: `dbase = dy`, and each
//! row of `dtable` gets the sum over the samples of its class.

pub mod reference;

use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cuda::{Arg, Buffer, DType, Launch};
use crate::error::Result;
use crate::ops::cuda::tile::check_counts;
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
    tape.check_held(base, OP)?;
    let shape = tape.shape(base);
    check(shape.len() == 2 && shape[0] == labels.len() && !shape.contains(&0), OP, || {
        format!("base is {shape:?}, expected [{}, channels], where no size may be 0", labels.len())
    })?;
    let c = shape[1];
    let rows = table.len / c;
    check(table.len == rows * c, OP, || format!("a table of {} is not [classes, {c}]", table.len))?;
    // Labels are saved for backward as f32, which is exact up to there.
    check(rows < 1 << 24, OP, || format!("{rows} classes are too many: there may be fewer than {}", 1 << 24))?;
    if let Some(label) = labels.iter().find(|&&label| label as usize >= rows) {
        let what = format!("label {label} is outside 0..{rows}, the rows of the table");
        return Err(crate::Error::Shape { operation: OP, what });
    }
    if tape.on_cuda() {
        let batch = labels.len();
        check_counts(OP, &[batch * c])?;
        let y = tape.take_buffer(batch * c, DType::F32);
        let labels = tape.upload(bytemuck::cast_slice(labels), DType::U32);
        let table_buffer = tape.full_buffer(table);
        let args = [y.into(), tape.buffer(base).into(), table_buffer.into(), labels.into()];
        let sizes = [Arg::I32(batch as i32), Arg::I32(c as i32)];
        let grid = [(batch * c).div_ceil(THREADS), 1];
        let launch = launch("label_embed_fwd", tape.elem(), grid);
        // SAFETY: base and y are memory of this pass, `[B, C]`; the labels were checked to be rows of the table, and are one a sample.
        unsafe { tape.device().launch(&launch, &[&args[..], &sizes].concat()) }?;
        let y = tape.push([batch, c], y, true);
        let labels = tape.push([batch], labels, false);
        tape.record(y, Node::LabelEmbed(Saved { base, labels, table }));
        return Ok(y);
    }
    let mut y = tape.take(labels.len() * c);
    let mut saved = tape.take(labels.len());
    y.copy_from_slice(tape.value(base));
    for ((y, saved), &label) in y.chunks_exact_mut(c).zip(saved.iter_mut()).zip(labels) {
        add_assign(y, &tape.weights[table.range()][label as usize * c..][..c]);
        *saved = label as f32;
    }
    let batch = labels.len();
    let y = tape.push([batch, c], y, true);
    let labels = tape.push([batch], saved, false);
    tape.record(y, Node::LabelEmbed(Saved { base, labels, table }));
    Ok(y)
}

// As in kernels/label_embed.cu.
const THREADS: usize = 256;
/// Columns and rows of the table of a block of the backward pass.
const TILE: [usize; 2] = [256, 8];

fn launch(kernel: &'static str, elem: DType, [x, y]: [usize; 2]) -> Launch<'static> {
    let grid = [x as u32, y as u32, 1];
    Launch { file: "label_embed", kernel, elem, defines: &[], grid, block: THREADS as u32, shared: 0 }
}

impl Saved {
    pub(crate) fn backward_cuda(self, tape: &mut Tape, dy: Buffer) -> Result<()> {
        let &[batch, c] = tape.shape(self.base) else { unreachable!("checked by the forward pass") };
        let (dtable, add) = tape.grad_buffer(self.table);
        let rows = self.table.len / c;
        let sizes = [usize::from(add), batch, c, rows].map(|size| Arg::I32(size as i32));
        let args = [&[dtable.into(), dy.into(), tape.buffer(self.labels).into()], &sizes[..]].concat();
        let grid = [c.div_ceil(TILE[0]), rows.div_ceil(TILE[1])];
        // SAFETY: the gradient of the table is as long as that, the one of y as y; labels are those of forward.
        unsafe { tape.device().launch(&launch("label_embed_bwd", tape.elem(), grid), &args) }?;
        tape.add_grad_buffer(self.base, dy)
    }

    pub(crate) fn backward(self, tape: &mut Tape, dy: AlignedVec) {
        let (values, grads) = tape.split();
        let labels = values.value(self.labels);
        let c = dy.len() / labels.len();
        if !grads.add {
            grads.of(self.table).fill(0.0);
        }
        for (dy, &label) in dy.chunks_exact(c).zip(labels) {
            add_assign(&mut grads.of(self.table)[label as usize * c..][..c], dy);
        }
        tape.add_grad(self.base, dy);
    }
}
