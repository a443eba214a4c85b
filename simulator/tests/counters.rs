//! Counters against counts made by hand, and the estimate against the figures it is made of.

mod common;
use common::kernel_with;
use cuda_sim::{Arch, Counters, Options};
use std::collections::BTreeMap;

fn count(text: &str, grid: u32, block: u32) -> Counters {
    let options = Options { counters: true, ..Options::default() };
    let (_, result) = kernel_with(text, Arch::SM_80, grid, block, 0, 16384, options);
    result.unwrap_or_else(|e| panic!("{e}")).counters
}

fn text(shared: &str, body: &str) -> String {
    format!(
        ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .pred %p<8>; .reg .f32 %f<32>; .reg .f64 %fd<4>;\n{shared}\n\
         mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmad.lo.u32 %r3, %r2, 64, %r1;\nld.param.u64 %rd0, [out];\nmad.wide.u32 %rd1, %r3, 4, %rd0;\n{body}\nret; }}"
    )
}

/// The five instructions before the body, and `ret`.
fn classes(more: &[(&str, u64)], warps: u64) -> BTreeMap<String, u64> {
    let mut map = BTreeMap::from([("move", 2), ("integer", 2), ("param", 1), ("control", 1)]);
    for (class, n) in more {
        *map.entry(class).or_default() += n;
    }
    map.into_iter().map(|(c, n)| (c.to_owned(), n * warps)).collect()
}

#[test]
fn instructions_lanes_and_sectors() {
    // Two blocks of two warps. Loads of 128 bytes in a row, stores of one word in each sector.
    let body = "ld.global.f32 %f1, [%rd1];\nfma.rn.f32 %f2, %f1, %f1, %f1;\nmul.f32 %f3, %f2, %f1;\nmad.wide.u32 %rd2, %r3, 32, %rd0;\nst.global.f32 [%rd2+4096], %f3;\n\
        setp.lt.u32 %p1, %r1, 10;\n@%p1 add.u32 %r4, %r1, 1;\nadd.f64 %fd1, %fd1, %fd1;\nex2.approx.f32 %f4, %f3;\ncvt.rn.f32.u32 %f5, %r1;";
    let c = count(&text("", body), 2, 64);
    let more = [("global", 2), ("float", 2), ("integer", 3), ("double", 1), ("special function", 1), ("convert", 1)];
    assert_eq!(c.by_class, classes(&more, 4));
    assert_eq!(c.warp_instructions, 4 * 16);
    // All lanes but in the one with a guard: ten lanes in one warp of each block.
    assert_eq!(c.lane_instructions, 128 * 15 + 2 * 10);
    // An FMA is two, the product, the f64 sum and the exponential one each.
    assert_eq!(c.float_flops, 128 * 5);
    assert_eq!((c.global_requests, c.global_sectors, c.global_sectors_needed), (8, 4 * 4 + 4 * 32, 4 * 4 + 4 * 4));
    assert_eq!((c.dram_bytes_read, c.dram_bytes_written), (512, 128 * 32));
    assert_eq!((c.shared_wavefronts, c.local_bytes, c.barriers, c.atomics), (0, 0, 0, 0));
    assert!(c.matrix_flops.is_empty() && c.matrix_share() == 0.0);
    assert_eq!(c.lanes_per_instruction(), c.lane_instructions as f64 / 64.0);
}

#[test]
fn sectors_of_awkward_accesses() {
    // One warp: all lanes at one address, then 16 bytes each, then from an odd start: 4 bytes past a sector's begin.
    let body = "ld.global.u32 %r5, [%rd0];\nmad.wide.u32 %rd2, %r1, 16, %rd0;\nld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd2];\nld.global.u32 %r10, [%rd1+4];";
    let c = count(&text("", body), 1, 32);
    assert_eq!((c.global_requests, c.global_sectors, c.global_sectors_needed), (3, 1 + 16 + 5, 1 + 16 + 4));
    // Read twice is read once from memory.
    assert_eq!((c.dram_bytes_read, c.dram_bytes_written), (512, 0));
}

