//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! A draw depends only on the seed and on what it is for (stream, step, sample, element), never on how many draws came
//! before or on which thread made them. The normal draws use only additions, multiplications, divisions and square roots,
//! which IEEE 754 rounds exactly, in a fixed order and never fused, so that any processor (and any GPU) gets the same bits.

use rayon::prelude::*;

/// What a draw is for. Two streams never share a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Initial weights.
    Init = 0,
    /// Timesteps of a batch.
    Timestep = 1,
    /// Noise of `q_sample`.
    Noise = 2,
    /// Label dropout of classifier-free guidance.
    LabelDropout = 3,
    /// Order of the training samples in an epoch.
    Shuffle = 4,
    /// Horizontal flips of training images.
    Flip = 5,
    /// The starting noise of a sampler.
    SampleStart = 6,
    /// The noise of each sampling step.
    SampleStep = 7,
    /// The channel subsets of random routing.
    Routing = 8,
    /// Which samples are kept from training.
    HeldOut = 9,
    /// The noise on them.
    ValidationNoise = 10,
    /// The draws of latents from their distributions.
    Latent = 11,
}

/// A generator: a seed and a stream. Copies are free; there is no state.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: Stream,
}

impl Philox {
    /// The generator of `stream` for a run with this `seed`.
    pub fn new(seed: u64, stream: Stream) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32], stream }
    }

    /// Four random words for element block `index` of `sample` at `step`.
    ///
    /// `step` and `sample` are used modulo 2^32 and 2^60: more than any run has.
    #[inline(always)]
    pub fn block(&self, step: u64, sample: u64, index: u32) -> [u32; 4] {
        let counter =
            [index, sample as u32, step as u32, (self.stream as u32) << 28 | (sample >> 32) as u32 & 0x0FFF_FFFF];
        philox4x32_10(counter, self.key)
    }

    /// An integer in `0..n`, uniform up to a bias below `n / 2^64`.
    pub fn below(&self, n: u64, step: u64, sample: u64, index: u32) -> u64 {
        let [a, b, ..] = self.block(step, sample, index);
        let word = u64::from(a) << 32 | u64::from(b);
        ((u128::from(word) * u128::from(n)) >> 64) as u64
    }

    /// A number in the open interval (0, 1): an odd multiple of 2^-24.
    pub fn uniform(&self, step: u64, sample: u64, index: u32) -> f32 {
        open_unit(self.block(step, sample, index)[0])
    }

    /// Fills `out` with independent numbers uniform in (-bound, bound): element `i` comes from block `i / 4`, word `i % 4`.
    pub fn symmetric(&self, out: &mut [f32], bound: f32, step: u64, sample: u64) {
        in_fours(out, |index, four| {
            let words = self.block(step, sample, index);
            for (x, word) in four.iter_mut().zip(words) {
                *x = bound * (2.0 * open_unit(word) - 1.0);
            }
        });
    }

    /// Fills `out` with independent standard normal numbers: element `i` comes from block `i / 4`, word `i % 4`.
    pub fn normal(&self, out: &mut [f32], step: u64, sample: u64) {
        in_fours(out, |index, four| {
            let [a, b, c, d] = self.block(step, sample, index);
            let (n0, n1) = box_muller(a, b);
            let (n2, n3) = box_muller(c, d);
            four.copy_from_slice(&[n0, n1, n2, n3][..four.len()]);
        });
    }
}

/// Calls `fill` with the number of each four elements of `out`; of many, on all threads.
#[inline(always)]
fn in_fours(out: &mut [f32], fill: impl Fn(u32, &mut [f32]) + Sync) {
    const PIECE: usize = 1 << 16;
    let piece = |first: usize, piece: &mut [f32]| {
        for (index, four) in piece.chunks_mut(4).enumerate() {
            fill((first + index) as u32, four);
        }
    };
    if out.len() <= PIECE {
        piece(0, out);
    } else {
        out.par_chunks_mut(PIECE).enumerate().for_each(|(i, own)| piece(i * (PIECE / 4), own));
    }
}

