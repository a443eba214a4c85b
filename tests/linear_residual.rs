//! `linear_residual` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::backend::cuda::{Buffer, DType};
use dtr_fused::error::Result;
use dtr_fused::ops::PerSample;
use dtr_fused::ops::linear_residual::cuda::Scratch;
use dtr_fused::ops::linear_residual::{self, Residual, linear_residual, reference};
use dtr_fused::ops::real::Real;
use dtr_fused::routing::Window;

struct Case {
    tokens: usize,
    inputs: usize,
    channels: usize,
    base: Vec<Window>,
    write: Vec<Window>,
    bypass: Option<Vec<Window>>,
}

impl Case {
    fn plain<'a, R>(&'a self, inputs: &'a [Vec<R>]) -> reference::Inputs<'a, R> {
        let [a, weight, bias, gate, base, rest @ ..] = inputs else { panic!("at least five inputs") };
        let bypass = self.bypass.as_ref().map(|windows| (&rest[0][..], &windows[..]));
        let &Case { tokens, base: ref base_window, ref write, .. } = self;
        reference::Inputs { a, weight, bias, gate, base, base_window, bypass, write, tokens }
    }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let (b, t, k, c) = (self.write.len(), self.tokens, self.inputs, self.channels);
        let mut inputs = vec![
            activation("a", [b, t, k]),
            weight("weight", c * k, k),
            weight("bias", c, 1),
            per_sample("gate", b, c),
            activation("base", [b, t, c]),
        ];
        inputs.extend(self.bypass.as_ref().map(|_| activation("bypass", [b, t, c])));
        inputs
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        let base_window = tape.windows(self.base.iter().copied());
        let write = tape.windows(self.write.iter().copied());
        let bypass = self.bypass.as_ref().map(|windows| (given.var("bypass"), tape.windows(windows.iter().copied())));
        let residual = Residual { base: given.var("base"), base_window, bypass };
        let layer = given.linear("weight", "bias");
        linear_residual(tape, given.var("a"), layer, given.per_sample("gate"), residual, write)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&self.plain(inputs))
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let g = reference::backward(&self.plain(inputs), upstream);
        let mut grads = vec![g.da, g.dweight, g.dbias, g.dgate, g.dbase];
        grads.extend(self.bypass.as_ref().map(|_| g.dbypass));
        grads
    }
}

/// The four uses of a block for every set of windows, and one that no block has: three different windows a sample.
fn cases(b: usize, tokens: usize, inputs: usize, channels: usize) -> Vec<(String, Case)> {
    let all = vec![Window::all(channels); b];
    let sets = window_sets(b, channels);
    let mut cases = Vec::new();
    for (i, (name, windows)) in sets.iter().enumerate() {
        let (other, another) = (&sets[(i + 5) % sets.len()].1, &sets[(i + 8) % sets.len()].1);
        for (use_, base, write, bypass) in [
            ("paper x1", windows, &all, None),
            ("paper out", &all, &all, Some(windows.clone())),
            ("sublayer x1", windows, windows, None),
            ("sublayer out", windows, windows, Some(windows.clone())),
            ("three windows", other, windows, Some(another.clone())),
        ] {
            let label = format!("B {b}, T {tokens}, K {inputs}, C {channels}, {name}, {use_}");
            cases.push((label, Case { tokens, inputs, channels, base: base.clone(), write: write.clone(), bypass }));
        }
    }
    cases
}

fn check(b: usize, tokens: usize, inputs: usize, channels: usize) {
    for (label, case) in cases(b, tokens, inputs, channels) {
        check_operation(&label, &case);
    }
}

/// Tiles of a sample and of several, over several blocks of tokens.
#[test]
fn in_bf16() {
    for (b, tokens, inputs, channels) in
        [(5, 16, 70, 100), (11, 6, 45, 60), (3, 65, 31, 60), (2, 300, 9, 20), (1, 40, 450, 36)]
    {
        for (label, case) in cases(b, tokens, inputs, channels) {
            check_operation_in(&label, &case, DType::Bf16);
            assert_eq!(other_in_bf16(&case), ["y", "a", "weight", "gate"], "{label}");
        }
    }
}

#[test]
fn on_cuda() {
    for (b, tokens, inputs, channels) in [(1, 1, 40, 64), (5, 7, 48, 56), (2, 65, 24, 136)] {
        for (label, case) in cases(b, tokens, inputs, channels) {
            cuda::check_on_cuda(&label, &case);
        }
    }
    for (label, case) in cases(4, 3, 5, 37) {
        cuda::check_on_cuda_in(&label, &case, DType::F32);
    }
}

