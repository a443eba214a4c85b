//! Every operation at the sizes of DiT-S/2, batch 8: `cargo bench --bench ops`. Throughput is FLOP/s of the work done.

mod common;

use common::*;
use criterion::{Criterion, criterion_group, criterion_main};
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::PerSample;
use dtr_fused::ops::attention::{self, attention};
use dtr_fused::ops::channel_mask::{self, Keep, channel_mask};
use dtr_fused::ops::label_embed::{self, label_embed};
use dtr_fused::ops::linear_residual::{self, Residual, linear_residual};
use dtr_fused::ops::ln_linear::{self, Activation, ln_linear, ln_linear_gelu};
use dtr_fused::ops::modulation::{self, modulation};
use dtr_fused::ops::patch_embed::{self, patch_embed};
use dtr_fused::ops::timestep_embed::{self, timestep_embed};
use dtr_fused::ops::unpatchify::{self, unpatchify};
use dtr_fused::params::{Linear, Param};
use dtr_fused::routing::{Window, random_masks};

const T: usize = 256;
const C: usize = 384;
const MLP: usize = 4 * C;
const HEADS: usize = 6;
const DEPTH: usize = 12;
/// Rows that are compared with the reference before timing.
const ROWS: usize = 3;

fn linear(outputs: usize, inputs: usize, offset: usize) -> Linear {
    let weight = Param { offset, len: outputs * inputs };
    Linear { weight, bias: Param { offset: offset + weight.len, len: outputs }, inputs, outputs }
}

/// Weights of a linear layer that keep numbers near 1.
fn linear_weights(outputs: usize, inputs: usize) -> Vec<f32> {
    let factor = 1.0 / (inputs as f32).sqrt();
    numbers(1, outputs * inputs + outputs).iter().map(|w| w * factor).collect()
}

fn input<const N: usize>(tape: &mut Tape, data: &[f32], shape: [usize; N]) -> Result<Var> {
    tape.input(data, shape, true)
}

fn width(read: &[Window]) -> f64 {
    read.iter().map(|w| w.width as f64).sum()
}

fn bench_ln_linear(c: &mut Criterion) {
    let mut group = group(c, "ln_linear");
    let (x, modulation) = (numbers(2, BATCH * T * C), numbers(3, BATCH * 2 * C));
    // In main memory the GELU of fc1 is computed where fc2 reads it: `bench_mlp` has it.
    for (layer, n) in [("qkv", 3 * C), ("fc1", MLP)] {
        let weights = linear_weights(n, C);
        for beta in [1.0, 0.8, 0.5] {
            let windows = batch_windows(C, beta);
            let expected = ln_linear::reference::forward(&ln_linear::reference::Inputs {
                x: &x[..ROWS * C],
                read: &windows[..1],
                shift: &modulation[..C],
                scale: &modulation[C..2 * C],
                weight: &weights[..n * C],
                bias: &weights[n * C..],
                activation: Activation::None,
                tokens: ROWS,
                channels: C,
            });
            let flops = 2.0 * T as f64 * n as f64 * width(&windows);
            forward_and_backward(&mut group, &format!("{layer} {beta}"), flops, &weights, &expected, |tape| {
                let (x, var) = (input(tape, &x, [BATCH, T, C])?, input(tape, &modulation, [BATCH, 2 * C])?);
                let read = tape.windows(windows.iter().copied());
                let [shift, scale] = [0, C].map(|offset| PerSample { var, offset });
                ln_linear(tape, x, read, shift, scale, linear(n, C, 0), Activation::None)
            });
        }
    }
}

fn bench_attention(c: &mut Criterion) {
    let mut group = group(c, "attention");
    let qkv = numbers(2, BATCH * T * 3 * C);
    let dims = attention::Dims { b: 1, t: T, c: C, heads: HEADS };
    let expected = attention::reference::forward(&qkv[..T * 3 * C], dims);
    // Backward is five products of this size, forward two: its throughput counts four.
    let flops = (BATCH * T * T * C) as f64 * 4.0;
    forward_and_backward(&mut group, "all", flops, &[], &expected, |tape| {
        let qkv = input(tape, &qkv, [BATCH, T, 3 * C])?;
        attention(tape, qkv, HEADS)
    });
}

