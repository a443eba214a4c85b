//! `ln_linear` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::{Buffer, DType};
use dtr_fused::error::Result;
use dtr_fused::ops::PerSample;
use dtr_fused::ops::channel_mask::{Keep, channel_mask};
use dtr_fused::ops::ln_linear::cuda::Scratch;
use dtr_fused::ops::ln_linear::{self, Activation, ln_linear, reference};
use dtr_fused::ops::real::Real;
use dtr_fused::params::Linear;
use dtr_fused::routing::Window;

struct Case {
    tokens: usize,
    channels: usize,
    outputs: usize,
    read: Vec<Window>,
    activation: Activation,
    mean: f32,
}

impl Case {
    fn plain<'a, R>(&'a self, inputs: &'a [Vec<R>]) -> reference::Inputs<'a, R> {
        let [x, shift, scale, weight, bias] = inputs else { panic!("five inputs") };
        let &Case { tokens, channels, activation, ref read, .. } = self;
        reference::Inputs { x, read, shift, scale, weight, bias, activation, tokens, channels }
    }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let (b, c, n) = (self.read.len(), self.channels, self.outputs);
        let mut x = activation("x", [b, self.tokens, c]);
        x.data.iter_mut().for_each(|x| *x += self.mean);
        vec![x, per_sample("shift", b, c), per_sample("scale", b, c), weight("weight", n * c, c), weight("bias", n, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        let read = tape.windows(self.read.iter().copied());
        let (shift, scale) = (given.per_sample("shift"), given.per_sample("scale"));
        ln_linear(tape, given.var("x"), read, shift, scale, given.linear("weight", "bias"), self.activation)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&self.plain(inputs))
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let g = reference::backward(&self.plain(inputs), upstream);
        vec![g.dx, g.dshift, g.dscale, g.dweight, g.dbias]
    }
}

/// Every set of windows of a shape, without activation and with GELU.
fn every_window(b: usize, tokens: usize, channels: usize, outputs: usize, mean: f32) {
    for (name, read) in window_sets(b, channels) {
        for activation in [Activation::None, Activation::Gelu] {
            let label = format!("B {b}, T {tokens}, C {channels}, N {outputs}, {name}, {activation:?}, mean {mean}");
            check_operation(&label, &Case { tokens, channels, outputs, read: read.clone(), activation, mean });
        }
    }
}

#[test]
fn one_sample_of_one_token() {
    every_window(1, 1, 60, 37, 0.0);
}

#[test]
fn few_tokens() {
    every_window(5, 7, 60, 45, 0.0);
}

#[test]
fn many_small_samples_share_products() {
    every_window(23, 16, 100, 70, 0.0);
    every_window(11, 6, 60, 45, 0.0);
    every_window(5, 14, 67, 33, 0.0);
}

/// Few inactive channels, in windows that differ from sample to sample; some are full.
#[test]
fn few_inactive_channels() {
    let window = |i: usize| {
        let width = 60 - 13 * i % 32;
        Window { start: 7 * i % (61 - width), width }
    };
    for (b, tokens, mean) in [(7, 6, 0.0), (5, 16, 1000.0), (3, 12, 0.0), (3, 40, 1000.0)] {
        let read = (0..b).map(window).collect();
        let case = Case { tokens, channels: 60, outputs: 37, read, activation: Activation::None, mean };
        check_operation(&format!("B {b}, T {tokens}, mean {mean}"), &case);
    }
}

