//! How fast kernels run: lane instructions a second of an FMA loop, FLOP/s of `mma.sync`, bytes a second of a copy and of a
//! transposition through shared memory. Each kernel is validated before it is timed.
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

/// Side of the matrix that is copied or transposed: 4 MB of f32.
const SIDE: u32 = 1024;

/// y = x, 16 bytes a thread.
fn copy_text() -> String {
    format!(
        "{HEADER}.visible .entry k(.param .u64 y, .param .u64 x) {{ .reg .f32 %f<4>; .reg .b32 %r<4>; .reg .b64 %rd<4>;\n\
         ld.param.u64 %rd0, [y]; ld.param.u64 %rd1, [x]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x;\n\
         mad.lo.u32 %r0, %r0, {THREADS}, %r1; mul.wide.u32 %rd2, %r0, 16; add.u64 %rd0, %rd0, %rd2; add.u64 %rd1, %rd1, %rd2;\n\
         ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%rd1]; st.global.v4.f32 [%rd0], {{%f0, %f1, %f2, %f3}}; ret; }}"
    )
}

/// y = x transposed: tiles of 32 x 32 through shared memory, padded by a column; 128 threads move eight rows each.
fn transpose_text() -> String {
    let (mut load, mut store) = (String::new(), String::new());
    for i in 0..8 {
        load += &format!("ld.global.f32 %f0, [%rd1+{}]; st.shared.f32 [%r6+{}], %f0;\n", 16 * i * SIDE, 4 * i * 4 * 33);
        store += &format!("ld.shared.f32 %f0, [%r7+{}]; st.global.f32 [%rd0+{}], %f0;\n", 4 * i * 4, 16 * i * SIDE);
    }
    format!(
        "{HEADER}.visible .entry k(.param .u64 y, .param .u64 x) {{ .shared .align 16 .b8 tile[4224]; .reg .f32 %f<2>; .reg .b32 %r<12>; .reg .b64 %rd<4>;\n\
         ld.param.u64 %rd0, [y]; ld.param.u64 %rd1, [x]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x;\n\
         and.b32 %r2, %r1, 31; shr.u32 %r3, %r1, 5; and.b32 %r4, %r0, {mask}; shr.u32 %r5, %r0, {shift};\n\
         shl.b32 %r4, %r4, 5; shl.b32 %r5, %r5, 5;\n\
         add.u32 %r8, %r5, %r3; add.u32 %r9, %r4, %r2; mad.lo.u32 %r8, %r8, {SIDE}, %r9; mul.wide.u32 %rd2, %r8, 4; add.u64 %rd1, %rd1, %rd2;\n\
         add.u32 %r8, %r4, %r3; add.u32 %r9, %r5, %r2; mad.lo.u32 %r8, %r8, {SIDE}, %r9; mul.wide.u32 %rd2, %r8, 4; add.u64 %rd0, %rd0, %rd2;\n\
         mov.u32 %r10, tile; mad.lo.u32 %r6, %r3, 33, %r2; mad.lo.u32 %r6, %r6, 4, %r10; mad.lo.u32 %r7, %r2, 33, %r3; mad.lo.u32 %r7, %r7, 4, %r10;\n\
         {load} bar.sync 0;\n {store} ret; }}",
        mask = SIDE / 32 - 1,
        shift = (SIDE / 32).trailing_zeros(),
    )
}

/// A kernel that moves a matrix.
struct Mover {
    device: Device,
    _module: Module,
    function: Function,
    params: Vec<u8>,
    out: u64,
    blocks: u32,
}

impl Mover {
    fn new(text: &str, blocks: u32, sanitizer: Sanitizer) -> Mover {
        let device = Device::new(Arch::SM_80, Options { sanitizer, ..Options::default() });
        let module = device.load_module(text).expect("the kernel loads");
        let function = module.function("k").expect("the kernel exists");
        let bytes = 4 * SIDE * SIDE;
        let [out, x] = [(); 2].map(|()| device.alloc(bytes.into()).expect("memory"));
        let numbers: Vec<u8> = (0..SIDE * SIDE).flat_map(u32::to_le_bytes).collect();
        device.write(x, &numbers).expect("it fits");
        Mover { device, _module: module, function, params: [out.to_le_bytes(), x.to_le_bytes()].concat(), out, blocks }
    }

    fn run(&self) {
        let config = LaunchConfig::new([self.blocks, 1, 1], [THREADS, 1, 1]);
        self.device.launch(&self.function, &config, &self.params).expect("the kernel runs");
    }

    fn validate(&self, expected: impl Fn(u32) -> u32) {
        let mut bytes = vec![0; (4 * SIDE * SIDE) as usize];
        self.device.read(self.out, &mut bytes).expect("the output is there");
        for (i, b) in bytes.chunks_exact(4).enumerate() {
            assert_eq!(u32::from_le_bytes([b[0], b[1], b[2], b[3]]), expected(i as u32));
        }
    }
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

        let moved = u64::from(2 * 4 * SIDE * SIDE);
        let copy = Mover::new(&copy_text(), SIDE * SIDE / 4 / THREADS, sanitizer);
        copy.run();
        copy.validate(|i| i);
        let transpose = Mover::new(&transpose_text(), (SIDE / 32) * (SIDE / 32), sanitizer);
        transpose.run();
        transpose.validate(|i| i % SIDE * SIDE + i / SIDE);
        for (what, kernel) in [("copy", copy), ("transposition through shared memory", transpose)] {
            let mut group = c.benchmark_group(format!("{what}, bytes read and written"));
            group.sample_size(10).throughput(Throughput::BytesDecimal(moved));
            group.bench_function(name, |b| b.iter(|| kernel.run()));
            group.finish();
        }
    }
}

criterion_group!(benches, throughput);
criterion_main!(benches);
