//! The CPU version: the waves.

use super::FREQUENCIES;
use rayon::prelude::*;

/// Cosines, then sines, `[B, 256]`: computed in f64, so that only the last rounding is left of the error that
/// `t * frequency` in f32 makes.
pub fn waves(out: &mut [f32], t: &[u32]) {
    const HALF: usize = FREQUENCIES / 2;
    let frequencies: [f64; HALF] = std::array::from_fn(|i| (-(10_000f64.ln()) * i as f64 / HALF as f64).exp());
    out.par_chunks_exact_mut(FREQUENCIES).zip(t).for_each(|(row, &t)| {
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (f64::from(t) * frequency).sin_cos();
            row[i] = cos as f32;
            row[HALF + i] = sin as f32;
        }
    });
}
