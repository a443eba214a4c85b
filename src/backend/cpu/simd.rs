//! Loops compiled for AVX-512, AVX2 with FMA, and the baseline, chosen at run time; and the functions they share.
//!
//! A body is written once, as plain Rust over slices that the compiler vectorises. Its const parameter says whether fused
//! multiply-add is an instruction (then [`fma`] is one) or not (then it is two operations, not a library call).

use crate::error::{Error, Result};
use std::sync::OnceLock;

/// Defines a function once for every instruction set.
macro_rules! simd_fn {
    (
        $(#[$meta:meta])* $vis:vis fn $name:ident<$fma:ident $(, const $size:ident: usize)?>($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name$(<const $size: usize>)?($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const $fma: bool $(, const $size: usize)?>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512$(<const $size: usize>)?($($arg: $ty),*) $(-> $ret)? { body::<true $(, $size)?>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2$(<const $size: usize>)?($($arg: $ty),*) $(-> $ret)? { body::<true $(, $size)?>($($arg),*) }
                match $crate::backend::cpu::simd::level() {
                    // SAFETY: `level` found every feature the function needs on this processor.
                    $crate::backend::cpu::simd::Level::Amx | $crate::backend::cpu::simd::Level::Avx512 => return unsafe { avx512$(::<$size>)?($($arg),*) },
                    // SAFETY: as above.
                    $crate::backend::cpu::simd::Level::Avx2 => return unsafe { avx2$(::<$size>)?($($arg),*) },
                    $crate::backend::cpu::simd::Level::Baseline => {}
                }
            }
            body::<{ cfg!(target_arch = "aarch64") } $(, $size)?>($($arg),*)
        }
    };
}
pub(crate) use simd_fn;

/// Instruction sets that bodies are compiled for, each with all of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Baseline,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
    /// Products of tiles of bf16 numbers; [`super::split`] also makes f32 ones of them.
    Amx,
}

/// Names the most that is used of a processor, for the same bits as on one that has no more; `amx` also asks for AMX with an odd number
/// of tokens below 16, where other kernels may be faster.
const LIMIT: &str = "DTR_CPU";

/// The level that the environment variable `DTR_CPU` names, if it is set.
pub fn limit() -> Result<Option<Level>> {
    let Some(name) = std::env::var_os(LIMIT).filter(|name| !name.is_empty()) else { return Ok(None) };
    match name.to_str() {
        Some("baseline") => Ok(Some(Level::Baseline)),
        Some("avx2") => Ok(Some(Level::Avx2)),
        Some("avx512") => Ok(Some(Level::Avx512)),
        Some("amx") => Ok(Some(Level::Amx)),
        _ => Err(Error::usage(format!("{LIMIT} is {}, expected baseline, avx2, avx512 or amx", name.display()))),
    }
}

/// The best instruction set of this processor, up to [`limit`].
#[inline]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        // The command line has checked it.
        let limit = limit().unwrap_or_else(|why| panic!("{why}")).unwrap_or(Level::Amx);
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let has_avx2 = has!("avx2") && has!("fma");
            let has_avx512 = has_avx2 && has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq");
            if has_avx512 && limit >= Level::Avx512 {
                return if limit == Level::Amx && super::tile::amx::available() { Level::Amx } else { Level::Avx512 };
            }
            if has_avx2 && limit >= Level::Avx2 {
                return Level::Avx2;
            }
        }
        let _ = limit;
        Level::Baseline
    })
}

/// `a * b + c`, in one rounding where that is one instruction.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to 1e-7 relative; beyond [-80, 88.37] it is e to the nearer end. NaN stays NaN.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    // Clamped by comparisons that keep NaN, to where 2^n below is a normal number. Next to 1, which softmax and sigmoid add, e^-80
    // is nothing, and its products are still normal numbers: others are slow on some processors.
    let x = if x > 88.37 { 88.37 } else { x };
    let x = if x < -80.0 { -80.0 } else { x };
    // x = n ln 2 + r: adding and subtracting 1.5 * 2^23 rounds to the nearest integer, and with 127 more the low bits are the
    // exponent of 2^n.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -0.693_145_75, x);
    let r = fma::<FMA>(n, -1.428_606_8e-6, r);
    // Of the polynomials 1 + r + .. of degree 6 the one whose largest relative error is least: 4e-9, before it is rounded.
    let mut p = 1.381_461_3e-3;
    for c in [8.368_71e-3, 0.041_668_39, 0.166_665_21, 0.499_999_94, 1.0, 1.0] {
        p = fma::<FMA>(p, r, c);
    }
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// The logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// `2 sqrt(2 / pi)`: the tanh form of GELU is `x * sigmoid(GELU_SLOPE * (x + GELU_CUBIC x^3))`.
const GELU_SLOPE: f32 = 1.595_769;
/// The cubic coefficient of the tanh form of GELU.
const GELU_CUBIC: f32 = 0.044_715;

