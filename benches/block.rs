//! One block of DiT-S/2, batch 8, in each routing: `cargo bench --bench block`. Throughput counts the FLOP of the dense
//! block, so that it shows what skipping is worth.

mod common;

use common::*;
use criterion::{Criterion, criterion_group, criterion_main};
use dtr_fused::model::block::{Block, Route};
use dtr_fused::params::Layout;
use dtr_fused::routing::{Routing, Window};

const T: usize = 256;
const C: usize = 384;

fn bench_block(c: &mut Criterion) {
    let mut layout = Layout::default();
    let block = Block::new(&mut layout, 0, C, 4 * C, 6);
    let weights: Vec<f32> = numbers(1, layout.len()).iter().map(|w| 0.05 * w).collect();
    let (x, modulation) = (numbers(2, BATCH * T * C), numbers(3, BATCH * 6 * C));
    let flops = (2 * BATCH * T * 12 * C * C + 4 * BATCH * T * T * C) as f64;
    let forward = |tape: &mut dtr_fused::autograd::Tape, x: &[f32], b: usize, routing: Routing, beta: f64| {
        let (x, modulation) =
            (tape.input(x, [b, T, C], true)?, tape.input(&modulation[..b * 6 * C], [b, 6 * C], true)?);
        let active = tape.windows(batch_windows(C, beta).into_iter().take(b));
        let all = tape.windows(vec![Window::all(C); b]);
        let written = if routing == Routing::Sublayer { active } else { all };
        block.forward(tape, x, modulation, Route { active, written })
    };
    let mut group = group(c, "block");
    for (name, routing, beta) in ROUTES {
        // The first sample alone must come out as it does in the batch (other blocks of work, other groups).
        let mut memory = Default::default();
        let mut tape = dtr_fused::autograd::Tape::inference(&weights, &mut memory);
        let y = forward(&mut tape, &x[..T * C], 1, routing, beta).expect("the shapes fit");
        let expected = tape.value(y).to_vec();
        forward_and_backward(&mut group, name, flops, &weights, &expected, |tape| {
            forward(tape, &x, BATCH, routing, beta)
        });
    }
}

criterion_group!(benches, bench_block);
criterion_main!(benches);
