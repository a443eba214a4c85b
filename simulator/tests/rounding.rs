//! f32, f64, f16 and bf16 arithmetic in every rounding mode, with flushing and saturation, against exact arithmetic.

mod common;

use common::exact::{self, BF16, F16, F32, F64, Float, MODES, Mode, Number};
use common::{Random, map};

/// Zeros, subnormals, ones and their neighbours, the largest number, infinities, NaNs.
fn specials(f: Float) -> Vec<u64> {
    let (unit, one) = (1u64 << f.fraction, f.encode(exact::integer(1), Mode::Even).unwrap());
    let positive = [
        0,
        1,
        2,
        unit / 2,
        unit - 1,
        unit,
        unit + 1,
        2 * unit - 1,
        one - 1,
        one,
        one + 1,
        one + unit / 2,
        one + unit,
        one - unit,
        f.max - 1,
        f.max,
        f.max + 1,
        f.max + 1 + unit / 2,
        f.max + 2,
    ];
    positive.iter().flat_map(|&v| [v, v | 1 << (f.bits - 1)]).collect()
}

/// `n` numbers each: anything, something near one, something near the least numbers.
fn random(f: Float, n: usize, seed: u64) -> Vec<u64> {
    let mut r = Random(seed);
    let mask = if f.bits == 64 { u64::MAX } else { (1 << f.bits) - 1 };
    let one = f.encode(exact::integer(1), Mode::Even).unwrap();
    let sign = 1 << (f.bits - 1);
    let mut next = || (u64::from(r.next()) << 40 ^ u64::from(r.next()) << 20 ^ u64::from(r.next())) & mask;
    (0..n)
        .flat_map(|_| {
            let near_one = (next() & ((4 << f.fraction) - 1)) + one - (2 << f.fraction);
            let small = next() & ((f.fraction as u64 * 2) << f.fraction | ((1 << f.fraction) - 1));
            [next(), near_one | next() & sign, small | next() & sign]
        })
        .collect()
}

/// Rows of `n` operands: every pair of special values (with a third), and random ones.
fn operands(f: Float, n: usize, seed: u64) -> Vec<Vec<u64>> {
    let s = specials(f);
    let mut rows = Vec::new();
    match n {
        1 => rows.extend(s.iter().map(|&a| vec![a])),
        _ => {
            for (i, &a) in s.iter().enumerate() {
                for (j, &b) in s.iter().enumerate() {
                    rows.push([a, b, s[(i * 7 + j * 3) % s.len()]][..n].to_vec());
                }
            }
        }
    }
    let all = random(f, 150 * n, seed);
    rows.extend(all.chunks_exact(n).map(<[u64]>::to_vec));
    // Two numbers one unit apart, and products next to their negation: cancellation.
    if n == 3 {
        for row in all.chunks_exact(2) {
            let product = f.encode(exact::mul(f.decode(row[0]), f.decode(row[1])), Mode::Even);
            if let Some(p) = product {
                rows.push(vec![row[0], row[1], p ^ 1 << (f.bits - 1)]);
            }
        }
    }
    rows
}

#[derive(Clone, Copy, Default)]
struct Flags {
    flush: bool,
    saturate: bool,
}

fn saturate(f: Float, bits: Option<u64>) -> u64 {
    let one = f.encode(exact::integer(1), Mode::Even).unwrap();
    match bits {
        Some(b) if b >> (f.bits - 1) == 0 => b.min(one),
        _ => 0,
    }
}

/// What an instruction must give, from the exact result of its operands.
fn rounded(f: Float, row: &[u64], mode: Mode, flags: Flags, op: impl Fn(&[Number]) -> Number) -> Option<u64> {
    let numbers: Vec<Number> = row.iter().map(|&v| f.decode(if flags.flush { f.flush(v) } else { v })).collect();
    let bits = f.encode(op(&numbers), mode).map(|b| if flags.flush { f.flush(b) } else { b });
    if flags.saturate { Some(saturate(f, bits)) } else { bits }
}

fn compare(f: Float, body: &str, n: usize, rows: &[Vec<u64>], want: impl Fn(&[u64]) -> Option<u64>) {
    let bytes = f.bits as usize / 8;
    for (row, got) in rows.iter().zip(map(body, &vec![bytes; n], bytes, rows)) {
        let want = want(row);
        let same = want.map_or(f.is_nan(got), |w| w == got);
        assert!(same, "{body} of {row:x?}: got {got:#x}, expected {want:x?} (none: NaN)");
    }
}

type Op = fn(&[Number], Mode) -> Number;

