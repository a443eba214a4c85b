//! Where the time of a step goes: operations note their time and work here while a profile is being made.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Whether anybody wants to know.
static ON: AtomicBool = AtomicBool::new(false);

thread_local! {
    static ENTRIES: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
}

/// The direction of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// Outputs from inputs.
    Forward,
    /// Gradients of inputs and weights.
    Backward,
    /// New weights.
    Update,
}

/// All calls of one operation with the same sizes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Entry {
    /// The operation.
    pub operation: &'static str,
    /// Which way.
    pub pass: Pass,
    /// Inputs and outputs of its weight, or channels and heads.
    pub sizes: [usize; 2],
    /// Number of calls.
    pub calls: usize,
    /// Seconds in all of them.
    pub seconds: f64,
    /// Floating-point operations of their products.
    pub flops: f64,
    /// Bytes of operands and results, each counted once.
    pub bytes: f64,
}

/// Notes the time from its making to its end.
pub struct Span(Option<(Entry, Instant)>);

/// Starts to time an operation that does `flops` operations in products on `numbers` numbers. Nothing without a profile.
#[inline]
pub fn span(operation: &'static str, pass: Pass, sizes: [usize; 2], flops: usize, numbers: usize) -> Span {
    if !ON.load(Ordering::Relaxed) {
        return Span(None);
    }
    let bytes = (numbers * size_of::<f32>()) as f64;
    let entry = Entry { operation, pass, sizes, calls: 1, seconds: 0.0, flops: flops as f64, bytes };
    Span(Some((entry, Instant::now())))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((mut entry, start)) = self.0.take() else { return };
        entry.seconds = start.elapsed().as_secs_f64();
        note(entry);
    }
}

/// Adds to the entry of its kind.
fn note(entry: Entry) {
    ENTRIES.with_borrow_mut(|entries| {
        let same = |e: &&mut Entry| (e.operation, e.pass, e.sizes) == (entry.operation, entry.pass, entry.sizes);
        match entries.iter_mut().find(same) {
            Some(all) => {
                all.calls += entry.calls;
                all.seconds += entry.seconds;
                all.flops += entry.flops;
                all.bytes += entry.bytes;
            }
            None => entries.push(entry),
        }
    });
}

/// Calls both, side by side if threads are free. Their operations share the seconds that pass meanwhile, in proportion to the time that
/// each takes.
pub fn side_by_side<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    if !ON.load(Ordering::Relaxed) {
        return rayon::join(a, b);
    }
    let start = Instant::now();
    let ((a, of_a), (b, of_b)) = rayon::join(|| apart(a), || apart(b));
    let share = start.elapsed().as_secs_f64() / (of_a.seconds + of_b.seconds);
    for entry in of_a.entries.into_iter().chain(of_b.entries) {
        note(Entry { seconds: entry.seconds * share, ..entry });
    }
    (a, b)
}

/// What work noted, and how long it took.
struct Noted {
    entries: Vec<Entry>,
    seconds: f64,
}

/// Keeps what `work` notes out of the entries of this thread.
fn apart<R>(work: impl FnOnce() -> R) -> (R, Noted) {
    let others = ENTRIES.take();
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f64();
    (result, Noted { entries: ENTRIES.replace(others), seconds })
}

/// Runs `work` and returns what its operations noted, in the order of their first calls. Only those called from this
/// thread are seen (they may use others), and those inside of [`side_by_side`]: call it on a thread of the pool, where passes stay.
pub fn profile<R>(work: impl FnOnce() -> R) -> (R, Vec<Entry>) {
    ENTRIES.with_borrow_mut(Vec::clear);
    ON.store(true, Ordering::Relaxed);
    let result = work();
    ON.store(false, Ordering::Relaxed);
    (result, ENTRIES.with_borrow_mut(std::mem::take))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// One profile at a time: the end of one would be that of the other.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn calls_of_one_kind_are_summed_and_others_kept_apart() {
        let _alone = ALONE.lock();
        drop(span("a", Pass::Forward, [1, 2], 10, 1));
        let ((), entries) = profile(|| {
            for pass in [Pass::Forward, Pass::Forward, Pass::Backward] {
                drop(span("a", pass, [1, 2], 10, 1));
            }
        });
        let found: Vec<_> = entries.iter().map(|e| (e.pass, e.calls, e.flops, e.bytes)).collect();
        assert_eq!(found, [(Pass::Forward, 2, 20.0, 8.0), (Pass::Backward, 1, 10.0, 4.0)]);
    }

    #[test]
    fn what_is_side_by_side_shares_the_time_that_passes() {
        use std::time::Duration;
        let _alone = ALONE.lock();
        let work = |operation| {
            let _span = span(operation, Pass::Forward, [1, 1], 5, 1);
            std::thread::sleep(Duration::from_millis(20));
        };
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (elapsed, entries) = pool.install(|| {
                profile(|| {
                    drop(span("before", Pass::Forward, [1, 1], 0, 0));
                    let start = Instant::now();
                    let results = side_by_side(
                        || {
                            work("both");
                            work("one");
                            1
                        },
                        || {
                            work("both");
                            "two"
                        },
                    );
                    assert_eq!(results, (1, "two"));
                    start.elapsed().as_secs_f64()
                })
            });
            let found: Vec<_> = entries.iter().map(|e| (e.operation, e.calls, e.flops)).collect();
            assert_eq!(found, [("before", 1, 0.0), ("both", 2, 10.0), ("one", 1, 5.0)]);
            let seconds: f64 = entries[1..].iter().map(|e| e.seconds).sum();
            assert!(seconds <= elapsed && seconds >= 0.5 * elapsed, "{seconds} of {elapsed} s with {threads} threads");
        }
    }
}
