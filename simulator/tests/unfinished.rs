//! Missing waits of asynchronous work on sm_90a and missing barriers around copies: each faulty kernel is reported as
//! exactly that, its mended twin not at all.

mod common;
use common::kernel_with;
use cuda_sim::{Arch, FaultClass, Options};

fn pair(class: FaultClass, threads: u32, faulty: &str, fixed: &str) {
    for seed in [None, Some(3), Some(4), Some(11)] {
        let options = Options { seed, ..Options::default() };
        let run = |text: &str| kernel_with(text, Arch::SM_90, 2, threads, 0, 4096, options.clone()).1;
        let fault = run(faulty).expect_err("the faulty kernel must fail");
        assert!(fault.reports.iter().all(|r| r.class == class), "expected {class}, seed {seed:?}: {}", fault.text);
        if let Err(fault) = run(fixed) {
            panic!("the fixed kernel is accused, seed {seed:?}: {}", fault.text);
        }
    }
}

/// `%r1` thread, `%r2` address of `s`, `%r3` the thread's 16 bytes in it, `%rd1` the thread's place in `out`.
fn text(body: &str) -> String {
    format!(
        ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<64>; .reg .b64 %rd<16>; .reg .pred %p<8>; .reg .f32 %f<16>; .shared .align 128 .b8 s[8192]; .shared .align 8 .b64 bar;\n\
         mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x; mad.lo.u32 %r6, %r4, %r5, %r1; mov.u32 %r9, bar;\n\
         ld.param.u64 %rd0, [out]; mad.wide.u32 %rd1, %r6, 16, %rd0; mov.u32 %r7, 0; st.shared.v4.u32 [%r3], {{%r7, %r7, %r7, %r7}}; st.shared.v4.u32 [%r3+2048], {{%r7, %r7, %r7, %r7}};\n{body}\nret; }}"
    )
}

/// A product m64n8k16 of 2 KB at `s` and 256 bytes at `s + 2048`, into `%f0..%f3`. The descriptors say 128 bytes along
/// the depth and 256 from eight rows to the next.
const PRODUCT: &str = "fence.proxy.async; bar.sync 0; cvt.u64.u32 %rd2, %r2; shr.u64 %rd2, %rd2, 4; or.b64 %rd3, %rd2, 68720001024; add.u64 %rd4, %rd3, 128;\n\
    mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0; setp.ne.u32 %p1, %r2, %r2; wgmma.fence.sync.aligned;\n\
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd4, %p1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;\n";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;\n";
const STORE: &str = "st.global.v4.f32 [%rd1], {%f0, %f1, %f2, %f3};\n";

#[test]
fn results_of_a_product_before_its_wait() {
    let use_then = |before: &str, after: &str| text(&format!("{PRODUCT}{before}{STORE}{after}"));
    pair(FaultClass::AsyncCopyHazard, 128, &use_then("", WAIT), &use_then(WAIT, ""));
    // A wait that lets one group go on is none for the only group.
    pair(FaultClass::AsyncCopyHazard, 128, &use_then("wgmma.wait_group.sync.aligned 1;\n", WAIT), &use_then(WAIT, ""));
    // Copies of registers between a product and its wait are what compilers make; computing with them is a fault.
    let copy = "mov.f32 %f8, %f0;\n";
    let sum = "add.f32 %f9, %f8, %f8; st.global.f32 [%rd1], %f9;\n";
    pair(
        FaultClass::AsyncCopyHazard,
        128,
        &text(&format!("{PRODUCT}{copy}{sum}{WAIT}")),
        &text(&format!("{PRODUCT}{copy}{WAIT}{sum}")),
    );
}

#[test]
fn operands_of_a_product_before_its_wait() {
    let overwrite = "st.shared.u32 [%r3], %r1;\n";
    // By the same warp: its own rows of A. Another warp's needs a barrier too.
    pair(
        FaultClass::AsyncCopyHazard,
        128,
        &text(&format!("{PRODUCT}bar.sync 0;\n{overwrite}{WAIT}{STORE}")),
        &text(&format!("{PRODUCT}{WAIT}bar.sync 0;\n{overwrite}{STORE}")),
    );
    pair(
        FaultClass::DataRaceShared,
        128,
        &text(&format!("{PRODUCT}{WAIT}xor.b32 %r3, %r3, 512;\n{overwrite}{STORE}")),
        &text(&format!("{PRODUCT}{WAIT}bar.sync 0;\nxor.b32 %r3, %r3, 512;\n{overwrite}{STORE}")),
    );
}