fn bench_linear_residual(c: &mut Criterion) {
    let mut group = group(c, "linear_residual");
    let (base, gate) = (numbers(2, BATCH * T * C), numbers(3, BATCH * C));
    for (layer, k) in [("proj", C), ("fc2", MLP)] {
        let (a, weights) = (numbers(4, BATCH * T * k), linear_weights(C, k));
        for beta in [1.0, 0.8, 0.5] {
            let windows = batch_windows(C, beta);
            let expected = linear_residual::reference::forward(&linear_residual::reference::Inputs {
                a: &a[..ROWS * k],
                weight: &weights[..C * k],
                bias: &weights[C * k..],
                gate: &gate[..C],
                base: &base[..ROWS * C],
                base_window: &windows[..1],
                bypass: Some((&base[..ROWS * C], &windows[..1])),
                write: &windows[..1],
                tokens: ROWS,
            });
            let flops = 2.0 * T as f64 * k as f64 * width(&windows);
            forward_and_backward(&mut group, &format!("{layer} {beta}"), flops, &weights, &expected, |tape| {
                let (a, base) = (input(tape, &a, [BATCH, T, k])?, input(tape, &base, [BATCH, T, C])?);
                let var = input(tape, &gate, [BATCH, C])?;
                let write = tape.windows(windows.iter().copied());
                let residual = Residual { base, base_window: write, bypass: Some((base, write)) };
                linear_residual(tape, a, linear(C, k, 0), PerSample { var, offset: 0 }, residual, write)
            });
        }
    }
}

/// fc1, GELU and fc2.
fn bench_mlp(c: &mut Criterion) {
    let mut group = group(c, "mlp");
    let (x, base) = (numbers(2, BATCH * T * C), numbers(3, BATCH * T * C));
    let (modulation, gate) = (numbers(4, BATCH * 2 * C), numbers(5, BATCH * C));
    let weights = [linear_weights(MLP, C), linear_weights(C, MLP)].concat();
    let (first, second) = weights.split_at(MLP * (C + 1));
    let (fc1, fc2) = (linear(MLP, C, 0), linear(C, MLP, first.len()));
    for beta in [1.0, 0.8, 0.5] {
        let windows = batch_windows(C, beta);
        let hidden = ln_linear::reference::forward(&ln_linear::reference::Inputs {
            x: &x[..ROWS * C],
            read: &windows[..1],
            shift: &modulation[..C],
            scale: &modulation[C..2 * C],
            weight: &first[..MLP * C],
            bias: &first[MLP * C..],
            activation: Activation::Gelu,
            tokens: ROWS,
            channels: C,
        });
        let expected = linear_residual::reference::forward(&linear_residual::reference::Inputs {
            a: &hidden,
            weight: &second[..C * MLP],
            bias: &second[C * MLP..],
            gate: &gate[..C],
            base: &base[..ROWS * C],
            base_window: &windows[..1],
            bypass: Some((&base[..ROWS * C], &windows[..1])),
            write: &windows[..1],
            tokens: ROWS,
        });
        let flops = 4.0 * T as f64 * MLP as f64 * width(&windows);
        forward_and_backward(&mut group, &beta.to_string(), flops, &weights, &expected, |tape| {
            let (x, base) = (input(tape, &x, [BATCH, T, C])?, input(tape, &base, [BATCH, T, C])?);
            let (of_ln, gate) = (input(tape, &modulation, [BATCH, 2 * C])?, input(tape, &gate, [BATCH, C])?);
            let window = tape.windows(windows.iter().copied());
            let [shift, scale] = [0, C].map(|offset| PerSample { var: of_ln, offset });
            let hidden = ln_linear_gelu(tape, x, window, shift, scale, fc1)?;
            let residual = Residual { base, base_window: window, bypass: Some((base, window)) };
            linear_residual(tape, hidden, fc2, PerSample { var: gate, offset: 0 }, residual, window)
        });
    }
}

