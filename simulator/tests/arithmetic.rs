//! Arithmetic instructions against independent formulas, over random operands and special values.

mod common;
use common::map;
use proptest::prelude::*;

const SPECIAL32: [u32; 20] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    0x007f_ffff,
    0x0080_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x3f00_0000,
    0x4b00_0001,
    0xcb00_0001,
    0x4f00_0000,
    0x3fff_ffff,
    31,
    32,
];

fn word() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), prop::sample::select(SPECIAL32.to_vec()), (0u32..64)]
}

fn rows(n: usize) -> impl Strategy<Value = Vec<Vec<u64>>> {
    prop::collection::vec(prop::collection::vec(word().prop_map(u64::from), n), 1..100)
}

fn rows64(n: usize) -> impl Strategy<Value = Vec<Vec<u64>>> {
    let v =
        prop_oneof![any::<u64>(), 0u64..64, any::<u64>().prop_map(|v| v | 1 << 63), any::<u32>().prop_map(u64::from)];
    prop::collection::vec(prop::collection::vec(v, n), 1..60)
}

/// Compares for every row; the formula sees the operands as they are.
fn check(body: &str, widths: &[usize], out: usize, rows: &[Vec<u64>], f: impl Fn(&[u64]) -> u64) {
    for (row, got) in rows.iter().zip(map(body, widths, out, rows)) {
        let want = f(row);
        assert_eq!(got, want, "{body} of {row:x?}: got {got:#x}, expected {want:#x}");
    }
}

