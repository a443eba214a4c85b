//! What lanes, warps and blocks do together, and where control goes: against plain formulas over 32 lanes.

mod common;
use common::{PROLOGUE, Random, transform};

/// Runs `body` in one warp. Each lane has its word of `input` in `%r1`; `%r10..` are stored.
fn warp(body: &str, input: &[u32; 32], n: usize) -> Vec<u32> {
    block(body, input, n)
}

fn block(body: &str, input: &[u32], n: usize) -> Vec<u32> {
    let mut text = format!(
        "{PROLOGUE}mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.u32 %r1, [%rd2];\n{body}\nmad.wide.u32 %rd2, %r0, {}, %rd1;\n",
        4 * n
    );
    for i in 0..n {
        text += &format!("st.global.u32 [%rd2+{}], %r{};\n", 4 * i, 10 + i);
    }
    transform(&(text + "ret; }"), input.len() as u32, 0, input, n * input.len())
}

fn numbers(seed: u64) -> [u32; 32] {
    let mut r = Random(seed);
    std::array::from_fn(|_| r.next() << 1 | r.below(2))
}

#[test]
fn shuffles() {
    let input = numbers(1);
    for width in [4u32, 8, 16, 32] {
        for b in [0u32, 1, 3, 9, 31, 37] {
            let segment = (32 - width) << 8;
            for (mode, clamp) in [("up", 0), ("down", 31), ("bfly", 31), ("idx", 31)] {
                let c = segment | clamp;
                let body = format!("shfl.sync.{mode}.b32 %r10|%p1, %r1, {b}, {c}, -1; selp.u32 %r11, 1, 0, %p1;");
                let out = warp(&body, &input, 2);
                for lane in 0..32u32 {
                    // Segments of `width` lanes; the lane's place in its segment.
                    let (base, place) = (lane / width * width, lane % width);
                    let b5 = b & 31;
                    let from = match mode {
                        "up" => place.checked_sub(b5),
                        "down" => Some(place + b5).filter(|p| *p < width),
                        "bfly" => Some((lane ^ b5).wrapping_sub(base)).filter(|p| *p < width),
                        // The index is taken within the segment.
                        _ => Some(b5 % width),
                    };
                    // For bfly a lane below the segment counts as in range.
                    let (value, ok) = match (mode, from) {
                        ("bfly", None) if (lane ^ b5) < base => (input[(lane ^ b5) as usize], 1),
                        (_, Some(p)) => (input[(base + p) as usize], 1),
                        _ => (input[lane as usize], 0),
                    };
                    let got = (out[2 * lane as usize], out[2 * lane as usize + 1]);
                    assert_eq!(got, (value, ok), "{mode} b {b} width {width} lane {lane}");
                }
            }
        }
    }
}

#[test]
fn votes_matches_and_elections() {
    let input: [u32; 32] = std::array::from_fn(|i| numbers(2)[i] % 5);
    // Lanes 3, 6, 9 ... vote alone among themselves.
    let mask = (0..32).filter(|l| l % 3 == 0).fold(0u32, |m, l| m | 1 << l);
    for members in [u32::MAX, mask] {
        let body = format!(
            "mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0; mov.u32 %r14, 0; mov.u32 %r15, 0; mov.u32 %r16, 0;\n\
             mov.u32 %r2, {members}; shr.u32 %r3, %r2, %r0; and.b32 %r3, %r3, 1; setp.eq.u32 %p1, %r3, 0; @%p1 bra E;\n\
             setp.eq.u32 %p2, %r1, 2; vote.sync.ballot.b32 %r10, %p2, {members};\n\
             vote.sync.any.pred %p3, %p2, {members}; vote.sync.all.pred %p4, !%p2, {members}; vote.sync.uni.pred %p5, %p2, {members};\n\
             selp.u32 %r11, 1, 0, %p3; selp.u32 %r4, 2, 0, %p4; selp.u32 %r5, 4, 0, %p5; or.b32 %r11, %r11, %r4; or.b32 %r11, %r11, %r5;\n\
             match.any.sync.b32 %r12, %r1, {members}; shr.u32 %r6, %r1, 3; match.all.sync.b32 %r13|%p6, %r6, {members}; @!%p6 add.u32 %r13, %r13, 7;\n\
             cvt.u64.u32 %rd3, %r1; match.any.sync.b64 %r14, %rd3, {members}; elect.sync %r15|%p7, {members}; selp.u32 %r7, 32, 0, %p7; add.u32 %r15, %r15, %r7;\n\
             activemask.b32 %r16; E: bar.warp.sync -1;"
        );
        let out = warp(&body, &input, 7);
        let of = |f: &dyn Fn(usize) -> bool| {
            (0..32).filter(|l| members >> l & 1 == 1 && f(*l)).fold(0u32, |m, l| m | 1 << l)
        };
        for lane in (0..32).filter(|l| members >> l & 1 == 1) {
            let ballot = of(&|l| input[l] == 2);
            let flags =
                u32::from(ballot != 0) | u32::from(ballot == 0) << 1 | u32::from(ballot == 0 || ballot == members) << 2;
            let same = of(&|l| input[l] == input[lane]);
            let leader = members.trailing_zeros();
            let elected = leader + if leader as usize == lane { 32 } else { 0 };
            let got = &out[7 * lane..7 * lane + 7];
            assert_eq!(got, [ballot, flags, same, members, same, elected, members], "members {members:x} lane {lane}");
        }
    }
    // Not all agree: match.all gives nothing.
    let out = warp("match.all.sync.b32 %r10|%p1, %r1, -1; selp.u32 %r11, 1, 0, %p1;", &input, 2);
    assert!(out.iter().all(|w| *w == 0));
}

