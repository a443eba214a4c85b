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
