//! A steady-state training step allocates nothing.

use dtr_fused::backend::cpu::has_bf16;
use dtr_fused::backend::cuda::DType;
use dtr_fused::diffusion::{LossWeight, Schedule, ScheduleKind};
use dtr_fused::model::config::ModelConfig;
use dtr_fused::model::dit::Dit;
use dtr_fused::routing::Routing;
use dtr_fused::train::learner::{Batch, Learner, Losses};
use dtr_fused::train::optimizer::Update;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// The system's allocator with a count of allocations.
struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

fn note(size: usize) {
    if ON.load(SeqCst) {
        COUNT.fetch_add(1, SeqCst);
        BYTES.fetch_add(size, SeqCst);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came; counting touches atomics only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
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

/// Allocations during `work`, and their bytes.
fn count(work: impl FnOnce()) -> (usize, usize) {
    COUNT.store(0, SeqCst);
    BYTES.store(0, SeqCst);
    ON.store(true, SeqCst);
    work();
    ON.store(false, SeqCst);
    (COUNT.load(SeqCst), BYTES.load(SeqCst))
}

fn learner(routing: Routing, hidden_size: usize, input_size: usize, beta: f64) -> Learner {
    let dit = Dit::new(ModelConfig {
        hidden_size,
        depth: 2,
        num_heads: 3,
        patch_size: 2,
        input_size,
        in_channels: 3,
        num_classes: 5,
        null_class: true,
        mlp_ratio: 4.0,
        learn_sigma: true,
        routing,
        beta,
        alpha: 4.0,
        routing_seed: 3,
    })
    .unwrap();
    let weights = dit.init(1, dtr_fused::model::dit::Init::Small);
    Learner::new(dit, Schedule::new(ScheduleKind::Linear, 1000).unwrap(), LossWeight::Constant, weights)
}

/// One training step over 35 images in three parts, of which two are computed in halves.
fn step(learner: &mut Learner, losses: &mut Losses) {
    for (t, add) in [
        (&[0, 999, 500, 7, 320, 11, 801, 90, 2, 67, 640, 33, 760, 4, 512, 100][..], false),
        (&[700; 16], true),
        (&[3, 970, 860], true),
    ] {
        let images = &[0.25; 6912][..t.len() * 3 * learner.dit.config.input_size.pow(2)];
        let (labels, coefficients) =
            (&[4, 5, 0, 1, 2, 3, 4, 5, 1, 1, 1, 2, 3, 4, 5, 0][..t.len()], &[1.0 / 35.0; 16][..t.len()]);
        let batch = Batch { x_start: images, noise: images, t, labels, coefficients };
        learner.gradients(batch, add, losses).unwrap();
        let norm = learner.gradient_norm();
        assert!(norm.is_finite() && norm > 0.0);
    }
    let update =
        Update { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, ema_decay: 0.99, grad_scale: 1.0 };
    learner.update(update, 0.0);
}

/// Whether the last `steps` steps made no allocation.
fn ends_with_nothing(found: &[(usize, usize)], steps: usize) -> bool {
    found.len() >= steps && found[found.len() - steps..].iter().all(|&step| step == (0, 0))
}

/// One test: the count is of the whole process. Arrays of 2 MB or more would not be seen, since they are mapped; this model has
/// none, and that buffers do not grow is asked of the tape itself.
#[test]
fn a_steady_state_step_allocates_nothing() {
    // The count sees what a step would do wrong. (The harness, on a thread of its own, may allocate meanwhile.)
    let (count_of_one, bytes) = count(|| drop(std::hint::black_box(vec![1.0f32; 1000])));
    assert!(count_of_one >= 1 && bytes >= 4000, "{count_of_one} allocations of {bytes} bytes");

    // The pools stay until the end: the threads of one that is dropped end beside the next one's steps, and allocate as they do.
    let pools = [1, 2].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    // Samples of 16 tokens and heads of 16 channels, of which few are inactive, and of 25, of which many are.
    let cases = [Routing::Dense, Routing::Paper, Routing::Sublayer, Routing::Random]
        .into_iter()
        .flat_map(|routing| [(routing, 48, 8, 0.6, DType::F32), (routing, 60, 10, 0.4, DType::F32)])
        // Of 36 tokens: attention is in bf16 too. (Without AMX, steps in bf16 would take seconds.)
        .chain(has_bf16().then_some((Routing::Sublayer, 48, 12, 0.6, DType::Bf16)));
    for (routing, hidden_size, input_size, beta, elem) in cases {
        for pool in &pools {
            let threads = pool.current_num_threads();
            let mut learner = learner(routing, hidden_size, input_size, beta).with_products_in(elem);
            let mut losses = Losses::default();
            let mut found = Vec::new();
            pool.install(|| {
                step(&mut learner, &mut losses);
                step(&mut learner, &mut losses);
                // Which of two threads meets its largest block when is chance, so a step may still grow that thread's scratch
                // memory, a few times. One thread has met it by now.
                let (most, at_rest) = if threads == 1 { (1, 1) } else { (300, 20) };
                while found.len() < most && !ends_with_nothing(&found, at_rest) {
                    let held = learner.memory().bytes();
                    found.push(count(|| step(&mut learner, &mut losses)));
                    assert_eq!(learner.memory().bytes(), held, "{routing:?}: the tape's buffers grew");
                }
                let what = format!(
                    "{routing:?}, beta {beta}, {elem:?}, {threads} threads: allocations, bytes by step {found:?}"
                );
                assert!(ends_with_nothing(&found, at_rest), "{what}");
            });
        }
    }
}
