//! Integer products of every width, high and low halves, sums with carries, against 128-bit and longer arithmetic.

mod common;

use common::{Random, map};

const TYPES: [(&str, u32, bool); 6] = [
    ("u16", 16, false),
    ("s16", 16, true),
    ("u32", 32, false),
    ("s32", 32, true),
    ("u64", 64, false),
    ("s64", 64, true),
];

fn value(bits: u32, signed: bool, v: u64) -> i128 {
    let up = 64 - bits;
    if signed { (((v << up) as i64) >> up).into() } else { ((v << up) >> up).into() }
}

fn mask(bits: u32) -> u128 {
    u128::MAX >> (128 - bits)
}

/// Rows of three: edges with edges, and random ones.
fn rows(bits: u32) -> Vec<Vec<u64>> {
    let top = 1u64 << (bits - 1);
    let edges = [0, 1, 2, 3, top - 1, top, top + 1, u64::MAX, u64::MAX - 1, 1 << (bits / 2), (1 << (bits / 2)) - 1];
    let mut r = Random(3);
    let mut random = || u64::from(r.next()) << 33 ^ u64::from(r.next()) << 11 ^ u64::from(r.next());
    let mut all: Vec<Vec<u64>> = Vec::new();
    for a in edges {
        for b in edges {
            all.push(vec![a, b, edges[(all.len() * 5) % edges.len()]]);
        }
    }
    all.extend((0..100).map(|_| vec![random(), random(), random()]));
    all.iter().map(|r| r.iter().map(|v| v & mask(bits) as u64).collect()).collect()
}

fn check(body: &str, n: usize, bits: u32, out: u32, want: impl Fn(&[u64]) -> u128) {
    let rows: Vec<Vec<u64>> = rows(bits).iter().map(|r| r[..n].to_vec()).collect();
    for (row, got) in rows.iter().zip(map(body, &vec![bits as usize / 8; n], out as usize / 8, &rows)) {
        let want = (want(row) & mask(out)) as u64;
        assert_eq!(got, want, "{body} of {row:x?}: got {got:#x}, expected {want:#x}");
    }
}

#[test]
fn products_and_sums_of_products() {
    for (name, bits, signed) in TYPES {
        let v = move |x: u64| value(bits, signed, x);
        // The exact product of two 64-bit numbers fits 128 bits modulo 2^128, and its high half is found by halves.
        let product = move |r: &[u64]| v(r[0]).wrapping_mul(v(r[1]));
        let high = move |r: &[u64]| match (bits, signed) {
            (64, false) => ((u128::from(r[0]) * u128::from(r[1])) >> 64) as i128,
            _ => product(r) >> bits,
        };
        check(&format!("mul.lo.{name} %d, %a, %b;"), 2, bits, bits, |r| product(r) as u128);
        check(&format!("mul.hi.{name} %d, %a, %b;"), 2, bits, bits, |r| high(r) as u128);
        check(&format!("mad.lo.{name} %d, %a, %b, %c;"), 3, bits, bits, |r| product(r).wrapping_add(v(r[2])) as u128);
        check(&format!("mad.hi.{name} %d, %a, %b, %c;"), 3, bits, bits, |r| high(r).wrapping_add(v(r[2])) as u128);
        if bits < 64 {
            check(&format!("mul.wide.{name} %d, %a, %b;"), 2, bits, 2 * bits, |r| product(r) as u128);
            // The sum has the product's width: here its third operand is the widened one.
            let (wide, kind) = (2 * bits, if signed { "s" } else { "u" });
            let (temporary, widen) = match wide {
                32 => ("%r1", format!("cvt.{kind}32.{name} %r1, %c;")),
                _ => ("%rd1", format!("cvt.{kind}64.{name} %rd1, %c;")),
            };
            let body = format!("{widen} mad.wide.{name} %d, %a, %b, {temporary};");
            check(&body, 3, bits, wide, |r| (product(r) + v(r[2])) as u128);
        }
    }
    let clamp = |x: i128| x.clamp(i32::MIN.into(), i32::MAX.into()) as u128;
    let s = |x: u64| i128::from(x as u32 as i32);
    check("mad.hi.sat.s32 %d, %a, %b, %c;", 3, 32, 32, |r| clamp(((s(r[0]) * s(r[1])) >> 32) + s(r[2])));
    for (name, signed) in [("u32", false), ("s32", true)] {
        let low = move |x: u64| value(24, signed, x);
        check(&format!("mul24.lo.{name} %d, %a, %b;"), 2, 32, 32, |r| (low(r[0]) * low(r[1])) as u128);
        // The upper 32 of the product's 48 bits.
        check(&format!("mul24.hi.{name} %d, %a, %b;"), 2, 32, 32, |r| ((low(r[0]) * low(r[1])) >> 16) as u128);
        check(&format!("mad24.lo.{name} %d, %a, %b, %c;"), 3, 32, 32, |r| {
            (low(r[0]) * low(r[1]) + i128::from(r[2])) as u128
        });
        check(&format!("mad24.hi.{name} %d, %a, %b, %c;"), 3, 32, 32, |r| {
            (((low(r[0]) * low(r[1])) >> 16) + i128::from(r[2])) as u128
        });
    }
}