/// As many columns as each of the tiles has, rows that no tile divides, samples that end inside of a chunk.
#[test]
fn on_cuda_with_large_tiles() {
    for (b, tokens, inputs, channels) in [(3, 100, 128, 232), (2, 65, 184, 136), (5, 64, 248, 120)] {
        // Every third: all of them would take minutes.
        for (label, case) in cases(b, tokens, inputs, channels).into_iter().skip(b % 3).step_by(3) {
            cuda::check_with_large_tiles(&label, &case, DType::Bf16);
            if label.contains("random") {
                cuda::check_with_large_tiles(&label, &case, DType::F32);
            }
        }
    }
}

/// Gradients of weights whose tiles several blocks share: most of a tile's blocks, blocks of several tiles, and one tile alone.
#[test]
fn on_cuda_with_shared_tiles() {
    for (multiprocessors, b, tokens, inputs, channels, full) in [
        (16, 100, 33, 136, 392, false),
        (12, 100, 33, 392, 136, true),
        (2, 70, 48, 40, 56, false),
        (2, 70, 48, 40, 56, true),
    ] {
        let write = if full { vec![Window::all(channels); b] } else { cuda::uneven_windows(b, channels) };
        let label = format!("{multiprocessors}: B {b}, T {tokens}, K {inputs}, C {channels}, full {full}");
        let device = cuda::device().with_multiprocessors(multiprocessors);
        let dims = linear_residual::cuda::Dims { b, t: tokens, k: inputs, c: channels };
        let plan = linear_residual::cuda::plan(&device, DType::Bf16, dims, &write).unwrap();
        let none = Buffer::none(DType::I32);
        let taken = cuda::taken(|take| Scratch::take(&device, dims, DType::Bf16, none, take));
        let blocks = cuda::counters(&taken) - 1;
        assert!(cuda::most_parts(&plan, blocks) > 0, "{label}: no tile is shared by the {blocks} blocks");
        let case = Case { tokens, inputs, channels, base: write.clone(), write, bypass: None };
        cuda::check_on(device, &label, &case, DType::Bf16);
        if multiprocessors == 2 {
            cuda::check_on(cuda::device().with_multiprocessors(1), &label, &case, DType::F32);
        }
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
    for seed in 13..18 {
        let ([b, tokens, channels, inputs], write) = cuda::drawn_sizes(seed);
        let base = write.iter().copied().rev().collect();
        let bypass = (seed % 2 == 0).then(|| write.iter().copied().cycle().skip(1).take(b).collect());
        let label = format!("seed {seed}: B {b}, T {tokens}, K {inputs}, C {channels}, {write:?}");
        let device = cuda::device().with_multiprocessors(1 + seed as u32 % 4);
        cuda::check_on(device, &label, &Case { tokens, inputs, channels, base, write, bypass }, DType::Bf16);
    }
}

#[test]
fn drawn_sizes_on_sm_90() {
    cuda::again_on_sm_90("drawn_sizes_on_cuda");
}

#[test]
fn one_sample_of_one_token() {
    check(1, 1, 37, 60);
}

#[test]
fn few_tokens() {
    check(5, 7, 45, 60);
}

#[test]
fn many_small_samples_share_products() {
    check(23, 16, 35, 60);
    check(11, 6, 35, 60);
}

#[test]
fn one_token_a_sample() {
    check(65, 1, 33, 28);
}

#[test]
fn blocks_that_end_inside_samples() {
    check(3, 65, 31, 60);
    check(2, 257, 9, 20);
    check(5, 300, 9, 20);
}

#[test]
fn channels_and_inputs_beyond_the_tiles() {
    check(2, 7, 33, 1023);
    check(3, 5, 300, 36);
}

/// Inner dimensions of several blocks, with more rows than are packed at once.
#[test]
fn long_rows_in_several_batches() {
    for (b, tokens, inputs, channels) in
        [(2, 15, 1024, 28), (4, 128, 1024, 5), (1, 130, 5, 1024), (2, 15, 20, 1000), (3, 64, 45, 60)]
    {
        for (label, case) in cases(b, tokens, inputs, channels) {
            if label.ends_with("random, sublayer out") || label.ends_with("right end, three windows") {
                check_operation(&label, &case);
            }
        }
    }
}

#[test]
fn the_smallest_sizes() {
    check(2, 3, 1, 7);
    check(2, 2, 2, 7);
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    for (label, case) in cases(4, 3, 5, 12) {
        check_slopes(&label, &case);
    }
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (3, 5, 12);
    let layer = any_linear(c, c);
    let weights = numbers(1, c * c + c);
    let narrow = [Window { start: 2, width: 7 }, Window::all(c), Window { start: 0, width: 3 }];
    for base_all in [true, false] {
        // The stream as input, as base and around a second operation; then the same input of both.
        let build = |tape: &mut Tape, first: Var, second: Var| {
            let var = tape.input(&numbers(2, b * c), [b, c], false)?;
            let (narrow, all) = (tape.windows(narrow), tape.windows([Window::all(c); 3]));
            let base_window = if base_all { all } else { narrow };
            let gate = PerSample { var, offset: 0 };
            let stream = Residual { base: second, base_window, bypass: Some((first, narrow)) };
            let y = linear_residual(tape, first, layer, gate, stream, narrow)?;
            let stream = Residual { base: first, base_window, bypass: Some((second, narrow)) };
            let z = linear_residual(tape, second, layer, gate, stream, all)?;
            linear_residual(tape, y, layer, gate, Residual { base: z, base_window, bypass: Some((y, narrow)) }, all)
        };
        check_used_twice(&activation("x", [b, t, c]), &weights, build);
    }
    check_used_twice(&activation("gate", [b, c]), &weights, |tape, first, second| {
        let x = tape.input(&numbers(3, b * t * c), [b, t, c], false)?;
        let write = tape.windows(narrow);
        let mut stream = x;
        for var in [first, second] {
            let residual = Residual { base: stream, base_window: write, bypass: None };
            stream = linear_residual(tape, x, layer, PerSample { var, offset: 0 }, residual, write)?;
        }
        Ok(stream)
    });
}

#[test]
fn misfits_are_refused() {
    struct Sizes {
        inputs: usize,
        gate: usize,
        base: [usize; 3],
        bypass: [usize; 3],
        windows: [Vec<Window>; 3],
    }
    let fit = || Sizes {
        inputs: 4,
        gate: 6,
        base: [2, 3, 6],
        bypass: [2, 3, 6],
        windows: std::array::from_fn(|_| vec![Window { start: 1, width: 5 }; 2]),
    };
    let build = |tape: &mut Tape, sizes: Sizes| {
        let (a, var) = (zeros(tape, [2, 3, 4]), zeros(tape, [2, sizes.gate]));
        let (base, x) = (zeros(tape, sizes.base), zeros(tape, sizes.bypass));
        let [base_window, around, write] = sizes.windows.map(|windows| tape.windows(windows));
        let residual = Residual { base, base_window, bypass: Some((x, around)) };
        linear_residual(tape, a, any_linear(6, sizes.inputs), PerSample { var, offset: 0 }, residual, write)
    };
    let refused = |what: &str, change: &dyn Fn(&mut Sizes)| {
        let mut sizes = fit();
        change(&mut sizes);
        check_refused("linear_residual", what, |tape| build(tape, sizes));
    };
    assert!(build(&mut Tape::inference(&[0.5; 64], &mut Default::default()), fit()).is_ok());
    refused("a has 4 inputs, but the weight is [6, 5]", &|s| s.inputs = 5);
    refused("expected [2, at least 6]", &|s| s.gate = 5);
    refused("the residual stream is [2, 4, 6], expected [2, 3, 6]", &|s| s.base = [2, 4, 6]);
    refused("the residual stream is [1, 3, 6], expected [2, 3, 6]", &|s| s.bypass = [1, 3, 6]);
    for i in 0..3 {
        refused("needs 2 windows inside 0..6", &|s| s.windows[i].truncate(1));
        refused("needs 2 windows inside 0..6", &|s| s.windows[i][1].width = 0);
        refused("needs 2 windows inside 0..6", &|s| s.windows[i][0].start = 2);
    }
    check_refused("linear_residual", "got [2, 4], expected [batch, tokens, inputs]", |tape| {
        let (a, var, base) = (zeros(tape, [2, 4]), zeros(tape, [2, 6]), zeros(tape, [2, 3, 6]));
        let all = tape.windows([Window::all(6); 2]);
        let residual = Residual { base, base_window: all, bypass: None };
        linear_residual(tape, a, any_linear(6, 4), PerSample { var, offset: 0 }, residual, all)
    });
}
