//! `cvt` between all types, in every rounding mode, with saturation and flushing, against exact arithmetic: special
//! values, limits of integers, and numbers halfway between two of the target.

mod common;

use common::exact::{self, BF16, E4M3, E5M2, F16, F32, F64, Float, MODES, Mode, Number, TF32};
use common::{Random, map};

/// An integer type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Int {
    name: &'static str,
    bits: u32,
    signed: bool,
}

const INTS: [Int; 8] = [
    Int { name: "u8", bits: 8, signed: false },
    Int { name: "s8", bits: 8, signed: true },
    Int { name: "u16", bits: 16, signed: false },
    Int { name: "s16", bits: 16, signed: true },
    Int { name: "u32", bits: 32, signed: false },
    Int { name: "s32", bits: 32, signed: true },
    Int { name: "u64", bits: 64, signed: false },
    Int { name: "s64", bits: 64, signed: true },
];

const FLOATS: [(&str, Float); 4] = [("f16", F16), ("bf16", BF16), ("f32", F32), ("f64", F64)];
const INTEGRAL: [(&str, Mode); 4] = [("rni", Mode::Even), ("rzi", Mode::Zero), ("rmi", Mode::Down), ("rpi", Mode::Up)];

impl Int {
    fn value(self, bits: u64) -> i128 {
        let up = 64 - self.bits;
        if self.signed { (((bits << up) as i64) >> up).into() } else { ((bits << up) >> up).into() }
    }

    fn limits(self) -> (i128, i128) {
        match self.signed {
            true => (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1),
            false => (0, (1 << self.bits) - 1),
        }
    }

    /// The bytes of a register for it, and what such a register holds: wider than the type, it is filled by the sign.
    fn register(self, v: i128) -> (usize, u64) {
        let bytes = (self.bits as usize / 8).max(2);
        (bytes, v as u64 & (u64::MAX >> (64 - 8 * bytes)))
    }

    fn operands(self) -> Vec<Vec<u64>> {
        let mut r = Random(5);
        let near = |k: u32| {
            let p = 1u128 << k;
            [
                p - 2,
                p - 1,
                p,
                p + 1,
                p + (p >> 8),
                p + (p >> 11),
                p + (p >> 12),
                p + (p >> 24),
                p + (p >> 25),
                p * 3 / 2,
            ]
        };
        let special = (1..=self.bits).flat_map(near).flat_map(|v| [v as u64, (v as u64).wrapping_neg()]);
        let mut all: Vec<u64> = special.chain([0, u64::MAX]).collect();
        all.extend((0..150).map(|_| u64::from(r.next()) << 33 ^ u64::from(r.next()) << 11 ^ u64::from(r.next())));
        all.iter().map(|v| vec![v & (u64::MAX >> (64 - self.bits))]).collect()
    }
}

fn of_f64(f: Float, x: f64, mode: Mode) -> u64 {
    f.encode(F64.decode(x.to_bits()), mode).unwrap()
}

/// Numbers of `f`: special values, limits of integers and their neighbours, numbers at and beside the middle of two
/// numbers of every narrower format, random ones.
fn floats(f: Float) -> Vec<Vec<u64>> {
    let unit = 1u64 << f.fraction;
    let mut all = vec![0, 1, 2, 3, unit / 2, unit - 1, unit, unit + 1, f.max - 1, f.max, f.max + 1];
    // NaNs: quiet, signalling, with a payload.
    all.extend([f.max + 1 + unit / 2, f.max + 2, f.max + 1 + unit / 2 + 5, f.max + unit]);
    for k in [-1, 0, 1, 2, 6, 7, 8, 14, 15, 16, 23, 24, 30, 31, 32, 33, 52, 62, 63, 64, 65] {
        let p = 2f64.powi(k);
        for x in
            [p, p - 0.5, p + 0.5, p - 1.0, p + 1.0, 1.5 * p, p * (1.0 - 2f64.powi(-20)), p * (1.0 + 2f64.powi(-20))]
        {
            all.extend([Mode::Zero, Mode::Up].map(|m| of_f64(f, x.max(0.0), m)));
        }
    }
    let mut r = Random(6);
    for g in [E4M3, E5M2, F16, BF16, TF32, F32].into_iter().filter(|g| g.fraction < f.fraction) {
        let subnormal = [1u64, 2, 3, (1 << g.fraction) - 1].into_iter();
        let some = (0..40).map(|_| u64::from(r.next()) % g.max);
        for bits in subnormal.chain(some).chain([g.max - 1, g.max]) {
            // The middle of two neighbours has one more bit; beyond the largest it is where infinity begins.
            let Number::Finite { mantissa, exponent, .. } = g.decode(bits) else {
                continue;
            };
            let middle =
                Number::Finite { negative: false, mantissa: 2 * mantissa + 1, exponent: exponent - 1, sticky: false };
            let middle = f.encode(middle, Mode::Zero).unwrap();
            all.extend([middle, middle + 1, middle.saturating_sub(1)]);
        }
    }
    let mask = u64::MAX >> (64 - f.bits);
    all.extend((0..150).map(|_| (u64::from(r.next()) << 33 ^ u64::from(r.next()) << 11 ^ u64::from(r.next())) & mask));
    all.iter().flat_map(|&v| [vec![v], vec![v ^ 1 << (f.bits - 1)]]).collect()
}

