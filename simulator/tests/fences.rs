//! Missing `wgmma.fence` and missing fences between the proxies: each faulty kernel is reported as exactly that, its
//! mended twin not at all.

mod common;
use common::kernel_with;
use cuda_sim::{Arch, Fault, FaultClass, Options, Sanitizer};

fn run(text: &str, seed: Option<u64>) -> Result<(), Fault> {
    let options = Options { seed, ..Options::default() };
    kernel_with(text, Arch::SM_90, 2, 128, 0, 8192, options).1.map(|_| ())
}

fn right(text: &str) {
    for seed in [None, Some(3), Some(11)] {
        if let Err(fault) = run(text, seed) {
            panic!("the right kernel is accused, seed {seed:?}: {}", fault.text);
        }
    }
}

/// Every report is of a missing fence, and one of them has `words`.
fn faulty(text: &str, words: &str) {
    for seed in [None, Some(3), Some(11)] {
        let fault = run(text, seed).expect_err("the faulty kernel must fail");
        assert!(fault.reports.iter().all(|r| r.class == FaultClass::MissingFence), "seed {seed:?}: {}", fault.text);
        assert!(fault.text.contains(words), "{words}: {}", fault.text);
        assert_eq!(fault.cuda_error, 719);
    }
    let options = Options { sanitizer: Sanitizer { fences: false, ..Sanitizer::ON }, ..Options::default() };
    let unchecked = kernel_with(text, Arch::SM_90, 2, 128, 0, 8192, options).1;
    assert!(unchecked.is_ok(), "another check finds it too");
}

/// `%r1` thread, `%r2` address of `s`, `%r3` the thread's 16 bytes in it, `%rd1` the thread's place in `out`, `%rd3` and
/// `%rd4` descriptors of A (2 KB at `s`) and B (256 bytes at `s + 2048`), which are zeros. `%f0..%f3` are zeros.
fn text(zeros: &str, body: &str) -> String {
    format!(
        ".visible .entry k(.param .u64 out) {{ .reg .b32 %r<64>; .reg .b64 %rd<16>; .reg .pred %p<8>; .reg .f32 %f<16>; .reg .b16 %h<2>; .reg .b8 %b<4>; .shared .align 128 .b8 s[8192]; .shared .align 8 .b64 bar;\n\
         mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r3, %r1, 16, %r2; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x; mad.lo.u32 %r6, %r4, %r5, %r1; mov.u32 %r9, bar;\n\
         ld.param.u64 %rd0, [out]; mad.wide.u32 %rd1, %r6, 16, %rd0; mov.u32 %r7, 0; setp.ne.u32 %p0, %r1, 0; setp.ne.u32 %p1, %r1, %r1;\n\
         cvt.u64.u32 %rd2, %r2; shr.u64 %rd2, %rd2, 4; or.b64 %rd3, %rd2, 68720001024; add.u64 %rd4, %rd3, 128;\n\
         mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0; mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b16 %h0, 0; mov.b16 %h1, 0; mov.b32 {{%b0, %b1, %b2, %b3}}, %r7;\n\
         {zeros}\n{body}\nret; }}"
    )
}

const STORE_ZEROS: &str =
    "st.shared.v4.u32 [%r3], {%r7, %r7, %r7, %r7}; st.shared.v4.u32 [%r3+2048], {%r7, %r7, %r7, %r7};";
const PROXY: &str = "fence.proxy.async.shared::cta;\n";
const BARRIER: &str = "bar.sync 0;\n";
const FENCE: &str = "wgmma.fence.sync.aligned;\n";
const PRODUCT: &str =
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd4, %p1, 1, 1, 0, 0;\n";
const PRODUCT_OF_REGISTERS: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, %rd4, %p1, 1, 1, 0;\n";
const OTHER_SHAPE: &str =
    "wgmma.mma_async.sync.aligned.m64n16k16.f16.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd4, %p1, 1, 1, 0, 0;\n";
const WAIT: &str = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n";
const RESULT: &str = "st.global.v4.f32 [%rd1], {%f0, %f1, %f2, %f3};\n";