/// Lanes that come together with different masks take part in different operations.
#[test]
fn groups_of_a_warp_with_their_own_masks() {
    // Groups of equal words, as labelled partitions of cooperative groups make them.
    let input: [u32; 32] = std::array::from_fn(|i| numbers(6)[i] % 5);
    let body = "match.any.sync.b32 %r2, %r1, -1; and.b32 %r3, %r0, 1; setp.ne.u32 %p1, %r3, 0;\n\
        redux.sync.add.u32 %r10, %r0, %r2; vote.sync.ballot.b32 %r11, %p1, %r2; elect.sync %r12|%p2, %r2; selp.u32 %r13, 1, 0, %p2;\n\
        match.any.sync.b32 %r14, %r3, %r2; vote.sync.any.pred %p3, %p1, %r2; selp.u32 %r15, 1, 0, %p3; match.all.sync.b32 %r16|%p4, %r1, %r2;\n\
        shfl.sync.idx.b32 %r17, %r0, %r12, 31, %r2;";
    let out = warp(body, &input, 8);
    let of = |f: &dyn Fn(usize) -> bool| (0..32).filter(|l| f(*l)).fold(0u32, |m, l| m | 1 << l);
    for lane in 0..32 {
        let group = of(&|l| input[l] == input[lane]);
        let odd = group & 0xaaaa_aaaa;
        let first = group.trailing_zeros();
        let sum = (0..32).filter(|l| group >> l & 1 != 0).sum::<u32>();
        let same = if lane % 2 == 1 { odd } else { group & !odd };
        let want = [sum, odd, first, u32::from(first as usize == lane), same, u32::from(odd != 0), group, first];
        assert_eq!(out[8 * lane..8 * lane + 8], want, "lane {lane}");
    }
    // Halves of a warp, of which every second quarter comes later; the mask of a barrier counts in the same way.
    let body = ".shared .align 4 .b8 s[128]; mov.u32 %r2, s; mad.lo.u32 %r3, %r0, 4, %r2; xor.b32 %r4, %r0, 8; mad.lo.u32 %r4, %r4, 4, %r2;\n\
        and.b32 %r5, %r0, 16; shl.b32 %r6, 65535, %r5; setp.gt.u32 %p1, %r1, 2; and.b32 %r7, %r0, 8; setp.ne.u32 %p2, %r7, 0; @%p2 bra LATE;\n\
        J: vote.sync.ballot.b32 %r10, %p1, %r6; redux.sync.max.u32 %r11, %r0, %r6; bra M; LATE: add.u32 %r8, %r1, 1; bra J;\n\
        M: @%p2 bra SLOW; st.shared.u32 [%r3], %r1; K: bar.warp.sync %r6; ld.shared.u32 %r12, [%r4]; bra E; SLOW: st.shared.u32 [%r3], %r1; bra K; E:";
    let out = warp(body, &input, 3);
    for lane in 0..32 {
        let half = 0xffff << (lane & 16);
        let want = [of(&|l| input[l] > 2) & half, (lane | 15) as u32, input[lane ^ 8]];
        assert_eq!(out[3 * lane..3 * lane + 3], want, "lane {lane}");
    }
}

