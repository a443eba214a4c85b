//! Approximate functions: within the largest error that the PTX manual allows, over all exponents, and exact at special
//! values.

mod common;

use common::exact::{self, BF16, F16, F32, F64, Float, Mode};
use common::{Random, map};

fn value(f: Float, bits: u64) -> f64 {
    match f.encode(f.decode(bits), Mode::Even) {
        None => f64::NAN,
        Some(_) => f64::from_bits(F64.encode(f.decode(bits), Mode::Even).unwrap()),
    }
}

/// Numbers of every exponent and sign.
fn operands(f: Float, n: usize) -> Vec<Vec<u64>> {
    let mut r = Random(31);
    let mask = u64::MAX >> (64 - f.bits);
    let mut next = || (u64::from(r.next()) << 33 ^ u64::from(r.next()) << 11 ^ u64::from(r.next())) & mask;
    (0..2000).map(|_| (0..n).map(|_| next()).collect()).collect()
}

/// Numbers between two, of both signs.
fn between(f: Float, low: f64, high: f64) -> Vec<Vec<u64>> {
    let mut r = Random(32);
    let mut next = || {
        let x = low + (high - low) * f64::from(r.next()) / f64::from(u32::MAX >> 1);
        f.encode(F64.decode(x.to_bits()), Mode::Even).unwrap()
    };
    (0..1000).map(|_| vec![next()]).collect()
}

/// One unit in the last place of the f32 nearest to `x`.
fn ulp(x: f64) -> f64 {
    2f64.powi((x.abs().log2().floor() as i32).clamp(-126, 127) - 23)
}

fn run(f: Float, body: &str, rows: &[Vec<u64>]) -> Vec<f64> {
    let (n, bytes) = (rows[0].len(), f.bits as usize / 8);
    map(body, &vec![bytes; n], bytes, rows).into_iter().map(|bits| value(f, bits)).collect()
}

/// Every result is finite and within `allowed(exact)` of the exact one, or is beyond the range like it.
fn within(f: Float, body: &str, rows: &[Vec<u64>], formula: impl Fn(&[f64]) -> f64, allowed: impl Fn(f64) -> f64) {
    let (largest, mut compared) = (value(f, f.max), 0);
    for (row, got) in rows.iter().zip(run(f, body, rows)) {
        let x: Vec<f64> = row.iter().map(|&v| value(f, v)).collect();
        let want = formula(&x);
        if want.is_nan() {
            assert!(got.is_nan(), "{body} of {x:?}: {got:e} instead of NaN");
            continue;
        }
        if want.abs() > largest {
            assert!(got.abs() >= largest && got.signum() == want.signum(), "{body} of {x:?}: {got:e}, exact {want:e}");
            continue;
        }
        compared += 1;
        let error = (got - want).abs();
        assert!(error <= allowed(want), "{body} of {x:?}: {got:e}, exact {want:e}, allowed {:e}", allowed(want));
    }
    assert!(compared > 100, "{body}: only {compared} results are finite");
}

/// Results at single values; NaN equals NaN, and zeros have their sign.
fn at(f: Float, body: &str, values: &[(f64, f64)]) {
    let rows: Vec<Vec<u64>> = values
        .iter()
        .map(|(x, _)| vec![if x.is_nan() { f.max + 2 } else { f.encode(F64.decode(x.to_bits()), Mode::Even).unwrap() }])
        .collect();
    for ((x, want), got) in values.iter().zip(run(f, body, &rows)) {
        assert!(
            got.is_nan() && want.is_nan() || got.to_bits() == want.to_bits(),
            "{body} of {x:e}: {got:e}, not {want:e}"
        );
    }
}

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;
/// The least error that a result in the range of subnormal f32 can have.
const TINY: f64 = 1.5e-45;

