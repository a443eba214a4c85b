//! A tape on a CUDA device.
//!
//! A pass runs twice. The first time it is dry: nothing is launched, but every buffer is taken and given back, and every
//! input (images, timesteps, windows) is noted. So the memory that the pass needs is known before it starts, and it is one
//! block; buffers come in the same order, hence at the same addresses, every time. The second time the kernels are launched.
//! Where the memory has to grow, it runs dry once more in between. What is read in a dry run is zeros, on which nothing may
//! depend; what else a pass does, it does every time.
//!
//! A training step does the first half for the next pass while the device computes this one (`stage`), and the second
//! half replays the graph of an earlier pass (`launch_staged`).

use super::{Memory, RELEASED, Storage, Tape, Var, Windows};
use crate::backend::Compute;
use crate::backend::cuda::arena::Arena;
use crate::backend::cuda::transfer::Staging;
use crate::backend::cuda::{Allocation, Arg, Buffer, DType, Device, Graph, Launch};
use crate::error::{Error, Result};
use crate::ops::cuda::shares::{Gradient, Planner};
use crate::params::Param;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Threads of a block of the sum of gradients.
const ADD_BLOCK: u32 = 256;

/// Weights on a device: f32, and a copy in bf16 when that is what products read.
pub struct DeviceWeights {
    device: Arc<Device>,
    full: Allocation,
    rounded: Option<Allocation>,
}

impl DeviceWeights {
    /// Copies weights to the device, for products in `elem`.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn upload(device: &Arc<Device>, weights: &[f32], elem: DType) -> Result<Self> {
        let full = device.upload(weights, DType::F32)?;
        let rounded = (elem == DType::Bf16).then(|| device.upload(weights, elem)).transpose()?;
        Ok(DeviceWeights { device: device.clone(), full, rounded })
    }

    /// [`upload`](Self::upload) to where `compute` is; nothing on the CPU.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn upload_to(compute: &Compute, weights: &[f32]) -> Result<Option<Self>> {
        match compute {
            Compute::Cpu { .. } => Ok(None),
            Compute::Cuda { device, elem } => Self::upload(device, weights, *elem).map(Some),
        }
    }

    /// Room for `len` weights, with arbitrary contents.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn planned(device: &Arc<Device>, len: usize, elem: DType) -> Result<Self> {
        let full = device.alloc(len, DType::F32)?;
        let rounded = (elem == DType::Bf16).then(|| device.alloc(len, elem)).transpose()?;
        Ok(DeviceWeights { device: device.clone(), full, rounded })
    }

    /// Replaces the numbers.
    ///
    /// # Errors
    /// When there are more or fewer of them.
    pub fn write(&self, weights: &[f32]) -> Result<()> {
        self.device.write(&self.full, weights)?;
        self.rounded.as_ref().map_or(Ok(()), |rounded| self.device.write(rounded, weights))
    }

    /// All of them in f32.
    pub fn full(&self) -> &Allocation {
        &self.full
    }

    /// All of them as products read them.
    pub fn elem(&self) -> &Allocation {
        self.rounded.as_ref().unwrap_or(&self.full)
    }

    /// The device they are on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

/// What a tape on a device borrows.
pub(super) struct OnDevice<'a> {
    weights: &'a DeviceWeights,
    grads: Grads<'a>,
}

impl OnDevice<'_> {
    pub(super) fn records(&self) -> bool {
        self.grads.is_some()
    }
}

/// The memory of passes on a device.
pub(super) struct DeviceMemory {
    device: Arc<Device>,
    paper: Arc<Device>, // its copy, for dry passes
    at: Arc<Device>,    // what the pass that runs is given to: one of these two, or what captures a graph
    work: Region,
    inputs: Region,
    staging: Option<Staging>, // of the inputs of the next pass
    uploads: Vec<(Buffer, Vec<u8>)>,
    run: Run,
    number: u64,                           // of the pass that ran last
    failed: Option<Error>,                 // of a copy of an input, or for lack of memory
    windows: Vec<(u32, Buffer)>,           // by the start of their handle
    plans: Vec<((u32, Gradient), Buffer)>, // of weights' gradients, for the windows that start there
    replayed: HashMap<u64, Captured>,
}

