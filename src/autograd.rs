//! A tape: operations write down what they did, and `backward` walks it in reverse.
//!
//! ```text
//! Memory   what is kept from step to step: recycled buffers, so that a steady-state step allocates nothing on the CPU
//!   Tape   one forward (and backward) pass over borrowed weights
//!     Var  an activation on the tape
//!     Node what an operation saved; a variant of an enum whose `backward` is a `match`: leaving one out does not compile
//! ```
//!
//! A tape computes in main memory or on a CUDA device, wherever its weights are; on a device it runs two or three times, see [`cuda`].
//!
//! What is put on the tape inside of [`Tape::checkpointed`] is not kept: backward does it again. So a deep model needs the
//! memory of its blocks' inputs and of what is inside of one block.
//!
//! Gradients of weights go straight into one flat buffer with the layout of the weights. Gradients of activations live
//! until the operation that made the activation has used them.

pub mod cuda;
mod memory;

use crate::backend::DType;
use crate::backend::cpu::aligned::AlignedVec;
use crate::backend::cpu::simd::add_assign;
use crate::backend::cpu::threads::awake;
use crate::error::{Error, Result};
use crate::ops::Node;
use crate::params::Param;
use crate::routing::Window;
use crate::tensor::{Shape, Storage, Tensor};
use cuda::DeviceWeights;
pub use memory::Memory;
pub(crate) use memory::WeightGrads;
use memory::Written;

/// An activation on a tape: its place there. It does not know which tape that is, so on another one, or after something was taken off
/// this one, it names another activation, which goes unnoticed, or none, which panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(u32);

/// The windows of a batch, one per sample, on a tape, as a [`Var`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    start: u32,
    len: u32,
}

/// Makes one activation from others that are on the tape.
type Work = Box<dyn Fn(&mut Tape) -> Result<Var> + Send + Sync>;

/// What backward has to undo, last first.
enum Step {
    /// An operation made `output`.
    Made { node: Node, output: Var },
    /// `work` made `output`, and nothing on the way to it was kept: it is done again.
    Checkpointed { work: Work, output: Var },
    /// The gradients of everything made since `mark`, when something was done again, are computed.
    DoneSince { mark: usize },
}

impl Step {
    /// What it made.
    fn output(&self) -> Option<Var> {
        match self {
            Step::Made { output, .. } | Step::Checkpointed { output, .. } => Some(*output),
            Step::DoneSince { .. } => None,
        }
    }
}

/// Where the weights of a tape are.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// In main memory.
    Cpu(&'a [f32]),
    /// On a CUDA device.
    Cuda(&'a DeviceWeights),
}

impl<'a> From<&'a [f32]> for Weights<'a> {
    fn from(weights: &'a [f32]) -> Self {
        Weights::Cpu(weights)
    }
}

impl<'a> From<&'a Vec<f32>> for Weights<'a> {
    fn from(weights: &'a Vec<f32>) -> Self {
        Weights::Cpu(weights)
    }
}

impl<'a> From<&'a AlignedVec> for Weights<'a> {
    fn from(weights: &'a AlignedVec) -> Self {
        Weights::Cpu(weights)
    }
}

impl<'a> From<&'a DeviceWeights> for Weights<'a> {
    fn from(weights: &'a DeviceWeights) -> Self {
        Weights::Cuda(weights)
    }
}

/// A pass that records nothing, wherever the weights are. `work` is run two or three times on a CUDA device, see [`cuda`]; on the CPU
/// it is run once, by a thread of the pool, while the others stay awake.
///
/// # Errors
/// Those of `work`, and when the device has not enough memory, or `memory` was not made for where the weights are.
pub fn infer<R: Send>(
    weights: Weights,
    memory: &mut Memory,
    mut work: impl FnMut(&mut Tape) -> Result<R> + Send,
) -> Result<R> {
    match weights {
        Weights::Cpu(_) if memory.cuda.is_some() => {
            Err(Error::usage("this memory is for passes on a CUDA device, but the weights are in main memory"))
        }
        Weights::Cpu(weights) => awake(|| work(&mut Tape::inference(weights, memory))),
        Weights::Cuda(weights) => cuda::pass(weights, None, memory, work),
    }
}

