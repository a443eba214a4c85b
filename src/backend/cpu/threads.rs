//! Threads that stay awake from one parallel loop of a step to the next.
//!
//! A step has a few hundred loops, with a few microseconds between them. A thread of rayon that finds nothing to do sleeps sooner
//! than that, and to wake it takes longer. Measured on 2 cores: a step of digits takes 4 to 5 % less time, one of DiT-S/4 3 to 5 %,
//! one of DiT-S/2 2 %.

use rayon::Yield;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Time for the other threads to come; on a busy machine those that have not come sleep between the loops as ever.
const TO_COME: Duration = Duration::from_millis(1);
/// Looks for work, some 100 ns each, after which a thread lets other processes go first.
const EAGER: usize = 2000;

/// Runs `work` on a thread of the pool, while its other threads look for parts of it without pause.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let others = rayon::current_num_threads() - 1;
    if others == 0 {
        return work();
    }
    let watch = Watch::default();
    let run = || {
        let _end = End(&watch);
        watch.gather(others);
        work()
    };
    rayon::join(run, || watch.by(others)).0
}

/// The threads that look for work.
#[derive(Default)]
struct Watch {
    /// How many there are, and [`FULL`] when no more may come.
    threads: AtomicUsize,
    ended: AtomicBool,
}

const FULL: usize = 1 << (usize::BITS - 1);

impl Watch {
    /// Waits for `others`, but not for long. After it nobody can come, and that is what makes it safe: whoever came has nothing
    /// else to do, but a thread that waits in the middle of `work` for a part of it might come too, and would stay to its end.
    fn gather(&self, others: usize) {
        let start = Instant::now();
        while self.threads.load(SeqCst) < others && start.elapsed() < TO_COME {
            std::hint::spin_loop();
        }
        self.threads.fetch_or(FULL, SeqCst);
    }

    /// Keeps this thread, and wakes `others - 1` more.
    fn by(&self, others: usize) {
        if others > 1 {
            rayon::join(|| self.keep(), || self.by(others - 1));
        } else {
            self.keep();
        }
    }

    fn keep(&self) {
        let come = |threads| (threads & FULL == 0).then_some(threads + 1);
        if self.threads.fetch_update(SeqCst, SeqCst, come).is_err() {
            return;
        }
        let mut idle = 0;
        while !self.ended.load(SeqCst) {
            if rayon::yield_now() == Some(Yield::Executed) {
                idle = 0;
            } else if idle < EAGER {
                idle += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Ends the watch, be it in a panic.
struct End<'a>(&'a Watch);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;
    use std::panic::AssertUnwindSafe;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    fn sum(n: u32) -> u32 {
        (0..n).into_par_iter().with_max_len(1).map(std::hint::black_box).sum()
    }

    #[test]
    fn work_is_done_by_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            pool(threads).install(|| {
                for n in 0..100 {
                    assert_eq!(awake(|| sum(n) + awake(|| sum(n))), n * n.saturating_sub(1), "{threads} threads");
                }
            });
        }
    }

    /// Every thread of a pool does this at once, and others send work from outside: none is left for the watch.
    #[test]
    fn many_at_once_do_not_wait_for_each_other_for_ever() {
        let pool = pool(2);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    pool.install(|| (0..50).for_each(|n| assert_eq!(awake(|| sum(n)), n * n.saturating_sub(1) / 2)))
                });
            }
        });
    }

    #[test]
    fn a_panic_ends_the_watch() {
        let pool = pool(3);
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            pool.install(|| awake(|| assert_eq!(sum(10), 0, "on purpose")));
        }));
        assert!(result.is_err());
        assert_eq!(pool.install(|| awake(|| sum(10))), 45);
    }
}