/// How a pass runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Nothing is launched; inputs are noted.
    Dry,
    /// Inputs are copied where they are asked for: they may depend on what was read before.
    Live,
    /// The inputs were sent to the device before.
    Sent,
}

/// A graph and the memory it was captured with.
struct Captured {
    graph: Option<Graph>,      // None: the driver cannot capture
    memory: [(u64, usize); 5], // address and size of activations, inputs, weights, those that products read, and gradients
}

/// A pass that was staged: its number, which no other has.
#[derive(Clone, Copy)]
pub(crate) struct Staged(u64);

fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// An arena and the memory under it.
struct Region {
    arena: Arena,
    memory: Option<Allocation>,
}

impl Region {
    /// Without memory yet: `base` only keeps addresses of two regions apart.
    fn new(base: u64) -> Self {
        Region { arena: Arena::new(base), memory: None }
    }

    /// Whether all of a buffer lies in what passes took.
    fn holds(&self, buffer: Buffer) -> bool {
        let (offset, peak) = (buffer.address.wrapping_sub(self.arena.base()), self.arena.peak() as u64);
        offset < peak && buffer.len.checked_mul(buffer.dtype.bytes()).is_some_and(|bytes| bytes as u64 <= peak - offset)
    }

    /// Makes room for what the last pass took; says whether the addresses changed.
    fn fit(&mut self, device: &Device) -> Result<bool> {
        let needed = self.arena.peak();
        if self.memory.as_ref().is_some_and(|memory| memory.buffer().len * 4 >= needed) {
            return Ok(false);
        }
        // The old block first: both might not fit.
        self.memory = None;
        let memory = device.alloc(needed.div_ceil(4).max(1), DType::F32)?;
        self.arena = Arena::new(memory.buffer().address);
        self.memory = Some(memory);
        Ok(true)
    }

    fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.buffer().len * 4)
    }
}

impl DeviceMemory {
    pub(super) fn bytes(&self) -> usize {
        self.work.bytes() + self.inputs.bytes() + self.staging.as_ref().map_or(0, Staging::bytes)
    }

    /// Sends the inputs that a dry pass noted.
    fn send(&mut self) -> Result<()> {
        let needed = self.inputs.arena.peak();
        if self.staging.as_ref().is_none_or(|staging| staging.bytes() < needed) {
            self.staging = None;
            self.staging = Staging::new(&self.device, needed)?;
        }
        let (Some(staging), base) = (&mut self.staging, self.inputs.arena.base()) else { return Ok(()) };
        staging.send(&self.device, |room| {
            for (buffer, bytes) in &self.uploads {
                room[(buffer.address - base) as usize..][..bytes.len()].copy_from_slice(bytes);
            }
        })
    }

    /// A buffer in one of the regions. When a pass takes more than was planned, the rest of it runs on paper, and it fails: behind the
    /// region is the memory of others.
    fn take(&mut self, region: impl Fn(&mut Self) -> &mut Region, len: usize, dtype: DType) -> Buffer {
        let region = region(self);
        let buffer = region.arena.take(len, dtype);
        if region.arena.peak() > region.bytes() && self.run != Run::Dry {
            self.fail(Error::usage(
                "a pass took more device memory than it had planned: it must do the same every time",
            ));
        }
        buffer
    }

    /// Ends the launches of a pass, whose result will be the first error.
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
        self.run = Run::Dry;
        self.at = self.paper.clone();
    }

    /// Whether all of a buffer is memory of the pass.
    fn holds(&self, buffer: Buffer) -> bool {
        self.work.holds(buffer) || self.inputs.holds(buffer)
    }

    /// Copies the inputs that were sent to where the kernels read them.
    fn deliver(&self) -> Result<()> {
        let inputs = Buffer {
            address: self.inputs.arena.base(),
            len: self.inputs.arena.peak() / DType::F32.bytes(),
            dtype: DType::F32,
        };
        // SAFETY: there is room for all inputs since they were staged.
        self.staging.as_ref().map_or(Ok(()), |staging| unsafe { staging.deliver(&self.device, inputs) })
    }

    pub(super) fn clear(&mut self) {
        self.work.arena.clear();
        self.inputs.arena.clear();
        self.uploads.clear();
        self.windows.clear();
        self.plans.clear();
    }
}