/// 64 x 64 bits from 32-bit pieces, as compilers write it: mad.lo.cc, madc.lo.cc, madc.hi.cc, madc.hi.
#[test]
fn long_products_through_chains_of_carries() {
    let split = "mov.b64 {%r1, %r2}, %a; mov.b64 {%r3, %r4}, %b;";
    let chain = "mul.lo.u32 %r10, %r1, %r3; mul.hi.u32 %r11, %r1, %r3;\
        mad.lo.cc.u32 %r11, %r1, %r4, %r11; madc.hi.u32 %r12, %r1, %r4, 0;\
        mad.lo.cc.u32 %r11, %r2, %r3, %r11; madc.hi.cc.u32 %r12, %r2, %r3, %r12; addc.u32 %r13, 0, 0;\
        mad.lo.cc.u32 %r12, %r2, %r4, %r12; madc.hi.u32 %r13, %r2, %r4, %r13;";
    let product = |r: &[u64]| u128::from(r[0]) * u128::from(r[1]);
    check(&format!("{split}{chain} mov.b64 %d, {{%r10, %r11}};"), 2, 64, 64, product);
    check(&format!("{split}{chain} mov.b64 %d, {{%r12, %r13}};"), 2, 64, 64, |r| product(r) >> 64);
    // 64-bit pieces: the high word of a*b + c.
    let body = "mad.lo.cc.u64 %rd1, %a, %b, %c; madc.hi.u64 %d, %a, %b, 0;";
    check(body, 3, 64, 64, |r| (product(r) + u128::from(r[2])) >> 64);
}

/// Sums and differences of four words; the last instruction's carry comes out too.
#[test]
fn long_sums_and_differences_through_chains_of_carries() {
    for (kind, bits) in [("u32", 32u32), ("s32", 32), ("u64", 64), ("s64", 64)] {
        let r = if bits == 32 { "%r" } else { "%rd" };
        let full = mask(bits);
        let two = |x: &[u64]| u128::from(x[0]) | u128::from(x[1]) << bits;
        // (a, b) + (b, c), and (a, b) - (b, c): the second word, then the carry or borrow of it.
        let sum = format!("add.cc.{kind} {r}1, %a, %b; addc.cc.{kind} {r}2, %b, %c; addc.{kind} {r}3, 0, 0;");
        let (low, high) = (format!("{sum} mov.b{bits} %d, {r}2;"), format!("{sum} mov.b{bits} %d, {r}3;"));
        let carry = move |x: &[u64]| (u128::from(x[0]) + u128::from(x[1])) >> bits;
        check(&low, 3, bits, bits, |x| (u128::from(x[1]) + u128::from(x[2]) + carry(x)) & full);
        check(&high, 3, bits, bits, |x| (u128::from(x[1]) + u128::from(x[2]) + carry(x)) >> bits);
        let difference = format!("sub.cc.{kind} {r}1, %a, %b; subc.cc.{kind} {r}2, %b, %c; subc.{kind} {r}3, 0, 0;");
        let second = format!("{difference} mov.b{bits} %d, {r}2;");
        let borrow = format!("{difference} mov.b{bits} %d, {r}3;");
        check(&second, 3, bits, bits, |x| (two(&x[..2]).wrapping_sub(two(&x[1..]))) >> bits & full);
        check(&borrow, 3, bits, bits, |x| if two(&x[..2]) < two(&x[1..]) { full } else { 0 });
    }
}
