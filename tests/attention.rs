//! `attention` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::DType;
use dtr_fused::error::Result;
use dtr_fused::ops::attention::{Dims, attention, reference};
use dtr_fused::ops::channel_mask::{Keep, channel_mask};
use dtr_fused::ops::real::Real;

struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    size: usize,
    /// How far from uniform the attention is.
    sharpness: f32,
    /// Added to queries and taken from keys: scores far below 0.
    shift: f32,
}

impl Case {
    fn dims(&self) -> Dims {
        let &Case { batch, tokens, heads, size, .. } = self;
        Dims { b: batch, t: tokens, c: heads * size, heads }
    }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let mut qkv = activation("qkv", [self.batch, self.tokens, 3 * self.heads * self.size]);
        let channels = self.heads * self.size;
        for token in qkv.data.chunks_mut(3 * channels) {
            token.iter_mut().for_each(|x| *x *= self.sharpness);
            token[..channels].iter_mut().for_each(|x| *x += self.shift);
            token[channels..2 * channels].iter_mut().for_each(|x| *x -= self.shift);
        }
        vec![qkv]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        attention(tape, given.var("qkv"), self.heads)
    }

    /// With one token, dP = D: the gradient of queries and keys is what their rounding leaves, times the keys or queries.
    fn cancellation(&self) -> Option<f64> {
        let typical = (self.size as f64).sqrt() * f64::from(self.sharpness).powi(2);
        (self.tokens == 1).then_some(2.0 * f64::from(f32::EPSILON) * typical)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&inputs[0], self.dims())
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        vec![reference::backward(&inputs[0], upstream, self.dims())]
    }
}

fn check(batch: usize, tokens: usize, heads: usize, size: usize) {
    for sharpness in [0.01, 1.0, 3.0] {
        let label = format!("B {batch}, T {tokens}, NH {heads}, HS {size}, sharpness {sharpness}");
        check_operation(&label, &Case { batch, tokens, heads, size, sharpness, shift: 0.0 });
    }
}

/// Heads that fill tiles and heads that do not; several blocks of queries, the last of which is smaller; scores far below 0.
#[test]
fn in_bf16() {
    for (batch, tokens, heads, size) in [
        (2, 64, 2, 32),
        (3, 33, 2, 16),
        (1, 130, 1, 64),
        (1, 257, 1, 48),
        (2, 400, 1, 16),
        (1, 31, 2, 16),
        (1, 40, 2, 20),
    ] {
        for (sharpness, shift) in [(0.3, 0.0), (3.0, 0.0), (1.0, 5.0)] {
            let label = format!("B {batch}, T {tokens}, NH {heads}, HS {size}, sharpness {sharpness}, shift {shift}");
            let case = Case { batch, tokens, heads, size, sharpness, shift };
            check_operation_in(&label, &case, DType::Bf16);
            let expected: &[_] = if tokens >= 32 && size.is_multiple_of(16) { &["y", "qkv"] } else { &[] };
            assert_eq!(other_in_bf16(&case), expected, "{label}");
        }
    }
}

#[test]
fn on_cuda() {
    for (batch, tokens, heads, size) in [(2, 65, 2, 8), (1, 1, 3, 16), (3, 17, 2, 72), (1, 130, 1, 64), (2, 33, 1, 128)]
    {
        for sharpness in [0.3, 3.0] {
            let label = format!("B {batch}, T {tokens}, NH {heads}, HS {size}, sharpness {sharpness}");
            cuda::check_on_cuda(&label, &Case { batch, tokens, heads, size, sharpness, shift: 0.0 });
        }
    }
    let case = Case { batch: 3, tokens: 17, heads: 5, size: 5, sharpness: 1.0, shift: 0.0 };
    cuda::check_on_cuda_in("HS 5", &case, DType::F32);
}

/// Every way in which the kernels divide the work in bf16: by tokens (16, 32, 64, 128, 256, more) and by the size of a head.
#[test]
fn on_cuda_by_sizes() {
    let sizes =
        [(16, 96), (16, 72), (31, 104), (32, 24), (48, 112), (64, 72), (70, 80), (100, 56), (200, 72), (258, 16)];
    for (tokens, size) in sizes {
        let case = Case { batch: 1, tokens, heads: 2, size, sharpness: 1.0, shift: 0.0 };
        cuda::check_on_cuda_in(&format!("T {tokens}, HS {size}"), &case, DType::Bf16);
    }
}

/// Keys that are not there have a score of 0, which is far above all others here.
#[test]
fn on_cuda_with_scores_far_below_0() {
    for (tokens, size) in [(17, 72), (70, 40), (140, 16)] {
        let case = Case { batch: 1, tokens, heads: 1, size, sharpness: 1.0, shift: 5.0 };
        cuda::check_on_cuda(&format!("T {tokens}, HS {size}, far below 0"), &case);
    }
}

/// The highest score grows from tile to tile by more than a sum of exponentials may.
#[test]
fn on_cuda_with_scores_beyond_the_range_of_the_exponential() {
    for (tokens, size) in [(140, 16), (97, 80)] {
        let case = Case { batch: 1, tokens, heads: 1, size, sharpness: 12.0, shift: 0.0 };
        cuda::check_on_cuda(&format!("T {tokens}, HS {size}, sharp"), &case);
    }
}

#[test]
fn one_token_attends_to_itself() {
    check(1, 1, 3, 20);
    check(4, 1, 1, 8);
}