/// Every instruction with a rounding modifier: name, operands, exact formula.
const ROUNDED: [(&str, usize, Op); 7] = [
    ("add", 2, |v, m| exact::add(v[0], v[1], m)),
    ("sub", 2, |v, m| exact::add(v[0], v[1].with_sign(!v[1].negative()), m)),
    ("mul", 2, |v, _| exact::mul(v[0], v[1])),
    ("fma", 3, |v, m| exact::fma(v[0], v[1], v[2], m)),
    ("div", 2, |v, _| exact::div(v[0], v[1])),
    ("rcp", 1, |v, _| exact::div(exact::integer(1), v[0])),
    ("sqrt", 1, |v, _| exact::sqrt(v[0])),
];

fn list(n: usize) -> &'static str {
    ["%d, %a;", "%d, %a, %b;", "%d, %a, %b, %c;"][n - 1]
}

#[test]
fn f32_and_f64_round_as_they_say() {
    for (name, f) in [("f32", F32), ("f64", F64)] {
        for (op, n, formula) in ROUNDED {
            let rows = operands(f, n, 11);
            for (suffix, mode) in MODES {
                let variants: &[(&str, Flags)] = match (f == F32, op) {
                    (true, "add" | "sub" | "mul" | "fma") => &[
                        ("", Flags { flush: false, saturate: false }),
                        (".ftz", Flags { flush: true, saturate: false }),
                        (".sat", Flags { flush: false, saturate: true }),
                        (".ftz.sat", Flags { flush: true, saturate: true }),
                    ],
                    (true, _) => &[
                        ("", Flags { flush: false, saturate: false }),
                        (".ftz", Flags { flush: true, saturate: false }),
                    ],
                    _ => &[("", Flags { flush: false, saturate: false })],
                };
                for &(flag, flags) in variants {
                    let body = format!("{op}.{suffix}{flag}.{name} {}", list(n));
                    compare(f, &body, n, &rows, |r| rounded(f, r, mode, flags, |v| formula(v, mode)));
                }
            }
        }
    }
}

#[test]
fn instructions_without_a_modifier_round_to_nearest() {
    for (name, f) in [("f32", F32), ("f64", F64)] {
        for (op, n, formula) in &ROUNDED[..3] {
            let body = format!("{op}.{name} {}", list(*n));
            let rows = operands(f, *n, 12);
            compare(f, &body, *n, &rows, |r| rounded(f, r, Mode::Even, Flags::default(), |v| formula(v, Mode::Even)));
        }
        let rows = operands(f, 3, 13);
        for (suffix, mode) in MODES {
            let body = format!("mad.{suffix}.{name} {}", list(3));
            compare(f, &body, 3, &rows, |r| {
                rounded(f, r, mode, Flags::default(), |v| exact::fma(v[0], v[1], v[2], mode))
            });
        }
    }
}

#[test]
fn f16_and_bf16_round_to_nearest() {
    for (name, f) in [("f16", F16), ("bf16", BF16)] {
        for (op, n, formula) in &ROUNDED[..4] {
            let rows = operands(f, *n, 14);
            let rounding = if *op == "fma" { ".rn" } else { "" };
            let mut variants = vec![("", Flags::default())];
            if f == F16 {
                variants.push((".ftz", Flags { flush: true, saturate: false }));
                variants.push((".sat", Flags { flush: false, saturate: true }));
                variants.push((".ftz.sat", Flags { flush: true, saturate: true }));
            }
            for (flag, flags) in variants {
                let exact = |r: &[u64]| rounded(f, r, Mode::Even, flags, |v| formula(v, Mode::Even));
                compare(f, &format!("{op}{rounding}{flag}.{name} {}", list(*n)), *n, &rows, exact);
                // Two at once: the halves swapped in the second, so that a mix-up of the halves shows.
                let pairs: Vec<Vec<u64>> = rows
                    .iter()
                    .zip(rows.iter().rev())
                    .map(|(low, high)| low.iter().zip(high).map(|(l, h)| h << 16 | l).collect())
                    .collect();
                let body = format!("{op}{rounding}{flag}.{name}x2 {}", list(*n));
                for (row, got) in pairs.iter().zip(map(&body, &vec![4; *n], 4, &pairs)) {
                    for part in [0, 16] {
                        let half: Vec<u64> = row.iter().map(|v| v >> part & 0xffff).collect();
                        let (got, want) = (got >> part & 0xffff, exact(&half));
                        let same = want.map_or(f.is_nan(got), |w| w == got);
                        assert!(same, "{body} of {row:x?}, bits {part}: got {got:#x}, expected {want:x?}");
                    }
                }
            }
        }
        // Negative results, and NaN, with .relu.
        let rows = operands(f, 3, 15);
        compare(f, &format!("fma.rn.relu.{name} {}", list(3)), 3, &rows, |r| {
            let exact = rounded(f, r, Mode::Even, Flags::default(), |v| exact::fma(v[0], v[1], v[2], Mode::Even));
            exact.map(|b| if b >> 15 == 1 { 0 } else { b })
        });
    }
}