#[test]
fn reductions() {
    let input = numbers(3);
    let fold = |f: &dyn Fn(u32, u32) -> u32| input.iter().copied().reduce(f).unwrap();
    let signed = |f: &dyn Fn(i32, i32) -> i32| fold(&|a, b| f(a as i32, b as i32) as u32);
    for (op, want) in [
        ("add.u32", fold(&u32::wrapping_add)),
        ("add.s32", fold(&u32::wrapping_add)),
        ("min.u32", fold(&u32::min)),
        ("max.u32", fold(&u32::max)),
        ("min.s32", signed(&i32::min)),
        ("max.s32", signed(&i32::max)),
        ("and.b32", fold(&|a, b| a & b)),
        ("or.b32", fold(&|a, b| a | b)),
        ("xor.b32", fold(&|a, b| a ^ b)),
    ] {
        let out = warp(&format!("redux.sync.{op} %r10, %r1, -1;"), &input, 1);
        assert!(out.iter().all(|w| *w == want), "{op}: {out:x?}, expected {want:x}");
    }
}

#[test]
fn lane_masks() {
    let body = "mov.u32 %r10, %laneid; mov.u32 %r11, %lanemask_eq; mov.u32 %r12, %lanemask_lt; mov.u32 %r13, %lanemask_le; mov.u32 %r14, %lanemask_gt; mov.u32 %r15, %lanemask_ge;";
    let out = warp(body, &[0; 32], 6);
    for lane in 0..32u32 {
        let of = |f: &dyn Fn(u32) -> bool| (0..32).filter(|l| f(*l)).fold(0u32, |m, l| m | 1 << l);
        let want =
            [lane, of(&|l| l == lane), of(&|l| l < lane), of(&|l| l <= lane), of(&|l| l > lane), of(&|l| l >= lane)];
        assert_eq!(out[6 * lane as usize..6 * lane as usize + 6], want);
    }
}

#[test]
fn barriers_that_reduce() {
    let input: Vec<u32> = (0..96).map(|i| numbers(4)[i % 32] % 7).collect();
    for limit in [0, 3, 7] {
        let body = format!(
            "setp.lt.u32 %p1, %r1, {limit}; bar.red.popc.u32 %r10, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, !%p1;\n\
             barrier.cta.red.popc.aligned.u32 %r13, 1, 96, !%p1; selp.u32 %r11, 1, 0, %p2; selp.u32 %r12, 1, 0, %p3;"
        );
        let n = input.iter().filter(|v| **v < limit).count() as u32;
        let want = [n, u32::from(n == 96), u32::from(n < 96), 96 - n];
        for (thread, got) in block(&body, &input, 4).chunks_exact(4).enumerate() {
            assert_eq!(got, want, "limit {limit} thread {thread}");
        }
    }
}

#[test]
fn jump_tables() {
    let input: [u32; 32] = std::array::from_fn(|i| (i as u32 * 7) % 5);
    let body = "ts: .branchtargets A, B, C, B, D; brx.idx %r1, ts; A: mov.u32 %r10, 100; bra E; B: add.u32 %r10, %r1, 200; bra E; C: mov.u32 %r10, 300; bra E; D: mul.lo.u32 %r10, %r0, 3; E:";
    for (lane, got) in warp(body, &input, 1).into_iter().enumerate() {
        let want = match input[lane] {
            0 => 100,
            2 => 300,
            4 => 3 * lane as u32,
            v => 200 + v,
        };
        assert_eq!(got, want, "lane {lane}");
    }
}

const FUNCTIONS: &str = "\
.func (.param .b32 r) twice(.param .b32 a) { .reg .b32 %x; ld.param.u32 %x, [a]; add.u32 %x, %x, %x; st.param.b32 [r], %x; ret; }\n\
.func (.param .b32 r) square(.param .b32 a) { .reg .b32 %x; ld.param.u32 %x, [a]; mul.lo.u32 %x, %x, %x; st.param.b32 [r], %x; ret; }\n\
.func (.reg .b32 r) sum(.reg .b32 n) { .reg .pred %p; .reg .b32 %m; setp.eq.u32 %p, n, 0; @%p bra Z; sub.u32 %m, n, 1; call (r), sum, (%m); add.u32 r, r, n; ret; Z: mov.u32 r, 0; ret; }\n\
.func (.param .align 8 .b8 r[16]) pair(.param .align 8 .b8 a[16]) { .reg .b64 %x, %y; ld.param.v2.b64 {%x, %y}, [a]; st.param.v2.b64 [r], {%y, %x}; ret; }\n\
.global .u64 table[2] = {twice, square};\n";

