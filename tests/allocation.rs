//! A steady-state training step allocates nothing but what the matrix products of the `gemm` crate pack into.
//!
//! `gemm` makes its packing buffers anew in every product and takes none from outside. What it allocates is recognised by
//! its kind (alignment, and whether zeros were asked for), learnt from bare products; a step may allocate these kinds only.

use dtr_fused::backend::cpu::gemm::{Mat, MatMut, Write, matmul};
use dtr_fused::diffusion::{LossWeight, Schedule, ScheduleKind};
use dtr_fused::model::config::ModelConfig;
use dtr_fused::model::dit::Dit;
use dtr_fused::routing::Routing;
use dtr_fused::train::learner::{Batch, Learner, Losses};
use dtr_fused::train::optimizer::Update;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// The system's allocator with a count of each kind of allocation.
struct Counting;

/// Number of kinds: base-2 logarithm of the alignment, twice (as it comes, zeroed), and reallocation.
const KINDS: usize = 40;
static ON: AtomicBool = AtomicBool::new(false);
static COUNTS: [AtomicUsize; KINDS] = [const { AtomicUsize::new(0) }; KINDS];
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn note(layout: Layout, size: usize, kind: usize) {
    if ON.load(SeqCst) {
        let kind = (layout.align().ilog2() as usize).min(KINDS / 3 - 1) * 3 + kind;
        COUNTS[kind].fetch_add(1, SeqCst);
        BYTES.fetch_add(size, SeqCst);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came; counting touches atomics only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout, layout.size(), 0);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout, layout.size(), 1);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(layout, size, 2);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations during `work`, by kind, and their bytes.
fn count(work: impl FnOnce()) -> ([usize; KINDS], usize) {
    COUNTS.iter().for_each(|count| count.store(0, SeqCst));
    BYTES.store(0, SeqCst);
    ON.store(true, SeqCst);
    work();
    ON.store(false, SeqCst);
    (std::array::from_fn(|kind| COUNTS[kind].load(SeqCst)), BYTES.load(SeqCst))
}

/// The kinds of allocation that bare products make.
fn kinds_of_gemm() -> [bool; KINDS] {
    let mut kinds = [false; KINDS];
    for (m, k, n) in [(1, 60, 60), (64, 60, 60), (150, 60, 180), (600, 180, 60), (60, 600, 128), (7, 3, 5)] {
        let (a, bt, b) = (vec![0.5; m * k], vec![0.5; n * k], vec![0.5; k * n]);
        let mut c = vec![0.0; m * n];
        for transposed in [false, true] {
            let mut product = || {
                let b = if transposed { Mat::new(&bt, n, k, k).t() } else { Mat::new(&b, k, n, n) };
                matmul(MatMut::new(&mut c, m, n, n), Mat::new(&a, m, k, k), b, Write::Set);
            };
            product();
            let (counts, _) = count(product);
            kinds.iter_mut().zip(counts).for_each(|(kind, count)| *kind |= count > 0);
        }
    }
    kinds
}

fn learner(routing: Routing) -> Learner {
    let dit = Dit::new(ModelConfig {
        hidden_size: 60,
        depth: 2,
        num_heads: 3,
        patch_size: 2,
        input_size: 10,
        in_channels: 3,
        num_classes: 5,
        null_class: true,
        mlp_ratio: 4.0,
        learn_sigma: true,
        routing,
        beta: 0.6,
        alpha: 4.0,
        routing_seed: 3,
    })
    .unwrap();
    let weights = dit.init(1, dtr_fused::model::dit::Init::Small);
    Learner::new(dit, Schedule::new(ScheduleKind::Linear, 1000).unwrap(), LossWeight::Constant, weights)
}

/// One training step over 6 images in two parts.
fn step(learner: &mut Learner, losses: &mut Losses) {
    let images = [0.25; 3 * 300];
    for (t, add) in [([0, 999, 500], false), ([3, 970, 860], true)] {
        let batch =
            Batch { x_start: &images, noise: &images, t: &t, labels: &[4, 5, 0], coefficients: &[1.0 / 6.0; 3] };
        learner.gradients(batch, add, losses).unwrap();
    }
    let norm = learner.gradient_norm();
    assert!(norm.is_finite() && norm > 0.0);
    let update = Update {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        ema_decay: 0.99,
        number: 1,
        grad_scale: 1.0,
    };
    learner.update(update, 0.0);
}

/// One test: the count is of the whole process.
#[test]
fn a_steady_state_step_allocates_nothing_of_ours() {
    let gemm = kinds_of_gemm();
    let ours =
        |counts: [usize; KINDS]| -> usize { counts.iter().zip(gemm).filter(|(_, gemm)| !gemm).map(|(n, _)| n).sum() };
    // The count sees what this crate would do wrong.
    let (counts, bytes) = count(|| drop(std::hint::black_box(vec![1.0f32; 1000])));
    assert!(ours(counts) == 1 && bytes == 4000, "{counts:?}");

    for routing in [Routing::Dense, Routing::Paper, Routing::Sublayer, Routing::Random] {
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut learner, mut losses) = (learner(routing), Losses::default());
            let mut found = Vec::new();
            let mut total = (0, 0);
            pool.install(|| {
                step(&mut learner, &mut losses);
                step(&mut learner, &mut losses);
                // Which thread meets its largest block when is chance; one thread has met it by now.
                for _ in 0..if threads == 1 { 1 } else { 20 } {
                    let held = learner.memory.bytes();
                    let (counts, bytes) = count(|| step(&mut learner, &mut losses));
                    assert_eq!(learner.memory.bytes(), held, "{routing:?}: the tape's buffers grew");
                    found.push(ours(counts));
                    total = (counts.iter().sum(), bytes);
                }
            });
            println!(
                "{routing:?}, {threads} threads: {} allocations ({} bytes) of gemm, {found:?} of ours",
                total.0 - found.last().unwrap(),
                total.1
            );
            assert_eq!(found.last(), Some(&0), "{routing:?} with {threads} threads: allocations by step {found:?}");
        }
    }
}