#[test]
fn inactive_channels_are_not_read() {
    let (b, t, c, n) = (4, 16, 60, 21);
    let weights = numbers(1, n * c + n);
    for width in [20, 50] {
        let window = |sample: usize| Window { start: 3 * sample, width };
        let pass = |outside: f32| {
            let mut x = numbers(2, b * t * c);
            for (row, x) in x.chunks_exact_mut(c).enumerate() {
                let window = window(row / t);
                x[..window.start].fill(outside);
                x[window.end()..].fill(outside);
            }
            let (mut grads, mut memory) = (vec![0.0; weights.len()], Memory::new());
            let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
            let x = tape.input(&x, [b, t, c], true).unwrap();
            let var = tape.input(&numbers(3, b * 2 * c), [b, 2 * c], true).unwrap();
            let read = tape.windows((0..b).map(window));
            let [shift, scale] = [0, c].map(|offset| PerSample { var, offset });
            let y = ln_linear(&mut tape, x, read, shift, scale, any_linear(n, c), Activation::None).unwrap();
            let mut all = tape.value(y).to_vec();
            tape.backward(y, &numbers(4, b * t * n)).unwrap();
            [x, var].iter().for_each(|&var| all.extend(tape.gradient(var).unwrap()));
            all.extend(grads);
            all
        };
        let expected = pass(0.0);
        assert!(expected.iter().all(|x| x.is_finite()));
        for outside in [f32::NAN, f32::INFINITY] {
            assert!(same_bits(&pass(outside), &expected), "windows of {width}, {outside} outside");
        }
    }
}

#[test]
fn one_token_a_sample() {
    every_window(65, 1, 28, 33, 0.0);
}

#[test]
fn blocks_that_end_inside_samples() {
    every_window(3, 65, 60, 31, 0.0);
    every_window(2, 257, 20, 9, 0.0);
    every_window(2, 300, 20, 9, 0.0);
    every_window(5, 300, 20, 9, 0.0);
    // Samples of whole blocks of rows.
    every_window(3, 64, 100, 45, 0.0);
}

#[test]
fn channels_and_outputs_beyond_the_tiles() {
    every_window(2, 7, 1023, 33, 0.0);
    every_window(3, 5, 36, 300, 0.0);
}

/// Inner dimensions of several blocks, with more rows than are packed at once.
#[test]
fn long_rows_in_several_batches() {
    for (b, tokens, channels, outputs) in [(2, 15, 1024, 33), (4, 128, 1024, 5), (1, 130, 28, 1024)] {
        for (name, read) in window_sets(b, channels) {
            if !["all", "one at the right end", "random"].contains(&name) {
                continue;
            }
            let label = format!("B {b}, T {tokens}, C {channels}, N {outputs}, {name}");
            check_operation(&label, &Case { tokens, channels, outputs, read, activation: Activation::Gelu, mean: 0.0 });
        }
    }
}

#[test]
fn the_variance_of_numbers_far_from_zero() {
    every_window(3, 9, 60, 45, 1000.0);
    every_window(2, 7, 1023, 33, 1000.0);
}

#[test]
fn the_smallest_sizes() {
    for outputs in [1, 2, 3] {
        let read = vec![Window::all(2), Window { start: 0, width: 1 }, Window { start: 1, width: 1 }];
        let case = Case { tokens: 3, channels: 2, outputs, read, activation: Activation::Gelu, mean: 0.0 };
        check_operation("C 2", &case);
    }
}

/// Tiles of a sample and of several, with few and with many inactive channels, over several blocks of tokens.
#[test]
fn in_bf16() {
    for (b, tokens, channels, outputs, mean) in [
        (5, 16, 100, 70, 0.0),
        (11, 6, 60, 45, 0.0),
        (3, 65, 60, 31, 0.0),
        (2, 300, 20, 9, 0.0),
        (3, 40, 132, 37, 1000.0),
    ] {
        for (name, read) in window_sets(b, channels) {
            for activation in [Activation::None, Activation::Gelu] {
                let label =
                    format!("B {b}, T {tokens}, C {channels}, N {outputs}, {name}, {activation:?}, mean {mean}");
                let case = Case { tokens, channels, outputs, read: read.clone(), activation, mean };
                check_operation_in(&label, &case, DType::Bf16);
                let bias = (activation == Activation::Gelu).then_some("bias"); // The slope of GELU is at another place.
                let expected = ["y", "x", "shift", "scale", "weight"].into_iter().chain(bias).collect::<Vec<_>>();
                assert_eq!(other_in_bf16(&case), expected, "{label}");
            }
        }
    }
}