#[test]
fn bank_conflicts_by_line() {
    let at = |stride: u32| format!("bar.warp.sync -1;\nmad.lo.u32 %r5, %r1, {stride}, %r4;\n");
    let store = "st.shared.u32 [%r5], %r1;\n";
    let body = format!(
        "mov.u32 %r4, s;\n{}{store}{}{store}{}{store}{}st.shared.v4.u32 [%r5], {{%r1, %r1, %r1, %r1}};\nbar.warp.sync -1;\nld.shared.u32 %r6, [%r4];\n{}st.shared.u8 [%r5], %r1;\n",
        at(4),
        at(8),
        at(128),
        at(16),
        at(1)
    );
    let c = count(&text(".shared .align 16 .b8 s[4096];", &body), 1, 32);
    // A word each: 1. Every second word: 2 for 1. One bank: 32 for 1. Sixteen bytes each: 4. One address: 1. Bytes: 1.
    assert_eq!(c.shared_wavefronts, 1 + 2 + 32 + 4 + 1 + 1);
    assert_eq!(c.shared_wavefronts_least, 1 + 1 + 1 + 4 + 1 + 1);
    let lines: Vec<(u64, u64)> = c.conflicts.iter().map(|l| (l.wavefronts, l.least)).collect();
    assert_eq!(lines, [(32, 1), (2, 1)]);
    assert!(c.conflicts[0].line > c.conflicts[1].line && c.conflicts[0].text.starts_with("st.shared.u32"));
}

#[test]
fn matrices_and_their_loads() {
    // Rows of 16 bytes one after the other, and 128 bytes apart: eight rows in the same banks.
    let body = "mov.u32 %r4, s;\nmad.lo.u32 %r5, %r1, 128, %r4;\nmov.u32 %r6, 0;\nL: shl.b32 %r7, %r6, 4;\nadd.u32 %r7, %r7, %r5;\nst.shared.v4.u32 [%r7], {%r1, %r1, %r1, %r1};\n\
        add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p1, %r6, 8;\n@%p1 bra L;\nbar.sync 0;\n\
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11}, [%r5];\nmad.lo.u32 %r5, %r1, 16, %r4;\nldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r12, %r13}, [%r5];\n\
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r8, %r9, %r10, %r11}, {%r12, %r13}, {%f1, %f2, %f3, %f4};\n\
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r8, %r9, %r10, %r11}, {%r12, %r13}, {%f1, %f2, %f3, %f4};\n\
        mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r14, %r15, %r16, %r17}, {%r8, %r9, %r10, %r11}, {%r12, %r13}, {%r14, %r15, %r16, %r17};";
    let c = count(&text(".shared .align 16 .b8 s[4096];", body), 3, 32);
    let flops = |n: u64| 3 * 2 * 16 * 8 * n;
    let want = [("16-bit", flops(16)), ("int8", flops(32)), ("tf32", flops(8))];
    assert_eq!(c.matrix_flops, want.map(|(k, n)| (k.to_owned(), n)).into());
    assert_eq!((c.by_class["matrix"], c.by_class["shared"], c.barriers), (9, 3 * 10, 3));
    assert_eq!(c.matrix_share(), 9.0 / c.warp_instructions as f64);
    // Per block: eight stores of 16 bytes 128 apart (each group of 8 lanes in 4 banks: 8 for 1, four groups).
    assert_eq!(c.shared_wavefronts, 3 * (8 * 32 + 4 * 8 + 2));
    assert_eq!(c.shared_wavefronts_least, 3 * (8 * 4 + 4 + 2));
}

