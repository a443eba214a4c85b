//! Each class of fault: a faulty kernel that must be reported as exactly that, and the same mended, which must not.

mod common;
use common::{kernel, kernel_with};
use cuda_sim::{Arch, Device, FaultClass, LaunchConfig, Options};

/// A kernel `k` over `out`; `%r1` is the thread, `%r2` the block, `%rd1` the address of `out[thread + block * ntid]`.
fn text(shared: &str, body: &str) -> String {
    format!(
        ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .pred %p<8>; .reg .f32 %f<8>;\n{shared}\n\
         mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.u32 %r4, %r2, %r3, %r1;\n\
         ld.param.u64 %rd0, [out]; mul.wide.u32 %rd1, %r4, 4; add.u64 %rd1, %rd0, %rd1;\n{body}\nret; }}"
    )
}

/// Runs both, in several orders.
fn pair(class: FaultClass, code: u32, faulty: &str, fixed: &str, grid: u32, block: u32) {
    for seed in [None, Some(7), Some(8)] {
        let options = Options { seed, budget: 100_000, ..Options::default() };
        let (_, result) = kernel_with(faulty, Arch::SM_80, grid, block, 0, 1024, options.clone());
        let fault = result.expect_err("the faulty kernel must fail");
        assert!(fault.reports.iter().all(|r| r.class == class), "expected {class}: {}", fault.text);
        assert_eq!(fault.cuda_error, code);
        let (_, result) = kernel_with(fixed, Arch::SM_80, grid, block, 0, 1024, options);
        if let Err(fault) = result {
            panic!("the fixed kernel is accused: {}", fault.text);
        }
    }
}

#[test]
fn out_of_bounds() {
    let at = |offset| text("", &format!("st.global.u32 [%rd1+{offset}], %r1;"));
    pair(FaultClass::OobGlobal, 700, &at(4096), &at(0), 1, 32);
    let shared = |n: u32| {
        text(
            ".shared .align 4 .b8 s[128];",
            &format!("mul.lo.u32 %r5, %r1, {n}; mov.u32 %r6, s; add.u32 %r5, %r5, %r6; st.shared.u32 [%r5], %r1;"),
        )
    };
    pair(FaultClass::OobShared, 700, &shared(8), &shared(4), 1, 32);
    pair(
        FaultClass::OobGlobal,
        700,
        &text("", "mov.u64 %rd2, 0; ld.global.u32 %r5, [%rd2];"),
        &text("", "ld.global.u32 %r5, [%rd1];"),
        1,
        1,
    );
}

/// Counting must not fail where an access does.
#[test]
fn counters_of_the_last_address() {
    let body = text("", "mov.u64 %rd2, -4; ld.global.u32 %r5, [%rd2];");
    let options = Options { counters: true, ..Options::default() };
    let fault = kernel_with(&body, Arch::SM_80, 1, 32, 0, 1024, options).1.unwrap_err();
    assert!(fault.class == FaultClass::OobGlobal, "{}", fault.text);
}

#[test]
fn misaligned() {
    let at = |offset| text("", &format!("ld.global.v2.u32 {{%r5, %r6}}, [%rd0+{offset}];"));
    pair(FaultClass::Misaligned, 716, &at(4), &at(8), 1, 32);
}

const EXCHANGE: &str = "mov.u32 %r6, s; shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r6; st.shared.u32 [%r5], %r1;";

