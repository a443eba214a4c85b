//! A tape: operations write down what they did, and `backward` walks it in reverse.
//!
//! ```text
//! Memory   what is kept from step to step: recycled buffers, so that a steady-state step allocates nothing
//!   Tape   one forward (and backward) pass over borrowed weights
//!     Var  an activation on the tape
//!     Node what an operation saved; a variant of an enum whose `backward` is a `match`: leaving one out does not compile
//! ```
//!
//! Gradients of weights go straight into one flat buffer with the layout of the weights. Gradients of activations live
//! until the operation that made the activation has used them.

use crate::backend::cpu::simd::add_assign;
use crate::error::{Error, Result};
use crate::ops::Node;
use crate::params::{Linear, Param};
use crate::routing::Window;
use crate::tensor::{Shape, Tensor};
use std::collections::HashMap;

/// An activation on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(u32);

/// The windows of a batch, one per sample, on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    start: u32,
    len: u32,
}

/// What an operation did and which activation came out of it.
struct Step {
    node: Node,
    output: Var,
}

/// Buffers that outlive a tape. Give the same one to every step.
#[derive(Default)]
pub struct Memory {
    values: Vec<Tensor>,
    grads: Vec<Option<Vec<f32>>>,
    wants_grad: Vec<bool>,
    steps: Vec<Step>,
    windows: Vec<Window>,
    pool: Pool,
}

impl Memory {
    /// An empty memory: the first step fills it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of all buffers, used and free.
    pub fn bytes(&self) -> usize {
        self.pool.total * size_of::<f32>()
    }

    fn clear(&mut self) {
        for value in self.values.drain(..) {
            self.pool.give(value.data);
        }
        for grad in self.grads.drain(..).flatten() {
            self.pool.give(grad);
        }
        self.wants_grad.clear();
        self.steps.clear();
        self.windows.clear();
    }
}

/// Free buffers by length.
#[derive(Default)]
pub(crate) struct Pool {
    free: HashMap<usize, Vec<Vec<f32>>>,
    total: usize,
}

impl Pool {
    /// A buffer of `len` numbers with arbitrary contents (NaN in debug builds, so that reading them shows).
    pub(crate) fn take(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.free.get_mut(&len).and_then(Vec::pop).unwrap_or_else(|| {
            self.total += len;
            vec![0.0; len]
        });
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, buffer: Vec<f32>) {
        if !buffer.is_empty() {
            self.free.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

/// Gradients of the weights: a flat buffer with the layout of the weights.
pub(crate) struct WeightGrads<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) add: bool,
}

impl WeightGrads<'_> {
    /// The gradient of `param`. Whether to add to it or to overwrite it says `add`.
    pub(crate) fn of(&mut self, param: Param) -> &mut [f32] {
        &mut self.data[param.range()]
    }

    /// The gradients of weight and bias.
    pub(crate) fn of_linear(&mut self, linear: Linear) -> (&mut [f32], &mut [f32]) {
        let ranges = [linear.weight.range(), linear.bias.range()];
        let [weight, bias] = self.data.get_disjoint_mut(ranges).expect("parameters of a layout never overlap");
        (weight, bias)
    }
}

/// One pass of a model over borrowed weights.
pub struct Tape<'a> {
    pub(crate) weights: &'a [f32],
    pub(crate) weight_grads: Option<WeightGrads<'a>>,
    memory: &'a mut Memory,
}

impl<'a> Tape<'a> {
    /// A tape for a forward and a backward pass. `grads` has the layout of `weights`; `backward` overwrites it, or adds to
    /// it when `add` is set (gradient accumulation). An operation overwrites or adds by itself, so that nothing has to be
    /// cleared: each parameter must be used exactly once on a tape, as a DiT does.
    pub fn new(weights: &'a [f32], grads: &'a mut [f32], add: bool, memory: &'a mut Memory) -> Self {
        assert_eq!(weights.len(), grads.len(), "weights and their gradients have one layout");
        memory.clear();
        Tape { weights, weight_grads: Some(WeightGrads { data: grads, add }), memory }
    }

    /// A tape that records nothing: for sampling.
    pub fn inference(weights: &'a [f32], memory: &'a mut Memory) -> Self {
        memory.clear();
        Tape { weights, weight_grads: None, memory }
    }

    /// Whether operations need to save anything for a backward pass.
    pub fn records(&self) -> bool {
        self.weight_grads.is_some()
    }

    /// Puts an input on the tape. Its gradient is only computed when asked for here.
    ///
    /// # Errors
    /// When `data` does not have as many elements as `shape`.
    pub fn input(&mut self, data: &[f32], shape: impl Into<Shape>, wants_grad: bool) -> Result<Var> {
        let shape = shape.into();
        if data.len() != shape.len() {
            let what = format!("{} numbers cannot have the shape {shape:?}", data.len());
            return Err(Error::Shape { operation: "input", what });
        }
        let mut buffer = self.take(data.len());
        buffer.copy_from_slice(data);
        Ok(self.push(shape, buffer, wants_grad))
    }

    /// Puts rows of a table `[_, columns]` on the tape: row `rows[b]` for sample b.
    pub(crate) fn gather(&mut self, table: &[f32], rows: &[u32], columns: usize) -> Var {
        let mut buffer = self.take(rows.len() * columns);
        for (to, &row) in buffer.chunks_exact_mut(columns).zip(rows) {
            to.copy_from_slice(&table[row as usize * columns..][..columns]);
        }
        self.push([rows.len(), columns], buffer, false)
    }

    /// Puts the windows of a batch on the tape, one per sample.
    pub fn windows(&mut self, windows: impl IntoIterator<Item = Window>) -> Windows {
        let start = self.memory.windows.len();
        self.memory.windows.extend(windows);
        Windows { start: start as u32, len: (self.memory.windows.len() - start) as u32 }
    }

