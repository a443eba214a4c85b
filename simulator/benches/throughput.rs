//! How fast kernels run: lane instructions a second of an FMA loop, FLOP/s of `mma.sync`. Each kernel is validated
//! before it is timed.
//!
//! Lane instructions are warp instructions times active lanes; an FMA is one.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cuda_sim::{Arch, Device, Function, LaunchConfig, Module, Options, Sanitizer};

const HEADER: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";
const BLOCKS: u32 = 16;
const THREADS: u32 = 128;
const ROUNDS: u32 = 1000;

/// Sixteen independent sums, `ROUNDS` times.
fn fma_text() -> String {
    let mut body = String::new();
    for i in 0..16 {
        body += &format!("mov.f32 %f{i}, 0f3F800000;\n");
    }
    body += "mov.u32 %r1, 0;\nL:\n";
    for _ in 0..2 {
        for i in 0..16 {
            body += &format!("fma.rn.f32 %f{i}, %f{i}, 0f3F000000, 0f3F000000;\n");
        }
    }
    body += &format!("add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, {ROUNDS};\n@%p1 bra L;\n");
    for i in 1..16 {
        body += &format!("add.f32 %f0, %f0, %f{i};\n");
    }
    format!(
        "{HEADER}.visible .entry k(.param .u64 out) {{ .reg .f32 %f<16>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .pred %p<2>;\n\
         {body} ld.param.u64 %rd1, [out];\nmov.u32 %r2, %tid.x;\nmov.u32 %r3, %ctaid.x;\nmad.lo.u32 %r2, %r3, {THREADS}, %r2;\n\
         mul.wide.u32 %rd2, %r2, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.f32 [%rd1], %f0;\nret; }}"
    )
}

/// Four accumulators of m16n8k16 bf16, `ROUNDS` times.
fn mma_text() -> String {
    let mut body = String::new();
    for i in 0..16 {
        body += &format!("mov.f32 %f{i}, 0f00000000;\n");
    }
    // Ones in A, 2^-4 in B: every product adds 1.
    body += "mov.b32 %r4, 0x3f803f80;\nmov.b32 %r5, 0x3d803d80;\nmov.u32 %r1, 0;\nL:\n";
    for i in 0..4 {
        let c: Vec<String> = (0..4).map(|j| format!("%f{}", 4 * i + j)).collect();
        let c = c.join(", ");
        body += &format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{c}}}, {{%r4, %r4, %r4, %r4}}, {{%r5, %r5}}, {{{c}}};\n"
        );
    }
    body += &format!("add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, {ROUNDS};\n@%p1 bra L;\n");
    for i in 1..16 {
        body += &format!("add.f32 %f0, %f0, %f{i};\n");
    }
    format!(
        "{HEADER}.visible .entry k(.param .u64 out) {{ .reg .f32 %f<16>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .pred %p<2>;\n\
         {body} ld.param.u64 %rd1, [out];\nmov.u32 %r2, %tid.x;\nmov.u32 %r3, %ctaid.x;\nmad.lo.u32 %r2, %r3, {THREADS}, %r2;\n\
         mul.wide.u32 %rd2, %r2, 4;\nadd.u64 %rd1, %rd1, %rd2;\nst.global.f32 [%rd1], %f0;\nret; }}"
    )
}

struct Setup {
    device: Device,
    _module: Module,
    function: Function,
    out: u64,
}

impl Setup {
    fn new(text: &str, sanitizer: Sanitizer) -> Setup {
        let device = Device::new(Arch::SM_80, Options { sanitizer, ..Options::default() });
        let module = device.load_module(text).expect("the kernel loads");
        let function = module.function("k").expect("the kernel exists");
        let out = device.alloc(u64::from(BLOCKS * THREADS) * 4).expect("memory");
        Setup { device, _module: module, function, out }
    }

    fn run(&self) -> u64 {
        let config = LaunchConfig::new([BLOCKS, 1, 1], [THREADS, 1, 1]);
        let report = self.device.launch(&self.function, &config, &self.out.to_le_bytes()).expect("the kernel runs");
        report.counters.lane_instructions
    }

    fn validate(&self, expected: f32) {
        let mut bytes = vec![0; (BLOCKS * THREADS * 4) as usize];
        self.device.read(self.out, &mut bytes).expect("the output is there");
        for b in bytes.chunks_exact(4) {
            assert_eq!(f32::from_le_bytes([b[0], b[1], b[2], b[3]]), expected);
        }
    }
}

fn throughput(c: &mut Criterion) {
    for (name, sanitizer) in [("sanitizer on", Sanitizer::ON), ("sanitizer off", Sanitizer::OFF)] {
        let s = Setup::new(&fma_text(), sanitizer);
        let lanes = s.run();
        s.validate(16.0);
        let mut group = c.benchmark_group("fma lane instructions");
        group.sample_size(10).throughput(Throughput::Elements(lanes));
        group.bench_function(name, |b| b.iter(|| s.run()));
        group.finish();

        let s = Setup::new(&mma_text(), sanitizer);
        s.run();
        s.validate(16.0 * ROUNDS as f32);
        let flops = u64::from(BLOCKS * THREADS / 32 * ROUNDS) * 4 * 4096;
        let mut group = c.benchmark_group("mma.sync m16n8k16 bf16 FLOPs");
        group.sample_size(10).throughput(Throughput::Elements(flops));
        group.bench_function(name, |b| b.iter(|| s.run()));
        group.finish();
    }
}

criterion_group!(benches, throughput);
criterion_main!(benches);