#[test]
fn shared_races() {
    let shared = ".shared .align 4 .b8 s[512];";
    let body = |between: &str, mask: u32| {
        text(
            shared,
            &format!(
                "{EXCHANGE} {between} xor.b32 %r7, %r1, {mask}; shl.b32 %r7, %r7, 2; add.u32 %r7, %r7, %r6; ld.shared.u32 %r8, [%r7]; st.global.u32 [%rd1], %r8;"
            ),
        )
    };
    pair(FaultClass::DataRaceShared, 719, &body("", 32), &body("bar.sync 0;", 32), 2, 128);
    // Within a warp.
    pair(FaultClass::DataRaceShared, 719, &body("", 1), &body("bar.warp.sync -1;", 1), 1, 32);
    // A named barrier of the two warps that exchange is enough.
    let named = "and.b32 %r9, %r1, 64; shr.u32 %r9, %r9, 6; add.u32 %r9, %r9, 1; bar.sync %r9, 64;";
    pair(FaultClass::DataRaceShared, 719, &body(named, 64), &body(named, 32), 1, 128);
    // A warp that arrives without waiting orders what it did before, not what it does then.
    let arrives = |before: &str, after: &str| {
        text(
            shared,
            &format!(
                "{EXCHANGE} bar.sync 0; setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 64; ld.shared.u32 %r8, [%r5+-128]; st.global.u32 [%rd1], %r8; bra E;\n\
                 A: {before} bar.arrive 1, 64; {after} E:"
            ),
        )
    };
    let store = "st.shared.u32 [%r5], %r3;";
    pair(FaultClass::DataRaceShared, 719, &arrives("", store), &arrives(store, ""), 1, 64);
    // Nor does it learn what the others did.
    let learns = |how: &str| {
        text(
            shared,
            &format!(
                "{EXCHANGE} bar.sync 0; setp.lt.u32 %p1, %r1, 32; @%p1 bra A; st.shared.u32 [%r5], %r3; bar.sync 1, 64; bra E;\n\
                 A: bar.{how} 1, 64; ld.shared.u32 %r8, [%r5+128]; st.global.u32 [%rd1], %r8; E:"
            ),
        )
    };
    pair(FaultClass::DataRaceShared, 719, &learns("arrive"), &learns("sync"), 1, 64);
    // Neighbours in a word are no race: each lane has its own two bytes, and reads and writes them again.
    let halves = |step: u32| {
        text(shared, &format!(
            "mov.u32 %r6, s; mad.lo.u32 %r5, %r1, {step}, %r6; cvt.u16.u32 %h1, %r1; st.shared.u16 [%r5], %h1; ld.shared.u16 %h2, [%r5]; st.shared.u16 [%r5], %h2; ld.shared.u16 %h2, [%r5]; add.u16 %h2, %h2, 1; st.shared.u16 [%r5], %h2;"
        )).replace(".reg .pred", ".reg .b16 %h<4>; .reg .pred")
    };
    pair(FaultClass::DataRaceShared, 719, &halves(0), &halves(2), 1, 96);
    // Everybody writing the same value is no race; different values are.
    let same = |v: &str| text(shared, &format!("mov.u32 %r6, s; st.shared.u32 [%r6], {v};"));
    pair(FaultClass::DataRaceShared, 719, &same("%r1"), &same("5"), 1, 64);
}

/// Of several reads the one is found that the writer does not know of, whichever came first.
#[test]
fn races_with_one_of_many_readers() {
    let shared = |leaves: &str, left: u32, threads: u32| {
        let body = format!(
            "mov.u32 %r6, s; shr.u32 %r7, %r1, 5; setp.ne.u32 %p1, %r1, 0; @%p1 bra B; st.shared.u32 [%r6], %r3; ld.shared.u32 %r8, [%r6];\n\
             B: bar.sync 0; setp.eq.u32 %p2, %r7, 0; @%p2 bra E; setp.eq.u32 %p3, %r7, 3; @%p3 bra W;\n\
             ld.shared.u32 %r8, [%r6]; st.global.u32 [%rd1], %r8; setp.eq.u32 %p4, %r7, {left}; {leaves} bar.sync 1, {threads}; bra E;\n\
             W: bar.sync 1, {threads}; setp.ne.u32 %p5, %r1, 96; @%p5 bra E; st.shared.u32 [%r6], %r1;\nE:"
        );
        text(".shared .align 4 .b8 s[4];", &body)
    };
    for left in [1, 2] {
        pair(FaultClass::DataRaceShared, 719, &shared("@%p4 bra E;", left, 64), &shared("", left, 96), 1, 128);
    }
    // A weak read, a strong one that knows of it, and an atomic that races with the weak one alone.
    let atomic = |waits: &str, threads: u32| {
        let body = format!(
            "mov.u32 %r6, s; shr.u32 %r7, %r1, 5; setp.ne.u32 %p1, %r1, 0; @%p1 bra B; st.shared.u32 [%r6], %r3;\n\
             B: bar.sync 0; setp.eq.u32 %p2, %r7, 1; @%p2 bra V; setp.eq.u32 %p3, %r7, 2; @%p3 bra A;\n\
             ld.shared.u32 %r8, [%r6]; st.global.u32 [%rd1], %r8; bar.sync 1, {threads}; bra E;\n\
             V: bar.sync 1, {threads}; ld.volatile.shared.u32 %r8, [%r6]; st.global.u32 [%rd1], %r8; bra E;\n\
             A: {waits} atom.shared.add.u32 %r8, [%r6], 1;\nE:"
        );
        text(".shared .align 4 .b8 s[4];", &body)
    };
    pair(FaultClass::DataRaceShared, 719, &atomic("", 64), &atomic("bar.sync 1, 96;", 96), 1, 96);
}