/// `sigmoid(GELU_SLOPE * (x + GELU_CUBIC x^3))`, the factor of x in GELU.
#[inline(always)]
fn gelu_factor<const FMA: bool>(x: f32) -> f32 {
    sigmoid::<FMA>(x * fma::<FMA>(GELU_SLOPE * GELU_CUBIC, x * x, GELU_SLOPE))
}

/// GELU, tanh form (Hendrycks and Gimpel, 2016).
#[inline(always)]
pub fn gelu<const FMA: bool>(x: f32) -> f32 {
    x * gelu_factor::<FMA>(x)
}

/// Derivative of [`gelu`].
#[inline(always)]
pub fn gelu_derivative<const FMA: bool>(x: f32) -> f32 {
    gelu_and_derivative::<FMA>(x).1
}

/// [`gelu`] and [`gelu_derivative`], bit for bit, for little more than one of them.
#[inline(always)]
pub fn gelu_and_derivative<const FMA: bool>(x: f32) -> (f32, f32) {
    let s = gelu_factor::<FMA>(x);
    let y = x * s;
    let inner = fma::<FMA>(3.0 * GELU_SLOPE * GELU_CUBIC, x * x, GELU_SLOPE);
    (y, fma::<FMA>(y * (1.0 - s), inner, s))
}

/// Numbers of a cache line.
pub const LINE: usize = 64 / size_of::<f32>();

/// Fetches a cache line into the second cache. It changes nothing: where there is none, nothing comes.
#[inline]
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "fetched where it was measured"))]
pub fn fetch(line: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch of any address changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
}

/// Fetches the first `width` numbers of `rows` rows, which start `stride` apart, into the second cache: many lines at a time,
/// where a loop that reads few of each row would wait for one after the other.
#[inline]
pub fn fetch_rows(from: &[f32], rows: usize, width: usize, stride: usize) {
    for row in from.chunks(stride).take(rows) {
        // A row that does not start at a cache line may end in one more, which is left out.
        for line in row[..width.min(row.len())].chunks(LINE) {
            fetch(line.as_ptr());
        }
    }
}

/// Partial sums of a vectorised reduction.
const LANES: usize = 16;

