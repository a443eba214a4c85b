//! The fused kernels as a library, without the trainer: half a block, forward and backward, on device memory of one's own.
//!
//! ```text
//! x --ln_linear--> qkv --attention--> a --linear_residual (base x)--> y          dy --> .. --> dx, dWqkv, dWproj
//! ```
//!
//! Every sample reads its own window of channels: what a window leaves out is not computed, forward or backward, and the
//! result is that of masking `x` and computing everything, as the plain loops of `dtr_fused::ops::*::reference` do, with
//! which it is compared here.
//!
//! ```sh
//! cargo run --release --example fused_ops
//! ```
//!
//! needs a driver and NVRTC 13 (`scripts/fetch-nvrtc`, then `DTR_NVRTC_FOLDER=target/nvrtc`). Without a GPU:
//! `cargo build --release -p cuda-sim-driver --example cuda`, then `DTR_CUDA_LIBRARY=target/release/examples/libcuda.so`.

use dtr_fused::backend::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use dtr_fused::backend::cuda::{Allocation, Buffer, DType, Device, Element, load_driver};
use dtr_fused::ops::ln_linear::Activation;
use dtr_fused::ops::{attention, linear_residual, ln_linear};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::routing::Window;
use half::bf16;
use std::cell::RefCell;
use std::error::Error;
use std::sync::Arc;

const B: usize = 2;
const T: usize = 24;
const C: usize = 64;
const HEADS: usize = 2;

/// Everything that goes in. Matrices and activations are bf16, vectors f32.
struct Host {
    x: Vec<bf16>,         // [B, T, C]
    w_qkv: Vec<bf16>,     // [3C, C]
    w_proj: Vec<bf16>,    // [C, C]
    b_qkv: Vec<f32>,      // [3C]
    b_proj: Vec<f32>,     // [C]
    vectors: Vec<f32>,    // [B, 3, C]: shift, scale, gate of each sample
    windows: [Window; B], // the channels that are read
    dy: Vec<bf16>,        // [B, T, C]: gradient of the output
}

/// What comes out: y `[B, T, C]`, dx `[B, T, C]`, dWqkv `[3C, C]`, dWproj `[C, C]`.
type Results = [Vec<f64>; 4];

pub fn main() -> Result<(), Box<dyn Error>> {
    // Finds libcuda, also where DTR_CUDA_LIBRARY says; before the first call of cudarc.
    load_driver()?;
    let context = CudaContext::new(0)?;
    let host = numbers();
    let found = on_device(context.new_stream()?, &host)?;
    let expected = plain_loops(&host);
    for ((name, found), expected) in ["y", "dx", "dWqkv", "dWproj"].into_iter().zip(&found).zip(&expected) {
        let largest = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        let error = found.iter().zip(expected).fold(0.0f64, |max, (f, e)| max.max((f - e).abs())) / largest;
        println!("{name:<7} {:>6} numbers, largest difference {error:.1e} of the largest number", found.len());
        // bf16 has 8 bits: results of a chain of products are this near. (NaN is not near.)
        let near = error <= 0.03;
        if !near || found.len() != expected.len() {
            return Err(format!("{name} is wrong").into());
        }
    }
    Ok(())
}

