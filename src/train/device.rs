//! A learner's numbers on a CUDA device, and a whole training step there: noise, forward, loss, backward, update.
//!
//! The step is one pass of a tape ([`crate::autograd::cuda`]) for each part of the batch, replayed as one graph from the second
//! time on. The host sends images, labels and timesteps, and gets back the losses, the norm of the gradients and whether the
//! update was made. It does so without waiting:
//!
//! ```text
//! host     stage 0 | launch 0 | stage 1 | collect 0 | launch 1 | stage 2 | ..
//! device             inputs, kernels, update ..... | inputs, kernels, update ..
//! ```

use super::learner::{Batch, Losses};
use super::optimizer::Update;
use crate::autograd::cuda::{DeviceWeights, Staged, launch_staged, stage};
use crate::autograd::{Memory, Tape};
use crate::backend::cuda::transfer::Mail;
use crate::backend::cuda::{Allocation, Arg, Buffer, DType, Device, Launch};
use crate::diffusion::loss::Step;
use crate::diffusion::{ImageDims, LossWeight, Schedule};
use crate::error::{Error, Result};
use crate::model::dit::Dit;
use crate::ops::check;
use crate::ops::cuda::tile::check_counts;
use crate::rng::Stream;
use crate::tensor::Storage;
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A gradient of this norm counts as not finite, even where clipping would shrink it: from 1.8e19 on its square does not fit the second
/// moment, which is f32.
pub const LARGEST_NORM: f64 = 1e18;

/// Numbers of a sample that `kernels/diffusion_loss.cu` reads, in its order.
const STEP_NUMBERS: usize = 11;
/// Blocks that sum the squares of the gradients: fixed, so that the sum is too.
const NORM_BLOCKS: usize = 1024;
const THREADS: usize = 256;
const OP: &str = "training step";
/// Parameters that one thread of the update takes.
const AT_ONCE: usize = 4;

/// Noise that the device draws: that of `samples` (numbers in the batch) at `step`.
#[derive(Clone, Copy, Debug)]
pub struct DrawnNoise<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// `[B]`
    pub samples: &'a [u32],
}

/// What the device decided about an update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// L2 norm of the gradients, before clipping.
    pub norm: f64,
    /// Whether the update was made: losses and gradients were finite.
    pub updated: bool,
}

/// How an update is made.
#[derive(Clone, Copy, Debug)]
pub struct DeviceUpdate {
    /// As on the CPU; `grad_scale` is decided on the device.
    pub update: Update,
    /// Largest norm of the gradients; 0 for no clipping.
    pub clip: f64,
}

/// What a pass does besides losses and gradients.
#[derive(Clone, Copy, Debug)]
pub struct How<'a> {
    /// Noise that the device draws; None for the batch's own.
    pub drawn: Option<DrawnNoise<'a>>,
    /// Whether gradients are added to those of the pass before.
    pub add: bool,
    /// Whether an update follows.
    pub updates: bool,
}

impl How<'_> {
    /// Passes over `b` samples with the same number launch the same kernels with the same sizes, and share a graph. Of the model that
    /// takes its configuration, which anybody may change, and which one it is: its parts are as they were made.
    fn number(&self, b: usize, dit: &Dit) -> u64 {
        let seed = self.drawn.map(|drawn| drawn.seed);
        let config = format!("{:?}", dit.config);
        let mut hasher = std::hash::DefaultHasher::new();
        (b, self.add, self.updates, seed, dit.number(), config, dit.checkpoint_activations).hash(&mut hasher);
        hasher.finish()
    }
}

/// States made so far.
static MADE: AtomicU64 = AtomicU64::new(0);

/// Where a staged pass has its late inputs and its results.
#[derive(Clone, Copy)]
struct Places {
    steps: Buffer,                    // [B, STEP_NUMBERS]
    losses: Buffer,                   // [3, B]
    update: Option<(Buffer, Buffer)>, // factors, and the decision [3]
}