#[test]
fn reciprocals_and_roots() {
    let all = operands(F32, 1);
    within(F32, "rcp.approx.f32 %d, %a;", &all, |x| 1.0 / x[0], ulp);
    at(F32, "rcp.approx.f32 %d, %a;", &[(0.0, INF), (-0.0, -INF), (INF, 0.0), (-INF, -0.0), (NAN, NAN)]);
    let positive: Vec<Vec<u64>> = all.iter().map(|r| vec![r[0] & 0x7fff_ffff]).collect();
    within(F32, "sqrt.approx.f32 %d, %a;", &positive, |x| x[0].sqrt(), |y| 2f64.powi(-23) * y + TINY);
    at(F32, "sqrt.approx.f32 %d, %a;", &[(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, NAN), (-1.0, NAN), (NAN, NAN)]);
    within(F32, "rsqrt.approx.f32 %d, %a;", &positive, |x| 1.0 / x[0].sqrt(), |y| 2f64.powf(-22.9) * y);
    at(F32, "rsqrt.approx.f32 %d, %a;", &[(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1.0, NAN), (-INF, NAN), (NAN, NAN)]);
    // With subnormal operands taken for zeros.
    at(F32, "rcp.approx.ftz.f32 %d, %a;", &[(1e-40, INF), (-1e-40, -INF), (2.0, 0.5), (1e38 * 3.0, 0.0)]);
    at(F32, "rsqrt.approx.ftz.f32 %d, %a;", &[(1e-40, INF), (-1e-40, -INF), (4.0, 0.5)]);
    at(F32, "sqrt.approx.ftz.f32 %d, %a;", &[(1e-40, 0.0), (-1e-40, -0.0), (9.0, 3.0)]);
    // f64: about 20 bits of the fraction, for normal numbers.
    let normal: Vec<Vec<u64>> = operands(F64, 1).into_iter().filter(|r| !F64.is_subnormal(r[0])).collect();
    let usual = |x: f64| if x.abs() < f64::MIN_POSITIVE { 0f64.copysign(x) } else { x };
    within(F64, "rcp.approx.ftz.f64 %d, %a;", &normal, |x| usual(1.0 / x[0]), |y| 2f64.powi(-19) * y.abs());
    let positive: Vec<Vec<u64>> = normal.iter().map(|r| vec![r[0] & !(1 << 63)]).collect();
    within(F64, "rsqrt.approx.ftz.f64 %d, %a;", &positive, |x| 1.0 / x[0].sqrt(), |y| 2f64.powi(-19) * y);
    within(F64, "rsqrt.approx.f64 %d, %a;", &positive, |x| 1.0 / x[0].sqrt(), |y| 2f64.powi(-19) * y);
}

#[test]
fn quotients() {
    let all = operands(F32, 2);
    let quotient = |x: &[f64]| x[0] / x[1];
    // Two units for divisors between 2^-126 and 2^126; the full-range form has no such limit.
    let usual = |v: u64| (2f64.powi(-126)..=2f64.powi(126)).contains(&value(F32, v).abs());
    let moderate: Vec<Vec<u64>> = all.iter().filter(|r| usual(r[1])).cloned().collect();
    within(F32, "div.approx.f32 %d, %a, %b;", &moderate, quotient, |y| 2.0 * ulp(y) + TINY);
    within(F32, "div.full.f32 %d, %a, %b;", &all, quotient, |y| 2.0 * ulp(y) + TINY);
}

#[test]
fn exponentials_and_logarithms() {
    let rows = between(F32, -140.0, 130.0);
    within(F32, "ex2.approx.f32 %d, %a;", &rows, |x| x[0].exp2(), |y| 2.0 * ulp(y) + TINY);
    at(
        F32,
        "ex2.approx.f32 %d, %a;",
        &[(0.0, 1.0), (-0.0, 1.0), (INF, INF), (-INF, 0.0), (NAN, NAN), (-200.0, 0.0), (128.0, INF)],
    );
    at(F32, "ex2.approx.ftz.f32 %d, %a;", &[(-126.0, 2f64.powi(-126)), (-127.0, 0.0), (1e-40, 1.0)]);
    for (name, f, relative) in [("ex2.approx.f16", F16, 2f64.powf(-9.9)), ("ex2.approx.ftz.bf16", BF16, 2f64.powi(-7))]
    {
        let rows = between(f, -13.0, 15.0);
        within(f, &format!("{name} %d, %a;"), &rows, |x| x[0].exp2(), |y| relative * y);
        at(f, &format!("{name} %d, %a;"), &[(0.0, 1.0), (INF, INF), (-INF, 0.0), (NAN, NAN), (3.0, 8.0)]);
    }
    let positive: Vec<Vec<u64>> = operands(F32, 1).iter().map(|r| vec![r[0] & 0x7fff_ffff]).collect();
    let allowed = |y: f64| 2f64.powi(-22) * y.abs().max(1.0);
    within(F32, "lg2.approx.f32 %d, %a;", &positive, |x| x[0].log2(), allowed);
    within(F32, "lg2.approx.f32 %d, %a;", &between(F32, 0.5, 2.0), |x| x[0].log2(), |_| 2f64.powi(-22));
    at(
        F32,
        "lg2.approx.f32 %d, %a;",
        &[(0.0, -INF), (-0.0, -INF), (INF, INF), (-1.0, NAN), (-INF, NAN), (NAN, NAN), (8.0, 3.0)],
    );
    at(F32, "lg2.approx.ftz.f32 %d, %a;", &[(1e-40, -INF), (1.0, 0.0)]);
}