/// What is said of an activation whose numbers are gone.
const RELEASED: &str = "an activation was released: an inference tape keeps of a model only its output, a checkpoint only its result, \
                        and a backward pass uses up what nobody else reads";

/// One pass of a model over borrowed weights.
///
/// ```
/// # fn main() -> dtr_fused::Result<()> {
/// use dtr_fused::autograd::{Memory, Tape};
/// use dtr_fused::ops::PerSample;
/// use dtr_fused::ops::ln_linear::{Activation, ln_linear};
/// use dtr_fused::params::Layout;
/// use dtr_fused::routing::Window;
///
/// let mut layout = Layout::default();
/// let layer = layout.push_linear("layer", 4, 8); // 4 outputs, 8 inputs
/// let weights: Vec<f32> = (0..layout.len()).map(|i| (i as f32).sin()).collect();
/// let (mut grads, mut memory) = (vec![0.0; layout.len()], Memory::new());
///
/// let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
/// let numbers: Vec<f32> = (0..2 * 3 * 8).map(|i| (i as f32).cos()).collect();
/// let x = tape.input(&numbers, [2, 3, 8], true)?; // 2 samples of 3 tokens
/// let modulation = tape.input(&[0.5; 2 * 16], [2, 16], false)?; // of each sample 8 shifts, then 8 scales
/// let [shift, scale] = [0, 8].map(|offset| PerSample { var: modulation, offset });
/// // The first sample reads channels 0 to 5, the second 2 to 7.
/// let windows = tape.windows([0, 2].map(|start| Window { start, width: 6 }));
/// let y = ln_linear(&mut tape, x, windows, shift, scale, layer, Activation::None)?; // [2, 3, 4]
/// tape.backward(y, &[1.0; 2 * 3 * 4])?; // of the sum of all outputs
///
/// let dx = tape.gradient(x).expect("it was asked for");
/// assert!(dx[..6].iter().all(|&d| d != 0.0) && dx[6..8] == [0.0; 2]); // of the first token
/// assert_eq!(grads[layer.bias.range()], [6.0; 4]); // one of each token
/// # Ok(())
/// # }
/// ```
pub struct Tape<'a> {
    pub(crate) weights: &'a [f32],
    pub(crate) weight_grads: Option<WeightGrads<'a>>,
    cuda: Option<cuda::OnDevice<'a>>,
    paused: bool, // inside of Tape::checkpointed: nothing is recorded
    spent: bool,  // Tape::backward was called
    memory: &'a mut Memory,
}

impl<'a> Tape<'a> {
    /// A tape for a forward and a backward pass. `grads` has the layout of `weights`; `backward` overwrites it, or adds to
    /// it when `add` is set (gradient accumulation). An operation overwrites or adds by itself, so that nothing has to be
    /// cleared: each parameter must be used exactly once on a tape, as a DiT does. Where one is not used, `grads` keeps what it held;
    /// where one is used more often, `backward` fails unless it adds (to zeros, say).
    ///
    /// # Panics
    /// When `grads` is not as long as `weights`.
    pub fn new(weights: &'a [f32], grads: &'a mut [f32], add: bool, memory: &'a mut Memory) -> Self {
        assert_eq!(weights.len(), grads.len(), "weights and their gradients have one layout");
        memory.clear();
        Tape {
            weights,
            weight_grads: Some(WeightGrads { data: grads, add, written: Written::default() }),
            cuda: None,
            paused: false,
            spent: false,
            memory,
        }
    }

    /// A tape that records nothing: for sampling. Weights that are too few for a parameter make its operation panic; a
    /// [`Dit`](crate::model::dit::Dit) refuses them.
    pub fn inference(weights: &'a [f32], memory: &'a mut Memory) -> Self {
        memory.clear();
        Tape { weights, weight_grads: None, cuda: None, paused: false, spent: false, memory }
    }

    /// Notes the sum of squares of what a backward pass wrote to the gradient of `param`, for its norm.
    pub(crate) fn note_squares(&mut self, param: Param, squares: f64) {
        // Of what is added to others it says nothing.
        if self.weight_grads.as_ref().is_some_and(|grads| !grads.add) {
            self.memory.squares.push((param, squares));
        }
    }