/// Ten rounds of Philox4x32 with the constants of the paper's section 3.3.
#[inline(always)]
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The upper 23 bits of `word` as a number in (0, 1): never 0, never 1.
#[inline(always)]
fn open_unit(word: u32) -> f32 {
    // k + 1/2 of 23 bits has 24, as many as f32 holds: the result is exact.
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// Two standard normal numbers from two random words (Box and Muller, 1958).
#[inline(always)]
fn box_muller(a: u32, b: u32) -> (f32, f32) {
    let radius = (-2.0 * ln_unit(open_unit(a))).sqrt();
    let (sin, cos) = sin_cos_turn(b);
    (radius * cos, radius * sin)
}

/// Natural logarithm of a normal number in (0, 1), to about 1e-7 relative: only exact operations in a fixed order.
#[inline(always)]
fn ln_unit(x: f32) -> f32 {
    // x = 2^e * m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m-1)/(m+1).
    let bits = x.to_bits();
    let shifted = bits.wrapping_sub(0x3F35_04F3);
    let e = (shifted as i32) >> 23;
    let m = f32::from_bits((shifted & 0x007F_FFFF).wrapping_add(0x3F35_04F3));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = ((0.222_222_22 * z + 0.285_714_3) * z + 0.4) * z + 0.666_666_7;
    let e = e as f32;
    // ln 2 in two parts: the first has few bits, so e times it is exact.
    (s * z * series + (s + s)) + e * 1.428_606_8e-6 + e * 0.693_145_75
}

/// Sine and cosine of 2 pi * (word / 2^32), to about 1e-7 absolute.
#[inline(always)]
fn sin_cos_turn(word: u32) -> (f32, f32) {
    // Nearest quarter turn, and the rest in [-1/8, 1/8) turns: exact in integers.
    let quarter = word.wrapping_add(0x2000_0000) >> 30;
    let rest = word.wrapping_sub(quarter << 30) as i32;
    // 24 bits of the rest are enough and convert exactly.
    let x = (rest >> 6) as f32 * (std::f32::consts::TAU / 67_108_864.0);
    let z = x * x;
    let sin = ((-1.951_529_6e-4 * z + 8.332_161e-3) * z - 0.166_666_55) * z * x + x;
    let cos = ((2.443_315_7e-5 * z - 1.388_731_6e-3) * z + 4.166_664_6e-2) * z * z - 0.5 * z + 1.0;
    match quarter {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // Published with the Random123 library (kat_vectors, philox4x32 10 rounds).
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox4x32_10(counter, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn logarithm_and_circle_agree_with_f64() {
        for k in 0..1u32 << 16 {
            let word = k << 16 | k.wrapping_mul(40_503) & 0xFFFF;
            let x = open_unit(word);
            let expected = f64::from(x).ln();
            let err = (f64::from(ln_unit(x)) - expected).abs();
            assert!(err <= 2.5e-7 * expected.abs().max(1e-6), "ln({x}) is off by {err}");
            let (sin, cos) = sin_cos_turn(word);
            let angle = std::f64::consts::TAU * f64::from(word) / 4_294_967_296.0;
            assert!((f64::from(sin) - angle.sin()).abs() <= 2e-7, "sin at {word}");
            assert!((f64::from(cos) - angle.cos()).abs() <= 2e-7, "cos at {word}");
        }
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let mut x = vec![0.0; 1 << 18];
        Philox::new(7, Stream::Noise).normal(&mut x, 3, 5);
        let n = x.len() as f64;
        let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.01, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.03 && (moment(4) - 3.0).abs() < 0.06, "{} {}", moment(3), moment(4));
        let covariance = x.windows(2).map(|p| f64::from(p[0]) * f64::from(p[1])).sum::<f64>() / n;
        assert!(covariance.abs() < 0.01, "neighbours are correlated: {covariance}");
    }

    #[test]
    fn many_numbers_are_those_of_their_blocks() {
        let rng = Philox::new(9, Stream::Init);
        let (mut normal, mut symmetric) = (vec![0.0; 200_003], vec![0.0; 200_003]);
        rng.normal(&mut normal, 5, 6);
        rng.symmetric(&mut symmetric, 0.5, 5, 6);
        for i in [0, 1, 65_535, 65_536, 65_541, 131_072, 200_002] {
            let words = rng.block(5, 6, i as u32 / 4);
            let pair = if i % 4 < 2 { box_muller(words[0], words[1]) } else { box_muller(words[2], words[3]) };
            assert_eq!(normal[i], if i % 2 == 0 { pair.0 } else { pair.1 });
            assert_eq!(symmetric[i], 0.5 * (2.0 * open_unit(words[i % 4]) - 1.0));
        }
    }

    #[test]
    fn draws_are_uniform_and_do_not_depend_on_the_order() {
        let rng = Philox::new(1, Stream::Timestep);
        let mut counts = [0u32; 10];
        for sample in 0..10_000 {
            counts[rng.below(10, 9, sample, 0) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
        assert_eq!(rng.block(1, 2, 3), Philox::new(1, Stream::Timestep).block(1, 2, 3));
        assert_ne!(rng.block(1, 2, 3), Philox::new(1, Stream::Noise).block(1, 2, 3));
        assert_ne!(rng.block(1, 2, 3), Philox::new(2, Stream::Timestep).block(1, 2, 3));
    }
}