#[test]
fn uninitialised() {
    let shared = ".shared .align 4 .b8 s[512];";
    let read = "mov.u32 %r6, s; ld.shared.u32 %r5, [%r6+4]; st.global.u32 [%rd1], %r5;";
    let fixed = text(shared, &format!("mov.u32 %r6, s; st.shared.u32 [%r6+4], 3; {read}"));
    pair(FaultClass::UninitialisedShared, 719, &text(shared, read), &fixed, 1, 1);
    let local = ".local .align 4 .b8 l[16];";
    let faulty = text(local, "st.local.u32 [l], 1; ld.local.u32 %r5, [l+4]; add.u32 %r5, %r5, 1;");
    pair(
        FaultClass::UninitialisedLocal,
        719,
        &faulty,
        &text(local, "st.local.u32 [l+4], 1; ld.local.u32 %r5, [l+4]; add.u32 %r5, %r5, 1;"),
        1,
        1,
    );
}

#[test]
fn barriers() {
    let part = |n: u32| text("", &format!("setp.lt.u32 %p1, %r1, {n}; @%p1 bar.sync 0; st.global.u32 [%rd1], %r1;"));
    pair(FaultClass::BarrierDivergence, 719, &part(40), &part(64), 1, 64);
    // An early exit is no skipped barrier.
    let early = text("", "setp.ge.u32 %p1, %r1, 40; @%p1 bra END; bar.sync 0; st.global.u32 [%rd1], %r1; END:");
    if let (_, Err(fault)) = kernel(&early, Arch::SM_80, 1, 64, 0, 1024) {
        panic!("{}", fault.text);
    }
    // Warps that wait for different barriers for ever.
    let dead =
        |b: u32| text("", &format!("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync {b}; bra E; A: bar.sync 0; E:"));
    pair(FaultClass::BarrierDivergence, 719, &dead(1), &dead(0), 1, 64);
}

#[test]
fn asynchronous_copies() {
    let body = |wait: &str| {
        text(
            ".shared .align 16 .b8 s[512];",
            &format!(
                "mov.u32 %r6, s; shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r6; cp.async.ca.shared.global [%r5], [%rd1], 4; cp.async.commit_group; {wait} ld.shared.u32 %r7, [%r5]; st.global.u32 [%rd1], %r7;"
            ),
        )
    };
    pair(FaultClass::AsyncCopyHazard, 719, &body(""), &body("cp.async.wait_group 0;"), 1, 32);
    pair(FaultClass::AsyncCopyHazard, 719, &body("cp.async.wait_group 1;"), &body("cp.async.wait_all;"), 1, 32);
}

#[test]
fn endless_loops() {
    let body =
        |n: &str| text("", &format!("mov.u32 %r5, 0; L: add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, {n}; @%p1 bra L;"));
    pair(FaultClass::Timeout, 702, &body("4294967295"), &body("1000"), 1, 32);
}

