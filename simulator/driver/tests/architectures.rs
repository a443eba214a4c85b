//! NVRTC's PTX for every architecture through the simulator's core: the same source becomes different PTX.

mod common;

use common::kernels::{ALL, Arg, Gpu};
use common::{compile, own_process};
use cuda_sim::{Arch, Device, LaunchConfig, Module, Options};

struct Core {
    device: Device,
    module: Module,
}

impl Gpu for Core {
    fn run(&mut self, kernel: &str, grid: [u32; 3], block: [u32; 3], args: &[Arg]) -> Vec<Vec<u8>> {
        let function = self.module.function(kernel).unwrap();
        let mut params = vec![0u8; function.param_bytes() as usize];
        let mut buffers = Vec::new();
        for (arg, param) in args.iter().zip(function.params()) {
            let value = match arg {
                Arg::In(bytes) => {
                    let at = self.device.alloc(bytes.len() as u64).unwrap();
                    self.device.write(at, bytes).unwrap();
                    buffers.push((at, None));
                    at.to_le_bytes().to_vec()
                }
                Arg::Out(n) => {
                    let at = self.device.alloc(*n as u64).unwrap();
                    buffers.push((at, Some(*n)));
                    at.to_le_bytes().to_vec()
                }
                Arg::Int(v) => v.to_le_bytes().to_vec(),
                Arg::Float(v) => v.to_le_bytes().to_vec(),
            };
            assert_eq!(value.len(), param.bytes as usize);
            params[param.offset as usize..][..value.len()].copy_from_slice(&value);
        }
        let config = LaunchConfig::new(grid, block);
        self.device.launch(&function, &config, &params).unwrap_or_else(|e| panic!("{e}"));
        let mut out = Vec::new();
        for (at, bytes) in buffers {
            if let Some(bytes) = bytes {
                assert_eq!(self.device.first_unwritten(at, bytes as u64).unwrap(), None, "{kernel} left a gap");
                let mut data = vec![0; bytes];
                self.device.read(at, &mut data).unwrap();
                out.push(data);
            }
            self.device.free(at).unwrap();
        }
        out
    }
}

fn all(test: &str, arch: &'static str, sim: Arch) {
    own_process(test, &[], || {
        for kernels in &ALL {
            let ptx = compile(kernels.source, arch, &[]);
            for seed in [None, Some(1)] {
                let device = Device::new(sim, Options { seed, ..Options::default() });
                let module = device.load_module(&ptx).unwrap_or_else(|e| panic!("{arch}: {e}"));
                (kernels.check)(&mut Core { device, module });
            }
        }
    });
}

#[test]
fn kernels_for_sm_80() {
    all("kernels_for_sm_80", "compute_80", Arch::SM_80);
}

#[test]
fn kernels_for_sm_86() {
    all("kernels_for_sm_86", "compute_86", Arch::SM_86);
}

#[test]
fn kernels_for_sm_89() {
    all("kernels_for_sm_89", "compute_89", Arch::SM_89);
}

#[test]
fn kernels_for_sm_90() {
    all("kernels_for_sm_90", "compute_90", Arch::SM_90);
}

#[test]
fn kernels_for_sm_120() {
    all("kernels_for_sm_120", "compute_120", Arch::SM_120);
}
