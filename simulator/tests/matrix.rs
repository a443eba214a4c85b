//! Matrix instructions against plain products. Where an element of a fragment lies is written here as the PTX
//! documentation says it, shape by shape: element `i` of a lane, with `g = lane / 4` and `t = lane % 4`.

mod common;
use common::{PROLOGUE, Random, transform};
use half::{bf16, f16};

#[derive(Clone, Copy, PartialEq, Debug)]
enum Ty {
    F16,
    Bf16,
    Tf32,
    F64,
    S8,
    U8,
    S4,
    U4,
    B1,
    E4m3,
    E5m2,
}
use Ty::*;

impl Ty {
    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    fn bits(self) -> usize {
        match self {
            B1 => 1,
            S4 | U4 => 4,
            S8 | U8 | E4m3 | E5m2 => 8,
            F16 | Bf16 => 16,
            Tf32 => 32,
            F64 => 64,
        }
    }

    /// A random element that is exact in this type and small enough for exact sums: its bits and value.
    fn random(self, r: &mut Random) -> (u64, f64) {
        let small = i64::from(r.below(9)) - 4;
        match self {
            F16 => (f16::from_f64(small as f64).to_bits().into(), small as f64),
            Bf16 => (bf16::from_f64(small as f64).to_bits().into(), small as f64),
            Tf32 => ((small as f32).to_bits().into(), small as f64),
            F64 => ((small as f64).to_bits(), small as f64),
            S8 => {
                let v = r.below(256) as u8;
                (v.into(), f64::from(v as i8))
            }
            U8 => {
                let v = r.below(256) as u8;
                (v.into(), v.into())
            }
            S4 => {
                let v = i64::from(r.below(16)) - 8;
                (v as u64 & 15, v as f64)
            }
            U4 => {
                let v = r.below(16);
                (v.into(), v.into())
            }
            B1 => {
                let v = r.below(2);
                (v.into(), v.into())
            }
            // Sign, exponent, mantissa: 1 and 1.5 times powers of two near 1.
            E4m3 => {
                let (s, e, m) = (r.below(2), 6 + r.below(3), 4 * r.below(2));
                let v = (1.0 + f64::from(m) / 8.0) * 2f64.powi(e as i32 - 7);
                (u64::from(s << 7 | e << 3 | m), if s == 1 { -v } else { v })
            }
            E5m2 => {
                let (s, e, m) = (r.below(2), 14 + r.below(3), 2 * r.below(2));
                let v = (1.0 + f64::from(m) / 4.0) * 2f64.powi(e as i32 - 15);
                (u64::from(s << 7 | e << 2 | m), if s == 1 { -v } else { v })
            }
        }
    }
}

/// Row and column of element `i` of A.
fn place_a(shape: (usize, usize), ty: Ty, i: usize, lane: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane % 4);
    let low = |yes: bool| if yes { g } else { g + 8 };
    match (shape, ty.bits()) {
        ((8, 4), 64) => (g, t),
        ((8, 16), 8) => (g, 4 * t + i),
        ((8, 32), 4) => (g, 8 * t + i),
        ((8, 128), 1) => (g, 32 * t + i),
        ((16, 4), _) => (low(i == 0), t),
        ((16, 8), 16) => (low(i < 2), 2 * t + (i & 1)),
        ((16, 8), _) => (low(i == 0 || i == 2), if i < 2 { t } else { t + 4 }),
        ((16, 16), 16) => (low(i < 2 || (4..6).contains(&i)), 2 * t + (i & 1) + if i < 4 { 0 } else { 8 }),
        ((16, 16), 64) => (low(i.is_multiple_of(2)), if i.is_multiple_of(2) { 2 * i + t } else { 2 * i - 2 + t }),
        ((16, 16), 8) => (low(i < 4), 4 * t + (i & 3)),
        ((16, 32), 8) => (low(i < 4 || (8..12).contains(&i)), 4 * t + (i & 3) + if i < 8 { 0 } else { 16 }),
        ((16, 32), 4) => (low(i < 8), 8 * t + (i & 7)),
        ((16, 64), 4) => (low(i < 8 || (16..24).contains(&i)), 8 * t + (i & 7) + if i < 16 { 0 } else { 32 }),
        ((16, 128), 1) => (low(i < 32), 32 * t + (i & 31)),
        ((16, 256), 1) => (low(i < 32 || (64..96).contains(&i)), 32 * t + (i & 31) + if i < 64 { 0 } else { 128 }),
        s => panic!("no such shape: {s:?}"),
    }
}

