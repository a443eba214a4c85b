//! Asynchronous copies: what lands, when, and where.

mod common;
use common::{PROLOGUE, transform};
use cuda_sim::tensor_map::TensorMap;
use cuda_sim::{Arch, Device, LaunchConfig, Options};

const NAMES: &str = ".shared .align 128 .b8 s[4096]; .shared .align 8 .b64 bar;\n";

/// `%r1` is the address of `s`, `%r2` of the mbarrier, `%r3` the thread's word in `s`; every word of `s` is written.
fn text(body: &str) -> String {
    format!(
        "{NAMES}{PROLOGUE}mov.u32 %r1, s; mov.u32 %r2, bar; mad.lo.u32 %r3, %r0, 4, %r1; mad.wide.u32 %rd2, %r0, 4, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd1;\n{body}\nret; }}"
    )
}

#[test]
fn what_is_not_read_becomes_zero() {
    // 16 bytes for each lane, of which it reads 0, 1, 2 .. 16 and then all; bytes of the input are 1 and up.
    let body = "mad.lo.u32 %r4, %r0, 16, %r1; mad.wide.u32 %rd4, %r0, 16, %rd0; min.u32 %r5, %r0, 16;\n\
        cp.async.cg.shared.global [%r4], [%rd4], 16, %r5; cp.async.commit_group; cp.async.wait_group 0;\n\
        ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4]; mad.wide.u32 %rd5, %r0, 16, %rd1; st.global.v4.u32 [%rd5], {%r10, %r11, %r12, %r13};";
    let input: Vec<u32> = (0..128u32).map(|w| 0x0403_0201u32.wrapping_add(w * 0x0101_0101)).collect();
    let bytes = |w: &[u32]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let (from, out) = (bytes(&input), bytes(&transform(&text(body), 32, 0, &input, 128)));
    for lane in 0..32 {
        for k in 0..16 {
            let want = if k < lane.min(16) { from[16 * lane + k] } else { 0 };
            assert_eq!(out[16 * lane + k], want, "lane {lane} byte {k}");
        }
    }
    // The predicate of ignore-src does the same for all bytes, and 4 and 8 bytes can be copied too.
    let body = "setp.gt.u32 %p1, %r0, 9; cp.async.ca.shared.global [%r3], [%rd2], 4, %p1; mad.lo.u32 %r4, %r0, 8, %r1; mad.wide.u32 %rd4, %r0, 8, %rd0;\n\
        cp.async.ca.shared.global [%r4+2048], [%rd4], 8; cp.async.wait_all; ld.shared.u32 %r10, [%r3]; ld.shared.u32 %r11, [%r4+2052]; mad.wide.u32 %rd5, %r0, 8, %rd1; st.global.v2.u32 [%rd5], {%r10, %r11};";
    let out = transform(&text(body), 32, 0, &input, 64);
    for lane in 0..32 {
        assert_eq!(out[2 * lane], if lane > 9 { 0 } else { input[lane] });
        assert_eq!(out[2 * lane + 1], input[2 * lane + 1]);
    }
}

#[test]
fn groups_end_in_order() {
    // Three groups; at most one may go on: the first two have landed.
    let group = |i: usize| {
        format!("cp.async.ca.shared.global [%r3+{}], [%rd2+{}], 4; cp.async.commit_group;\n", 128 * i, 128 * i)
    };
    let body = format!(
        "{}{}{}cp.async.wait_group 1; ld.shared.u32 %r10, [%r3]; ld.shared.u32 %r11, [%r3+128]; add.u32 %r10, %r10, %r11; st.global.u32 [%rd3], %r10; cp.async.wait_group 0;",
        group(0),
        group(1),
        group(2)
    );
    let input: Vec<u32> = (0..96).map(|i| i * i).collect();
    let out = transform(&text(&body), 32, 0, &input, 32);
    assert!((0..32).all(|l| out[l] == input[l] + input[l + 32]));
}

#[test]
fn copies_arrive_at_mbarriers() {
    let wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;";
    // Each lane's copies arrive; 32 arrivals end the phase.
    let body = format!(
        "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r2], 32; bar.sync 0;\n\
         cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [%r2]; {wait}\n\
         xor.b32 %r4, %r0, 1; mad.lo.u32 %r4, %r4, 4, %r1; ld.shared.u32 %r10, [%r4]; st.global.u32 [%rd3], %r10;"
    );
    let input: Vec<u32> = (0..32).map(|i| 1000 + i).collect();
    let out = transform(&text(&body), 32, 0, &input, 32);
    assert!((0..32).all(|l| out[l] == input[l ^ 1]));
    // Without .noinc the arrival raises the count first: one more arrival is needed by each lane.
    let body = body.replace(".noinc", "").replace("[%r2]; W:", "[%r2]; mbarrier.arrive.shared.b64 %rd9, [%r2]; W:");
    assert_eq!(transform(&text(&body), 32, 0, &input, 32), out);
}