/// The kernels, on memory that is allocated here.
fn on_device(stream: Arc<CudaStream>, host: &Host) -> Result<Results, Box<dyn Error>> {
    // All kernels run on the caller's stream, in order with the caller's own work.
    let device = Device::on_stream(stream.clone())?;
    let windows: Vec<i32> = host.windows.iter().flat_map(|w| [w.start as i32, w.width as i32]).collect(); // [B, 2]
    let everything: Vec<i32> = host.windows.iter().flat_map(|_| [0, C as i32]).collect();

    let x = stream.clone_htod(&host.x)?;
    let [w_qkv, w_proj] = [stream.clone_htod(&host.w_qkv)?, stream.clone_htod(&host.w_proj)?];
    let [b_qkv, b_proj] = [stream.clone_htod(&host.b_qkv)?, stream.clone_htod(&host.b_proj)?];
    let vectors = stream.clone_htod(&host.vectors)?;
    let [windows, everything] = [stream.clone_htod(&windows)?, stream.clone_htod(&everything)?];
    let dy = stream.clone_htod(&host.dy)?;

    // A buffer is an address, a length and a type: what the kernels are promised, in each `unsafe` below, is that the memory behind it lives,
    // as all does to the end of this function, which waits for all work.
    let room = Room { device: &device, stream: &stream, held: RefCell::default() };
    let take = |len, dtype| room.take(len, dtype);
    let (x, dy) = (room.of(&x)?, room.of(&dy)?);
    let vectors = room.of(&vectors)?;
    let column = |index: usize| vectors.slice(index * C..vectors.len()); // of every sample, `3 * C` apart
    let (windows, everything) = (room.of(&windows)?, room.of(&everything)?);

    // Forward. Each operation says which tensors its backward pass reads again.
    let qkv_dims = ln_linear::cuda::Dims { b: B, t: T, c: C, n: 3 * C };
    let inputs = ln_linear::cuda::Inputs {
        x,
        windows,
        full: false,
        modulation: ln_linear::cuda::Modulation { shift: column(0), scale: column(1), stride: 3 * C },
        weight: room.of(&w_qkv)?,
    };
    let qkv = room.bf16(B * T * 3 * C)?;
    let saved = ln_linear::cuda::Saved::take(qkv_dims, DType::Bf16, false, take)?;
    let no_gelu = Buffer::none(DType::Bf16);
    let bias = room.of(&b_qkv)?;
    let of_qkv = room.of(&qkv)?;
    // SAFETY: the slices live; windows are inside of the channels, and not all of them.
    unsafe { ln_linear::cuda::forward(&device, of_qkv, no_gelu, saved, inputs, bias, Activation::None, qkv_dims) }?;

    let heads = attention::cuda::Dims { b: B, t: T, c: C, heads: HEADS };
    let (a, lse) = (room.bf16(B * T * C)?, room.f32(B * HEADS * T)?);
    // SAFETY: the slices live.
    unsafe { attention::cuda::forward(&device, room.of(&a)?, room.of(&lse)?, of_qkv, heads) }?;

    let proj_dims = linear_residual::cuda::Dims { b: B, t: T, k: C, c: C };
    let proj_inputs = linear_residual::cuda::Inputs {
        a: room.of(&a)?,
        weight: room.of(&w_proj)?,
        gate: linear_residual::cuda::Gate { gate: column(2), stride: 3 * C },
        windows: linear_residual::cuda::Windows { base: windows, bypass: Buffer::none(DType::I32), write: everything },
    };
    let (y, z) = (room.bf16(B * T * C)?, room.bf16(B * T * C)?);
    let no_bypass = Buffer::none(DType::Bf16);
    let residual = linear_residual::cuda::Residual { base: x, bypass: no_bypass };
    let (of_y, of_z, bias) = (room.of(&y)?, room.of(&z)?, room.of(&b_proj)?);
    // SAFETY: the slices live; windows are inside of the channels.
    unsafe { linear_residual::cuda::forward(&device, of_y, of_z, proj_inputs, bias, residual, proj_dims) }?;

    // Backward, in reverse. Gradients of shift, scale and gate are added to, so they start at 0.
    let dvectors = stream.alloc_zeros::<f32>(B * 3 * C)?;
    let dcolumn = |index: usize| room.of(&dvectors).map(|all| all.slice(index * C..all.len()));
    let (dx, da) = (room.bf16(B * T * C)?, room.bf16(B * T * C)?);
    let (dw_proj, db_proj) = (room.f32(C * C)?, room.f32(C)?);
    // The gradients of weights are shared out evenly, for the windows at hand.
    let plan = linear_residual::cuda::plan(&device, DType::Bf16, proj_dims, &[Window::all(C); B])?;
    let plan = stream.clone_htod(&plan)?;
    let grads = linear_residual::cuda::Gradients {
        da: room.of(&da)?,
        dgate: dcolumn(2)?,
        dbase: room.of(&dx)?,
        fresh_base: true,
        dbypass: no_bypass,
        fresh_bypass: false,
        dweight: room.of(&dw_proj)?,
        dbias: room.of(&db_proj)?,
        add: false,
    };
    let scratch = linear_residual::cuda::Scratch::take(&device, proj_dims, DType::Bf16, room.of(&plan)?, take)?;
    let of_forward = linear_residual::cuda::Saved { z: of_z, pre: no_gelu };
    // SAFETY: as forward; the plan is made of the windows that are written.
    unsafe { linear_residual::cuda::backward(&device, grads, scratch, dy, proj_inputs, of_forward, proj_dims) }?;

    let dqkv = room.bf16(B * T * 3 * C)?;
    let [of_dqkv, of_da] = [room.of(&dqkv)?, room.of(&da)?];
    // SAFETY: the slices live.
    unsafe { attention::cuda::backward(&device, of_dqkv, of_da, of_qkv, room.of(&a)?, room.of(&lse)?, heads) }?;

    let (dw_qkv, db_qkv) = (room.f32(3 * C * C)?, room.f32(3 * C)?);
    let plan = ln_linear::cuda::plan(&device, DType::Bf16, qkv_dims, &host.windows, false)?;
    let plan = stream.clone_htod(&plan)?;
    let grads = ln_linear::cuda::Gradients {
        dx: room.of(&dx)?,
        fresh_dx: false, // on top of the residual's
        dshift: dcolumn(0)?,
        dscale: dcolumn(1)?,
        dweight: room.of(&dw_qkv)?,
        dbias: room.of(&db_qkv)?,
        add: false,
    };
    let scratch = ln_linear::cuda::Scratch::take(&device, qkv_dims, DType::Bf16, false, room.of(&plan)?, take)?;
    // SAFETY: as forward; the plan is made of the windows that were read.
    unsafe { ln_linear::cuda::backward(&device, grads, scratch, of_dqkv, inputs, saved, qkv_dims) }?;

    // Reading waits for the kernels: it is work of the same stream.
    let narrow = |slice: &CudaSlice<bf16>| Ok::<_, Box<dyn Error>>(wide(&stream.clone_dtoh(slice)?));
    let full = |slice: &CudaSlice<f32>| Ok::<_, Box<dyn Error>>(cast(&stream.clone_dtoh(slice)?));
    Ok([narrow(&y)?, narrow(&dx)?, full(&dw_qkv)?, full(&dw_proj)?])
}