#[test]
fn global_races_between_blocks() {
    let body = |add: &str| text("", &format!("setp.ne.u32 %p1, %r1, 0; @%p1 bra E; {add} E:"));
    pair(
        FaultClass::DataRaceGlobal,
        719,
        &body("add.u32 %r5, %r2, 1; st.global.u32 [%rd0], %r5;"),
        &body("atom.global.add.u32 %r5, [%rd0], 1;"),
        4,
        32,
    );
    // The last block sums what all wrote: with fences correct, without them not.
    let last = |fence: &str| {
        text(
            ".shared .align 4 .b8 s[4];",
            &format!(
                "mov.u32 %r6, s; shl.b32 %r9, %r2, 2; cvt.u64.u32 %rd2, %r9; add.u64 %rd2, %rd2, %rd0;\n\
             setp.ne.u32 %p1, %r1, 5; @%p1 bra W; st.global.u32 [%rd2+64], 7; W: {fence} bar.sync 0;\n\
             setp.ne.u32 %p2, %r1, 0; @%p2 bra B; {fence} atom.global.add.u32 %r5, [%rd0], 1; {fence} st.shared.u32 [%r6], %r5; B: bar.sync 0;\n\
             ld.shared.u32 %r5, [%r6]; setp.ne.u32 %p3, %r5, 3; @%p3 bra E;\n\
             ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd0+64]; add.u32 %r10, %r10, %r11; add.u32 %r10, %r10, %r12; add.u32 %r10, %r10, %r13;\n\
             st.global.u32 [%rd0+128], %r10; E:"
            ),
        )
    };
    pair(FaultClass::DataRaceGlobal, 719, &last(""), &last("membar.gl;"), 4, 64);
    let (out, _) = kernel(&last("fence.acq_rel.gpu;"), Arch::SM_80, 4, 64, 0, 1024);
    assert_eq!(out[32], 28);
}

/// A fence or an access of the scope of a block says nothing to others.
#[test]
fn scopes() {
    // Block 0 writes and raises a flag, for which block 1 waits before it reads.
    let handed = |fence: &str, raise: &str, look: &str| {
        let body = format!(
            "setp.ne.u32 %p1, %r1, 0; @%p1 bra E; setp.ne.u32 %p2, %r2, 0; @%p2 bra R;\n\
             mov.u32 %r6, 7; st.global.u32 [%rd0+4], %r6; {fence} mov.u32 %r7, 1; {raise} [%rd0], %r7; bra E;\n\
             R: {look} %r5, [%rd0]; setp.eq.u32 %p3, %r5, 0; @%p3 bra R; {fence} ld.global.u32 %r8, [%rd0+4]; st.global.u32 [%rd0+8], %r8; E:"
        );
        text("", &body)
    };
    let (raise, look) = ("st.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u32");
    let right = handed("fence.acq_rel.gpu;", raise, look);
    for fence in ["fence.acq_rel.cta;", "membar.cta;", "fence.acq_rel.cluster;", "fence.proxy.async;"] {
        pair(FaultClass::DataRaceGlobal, 719, &handed(fence, raise, look), &right, 2, 32);
    }
    let (raise, look) = ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32");
    let right = handed("", raise, look);
    for (raise, look) in [
        ("st.release.cta.global.u32", look),
        (raise, "ld.acquire.cta.global.u32"),
        ("red.relaxed.gpu.global.add.u32", look),
        ("red.release.cta.global.add.u32", look),
    ] {
        pair(FaultClass::DataRaceGlobal, 719, &handed("", raise, look), &right, 2, 32);
    }
}