#[test]
fn on_cuda() {
    for (b, tokens, channels, outputs, mean) in
        [(1, 1, 64, 40, 0.0), (5, 7, 56, 48, 0.0), (2, 65, 136, 24, 0.0), (3, 9, 64, 144, 1000.0)]
    {
        for (i, (name, read)) in window_sets(b, channels).into_iter().enumerate() {
            let activation = if i % 2 == 0 { Activation::None } else { Activation::Gelu };
            let label = format!("B {b}, T {tokens}, C {channels}, N {outputs}, {name}, {activation:?}, mean {mean}");
            cuda::check_on_cuda(&label, &Case { tokens, channels, outputs, read, activation, mean });
        }
    }
}

/// As many outputs as each of the tiles has columns, rows that no tile divides, samples that end inside of a chunk.
#[test]
fn on_cuda_with_large_tiles() {
    for (b, tokens, channels, outputs) in [(3, 100, 232, 128), (2, 65, 136, 184), (5, 64, 120, 248)] {
        for (i, (name, read)) in window_sets(b, channels).into_iter().enumerate() {
            let label = format!("B {b}, T {tokens}, C {channels}, N {outputs}, {name}");
            let activation = if i == 0 { Activation::Gelu } else { Activation::None };
            let case = Case { tokens, channels, outputs, read, activation, mean: 0.0 };
            cuda::check_with_large_tiles(&label, &case, DType::Bf16);
            if name == "random" {
                cuda::check_with_large_tiles(&label, &case, DType::F32);
            }
        }
    }
}

/// Gradients of weights whose tiles several blocks share: most of a tile's blocks, blocks of several tiles, and one tile alone.
#[test]
fn on_cuda_with_shared_tiles() {
    for (multiprocessors, b, tokens, channels, outputs, full) in [
        (16, 100, 33, 392, 136, false),
        (8, 70, 48, 136, 136, true),
        (2, 70, 48, 56, 40, false),
        (2, 70, 48, 56, 40, true),
    ] {
        let read = if full { vec![Window::all(channels); b] } else { cuda::uneven_windows(b, channels) };
        let label = format!("{multiprocessors}: B {b}, T {tokens}, C {channels}, N {outputs}, full {full}");
        let device = cuda::device().with_multiprocessors(multiprocessors);
        let dims = ln_linear::cuda::Dims { b, t: tokens, c: channels, n: outputs };
        let plan = ln_linear::cuda::plan(&device, DType::Bf16, dims, &read, full).unwrap();
        let none = Buffer::none(DType::I32);
        let taken = cuda::taken(|take| Scratch::take(&device, dims, DType::Bf16, full, none, take));
        let blocks = cuda::counters(&taken) - b - 1;
        assert!(cuda::most_parts(&plan, blocks) > 0, "{label}: no tile is shared by the {blocks} blocks");
        let case = Case { tokens, channels, outputs, read, activation: Activation::None, mean: 0.0 };
        cuda::check_on(device, &label, &case, DType::Bf16);
        if multiprocessors == 2 {
            cuda::check_on(cuda::device().with_multiprocessors(1), &label, &case, DType::F32);
        }
    }
    // Tiles of 192 x 256, which are those of sm_90.
    if cuda::device().arch() == 90 {
        let (b, tokens, channels, outputs) = (140, 33, 136, 520);
        let device = cuda::device().with_multiprocessors(4);
        let dims = ln_linear::cuda::Dims { b, t: tokens, c: channels, n: outputs };
        let none = Buffer::none(DType::I32);
        let taken = cuda::taken(|take| Scratch::take(&device, dims, DType::Bf16, false, none, take));
        assert!(taken.contains(&(4 * 192 * 256, DType::F32)), "{taken:?}");
        let read = cuda::uneven_windows(b, channels);
        let plan = ln_linear::cuda::plan(&device, DType::Bf16, dims, &read, false).unwrap();
        assert!(cuda::most_parts(&plan, 4) > 0, "no tile of 192 x 256 is shared");
        let case = Case { tokens, channels, outputs, read, activation: Activation::None, mean: 0.0 };
        cuda::check_on(device, "192 x 256", &case, DType::Bf16);
    }
}