    /// Type in which the products of the blocks are computed; on a CUDA device also that of activations, and of the weights that products
    /// read.
    pub(crate) fn elem(&self) -> DType {
        self.memory.elem
    }

    /// Number of all weights.
    pub(crate) fn weights_len(&self) -> usize {
        self.weights_len_on_cuda().unwrap_or(self.weights.len())
    }

    /// Whether operations need to save anything for a backward pass.
    pub fn records(&self) -> bool {
        !self.paused && (self.weight_grads.is_some() || self.cuda.as_ref().is_some_and(|cuda| cuda.records()))
    }

    /// Puts an input on the tape. Where its gradient is not asked for here, it need not be computed. On a CUDA device, what has three
    /// dimensions is an activation `[B, T, C]` in the tape's element type, and all else is f32.
    ///
    /// # Errors
    /// When `data` does not have as many elements as `shape`.
    pub fn input(&mut self, data: &[f32], shape: impl Into<Shape>, wants_grad: bool) -> Result<Var> {
        let shape = shape.into();
        if data.len() != shape.len() {
            let what = format!("{} numbers cannot have the shape {shape:?}", data.len());
            return Err(Error::Shape { operation: "input", what });
        }
        let dtype = if shape.rank() == 3 { self.elem_if_on_cuda() } else { DType::F32 };
        let storage = self.holding(data, dtype);
        Ok(self.push(shape, storage, wants_grad))
    }

    /// The numbers, where the tape computes; f32 in main memory.
    fn holding(&mut self, data: &[f32], dtype: DType) -> Storage {
        if self.on_cuda() {
            return self.upload_as(data, dtype).into();
        }
        let mut buffer = self.take(data.len());
        buffer.copy_from_slice(data);
        buffer.into()
    }

    /// Puts rows of a table `[_, columns]` on the tape: row `rows[b]` for sample b.
    pub(crate) fn gather(&mut self, table: &[f32], rows: &[u32], columns: usize) -> Var {
        let mut buffer = self.take(rows.len() * columns);
        for (to, &row) in buffer.chunks_exact_mut(columns).zip(rows) {
            to.copy_from_slice(&table[row as usize * columns..][..columns]);
        }
        if !self.on_cuda() {
            return self.push([rows.len(), columns], buffer, false);
        }
        let storage = self.holding(&buffer, DType::F32);
        self.give(buffer);
        self.push([rows.len(), columns], storage, false)
    }

    /// Puts the windows of a batch on the tape, one per sample.
    pub fn windows(&mut self, windows: impl IntoIterator<Item = Window>) -> Windows {
        let start = self.memory.windows.len();
        self.memory.windows.extend(windows);
        let windows = Windows { start: start as u32, len: (self.memory.windows.len() - start) as u32 };
        self.upload_windows(windows);
        windows
    }

    /// The windows behind a handle, one per sample.
    pub fn get_windows(&self, windows: Windows) -> &[Window] {
        &self.memory.windows[windows.start as usize..][..windows.len as usize]
    }

    /// The numbers of an activation in main memory.
    ///
    /// # Panics
    /// When they were released ([`Tape::read`] refuses them instead), or the tape computes on a CUDA device: use [`Tape::read`].
    pub fn value(&self, var: Var) -> &[f32] {
        assert!(!self.is_released(var), "{RELEASED}");
        self.memory.values[var.0 as usize].data.cpu()
    }

    /// Whether the numbers of an activation are gone.
    pub(crate) fn is_released(&self, var: Var) -> bool {
        let Tensor { shape, data } = &self.memory.values[var.0 as usize];
        data.len() != shape.len()
    }

    /// Refuses an operand whose numbers are gone.
    pub(crate) fn check_held(&self, var: Var, operation: &'static str) -> Result<()> {
        match self.is_released(var) {
            true => Err(Error::Shape { operation, what: RELEASED.into() }),
            false => Ok(()),
        }
    }

    /// The sizes of an activation; none of one that an inference tape or a checkpoint released.
    pub fn shape(&self, var: Var) -> &[usize] {
        self.memory.values[var.0 as usize].shape.dims()
    }