#[test]
fn mbarrier_phases_and_counts() {
    // Four warps, three phases; the count left and the parity are as documented.
    let body = "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r2], 128; bar.sync 0; mov.u32 %r4, 0; mov.u32 %r10, 0; st.shared.u32 [%r3], %r0;\n\
        L: mbarrier.arrive.release.cta.shared::cta.b64 %rd4, [%r2]; W: mbarrier.test_wait.shared.b64 %p2, [%r2], %rd4; @!%p2 bra W;\n\
        xor.b32 %r5, %r0, 64; mad.lo.u32 %r5, %r5, 4, %r1; ld.shared.u32 %r6, [%r5]; add.u32 %r10, %r10, %r6;\n\
        mbarrier.arrive.shared.b64 %rd4, [%r2]; V: mbarrier.try_wait.shared.b64 %p2, [%r2], %rd4; @!%p2 bra V;\n\
        add.u32 %r7, %r0, %r4; st.shared.u32 [%r3], %r7; add.u32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 3; @%p3 bra L; st.global.u32 [%rd3], %r10;";
    let out = transform(&text(body), 128, 0, &[0], 128);
    for thread in 0..128u32 {
        // Values read in the rounds: other, other, other + 1.
        assert_eq!(out[thread as usize], 3 * (thread ^ 64) + 1);
    }
    let body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra E; mbarrier.init.shared.b64 [%r2], 5; mbarrier.arrive.shared.b64 %rd4, [%r2], 2; mbarrier.pending_count.b64 %r10, %rd4;\n\
        mbarrier.arrive.shared.b64 %rd4, [%r2]; mbarrier.pending_count.b64 %r11, %rd4; mbarrier.arrive_drop.shared.b64 %rd4, [%r2], 2; mbarrier.pending_count.b64 %r12, %rd4;\n\
        mbarrier.arrive.shared.b64 %rd4, [%r2]; mbarrier.pending_count.b64 %r13, %rd4; mbarrier.inval.shared.b64 [%r2]; st.global.v4.u32 [%rd1], {%r10, %r11, %r12, %r13}; E:";
    // Counts before each arrival; the drop makes the next phase expect three.
    assert_eq!(transform(&text(body), 32, 0, &[0], 4), [5, 3, 2, 3]);
}

#[test]
fn bulk_copies() {
    let body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra J; mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;\n\
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2]; J: bar.sync 0;\n\
        W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W; ld.shared.u32 %r10, [%r3]; add.u32 %r10, %r10, 1; st.shared.u32 [%r3+1024], %r10; fence.proxy.async; bar.sync 0; @%p1 bra E;\n\
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1+1024], 256; cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1+256], [%r1+1024], 256;\n\
        cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1+256], [%r1+1024], 256; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; E:";
    let input: Vec<u32> = (0..64).map(|i| 7 * i).collect();
    let out = transform(&text(body), 64, 0, &input, 128);
    for i in 0..64 {
        assert_eq!((out[i], out[i + 64]), (input[i] + 1, 2 * (input[i] + 1)), "word {i}");
    }
}