#[test]
fn local_memory_barriers_and_atomics() {
    let body = "mov.u64 %rd3, l;\nst.local.u32 [%rd3], %r1;\nst.local.v2.u32 [%rd3+8], {%r1, %r2};\nld.local.u32 %r5, [%rd3];\nbar.sync 0;\nbar.sync 1;\n\
        atom.global.add.u32 %r6, [%rd0], 1;\nred.global.add.u32 [%rd0], %r5;\nmembar.gl;";
    let c = count(&text(".local .align 8 .b8 l[16];", body), 1, 96);
    assert_eq!(c.local_bytes, 96 * (4 + 8 + 4));
    assert_eq!((c.barriers, c.atomics, c.by_class["atomic"], c.by_class["local"]), (3 * 2, 3 * 2, 3 * 2, 3 * 3));
}

#[test]
fn divergence_is_counted_in_lanes() {
    // Lane i goes round i + 1 times: the loop's three instructions run 32 times, with 32, 31 .. 1 lanes.
    let body = "mov.u32 %r4, 0;\nL: add.u32 %r4, %r4, 1;\nsetp.le.u32 %p1, %r4, %r1;\n@%p1 bra L;";
    let c = count(&text("", body), 1, 32);
    assert_eq!(c.warp_instructions, 6 + 1 + 3 * 32);
    // The branch is taken by one lane less than execute it; a guard that is false is no active lane.
    let sum: u64 = (1..=32).sum();
    assert_eq!(c.lane_instructions, 32 * 7 + 2 * sum + (sum - 32));
    assert_eq!(c.by_class, classes(&[("move", 1), ("integer", 64), ("control", 32)], 1));
}

#[test]
fn copies_and_products_of_a_warpgroup() {
    let body = "mov.u32 %r4, s;\nmad.lo.u32 %r5, %r1, 16, %r4;\nmad.wide.u32 %rd2, %r1, 16, %rd0;\ncp.async.cg.shared.global [%r5], [%rd2], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;";
    let c = count(&text(".shared .align 16 .b8 s[1024];", body), 1, 64);
    assert_eq!((c.global_requests, c.global_sectors, c.dram_bytes_read), (2, 32, 1024));
    assert_eq!((c.shared_wavefronts, c.by_class["asynchronous"]), (8, 6));
}

#[test]
fn the_estimate_is_the_slowest_limit() {
    let a = Arch::SM_80;
    let one = |edit: &dyn Fn(&mut Counters)| {
        let mut c = Counters::default();
        edit(&mut c);
        c.estimate(&a)
    };
    // A microsecond of each.
    let matrix = |kind: &str, flops: u64| {
        let kind = kind.to_owned();
        one(&|c| c.matrix_flops = BTreeMap::from([(kind.clone(), flops)]))
    };
    for (estimate, limit) in [
        (matrix("16-bit", 312_000_000), "matrix rate"),
        (matrix("tf32", 156_000_000), "matrix rate"),
        (matrix("int8", 624_000_000), "matrix rate"),
        (one(&|c| c.float_flops = 19_500_000), "FMA rate"),
        (one(&|c| c.warp_instructions = 108 * 4 * 1410), "instruction issue"),
        (one(&|c| c.shared_wavefronts = 108 * 1410), "shared memory"),
        (one(&|c| (c.dram_bytes_read, c.dram_bytes_written) = (1_000_000, 555_000)), "DRAM bandwidth"),
        (one(&|c| c.global_sectors = 7_219_000_000 / 32 / 1000), "L2 bandwidth"),
    ] {
        assert!((estimate.microseconds - 1.0).abs() < 1e-3, "{limit}: {}", estimate.microseconds);
        assert_eq!(estimate.limited_by, limit);
        assert!(estimate.card.contains("A100") && !estimate.source.is_empty());
    }
    // Kinds of products share one unit: their times add up. Limits do not.
    let e = one(&|c| {
        c.matrix_flops = BTreeMap::from([("16-bit".to_owned(), 312_000_000), ("tf32".to_owned(), 312_000_000)]);
        c.dram_bytes_read = 1_555_000;
    });
    assert!((e.microseconds - 3.0).abs() < 1e-3 && (e.limits["DRAM bandwidth"] - 1.0).abs() < 1e-3);
}