    /// The gradient of an input, after [`Tape::backward`]: None of one that nothing depends on, maybe of one for which it was not asked,
    /// and of what operations made, whose gradient was used up.
    ///
    /// # Panics
    /// When the tape computes on a CUDA device: use [`Tape::read_gradient`].
    pub fn gradient(&self, var: Var) -> Option<&[f32]> {
        self.memory.grads[var.0 as usize].as_ref().map(Storage::cpu)
    }

    /// The numbers of an activation, from any device; zeros in a dry run (see [`cuda`]).
    ///
    /// # Errors
    /// When they were released, or work on the device failed.
    pub fn read(&self, var: Var) -> Result<Vec<f32>> {
        self.check_held(var, "read")?;
        self.read_storage(&self.memory.values[var.0 as usize].data)
    }

    /// [`Tape::gradient`], from any device.
    ///
    /// # Errors
    /// When work on the device failed.
    pub fn read_gradient(&self, var: Var) -> Result<Option<Vec<f32>>> {
        self.memory.grads[var.0 as usize].as_ref().map(|grad| self.read_storage(grad)).transpose()
    }

    fn read_storage(&self, storage: &Storage) -> Result<Vec<f32>> {
        match storage {
            Storage::Cpu(data) => Ok(data.to_vec()),
            // SAFETY: what is on a tape is memory of its pass.
            Storage::Cuda(buffer) => unsafe { self.device().download_buffer(*buffer) },
        }
    }

    /// Gradients of all weights and wanted inputs of `sum(output * upstream)`: once, since what was recorded is used up.
    ///
    /// # Errors
    /// On a tape made for inference, the second time, and when `upstream` is not of the output's size. Also when two layers had the
    /// same parameter and gradients are not added: they are wrong then.
    pub fn backward(&mut self, output: Var, upstream: &[f32]) -> Result<()> {
        self.check_backward(output, upstream.len())?;
        let grad = self.holding(upstream, self.dtype(output));
        self.backward_from(output, grad)
    }

    /// [`Tape::backward`] with an input of the tape as the upstream gradient, which is used up.
    ///
    /// # Errors
    /// As [`Tape::backward`], and when `upstream` is not what was put on the tape last: an operation might have read it, and would
    /// find nothing.
    pub fn backward_with(&mut self, output: Var, upstream: Var) -> Result<()> {
        self.check_backward(output, self.memory.values[upstream.0 as usize].data.len())?;
        let is_made = self.memory.steps.iter().any(|step| step.output() == Some(upstream));
        let refused = |what: String| Err(Error::Shape { operation: "backward_with", what });
        if is_made || upstream.0 as usize + 1 != self.mark() {
            return refused("the upstream gradient must be an input, and the last that is put on the tape".into());
        }
        let [found, expected] = [upstream, output].map(|var| self.dtype(var));
        if found != expected {
            return refused(format!("the upstream gradient is {found:?}, but the output {expected:?}"));
        }
        let upstream = self.take_value(upstream);
        self.backward_from(output, upstream)
    }

    /// The type of an activation's numbers.
    fn dtype(&self, var: Var) -> DType {
        match &self.memory.values[var.0 as usize].data {
            Storage::Cuda(buffer) => buffer.dtype,
            Storage::Cpu(_) => DType::F32,
        }
    }

    /// Refuses a backward pass from `output` with an upstream gradient of `len` numbers.
    fn check_backward(&self, output: Var, len: usize) -> Result<()> {
        let expected = self.memory.values[output.0 as usize].data.len();
        let what = match (self.records(), self.spent) {
            (false, _) => "an inference tape has recorded nothing: make it with Tape::new".to_string(),
            (true, true) => "it was called before, and what the tape recorded is used up".to_string(),
            _ if self.is_released(output) => RELEASED.into(),
            _ if len == expected => return Ok(()),
            _ => format!("the upstream gradient has {len} numbers, but the output has {expected}"),
        };
        Err(Error::Shape { operation: "backward", what })
    }