/// A warpgroup is four warps, all of which execute its products.
#[test]
fn a_product_of_one_warp_is_none() {
    let whole = [STORE_ZEROS, PROXY, BARRIER, FENCE, PRODUCT, WAIT, RESULT].concat();
    let some = |condition: &str| {
        let skip = format!("setp.{condition}; @%p2 bra E;\n");
        text(&[STORE_ZEROS, PROXY, BARRIER].concat(), &[&skip, FENCE, PRODUCT, WAIT, RESULT, "E:"].concat())
    };
    right(&text("", &whole));
    let all = text("", &whole);
    // One warp of four, lanes of each, all of a block that has no warpgroup.
    for (faulty, threads) in
        [(&some("ge.u32 %p2, %r1, 32"), 128), (&some("eq.u32 %p2, %r1, 5"), 128), (&all, 100), (&all, 96), (&all, 32)]
    {
        let fault = kernel_with(faulty, Arch::SM_90, 1, threads, 0, 8192, Options::default()).1.unwrap_err();
        assert!(fault.reports.iter().any(|r| r.class == FaultClass::BarrierDivergence), "{threads}: {}", fault.text);
        assert!(fault.text.contains("warps 0 to 3 are a warpgroup"), "{threads}: {}", fault.text);
    }
}

/// Products of memory that all proxies see.
fn products(parts: &[&str]) -> String {
    text(STORE_ZEROS, &([PROXY, BARRIER].concat() + &parts.concat() + RESULT))
}

#[test]
fn the_first_product_needs_a_fence() {
    faulty(&products(&[PRODUCT, WAIT]), "first wgmma.mma_async");
    right(&products(&[FENCE, PRODUCT, WAIT]));
}

#[test]
fn accumulators_written_by_others() {
    let add = "add.f32 %f1, %f1, %f1;\n";
    faulty(&products(&[FENCE, PRODUCT, WAIT, add, PRODUCT, WAIT]), "an accumulator is written at line");
    right(&products(&[FENCE, PRODUCT, WAIT, add, FENCE, PRODUCT, WAIT]));
    let load = "ld.global.f32 %f2, [%rd1];\n";
    faulty(&products(&[FENCE, load, PRODUCT, WAIT]), "an accumulator is written at line");
    right(&products(&[load, FENCE, PRODUCT, WAIT]));
    // Through a move, as compilers write it.
    let moved = "add.f32 %f8, %f1, %f1; mov.f32 %f1, %f8;\n";
    faulty(&products(&[FENCE, PRODUCT, WAIT, moved, PRODUCT, WAIT]), "an accumulator is written at line");
    right(&products(&[FENCE, PRODUCT, WAIT, moved, FENCE, PRODUCT, WAIT]));
    // A move of zero in most lanes does not undo what the first lane wrote.
    let partly = "mov.f32 %f9, 0f00000000; add.f32 %f1, %f1, %f1; @!%p0 bra Z; mov.f32 %f1, %f9; Z:\n";
    faulty(&products(&[FENCE, PRODUCT, WAIT, partly, PRODUCT, WAIT]), "an accumulator is written at line");
}

#[test]
fn fragments_written_by_others() {
    let write = "or.b32 %r11, %r11, %r7;\n";
    faulty(&products(&[FENCE, write, PRODUCT_OF_REGISTERS, WAIT]), "a register of A is written at line");
    right(&products(&[write, FENCE, PRODUCT_OF_REGISTERS, WAIT]));
    // Any part of what a move packs.
    for part in ["%h0", "%h1"] {
        let packed = format!("or.b16 {part}, {part}, 0; mov.b32 %r11, {{%h0, %h1}};\n");
        faulty(&products(&[FENCE, &packed, PRODUCT_OF_REGISTERS, WAIT]), "a register of A is written at line");
        right(&products(&[&packed, FENCE, PRODUCT_OF_REGISTERS, WAIT]));
    }
    for part in ["%b0", "%b1", "%b2", "%b3"] {
        let packed = format!("cvt.u8.u32 {part}, %r7; mov.b32 %r11, {{%b0, %b1, %b2, %b3}};\n");
        faulty(&products(&[FENCE, &packed, PRODUCT_OF_REGISTERS, WAIT]), "a register of A is written at line");
        right(&products(&[&packed, FENCE, PRODUCT_OF_REGISTERS, WAIT]));
    }
}