#[test]
fn shared_tiles_on_sm_90() {
    cuda::again_on_sm_90("on_cuda_with_shared_tiles");
}

#[test]
fn on_sm_90() {
    cuda::again_on_sm_90("on_cuda_with_large_tiles");
}

/// On a device of few multiprocessors, so that small products take large tiles.
#[test]
fn drawn_sizes_on_cuda() {
    for seed in 10..22 {
        let ([b, tokens, channels, outputs], read) = cuda::drawn_sizes(seed);
        let label = format!("seed {seed}: B {b}, T {tokens}, C {channels}, N {outputs}, {read:?}");
        let case = Case { tokens, channels, outputs, read, activation: Activation::None, mean: 0.0 };
        let device = cuda::device().with_multiprocessors(1 + seed as u32 % 4);
        cuda::check_on(device, &label, &case, DType::Bf16);
    }
}

#[test]
fn drawn_sizes_on_sm_90() {
    cuda::again_on_sm_90("drawn_sizes_on_cuda");
}

#[test]
fn on_cuda_with_sizes_that_only_f32_takes() {
    for (name, read) in window_sets(4, 37) {
        let case = Case { tokens: 3, channels: 37, outputs: 5, read, activation: Activation::Gelu, mean: 0.0 };
        cuda::check_on_cuda_in(name, &case, DType::F32);
    }
}