#[test]
fn source_of_a_bulk_store_before_its_wait() {
    let store = "fence.proxy.async; bar.sync 0; setp.ne.u32 %p1, %r1, 0; mul.wide.u32 %rd5, %r4, 1024; add.u64 %rd5, %rd0, %rd5; @!%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r2], 1024; cp.async.bulk.commit_group;\n";
    let wait = "cp.async.bulk.wait_group.read 0;\n";
    let overwrite = "st.shared.u32 [%r3], %r1;\n";
    pair(
        FaultClass::AsyncCopyHazard,
        64,
        &text(&format!("{store}bar.sync 0;\n{overwrite}{wait}")),
        &text(&format!("{store}{wait}bar.sync 0;\n{overwrite}")),
    );
    // The wait without the barrier after it orders only the thread that waited.
    pair(
        FaultClass::DataRaceShared,
        64,
        &text(&format!("{store}{wait}{overwrite}")),
        &text(&format!("{store}{wait}bar.sync 0;\n{overwrite}")),
    );
}

#[test]
fn target_of_a_bulk_load_before_its_phase() {
    let load = "mul.wide.u32 %rd5, %r4, 1024; add.u64 %rd5, %rd0, %rd5; setp.ne.u32 %p1, %r1, 0; bar.sync 0; @%p1 bra J; mbarrier.init.shared.b64 [%r9], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r9], 1024;\n\
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd5], 1024, [%r9]; J: bar.sync 0;\n";
    let test = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0;";
    let read = "ld.shared.u32 %r8, [%r3]; st.global.u32 [%rd1+8192], %r8;\n";
    let again = "@!%p2 bra W;\n";
    pair(
        FaultClass::AsyncCopyHazard,
        64,
        &text(&format!("{load}{read}")),
        &text(&format!("{load}{test}{again}{read}")),
    );
    // A test whose answer nobody looks at.
    pair(
        FaultClass::AsyncCopyHazard,
        64,
        &text(&format!("{load}{test}\n{read}")),
        &text(&format!("{load}{test}{again}{read}")),
    );
    // Only the first warp waits: the others need its barrier.
    let first =
        |after: &str| text(&format!("{load}setp.ge.u32 %p3, %r1, 32; @%p3 bra K; {test}{again}K: {after}{read}"));
    pair(FaultClass::AsyncCopyHazard, 64, &first(""), &first("bar.sync 0;\n"));
    // A mbarrier that is used before its initialisation is seen.
    let early = |barrier: &str| {
        text(&format!(
            "setp.ne.u32 %p1, %r1, 0; @!%p1 mbarrier.init.shared.b64 [%r9], 64; {barrier} mbarrier.arrive.shared.b64 %rd6, [%r9]; W: mbarrier.try_wait.shared.b64 %p2, [%r9], %rd6; @!%p2 bra W;"
        ))
    };
    let run = |t: &str, seed| kernel_with(t, Arch::SM_90, 1, 64, 0, 4096, Options { seed, ..Options::default() }).1;
    for seed in [None, Some(1), Some(2), Some(3)] {
        assert!(run(&early(""), seed).is_err() && run(&early("bar.sync 0;"), seed).is_ok(), "seed {seed:?}");
    }
}

#[test]
fn a_phase_that_never_ends_is_a_timeout() {
    let wait = |bytes: u32| {
        text(&format!(
            "setp.ne.u32 %p1, %r1, 0; bar.sync 0; @%p1 bra J; mbarrier.init.shared.b64 [%r9], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r9], {bytes};\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 1024, [%r9]; J: bar.sync 0; W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra W;"
        ))
    };
    let run = |t: &str| kernel_with(t, Arch::SM_90, 1, 64, 0, 4096, Options::default()).1;
    assert_eq!(run(&wait(1040)).unwrap_err().class, FaultClass::Timeout);
    assert!(run(&wait(1024)).is_ok());
}

/// A missing barrier around a copy is a race; a missing wait is a hazard of the copy. Both have the other.
#[test]
fn waits_and_barriers_of_copies_are_told_apart() {
    let copy = "cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.commit_group;\n";
    let wait = "cp.async.wait_group 0;\n";
    let read = "xor.b32 %r8, %r3, 1024; ld.shared.u32 %r8, [%r8]; st.global.u32 [%rd1+8192], %r8;\n";
    let order = |parts: &[&str]| text(&parts.concat());
    let barrier = "bar.sync 0;\n";
    let right = order(&[barrier, copy, wait, barrier, read]);
    pair(FaultClass::AsyncCopyHazard, 128, &order(&[barrier, copy, barrier, read, wait]), &right);
    pair(FaultClass::DataRaceShared, 128, &order(&[barrier, copy, wait, read]), &right);
    // Refilled while others still read.
    pair(
        FaultClass::DataRaceShared,
        128,
        &order(&[barrier, copy, wait, barrier, read, copy, wait]),
        &order(&[barrier, copy, wait, barrier, read, barrier, copy, wait]),
    );
}