#[test]
fn calls() {
    let input: [u32; 32] = std::array::from_fn(|i| i as u32 % 11);
    let text = |body: &str, n: usize| {
        let mut t = format!(
            "{FUNCTIONS}{PROLOGUE}mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.u32 %r1, [%rd2];\n{body}\nmad.wide.u32 %rd2, %r0, {}, %rd1;\n",
            4 * n
        );
        for i in 0..n {
            t += &format!("st.global.u32 [%rd2+{}], %r{};\n", 4 * i, 10 + i);
        }
        t + "ret; }"
    };
    // Recursion to a depth that differs by lane, and through a table in memory, to a function that differs by lane.
    let body = "call (%r10), sum, (%r1);\n\
        p: .callprototype (.param .b32 _) _ (.param .b32 _);\n\
        and.b32 %r2, %r0, 1; mov.u64 %rd3, table; mad.wide.u32 %rd3, %r2, 8, %rd3; ld.global.u64 %rd4, [%rd3];\n\
        { .param .b32 a; .param .b32 r; st.param.b32 [a], %r1; call (r), %rd4, (a), p; ld.param.b32 %r11, [r]; }\n\
        { .param .align 8 .b8 a[16]; .param .align 8 .b8 r[16]; cvt.u64.u32 %rd5, %r1; mov.u64 %rd6, 77; st.param.v2.b64 [a], {%rd5, %rd6};\n\
          call (r), pair, (a); ld.param.b32 %r12, [r]; ld.param.b32 %r13, [r+8]; }";
    let out = transform(&text(body, 4), 32, 0, &input, 128);
    for lane in 0..32 {
        let v = input[lane];
        let through = if lane % 2 == 0 { 2 * v } else { v * v };
        assert_eq!(out[4 * lane..4 * lane + 4], [v * (v + 1) / 2, through, 77, v], "lane {lane}");
    }
}

/// Half of a warp runs one side of a branch, half the other, and they exchange values with barriers of the warp.
#[test]
fn halves_of_a_warp_meet_in_different_places() {
    let body = ".shared .align 4 .b8 s[128];\n\
        mov.u32 %r2, s; shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r2; setp.lt.u32 %p1, %r0, 16; @%p1 bra A;\n\
        st.shared.u32 [%r3], %r1; bar.warp.sync -1; bar.warp.sync -1; mov.u32 %r10, 5; bra E;\n\
        A: bar.warp.sync -1; ld.shared.u32 %r10, [%r3+64]; bar.warp.sync -1; E:";
    let input = numbers(5);
    let out = warp(body, &input, 1);
    for lane in 0..32 {
        assert_eq!(out[lane], if lane < 16 { input[lane + 16] } else { 5 }, "lane {lane}");
    }
}