impl Memory {
    /// A memory for passes on `device`, with activations in `elem` (f32 or bf16).
    pub fn on_device(device: &Arc<Device>, elem: DType) -> Self {
        let cuda = DeviceMemory {
            device: device.clone(),
            paper: Arc::new(device.copy_on_paper()),
            at: device.clone(),
            work: Region::new(1 << 61),
            inputs: Region::new(1 << 62),
            staging: None,
            uploads: Vec::new(),
            run: Run::Dry,
            number: next_number(),
            failed: None,
            windows: Vec::new(),
            plans: Vec::new(),
            replayed: HashMap::new(),
        };
        Memory { elem, cuda: Some(Box::new(cuda)), ..Memory::default() }
    }

    /// Bytes of device memory that passes take for activations and inputs.
    pub fn device_bytes(&self) -> usize {
        self.cuda.as_ref().map_or(0, |cuda| cuda.bytes())
    }

    /// Bytes of device memory for activations and gradients, and for the inputs of one pass.
    pub fn device_parts(&self) -> [usize; 2] {
        self.cuda.as_ref().map_or([0; 2], |cuda| [cuda.work.bytes(), cuda.inputs.bytes()])
    }
}

/// Gradients of the weights, `[P]` f32, and whether to add to them; None for inference.
pub type Grads<'a> = Option<(&'a Allocation, bool)>;

/// The device's part of a memory for passes with these weights.
fn own<'m>(memory: &'m mut Memory, weights: &DeviceWeights) -> Result<&'m mut DeviceMemory> {
    match memory.cuda.as_deref_mut() {
        None => Err(Error::usage("this memory is for passes on the CPU: make it with Memory::on_device")),
        Some(own) if Arc::ptr_eq(&own.device, &weights.device) => Ok(own),
        Some(_) => {
            Err(Error::usage("this memory was made for another device than the weights are on: give both the same Arc"))
        }
    }
}

/// Waits for a device when it is dropped, whatever it says.
struct Wait<'a>(&'a Device);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let _ = self.0.synchronize();
    }
}

/// Runs `work` on a tape whose launches go to `at`, unless the pass is dry.
fn run<R>(
    weights: &DeviceWeights,
    grads: Grads,
    memory: &mut Memory,
    how: Run,
    at: &Arc<Device>,
    work: &mut impl FnMut(&mut Tape) -> Result<R>,
) -> Result<R> {
    memory.clear();
    let own = own(memory, weights)?;
    if let Some((grads, _)) = grads {
        own.device.own(grads)?;
        if [weights.full(), weights.elem()].iter().any(|weights| weights.buffer().address == grads.buffer().address) {
            return Err(Error::usage("gradients cannot be written over the weights: give them memory of their own"));
        }
    }
    (own.run, own.number) = (how, next_number());
    own.at = if how == Run::Dry { own.paper.clone() } else { at.clone() };
    // The bytes of its inputs are kept until the device has read them, also when the work panics.
    let wait = (how == Run::Live).then(|| Wait(at));
    let cuda = Some(OnDevice { weights, grads });
    let found = work(&mut Tape { weights: &[], weight_grads: None, cuda, paused: false, spent: false, memory });
    let done = wait.as_ref().map_or(Ok(()), |wait| wait.0.synchronize());
    match memory.cuda.as_mut().and_then(|own| own.failed.take()) {
        Some(error) => Err(error),
        None => found.and_then(|found| done.map(|()| found)),
    }
}

/// Runs `work` dry and makes room for what it takes.
fn plan<R>(
    weights: &DeviceWeights,
    grads: Grads,
    memory: &mut Memory,
    work: &mut impl FnMut(&mut Tape) -> Result<R>,
) -> Result<R> {
    loop {
        let planned = run(weights, grads, memory, Run::Dry, &weights.device, work)?;
        let own = own(memory, weights)?;
        // A pass that outgrew its memory had addresses beyond it, which may be those of somebody else: what was planned with
        // them counts for nothing, not even its size.
        if ![own.work.fit(&weights.device)?, own.inputs.fit(&weights.device)?].contains(&true) {
            return Ok(planned);
        }
    }
}