/// What a card's documents say, in their units. Rates are without sparsity.
struct Sheet {
    arch: Arch,
    multiprocessors: u32,
    boost_mhz: f64,
    fp32: f64,
    tf32: f64,
    f16: f64,
    /// With f16 accumulation.
    f16_half: f64,
    fp8: Option<f64>,
    int8: f64,
    l2_mb: u32,
    memory_gb: u64,
    bus_bits: u32,
    bandwidth_gbs: f64,
}

/// Quoted from reprints of the vendor's data sheets and whitepapers, whose own files were not at hand:
/// A100: Paderborn Center for Parallel Computing, "NVIDIA A100 40GB with NVLINK" (data sheet and device query).
/// RTX 3090: holynerdvana.blogspot.com, "Nvidia GeForce RTX 3090 Specifications". It gives 142 TFLOPS with f16 sums; f32 sums halve it and tf32 halves
/// that, int8 is twice 142.
/// RTX 4090: waredb.com, "NVIDIA GeForce RTX 4090", matrix and vector rates, clock, cache; mobylak.com's table of the Ada
/// whitepaper for the bus.
/// H100: glennklockwood.com, "h100" (whitepaper's peak rates, 1.83 and 1.98 GHz); HPC Technologies' table of the data sheet.
/// RTX 5090: Linux Format, May 2025, and the 838.4 TFLOPS with f16 sums and sparsity of spheron.network's data sheet: half
/// without sparsity, half of that with f32 sums; fp8 and int8 are twice f16 as on the 4090.
/// L2 bandwidth was found for the A100 only.
const SHEETS: [Sheet; 5] = [
    Sheet {
        arch: Arch::SM_80,
        multiprocessors: 108,
        boost_mhz: 1410.0,
        fp32: 19.5,
        tf32: 156.0,
        f16: 312.0,
        f16_half: 312.0,
        fp8: None,
        int8: 624.0,
        l2_mb: 40,
        memory_gb: 40,
        bus_bits: 5120,
        bandwidth_gbs: 1555.0,
    },
    Sheet {
        arch: Arch::SM_86,
        multiprocessors: 82,
        boost_mhz: 1695.0,
        fp32: 35.6,
        tf32: 142.0 / 4.0,
        f16: 142.0 / 2.0,
        f16_half: 142.0,
        fp8: None,
        int8: 2.0 * 142.0,
        l2_mb: 6,
        memory_gb: 24,
        bus_bits: 384,
        bandwidth_gbs: 936.0,
    },
    Sheet {
        arch: Arch::SM_89,
        multiprocessors: 128,
        boost_mhz: 2520.0,
        fp32: 82.58,
        tf32: 82.58,
        f16: 165.15,
        f16_half: 330.3,
        fp8: Some(330.3),
        int8: 660.6,
        l2_mb: 72,
        memory_gb: 24,
        bus_bits: 384,
        bandwidth_gbs: 1008.0,
    },
    Sheet {
        arch: Arch::SM_90,
        multiprocessors: 132,
        boost_mhz: 1980.0,
        fp32: 66.9,
        tf32: 494.7,
        f16: 989.4,
        f16_half: 989.4,
        fp8: Some(1978.9),
        int8: 1978.9,
        l2_mb: 50,
        memory_gb: 80,
        bus_bits: 5120,
        bandwidth_gbs: 3350.0,
    },
    Sheet {
        arch: Arch::SM_120,
        multiprocessors: 170,
        boost_mhz: 2407.0,
        fp32: 104.8,
        tf32: 838.4 / 8.0,
        f16: 838.4 / 4.0,
        f16_half: 838.4 / 2.0,
        fp8: Some(838.4 / 2.0),
        int8: 838.4,
        l2_mb: 96,
        memory_gb: 32,
        bus_bits: 512,
        bandwidth_gbs: 1792.0,
    },
];