#[test]
fn products_of_one_shape_follow_each_other() {
    right(&products(&[FENCE, PRODUCT, PRODUCT, PRODUCT_OF_REGISTERS, WAIT, PRODUCT, WAIT]));
    faulty(&products(&[FENCE, PRODUCT, WAIT, OTHER_SHAPE, WAIT]), "another shape, m64n8k16");
    right(&products(&[FENCE, PRODUCT, WAIT, FENCE, OTHER_SHAPE, WAIT]));
    // Compilers start accumulators with moves after the fence, and read them before the next one.
    let moves = "mov.f32 %f9, 0f00000000; mov.f32 %f0, %f9; mov.f32 %f1, %f9; mov.f32 %f2, 0f00000000;\n";
    right(&products(&[FENCE, moves, PRODUCT, WAIT, "add.f32 %f8, %f0, %f1;\n", PRODUCT, WAIT]));
}

#[test]
fn operands_of_products_and_the_proxies() {
    let product = [FENCE, PRODUCT, WAIT, RESULT].concat();
    let with = |between: &str| text(STORE_ZEROS, &(between.to_owned() + &product));
    faulty(&with(BARRIER), "without a fence.proxy.async");
    // By the writer before the barrier, or by the reader after it.
    right(&with(&[PROXY, BARRIER].concat()));
    right(&with(&[BARRIER, PROXY].concat()));
    right(&with("fence.proxy.async; bar.sync 0;\n"));
    // Fences of other kinds.
    faulty(&with("fence.proxy.async.global; bar.sync 0;\n"), "without a fence.proxy.async");
    faulty(&with("fence.acq_rel.cta; membar.gl; bar.sync 0;\n"), "without a fence.proxy.async");
    // A fence that comes before a later write.
    let late = "bar.sync 0; st.shared.u32 [%r3], %r7; bar.sync 0;\n";
    faulty(&with(&[PROXY, late].concat()), "without a fence.proxy.async");
    right(&with(&[PROXY, late, PROXY].concat()));
    // A copy is ordinary work that lands at its wait.
    let copied = "cp.async.cg.shared.global [%r3], [%rd1], 16; cp.async.cg.shared.global [%r3+2048], [%rd1], 16; cp.async.wait_all;\n";
    let copy = |between: &str| text(copied, &(between.to_owned() + &product));
    faulty(&copy(BARRIER), "without a fence.proxy.async");
    right(&copy(&[BARRIER, PROXY].concat()));
    right(&copy(&[PROXY, BARRIER].concat()));
}

#[test]
fn knowledge_of_a_fence_goes_through_mbarriers() {
    let begin = "@!%p0 mbarrier.init.shared.b64 [%r9], 128; bar.sync 0;\n";
    let pass =
        "mbarrier.arrive.shared.b64 %rd6, [%r9]; W: mbarrier.try_wait.shared.b64 %p2, [%r9], %rd6; @!%p2 bra W;\n";
    let product = [FENCE, PRODUCT, WAIT, RESULT].concat();
    let with = |fence: &str| text("", &[begin, STORE_ZEROS, fence, pass, &product].concat());
    faulty(&with(""), "without a fence.proxy.async");
    right(&with(PROXY));
}

#[test]
fn sources_of_bulk_stores_and_the_proxies() {
    let store = "mul.wide.u32 %rd5, %r4, 2048; add.u64 %rd5, %rd0, %rd5; @%p0 bra E; cp.async.bulk.global.shared::cta.bulk_group [%rd5], [%r2], 2048; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; E:\n";
    let with = |between: &str| text(STORE_ZEROS, &(between.to_owned() + store));
    faulty(&with(BARRIER), "without a fence.proxy.async");
    right(&with(&[PROXY, BARRIER].concat()));
    right(&with(&[BARRIER, PROXY].concat()));
}

/// What the asynchronous proxy wrote itself needs no fence, nor does the mbarrier that says so.
#[test]
fn bulk_loads_need_no_fence() {
    let load = "@%p0 bra J; mbarrier.init.shared.b64 [%r9], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r9], 4096;\n\
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 4096, [%r9]; J: bar.sync 0;\n\
        W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra W;\n";
    right(&text(load, &[FENCE, PRODUCT, WAIT, "st.global.v4.f32 [%rd1+8192], {%f0, %f1, %f2, %f3};\n"].concat()));
}
