//! End to end: kernels compiled by NVRTC, run by cudarc through `libcuda.so`, compared with the CPU.

mod common;

use common::kernels::{ALL, Arg, Gpu};
use common::{compile, own_process};
use cudarc::driver::{CudaContext, CudaModule, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};
use std::sync::Arc;

struct Cudarc {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

enum Value {
    Buffer(CudaSlice<u8>, bool),
    Int(i32),
    Float(f32),
}

impl Gpu for Cudarc {
    fn run(&mut self, kernel: &str, grid: [u32; 3], block: [u32; 3], args: &[Arg]) -> Vec<Vec<u8>> {
        let function = self.module.load_function(kernel).unwrap();
        let mut values: Vec<Value> = args
            .iter()
            .map(|a| match a {
                Arg::In(bytes) => Value::Buffer(self.stream.clone_htod(bytes).unwrap(), false),
                // SAFETY: the kernel writes all of it, and the simulator reports bytes that it left out.
                Arg::Out(n) => Value::Buffer(unsafe { self.stream.alloc(*n) }.unwrap(), true),
                Arg::Int(v) => Value::Int(*v),
                Arg::Float(v) => Value::Float(*v),
            })
            .collect();
        let mut launch = self.stream.launch_builder(&function);
        for value in &mut values {
            match value {
                Value::Buffer(b, _) => launch.arg(b),
                Value::Int(v) => launch.arg(&*v),
                Value::Float(v) => launch.arg(&*v),
            };
        }
        let config = LaunchConfig { grid_dim: grid.into(), block_dim: block.into(), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel's header, in order.
        unsafe { launch.launch(config) }.unwrap();
        let out = values.iter().filter_map(|v| match v {
            Value::Buffer(b, true) => Some(self.stream.clone_dtoh(b).unwrap()),
            _ => None,
        });
        let out = out.collect();
        self.stream.synchronize().unwrap();
        out
    }
}

fn all(test: &str, arch: &'static str, variables: &[(&str, &str)], own_stream: bool) {
    own_process(test, variables, || {
        let context = CudaContext::new(0).unwrap();
        for kernels in &ALL {
            let module = context.load_module(compile(kernels.source, arch, &[]).into()).unwrap();
            let stream = if own_stream { context.new_stream().unwrap() } else { context.default_stream() };
            (kernels.check)(&mut Cudarc { stream, module });
        }
    });
}

#[test]
fn kernels_on_the_default_stream() {
    all("kernels_on_the_default_stream", "compute_80", &[], false);
}

#[test]
fn kernels_on_a_new_stream_in_another_order() {
    all("kernels_on_a_new_stream_in_another_order", "compute_80", &[("CUDA_SIM_SEED", "7")], true);
}

#[test]
fn kernels_on_a_simulated_h100() {
    all("kernels_on_a_simulated_h100", "compute_90", &[("CUDA_SIM_ARCH", "sm_90")], false);
}

#[test]
fn kernels_without_the_sanitizer() {
    all("kernels_without_the_sanitizer", "compute_80", &[("CUDA_SIM_SANITIZER", "off")], false);
}