/// The integer that a number becomes: rounded, then the nearest that the type has.
fn to_integer(v: Number, to: Int, mode: Mode) -> Option<i128> {
    let (low, high) = to.limits();
    match v {
        Number::Nan => None,
        Number::Infinite { negative } => Some(if negative { low } else { high }),
        Number::Finite { negative, mantissa, exponent, sticky } => {
            if exponent > 64 && mantissa != 0 {
                return Some(if negative { low } else { high });
            }
            let whole = exact::integral(mantissa, exponent, sticky, negative, mode) as i128;
            Some(if negative { -whole } else { whole }.clamp(low, high))
        }
    }
}

/// Runs `body` and compares whole registers; `None` stands for any NaN of `to`.
fn compare(
    body: &str,
    from: usize,
    out: usize,
    rows: &[Vec<u64>],
    nan: Option<Float>,
    want: impl Fn(u64) -> Option<u64>,
) {
    for (row, got) in rows.iter().zip(map(body, &[from], out, rows)) {
        let want = want(row[0]);
        let same = match want {
            Some(w) => w == got,
            None => nan.is_some_and(|f| f.is_nan(got)),
        };
        assert!(same, "{body} of {:#x}: got {got:#x}, expected {want:x?} (none: NaN)", row[0]);
    }
}

#[test]
fn integers_to_integers() {
    for from in INTS {
        let rows = from.operands();
        for to in INTS {
            let bytes = to.register(0).0;
            for (sat, flag) in [(false, ""), (true, ".sat")] {
                let body = format!("cvt{flag}.{}.{} %d, %a;", to.name, from.name);
                compare(&body, from.bits as usize / 8, bytes, &rows, None, |a| {
                    let v = from.value(a);
                    let v = if sat { v.clamp(to.limits().0, to.limits().1) } else { to.value(v as u64) };
                    Some(to.register(v).1)
                });
            }
        }
    }
}

#[test]
fn integers_to_floats() {
    for from in INTS {
        let rows = from.operands();
        for (name, to) in FLOATS {
            for (mode_name, mode) in MODES {
                let body = format!("cvt.{mode_name}.{name}.{} %d, %a;", from.name);
                compare(&body, from.bits as usize / 8, to.bits as usize / 8, &rows, None, |a| {
                    to.encode(exact::integer(from.value(a)), mode)
                });
            }
        }
    }
}

#[test]
fn floats_to_integers() {
    for (name, from) in FLOATS {
        let rows = floats(from);
        for to in INTS {
            let bytes = to.register(0).0;
            for (mode_name, mode) in INTEGRAL {
                // Integer results saturate with and without the modifier.
                for flag in ["", ".sat", ".ftz"] {
                    let ftz = flag == ".ftz";
                    if ftz && from != F32 {
                        continue;
                    }
                    let body = format!("cvt.{mode_name}{flag}.{}.{name} %d, %a;", to.name);
                    compare(&body, from.bits as usize / 8, bytes, &rows, None, |a| {
                        let v = to_integer(from.decode(if ftz { from.flush(a) } else { a }), to, mode);
                        // NaN is zero, but for 64-bit sources or targets the target's top bit.
                        let nan = if from == F64 || to.bits == 64 { to.value(1 << (to.bits - 1)) } else { 0 };
                        Some(to.register(v.unwrap_or(nan)).1)
                    });
                }
            }
        }
    }
}

fn saturate(f: Float, bits: Option<u64>) -> u64 {
    let one = f.encode(exact::integer(1), Mode::Even).unwrap();
    match bits {
        Some(b) if b >> (f.bits - 1) == 0 => b.min(one),
        _ => 0,
    }
}