/// The same for floats: any NaN equals any other.
fn check_f32(body: &str, rows: &[Vec<u64>], f: impl Fn(f32, f32, f32) -> f32) {
    let get = |r: &[u64], i: usize| f32::from_bits(r.get(i).copied().unwrap_or(0) as u32);
    let widths = vec![4; rows[0].len()];
    for (row, got) in rows.iter().zip(map(body, &widths, 4, rows)) {
        let (got, want) = (f32::from_bits(got as u32), f(get(row, 0), get(row, 1), get(row, 2)));
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{body} of {row:x?}: got {got:e}, expected {want:e}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn integers_32(rows in rows(3)) {
        let s = |v: u64| v as u32 as i32;
        let u = |v: u64| v as u32;
        check("add.s32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u(r[0]).wrapping_add(u(r[1])).into());
        check("add.sat.s32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u64::from(s(r[0]).saturating_add(s(r[1])) as u32));
        check("sub.u32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u(r[0]).wrapping_sub(u(r[1])).into());
        check("mul.hi.u32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| ((u128::from(u(r[0])) * u128::from(u(r[1]))) >> 32) as u64);
        check("mul.hi.s32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u64::from(((i128::from(s(r[0])) * i128::from(s(r[1]))) >> 32) as u32));
        check("mad.lo.s32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| u64::from((i128::from(s(r[0])) * i128::from(s(r[1])) + i128::from(s(r[2]))) as u32));
        check("mul.wide.s32 %d, %a, %b;", &[4, 4, 4], 8, &rows, |r| (i128::from(s(r[0])) * i128::from(s(r[1]))) as u64);
        check("mul.wide.u32 %d, %a, %b;", &[4, 4, 4], 8, &rows, |r| u64::from(u(r[0])) * u64::from(u(r[1])));
        check("min.s32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u64::from(if s(r[0]) < s(r[1]) { u(r[0]) } else { u(r[1]) }));
        check("abs.s32 %d, %a;", &[4, 4, 4], 4, &rows, |r| u64::from(i64::from(s(r[0])).unsigned_abs() as u32));
        check("sad.s32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| u64::from((i64::from(s(r[0])) - i64::from(s(r[1]))).unsigned_abs() as u32).wrapping_add(u(r[2]).into()) & 0xffff_ffff);
        let nonzero: Vec<Vec<u64>> = rows.iter().filter(|r| u(r[1]) != 0).cloned().collect();
        if !nonzero.is_empty() {
            check("div.s32 %d, %a, %b;", &[4, 4, 4], 4, &nonzero, |r| u64::from((i64::from(s(r[0])) / i64::from(s(r[1]))) as u32));
            check("rem.s32 %d, %a, %b;", &[4, 4, 4], 4, &nonzero, |r| u64::from((i64::from(s(r[0])) % i64::from(s(r[1]))) as u32));
            check("rem.u32 %d, %a, %b;", &[4, 4, 4], 4, &nonzero, |r| (u(r[0]) % u(r[1])).into());
        }
    }

    #[test]
    fn integers_64_and_carries(rows in rows64(3)) {
        check("mul.hi.u64 %d, %a, %b;", &[8, 8, 8], 8, &rows, |r| ((u128::from(r[0]) * u128::from(r[1])) >> 64) as u64);
        check("mad.lo.u64 %d, %a, %b, %c;", &[8, 8, 8], 8, &rows, |r| r[0].wrapping_mul(r[1]).wrapping_add(r[2]));
        check("max.s64 %d, %a, %b;", &[8, 8, 8], 8, &rows, |r| (r[0] as i64).max(r[1] as i64) as u64);
        check("bfe.s64 %d, %a, 7, 20;", &[8, 8, 8], 8, &rows, |r| ((r[0] >> 7) as i64) .wrapping_shl(44).wrapping_shr(44) as u64);
        check("popc.b64 %d, %a;", &[8, 8, 8], 4, &rows, |r| (0..64).filter(|i| r[0] >> i & 1 == 1).count() as u64);
        // The high word of a 128-bit sum.
        check("add.cc.u64 %rd1, %a, %b; addc.u64 %d, %c, 0;", &[8, 8, 8], 8, &rows, |r| {
            let carry = (u128::from(r[0]) + u128::from(r[1])) >> 64;
            r[2].wrapping_add(carry as u64)
        });
        check("sub.cc.u64 %rd1, %a, %b; subc.u64 %d, %c, 0;", &[8, 8, 8], 8, &rows, |r| r[2].wrapping_sub(u64::from(r[0] < r[1])));
    }

    #[test]
    fn bits(rows in rows(3)) {
        let u = |v: u64| v as u32;
        for table in [0x1bu32, 0x96, 0xe8, 0x40] {
            check(&format!("lop3.b32 %d, %a, %b, %c, {table};"), &[4, 4, 4], 4, &rows, |r| {
                (0..32).map(|i| {
                    let k = (r[0] >> i & 1) << 2 | (r[1] >> i & 1) << 1 | (r[2] >> i & 1);
                    u64::from(table >> k & 1) << i
                }).sum()
            });
        }
        check("shl.b32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| if u(r[1]) > 31 { 0 } else { (r[0] << u(r[1])) & 0xffff_ffff });
        check("shr.s32 %d, %a, %b;", &[4, 4, 4], 4, &rows, |r| u64::from((i64::from(u(r[0]) as i32) >> u(r[1]).min(40)) as u32));
        check("shf.l.wrap.b32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| ((r[1] << 32 | r[0]) << (r[2] & 31)) >> 32 & 0xffff_ffff);
        check("shf.r.clamp.b32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| ((r[1] << 32 | r[0]) >> u(r[2]).min(32)) & 0xffff_ffff);
        check("brev.b32 %d, %a;", &[4, 4, 4], 4, &rows, |r| (0..32).map(|i| (r[0] >> i & 1) << (31 - i)).sum());
        check("clz.b32 %d, %a;", &[4, 4, 4], 4, &rows, |r| (0..32).rev().take_while(|i| r[0] >> i & 1 == 0).count() as u64);
        check("bfind.u32 %d, %a;", &[4, 4, 4], 4, &rows, |r| (0..32).rev().find(|i| r[0] >> i & 1 == 1).map_or(0xffff_ffff, |i| i as u64));
        check("bfi.b32 %d, %a, %b, 5, 9;", &[4, 4, 4], 4, &rows, |r| (r[1] & !(0x1ff << 5)) | (r[0] & 0x1ff) << 5);
        check("prmt.b32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| {
            let bytes: Vec<u8> = [u(r[0]).to_le_bytes(), u(r[1]).to_le_bytes()].concat();
            (0..4).map(|k| {
                let s = (r[2] >> (4 * k) & 15) as usize;
                let b = bytes[s & 7];
                let b = if s & 8 == 0 { b } else if b & 0x80 != 0 { 0xff } else { 0 };
                u64::from(b) << (8 * k)
            }).sum()
        });
        check("dp4a.s32.u32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| {
            let sum: i64 = (0..4).map(|k| i64::from(u(r[0]).to_le_bytes()[k] as i8) * i64::from(u(r[1]).to_le_bytes()[k])).sum();
            u64::from((sum + i64::from(u(r[2]) as i32)) as u32)
        });
        check("bfe.u32 %d, %a, %b, %c;", &[4, 4, 4], 4, &rows, |r| {
            let (p, l) = (r[1] & 0xff, r[2] & 0xff);
            (0..l.min(32)).filter(|i| p + i < 32).map(|i| (r[0] >> (p + i) & 1) << i).sum()
        });
    }

    #[test]
    fn comparisons(rows in rows(2)) {
        let f = |v: u64| f32::from_bits(v as u32);
        let sel = "selp.u32 %d, 1, 0, %p1;";
        check(&format!("setp.lt.s32 %p1, %a, %b; {sel}"), &[4, 4], 4, &rows, |r| u64::from((r[0] as i32) < r[1] as i32));
        check(&format!("setp.hs.u32 %p1, %a, %b; {sel}"), &[4, 4], 4, &rows, |r| u64::from(r[0] as u32 >= r[1] as u32));
        check(&format!("setp.ne.f32 %p1, %a, %b; {sel}"), &[4, 4], 4, &rows, |r| u64::from(!f(r[0]).is_nan() && !f(r[1]).is_nan() && f(r[0]) != f(r[1])));
        check(&format!("setp.leu.f32 %p1, %a, %b; {sel}"), &[4, 4], 4, &rows, |r| u64::from(f(r[0]).is_nan() || f(r[1]).is_nan() || f(r[0]) <= f(r[1])));
        check(&format!("setp.nan.f32 %p1, %a, %b; {sel}"), &[4, 4], 4, &rows, |r| u64::from(f(r[0]).is_nan() || f(r[1]).is_nan()));
        check(&format!("setp.eq.u32 %p2, %a, 7; setp.gt.and.s32 %p1|%p3, %a, %b, !%p2; {sel}"), &[4, 4], 4, &rows, |r| u64::from((r[0] as i32) > r[1] as i32 && r[0] != 7));
        check("set.gt.f32.s32 %d, %a, %b;", &[4, 4], 4, &rows, |r| if (r[0] as i32) > r[1] as i32 { 1.0f32.to_bits().into() } else { 0 });
    }

    #[test]
    fn floats(rows in rows(3)) {
        let ftz = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        check_f32("add.f32 %d, %a, %b;", &rows, |a, b, _| a + b);
        check_f32("mul.rn.ftz.f32 %d, %a, %b;", &rows, |a, b, _| ftz(ftz(a) * ftz(b)));
        check_f32("fma.rn.f32 %d, %a, %b, %c;", &rows, |a, b, c| a.mul_add(b, c));
        check_f32("div.rn.f32 %d, %a, %b;", &rows, |a, b, _| a / b);
        check_f32("sqrt.rn.f32 %d, %a;", &rows, |a, _, _| a.sqrt());
        check_f32("add.sat.f32 %d, %a, %b;", &rows, |a, b, _| { let s = a + b; if s.is_nan() { 0.0 } else { s.clamp(0.0, 1.0) + 0.0 } });
        check_f32("max.f32 %d, %a, %b;", &rows, |a, b, _| if a == 0.0 && b == 0.0 { if a.is_sign_positive() { a } else { b } } else { a.max(b) });
        check_f32("min.NaN.f32 %d, %a, %b;", &rows, |a, b, _| if a.is_nan() || b.is_nan() { f32::NAN } else if a == 0.0 && b == 0.0 { if a.is_sign_negative() { a } else { b } } else { a.min(b) });
        check_f32("neg.f32 %d, %a;", &rows, |a, _, _| -a);
    }

    /// Directed rounding: the result is the neighbour of the exact value on the right side.
    #[test]
    fn directed_rounding(rows in rows(2)) {
        let exact_product = |r: &[u64]| f64::from(f32::from_bits(r[0] as u32)) * f64::from(f32::from_bits(r[1] as u32));
        let down = map("mul.rm.f32 %d, %a, %b;", &[4, 4], 4, &rows);
        let up = map("mul.rp.f32 %d, %a, %b;", &[4, 4], 4, &rows);
        let zero = map("mul.rz.f32 %d, %a, %b;", &[4, 4], 4, &rows);
        for (i, r) in rows.iter().enumerate() {
            let f = |v: u64| f32::from_bits(v as u32);
            let (x, d, u, z) = (exact_product(r), f(down[i]), f(up[i]), f(zero[i]));
            if x.is_nan() {
                prop_assert!(d.is_nan() && u.is_nan() && z.is_nan());
                continue;
            }
            prop_assert!(f64::from(d) <= x && f64::from(u) >= x, "{x:e} not in {d:e}..{u:e}");
            prop_assert!(d == u || d.next_up() == u, "{d:e} and {u:e} are not neighbours");
            let towards_zero = if x > 0.0 { d } else { u };
            prop_assert!(z == towards_zero);
        }
    }

    #[test]
    fn halves(rows in rows(3)) {
        use half::{bf16, f16};
        let h = |v: u64| f16::from_bits(v as u16);
        let same = |got: u16, want: f16| got == want.to_bits() || f16::from_bits(got).is_nan() && want.is_nan();
        for (op, f) in [("add", (|a, b| a + b) as fn(f64, f64) -> f64), ("mul", |a, b| a * b)] {
            let got = map(&format!("{op}.f16x2 %d, %a, %b;"), &[4, 4, 4], 4, &rows);
            for (r, g) in rows.iter().zip(got) {
                for part in [0, 16] {
                    // The exact result fits f64, so one rounding is left.
                    let want = f16::from_f64(f(h(r[0] >> part).to_f64(), h(r[1] >> part).to_f64()));
                    prop_assert!(same((g >> part) as u16, want), "{op} {r:x?} {g:x} {want:?}");
                }
            }
        }
        for (body, part) in [("cvt.f32.f16 %d, %h1;", 0), ("cvt.f32.bf16 %d, %h1;", 1)] {
            let got = map(&format!("cvt.u16.u32 %h1, %a; {body}"), &[4, 4, 4], 4, &rows);
            for (r, g) in rows.iter().zip(got) {
                let want = if part == 0 { f16::from_bits(r[0] as u16).to_f32() } else { bf16::from_bits(r[0] as u16).to_f32() };
                let got = f32::from_bits(g as u32);
                prop_assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan());
            }
        }
        let got = map("cvt.rn.f16x2.f32 %d, %a, %b;", &[4, 4, 4], 4, &rows);
        let bf = map("cvt.rn.bf16x2.f32 %d, %a, %b;", &[4, 4, 4], 4, &rows);
        for ((r, g), b) in rows.iter().zip(got).zip(bf) {
            for (k, part) in [(0, 16), (1, 0)] {
                let x = f32::from_bits(r[k] as u32);
                prop_assert!(same((g >> part) as u16, f16::from_f32(x)), "f16 of {x:e}");
                let want = bf16::from_f32(x);
                prop_assert!((b >> part) as u16 == want.to_bits() || want.is_nan() && bf16::from_bits((b >> part) as u16).is_nan(), "bf16 of {x:e}");
            }
        }
    }

    #[test]
    fn conversions(rows in rows(1)) {
        let f = |v: u64| f32::from_bits(v as u32);
        // Rust's casts truncate and saturate; NaN gives 0.
        check("cvt.rzi.s32.f32 %d, %a;", &[4], 4, &rows, |r| u64::from(f(r[0]) as i32 as u32));
        check("cvt.rni.s32.f32 %d, %a;", &[4], 4, &rows, |r| u64::from(f(r[0]).round_ties_even() as i32 as u32));
        check("cvt.rmi.s64.f32 %d, %a;", &[4], 8, &rows, |r| if f(r[0]).is_nan() { 1 << 63 } else { f(r[0]).floor() as i64 as u64 });
        check("cvt.rzi.u8.f32 %h1, %a; cvt.u32.u16 %d, %h1;", &[4], 4, &rows, |r| u64::from(f(r[0]) as u8));
        check("cvt.rn.f32.u32 %d, %a;", &[4], 4, &rows, |r| u64::from((r[0] as u32 as f32).to_bits()));
        check("cvt.sat.s8.s32 %r1, %a; mov.u32 %d, %r1;", &[4], 4, &rows, |r| u64::from((r[0] as i32).clamp(-128, 127) as u32));
        check("cvt.s64.s32 %d, %a;", &[4], 8, &rows, |r| r[0] as i32 as i64 as u64);
        check("cvt.s32.s8 %d, %a;", &[4], 4, &rows, |r| u64::from(r[0] as i8 as i32 as u32));
        check_f32("cvt.rmi.f32.f32 %d, %a;", &rows, |a, _, _| a.floor());
        check_f32("cvt.rni.f32.f32 %d, %a;", &rows, |a, _, _| a.round_ties_even());
        // To 8-bit floats and back, against the nearest of all 127 magnitudes.
        let e4m3: Vec<f64> = (0..127).map(|i: i32| {
            let (e, m) = (i >> 3, f64::from(i & 7));
            if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) }
        }).collect();
        let got = map("cvt.rn.satfinite.e4m3x2.f32 %h1, %a, %a; cvt.u32.u16 %d, %h1;", &[4], 4, &rows);
        for (r, g) in rows.iter().zip(got) {
            let x = f(r[0]);
            prop_assert_eq!(g & 0xff, g >> 8);
            if x.is_nan() {
                prop_assert_eq!(g & 0x7f, 0x7f);
                continue;
            }
            let distance = |i: usize| (e4m3[i] - f64::from(x.abs()).min(448.0)).abs();
            let best = (0..127).min_by(|&i, &j| distance(i).total_cmp(&distance(j)).then((i & 1).cmp(&(j & 1)))).unwrap();
            prop_assert_eq!(g & 0x7f, best as u64, "{:e}", x);
            prop_assert_eq!(g >> 7 & 1, u64::from(x.is_sign_negative()));
        }
    }

    /// Approximate functions: within the error that the PTX documentation gives.
    #[test]
    fn functions(xs in prop::collection::vec(-80.0f32..80.0, 1..64)) {
        let rows: Vec<Vec<u64>> = xs.iter().map(|x| vec![x.to_bits().into()]).collect();
        let run = |op: &str| map(&format!("{op}.f32 %d, %a;"), &[4], 4, &rows).into_iter().map(|v| f64::from(f32::from_bits(v as u32))).collect::<Vec<_>>();
        for (op, f, relative) in [
            ("ex2.approx", (|x| 2f64.powf(x)) as fn(f64) -> f64, 2f64.powi(-22)),
            ("rcp.approx", |x| 1.0 / x, 2f64.powi(-23)),
            ("tanh.approx", |x| x.tanh(), 2f64.powi(-11)),
        ] {
            for (x, got) in xs.iter().zip(run(op)) {
                let want = f(f64::from(*x));
                prop_assert!((got - want).abs() <= relative * want.abs() + 1e-38, "{} of {}: {} instead of {}", op, x, got, want);
            }
        }
        for (x, got) in xs.iter().zip(run("rsqrt.approx")) {
            if *x > 0.0 {
                prop_assert!((got * f64::from(*x).sqrt() - 1.0).abs() <= 2f64.powf(-22.4));
            }
        }
        for (op, f) in [("sin.approx", f64::sin as fn(f64) -> f64), ("cos.approx", f64::cos)] {
            for (x, got) in xs.iter().zip(run(op)) {
                prop_assert!((got - f(f64::from(*x))).abs() <= 2f64.powf(-20.5));
            }
        }
    }
}

/// Averages of packed integers round halves away from zero.
#[test]
fn packed_averages_round_away_from_zero() {
    let mut random = common::Random(31);
    let mut word = || u64::from(random.next() << 1 | random.next() & 1);
    let mut rows: Vec<Vec<u64>> = (0..500).map(|_| vec![word(), word()]).collect();
    // Sums of -1, -2, -3, 0 and 1.
    rows.extend([vec![0xff00_ff00, 0x00ff_ff01], vec![0xfffe_fffd, 0xffff_0000], vec![0x0001_0000, 0x0000_0001]]);
    for bits in [8u32, 16] {
        let part = |x: u64, at: u32| i64::from((x as u32) << (32 - bits - at)) << 32 >> (64 - bits);
        check(&format!("vavrg{0}.s32.s32.s32 %d, %a, %b, 0;", 32 / bits), &[4, 4], 4, &rows, |r| {
            let average = |at: u32| ((part(r[0], at) + part(r[1], at)) as f64 / 2.0).round() as i64;
            (0..32).step_by(bits as usize).map(|at| (average(at) as u64 & ((1 << bits) - 1)) << at).sum()
        });
    }
}

/// Conditions, results and guards of comparisons may be the same predicates, and `set` leaves the carry alone.
#[test]
fn comparisons_keep_what_they_read() {
    let rows: Vec<Vec<u64>> = (0..16u64)
        .map(|i| {
            let half = |i: u64| if i & 1 != 0 { 0x3c00 } else { 0x4000 };
            vec![half(i) | half(i >> 1) << 16, 0x3e00_3e00, i >> 2]
        })
        .collect();
    // Bits 0 and 1 of the row's number: the low and the high half are less.
    let less = |r: &[u64], at: u32| r[0] >> at & 0xffff == 0x3c00;
    let before = "and.b32 %r1, %c, 1; setp.ne.u32 %p1, %r1, 0; setp.gt.u32 %p2, %c, 1;";
    let after = "selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %d, %r2, %r3;";
    let flags = |p: bool, q: bool| u64::from(p) | u64::from(q) << 1;
    type Want = fn(bool, bool, bool, bool) -> (bool, bool);
    let cases: [(&str, Want); 4] = [
        ("setp.lt.and.f16x2 %p1|%p2, %a, %b, %p1;", |p, _, low, high| (low && p, high && p)),
        ("setp.lt.or.f16x2 %p2|%p1, %a, %b, !%p2;", |_, q, low, high| (high || !q, low || !q)),
        ("@%p1 setp.lt.f16x2 %p1|%p2, %a, %b;", |p, q, low, high| if p { (low, high) } else { (p, q) }),
        ("@!%p2 setp.lt.f16x2 %p1|%p2, %a, %b;", |p, q, low, high| if q { (p, q) } else { (low, high) }),
    ];
    for (body, want) in cases {
        check(&format!("{before} {body} {after}"), &[4, 4, 4], 4, &rows, |r| {
            let (p, q) = want(r[2] & 1 != 0, r[2] > 1, less(r, 0), less(r, 16));
            flags(p, q)
        });
    }
    for set in ["set.lt.u32.u32 %r2, %c, 2;", "set.lt.u32.f16x2 %r2, %a, %b;"] {
        check(&format!("add.cc.u32 %r1, %c, -2; {set} addc.u32 %d, 0, 0;"), &[4, 4, 4], 4, &rows, |r| {
            u64::from(r[2] >= 2)
        });
    }
}