/// The sum of the lanes of a vector, halves first.
#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|l| lanes[l] + lanes[l + 8]);
    let four: [f32; 4] = std::array::from_fn(|l| eight[l] + eight[l + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Adds `f` of the first `count` elements of some vectors to the lanes of each sum.
#[inline(always)]
fn add_lanes<const N: usize, const M: usize>(
    lanes: &mut [[f32; LANES]; M],
    vectors: [&[f32; LANES]; N],
    count: usize,
    f: &impl Fn([f32; N]) -> [f32; M],
) {
    for l in 0..LANES {
        let terms = f(vectors.map(|vector| vector[l]));
        for (lanes, term) in lanes.iter_mut().zip(terms) {
            lanes[l] += if l < count { term } else { 0.0 };
        }
    }
}

/// `M` sums of `f(slices[0][i], slices[1][i], ..)` over the elements of slices of one length, in 16 interleaved
/// partial sums: a fixed order that vectorises.
#[inline(always)]
pub fn sum_by<const N: usize, const M: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> [f32; M]) -> [f32; M] {
    // Arrays, since a check of bounds inside of the loop keeps it scalar.
    let chunks = slices.map(|slice| slice.as_chunks::<LANES>());
    let whole = chunks.iter().map(|(whole, _)| whole.len()).min().unwrap_or(0);
    let mut lanes = [[0.0f32; LANES]; M];
    for i in 0..whole {
        add_lanes(&mut lanes, chunks.map(|(whole, _)| &whole[i]), LANES, &f);
    }
    let count = chunks.iter().map(|(_, rest)| rest.len()).min().unwrap_or(0);
    if count > 0 {
        let rest = chunks.map(|(_, rest)| {
            let mut vector = [0.0; LANES];
            vector[..rest.len()].copy_from_slice(rest);
            vector
        });
        add_lanes(&mut lanes, rest.each_ref(), count, &f);
    }
    lanes.map(sum_lanes)
}

simd_fn! {
    /// The sum of squares, in f64: NaN or infinite when any element is.
    pub fn sum_of_squares<F>(x: &[f32]) -> f64 {
        // Two lines, so that no addition waits for the one before.
        let mut lanes = [0.0f64; 2 * LINE];
        let (whole, rest) = x.as_chunks::<{ 2 * LINE }>();
        for lines in whole {
            for (lane, &x) in lanes.iter_mut().zip(lines) {
                let x = f64::from(x);
                // The square of an f32 is exact, so both are the same number.
                *lane = if F { x.mul_add(x, *lane) } else { x * x + *lane };
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    /// `y += x`.
    pub fn add_assign<F>(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

simd_fn! {
    /// `sums[j] (+)= sum over rows of x[row, j]`, rows in order.
    pub fn column_sums<F>(sums: &mut [f32], x: &[f32], add: bool) {
        if !add {
            sums.fill(0.0);
        }
        for line in x.chunks_exact(sums.len()) {
            for (s, &x) in sums.iter_mut().zip(line) {
                *s += x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_agrees_with_f64() {
        for k in -80_000..=88_370 {
            let x = k as f32 / 1000.0;
            let expected = f64::from(x).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                let err = (f64::from(got) - expected).abs();
                assert!(err <= 1e-7 * expected, "at {x}: {got} for {expected}");
            }
        }
        for (x, end) in [(-1000.0, -80.0), (f32::NEG_INFINITY, -80.0), (1000.0, 88.37), (f32::INFINITY, 88.37)] {
            assert_eq!([exp::<true>(x), exp::<false>(x)], [exp::<true>(end), exp::<false>(end)], "{x}");
        }
        // NaN with any low bits, which are those that make the exponent.
        for nan in (0..1 << 10).map(|low| f32::from_bits(0x7FC0_0000 + low)) {
            assert!(exp::<true>(nan).is_nan() && exp::<false>(nan).is_nan());
        }
    }

    #[test]
    fn gelu_and_its_derivative_agree_with_f64() {
        fn truth(x: f64) -> f64 {
            0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh())
        }
        fn slope(x: f64) -> f64 {
            (truth(x + 1e-5) - truth(x - 1e-5)) / 2e-5
        }
        for k in -2000..=2000 {
            let x = k as f32 / 200.0;
            let (fused, plain) = (gelu_and_derivative::<true>(x), gelu_and_derivative::<false>(x));
            for (y, d) in [fused, plain] {
                assert!((f64::from(y) - truth(f64::from(x))).abs() <= 1e-6, "gelu({x}) = {y}");
                assert!((f64::from(d) - slope(f64::from(x))).abs() <= 2e-6, "gelu'({x}) = {d}");
            }
            assert_eq!(fused, (gelu::<true>(x), gelu_derivative::<true>(x)));
            assert_eq!(plain, (gelu::<false>(x), gelu_derivative::<false>(x)));
        }
    }

    #[test]
    fn sums_add_every_element_once() {
        for n in [0, 1, 15, 16, 17, 31, 100] {
            let (x, y) = ((1..=n).map(|i| i as f32).collect::<Vec<_>>(), vec![2.0; n]);
            // NaN where a vector has no element.
            let [sum, product, one] = sum_by([&x, &y], |[x, y]| [x, x * y, x / x]);
            assert_eq!([sum, product, one], [n * (n + 1) / 2, n * (n + 1), n].map(|expected| expected as f32));
        }
        assert_eq!(sum_lanes(std::array::from_fn(|l| (1 << l) as f32)), 65535.0);
        let mut sums = vec![1.0; 5];
        let x: Vec<f32> = (0..15).map(|v| v as f32).collect();
        column_sums(&mut sums, &x, true);
        assert_eq!(sums, [16.0, 19.0, 22.0, 25.0, 28.0]);
        column_sums(&mut sums, &x, false);
        assert_eq!(sums, [15.0, 18.0, 21.0, 24.0, 27.0]);
    }
}