/// A tensor copy of a box of 8 x `width` words and back, with every swizzle, at coordinates outside the tensor too.
/// What is at `at` on a device.
fn words_at(device: &Device, at: u64, count: usize) -> Vec<u32> {
    let mut raw = vec![0; 4 * count];
    device.read(at, &mut raw).unwrap();
    raw.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

#[test]
fn tensor_copies() {
    for (swizzle, width) in [(0u32, 16u32), (0, 64), (1, 8), (2, 16), (3, 32)] {
        for (x, y) in [(0i32, 0i32), (4, 3), (-3, -2), (60, 14)] {
            let device = Device::new(Arch::SM_90, Options::default());
            let words: Vec<u32> = (0..64 * 16).map(|i| 5 * i + 1).collect();
            let bytes = |w: &[u32]| w.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
            let from = device.alloc(4 * 1024).unwrap();
            device.write(from, &bytes(&words)).unwrap();
            let to = device.alloc(4 * 1024).unwrap();
            device.memset(to, &[0], 4 * 1024).unwrap();
            let dump = device.alloc(2048).unwrap();
            let map = |address| TensorMap {
                address,
                rank: 2,
                data_type: 2,
                swizzle,
                dims: [64, 16, 0, 0, 0],
                strides: [256, 0, 0, 0],
                boxes: [width, 8, 0, 0, 0],
                steps: [1, 1, 0, 0, 0],
                ..TensorMap::default()
            };
            let size = 32 * width;
            let source = format!(
                ".version 8.5\n.target sm_90a\n.address_size 64\n{NAMES}.visible .entry k(.param .align 64 .b8 a[128], .param .align 64 .b8 b[128], .param .u64 out) {{\n\
                 .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar; mov.b64 %rd1, a; mov.b64 %rd2, b; ld.param.u64 %rd3, [out];\n\
                 cvta.param.u64 %rd1, %rd1; cvta.param.u64 %rd2, %rd2; mov.u32 %r5, {x}; mov.u32 %r6, {y}; setp.ne.u32 %p1, %r0, 0; @%p1 bra J;\n\
                 mbarrier.init.shared.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {size};\n\
                 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r5, %r6}}], [%r2]; J: bar.sync 0;\n\
                 W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W; mov.u32 %r3, %r0;\n\
                 L: setp.ge.u32 %p3, %r3, {}; @%p3 bra D; mad.lo.u32 %r4, %r3, 4, %r1; ld.shared.u32 %r7, [%r4]; mad.wide.u32 %rd4, %r3, 4, %rd3; st.global.u32 [%rd4], %r7; add.u32 %r3, %r3, 32; bra L;\n\
                 D: @%p1 bra E; cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {{%r5, %r6}}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; E: ret; }}",
                size / 4
            );
            let module = device.load_module(&source).unwrap_or_else(|e| panic!("{e}"));
            let params = [&map(from).encode().unwrap()[..], &map(to).encode().unwrap(), &dump.to_le_bytes()].concat();
            let f = module.function("k").unwrap();
            device.launch(&f, &LaunchConfig::new([1; 3], [32, 1, 1]), &params).unwrap_or_else(|e| panic!("{e}"));
            let read = |at, n| words_at(&device, at, n);
            let (shared, back) = (read(dump, 8 * width as usize), read(to, 1024));
            let inside = |c: i32, r: i32| (0..64).contains(&c) && (0..16).contains(&r);
            for r in 0..8i32 {
                for c in 0..width as i32 {
                    let want = if inside(x + c, y + r) { words[(64 * (y + r) + x + c) as usize] } else { 0 };
                    // Pieces of four words change places by the row: in every row for 128 bytes, every second, every fourth.
                    let turn = [0, r / 4 % 2, r / 2 % 4, r % 8][swizzle as usize];
                    let at = r * width as i32 + 4 * ((c / 4) ^ turn) + c % 4;
                    assert_eq!(shared[at as usize], want, "swizzle {swizzle} at {x}, {y}: row {r} column {c}");
                }
            }
            for r in 0..16i32 {
                for c in 0..64i32 {
                    let copied = (x..x + width as i32).contains(&c) && (y..y + 8).contains(&r);
                    let i = (64 * r + c) as usize;
                    assert_eq!(
                        back[i],
                        if copied { words[i] } else { 0 },
                        "back, swizzle {swizzle}: row {r} column {c}"
                    );
                }
            }
        }
    }
}

/// `tensormap.replace` counts the element types as PTX does, the driver's maps in another order.
#[test]
fn element_types_of_maps() {
    let map = |data_type| TensorMap {
        rank: 1,
        data_type,
        dims: [64, 0, 0, 0, 0],
        boxes: [16, 0, 0, 0, 0],
        steps: [1, 0, 0, 0, 0],
        ..TensorMap::default()
    };
    let words = |m: TensorMap| -> Vec<u32> {
        m.encode().unwrap().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    // u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz
    for (ptx, driver) in [0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12].into_iter().enumerate() {
        let replace = format!("tensormap.replace.tile.elemtype.AT.b1024.b32 [%ADDR], {ptx};");
        for (before, at, register, after) in [
            ("", "global", "rd0", ""),
            (
                "ld.global.u32 %r10, [%rd2]; st.shared.u32 [%r3], %r10; bar.warp.sync -1;",
                "shared::cta",
                "r1",
                "bar.warp.sync -1; ld.shared.u32 %r10, [%r3]; st.global.u32 [%rd2], %r10;",
            ),
        ] {
            let replace = replace.replace("AT", at).replace("ADDR", register);
            let body = format!(
                "{before} setp.eq.u32 %p1, %r0, 0; @%p1 {replace} {after} bar.warp.sync -1; ld.global.u32 %r11, [%rd2]; st.global.u32 [%rd3], %r11;"
            );
            let out = transform(&text(&body), 32, 0, &words(map(0)), 32);
            assert_eq!(out, words(map(driver)), "element type {ptx} in {at} memory");
        }
    }
}

/// Element strides: of a box, every so many elements are copied; the stride of the innermost dimension is ignored.
#[test]
fn tensor_copies_with_steps() {
    for (steps, rows, planes) in [([2, 1, 1], 8, 4), ([1, 3, 1], 3, 4), ([8, 4, 3], 2, 2), ([0, 0, 8], 8, 1)] {
        let device = Device::new(Arch::SM_90, Options::default());
        let words: Vec<u32> = (0..16 * 16 * 8).map(|i| 5 * i + 1).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let from = device.alloc(bytes.len() as u64).unwrap();
        device.write(from, &bytes).unwrap();
        let to = device.alloc(bytes.len() as u64).unwrap();
        device.memset(to, &[0], bytes.len() as u64).unwrap();
        let dump = device.alloc(4096).unwrap();
        let map = |address| TensorMap {
            address,
            rank: 3,
            data_type: 2,
            dims: [16, 16, 8, 0, 0],
            strides: [64, 1024, 0, 0],
            boxes: [8, 8, 4, 0, 0],
            steps: [steps[0], steps[1], steps[2], 0, 0],
            ..TensorMap::default()
        };
        // Column 12 on is half outside.
        let (x, y, z, width) = (12usize, 5usize, 2usize, 8usize);
        let n = width * rows * planes;
        let source = format!(
            ".version 8.5\n.target sm_90a\n.address_size 64\n{NAMES}.visible .entry k(.param .align 64 .b8 a[128], .param .align 64 .b8 b[128], .param .u64 out) {{\n\
             .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar; mov.b64 %rd1, a; mov.b64 %rd2, b; ld.param.u64 %rd3, [out];\n\
             cvta.param.u64 %rd1, %rd1; cvta.param.u64 %rd2, %rd2; mov.u32 %r5, {x}; mov.u32 %r6, {y}; mov.u32 %r8, {z}; setp.ne.u32 %p1, %r0, 0; @%p1 bra J;\n\
             mbarrier.init.shared.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {};\n\
             cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r5, %r6, %r8}}], [%r2]; J: bar.sync 0;\n\
             W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W; mov.u32 %r3, %r0;\n\
             L: setp.ge.u32 %p3, %r3, {n}; @%p3 bra D; mad.lo.u32 %r4, %r3, 4, %r1; ld.shared.u32 %r7, [%r4]; mad.wide.u32 %rd4, %r3, 4, %rd3; st.global.u32 [%rd4], %r7; add.u32 %r3, %r3, 32; bra L;\n\
             D: @%p1 bra E; cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%rd2, {{%r5, %r6, %r8}}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; E: ret; }}",
            4 * n
        );
        let module = device.load_module(&source).unwrap_or_else(|e| panic!("{e}"));
        let params = [&map(from).encode().unwrap()[..], &map(to).encode().unwrap(), &dump.to_le_bytes()].concat();
        let f = module.function("k").unwrap();
        device.launch(&f, &LaunchConfig::new([1; 3], [32, 1, 1]), &params).unwrap_or_else(|e| panic!("{e}"));
        let read = |at, n| words_at(&device, at, n);
        let mut back = vec![0; words.len()];
        let mut box_words = Vec::new();
        let step = |d: usize| steps[d].max(1) as usize;
        for (p, r, c) in (0..planes).flat_map(|p| (0..rows).flat_map(move |r| (0..width).map(move |c| (p, r, c)))) {
            let at = [x + c, y + step(1) * r, z + step(2) * p];
            let i = at[0] + 16 * at[1] + 256 * at[2];
            let inside = at[0] < 16 && at[1] < 16 && at[2] < 8;
            box_words.push(if inside { words[i] } else { 0 });
            if inside {
                back[i] = words[i];
            }
        }
        assert_eq!(read(dump, n), box_words, "steps {steps:?}");
        assert_eq!(read(to, words.len()), back, "back, steps {steps:?}");
    }
}