    /// [`Tape::backward`] with the upstream gradient where the tape computes.
    pub(crate) fn backward_from(&mut self, output: Var, upstream: Storage) -> Result<()> {
        self.check_backward(output, upstream.len())?;
        self.assert_own(&upstream);
        self.spent = true;
        self.memory.grads[output.0 as usize] = Some(upstream);
        self.exchange_written();
        while let Some(step) = self.memory.steps.pop() {
            match step {
                Step::Made { node, output } => {
                    let written =
                        self.weight_grads.as_mut().map_or(&mut self.memory.written, |grads| &mut grads.written);
                    written.step = written.params.len();
                    match self.memory.grads[output.0 as usize].take() {
                        Some(Storage::Cpu(grad)) => node.backward(self, grad),
                        Some(Storage::Cuda(grad)) => node.backward_cuda(self, grad)?,
                        None => {}
                    }
                }
                Step::Checkpointed { work, output } => {
                    let Some(grad) = self.memory.grads[output.0 as usize].take() else { continue };
                    // All that read it is undone.
                    self.release(output);
                    // Below the steps of the work, so that it comes after them.
                    let mark = self.mark();
                    self.memory.steps.push(Step::DoneSince { mark });
                    let again = work(self).and_then(|again| made_since(mark, again))?;
                    let [was, is] = [output, again].map(|var| self.memory.values[var.0 as usize].shape);
                    if was != is {
                        let what = format!("the work made {was:?}, but {is:?} when it was done again");
                        return Err(Error::Shape { operation: "checkpointed", what });
                    }
                    self.memory.grads[again.0 as usize] = Some(grad);
                }
                Step::DoneSince { mark } => self.forget_since(mark),
            }
        }
        self.exchange_written();
        self.check_written()
    }

    /// Lends the list of the memory, which keeps it from pass to pass, to the gradients, or takes it back.
    fn exchange_written(&mut self) {
        if let Some(grads) = &mut self.weight_grads {
            std::mem::swap(&mut grads.written, &mut self.memory.written);
        }
    }

    /// Refuses gradients that an operation has overwritten after another.
    fn check_written(&mut self) -> Result<()> {
        let overwrites = self.weight_grads.as_ref().map_or(!self.adds_on_cuda(), |grads| !grads.add);
        match self.memory.written.twice().filter(|_| overwrites) {
            None => Ok(()),
            Some(param) => {
                let what = format!(
                    "two layers have the weights {:?}, and the gradient of one was overwritten by the other's: have them added, \
                     to zeros",
                    param.range()
                );
                Err(Error::Shape { operation: "backward", what })
            }
        }
    }

    /// `work(self)`, and of all that it puts on the tape only its result is kept, until backward does it again to have the rest.
    /// So `work` must make its result itself, and do the same every time, from what was on the tape before; of what it made, nothing but
    /// the result may be used afterwards. On an inference tape it is only done.
    ///
    /// # Errors
    /// Those of `work`, and when its result was on the tape before; in backward, when it is another the second time.
    pub fn checkpointed(&mut self, work: impl Fn(&mut Tape) -> Result<Var> + Send + Sync + 'static) -> Result<Var> {
        let mark = self.mark();
        if !self.records() {
            return work(self).and_then(|output| made_since(mark, output));
        }
        self.paused = true;
        let output = work(self).and_then(|output| made_since(mark, output));
        let output = output.inspect(|&output| self.release_since(mark, output));
        self.paused = false;
        let output = output.inspect_err(|_| self.forget_since(mark))?;
        self.memory.steps.push(Step::Checkpointed { work: Box::new(work), output });
        Ok(output)
    }

    /// Takes everything made since `mark`, gradients too, off the tape.
    fn forget_since(&mut self, mark: usize) {
        let values = self.memory.values.drain(mark..).map(|value| value.data);
        let buffers: Vec<Storage> = values.chain(self.memory.grads.drain(mark..).flatten()).collect();
        self.memory.wants_grad.truncate(mark);
        buffers.into_iter().for_each(|buffer| self.recycle(buffer));
    }