/// Two f32 in 64 bits; the parts are different rows.
#[test]
fn pairs_of_f32_round_as_they_say() {
    for (op, n, formula) in &ROUNDED[..4] {
        let rows = operands(F32, *n, 22);
        let pairs: Vec<Vec<u64>> = rows
            .iter()
            .zip(rows.iter().rev())
            .map(|(low, high)| low.iter().zip(high).map(|(l, h)| h << 32 | l).collect())
            .collect();
        for (suffix, mode) in MODES {
            for (flag, flush) in [("", false), (".ftz", true)] {
                let flags = Flags { flush, saturate: false };
                let body = format!("{op}.{suffix}{flag}.f32x2 {}", list(*n));
                for (row, got) in pairs.iter().zip(map(&body, &vec![8; *n], 8, &pairs)) {
                    for part in [0, 32] {
                        let single: Vec<u64> = row.iter().map(|v| v >> part & 0xffff_ffff).collect();
                        let want = rounded(F32, &single, mode, flags, |v| formula(v, mode));
                        let got = got >> part & 0xffff_ffff;
                        let same = want.map_or(F32.is_nan(got), |w| w == got);
                        assert!(same, "{body} of {row:x?}, bits {part}: got {got:#x}, expected {want:x?}");
                    }
                }
            }
        }
    }
}

/// f32 sums and products of f16 or bf16 operands, which are exact in f32.
#[test]
fn sums_of_halves_and_f32() {
    for (name, f) in [("f16", F16), ("bf16", BF16)] {
        let halves = operands(f, 2, 23);
        let singles = operands(F32, 1, 24);
        let rows: Vec<Vec<u64>> =
            halves.iter().zip(singles.iter().cycle()).map(|(h, s)| vec![h[0], h[1], s[0]]).collect();
        for (suffix, mode) in MODES {
            for op in ["add", "sub", "fma"] {
                let arguments = if op == "fma" { "%d, %a, %b, %c;" } else { "%d, %a, %c;" };
                let body = format!("{op}.{suffix}.f32.{name} {arguments}");
                for (row, got) in rows.iter().zip(map(&body, &[2, 2, 4], 4, &rows)) {
                    let (a, b, c) = (f.decode(row[0]), f.decode(row[1]), F32.decode(row[2]));
                    let exact = match op {
                        "add" => exact::add(a, c, mode),
                        "sub" => exact::add(a, c.with_sign(!c.negative()), mode),
                        _ => exact::fma(a, b, c, mode),
                    };
                    let want = F32.encode(exact, mode);
                    let same = want.map_or(F32.is_nan(got), |w| w == got);
                    assert!(same, "{body} of {row:x?}: got {got:#x}, expected {want:x?}");
                }
            }
        }
    }
}

/// Orders numbers, minus zero below plus zero; `None` where one is a NaN.
fn order(f: Float, a: u64, b: u64) -> Option<std::cmp::Ordering> {
    let key = |v: u64| {
        let sign = 1u64 << (f.bits - 1);
        if v & sign != 0 { -((v & (sign - 1)) as i128) - 1 } else { v as i128 }
    };
    (!f.is_nan(a) && !f.is_nan(b)).then(|| key(a).cmp(&key(b)))
}

#[test]
fn minimum_and_maximum_know_signed_zeros_and_nans() {
    for (name, f) in [("f32", F32), ("f64", F64), ("f16", F16), ("bf16", BF16)] {
        let rows = operands(f, 2, 16);
        let sign = 1u64 << (f.bits - 1);
        for (op, least) in [("min", true), ("max", false)] {
            // The modifiers that this type has: flushing, NaN wins, the product's sign on the smaller or larger size.
            let mut variants = vec![(false, false, false)];
            if f != F64 {
                variants.extend([(false, true, false), (false, false, true), (false, true, true)]);
            }
            if f == F32 || f == F16 {
                variants.extend([(true, false, false), (true, true, false), (true, true, true)]);
            }
            for (flush, nan, xorsign) in variants {
                let flag = |on: bool, text: &'static str| if on { text } else { "" };
                let body = format!(
                    "{op}{}{}{}.{name} {}",
                    flag(flush, ".ftz"),
                    flag(nan, ".NaN"),
                    flag(xorsign, ".xorsign.abs"),
                    list(2)
                );
                compare(f, &body, 2, &rows, |r| {
                    let v: Vec<u64> = r.iter().map(|&v| if flush { f.flush(v) } else { v }).collect();
                    let signs = (v[0] ^ v[1]) & sign;
                    let v: Vec<u64> = v.iter().map(|v| if xorsign { v & !sign } else { *v }).collect();
                    let chosen = match order(f, v[0], v[1]) {
                        Some(o) => Some(if o.is_lt() == least { v[0] } else { v[1] }),
                        None if nan => None,
                        None => v.iter().copied().find(|&v| !f.is_nan(v)),
                    };
                    // The sign of both operands is meant even where one is a NaN.
                    chosen.map(|c| if xorsign { c & !sign | signs } else { c })
                });
            }
        }
    }
}

