//! The CPU: products (`tile` has their kernels, `pack` and `split` lay operands out for them, `packed` chooses between the two, `linear`
//! has the layers without windows), vectorised loops (`simd`), memory of whole cache lines (`aligned`), of a thread (`scratch`) and of
//! which threads write parts (`shared`), threads between loops (`threads`), and where the time goes (`profile`).

pub mod aligned;
pub(crate) mod linear;
pub(crate) mod pack;
pub(crate) mod packed;
pub(crate) mod profile;
pub(crate) mod scratch;
pub(crate) mod shared;
pub(crate) mod simd;
pub(crate) mod split;
pub(crate) mod threads;
pub(crate) mod tile;

/// Whether products in bf16 take less time than those in f32: with AMX, unless `DTR_CPU` leaves it out.
pub fn has_bf16() -> bool {
    simd::level() == simd::Level::Amx
}

/// Numbers around 0, with no pattern, for tests: `n` of those of a seed.
#[cfg(test)]
pub(crate) fn numbers(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + 7919 * seed) * 2_654_435_761 % 1009) as f32 - 504.3) / 250.0).collect()
}