/// New memory for kernels to write to.
struct Room<'a> {
    device: &'a Device,
    stream: &'a Arc<CudaStream>,
    held: RefCell<Vec<Allocation>>, // what operations asked for
}

impl Room<'_> {
    fn bf16(&self, len: usize) -> Result<CudaSlice<bf16>, Box<dyn Error>> {
        // SAFETY: every bit pattern is a bf16, and kernels write the memory before anything reads it.
        Ok(unsafe { self.stream.alloc(len) }?)
    }

    fn f32(&self, len: usize) -> Result<CudaSlice<f32>, Box<dyn Error>> {
        // SAFETY: every bit pattern is an f32, and kernels write the memory before anything reads it.
        Ok(unsafe { self.stream.alloc(len) }?)
    }

    /// What an operation asks for.
    fn take(&self, len: usize, dtype: DType) -> dtr_fused::Result<Buffer> {
        let memory = self.device.alloc(len, dtype)?;
        let buffer = memory.buffer();
        self.held.borrow_mut().push(memory);
        Ok(buffer)
    }

    fn of<N: Element>(&self, slice: &CudaSlice<N>) -> dtr_fused::Result<Buffer> {
        self.device.buffer(slice)
    }
}

/// The same with the plain loops, in f64.
fn plain_loops(host: &Host) -> Results {
    let [x, w_qkv, w_proj, dy] = [&host.x, &host.w_qkv, &host.w_proj, &host.dy].map(|n| wide(n));
    let [b_qkv, b_proj, vectors] = [&host.b_qkv, &host.b_proj, &host.vectors].map(|n| cast(n));
    let column = |index: usize| -> Vec<f64> {
        vectors.chunks_exact(3 * C).flat_map(|of_sample| of_sample[index * C..][..C].to_vec()).collect()
    };
    let [shift, scale, gate] = [0, 1, 2].map(column);
    let first = ln_linear::reference::Inputs {
        x: &x,
        read: &host.windows,
        shift: &shift,
        scale: &scale,
        weight: &w_qkv,
        bias: &b_qkv,
        activation: Activation::None,
        tokens: T,
        channels: C,
    };
    let heads = attention::Dims { b: B, t: T, c: C, heads: HEADS };
    let qkv = ln_linear::reference::forward(&first);
    let a = attention::reference::forward(&qkv, heads);
    let last = linear_residual::reference::Inputs {
        a: &a,
        weight: &w_proj,
        bias: &b_proj,
        gate: &gate,
        base: &x,
        base_window: &host.windows,
        bypass: None,
        write: &[Window::all(C); B],
        tokens: T,
    };
    let y = linear_residual::reference::forward(&last);
    let of_last = linear_residual::reference::backward(&last, &dy);
    let dqkv = attention::reference::backward(&qkv, &of_last.da, heads);
    let of_first = ln_linear::reference::backward(&first, &dqkv);
    let dx = of_last.dbase.iter().zip(&of_first.dx).map(|(a, b)| a + b).collect();
    [y, dx, of_first.dweight, of_last.dweight]
}

fn numbers() -> Host {
    let random = |number: u64, len: usize, size: f32| -> Vec<f32> {
        let mut numbers = vec![0.0; len];
        Philox::new(7, Stream::Init).normal(&mut numbers, number, 0);
        numbers.iter().map(|x| x * size).collect()
    };
    let narrow = |number, len, size| random(number, len, size).into_iter().map(bf16::from_f32).collect();
    let of_weights = 1.0 / (C as f32).sqrt();
    Host {
        x: narrow(1, B * T * C, 1.0),
        w_qkv: narrow(2, 3 * C * C, of_weights),
        w_proj: narrow(3, C * C, of_weights),
        b_qkv: random(4, 3 * C, 0.1),
        b_proj: random(5, C, 0.1),
        vectors: random(6, B * 3 * C, 0.5),
        windows: [Window { start: 0, width: 51 }, Window { start: 7, width: 32 }],
        dy: narrow(7, B * T * C, 1.0),
    }
}

fn wide(numbers: &[bf16]) -> Vec<f64> {
    numbers.iter().map(|x| x.to_f64()).collect()
}

fn cast(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| f64::from(x)).collect()
}