#[test]
fn floats_to_floats() {
    for (from_name, from) in FLOATS {
        let rows = floats(from);
        for (to_name, to) in FLOATS {
            // A wider target needs no rounding; bf16 and f16 do not hold each other.
            let widens = from != to && to.fraction >= from.fraction && to.bits > from.bits;
            if from == to || (from.bits == 16 && to.bits == 16) {
                continue;
            }
            let modes: &[(&str, Mode)] = if widens { &[("", Mode::Even)] } else { &MODES };
            for &(mode_name, mode) in modes {
                let dot = if mode_name.is_empty() { "" } else { "." };
                for flag in ["", ".sat", ".ftz"] {
                    let ftz = flag == ".ftz";
                    if ftz && from != F32 && to != F32 {
                        continue;
                    }
                    let body = format!("cvt{dot}{mode_name}{flag}.{to_name}.{from_name} %d, %a;");
                    compare(&body, from.bits as usize / 8, to.bits as usize / 8, &rows, Some(to), |a| {
                        let v = to.encode(from.decode(if ftz && from == F32 { from.flush(a) } else { a }), mode);
                        match flag {
                            ".sat" => Some(saturate(to, v)),
                            ".ftz" if to == F32 => v.map(|v| to.flush(v)),
                            _ => v,
                        }
                    });
                }
            }
        }
    }
}

#[test]
fn floats_to_whole_floats() {
    for (name, f) in FLOATS {
        let rows = floats(f);
        for (mode_name, mode) in INTEGRAL {
            for flag in ["", ".sat", ".ftz"] {
                if flag == ".ftz" && f != F32 {
                    continue;
                }
                let body = format!("cvt.{mode_name}{flag}.{name}.{name} %d, %a;");
                compare(&body, f.bits as usize / 8, f.bits as usize / 8, &rows, Some(f), |a| {
                    let a = if flag == ".ftz" { f.flush(a) } else { a };
                    let v = match f.decode(a) {
                        Number::Finite { negative, mantissa, exponent, sticky } if exponent < 0 => {
                            // Minus a half becomes minus zero.
                            exact::integer(exact::integral(mantissa, exponent, sticky, negative, mode) as i128)
                                .with_sign(negative)
                        }
                        v => v,
                    };
                    let v = f.encode(v, Mode::Even);
                    if flag == ".sat" { Some(saturate(f, v)) } else { v }
                });
            }
        }
    }
}

/// What `.relu` and `.satfinite` make of a number: negative ones and zeros become plus zero; what is too large, infinity
/// too, becomes the largest.
fn limited(to: Float, v: Number, mode: Mode, finite: bool, relu: bool) -> Option<u64> {
    let v = if relu && v.negative() { exact::zero(false) } else { v };
    let bits = to.encode(v, mode)?;
    let sign = 1u64 << (to.bits - 1);
    Some(if finite { bits & sign | (bits & (sign - 1)).min(to.max) } else { bits })
}

#[test]
fn f32_to_narrow_floats_with_relu_and_satfinite() {
    let rows = floats(F32);
    let nan = 0x7fff_ffff;
    for (name, to) in [("f16", F16), ("bf16", BF16)] {
        for (mode_name, mode) in [("rn", Mode::Even), ("rz", Mode::Zero)] {
            for (flags, finite, relu) in
                [(".relu", false, true), (".satfinite", true, false), (".relu.satfinite", true, true)]
            {
                let body = format!("cvt.{mode_name}{flags}.{name}.f32 %d, %a;");
                compare(&body, 4, 2, &rows, Some(to), |a| limited(to, F32.decode(a), mode, finite, relu));
                // NaN results are the canonical one.
                let got = map(&body, &[4], 2, &[vec![0xff80_0001], vec![0x7fc0_1234]]);
                assert_eq!(got, [0x7fff; 2], "{body} of NaN");
            }
        }
    }
    for (mode_name, mode) in [("rna", Mode::Away), ("rn", Mode::Even), ("rz", Mode::Zero)] {
        for (flags, finite, relu) in
            [("", false, false), (".relu", false, true), (".satfinite", true, false), (".relu.satfinite", true, true)]
        {
            if mode == Mode::Away && relu {
                continue;
            }
            let body = format!("cvt.{mode_name}{flags}.tf32.f32 %d, %a;");
            compare(&body, 4, 4, &rows, None, |a| {
                Some(limited(TF32, F32.decode(a), mode, finite, relu).map_or(nan, |b| b << 13))
            });
        }
    }
}

/// Pairs whose halves are different rows.
fn pairs(rows: &[Vec<u64>]) -> Vec<Vec<u64>> {
    rows.iter().zip(rows.iter().cycle().skip(rows.len() / 3)).map(|(a, b)| vec![a[0], b[0]]).collect()
}

/// Compares both parts of a packed result: the first operand is the upper part.
fn compare_pairs(
    body: &str,
    widths: &[usize],
    to: Float,
    rows: &[Vec<u64>],
    want: impl Fn(&[u64], usize) -> Option<u64>,
) {
    let mask = (1 << to.bits) - 1;
    for (row, got) in rows.iter().zip(map(body, widths, to.bits as usize / 4, rows)) {
        for (part, shift) in [(0, to.bits), (1, 0)] {
            let (got, want) = (got >> shift & mask, want(row, part));
            let same = want.map_or(to.is_nan(got), |w| w == got);
            assert!(same, "{body} of {row:x?}, part {part}: got {got:#x}, expected {want:x?} (none: NaN)");
        }
    }
}

