//! How fast memory-bound kernels run: bytes a second of a streaming axpy and of a transpose through shared memory. Each
//! kernel is validated before it is timed.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cuda_sim::{Arch, Device, Function, LaunchConfig, Module, Options, Sanitizer};

const HEADER: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";
/// Floats of a vector; a matrix has `SIDE` x `SIDE`.
const N: u32 = 1 << 20;
const SIDE: u32 = 1 << 10;

/// `y = 2 x + y`, a float a thread.
fn axpy_text() -> String {
    format!(
        "{HEADER}.visible .entry k(.param .u64 x, .param .u64 y) {{ .reg .f32 %f<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;\n\
         ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r2, 256, %r1;\n\
         mul.wide.u32 %rd3, %r1, 4; add.u64 %rd1, %rd1, %rd3; add.u64 %rd2, %rd2, %rd3;\n\
         ld.global.f32 %f1, [%rd1]; ld.global.f32 %f2, [%rd2]; fma.rn.f32 %f2, %f1, 0f40000000, %f2; st.global.f32 [%rd2], %f2; ret; }}"
    )
}

/// `y = transposed x` by tiles of 32 x 32 with 33 floats a row, four rows a thread.
fn transpose_text() -> String {
    let mut body = String::new();
    for i in 0..4 {
        let (rows, tile) = (8 * i * SIDE * 4, 8 * i * 33 * 4);
        body += &format!("ld.global.f32 %f1, [%rd1+{rows}]; st.shared.f32 [%r7+{tile}], %f1;\n");
    }
    body += "bar.sync 0;\n";
    for i in 0..4 {
        body += &format!("ld.shared.f32 %f1, [%r8+{}]; st.global.f32 [%rd2+{}], %f1;\n", 8 * i * 4, 8 * i * SIDE * 4);
    }
    format!(
        "{HEADER}.visible .entry k(.param .u64 x, .param .u64 y) {{ .reg .f32 %f<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .shared .align 4 .b8 s[4224];\n\
         ld.param.u64 %rd1, [x]; ld.param.u64 %rd2, [y]; mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y;\n\
         shl.b32 %r3, %r3, 5; shl.b32 %r4, %r4, 5; add.u32 %r5, %r4, %r2; add.u32 %r6, %r3, %r1; mad.lo.u32 %r5, %r5, {SIDE}, %r6; mul.wide.u32 %rd3, %r5, 4; add.u64 %rd1, %rd1, %rd3;\n\
         add.u32 %r5, %r3, %r2; add.u32 %r6, %r4, %r1; mad.lo.u32 %r5, %r5, {SIDE}, %r6; mul.wide.u32 %rd3, %r5, 4; add.u64 %rd2, %rd2, %rd3;\n\
         mov.u32 %r9, s; mad.lo.u32 %r7, %r2, 33, %r1; mad.lo.u32 %r7, %r7, 4, %r9; mad.lo.u32 %r8, %r1, 33, %r2; mad.lo.u32 %r8, %r8, 4, %r9;\n\
         {body}ret; }}"
    )
}

struct Setup {
    device: Device,
    _module: Module,
    function: Function,
    config: LaunchConfig,
    x: u64,
    y: u64,
}

impl Setup {
    /// `x` counts up, `y` is zero.
    fn new(text: &str, grid: [u32; 3], block: [u32; 3], sanitizer: Sanitizer) -> Setup {
        let device = Device::new(Arch::SM_80, Options { sanitizer, ..Options::default() });
        let module = device.load_module(text).expect("the kernel loads");
        let function = module.function("k").expect("the kernel exists");
        let (x, y) = (device.alloc(4 * u64::from(N)).expect("memory"), device.alloc(4 * u64::from(N)).expect("memory"));
        let values: Vec<u8> = (0..N).flat_map(|i| (i as f32).to_le_bytes()).collect();
        device.write(x, &values).expect("the input is written");
        device.memset(y, &[0], 4 * u64::from(N)).expect("the output is cleared");
        Setup { device, _module: module, function, config: LaunchConfig::new(grid, block), x, y }
    }

    fn run(&self) {
        let params = [self.x.to_le_bytes(), self.y.to_le_bytes()].concat();
        self.device.launch(&self.function, &self.config, &params).expect("the kernel runs");
    }

    fn validate(&self, expected: impl Fn(u32) -> f32) {
        let mut bytes = vec![0; 4 * N as usize];
        self.device.read(self.y, &mut bytes).expect("the output is there");
        for (i, b) in bytes.chunks_exact(4).enumerate() {
            assert_eq!(f32::from_le_bytes([b[0], b[1], b[2], b[3]]), expected(i as u32), "element {i}");
        }
    }
}

fn memory(c: &mut Criterion) {
    for (name, sanitizer) in [("sanitizer on", Sanitizer::ON), ("sanitizer off", Sanitizer::OFF)] {
        let s = Setup::new(&axpy_text(), [N / 256, 1, 1], [256, 1, 1], sanitizer);
        s.run();
        s.validate(|i| 2.0 * i as f32);
        let mut group = c.benchmark_group("axpy bytes");
        group.sample_size(10).throughput(Throughput::Bytes(12 * u64::from(N)));
        group.bench_function(name, |b| b.iter(|| s.run()));
        group.finish();

        let s = Setup::new(&transpose_text(), [SIDE / 32, SIDE / 32, 1], [32, 8, 1], sanitizer);
        s.run();
        s.validate(|i| (i % SIDE * SIDE + i / SIDE) as f32);
        let mut group = c.benchmark_group("transpose bytes");
        group.sample_size(10).throughput(Throughput::Bytes(8 * u64::from(N)));
        group.bench_function(name, |b| b.iter(|| s.run()));
        group.finish();
    }
}

criterion_group!(benches, memory);
criterion_main!(benches);