/// Row and column of element `i` of B.
fn place_b(shape: (usize, usize), ty: Ty, i: usize, lane: usize) -> (usize, usize) {
    let (g, t) = (lane >> 2, lane % 4);
    let row = match (shape.1, ty.bits()) {
        (4, _) => t,
        (8, 16) => 2 * t + i,
        (8, _) => t + 4 * i,
        (16, 16) => 2 * t + (i & 1) + if i < 2 { 0 } else { 8 },
        (16, 64) => t + 4 * i,
        (16, 8) => 4 * t + i,
        (32, 8) => 4 * t + (i & 3) + if i < 4 { 0 } else { 16 },
        (32, 4) => 8 * t + i,
        (64, 4) => 8 * t + (i & 7) + if i < 8 { 0 } else { 32 },
        (128, 1) => 32 * t + i,
        (256, 1) => 32 * t + (i & 31) + if i < 32 { 0 } else { 128 },
        s => panic!("no such shape: {s:?}"),
    };
    (row, g)
}

/// Row and column of element `i` of C and D.
fn place_c(i: usize, lane: usize) -> (usize, usize) {
    (if i < 2 { lane >> 2 } else { (lane >> 2) + 8 }, 2 * (lane % 4) + (i & 1))
}

/// Puts `bits` of element `i` into a lane's registers of 32 bits.
fn put(words: &mut [u32], i: usize, width: usize, bits: u64) {
    if width == 64 {
        words[2 * i] = bits as u32;
        words[2 * i + 1] = (bits >> 32) as u32;
    } else {
        let per = 32 / width;
        words[i / per] |= (bits as u32) << (width * (i % per));
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Acc {
    F32,
    F16,
    F64,
    S32,
}

fn number(acc: Acc, words: &[u32], i: usize) -> f64 {
    match acc {
        Acc::F32 => f32::from_bits(words[i]).into(),
        Acc::F16 => f16::from_bits((words[i / 2] >> (16 * (i % 2))) as u16).into(),
        Acc::F64 => f64::from_bits(u64::from(words[2 * i]) | u64::from(words[2 * i + 1]) << 32),
        Acc::S32 => (words[i] as i32).into(),
    }
}

fn acc_bits(acc: Acc, v: i64) -> (usize, u64) {
    match acc {
        Acc::F32 => (32, (v as f32).to_bits().into()),
        Acc::F16 => (16, f16::from_f64(v as f64).to_bits().into()),
        Acc::F64 => (64, (v as f64).to_bits()),
        Acc::S32 => (32, v as u32 as u64),
    }
}

fn list(prefix: &str, from: usize, n: usize) -> String {
    (from..from + n).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>().join(", ")
}

/// One product of the shape and types, twice with other numbers. `middle` names `.xor.popc` and the like.
fn check_mma((m, k): (usize, usize), a: Ty, b: Ty, c: Acc, d: Acc, middle: &str) {
    let n = 8;
    let (na, nb, nc) = (m * k / 32, k * n / 32, m * n / 32);
    let acc_name = |t: Acc| format!("{t:?}").to_lowercase();
    let words = |n: usize, bits: usize| n * bits / 32;
    let acc_width = |t: Acc| acc_bits(t, 0).0;
    let (wa, wb) = (words(na, a.bits()), words(nb, b.bits()));
    let (wc, wd) = (words(nc, acc_width(c)), words(nc, acc_width(d)));
    let total = wa + wb + wc;
    let wide = a == F64;
    let (reg, step) = if wide { ("%fd", 2) } else { ("%r", 1) };
    let mut text = format!("{PROLOGUE}mad.wide.u32 %rd2, %r0, {}, %rd0;\n", 4 * total);
    let ty = if wide { "f64" } else { "u32" };
    for i in 0..total / step {
        text += &format!("ld.global.{ty} {reg}{}, [%rd2+{}];\n", i + 10, 4 * step * i);
    }
    let at = |w: usize| 10 + w / step;
    text += &format!(
        "mma.sync.aligned.m{m}n8k{k}.row.col{middle}.{}.{}.{}.{}{} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n",
        acc_name(d),
        a.name(),
        b.name(),
        acc_name(c),
        if a == B1 { ".OP" } else { "" },
        list(reg, at(total), wd / step),
        list(reg, at(0), wa / step),
        list(reg, at(wa), wb / step),
        list(reg, at(wa + wb), wc / step),
    );
    let and = middle.contains("and");
    text = text.replace(".OP", if and { ".and.popc" } else { ".xor.popc" }).replace(".row.col.and", ".row.col");
    text += &format!("mad.wide.u32 %rd3, %r0, {}, %rd1;\n", 4 * wd);
    for i in 0..wd / step {
        text += &format!("st.global.{ty} [%rd3+{}], {reg}{};\n", 4 * step * i, at(total) + i);
    }
    text += "ret; }";
    let mut r = Random((m * k) as u64 + a.bits() as u64);
    for _ in 0..2 {
        let (mut va, mut vb, mut vc) = (vec![0.0; m * k], vec![0.0; k * n], vec![0.0; m * n]);
        let mut input = vec![0u32; 32 * total];
        for lane in 0..32 {
            let w = &mut input[lane * total..(lane + 1) * total];
            for i in 0..na {
                let ((row, column), (bits, v)) = (place_a((m, k), a, i, lane), a.random(&mut r));
                va[row * k + column] = v;
                put(&mut w[..wa], i, a.bits(), bits);
            }
            for i in 0..nb {
                let ((row, column), (bits, v)) = (place_b((m, k), b, i, lane), b.random(&mut r));
                vb[row * n + column] = v;
                put(&mut w[wa..wa + wb], i, b.bits(), bits);
            }
            for i in 0..nc {
                let (row, column) = place_c(i, lane);
                let v = i64::from(r.below(33)) - 16;
                vc[row * n + column] = v as f64;
                let (width, bits) = acc_bits(c, v);
                put(&mut w[wa + wb..], i, width, bits);
            }
        }
        let out = transform(&text, 32, 0, &input, 32 * wd);
        for lane in 0..32 {
            for i in 0..nc {
                let (row, column) = place_c(i, lane);
                let product = |x: f64, y: f64| match (a, and) {
                    (B1, false) => f64::from(x != y),
                    _ => x * y,
                };
                let sum = (0..k).map(|x| product(va[row * k + x], vb[x * n + column])).sum::<f64>();
                let want = vc[row * n + column] + sum;
                let got = number(d, &out[lane * wd..(lane + 1) * wd], i);
                assert_eq!(got, want, "m{m}n8k{k} {a:?} {b:?} {c:?} {d:?}: row {row} column {column}");
            }
        }
    }
}

#[test]
fn mma_of_halves() {
    for k in [8, 16] {
        for (c, d) in [(Acc::F32, Acc::F32), (Acc::F16, Acc::F16), (Acc::F32, Acc::F16), (Acc::F16, Acc::F32)] {
            check_mma((16, k), F16, F16, c, d, "");
        }
        check_mma((16, k), Bf16, Bf16, Acc::F32, Acc::F32, "");
    }
}

#[test]
fn mma_of_tf32_and_f64() {
    for k in [4, 8] {
        check_mma((16, k), Tf32, Tf32, Acc::F32, Acc::F32, "");
    }
    for shape in [(8, 4), (16, 4), (16, 8), (16, 16)] {
        check_mma(shape, F64, F64, Acc::F64, Acc::F64, "");
    }
}

#[test]
fn mma_of_integers() {
    for (a, b) in [(S8, S8), (S8, U8), (U8, S8), (U8, U8)] {
        for shape in [(8, 16), (16, 16), (16, 32)] {
            check_mma(shape, a, b, Acc::S32, Acc::S32, "");
            check_mma(shape, a, b, Acc::S32, Acc::S32, ".satfinite");
        }
    }
    for (a, b) in [(S4, S4), (S4, U4), (U4, S4), (U4, U4)] {
        for shape in [(8, 32), (16, 32), (16, 64)] {
            check_mma(shape, a, b, Acc::S32, Acc::S32, "");
        }
    }
    for shape in [(8, 128), (16, 128), (16, 256)] {
        check_mma(shape, B1, B1, Acc::S32, Acc::S32, "");
        check_mma(shape, B1, B1, Acc::S32, Acc::S32, ".and");
    }
}

#[test]
fn mma_of_fp8() {
    for (a, b) in [(E4m3, E4m3), (E4m3, E5m2), (E5m2, E4m3), (E5m2, E5m2)] {
        for (c, d) in [(Acc::F32, Acc::F32), (Acc::F16, Acc::F16)] {
            check_mma((16, 32), a, b, c, d, "");
            check_mma((16, 16), a, b, c, d, "");
        }
    }
}

/// `.tf32` operands are read with 10 bits of mantissa; sums of random numbers stay near the exact product.
#[test]
fn tf32_drops_low_bits() {
    let text = format!(
        "{PROLOGUE}mov.b32 %r1, 0f3F801FFF; mov.b32 %r2, 0f3F800000; mov.b32 %r3, 0;\n\
         mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {{%r4, %r5, %r6, %r7}}, {{%r1, %r1}}, {{%r2}}, {{%r3, %r3, %r3, %r3}};\n\
         mad.wide.u32 %rd2, %r0, 4, %rd1; st.global.u32 [%rd2], %r4; ret; }}"
    );
    assert!(transform(&text, 32, 0, &[0], 32).iter().all(|w| f32::from_bits(*w) == 4.0));
}

/// Layouts of wgmma's operands in shared memory, as the figures of the documentation show them.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Bytes of a swizzled row; 16 is no swizzle.
    row: usize,
    /// The depth is contiguous, or else M or N.
    k_major: bool,
}

impl Layout {
    /// Byte of an element of `rows x depth`, with the byte strides of the descriptor.
    fn byte(self, mn: usize, k: usize, bytes: usize, leading: usize, stride: usize) -> usize {
        // Along the contiguous direction, and across it.
        let (along, across) = if self.k_major { (k, mn) } else { (mn, k) };
        let (piece, within) = (along * bytes / 16, along * bytes % 16);
        if self.row == 16 {
            // Core matrices of eight rows of 16 bytes.
            let (by_piece, by_group) = if self.k_major { (leading, stride) } else { (stride, leading) };
            return across % 8 * 16 + across / 8 * by_group + piece * by_piece + within;
        }
        let pieces = self.row / 16;
        // Rows of 128 bytes change the piece in every row, of 64 in every second, of 32 in every fourth.
        let turn = across % 8 / (8 / pieces);
        let in_atom = across % 8 * self.row + ((piece % pieces) ^ turn) * 16 + within;
        in_atom + across / 8 * stride + piece / pieces * leading
    }

    /// Strides for a matrix with `mn` rows and 32 bytes of depth, and the bytes it takes.
    fn strides(self, mn: usize, depth: usize, bytes: usize) -> (usize, usize, usize) {
        match (self.k_major, self.row) {
            (true, 16) => (128, 256, mn / 8 * 256),
            (true, row) => (16, 8 * row, mn / 8 * 8 * row),
            (false, 16) => {
                let groups = depth / 8;
                (128, 128 * groups, mn * bytes / 16 * 128 * groups)
            }
            (false, row) => {
                let atoms = (mn * bytes).div_ceil(row);
                (8 * row * (depth / 8), 8 * row, atoms * 8 * row * (depth / 8))
            }
        }
    }

    fn code(self) -> u64 {
        match self.row {
            128 => 1,
            64 => 2,
            32 => 3,
            _ => 0,
        }
    }
}

fn descriptor(at: usize, leading: usize, stride: usize, l: Layout) -> u64 {
    let field = |x: usize| (x as u64 & 0x3_ffff) >> 4;
    field(at) | field(leading) << 16 | field(stride) << 32 | l.code() << 62
}

/// One warpgroup product: A from shared memory (`Some`) or registers.
#[allow(clippy::too_many_arguments)]
fn check_wgmma(n: usize, a: Ty, b: Ty, d: Acc, la: Option<Layout>, lb: Layout, keep: bool, negate: bool) {
    let (depth, bytes) = (256 / a.bits(), a.bits() / 8);
    let mut r = Random((n + depth) as u64);
    let (mut va, mut vb) = (vec![0.0; 64 * depth], vec![0.0; depth * n]);
    let mut shared = vec![0u8; 32 << 10];
    let mut registers = vec![0u32; 128 * 4];
    let b_at = 16 << 10;
    let store = |shared: &mut [u8], at: usize, bits: u64| {
        shared[at..at + bytes].copy_from_slice(&bits.to_le_bytes()[..bytes]);
    };
    let a_layout = la.unwrap_or(Layout { row: 16, k_major: true });
    let (a_leading, a_stride, a_size) = a_layout.strides(64, depth, bytes);
    let (b_leading, b_stride, b_size) = lb.strides(n, depth, bytes);
    for row in 0..64 {
        for k in 0..depth {
            let (bits, v) = a.random(&mut r);
            va[row * depth + k] = v;
            store(&mut shared, a_layout.byte(row, k, bytes, a_leading, a_stride), bits);
            // As in mma: warp w has rows 16 w to 16 w + 15.
            let elements = 4 / bytes;
            let (g, t) = (row % 8, k / elements % 4);
            let register = row % 16 / 8 + 2 * (k / (4 * elements));
            let thread = 32 * (row / 16) + 4 * g + t;
            registers[4 * thread + register] |= (bits as u32) << (8 * bytes * (k % elements));
        }
    }
    for k in 0..depth {
        for column in 0..n {
            let (bits, v) = b.random(&mut r);
            vb[k * n + column] = v;
            store(&mut shared, b_at + lb.byte(column, k, bytes, b_leading, b_stride), bits);
        }
    }
    let wd = if d == Acc::F16 { n / 4 } else { n / 2 };
    let c = 3i64;
    let (width, c_bits) = acc_bits(d, c);
    let c_word = if width == 16 { c_bits as u32 * 0x1_0001 } else { c_bits as u32 };
    let mut text = format!(".extern .shared .align 1024 .b8 s[];\n{PROLOGUE}");
    let used = [(0, a_size), (b_at, b_size)];
    for (from, size) in used {
        text += &format!(
            "mov.u32 %r2, s; add.u32 %r2, %r2, {from}; mad.lo.u32 %r2, %r0, 4, %r2; mad.wide.u32 %rd2, %r0, 4, %rd0; mov.u32 %r1, %r0;\n\
             L{from}: setp.ge.u32 %p1, %r1, {}; @%p1 bra E{from};\n\
             ld.global.u32 %r3, [%rd2+{from}]; st.shared.u32 [%r2], %r3; add.u32 %r1, %r1, 128; add.u32 %r2, %r2, 512; add.u64 %rd2, %rd2, 512; bra L{from}; E{from}:\n",
            size / 4
        );
    }
    text += "fence.proxy.async; bar.sync 0; mov.u32 %r1, s; cvt.u64.u32 %rd5, %r1; shr.u64 %rd5, %rd5, 4;\n";
    text += &format!("mov.u64 %rd3, {}; add.u64 %rd3, %rd3, %rd5;\n", descriptor(0, a_leading, a_stride, a_layout));
    text += &format!("mov.u64 %rd4, {}; add.u64 %rd4, %rd4, %rd5;\n", descriptor(b_at, b_leading, b_stride, lb));
    text += &format!(
        "mad.wide.u32 %rd2, %r0, 16, %rd0; ld.global.v4.u32 {{{}}}, [%rd2+{}];\n",
        list("%r", 10, 4),
        32 << 10
    );
    for i in 0..wd {
        text += &format!("mov.b32 %r{}, {c_word};\n", 20 + i);
    }
    let a_operand = if la.is_some() { "%rd3".to_owned() } else { format!("{{{}}}", list("%r", 10, 4)) };
    let sign = if negate { -1 } else { 1 };
    let halves = a.bits() == 16;
    let tail = match (d, halves, la.is_some()) {
        (Acc::S32, ..) => String::new(),
        (_, true, true) => format!(", {sign}, 1, {}, {}", !a_layout.k_major as u8, !lb.k_major as u8),
        (_, true, false) => format!(", {sign}, 1, {}", !lb.k_major as u8),
        _ => format!(", {sign}, 1"),
    };
    let d_name = format!("{d:?}").to_lowercase();
    text += &format!(
        "setp.eq.u32 %p2, {}, 1; wgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n{n}k{depth}.{d_name}.{}.{} {{{}}}, {a_operand}, %rd4, %p2{tail};\n\
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mad.wide.u32 %rd2, %r0, {}, %rd1;\n",
        u8::from(keep),
        a.name(),
        b.name(),
        list("%r", 20, wd),
        4 * wd
    );
    for i in 0..wd {
        text += &format!("st.global.u32 [%rd2+{}], %r{};\n", 4 * i, 20 + i);
    }
    text += "ret; }";
    let mut input: Vec<u32> = shared.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    input.extend(&registers);
    let out = transform(&text, 128, 32 << 10, &input, 128 * wd);
    for thread in 0..128 {
        // Element i of D: as four elements of an mma with eight columns, over and over.
        for i in 0..n / 2 {
            let (row, column) = place_c(i % 4, thread % 32);
            let (row, column) = (row + 16 * (thread / 32), column + 8 * (i / 4));
            let sum: f64 = (0..depth).map(|k| va[row * depth + k] * vb[k * n + column]).sum();
            let want = f64::from(sign) * sum + if keep { c as f64 } else { 0.0 };
            let got = number(d, &out[thread * wd..(thread + 1) * wd], i);
            assert_eq!(got, want, "n{n} {a:?} {b:?} {d:?} A {la:?} B {lb:?}: row {row} column {column}");
        }
    }
}

const ROWS: [usize; 4] = [16, 32, 64, 128];

#[test]
fn wgmma_depth_first() {
    for (i, row) in ROWS.into_iter().enumerate() {
        let l = Layout { row, k_major: true };
        let a = [Some(l), None][i % 2];
        check_wgmma(16, F16, F16, Acc::F32, Some(l), l, true, false);
        check_wgmma(8, F16, F16, Acc::F16, None, l, i > 1, false);
        check_wgmma(24, Bf16, Bf16, Acc::F32, a, l, true, true);
        check_wgmma(32, Tf32, Tf32, Acc::F32, a, l, false, false);
        check_wgmma(64, E4m3, E5m2, Acc::F32, a, l, true, false);
        check_wgmma(40, S8, U8, Acc::S32, Some(l), l, true, false);
        check_wgmma(8, U8, S8, Acc::S32, None, l, false, false);
    }
    check_wgmma(256, F16, F16, Acc::F32, None, Layout { row: 64, k_major: true }, true, false);
}

#[test]
fn wgmma_transposed() {
    for row in ROWS {
        let (k, mn) = (Layout { row, k_major: true }, Layout { row, k_major: false });
        check_wgmma(64, F16, F16, Acc::F32, Some(k), mn, true, false);
        check_wgmma(128, Bf16, Bf16, Acc::F32, Some(mn), k, true, false);
        check_wgmma(64, F16, F16, Acc::F32, Some(mn), mn, false, false);
        check_wgmma(64, Bf16, Bf16, Acc::F32, None, mn, true, true);
    }
}

/// Fills shared memory with its own index in halves, and stores what `body` leaves in `%r10..%r10 + n`.
fn with_shared(body: &str, n: usize) -> Vec<u32> {
    let mut text = format!(".shared .align 16 .b8 s[1024];\n{PROLOGUE}mov.u32 %r1, s;\n");
    for i in 0..8 {
        // Word 8 thread + i holds halves 2 w and 2 w + 1.
        text += &format!(
            "mad.lo.u32 %r2, %r0, 8, {i}; mad.lo.u32 %r3, %r2, 131074, 65536; mad.lo.u32 %r2, %r2, 4, %r1; st.shared.u32 [%r2], %r3;\n"
        );
    }
    text += &format!("bar.warp.sync -1;\n{body}\nmad.wide.u32 %rd2, %r0, {}, %rd1;\n", 4 * n);
    for i in 0..n {
        text += &format!("st.global.u32 [%rd2+{}], %r{};\n", 4 * i, 10 + i);
    }
    transform(&(text + "ret; }"), 32, 0, &[0], 32 * n)
}

#[test]
fn ldmatrix() {
    for n in [1usize, 2, 4] {
        for trans in [false, true] {
            // Lane 8 i + r points at row r of matrix i; rows are 32 bytes apart, in reverse.
            let body = format!(
                "sub.u32 %r4, 31, %r0; mad.lo.u32 %r4, %r4, 32, %r1; ldmatrix.sync.aligned.m8n8.x{n}{}.shared.b16 {{{}}}, [%r4];",
                if trans { ".trans" } else { "" },
                list("%r", 10, n)
            );
            let out = with_shared(&body, n);
            for lane in 0..32usize {
                for i in 0..n {
                    for j in 0..2 {
                        // A lane has row lane / 4, columns 2 (lane % 4) and the next; transposed the other way round.
                        let (row, column) = (lane / 4, 2 * (lane % 4) + j);
                        let (row, column) = if trans { (column, row) } else { (row, column) };
                        let want = 16 * (31 - (8 * i + row)) + column;
                        let got = out[lane * n + i] >> (16 * j) & 0xffff;
                        assert_eq!(got as usize, want, "x{n} trans {trans} lane {lane} register {i} half {j}");
                    }
                }
            }
        }
    }
}

#[test]
fn stmatrix_and_movmatrix() {
    for n in [1usize, 2, 4] {
        for trans in [false, true] {
            // Register i of a lane holds its element numbers: 256 i + 2 lane and the next.
            let mut body = String::new();
            for i in 0..n {
                body += &format!("mad.lo.u32 %r{}, %r0, 131074, {};\n", 20 + i, 65536 + 256 * i * 65537);
            }
            body += &format!(
                "mad.lo.u32 %r4, %r0, 32, %r1; bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x{n}{}.shared.b16 [%r4], {{{}}}; bar.warp.sync -1;\n\
                 ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r4];",
                if trans { ".trans" } else { "" },
                list("%r", 20, n)
            );
            let out = with_shared(&body, 4);
            for lane in 0..8 * n {
                let (i, row) = (lane / 8, lane % 8);
                for column in 0..8 {
                    let (r, c) = if trans { (column, row) } else { (row, column) };
                    let want = 256 * i + 2 * (4 * r + c / 2) + c % 2;
                    let got = out[lane * 4 + column / 2] >> (16 * (column % 2)) & 0xffff;
                    assert_eq!(got as usize, want, "x{n} trans {trans} matrix {i} row {row} column {column}");
                }
            }
        }
    }
    let body = "mad.lo.u32 %r4, %r0, 131074, 65536; movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r4;";
    for (lane, word) in with_shared(body, 1).into_iter().enumerate() {
        for j in 0..2 {
            let (row, column) = (lane / 4, 2 * (lane % 4) + j);
            assert_eq!((word >> (16 * j) & 0xffff) as usize, 8 * column + row, "lane {lane} half {j}");
        }
    }
}