#[test]
fn circular_and_hyperbolic_functions() {
    let turn = between(F32, -std::f64::consts::PI, std::f64::consts::PI);
    within(F32, "sin.approx.f32 %d, %a;", &turn, |x| x[0].sin(), |_| 2f64.powf(-20.5));
    within(F32, "cos.approx.f32 %d, %a;", &turn, |x| x[0].cos(), |_| 2f64.powf(-20.5));
    at(F32, "sin.approx.f32 %d, %a;", &[(0.0, 0.0), (-0.0, -0.0), (INF, NAN), (-INF, NAN), (NAN, NAN)]);
    at(F32, "cos.approx.f32 %d, %a;", &[(0.0, 1.0), (-0.0, 1.0), (INF, NAN), (-INF, NAN), (NAN, NAN)]);
    let rows = between(F32, -10.0, 10.0);
    within(F32, "tanh.approx.f32 %d, %a;", &rows, |x| x[0].tanh(), |y| 2f64.powi(-11) * y.abs());
    for (name, f, absolute) in [("f16", F16, 2f64.powf(-10.987)), ("bf16", BF16, 2f64.powi(-8))] {
        within(f, &format!("tanh.approx.{name} %d, %a;"), &between(f, -6.0, 6.0), |x| x[0].tanh(), |_| absolute);
    }
    for (name, f) in [("f32", F32), ("f16", F16), ("bf16", BF16)] {
        at(
            f,
            &format!("tanh.approx.{name} %d, %a;"),
            &[(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (NAN, NAN)],
        );
    }
}

/// Pairs of halves: each part is what the single instruction gives.
#[test]
fn pairs_are_two_singles() {
    for (op, name, f, low, high) in [
        ("ex2.approx", "f16", F16, -13.0, 15.0),
        ("ex2.approx.ftz", "bf16", BF16, -100.0, 100.0),
        ("tanh.approx", "f16", F16, -6.0, 6.0),
        ("tanh.approx", "bf16", BF16, -6.0, 6.0),
    ] {
        let singles = between(f, low, high);
        let results = map(&format!("{op}.{name} %d, %a;"), &[2], 2, &singles);
        let n = singles.len();
        let pairs: Vec<Vec<u64>> = (0..n).map(|i| vec![singles[n - 1 - i][0] << 16 | singles[i][0]]).collect();
        for (i, got) in map(&format!("{op}.{name}x2 %d, %a;"), &[4], 4, &pairs).into_iter().enumerate() {
            assert_eq!(got, results[n - 1 - i] << 16 | results[i], "{op}.{name}x2 of {:#x}", pairs[i][0]);
        }
    }
}

/// The reference's own limits.
#[test]
fn a_unit_in_the_last_place_is_what_it_should_be() {
    for (x, want) in [(1.0, 2f64.powi(-23)), (1.999, 2f64.powi(-23)), (0.999, 2f64.powi(-24)), (1e-40, 2f64.powi(-149))]
    {
        assert_eq!(ulp(x), want);
    }
    let one = F32.encode(exact::integer(1), Mode::Even).unwrap();
    assert_eq!(value(F32, one + 1) - value(F32, one), ulp(1.0));
}