/// Weights, moving average, moments and gradients on a device, each `[P]`.
pub struct DeviceState {
    weights: DeviceWeights,
    ema: Allocation,
    m: Allocation,
    v: Allocation,
    grads: Allocation,
    number: u64,                           // no two states have the same
    staged: Option<(Places, Staged, u64)>, // with the key of its graph
    mail: VecDeque<Mail>,
    under_way: VecDeque<(Mail, usize, bool)>, // with the number of samples, and whether an update follows
}

impl DeviceState {
    /// Copies `weights` to the device; they are their own average, and the moments are zero.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn new(device: &Arc<Device>, elem: DType, weights: &[f32]) -> Result<Self> {
        let [ema, m, v, grads] = [(); 4].map(|()| device.alloc(weights.len(), DType::F32));
        let state = Self::with(DeviceWeights::upload(device, weights, elem)?, [ema?, m?, v?, grads?])?;
        device.copy(&state.ema, state.weights.full())?;
        for moments in [&state.m, &state.v] {
            device.fill_bytes(moments, 0)?;
        }
        Ok(state)
    }

    /// Room for a model of `len` parameters, with arbitrary contents: to plan with.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn planned(device: &Arc<Device>, elem: DType, len: usize) -> Result<Self> {
        let [ema, m, v, grads] = [(); 4].map(|()| device.alloc(len, DType::F32));
        Self::with(DeviceWeights::planned(device, len, elem)?, [ema?, m?, v?, grads?])
    }

    fn with(weights: DeviceWeights, [ema, m, v, grads]: [Allocation; 4]) -> Result<Self> {
        let (mail, under_way) = Default::default();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        Ok(DeviceState { weights, ema, m, v, grads, number, staged: None, mail, under_way })
    }

    /// The weights, also as products read them.
    pub fn weights(&self) -> &DeviceWeights {
        &self.weights
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        self.weights.device()
    }

    /// Copies everything from main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn write(&self, weights: &[f32], rest: [&[f32]; 3]) -> Result<()> {
        self.weights.write(weights)?;
        for (to, from) in [&self.ema, &self.m, &self.v].into_iter().zip(rest) {
            self.device().write(to, from)?;
        }
        Ok(())
    }

    /// Copies everything to main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self, weights: &mut [f32], rest: [&mut [f32]; 3]) -> Result<()> {
        let device = self.device();
        self.read_weights(weights)?;
        let [ema, m, v] = rest;
        self.read_ema(ema)?;
        device.read_bytes(bytemuck::cast_slice_mut(m), &self.m)?;
        device.read_bytes(bytemuck::cast_slice_mut(v), &self.v)
    }

    /// Copies the weights to main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_weights(&self, weights: &mut [f32]) -> Result<()> {
        self.device().read_bytes(bytemuck::cast_slice_mut(weights), self.weights.full())
    }

    /// Copies the moving average to main memory.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_ema(&self, ema: &mut [f32]) -> Result<()> {
        self.device().read_bytes(bytemuck::cast_slice_mut(ema), &self.ema)
    }

    /// The gradients of the last step, `[P]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        self.device().download(&self.grads)
    }

    /// Plans a pass over `batch` (all but its coefficients) and sends its inputs, while the device may still be busy with the
    /// pass before.
    ///
    /// # Errors
    /// When sizes do not fit, a timestep or label is out of range, or the device fails.
    pub fn stage(&mut self, dit: &Dit, memory: &mut Memory, batch: Batch, how: How) -> Result<()> {
        let (key, grads) = (self.key(how, batch.t.len(), dit), Some((&self.grads, how.add)));
        self.staged = None;
        let (places, staged) = stage(&self.weights, grads, memory, |tape| self.pass(tape, dit, batch, how))?;
        self.staged = Some((places, staged, key));
        Ok(())
    }

    /// What passes have in common that make the same launches: also the moments and the average that an update changes.
    fn key(&self, how: How, b: usize, dit: &Dit) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        (self.number, how.number(b, dit)).hash(&mut hasher);
        hasher.finish()
    }

    /// Starts the pass that was staged last, over the same `batch`, and returns before it is done. The number of an update counts from 1:
    /// it corrects the bias of the moments.
    ///
    /// # Errors
    /// When coefficients are missing, a timestep is out of range, nothing was staged, or of another size, model or memory, an update is
    /// missing or not expected, or the device fails.
    ///
    /// # Panics
    /// When the number of the update is 0.
    #[expect(clippy::too_many_arguments, reason = "what, how, and of which model")]
    pub fn launch(
        &mut self,
        dit: &Dit,
        schedule: &Schedule,
        loss_weight: LossWeight,
        memory: &mut Memory,
        batch: Batch,
        how: How,
        update: Option<(DeviceUpdate, u64)>,
    ) -> Result<()> {
        let refused = |what| Err(Error::Shape { operation: OP, what });
        if how.updates != update.is_some() {
            let given = if update.is_some() { "an update" } else { "none" };
            return refused(format!("how.updates is {}, but {given} is given", how.updates));
        }
        if batch.coefficients.len() != batch.t.len() {
            return refused(format!("{} coefficients for {} samples", batch.coefficients.len(), batch.t.len()));
        }
        if let Some(t) = batch.t.iter().find(|&&t| t as usize >= schedule.len()) {
            return refused(format!("timestep {t} is outside the noise schedule of {} steps", schedule.len()));
        }
        let key = self.key(how, batch.t.len(), dit);
        let Some((places, staged, _)) = self.staged.take().filter(|(.., of_staged)| *of_staged == key) else {
            return refused("a pass is launched that was not staged".into());
        };
        let steps = steps(schedule, loss_weight, batch);
        let factors_of =
            |(how, number): (DeviceUpdate, u64)| how.update.factors(number).into_iter().chain([how.clip as f32]);
        let factors: Vec<f32> = update.into_iter().flat_map(factors_of).collect();
        let mut late = vec![(places.steps, bytemuck::cast_slice(&steps))];
        late.extend(places.update.map(|(factors_at, _)| (factors_at, bytemuck::cast_slice(&factors))));
        let mut results = vec![places.losses];
        results.extend(places.update.map(|(_, decision)| decision));

        let device = self.device().clone();
        let bytes = |buffers: &mut dyn Iterator<Item = Buffer>| buffers.map(|b| b.len * b.dtype.bytes()).sum::<usize>();
        let [out, back] = [bytes(&mut late.iter().map(|l| l.0)), bytes(&mut results.iter().copied())];
        let mut mail = match self.mail.pop_front().filter(|mail| mail.holds(out, back)) {
            Some(mail) => Some(mail),
            None => Mail::new(&device, out, back)?,
        };
        let grads = Some((&self.grads, how.add));
        // SAFETY: the memory, which `launch_staged` sees to, holds the places of the pass that was staged; mail that is not new was
        // waited for.
        let send = || mail.as_mut().map_or(Ok(()), |mail| unsafe { mail.send(&device, &late) });
        // SAFETY: what was staged had this key, which tells state, model, how, and number of samples. They decide which kernels `pass`
        // launches with which sizes, and what of this state they use, whose allocations never change; batches differ in their inputs.
        unsafe {
            launch_staged(&self.weights, grads, memory, staged, key, send, |tape| {
                self.pass(tape, dit, batch, how).map(|_| ())
            })
        }?;
        if let Some(mut mail) = mail {
            // SAFETY: as of `send`.
            unsafe { mail.ask(&device, &results) }?;
            self.under_way.push_back((mail, batch.t.len(), how.updates));
        }
        Ok(())
    }

    /// Waits for every pass that was launched: their losses, one after the other, and what became of the update.
    ///
    /// # Errors
    /// When the device failed.
    pub fn collect(&mut self, found: &mut Losses) -> Result<Option<Decision>> {
        for losses in [&mut found.mse, &mut found.vb, &mut found.loss] {
            losses.clear();
        }
        let mut decision = None;
        while let Some((mail, b, updates)) = self.under_way.pop_front() {
            let bytes = mail.wait()?;
            let (losses, rest) = bytes.split_at(3 * b * size_of::<f32>());
            let terms: Vec<f32> = bytemuck::pod_collect_to_vec(losses);
            for (to, from) in [&mut found.mse, &mut found.vb, &mut found.loss].into_iter().zip(terms.chunks_exact(b)) {
                to.extend_from_slice(from);
            }
            if updates {
                let numbers: Vec<f64> = bytemuck::pod_collect_to_vec(&rest[..3 * size_of::<f64>()]);
                decision = Some(Decision { norm: numbers[0], updated: numbers[2] == 0.0 });
            }
            self.mail.push_back(mail);
        }
        Ok(decision)
    }

    /// What the kernels of a pass do.
    fn pass(&self, tape: &mut Tape, dit: &Dit, batch: Batch, how: How) -> Result<Places> {
        let config = &dit.config;
        let (b, side, channels) = (batch.t.len(), config.input_size, config.in_channels);
        let dims = ImageDims { channels, pixels: side * side, learn_sigma: config.learn_sigma };
        let n = dims.elements();
        let noise_len = how.drawn.map_or(batch.noise.len(), |drawn| drawn.samples.len() * n);
        check(batch.x_start.len() == b * n && noise_len == b * n, OP, || {
            format!("{b} samples of {n} with {} pixels and {noise_len} of noise", batch.x_start.len())
        })?;
        check_counts(OP, &[b, n])?;
        let sizes = [Arg::I32(b as i32), Arg::I32(n as i32)];
        let elem = tape.elem();
        let launch = |tape: &Tape, kernel, len: usize, args: &[Arg]| {
            let grid = [len.div_ceil(THREADS) as u32, 1, 1];
            let block = THREADS as u32;
            let launch = Launch { file: "diffusion_loss", kernel, elem, defines: &[], grid, block, shared: 0 };
            // SAFETY: all is memory of this pass. Images, noise and the model's output were checked to be `[B, n]`, the latter
            // `[B, parts, n]`; the rest is taken here, as large as the kernels say.
            unsafe { tape.device().launch(&launch, args) }
        };
        let x_start = tape.upload(bytemuck::cast_slice(batch.x_start), DType::F32);
        let steps = tape.upload_later(b * STEP_NUMBERS, DType::F64);
        let noise = match how.drawn {
            None => tape.upload(bytemuck::cast_slice(batch.noise), DType::F32),
            Some(DrawnNoise { seed, step, samples }) => {
                let counters: Vec<u32> = [step as u32].iter().chain(samples).copied().collect();
                let counters = tape.upload(bytemuck::cast_slice(&counters), DType::U32);
                let noise = tape.take_buffer(b * n, DType::F32);
                let [low, high] = [seed as u32, (seed >> 32) as u32].map(Arg::U32);
                let args = [noise.into(), counters.into(), low, high, Arg::U32(Stream::Noise as u32)];
                let args = [&args[..], &sizes].concat();
                launch(tape, "diffusion_loss_noise", b * n.div_ceil(4), &args)?;
                noise
            }
        };
        let x_t = tape.take_buffer(b * n, DType::F32);
        let args = [&[x_t.into(), x_start.into(), noise.into(), steps.into()], &sizes[..]].concat();
        launch(tape, "diffusion_loss_q_sample", b * n, &args)?;
        let x_t = tape.push([b, channels, side, side], x_t, false);
        let out = dit.forward(tape, x_t, batch.t, batch.labels)?;
        let found = tape.buffer(out).len;
        check(found == b * dims.out_elements(), OP, || {
            format!("the model has {found} outputs for {b} samples of {}", dims.out_elements())
        })?;

        let losses = tape.take_buffer(3 * b, DType::F32);
        let d_out = tape.take_buffer(b * dims.out_elements(), DType::F32);
        let inputs = [tape.buffer(out).into(), x_start.into(), noise.into(), steps.into()];
        let parts = [Arg::I32(if dims.learn_sigma { 2 } else { 1 })];
        let args = [&[losses.into(), d_out.into()], &inputs[..], &parts, &sizes].concat();
        launch(tape, "diffusion_loss", b * THREADS, &args)?;
        tape.backward_from(out, Storage::Cuda(d_out))?;

        if !how.updates {
            return Ok(Places { steps, losses, update: None });
        }
        let parts = tape.take_buffer(NORM_BLOCKS, DType::F64);
        let decision = tape.take_buffer(3, DType::F64);
        let factors = tape.upload_later(Update::FACTORS + 1, DType::F32);
        // SAFETY: memory of this pass, taken in these sizes.
        unsafe { self.update(&tape.device(), elem, losses, [parts, decision, factors]) }?;
        Ok(Places { steps, losses, update: Some((factors, decision)) })
    }

    /// Norm, decision and update (`kernels/adamw.cu`).
    ///
    /// # Safety
    /// The buffers are as [`Buffer`] says: losses, one part for each of `NORM_BLOCKS`, 3 numbers of the decision, and the factors.
    unsafe fn update(
        &self,
        device: &Device,
        elem: DType,
        losses: Buffer,
        [parts, decision, factors]: [Buffer; 3],
    ) -> Result<()> {
        let grads = self.grads.buffer();
        let len = Arg::U64(grads.len as u64);
        let launch = |kernel, blocks: usize, args: &[Arg]| {
            let (grid, block) = ([blocks as u32, 1, 1], THREADS as u32);
            let launch = Launch { file: "adamw", kernel, elem, defines: &[], grid, block, shared: 0 };
            // SAFETY: the caller answers for the buffers that it gives; weights, average, moments and gradients are this state's, and all
            // of one length, since it was made.
            unsafe { device.launch(&launch, args) }
        };
        launch("adamw_norm", NORM_BLOCKS, &[parts.into(), grads.into(), len])?;
        let counts = [Arg::I32(NORM_BLOCKS as i32), Arg::I32(losses.len as i32)];
        let args = [decision.into(), parts.into(), losses.into(), factors.into(), Arg::F64(LARGEST_NORM)];
        launch("adamw_decide", 1, &[&args[..], &counts].concat())?;
        let rounded = if elem == DType::Bf16 { self.weights.elem().buffer() } else { Buffer::none(elem) };
        let numbers =
            [self.weights.full().buffer(), rounded, self.ema.buffer(), self.m.buffer(), self.v.buffer(), grads];
        let args: Vec<Arg> = numbers.into_iter().chain([factors, decision]).map(Arg::Buffer).chain([len]).collect();
        launch("adamw", grads.len.div_ceil(AT_ONCE * THREADS), &args)
    }
}

/// What the timestep of each sample says, `[B, STEP_NUMBERS]`.
fn steps(schedule: &Schedule, loss_weight: LossWeight, batch: Batch) -> Vec<f64> {
    let mut steps = Vec::with_capacity(batch.t.len() * STEP_NUMBERS);
    for (&t, &coefficient) in batch.t.iter().zip(batch.coefficients) {
        let t = t as usize;
        let Step { first, target, mean_factor, precision, min_log, range } = Step::new(schedule, t);
        steps.extend([
            schedule.signal(t),
            schedule.spread(t),
            target.0,
            target.1,
            mean_factor,
            precision,
            min_log,
            range,
            loss_weight.weight(schedule, t),
            coefficient,
            f64::from(u8::from(first)),
        ]);
    }
    steps
}