#[test]
fn figures_are_those_of_the_documents() {
    for s in &SHEETS {
        let a = &s.arch;
        let near = |what: &str, got: f64, want: f64| {
            assert!((got / want - 1.0).abs() < 0.003, "{}: {what} is {got}, the documents say {want}", a.card);
        };
        assert_eq!((a.multiprocessors, a.memory_bus_bits), (s.multiprocessors, s.bus_bits), "{}", a.card);
        assert_eq!((a.l2_bytes, a.memory_bytes), (s.l2_mb << 20, s.memory_gb << 30), "{}", a.card);
        near("clock", f64::from(a.clock_khz) / 1e3, s.boost_mhz);
        near("bandwidth", a.dram_gbs, s.bandwidth_gbs);
        near("f32", a.fma_tflops, s.fp32);
        near("tf32", a.matrix_tf32_tflops, s.tf32);
        near("f16", a.matrix_f16_tflops, s.f16);
        near("f16 with f16 sums", a.matrix_f16_tflops * a.half_sums, s.f16_half);
        near("int8", a.matrix_int8_tops, s.int8);
        near("fp8", a.matrix_8bit_tops, s.fp8.unwrap_or(s.int8));
    }
}

/// On cards whose f16 sums are faster the bound counts the faster rate.
#[test]
fn products_with_f16_sums_have_their_own_rate() {
    let product = |sums: &str| {
        let (d, c) =
            if sums == "f16" { ("{%r4, %r5}", "{%r6, %r7}") } else { ("{%f0, %f1, %f2, %f3}", "{%f4, %f5, %f6, %f7}") };
        let body = format!(
            "mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0; mov.f32 %f4, 0f00000000; mov.f32 %f5, %f4; mov.f32 %f6, %f4; mov.f32 %f7, %f4;\n\
             mma.sync.aligned.m16n8k16.row.col.{sums}.f16.f16.{sums} {d}, {{%r4, %r5, %r6, %r7}}, {{%r4, %r5}}, {c};"
        );
        count(&text("", &body), 1, 32)
    };
    let (half, single) = (product("f16"), product("f32"));
    assert_eq!(half.matrix_flops, BTreeMap::from([("16-bit with 16-bit sums".to_owned(), 4096)]));
    assert_eq!(single.matrix_flops, BTreeMap::from([("16-bit".to_owned(), 4096)]));
    for (arch, times) in [(Arch::SM_80, 1.0), (Arch::SM_89, 2.0)] {
        let limit = |c: &Counters| c.estimate(&arch).limits["matrix rate"];
        assert!((limit(&single) / limit(&half) - times).abs() < 1e-9, "{}", arch.card);
    }
}

/// The figures of each data sheet agree with each other: rates are units times clock, bandwidth is bus times clock.
#[test]
fn data_sheets_are_consistent() {
    for (a, lanes, matrix) in [
        (Arch::SM_80, 64.0, 2048.0),
        (Arch::SM_86, 128.0, 512.0),
        (Arch::SM_89, 128.0, 512.0),
        // The H100's matrix figures are for 1830 MHz, those of its other units for 1980 MHz.
        (Arch::SM_90, 128.0, 4096.0 * 1830.0 / 1980.0),
        (Arch::SM_120, 128.0, 512.0),
    ] {
        let clocks = f64::from(a.multiprocessors) * f64::from(a.clock_khz) * 1e3 / 1e12;
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.01, "{}: {got} and {want}", a.card);
        near(a.fma_tflops, 2.0 * lanes * clocks);
        near(a.matrix_f16_tflops, matrix * clocks);
        near(2.0 * a.matrix_tf32_tflops, a.matrix_f16_tflops);
        near(a.dram_gbs, f64::from(a.memory_clock_khz) * 2.0 * f64::from(a.memory_bus_bits) / 8.0 / 1e6);
        assert!(a.matrix_int8_tops >= a.matrix_8bit_tops && a.source.len() > 20);
    }
}