#[test]
fn signs_and_classes() {
    for (name, f, out) in [("f32", F32, "b32"), ("f64", F64, "b64")] {
        let (sign, rows) = (1u64 << (f.bits - 1), operands(f, 2, 17));
        compare(f, &format!("copysign.{name} %d, %a, %b;"), 2, &rows, |r| {
            let want = r[0] & sign | r[1] & !sign;
            (!f.is_nan(want)).then_some(want)
        });
        compare(f, &format!("neg.{name} %d, %a;"), 1, &operands(f, 1, 18), |r| {
            (!f.is_nan(r[0])).then_some(r[0] ^ sign)
        });
        compare(f, &format!("abs.{name} %d, %a;"), 1, &operands(f, 1, 19), |r| {
            (!f.is_nan(r[0])).then_some(r[0] & !sign)
        });
        let rows = operands(f, 1, 20);
        for class in ["finite", "infinite", "number", "notanumber", "normal", "subnormal"] {
            let body = format!("testp.{class}.{name} %p1, %a; selp.{out} %d, 1, 0, %p1;");
            for (row, got) in rows.iter().zip(map(&body, &[f.bits as usize / 8], f.bits as usize / 8, &rows)) {
                let v = f.decode(row[0]);
                let finite = matches!(v, Number::Finite { .. });
                let want = match class {
                    "finite" => finite,
                    "infinite" => matches!(v, Number::Infinite { .. }),
                    "number" => v != Number::Nan,
                    "notanumber" => v == Number::Nan,
                    // Zeros count as normal.
                    "normal" => finite && !f.is_subnormal(row[0]),
                    _ => f.is_subnormal(row[0]),
                };
                assert_eq!(got, u64::from(want), "testp.{class}.{name} of {:x}", row[0]);
            }
        }
    }
}

/// `.ftz` makes zeros of subnormal f16 and keeps their sign.
#[test]
fn signs_of_halves() {
    let rows: Vec<Vec<u64>> = (0..0x1_0000u64).map(|h| vec![h | (h ^ 0x8001) << 16]).collect();
    let flush = |h: u64| if h & 0x7c00 == 0 { h & 0x8000 } else { h };
    for (name, ftz) in [("f16", false), ("ftz.f16", true), ("bf16", false)] {
        let one = |h: u64| if ftz { flush(h) } else { h };
        let nan = |h: u64| if name == "bf16" { h & 0x7fff > 0x7f80 } else { h & 0x7fff > 0x7c00 };
        for (op, change) in [("neg", (|h| h ^ 0x8000) as fn(u64) -> u64), ("abs", |h| h & 0x7fff)] {
            let body = format!("{op}.{name}x2 %d, %a;");
            for (row, got) in rows.iter().zip(map(&body, &[4], 4, &rows)) {
                for at in [0, 16] {
                    let h = row[0] >> at & 0xffff;
                    let got = got >> at & 0xffff;
                    assert!(nan(h) && nan(got) || got == change(one(h)), "{body} of {h:04x}: {got:04x}");
                }
            }
            let single = format!("cvt.u16.u32 %h1, %a; {op}.{name} %h2, %h1; cvt.u32.u16 %d, %h2;");
            for (row, got) in rows.iter().zip(map(&single, &[4], 4, &rows)) {
                let h = row[0] & 0xffff;
                assert!(nan(h) && nan(got) || got == change(one(h)), "{op}.{name} of {h:04x}: {got:04x}");
            }
        }
    }
}

/// The reference itself against the host's arithmetic, which rounds to nearest.
#[test]
fn the_exact_arithmetic_agrees_with_the_host() {
    let rows = operands(F64, 3, 21);
    for r in &rows {
        let [a, b, c] = [0, 1, 2].map(|i| f64::from_bits(r[i]));
        let n = [0, 1, 2].map(|i| F64.decode(r[i]));
        for (got, want) in [
            (exact::add(n[0], n[1], Mode::Even), a + b),
            (exact::mul(n[0], n[1]), a * b),
            (exact::div(n[0], n[1]), a / b),
            (exact::fma(n[0], n[1], n[2], Mode::Even), a.mul_add(b, c)),
            (exact::sqrt(n[0]), a.sqrt()),
        ] {
            let got = F64.encode(got, Mode::Even);
            assert!(got.map_or(want.is_nan(), |g| g == want.to_bits()), "{a:e} {b:e} {c:e}: {got:x?} {want:e}");
        }
        let narrow = F32.encode(n[0], Mode::Even);
        assert!(narrow.map_or(a.is_nan(), |g| g == u64::from((a as f32).to_bits())), "{a:e} as f32");
    }
}