/// Within a block narrow scopes will do, also as links of a longer chain to other blocks.
#[test]
fn narrow_scopes_within_a_block_are_not_accused() {
    // Warp 0 of block 0 writes, and tells warp 1; that tells warp 0 of block 1, which tells its warp 1; that reads.
    let chain = |write: &str, read: &str, fence: &str| {
        let far = ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32");
        let body = format!(
            "and.b32 %r5, %r1, 31; setp.ne.u32 %p1, %r5, 0; @%p1 bra E; shr.u32 %r5, %r1, 5; shl.b32 %r6, %r2, 1; add.u32 %r5, %r5, %r6; mov.u32 %r7, 1;\n\
             setp.eq.u32 %p2, %r5, 1; @%p2 bra B; setp.eq.u32 %p2, %r5, 2; @%p2 bra C; setp.eq.u32 %p2, %r5, 3; @%p2 bra D;\n\
             st.global.u32 [%rd0+64], %r7; {fence} {write} [%rd0], %r7; bra E;\n\
             B: {read} %r8, [%rd0]; setp.eq.u32 %p3, %r8, 0; @%p3 bra B; {fence} {} [%rd0+4], %r7; bra E;\n\
             C: {} %r8, [%rd0+4]; setp.eq.u32 %p3, %r8, 0; @%p3 bra C; {fence} {write} [%rd0+8], %r7; bra E;\n\
             D: {read} %r8, [%rd0+8]; setp.eq.u32 %p3, %r8, 0; @%p3 bra D; {fence} ld.global.u32 %r9, [%rd0+64]; E:",
            far.0, far.1
        );
        text("", &body)
    };
    let gpu = "st.relaxed.gpu.global.u32";
    for right in [
        chain("st.release.cta.global.u32", "ld.acquire.cta.global.u32", ""),
        chain("st.volatile.global.u32", "ld.volatile.global.u32", "membar.cta;"),
        chain("red.release.cta.global.add.u32", "ld.acquire.cta.global.u32", ""),
    ] {
        let faulty = chain(gpu, "ld.relaxed.gpu.global.u32", "");
        pair(FaultClass::DataRaceGlobal, 719, &faulty, &right, 2, 64);
    }
}

/// A mbarrier passes on what who arrives has learnt of other blocks.
#[test]
fn one_warp_may_wait_for_a_block() {
    let body = "setp.ne.u32 %p1, %r2, 0; @%p1 bra B; setp.ne.u32 %p2, %r1, 0; @%p2 bra E; mov.u32 %r7, 1;\n\
        st.global.u32 [%rd0+64], %r7; st.release.gpu.global.u32 [%rd0], %r7; bra E;\n\
        B: mov.u32 %r6, bar; setp.ne.u32 %p2, %r1, 0; @%p2 bra I; mbarrier.init.shared.b64 [%r6], 1; I: bar.sync 0;\n\
        setp.eq.u32 %p3, %r1, 32; @%p3 bra R; setp.ne.u32 %p2, %r1, 0; @%p2 bra E;\n\
        L: ld.acquire.gpu.global.u32 %r8, [%rd0]; setp.eq.u32 %p4, %r8, 0; @%p4 bra L; mbarrier.arrive.shared.b64 %rd4, [%r6]; bra E;\n\
        R: mbarrier.test_wait.parity.shared.b64 %p5, [%r6], 0; @!%p5 bra R; ld.global.u32 %r9, [%rd0+64]; E:";
    let right = text(".shared .align 8 .b64 bar;", body);
    pair(FaultClass::DataRaceGlobal, 719, &right.replace("ld.acquire", "ld.relaxed"), &right, 2, 64);
}

