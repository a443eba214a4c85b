//! What a tape keeps from step to step, and the gradients of the weights.

use super::Step;
use super::cuda::DeviceMemory;
use crate::backend::Compute;
use crate::backend::DType;
use crate::backend::cpu::aligned::AlignedVec;
use crate::params::{Linear, Param};
use crate::routing::Window;
use crate::tensor::{Storage, Tensor};
use std::collections::BTreeMap;

/// Buffers that outlive a tape. Give the same one to every step.
#[derive(Default)]
pub struct Memory {
    pub(super) values: Vec<Tensor>,
    pub(super) grads: Vec<Option<Storage>>,
    pub(super) wants_grad: Vec<bool>,
    pub(super) steps: Vec<Step>,
    pub(super) windows: Vec<Window>,
    pub(super) squares: Vec<(Param, f64)>,
    pub(super) written: Written,
    pub(super) pool: Pool,
    pub(super) elem: DType,
    pub(super) cuda: Option<Box<DeviceMemory>>,
    pub(super) second: Option<Box<Memory>>, // see for_halves
}

impl Memory {
    /// An empty memory for passes on the CPU in f32: the first step fills it.
    pub fn new() -> Self {
        Self::default()
    }

    /// [`Memory::new`], with the products of the blocks and of the last layer in `elem`, f32 or bf16: then their factors are rounded, and
    /// the sums and all else are in f32. With AMX, bf16 takes less time; without ([`has_bf16`](crate::backend::cpu::has_bf16)), much more.
    ///
    /// Small products stay in f32: attention of less than 32 tokens, or with heads whose size is no multiple of 16, and all of samples
    /// with an odd number of tokens below 16.
    ///
    /// # Panics
    /// With another type.
    pub fn on_cpu(elem: DType) -> Self {
        assert!(matches!(elem, DType::F32 | DType::Bf16), "products are in f32 or bf16, not {elem:?}");
        Memory { elem, ..Self::default() }
    }

    /// An empty memory for passes on `compute`.
    pub fn on(compute: &Compute) -> Self {
        match compute {
            Compute::Cpu { elem } => Memory::on_cpu(*elem),
            Compute::Cuda { device, elem } => Memory::on_device(device, *elem),
        }
    }

    /// Bytes of all buffers, used and free.
    pub fn bytes(&self) -> usize {
        let others =
            self.cuda.as_ref().map_or(0, |cuda| cuda.bytes()) + self.second.as_ref().map_or(0, |half| half.bytes());
        self.pool.total * size_of::<f32>() + others
    }

    /// Parameters of which the last backward pass, in main memory, computed the sum of squares of the gradient: weights whose gradients
    /// were not added to others, or all at once ([`Memory::know_squares`]).
    pub(crate) fn squares_mut(&mut self) -> &mut [(Param, f64)] {
        &mut self.squares
    }

    /// Calls `work` with this memory and another, for the second half of a batch.
    pub(crate) fn for_halves<R>(&mut self, work: impl FnOnce(&mut Memory, &mut Memory) -> R) -> R {
        let mut second = self.second.take().unwrap_or_else(|| Box::new(Memory::on_cpu(self.elem)));
        let result = work(self, &mut second);
        self.second = Some(second);
        result
    }

    /// Takes note of the sum of squares of all `len` gradients, instead of those of parameters.
    pub(crate) fn know_squares(&mut self, squares: f64, len: usize) {
        self.squares.clear();
        self.squares.push((Param { offset: 0, len }, squares));
    }

    /// Forgets all sums of squares: the gradients are others now.
    pub(crate) fn forget_squares(&mut self) {
        self.squares.clear();
    }

    pub(super) fn clear(&mut self) {
        for storage in self.values.drain(..).map(|value| value.data).chain(self.grads.drain(..).flatten()) {
            if let Storage::Cpu(data) = storage {
                self.pool.give(data);
            }
        }
        if let Some(cuda) = &mut self.cuda {
            cuda.clear();
        }
        self.wants_grad.clear();
        self.steps.clear();
        self.windows.clear();
        self.squares.clear();
        self.written.params.clear();
        self.written.step = 0;
    }
}

/// Free buffers by capacity.
#[derive(Default)]
pub(crate) struct Pool {
    free: BTreeMap<usize, Vec<AlignedVec>>,
    total: usize,
}

impl Pool {
    /// A buffer of `len` numbers with arbitrary contents (NaN in debug builds, so that reading them shows): the smallest that is
    /// free, unless half of it would lie idle.
    pub(crate) fn take(&mut self, len: usize) -> AlignedVec {
        let fitting = self.free.range_mut(len..(2 * len).max(len + 1)).find_map(|(_, buffers)| buffers.pop());
        let mut buffer = fitting.unwrap_or_else(|| {
            self.total += len;
            AlignedVec::zeros(len)
        });
        buffer.set_len(len);
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, buffer: AlignedVec) {
        if buffer.capacity() > 0 {
            self.free.entry(buffer.capacity()).or_default().push(buffer);
        }
    }
}

/// Gradients of the weights: a flat buffer with the layout of the weights.
pub(crate) struct WeightGrads<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) add: bool,
    pub(super) written: Written, // that of the memory, during a backward pass
}

/// The parameters whose gradients a backward pass has written.
#[derive(Default)]
pub(crate) struct Written {
    pub(super) params: Vec<Param>,
    pub(super) step: usize, // where those of the operation begin that is undone now
}

impl Written {
    /// Takes note of a parameter.
    pub(super) fn note(&mut self, param: Param) {
        self.params.push(param);
    }

    /// Takes note of a parameter, of one operation once.
    pub(super) fn note_once(&mut self, param: Param) {
        if !self.params[self.step..].contains(&param) {
            self.note(param);
        }
    }

    /// A parameter of which something was noted before.
    pub(super) fn twice(&mut self) -> Option<Param> {
        self.params.sort_unstable_by_key(|param| (param.offset, param.len));
        self.params.windows(2).find(|pair| pair[0].range().end > pair[1].offset).map(|pair| pair[1])
    }
}

impl WeightGrads<'_> {
    /// The gradient of `param`: to be added to if `add` is set, else to be overwritten. An operation may ask for it again.
    pub(crate) fn of(&mut self, param: Param) -> &mut [f32] {
        self.written.note_once(param);
        &mut self.data[param.range()]
    }

    /// The gradients of weight and bias, as [`WeightGrads::of`] gives that of one parameter, but once.
    pub(crate) fn of_linear(&mut self, linear: Linear) -> (&mut [f32], &mut [f32]) {
        let ranges = [linear.weight.range(), linear.bias.range()];
        [linear.weight, linear.bias].into_iter().for_each(|param| self.written.note(param));
        let [weight, bias] = self.data.get_disjoint_mut(ranges).expect("parameters of a layout never overlap");
        (weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_half_of_a_batch_is_computed_in_the_type_of_the_first() {
        for elem in [DType::F32, DType::Bf16] {
            Memory::on_cpu(elem).for_halves(|first, second| assert_eq!([first.elem, second.elem], [elem; 2]));
        }
    }
}