/// Blocks of a multiprocessor as the toolkit's own calculator (`cuda_occupancy.h` of CUDA 13, with all shared memory that
/// an architecture can give) has them, for threads, registers and bytes of shared memory.
#[test]
fn occupancy_is_that_of_the_toolkits_calculator() {
    const KERNELS: [(u32, u32, u32); 30] = [
        (32, 16, 0),
        (64, 32, 0),
        (96, 40, 0),
        (128, 64, 0),
        (128, 72, 20000),
        (128, 128, 49152),
        (128, 168, 0),
        (128, 255, 65536),
        (160, 80, 0),
        (192, 56, 30000),
        (224, 96, 0),
        (256, 32, 0),
        (256, 48, 40000),
        (256, 64, 0),
        (256, 128, 100000),
        (288, 100, 0),
        (320, 40, 8000),
        (384, 168, 0),
        (512, 40, 0),
        (512, 128, 0),
        (513, 128, 0),
        (640, 80, 0),
        (768, 80, 0),
        (800, 80, 0),
        (1024, 32, 0),
        (1024, 64, 0),
        (1024, 65, 0),
        (33, 33, 1),
        (32, 32, 101376),
        (64, 24, 1025),
    ];
    let blocks: [(Arch, [u32; 30]); 5] = [
        (Arch::SM_80, [32, 32, 16, 8, 7, 3, 3, 2, 4, 5, 2, 8, 4, 4, 1, 1, 4, 1, 3, 1, 0, 1, 1, 0, 2, 1, 0, 24, 1, 32]),
        (Arch::SM_86, [16, 16, 16, 8, 4, 2, 3, 1, 4, 3, 2, 6, 2, 4, 1, 1, 4, 1, 3, 1, 0, 1, 1, 0, 1, 1, 0, 16, 1, 16]),
        (Arch::SM_89, [24, 24, 16, 8, 4, 2, 3, 1, 4, 3, 2, 6, 2, 4, 1, 1, 4, 1, 3, 1, 0, 1, 1, 0, 1, 1, 0, 24, 1, 24]),
        (Arch::SM_90, [32, 32, 16, 8, 7, 4, 3, 2, 4, 6, 2, 8, 5, 4, 2, 1, 4, 1, 3, 1, 0, 1, 1, 0, 2, 1, 0, 24, 2, 32]),
        (Arch::SM_120, [24, 24, 16, 8, 4, 2, 3, 1, 4, 3, 2, 6, 2, 4, 1, 1, 4, 1, 3, 1, 0, 1, 1, 0, 1, 1, 0, 24, 1, 24]),
    ];
    for (arch, want) in blocks {
        for ((threads, registers, shared), want) in KERNELS.into_iter().zip(want) {
            let got = arch.occupancy(threads, registers, shared).0;
            assert_eq!(got, want, "{}: {threads} threads, {registers} registers, {shared} bytes", arch.name);
        }
    }
}

#[test]
fn occupancy_of_known_kernels() {
    // As the vendor's calculator gives it.
    let a = Arch::SM_80;
    assert_eq!(a.occupancy(256, 32, 0), (8, "threads"));
    assert_eq!(a.occupancy(256, 64, 0), (4, "registers"));
    assert_eq!(a.occupancy(128, 32, 48 * 1024), (3, "shared memory"));
    assert_eq!(a.occupancy(32, 32, 0), (32, "blocks"));
    assert_eq!(Arch::SM_86.occupancy(1024, 32, 0), (1, "threads"));
    assert_eq!(Arch::SM_90.occupancy(128, 255, 227 * 1024), (1, "shared memory"));
}
