//! A GELU's gradient is multiplied by its derivative once, whoever reads its output: any number, or one that takes it away.

mod common;

use common::numbers;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::PerSample;
use dtr_fused::ops::linear_residual::{Input, Residual, linear_residual};
use dtr_fused::ops::ln_linear::{Activation, Gelu, ln_linear, ln_linear_gelu};
use dtr_fused::params::{Linear, Param};
use dtr_fused::routing::Window;

const B: usize = 2;
const T: usize = 6;
const C: usize = 12;
const LAYER: usize = C * C + C;

fn layer(index: usize) -> Linear {
    let offset = index * LAYER;
    let (weight, bias) = (Param { offset, len: C * C }, Param { offset: offset + C * C, len: C });
    Linear { weight, bias, inputs: C, outputs: C }
}

fn mlp(tape: &mut Tape, x: Var, modulation: Var, index: usize, activation: Activation) -> Result<Var> {
    let [shift, scale] = [0, C].map(|offset| PerSample { var: modulation, offset });
    let windows = tape.windows([Window::all(C); B]);
    ln_linear(tape, x, windows, shift, scale, layer(index), activation)
}

fn mlp_for_one_reader(tape: &mut Tape, x: Var, modulation: Var, index: usize) -> Result<Gelu> {
    let [shift, scale] = [0, C].map(|offset| PerSample { var: modulation, offset });
    let windows = tape.windows([Window::all(C); B]);
    ln_linear_gelu(tape, x, windows, shift, scale, layer(index))
}

fn residual(tape: &mut Tape, a: impl Into<Input>, base: Var, modulation: Var, index: usize) -> Result<Var> {
    let gate = PerSample { var: modulation, offset: 2 * C };
    let windows = tape.windows([Window::all(C); B]);
    linear_residual(tape, a, layer(index), gate, Residual { base, base_window: windows, bypass: None }, windows)
}

type Build = fn(&mut Tape, Var, Var) -> Result<Var>;

/// What is built from x and the modulation. An operation may read what another reads, before or after it, or be done again.
const CASES: [(&str, Build); 7] = [
    ("one reader", |tape, x, m| {
        let y = mlp(tape, x, m, 0, Activation::Gelu)?;
        residual(tape, y, x, m, 1)
    }),
    ("one reader that takes it", |tape, x, m| {
        let y = mlp_for_one_reader(tape, x, m, 0)?;
        residual(tape, y, x, m, 1)
    }),
    ("one reader that takes it, twice", |tape, x, m| {
        let first = mlp_for_one_reader(tape, x, m, 0)?;
        let second = mlp_for_one_reader(tape, x, m, 2)?;
        let x = residual(tape, second, x, m, 3)?;
        residual(tape, first, x, m, 1)
    }),
    ("input and base of one", |tape, x, m| {
        let y = mlp(tape, x, m, 0, Activation::Gelu)?;
        residual(tape, y, y, m, 1)
    }),
    ("two linear_residual", |tape, x, m| {
        let y = mlp(tape, x, m, 0, Activation::Gelu)?;
        let z = residual(tape, y, x, m, 1)?;
        residual(tape, y, z, m, 2)
    }),
    ("ln_linear and linear_residual", |tape, x, m| {
        let y = mlp(tape, x, m, 0, Activation::Gelu)?;
        let z = mlp(tape, y, m, 1, Activation::None)?;
        residual(tape, y, z, m, 2)
    }),
    ("two checkpoints", |tape, x, m| {
        let y = tape.checkpointed(move |tape| {
            let y = mlp_for_one_reader(tape, x, m, 0)?;
            residual(tape, y, x, m, 1)
        })?;
        tape.checkpointed(move |tape| {
            let y = mlp(tape, y, m, 2, Activation::Gelu)?;
            mlp(tape, y, m, 3, Activation::None)
        })
    }),
];

/// Along a direction, the gradient is the slope.
#[test]
fn any_readers_get_the_slope() {
    let weights: Vec<f32> = numbers(1, 4 * LAYER).iter().map(|w| 0.6 * w).collect();
    let (x, direction, upstream) = (numbers(2, B * T * C), numbers(3, B * T * C), numbers(4, B * T * C));
    let modulation = numbers(5, B * 3 * C);
    let along = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    for (name, build) in CASES {
        let put = |tape: &mut Tape, step: f32| {
            let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            let x = tape.input(&moved, [B, T, C], true).unwrap();
            let modulation = tape.input(&modulation, [B, 3 * C], true).unwrap();
            (x, build(tape, x, modulation).unwrap())
        };
        let value = |step: f32| {
            let mut memory = Memory::new();
            let mut tape = Tape::inference(&weights, &mut memory);
            let (_, y) = put(&mut tape, step);
            along(tape.value(y), &upstream)
        };
        let slope = (value(2e-3) - value(-2e-3)) / 4e-3;
        let (mut memory, mut grads) = (Memory::new(), vec![0.0; weights.len()]);
        let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
        let (x, y) = put(&mut tape, 0.0);
        tape.backward(y, &upstream).unwrap();
        let gradient = along(tape.gradient(x).unwrap(), &direction);
        // Rounding and curvature make 2e-3 of it; a derivative too many or too few, 4e-2 and more.
        assert!((gradient - slope).abs() <= 8e-3, "{name}: the gradient is {gradient}, the slope {slope}");
    }
}