#[test]
fn on_cuda_with_rows_that_registers_do_not_hold() {
    for (channels, outputs, elem) in [(1400, 8, DType::Bf16), (1300, 4, DType::F32), (523, 3, DType::F32)] {
        let read = vec![Window { start: 3, width: channels - 5 }, Window { start: channels - 1, width: 1 }];
        let case = Case { tokens: 34, channels, outputs, read, activation: Activation::None, mean: 0.0 };
        cuda::check_on_cuda_in(&format!("C {channels}"), &case, elem);
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    for (name, read) in window_sets(4, 12) {
        for activation in [Activation::None, Activation::Gelu] {
            let case = Case { tokens: 3, channels: 12, outputs: 7, read: read.clone(), activation, mean: 0.0 };
            check_slopes(name, &case);
        }
    }
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (3, 5, 12);
    let weights = numbers(1, c * c + c);
    let read =
        |tape: &mut Tape| tape.windows([Window { start: 2, width: 7 }, Window::all(c), Window { start: 0, width: 3 }]);
    let layer = any_linear(c, c);
    let columns = |var| [PerSample { var, offset: 0 }, PerSample { var, offset: c }];
    // The rows.
    check_used_twice(&activation("x", [b, t, c]), &weights, |tape, first, second| {
        let modulation = tape.input(&numbers(2, b * 2 * c), [b, 2 * c], false)?;
        let [shift, scale] = columns(modulation);
        let read = read(tape);
        let y = ln_linear(tape, first, read, shift, scale, layer, Activation::Gelu)?;
        let ones = tape.input(&vec![1.0; b * c], [b, c], false)?;
        let z = ln_linear(tape, second, read, scale, shift, layer, Activation::None)?;
        channel_mask(tape, Some(y), z, ones, Keep::Active)
    });
    // The modulation, in one operation after the other.
    check_used_twice(&activation("modulation", [b, 2 * c]), &weights, |tape, first, second| {
        let x = tape.input(&numbers(3, b * t * c), [b, t, c], false)?;
        let read = read(tape);
        let [shift, scale] = columns(first);
        let y = ln_linear(tape, x, read, shift, scale, layer, Activation::Gelu)?;
        let [shift, scale] = columns(second);
        ln_linear(tape, y, read, scale, shift, layer, Activation::None)
    });
}

#[test]
fn misfits_are_refused() {
    let refused =
        |what: &str, x: &[usize], columns: usize, windows: Vec<Window>, offsets: [usize; 2], inputs: usize| {
            check_refused("ln_linear", what, |tape| {
                let x = match *x {
                    [b, t, c] => zeros(tape, [b, t, c]),
                    [b, c] => zeros(tape, [b, c]),
                    _ => panic!("two or three dimensions"),
                };
                let var = zeros(tape, [2, columns]);
                let read = tape.windows(windows);
                let [shift, scale] = offsets.map(|offset| PerSample { var, offset });
                ln_linear(tape, x, read, shift, scale, any_linear(5, inputs), Activation::None)
            });
        };
    let all = || vec![Window::all(6); 2];
    refused("got [2, 6], expected [batch, tokens, channels]", &[2, 6], 12, all(), [0, 6], 6);
    refused(
        "got [2, 0, 6], expected [batch, tokens, channels], where no size may be 0",
        &[2, 0, 6],
        12,
        all(),
        [0, 6],
        6,
    );
    refused("x has 6 channels, but the weight is [5, 7]", &[2, 3, 6], 12, all(), [0, 6], 7);
    refused("expected [2, at least 13]", &[2, 3, 6], 12, all(), [0, 7], 6);
    refused("expected [2, at least 14]", &[2, 3, 6], 12, all(), [8, 0], 6);
    refused("expected [3, at least 6]", &[3, 3, 6], 12, vec![Window::all(6); 3], [0, 6], 6);
    refused("needs 2 read windows inside 0..6", &[2, 3, 6], 12, vec![Window::all(6); 3], [0, 6], 6);
    refused("needs 2 read windows inside 0..6", &[2, 3, 6], 12, vec![Window { start: 1, width: 6 }; 2], [0, 6], 6);
    refused("needs 2 read windows inside 0..6", &[2, 3, 6], 12, vec![Window { start: 1, width: 0 }; 2], [0, 6], 6);
    // Its end wraps round to a place inside.
    let far = vec![Window { start: usize::MAX - 1, width: 3 }; 2];
    refused("needs 2 read windows inside 0..6", &[2, 3, 6], 12, far, [0, 6], 6);
    refused("modulation has the shape [2, 12]", &[2, 3, 6], 12, all(), [0, usize::MAX - 2], 6);
    for (weights, biases, outputs) in [(29, 5, 5), (30, 4, 5), (0, 0, 0)] {
        check_refused("ln_linear", "a layer of 6 inputs", |tape| {
            let (x, var) = (zeros(tape, [2, 3, 6]), zeros(tape, [2, 12]));
            let (read, layer) = (tape.windows(all()), any_linear(5, 6));
            let linear = Linear { weight: any_param(weights), bias: any_param(biases), outputs, ..layer };
            let [shift, scale] = [0, 6].map(|offset| PerSample { var, offset });
            ln_linear(tape, x, read, shift, scale, linear, Activation::None)
        });
    }
    check_refused("ln_linear", "columns of one modulation", |tape| {
        let (x, a, b) = (zeros(tape, [2, 3, 6]), zeros(tape, [2, 6]), zeros(tape, [2, 6]));
        let read = tape.windows(all());
        let [shift, scale] = [a, b].map(|var| PerSample { var, offset: 0 });
        ln_linear(tape, x, read, shift, scale, any_linear(5, 6), Activation::None)
    });
    refused("overlap", &[2, 3, 6], 12, all(), [0, 5], 6);
}