/// A pass on a device: `work` is run dry, once or twice, then for real; see the [module](self).
///
/// # Errors
/// Those of `work`, and when the device has not enough memory.
pub fn pass<R>(
    weights: &DeviceWeights,
    grads: Grads,
    memory: &mut Memory,
    mut work: impl FnMut(&mut Tape) -> Result<R>,
) -> Result<R> {
    let planned = plan(weights, grads, memory, &mut work)?;
    match weights.device.is_on_paper() {
        true => Ok(planned),
        false => run(weights, grads, memory, Run::Live, &weights.device, &mut work),
    }
}

/// The first half of a pass that must not read anything: `work` is run dry, and its inputs are sent to the device, which
/// may still be busy with the pass before.
///
/// # Errors
/// As [`pass`].
pub(crate) fn stage<R>(
    weights: &DeviceWeights,
    grads: Grads,
    memory: &mut Memory,
    mut work: impl FnMut(&mut Tape) -> Result<R>,
) -> Result<(R, Staged)> {
    let planned = plan(weights, grads, memory, &mut work)?;
    let own = own(memory, weights)?;
    own.send()?;
    Ok((planned, Staged(own.number)))
}

/// The second half of a pass that was staged: `late` writes the inputs that were not known then, and the kernels of `work` are
/// launched. From the second pass with this `key` on they are replayed as one graph. It returns before the device is done. While
/// launches are timed there is no graph.
///
/// # Safety
/// - `work`, weights and gradients are those that were staged.
/// - Passes on this memory with the same key launch the same kernels with the same arguments, but for what is in their inputs, and for
///   where memory, weights and gradients are; whatever else they use stays where it is for as long as the key is used.
///
/// # Errors
/// As [`pass`], those of `late`, and when the memory ran another pass meanwhile.
pub(crate) unsafe fn launch_staged(
    weights: &DeviceWeights,
    grads: Grads,
    memory: &mut Memory,
    staged: Staged,
    key: u64,
    late: impl FnOnce() -> Result<()>,
    mut work: impl FnMut(&mut Tape) -> Result<()>,
) -> Result<()> {
    let device = weights.device.clone();
    let own = own(memory, weights)?;
    if own.number != staged.0 {
        return Err(Error::usage("the memory of a staged pass ran another one before it was launched"));
    }
    own.number = next_number();
    if device.is_on_paper() {
        return Ok(());
    }
    own.deliver()?;
    late()?;
    if device.times_launches() {
        return run(weights, grads, memory, Run::Sent, &device, &mut work);
    }
    let place = |buffer: Buffer| (buffer.address, buffer.len);
    let region = |region: &Region| (region.arena.base(), region.bytes());
    let gradients = grads.map_or((0, 0), |(grads, _)| place(grads.buffer()));
    let [full, read] = [weights.full(), weights.elem()].map(|weights| place(weights.buffer()));
    let places = [region(&own.work), region(&own.inputs), full, read, gradients];
    if let Some(captured) = own.replayed.get(&key).filter(|captured| captured.memory == places) {
        return match &captured.graph {
            // SAFETY: memory, weights and gradients are where they were when it was captured, and as large; the rest of what its
            // launches are given is the same for passes of one key, as the caller answers for.
            Some(graph) => unsafe { device.replay(graph) },
            None => run(weights, grads, memory, Run::Sent, &device, &mut work),
        };
    }
    // Once by itself, which compiles the kernels, and only then as a graph.
    run(weights, grads, memory, Run::Sent, &device, &mut work)?;
    device.synchronize()?;
    let graph = device.capture(|at| run(weights, grads, memory, Run::Sent, at, &mut work)).ok();
    if let Some(own) = memory.cuda.as_mut() {
        own.replayed.insert(key, Captured { graph, memory: places });
    }
    Ok(())
}