    /// The windows behind a handle, one per sample.
    pub fn get_windows(&self, windows: Windows) -> &[Window] {
        &self.memory.windows[windows.start as usize..][..windows.len as usize]
    }

    /// The numbers of an activation.
    pub fn value(&self, var: Var) -> &[f32] {
        &self.memory.values[var.0 as usize].data
    }

    /// The sizes of an activation.
    pub fn shape(&self, var: Var) -> &[usize] {
        self.memory.values[var.0 as usize].shape.dims()
    }

    /// The gradient of an input for which it was asked, after [`Tape::backward`].
    pub fn gradient(&self, var: Var) -> Option<&[f32]> {
        self.memory.grads[var.0 as usize].as_deref()
    }

    /// Gradients of all weights and wanted inputs of `sum(output * upstream)`.
    ///
    /// # Errors
    /// On a tape made for inference, and when `upstream` is not of the output's size.
    pub fn backward(&mut self, output: Var, upstream: &[f32]) -> Result<()> {
        let len = self.value(output).len();
        if !self.records() || upstream.len() != len {
            let what = match self.records() {
                true => format!("the upstream gradient has {} numbers, but the output has {len}", upstream.len()),
                false => "an inference tape has recorded nothing: make it with Tape::new".to_string(),
            };
            return Err(Error::Shape { operation: "backward", what });
        }
        let mut grad = self.take(len);
        grad.copy_from_slice(upstream);
        self.memory.grads[output.0 as usize] = Some(grad);
        while let Some(Step { node, output }) = self.memory.steps.pop() {
            if let Some(grad) = self.memory.grads[output.0 as usize].take() {
                node.backward(self, grad);
            }
        }
        Ok(())
    }

    /// Marks a point of the tape for [`Tape::release_since`].
    pub(crate) fn mark(&self) -> usize {
        self.memory.values.len()
    }

    /// On an inference tape, recycles every activation made since `mark` except `keep`; else does nothing.
    pub(crate) fn release_since(&mut self, mark: usize, keep: Var) {
        if self.records() {
            return;
        }
        for index in mark..self.memory.values.len() {
            if index != keep.0 as usize {
                let buffer = std::mem::take(&mut self.memory.values[index].data);
                self.memory.pool.give(buffer);
            }
        }
    }

    /// A buffer of arbitrary contents; give it back with [`Tape::give`] or [`Tape::push`].
    pub(crate) fn take(&mut self, len: usize) -> Vec<f32> {
        self.memory.pool.take(len)
    }

    /// Recycles a buffer.
    pub(crate) fn give(&mut self, buffer: Vec<f32>) {
        self.memory.pool.give(buffer);
    }

    /// Puts an activation on the tape.
    pub(crate) fn push(&mut self, shape: impl Into<Shape>, data: Vec<f32>, wants_grad: bool) -> Var {
        let shape = shape.into();
        debug_assert_eq!(shape.len(), data.len());
        self.memory.values.push(Tensor { shape, data });
        self.memory.grads.push(None);
        self.memory.wants_grad.push(wants_grad);
        Var((self.memory.values.len() - 1) as u32)
    }

    /// Writes down what an operation did (on an inference tape: nothing).
    pub(crate) fn record(&mut self, output: Var, node: Node) {
        if self.records() {
            self.memory.steps.push(Step { node, output });
        }
    }

    /// Whether anything upstream needs the gradient of `var`.
    pub(crate) fn wants_grad(&self, var: Var) -> bool {
        self.memory.wants_grad[var.0 as usize]
    }

    /// Takes the gradient of `var` to add to it, and whether it is still empty (then it must be overwritten).
    /// Return it with [`Tape::put_grad`].
    pub(crate) fn take_grad(&mut self, var: Var) -> (Vec<f32>, bool) {
        match self.memory.grads[var.0 as usize].take() {
            Some(grad) => (grad, false),
            None => (self.take(self.value(var).len()), true),
        }
    }

    /// Stores the gradient of `var`.
    pub(crate) fn put_grad(&mut self, var: Var, grad: Vec<f32>) {
        debug_assert_eq!(grad.len(), self.value(var).len());
        self.memory.grads[var.0 as usize] = Some(grad);
    }

    /// Adds `grad` to the gradient of `var`, and takes the buffer.
    pub(crate) fn add_grad(&mut self, var: Var, grad: Vec<f32>) {
        match self.memory.grads[var.0 as usize].take() {
            None => self.put_grad(var, grad),
            Some(mut sum) => {
                add_assign(&mut sum, &grad);
                self.put_grad(var, sum);
                self.give(grad);
            }
        }
    }

    /// Everything a backward pass reads, and the weight gradients it writes, borrowed side by side.
    pub(crate) fn split(&mut self) -> (Values<'_>, &mut WeightGrads<'a>) {
        let values = Values { weights: self.weights, values: &self.memory.values, windows: &self.memory.windows };
        (values, self.weight_grads.as_mut().expect("backward runs on a recording tape"))
    }
}

/// What a backward pass reads.
pub(crate) struct Values<'t> {
    weights: &'t [f32],
    values: &'t [Tensor],
    windows: &'t [Window],
}

impl<'t> Values<'t> {
    pub(crate) fn value(&self, var: Var) -> &'t [f32] {
        &self.values[var.0 as usize].data
    }

    pub(crate) fn weight(&self, param: Param) -> &'t [f32] {
        &self.weights[param.range()]
    }

    pub(crate) fn windows(&self, windows: Windows) -> &'t [Window] {
        &self.windows[windows.start as usize..][..windows.len as usize]
    }
}