    fn recycle(&mut self, storage: Storage) {
        match storage {
            Storage::Cpu(buffer) => self.memory.pool.give(buffer),
            Storage::Cuda(buffer) => self.give_buffer(buffer),
        }
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
            if index == keep.0 as usize {
                continue;
            }
            self.release(Var(index as u32));
            // No operation takes this for one of its operands.
            self.memory.values[index].shape = [].into();
        }
    }

    /// Takes the numbers of an activation that nobody else will read.
    pub(crate) fn take_value(&mut self, var: Var) -> Storage {
        std::mem::replace(&mut self.memory.values[var.0 as usize].data, Storage::Cpu(AlignedVec::new()))
    }

    /// Recycles the numbers of an activation that nobody will read.
    pub(crate) fn release(&mut self, var: Var) {
        let storage = self.take_value(var);
        self.recycle(storage);
    }

    /// A buffer of arbitrary contents; give it back with [`Tape::give`] or [`Tape::push`].
    pub(crate) fn take(&mut self, len: usize) -> AlignedVec {
        self.memory.pool.take(len)
    }

    /// Recycles a buffer.
    pub(crate) fn give(&mut self, buffer: AlignedVec) {
        self.memory.pool.give(buffer);
    }

    /// Puts an activation on the tape.
    pub(crate) fn push(&mut self, shape: impl Into<Shape>, data: impl Into<Storage>, wants_grad: bool) -> Var {
        let (shape, data) = (shape.into(), data.into());
        assert_eq!(shape.len(), data.len(), "an activation has as many numbers as its shape says");
        self.assert_own(&data);
        self.memory.values.push(Tensor { shape, data });
        self.memory.grads.push(None);
        self.memory.wants_grad.push(wants_grad);
        Var((self.memory.values.len() - 1) as u32)
    }

    /// Writes down what an operation did (on an inference tape: nothing).
    pub(crate) fn record(&mut self, output: Var, node: Node) {
        if self.records() {
            self.memory.steps.push(Step::Made { node, output });
        }
    }

    /// Whether anything upstream needs the gradient of `var`.
    pub(crate) fn wants_grad(&self, var: Var) -> bool {
        self.memory.wants_grad[var.0 as usize]
    }

    /// Takes the gradient of `var` to add to it, and whether it is still empty (then it must be overwritten).
    /// Return it with [`Tape::put_grad`].
    pub(crate) fn take_grad(&mut self, var: Var) -> (AlignedVec, bool) {
        match self.memory.grads[var.0 as usize].take() {
            Some(Storage::Cpu(grad)) => (grad, false),
            _ => (self.take(self.memory.values[var.0 as usize].shape.len()), true),
        }
    }

    /// Stores the gradient of `var`.
    pub(crate) fn put_grad(&mut self, var: Var, grad: AlignedVec) {
        debug_assert_eq!(grad.len(), self.memory.values[var.0 as usize].shape.len());
        self.memory.grads[var.0 as usize] = Some(grad.into());
    }

    /// Adds `grad` to the gradient of `var`, and takes the buffer.
    pub(crate) fn add_grad(&mut self, var: Var, grad: AlignedVec) {
        let (mut sum, fresh) = match self.memory.grads[var.0 as usize].take() {
            Some(Storage::Cpu(sum)) => (sum, false),
            _ => (AlignedVec::new(), true),
        };
        if fresh {
            return self.put_grad(var, grad);
        }
        add_assign(&mut sum, &grad);
        self.put_grad(var, sum);
        self.give(grad);
    }

    /// Everything a backward pass reads, and the weight gradients it writes, borrowed side by side.
    pub(crate) fn split(&mut self) -> (Values<'_>, &mut WeightGrads<'a>) {
        let values = Values { weights: self.weights, values: &self.memory.values, windows: &self.memory.windows };
        (values, self.weight_grads.as_mut().expect("backward runs on a recording tape"))
    }
}

/// The result of work that began at `mark`, which must have made it.
fn made_since(mark: usize, output: Var) -> Result<Var> {
    if output.0 as usize >= mark {
        return Ok(output);
    }
    let what = "the result was on the tape before: the work must make it".into();
    Err(Error::Shape { operation: "checkpointed", what })
}

/// What a backward pass reads.
pub(crate) struct Values<'t> {
    weights: &'t [f32],
    values: &'t [Tensor],
    windows: &'t [Window],
}

impl<'t> Values<'t> {
    pub(crate) fn value(&self, var: Var) -> &'t [f32] {
        self.values[var.0 as usize].data.cpu()
    }

    pub(crate) fn weight(&self, param: Param) -> &'t [f32] {
        &self.weights[param.range()]
    }

    pub(crate) fn windows(&self, windows: Windows) -> &'t [Window] {
        &self.windows[windows.start as usize..][..windows.len as usize]
    }
}