#[test]
fn few_tokens() {
    check(1, 2, 1, 1);
    check(5, 7, 3, 20);
    check(20, 16, 2, 24);
    check(3, 17, 5, 5);
}

/// 16 tokens are a vector's numbers, with AVX-512: elsewhere the general version computes this.
#[test]
fn a_vector_of_tokens() {
    for (batch, heads, size) in [(1, 1, 16), (5, 4, 32), (2, 3, 48), (3, 2, 64), (1, 1, 128)] {
        check(batch, 16, heads, size);
        for shift in [3.0, 5.0] {
            let case = Case { batch, tokens: 16, heads, size, sharpness: 1.0, shift };
            check_operation(&format!("T 16, NH {heads}, HS {size}, {shift} from 0"), &case);
        }
    }
}

#[test]
fn blocks_of_queries_that_do_not_divide_the_tokens() {
    check(2, 65, 2, 8);
    check(1, 128, 1, 16);
    check(2, 129, 2, 8);
    check(1, 127, 1, 32);
    check(1, 130, 2, 48);
    check(1, 200, 1, 64);
    check(1, 257, 3, 8);
    check(1, 300, 2, 12);
}

/// With many keys, blocks have fewer queries.
#[test]
fn more_tokens_than_a_full_block_of_queries_takes() {
    for (tokens, heads, size) in [(384, 1, 5), (385, 1, 16), (449, 2, 5), (770, 1, 4)] {
        let case = Case { batch: 1, tokens, heads, size, sharpness: 1.0, shift: 0.0 };
        check_operation(&format!("T {tokens}, NH {heads}, HS {size}"), &case);
    }
}

#[test]
fn head_sizes_of_the_large_models() {
    check(1, 33, 2, 64);
    check(1, 31, 2, 72);
    check(2, 9, 1, 128);
}

#[test]
fn scores_beyond_the_range_of_the_exponential() {
    for (tokens, size) in [(33, 24), (16, 32)] {
        check_operation("sharp", &Case { batch: 2, tokens, heads: 2, size, sharpness: 12.0, shift: 0.0 });
    }
}

/// A key that is no number makes all that its head gives of its sample none, and nothing else.
#[test]
fn what_is_not_a_number_stays_in_its_head() {
    for (tokens, heads, size) in [(1, 2, 4), (16, 3, 32), (16, 2, 20), (40, 2, 8)] {
        let case = Case { batch: 2, tokens, heads, size, sharpness: 1.0, shift: 0.0 };
        let channels = heads * size;
        let mut qkv = case.inputs().remove(0).data;
        // The last key's first number in head 1 of sample 0.
        qkv[(tokens - 1) * 3 * channels + channels + size] = f32::NAN;
        let mut memory = Memory::new();
        let (weights, mut grads): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
        let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
        let x = tape.input(&qkv, [2, tokens, 3 * channels], true).unwrap();
        let y = attention(&mut tape, x, heads).unwrap();
        let of_head = |i: usize, width: usize| i / width < tokens && i % channels / size == 1;
        let what = format!("T {tokens}, NH {heads}, HS {size}");
        for (i, y) in tape.value(y).iter().enumerate() {
            assert_eq!(y.is_nan(), of_head(i, channels), "{what}: output {i} is {y}");
        }
        tape.backward(y, &vec![1.0; 2 * tokens * channels]).unwrap();
        for (i, dx) in tape.gradient(x).unwrap().iter().enumerate() {
            assert_eq!(dx.is_nan(), of_head(i, 3 * channels), "{what}: gradient {i} is {dx}");
        }
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    for (tokens, heads, size) in [(1, 1, 4), (5, 3, 4), (9, 1, 5)] {
        check_slopes("attention", &Case { batch: 2, tokens, heads, size, sharpness: 1.0, shift: 0.0 });
    }
}

#[test]
fn gradients_of_shared_inputs_add_up() {
    let (b, t, c) = (2, 5, 12);
    check_used_twice(&activation("qkv", [b, t, 3 * c]), &[], |tape, first, second| {
        let a = attention(tape, first, 3)?;
        let b2 = attention(tape, second, 2)?;
        let ones = tape.input(&vec![1.0; b * c], [b, c], false)?;
        channel_mask(tape, Some(a), b2, ones, Keep::Active)
    });
}

#[test]
fn misfits_are_refused() {
    let refused = |what: &str, build: fn(&mut Tape) -> (Var, usize)| {
        check_refused("attention", what, |tape| {
            let (qkv, heads) = build(tape);
            attention(tape, qkv, heads)
        });
    };
    refused("got [2, 12], expected [batch, tokens, 3 x channels]", |tape| (zeros(tape, [2, 12]), 2));
    refused("where no size may be 0", |tape| (zeros(tape, [0, 3, 12]), 2));
    refused("12 is not 3 x channels of 5 equal heads", |tape| (zeros(tape, [2, 3, 12]), 5));
    refused("14 is not 3 x channels of 2 equal heads", |tape| (zeros(tape, [2, 3, 14]), 2));
    refused("12 is not 3 x channels of 0 equal heads", |tape| (zeros(tape, [2, 3, 12]), 0));
    // Three times as many would wrap around to 2.
    refused("equal heads", |tape| (zeros(tape, [2, 3, 12]), usize::MAX / 3 + 1));
}