#[test]
fn atomics_of_every_width() {
    // Every lane applies its word to one place; the old values of `add` are a permutation of the partial sums.
    let input: [u32; 32] = std::array::from_fn(|i| 3 * i as u32 + 1);
    let at = |i: usize| format!("[%rd1+{}]", 512 + 8 * i);
    let lines: Vec<String> = [
        "red.global.add.u32 @, %r1;",
        "red.global.max.s32 @, %r1;",
        "red.global.xor.b32 @, %r1;",
        "cvt.u64.u32 %rd3, %r1; red.global.add.u64 @, %rd3;",
        "cvt.u64.u32 %rd3, %r1; red.global.max.u64 @, %rd3;",
        "cvt.rn.f32.u32 %f1, %r1; red.global.add.f32 @, %f1;",
        "cvt.rn.f64.u32 %fd1, %r1; red.global.add.f64 @, %fd1;",
        "red.global.inc.u32 @, 6;",
        "red.global.dec.u32 @, 6;",
        "cvt.rn.f16.u32 %h1, %r1; mov.b32 %r2, {%h1, %h1}; red.global.add.noftz.f16x2 @, %r2;",
        "cvt.rn.f16.u32 %h1, %r0; red.global.add.noftz.f16 @, %h1;",
        "shl.b32 %r2, 1, %r0; red.global.or.b32 @, %r2;",
        "not.b32 %r2, %r1; red.global.or.b32 @, -1; bar.warp.sync -1; red.global.and.b32 @, %r2;",
        "cvt.u64.u32 %rd3, %r0; atom.global.exch.b64 %rd4, @, %rd3;",
    ]
    .iter()
    .enumerate()
    .map(|(i, l)| l.replace('@', &at(i)))
    .collect();
    let text =
        format!("{PROLOGUE}mad.wide.u32 %rd2, %r0, 4, %rd0; ld.global.u32 %r1, [%rd2];\n{}\nret; }}", lines.join("\n"));
    let out = transform(&text, 32, 0, &input, 128 + 64);
    let place = |i: usize| (out[128 + 2 * i], u64::from(out[128 + 2 * i]) | u64::from(out[129 + 2 * i]) << 32);
    let sum: u32 = input.iter().sum();
    let dec = |v: u32| if v == 0 || v > 6 { 6 } else { v - 1 };
    assert_eq!(place(0).0, sum);
    assert_eq!(place(1).0, 94);
    assert_eq!(place(2).0, input.iter().fold(0, |a, b| a ^ b));
    assert_eq!((place(3).1, place(4).1), (sum.into(), 94));
    assert_eq!((f32::from_bits(place(5).0), f64::from_bits(place(6).1)), (sum as f32, sum.into()));
    assert_eq!(place(7).0, (0..32).fold(0, |v, _| if v >= 6 { 0 } else { v + 1 }));
    assert_eq!(place(8).0, (0..32).fold(0, |v, _| dec(v)));
    let half = |w: u32| half::f16::from_bits(w as u16).to_f32();
    assert_eq!((half(place(9).0), half(place(9).0 >> 16)), (sum as f32, sum as f32));
    assert_eq!(half(place(10).0), 496.0);
    assert_eq!(place(11).0, u32::MAX);
    assert_eq!(place(12).0, input.iter().fold(u32::MAX, |a, b| a & !b));
    assert!(place(13).1 < 32);
}

/// PTX: atom.add.f32 on global memory makes zeros of subnormal numbers, on shared memory it does not.
#[test]
fn sums_of_subnormal_numbers() {
    let body = ".shared .align 4 .b32 s[2]; mov.f32 %f1, 0f00000003; mov.u64 %rd4, s; cvta.shared.u64 %rd4, %rd4;\n\
        st.shared.f32 [s], %f1; st.shared.f32 [s+4], %f1; st.global.f32 [%rd1], %f1;\n\
        red.shared.add.f32 [s], %f1; atom.add.f32 %f2, [%rd4+4], %f1; red.global.add.f32 [%rd1], %f1;\n\
        ld.shared.f32 %f3, [s]; ld.shared.f32 %f4, [s+4]; st.global.f32 [%rd1+4], %f3; st.global.f32 [%rd1+8], %f4; ret; }";
    assert_eq!(transform(&format!("{PROLOGUE}{body}"), 1, 0, &[0], 3), [0, 6, 6]);
}

/// The window of kernel parameters lies in that of global memory, that of constants does not.
#[test]
fn windows_of_addresses() {
    let spaces = ["global", "shared", "local", "const", "param"];
    let places = [
        ("mov.u64 %rd4, %rd0;", "global"),
        ("mov.u64 %rd4, g;", "global"),
        ("mov.u64 %rd4, s; cvta.shared.u64 %rd4, %rd4;", "shared"),
        ("mov.u64 %rd4, l; cvta.local.u64 %rd4, %rd4;", "local"),
        ("mov.u64 %rd4, c; cvta.const.u64 %rd4, %rd4;", "const"),
        ("mov.b64 %rd4, in; cvta.param.u64 %rd4, %rd4;", "param"),
    ];
    let mut text = format!(".global .u32 g; .const .u32 c = 5;\n{PROLOGUE}.shared .b32 s; .local .b32 l;\n");
    for (i, (address, _)) in places.iter().enumerate() {
        text += &format!("{address}\n");
        for (k, space) in spaces.iter().enumerate() {
            text += &format!(
                "isspacep.{space} %p1, %rd4; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%rd1+{}], %r1;\n",
                4 * (spaces.len() * i + k)
            );
        }
    }
    let out = transform(&(text + "ret; }"), 1, 0, &[0], spaces.len() * places.len());
    for ((_, lies), got) in places.iter().zip(out.chunks_exact(spaces.len())) {
        let want = spaces.map(|s| u32::from(s == *lies || s == "global" && *lies == "param"));
        assert_eq!(got, want, "an address in .{lies}, asked for {spaces:?}");
    }
}