/// Whoever reads more flags than are remembered may have read any.
#[test]
fn many_flags_are_not_accused() {
    // Blocks 1 to 100 write and raise a flag each; the lanes of block 0 look at all of them, and then read.
    let body = "setp.ne.u32 %p2, %r2, 0; @%p2 bra S; mov.u32 %r9, %r1;\n\
        N: mul.wide.u32 %rd2, %r9, 4; add.u64 %rd2, %rd0, %rd2;\n\
        L: ld.relaxed.gpu.global.u32 %r5, [%rd2]; setp.eq.u32 %p3, %r5, 0; @%p3 bra L;\n\
        add.u32 %r9, %r9, 32; setp.lt.u32 %p4, %r9, 100; @%p4 bra N; fence.acq_rel.gpu;\n\
        mul.wide.u32 %rd2, %r1, 4; add.u64 %rd2, %rd0, %rd2; ld.global.u32 %r6, [%rd2+512]; ld.global.u32 %r6, [%rd2+784]; bra E;\n\
        S: setp.ne.u32 %p1, %r1, 0; @%p1 bra E; sub.u32 %r9, 100, %r2; mul.wide.u32 %rd2, %r9, 4; add.u64 %rd2, %rd0, %rd2;\n\
        mov.u32 %r7, 1; st.global.u32 [%rd2+512], %r7; fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%rd2], %r7; E:";
    for seed in [None, Some(7), Some(8), Some(9)] {
        let options = Options { seed, ..Options::default() };
        if let (_, Err(fault)) = kernel_with(&text("", body), Arch::SM_80, 101, 32, 0, 1024, options) {
            panic!("the right kernel is accused, seed {seed:?}: {}", fault.text);
        }
    }
}

#[test]
fn locks_make_progress_and_order() {
    // A spin lock by every thread of every block.
    let body = "L: atom.global.cas.b32 %r5, [%rd0], 0, 1; setp.ne.u32 %p1, %r5, 0; @%p1 bra L; membar.gl;\n\
                ld.global.u32 %r6, [%rd0+4]; add.u32 %r6, %r6, 1; st.global.u32 [%rd0+4], %r6; membar.gl; atom.global.exch.b32 %r7, [%rd0], 0;";
    let (out, result) = kernel(&text("", body), Arch::SM_80, 3, 64, 0, 1024);
    if let Err(f) = result {
        panic!("{}", f.text);
    }
    assert_eq!(out[1], 192);
}

#[test]
fn blocks_that_wait_for_each_other_finish() {
    // Block 0 waits for the last block: more blocks than host threads must be able to run.
    let body = "setp.ne.u32 %p1, %r1, 0; @%p1 bra E; setp.ne.u32 %p2, %r2, 0; @%p2 bra S;\n\
                L: ld.acquire.gpu.global.u32 %r5, [%rd0]; setp.ne.u32 %p3, %r5, 39; @%p3 bra L; bra E;\n\
                S: red.release.gpu.global.add.u32 [%rd0], 1; E:";
    let (out, result) = kernel(&text("", body), Arch::SM_80, 40, 32, 0, 1024);
    assert!(result.is_ok());
    assert_eq!(out[0], 39);
}

#[test]
fn refusals_and_leaks() {
    let device = Device::new(Arch::SM_86, Options::default());
    let text = format!(".version 8.0\n.target sm_80\n.address_size 64\n{}", text("", ""));
    let module = device.load_module(&text).unwrap();
    let f = module.function("k").unwrap();
    let refused = |c: LaunchConfig| device.launch(&f, &c, &[0; 8]).expect_err("must be refused").cuda_error;
    assert_eq!(refused(LaunchConfig::new([1; 3], [1025, 1, 1])), 1);
    assert_eq!(refused(LaunchConfig::new([1, 65536, 1], [32, 1, 1])), 1);
    assert_eq!(refused(LaunchConfig::new([1; 3], [32, 1, 1]).with_shared(100 * 1024)), 1);
    let mut c = LaunchConfig::new([1; 3], [1024, 1, 1]);
    c.registers = Some(128);
    assert_eq!(refused(c), 701);
    assert_eq!(
        device.launch(&f, &LaunchConfig::new([1; 3], [32, 1, 1]), &[0; 4]).expect_err("too few parameters").cuda_error,
        1
    );
    assert!(device.leaks().is_empty());
    let a = device.alloc(100).unwrap();
    assert_eq!(device.leaks().len(), 1);
    device.free(a).unwrap();
    assert!(device.leaks().is_empty() && device.free(a).is_err());
    let mut byte = [0];
    let error = device.read(a, &mut byte).unwrap_err().to_string();
    assert!(error.contains("freed"), "{error}");
}