#[test]
fn pairs_of_f32_to_packed_floats() {
    let rows = pairs(&floats(F32));
    for (name, to) in [("f16x2", F16), ("bf16x2", BF16)] {
        for (mode_name, mode) in [("rn", Mode::Even), ("rz", Mode::Zero)] {
            for (flags, finite, relu) in [
                ("", false, false),
                (".relu", false, true),
                (".satfinite", true, false),
                (".relu.satfinite", true, true),
            ] {
                let body = format!("cvt.{mode_name}{flags}.{name}.f32 %d, %a, %b;");
                compare_pairs(&body, &[4, 4], to, &rows, |r, part| {
                    limited(to, F32.decode(r[part]), mode, finite, relu)
                });
            }
        }
    }
    for (name, to) in [("e4m3x2", E4M3), ("e5m2x2", E5M2)] {
        for (flags, relu) in [("", false), (".relu", true)] {
            let body = format!("cvt.rn.satfinite{flags}.{name}.f32 %d, %a, %b;");
            compare_pairs(&body, &[4, 4], to, &rows, |r, part| {
                limited(to, F32.decode(r[part]), Mode::Even, true, relu)
            });
            let got = map(&body, &[4, 4], 2, &[vec![0xffc0_0000, 0x7f80_0001]]);
            assert_eq!(got, [0x7f7f], "{body} of NaN");
        }
    }
}

#[test]
fn packed_halves_to_eight_bits_and_back() {
    let halves: Vec<Vec<u64>> = floats(F16);
    let packed = |halves: &[Vec<u64>]| pairs(halves).iter().map(|r| vec![r[0] << 16 | r[1]]).collect::<Vec<_>>();
    let (rows, wide) = (packed(&halves), packed(&floats(BF16)));
    for (name, eight) in [("e4m3x2", E4M3), ("e5m2x2", E5M2)] {
        for (flags, relu) in [("", false), (".relu", true)] {
            let body = format!("cvt.rn.satfinite{flags}.{name}.f16x2 %d, %a;");
            compare_pairs(&body, &[4], eight, &rows, |r, part| {
                limited(eight, F16.decode(r[0] >> (16 - 16 * part) & 0xffff), Mode::Even, true, relu)
            });
            let body = format!("cvt.rn.satfinite{flags}.{name}.bf16x2 %d, %a;");
            compare_pairs(&body, &[4], eight, &wide, |r, part| {
                limited(eight, BF16.decode(r[0] >> (16 - 16 * part) & 0xffff), Mode::Even, true, relu)
            });
            // Every pair of a byte and another.
            let all: Vec<Vec<u64>> = (0..256u64).map(|b| vec![b << 8 | (b * 37 + 11) & 0xff]).collect();
            let body = format!("cvt.rn{flags}.f16x2.{name} %d, %a;");
            compare_pairs(&body, &[2], F16, &all, |r, part| {
                limited(F16, eight.decode(r[0] >> (8 - 8 * part) & 0xff), Mode::Even, false, relu)
            });
        }
    }
}

#[test]
fn integers_are_packed_with_saturation() {
    let mut r = Random(9);
    let edge = [0u32, 1, 127, 128, 129, 255, 256, 32_767, 32_768, 65_535, 65_536, 0x7fff_ffff];
    let words: Vec<u32> =
        edge.into_iter().flat_map(|v| [v, v.wrapping_neg()]).chain((0..60).map(|_| r.next())).collect();
    let rows: Vec<Vec<u64>> = words
        .iter()
        .map(|&a| vec![a.into(), words[r.below(words.len() as u32) as usize].into(), r.next().into()])
        .collect();
    let clamp = |v: u64, low: i32, high: i32, bits: u32| {
        u64::from((v as u32 as i32).clamp(low, high) as u32) & ((1 << bits) - 1)
    };
    for (name, low, high, bits) in
        [("u8", 0, 255, 8), ("s8", -128, 127, 8), ("u16", 0, 65_535, 16), ("s16", -32_768, 32_767, 16)]
    {
        let (body, n) = match bits {
            8 => (format!("cvt.pack.sat.{name}.s32.b32 %d, %a, %b, %c;"), 3),
            _ => (format!("cvt.pack.sat.{name}.s32 %d, %a, %b;"), 2),
        };
        let rows: Vec<Vec<u64>> = rows.iter().map(|r| r[..n].to_vec()).collect();
        for (row, got) in rows.iter().zip(map(&body, &vec![4; n], 4, &rows)) {
            let low_part = clamp(row[0], low, high, bits) << bits | clamp(row[1], low, high, bits);
            let want = if bits == 8 { (row[2] << 16 | low_part) & 0xffff_ffff } else { low_part };
            assert_eq!(got, want, "{body} of {row:x?}");
        }
    }
}