fn bench_patch_embed(c: &mut Criterion) {
    let mut group = group(c, "patch_embed");
    let (k, x, positions) = (16, numbers(2, BATCH * 4 * 32 * 32), numbers(3, T * C));
    let weights = linear_weights(C, k);
    let dims = patch_embed::Dims { batch: 1, image_channels: 4, height: 32, width: 32, patch: 2 };
    let expected = patch_embed::reference::forward(&x[..4096], &weights[..C * k], &weights[C * k..], &positions, dims);
    let flops = (2 * BATCH * T * C * k) as f64;
    forward_and_backward(&mut group, "all", flops, &weights, &expected, |tape| {
        let x = tape.input(&x, [BATCH, 4, 32, 32], false)?;
        patch_embed(tape, x, linear(C, k, 0), &positions, 2)
    });
}

fn bench_timestep_embed(c: &mut Criterion) {
    let mut group = group(c, "timestep_embed");
    let weights = [linear_weights(C, 256), linear_weights(C, C)].concat();
    let (first, second) = (linear(C, 256, 0), linear(C, C, C * 257));
    let expected = timestep_embed::reference::forward(
        &TIMESTEPS,
        &timestep_embed::reference::Weights {
            w0: &weights[first.weight.range()],
            b0: &weights[first.bias.range()],
            w2: &weights[second.weight.range()],
            b2: &weights[second.bias.range()],
        },
    );
    let flops = (2 * BATCH * C * (256 + C)) as f64;
    forward_and_backward(&mut group, "all", flops, &weights, &expected, |tape| {
        Ok(timestep_embed(tape, &TIMESTEPS, first, second)?.0)
    });
}

fn bench_label_embed(c: &mut Criterion) {
    let mut group = group(c, "label_embed");
    let (base, table) = (numbers(2, BATCH * C), numbers(3, 1001 * C));
    let labels = [1000, 3, 999, 0, 3, 512, 77, 1000];
    let expected = label_embed::reference::forward(&base, &table, &labels);
    forward_and_backward(&mut group, "all", 0.0, &table, &expected, |tape| {
        let base = input(tape, &base, [BATCH, C])?;
        label_embed(tape, base, Param { offset: 0, len: 1001 * C }, &labels)
    });
}

fn bench_modulation(c: &mut Criterion) {
    let mut group = group(c, "modulation");
    let m = 6 * C * DEPTH + 2 * C;
    let (condition, weights) = (numbers(2, BATCH * C), linear_weights(m, C));
    let expected = modulation::reference::forward(&condition[..C], &weights[..m * C], &weights[m * C..]);
    let flops = (2 * BATCH * C * m) as f64;
    forward_and_backward(&mut group, "all", flops, &weights, &expected, |tape| {
        let condition = input(tape, &condition, [BATCH, C])?;
        modulation(tape, condition, linear(m, C, 0))
    });
}

fn bench_unpatchify(c: &mut Criterion) {
    let mut group = group(c, "unpatchify");
    let x = numbers(2, BATCH * T * 32);
    let expected = unpatchify::reference::forward(&x, BATCH, 8, 32, 32, 2);
    forward_and_backward(&mut group, "all", 0.0, &[], &expected, |tape| {
        let x = input(tape, &x, [BATCH, T, 32])?;
        unpatchify(tape, x, 8, 32, 32, 2)
    });
}

fn bench_channel_mask(c: &mut Criterion) {
    let mut group = group(c, "channel_mask");
    let x = numbers(2, BATCH * T * C);
    let mask = random_masks(BATCH, C, 0.8, 0, 0).expect("a share in (0, 1]");
    let expected = channel_mask::reference::forward(Some(&x), &x, &mask, T, C, Keep::Inactive);
    forward_and_backward(&mut group, "all", 0.0, &[], &expected, |tape| {
        let (x, mask) = (input(tape, &x, [BATCH, T, C])?, tape.input(&mask, [BATCH, C], false)?);
        channel_mask(tape, Some(x), x, mask, Keep::Inactive)
    });
}

criterion_group!(
    benches,
    bench_ln_linear,
    bench_attention,
    bench_linear_residual,
    bench_mlp,
    bench_patch_embed,
    bench_timestep_embed,
    bench_label_embed,
    bench_modulation,
    bench_unpatchify,
    bench_channel_mask
);
criterion_main!(benches);
