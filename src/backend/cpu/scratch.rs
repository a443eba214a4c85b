//! Scratch memory of a thread, kept from task to task so that a steady-state step allocates nothing.

use std::cell::RefCell;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` numbers of scratch memory (their contents are arbitrary; NaN in debug builds).
///
/// Calls may nest: each level has its own buffer.
pub fn with<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    if cfg!(debug_assertions) {
        buffer[..len].fill(f32::NAN);
    }
    let result = work(&mut buffer[..len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}