impl Tape<'_> {
    /// Whether the tape computes on a CUDA device.
    pub(crate) fn on_cuda(&self) -> bool {
        self.cuda.is_some()
    }

    fn own(&self) -> &DeviceMemory {
        self.memory.cuda.as_ref().expect("a tape on a device has a memory on it")
    }

    fn own_mut(&mut self) -> &mut DeviceMemory {
        self.memory.cuda.as_mut().expect("a tape on a device has a memory on it")
    }

    fn borrowed(&self) -> &OnDevice<'_> {
        self.cuda.as_ref().expect("only asked of a tape on a device")
    }

    /// Number of all weights, on a device.
    pub(super) fn weights_len_on_cuda(&self) -> Option<usize> {
        self.cuda.as_ref().map(|cuda| cuda.weights.full().buffer().len)
    }

    /// The device that the tape computes on: when the pass is dry, a copy of it on paper. Launches are given the one that is here after
    /// their buffers were taken, since a pass without memory for these goes on on paper.
    pub(crate) fn device(&self) -> Arc<Device> {
        self.own().at.clone()
    }

    /// An input of the pass, copied to the device before it is used.
    pub(crate) fn upload(&mut self, bytes: &[u8], dtype: DType) -> Buffer {
        let own = self.own_mut();
        let buffer = own.take(|own| &mut own.inputs, bytes.len() / dtype.bytes(), dtype);
        match own.run {
            Run::Dry => own.uploads.push((buffer, bytes.to_vec())),
            Run::Live => {
                let bytes = bytes.to_vec();
                // SAFETY: the buffer is in a region that has room for it. The bytes are kept until the pass is over, and its end waits
                // for the stream.
                let written = unsafe { own.device.write_buffer_later(buffer, &bytes) };
                own.uploads.push((buffer, bytes));
                // Kernels must not read windows that are not there.
                written.unwrap_or_else(|error| own.fail(error));
            }
            Run::Sent => {}
        }
        buffer
    }

    /// Room for an input of a staged pass that is only known when the pass is launched.
    pub(crate) fn upload_later(&mut self, len: usize, dtype: DType) -> Buffer {
        self.own_mut().take(|own| &mut own.inputs, len, dtype)
    }

    /// [`Tape::elem`]; f32 on a tape in main memory.
    pub(super) fn elem_if_on_cuda(&self) -> DType {
        if self.on_cuda() { self.elem() } else { DType::F32 }
    }

    /// Numbers as an input of the pass, rounded to `dtype` (f32 or bf16).
    pub(super) fn upload_as(&mut self, numbers: &[f32], dtype: DType) -> Buffer {
        if dtype != DType::Bf16 {
            return self.upload(bytemuck::cast_slice(numbers), DType::F32);
        }
        let rounded: Vec<u16> = numbers.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        self.upload(bytemuck::cast_slice(&rounded), DType::Bf16)
    }

    /// Puts the windows behind a handle on the device.
    pub(super) fn upload_windows(&mut self, windows: Windows) {
        if self.on_cuda() {
            let pairs: Vec<i32> =
                self.get_windows(windows).iter().flat_map(|w| [w.start as i32, w.width as i32]).collect();
            let buffer = self.upload(bytemuck::cast_slice(&pairs), DType::I32);
            self.own_mut().windows.push((windows.start, buffer));
        }
    }

    /// The windows behind a handle: i32 `[B, 2]` of start and width.
    pub(crate) fn window_buffer(&self, windows: Windows) -> Buffer {
        let found = self.own().windows.iter().find(|(start, _)| *start == windows.start);
        found.expect("uploaded when the handle was made").1
    }

    /// How a weight's gradient is shared out for these windows, on the device. Layers of the same sizes and windows have one plan.
    pub(crate) fn plan_buffer(&mut self, windows: Windows, planner: &Planner) -> Buffer {
        let key = (windows.start, planner.gradient);
        let known = self.own().plans.iter().find(|(known, _)| *known == key).map(|(_, plan)| *plan);
        known.unwrap_or_else(|| {
            let words = planner.plan(self.get_windows(windows));
            let plan = self.upload(bytemuck::cast_slice(&words), DType::I32);
            self.own_mut().plans.push((key, plan));
            plan
        })
    }

    /// A buffer of arbitrary contents; give it back with [`Tape::give_buffer`] or [`Tape::push`].
    pub(crate) fn take_buffer(&mut self, len: usize, dtype: DType) -> Buffer {
        self.own_mut().take(|own| &mut own.work, len, dtype)
    }

    /// [`Tape::take_buffer`] for what an operation takes, which is written down in `taken`.
    pub(crate) fn taker(&mut self, taken: &mut Vec<Buffer>) -> impl FnMut(usize, DType) -> Result<Buffer> {
        move |len, dtype| {
            let buffer = self.take_buffer(len, dtype);
            taken.push(buffer);
            Ok(buffer)
        }
    }

    /// Recycles a buffer.
    pub(crate) fn give_buffer(&mut self, buffer: Buffer) {
        let own = self.own_mut();
        // Inputs live as long as the pass, and what is in neither arena is the caller's.
        if own.work.holds(buffer) {
            own.work.arena.give(buffer);
        }
    }

    /// Refuses numbers that are not memory of this pass: what is on the tape, operations take for such.
    ///
    /// # Panics
    /// With others.
    pub(super) fn assert_own(&self, storage: &Storage) {
        if let Storage::Cuda(buffer) = storage {
            assert!(self.own().holds(*buffer), "{buffer:?} is not memory of this pass");
        }
    }

    /// The numbers of an activation on the device: memory of this pass, as many as its shape says.
    pub(crate) fn buffer(&self, var: Var) -> Buffer {
        assert!(!self.is_released(var), "{RELEASED}");
        self.memory.values[var.0 as usize].data.cuda()
    }

    /// A weight as products read it.
    pub(crate) fn weight_buffer(&self, param: Param) -> Buffer {
        self.borrowed().weights.elem().buffer().slice(param.range())
    }

    /// A weight or bias in f32.
    pub(crate) fn full_buffer(&self, param: Param) -> Buffer {
        self.borrowed().weights.full().buffer().slice(param.range())
    }

    /// Whether gradients of weights are added to what is there.
    pub(super) fn adds_on_cuda(&self) -> bool {
        self.cuda.as_ref().and_then(|cuda| cuda.grads).is_some_and(|(_, add)| add)
    }

    /// The gradient of a weight or bias, f32, and whether to add to it.
    pub(crate) fn grad_buffer(&mut self, param: Param) -> (Buffer, bool) {
        self.memory.written.note(param);
        let (grads, add) = self.borrowed().grads.expect("backward runs on a recording tape");
        (grads.buffer().slice(param.range()), add)
    }

    /// Takes the gradient of `var` to add to it, and whether it is still empty (then it must be overwritten).
    /// Return it with [`Tape::put_grad_buffer`].
    pub(crate) fn take_grad_buffer(&mut self, var: Var) -> (Buffer, bool) {
        match self.memory.grads[var.0 as usize].take() {
            Some(grad) => (grad.cuda(), false),
            None => {
                let value = self.buffer(var);
                (self.take_buffer(value.len, value.dtype), true)
            }
        }
    }

    /// [`Tape::take_grad_buffer`], with zeros where it was empty.
    pub(crate) fn take_zeroed_grad_buffer(&mut self, var: Var) -> Result<Buffer> {
        let (grad, fresh) = self.take_grad_buffer(var);
        if fresh {
            // SAFETY: it was taken from this tape.
            unsafe { self.device().fill_buffer(grad, 0) }?;
        }
        Ok(grad)
    }

    /// Stores the gradient of `var`.
    pub(crate) fn put_grad_buffer(&mut self, var: Var, grad: Buffer) {
        assert_eq!(grad.len, self.buffer(var).len, "a gradient is as long as what it is of");
        let grad = Storage::Cuda(grad);
        self.assert_own(&grad);
        self.memory.grads[var.0 as usize] = Some(grad);
    }

    /// Adds `grad` to the gradient of `var`, and takes the buffer.
    pub(crate) fn add_grad_buffer(&mut self, var: Var, grad: Buffer) -> Result<()> {
        let Some(sum) = self.memory.grads[var.0 as usize].take().map(|sum| sum.cuda()) else {
            self.put_grad_buffer(var, grad);
            return Ok(());
        };
        assert_eq!(grad.len, sum.len, "gradients of one activation");
        self.assert_own(&Storage::Cuda(grad));
        let vector = 16 / sum.dtype.bytes();
        let launch = Launch {
            file: "tensor",
            kernel: "tensor_add",
            elem: sum.dtype,
            defines: &[],
            grid: [sum.len.div_ceil(ADD_BLOCK as usize * vector) as u32, 1, 1],
            block: ADD_BLOCK,
            shared: 0,
        };
        // SAFETY: memory of this pass, and as long as it says.
        unsafe { self.device().launch(&launch, &[sum.into(), grad.into(), Arg::U64(sum.len as u64)]) }?;
        self.put_grad_buffer(var, sum);
        self.give_buffer(grad);
        Ok(())
    }
}
