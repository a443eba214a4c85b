//! Scratch memory of a thread, kept from task to task so that a steady-state step allocates nothing.

use std::cell::RefCell;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of a cache line.
const LINE: usize = 16;

/// Calls `work` with `len` numbers of scratch memory that start at a cache line (their contents are arbitrary; NaN in debug
/// builds).
///
/// Calls may nest: each level has its own buffer.
pub fn with<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let needed = len + LINE;
    let mut buffer = FREE
        .with_borrow_mut(|free| {
            // The smallest that is large enough; else the largest grows.
            let fits = (0..free.len()).filter(|&i| free[i].len() >= needed).min_by_key(|&i| free[i].len());
            let best = fits.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()))?;
            Some(free.swap_remove(best))
        })
        .unwrap_or_default();
    if buffer.len() < needed {
        // Nothing of the old contents is kept, so nothing need be copied.
        buffer = vec![0.0; needed];
    }
    let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>());
    let aligned = &mut buffer[start..start + len];
    if cfg!(debug_assertions) {
        aligned.fill(f32::NAN);
    }
    let result = work(aligned);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}
