//! Scratch memory of a thread, kept from task to task so that a steady-state step allocates nothing.

use super::aligned::AlignedVec;
use std::cell::RefCell;

thread_local! {
    static FREE: RefCell<Vec<AlignedVec>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` numbers of scratch memory that start at a cache line (their contents are arbitrary; NaN in debug
/// builds).
///
/// Calls may nest: each level has its own buffer.
pub fn with<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FREE
        .with_borrow_mut(|free| {
            // The smallest that is large enough; else the largest grows.
            let fits = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
            let best = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()))?;
            Some(free.swap_remove(best))
        })
        .unwrap_or_default();
    if buffer.len() < len {
        // Nothing of the old contents is kept, so nothing need be copied.
        buffer = AlignedVec::zeros(len);
    }
    let numbers = &mut buffer[..len];
    if cfg!(debug_assertions) {
        numbers.fill(f32::NAN);
    }
    let result = work(numbers);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

/// The sum of `count` numbers in their order, which are 0 before `work`.
pub fn sum(count: usize, work: impl FnOnce(&mut [f64])) -> f64 {
    if count == 0 {
        // An empty buffer need not start where an f64 may.
        work(&mut []);
        return 0.0;
    }
    with(2 * count, |buffer| {
        let sums: &mut [f64] = bytemuck::cast_slice_mut(buffer);
        sums.fill(0.0);
        work(sums);
        sums.iter().sum()
    })
}
