//! How an operation is held against its reference.
//!
//! An operation's test describes its inputs, calls it on a tape and calls its reference; [`check_operation`] does the rest:
//! the error rule for the output and every gradient, buffers that were full of NaN before, canaries around every weight,
//! adding to gradients, the same bits for any number of threads and on an inference tape. [`check_slopes`] holds the
//! reference itself against finite differences.

#![allow(dead_code)] // Every test binary uses a part of this.

pub mod cuda;

use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::backend::cuda::DType;
use dtr_fused::error::{Error, Result};
use dtr_fused::ops::PerSample;
use dtr_fused::ops::real::{InBf16, Real};
use dtr_fused::params::{Linear, Param};
use dtr_fused::rng::{Philox, Stream};
use dtr_fused::routing::Window;
use dtr_fused::tensor::Shape;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Random numbers without symmetry, neither around 0 nor around their mean.
pub fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Philox::new(seed, Stream::Noise).normal(&mut x, 1, 2);
    x.iter().map(|v| 0.15 + 0.7 * v + 0.1 * v * v).collect()
}

/// The same numbers in another precision.
pub fn cast<R: Real>(x: &[f32]) -> Vec<R> {
    x.iter().map(|&v| R::from_f64(f64::from(v))).collect()
}

/// A uniform integer in `0..n`.
pub fn below(seed: u64, index: usize, n: usize) -> usize {
    Philox::new(seed, Stream::Shuffle).below(n as u64, 0, index as u64, 0) as usize
}

/// Sets of windows for a batch, from harmless to hostile.
pub fn window_sets(batch: usize, c: usize) -> Vec<(&'static str, Vec<Window>)> {
    let each = |f: &dyn Fn(usize) -> Window| (0..batch).map(f).collect::<Vec<_>>();
    let random = |i: usize| {
        let width = 1 + below(1, i, c);
        Window { start: below(2, i, c - width + 1), width }
    };
    let mut sorted = each(&random);
    sorted.sort_by_key(|w| (w.start, w.width));
    let slid = c.div_ceil(2).max(1);
    vec![
        ("all", each(&|_| Window::all(c))),
        ("one at the left end", each(&|_| Window { start: 0, width: 1 })),
        ("one at the right end", each(&|_| Window { start: c - 1, width: 1 })),
        ("all but the left end", each(&|_| Window { start: c / 7, width: c - c / 7 })),
        ("all but the right end", each(&|_| Window { start: 0, width: c - c / 5 })),
        ("random", each(&random)),
        ("random, sorted", sorted),
        (
            "disjoint",
            each(&|i| {
                if i % 2 == 0 { Window { start: 0, width: c / 2 } } else { Window { start: c / 2, width: c - c / 2 } }
            }),
        ),
        ("full beside narrow", each(&|i| if i % 3 == 1 { Window { start: c / 3, width: 1 } } else { Window::all(c) })),
        ("sliding by one", each(&|i| Window { start: i % (c - slid + 1), width: slid })),
    ]
}

/// Where an input lives.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// An activation whose gradient is wanted.
    Activation(Shape),
    /// An activation that is not trained.
    Constant(Shape),
    /// `[B, C]`: columns of the modulation.
    PerSample(usize),
    /// A weight.
    Weight,
}

/// One input of an operation.
#[derive(Clone, Debug)]
pub struct Input {
    pub name: &'static str,
    pub data: Vec<f32>,
    pub place: Place,
}

/// An activation of random numbers; the name is the seed.
pub fn activation(name: &'static str, shape: impl Into<Shape>) -> Input {
    let shape = shape.into();
    Input { name, data: numbers(seed(name), shape.len()), place: Place::Activation(shape) }
}

/// One vector of `channels` a sample.
pub fn per_sample(name: &'static str, batch: usize, channels: usize) -> Input {
    Input { name, data: numbers(seed(name), batch * channels), place: Place::PerSample(batch) }
}

/// A weight of `len` numbers around 0 that keep products of `inputs` terms near 1.
pub fn weight(name: &'static str, len: usize, inputs: usize) -> Input {
    let factor = 1.0 / (inputs as f32).sqrt();
    Input { name, data: numbers(seed(name), len).iter().map(|w| w * factor).collect(), place: Place::Weight }
}

fn seed(name: &str) -> u64 {
    name.bytes().fold(7, |h, b| h * 31 + u64::from(b))
}

/// The inputs on a tape.
pub struct Given {
    vars: HashMap<&'static str, Var>,
    columns: HashMap<&'static str, PerSample>,
    params: HashMap<&'static str, Param>,
}

impl Given {
    pub fn var(&self, name: &str) -> Var {
        self.vars[name]
    }

    pub fn per_sample(&self, name: &str) -> PerSample {
        self.columns[name]
    }

    pub fn param(&self, name: &str) -> Param {
        self.params[name]
    }

    /// The linear layer of this weight and bias.
    pub fn linear(&self, weight: &str, bias: &str) -> Linear {
        let (weight, bias) = (self.params[weight], self.params[bias]);
        Linear { weight, bias, inputs: weight.len / bias.len, outputs: bias.len }
    }
}

/// What the tests need to know of an operation.
pub trait Operation: Sync {
    /// Its inputs, in the order of the slices below.
    fn inputs(&self) -> Vec<Input>;
    /// The fused operation.
    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var>;
    /// Error of gradients where numbers cancel that the plain loops happen to cancel exactly. Unless there are such, what is
    /// 0 in f64 must be exactly 0 in the fused version.
    fn cancellation(&self) -> Option<f64> {
        None
    }
    /// The reference.
    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R>;
    /// The reference's gradient of every input (empty for constants), given that of the output.
    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>>;
}

/// The inputs of an operation, rounded to `elem` where that is how they are multiplied.
pub fn inputs_in(op: &impl Operation, elem: DType) -> Vec<Input> {
    let mut inputs = op.inputs();
    for input in inputs.iter_mut().filter(|input| in_elem(input)) {
        input.data = rounded(&input.data, elem);
    }
    inputs
}

/// What the references say of one tensor.
#[derive(Clone, Debug)]
pub struct Expected {
    /// In f64.
    pub truth: Vec<f64>,
    /// Largest error of the plain version.
    pub plain_error: f64,
    /// Error allowed on top, see [`Operation::cancellation`].
    pub cancellation: f64,
    /// Whether what is 0 in f64 must be exactly 0: a channel that a window leaves out.
    pub exact_zeros: bool,
}

impl Expected {
    /// From several draws of the plain version and of that in f64, the first of which is meant.
    fn new(draws: Vec<(Vec<f32>, Vec<f64>)>, cancellation: Option<f64>) -> Self {
        let errors = draws.iter().flat_map(|(plain, truth)| {
            assert_eq!(plain.len(), truth.len());
            plain.iter().zip(truth).map(|(&p, t)| (f64::from(p) - t).abs())
        });
        let plain_error = errors.fold(0.0, f64::max);
        let truth = draws.into_iter().next().expect("there is a draw").1;
        Expected { truth, plain_error, cancellation: cancellation.unwrap_or(0.0), exact_zeros: cancellation.is_none() }
    }

    /// Error of the fused version <= `factor` times the error of the plain version, plus a floor of two roundings in f32
    /// of the largest number.
    #[allow(clippy::neg_cmp_op_on_partial_ord)] // A NaN must fail.
    pub fn check(&self, what: &str, factor: f64, fused: &[f32]) -> std::result::Result<(), String> {
        let truth = &self.truth;
        if fused.len() != truth.len() {
            return Err(format!("{what}: {} numbers, expected {}", fused.len(), truth.len()));
        }
        let largest = truth.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
        let allowed = factor * self.plain_error + largest * f64::from(f32::EPSILON) * 2.0 + self.cancellation;
        if !allowed.is_finite() {
            return Err(format!("{what}: the references prove nothing ({allowed} allowed)"));
        }
        for (i, (&fused, &truth)) in fused.iter().zip(truth).enumerate() {
            let err = (f64::from(fused) - truth).abs();
            if !(err <= allowed) || self.exact_zeros && truth == 0.0 && fused != 0.0 {
                return Err(format!("{what}[{i}] is {fused}, expected {truth} +- {allowed:.2e}"));
            }
        }
        Ok(())
    }
}

/// The output and the gradient of every input (empty for constants).
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub y: Vec<f32>,
    pub grads: Vec<Vec<f32>>,
}

/// Columns between the vectors of the modulation, and numbers between weights: nobody's.
const GAP: usize = 3;
const CANARY: f32 = -12345.0;

/// Runs the fused operation forward and backward. Gradients of weights are added to `start` if there is one.
fn run(op: &impl Operation, inputs: &[Input], upstream: &[f32], start: Option<&[Vec<f32>]>, elem: DType) -> Outcome {
    let mut memory = Memory::on_cpu(elem);
    // Every buffer that the second pass gets is then full of NaN, in every build profile.
    let poison: Vec<Input> = inputs.iter().map(|x| Input { data: vec![f32::NAN; x.data.len()], ..x.clone() }).collect();
    run_on(op, &poison, &vec![f32::NAN; upstream.len()], None, &mut memory);
    run_on(op, inputs, upstream, start, &mut memory)
}

fn run_on(
    op: &impl Operation,
    inputs: &[Input],
    upstream: &[f32],
    start: Option<&[Vec<f32>]>,
    memory: &mut Memory,
) -> Outcome {
    // Weights lie in one buffer with gaps: NaN to read, canaries to write.
    let (mut weights, mut grads) = (vec![f32::NAN; GAP], vec![CANARY; GAP]);
    let mut params = HashMap::new();
    for (i, input) in inputs.iter().enumerate() {
        if let Place::Weight = input.place {
            params.insert(input.name, Param { offset: weights.len(), len: input.data.len() });
            weights.extend(&input.data);
            match start {
                Some(start) => grads.extend(&start[i]),
                None => grads.resize(weights.len(), f32::NAN),
            }
            weights.resize(weights.len() + GAP, f32::NAN);
            grads.resize(weights.len(), CANARY);
        }
    }
    let mut tape = Tape::new(&weights, &mut grads, start.is_some(), memory);
    let (given, modulation) = put(&mut tape, inputs, params);
    let y = op.on_tape(&mut tape, &given).expect("the shapes fit");
    let output = tape.value(y).to_vec();
    tape.backward(y, upstream).expect("the upstream gradient fits");

    let mut found = Vec::new();
    let mut dmodulation = modulation.and_then(|(var, _)| tape.gradient(var)).map(<[f32]>::to_vec);
    for input in inputs {
        found.push(match input.place {
            Place::Activation(_) => {
                tape.gradient(given.var(input.name)).map_or(vec![0.0; input.data.len()], <[f32]>::to_vec)
            }
            Place::PerSample(batch) => {
                let (c, columns) = (input.data.len() / batch, modulation.expect("there is one").1);
                let at = given.per_sample(input.name).offset;
                let rows = dmodulation.as_mut().expect("it has a gradient").chunks_exact_mut(columns);
                rows.flat_map(|row| row[at..at + c].iter_mut().map(std::mem::take)).collect()
            }
            Place::Constant(_) | Place::Weight => Vec::new(),
        });
    }
    if upstream.iter().all(|u| u.is_finite()) {
        let rest = dmodulation.unwrap_or_default();
        assert!(rest.iter().all(|&d| d == 0.0), "columns of the modulation that nobody uses got a gradient");
    }
    for (input, found) in inputs.iter().zip(&mut found) {
        if let Some(param) = given.params.get(input.name) {
            found.extend_from_slice(&grads[param.range()]);
            grads[param.range()].fill(CANARY);
        }
    }
    assert!(grads.iter().all(|&g| g == CANARY), "wrote beside the gradients of its weights");
    Outcome { y: output, grads: found }
}

/// Puts the inputs on a tape; also the modulation and its columns, if there is one.
fn put(tape: &mut Tape, inputs: &[Input], params: HashMap<&'static str, Param>) -> (Given, Option<(Var, usize)>) {
    let mut given = Given { vars: HashMap::new(), columns: HashMap::new(), params };
    let mut batch = 0;
    let mut offsets = Vec::new();
    let mut columns = GAP;
    for input in inputs {
        match input.place {
            Place::Activation(shape) | Place::Constant(shape) => {
                let wants_grad = matches!(input.place, Place::Activation(_));
                let var = tape.input(&input.data, shape, wants_grad).expect("the inputs have their shapes");
                given.vars.insert(input.name, var);
            }
            Place::PerSample(b) => {
                batch = b;
                offsets.push((input, columns));
                columns += input.data.len() / b + GAP;
            }
            Place::Weight => {}
        }
    }
    if offsets.is_empty() {
        return (given, None);
    }
    let mut modulation = vec![f32::NAN; batch * columns];
    for &(input, offset) in &offsets {
        let c = input.data.len() / batch;
        for (row, values) in modulation.chunks_exact_mut(columns).zip(input.data.chunks_exact(c)) {
            row[offset..offset + c].copy_from_slice(values);
        }
    }
    let var = tape.input(&modulation, [batch, columns], true).expect("the modulation has its shape");
    given.columns.extend(offsets.iter().map(|&(input, offset)| (input.name, PerSample { var, offset })));
    (given, Some((var, columns)))
}

/// Pools of 1, 2, 3 and 5 threads.
pub fn pools() -> &'static [rayon::ThreadPool] {
    static POOLS: OnceLock<Vec<rayon::ThreadPool>> = OnceLock::new();
    POOLS.get_or_init(|| {
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads can be started");
        [1, 2, 3, 5].map(pool).into()
    })
}

/// Whether all numbers are the same, bit for bit.
pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Everything that is asked of an operation, see the head of this file.
#[track_caller]
pub fn check_operation(label: &str, op: &impl Operation) {
    check_operation_in(label, op, DType::F32);
}

/// [`check_operation`] with products in `elem`.
#[track_caller]
pub fn check_operation_in(label: &str, op: &impl Operation, elem: DType) {
    let inputs = inputs_in(op, elem);
    let (expected_y, expected, upstream) = expectations(op, &inputs, elem);
    let run = |start| run(op, &inputs, &upstream, start, elem);
    let outcome = run(None);
    let judge = |result: std::result::Result<(), String>| {
        if let Err(what) = result {
            panic!("{label}, {elem:?}: {what}");
        }
    };
    judge(expected_y.check("y", 2.0, &outcome.y));
    for (input, (found, expected)) in inputs.iter().zip(outcome.grads.iter().zip(&expected)) {
        judge(expected.check(&format!("d{}", input.name), 3.0, found));
    }

    let start: Vec<Vec<f32>> = inputs.iter().map(|x| numbers(5, x.data.len())).collect();
    let added = run(Some(&start));
    for (i, input) in inputs.iter().enumerate() {
        if let Place::Weight = input.place {
            let mut expected = expected[i].clone();
            expected.truth.iter_mut().zip(&start[i]).for_each(|(g, &s)| *g += f64::from(s));
            judge(expected.check(&format!("start + d{}", input.name), 3.0, &added.grads[i]));
        }
    }

    for pool in pools() {
        let (threads, again) = (pool.current_num_threads(), pool.install(|| run(None)));
        assert!(same_bits(&again.y, &outcome.y), "{label}: other bits in y with {threads} threads");
        for (input, (a, b)) in inputs.iter().zip(again.grads.iter().zip(&outcome.grads)) {
            assert!(same_bits(a, b), "{label}: other bits in d{} with {threads} threads", input.name);
        }
    }
    assert!(same_bits(&infer(op, &inputs, elem), &outcome.y), "{label}: other bits on an inference tape");
}

/// Numbers as `dtype` holds them.
pub fn rounded(numbers: &[f32], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => numbers.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
        _ => numbers.to_vec(),
    }
}

/// Whether a device holds this input in the tape's element type, and the CPU multiplies it in that.
pub fn in_elem(input: &Input) -> bool {
    match input.place {
        Place::Activation(shape) | Place::Constant(shape) => shape.rank() == 3,
        Place::PerSample(_) => false,
        Place::Weight => !input.name.contains("bias"),
    }
}

/// Which of the output ("y") and of the gradients (by input) have other bits with products in bf16 than in f32.
pub fn other_in_bf16(op: &impl Operation) -> Vec<&'static str> {
    let inputs = op.inputs();
    let upstream = numbers(99, op.forward(&inputs.iter().map(|x| x.data.clone()).collect::<Vec<_>>()).len());
    let [in_f32, in_bf16] = [DType::F32, DType::Bf16].map(|elem| run(op, &inputs, &upstream, None, elem));
    let grads = inputs.iter().zip(in_f32.grads.iter().zip(&in_bf16.grads));
    let others = grads.filter(|(_, (a, b))| !same_bits(a, b)).map(|(input, _)| input.name);
    (!same_bits(&in_f32.y, &in_bf16.y)).then_some("y").into_iter().chain(others).collect()
}

/// What the references say of these inputs, the plain version in `elem`: of the output and of every gradient; and the upstream gradient
/// they used.
///
/// How far a sum in f32 is off is luck. So that a lucky one does not set the rule where few numbers of a tensor are large, the
/// error of the plain version is then the largest over some inputs that differ in their last bits.
pub fn expectations(op: &impl Operation, inputs: &[Input], elem: DType) -> (Expected, Vec<Expected>, Vec<f32>) {
    let mut data: Vec<Vec<f32>> = inputs.iter().map(|x| x.data.clone()).collect();
    let (mut outputs, mut upstream) = (Vec::new(), Vec::new());
    let mut grads: Vec<Vec<(Vec<f32>, Vec<f64>)>> = vec![Vec::new(); inputs.len()];
    for draw in 0..4 {
        if draw > 0 {
            let mut places = 0..;
            for (input, x) in inputs.iter().zip(&mut data) {
                let last_bit = if in_elem(input) && elem == DType::Bf16 { 1.0 / 128.0 } else { f32::EPSILON };
                for (x, i) in x.iter_mut().zip(&mut places) {
                    *x *= 1.0 + (below(draw, i, 5) as f32 - 2.0) * last_bit;
                }
                if in_elem(input) {
                    *x = rounded(x, elem);
                }
            }
        }
        let in_f64: Vec<Vec<f64>> = data.iter().map(|x| cast(x)).collect();
        let truth = op.forward(&in_f64);
        if draw == 0 {
            upstream = rounded(&numbers(99, truth.len()), elem);
        }
        let true_grads = op.backward(&in_f64, &cast::<f64>(&upstream));
        let (plain, plain_grads) = match elem {
            DType::F32 => (op.forward(&data), op.backward(&data, &upstream)),
            _ => {
                let narrow = |x: Vec<InBf16>| x.into_iter().map(|x| x.0).collect::<Vec<f32>>();
                let inputs: Vec<Vec<InBf16>> = data.iter().map(|x| cast(x)).collect();
                let grads = op.backward(&inputs, &cast::<InBf16>(&upstream));
                (narrow(op.forward(&inputs)), grads.into_iter().map(narrow).collect())
            }
        };
        let few = true_grads.iter().any(|x| few_count(x)) || few_count(&truth);
        outputs.push((plain, truth));
        for (draws, pair) in grads.iter_mut().zip(plain_grads.into_iter().zip(true_grads)) {
            draws.push(pair);
        }
        if !few {
            break;
        }
    }
    let grads = grads.into_iter().map(|draws| Expected::new(draws, op.cancellation())).collect();
    (Expected::new(outputs, None), grads, upstream)
}

/// Whether there are numbers but 0, and few of a size with the largest.
fn few_count(x: &[f64]) -> bool {
    let largest = x.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    largest > 0.0 && x.iter().filter(|x| x.abs() >= largest / 8.0).count() < 32
}

/// The output on an inference tape.
fn infer(op: &impl Operation, inputs: &[Input], elem: DType) -> Vec<f32> {
    let mut weights = Vec::new();
    let mut params = HashMap::new();
    for input in inputs.iter().filter(|x| matches!(x.place, Place::Weight)) {
        params.insert(input.name, Param { offset: weights.len(), len: input.data.len() });
        weights.extend(&input.data);
    }
    let mut memory = Memory::on_cpu(elem);
    let mut tape = Tape::inference(&weights, &mut memory);
    let (given, _) = put(&mut tape, inputs, params);
    let y = op.on_tape(&mut tape, &given).expect("the shapes fit");
    tape.value(y).to_vec()
}

/// The reference's gradients in f64 are the slopes of its output: central differences at up to 60 places of every input.
#[track_caller]
pub fn check_slopes(label: &str, op: &impl Operation) {
    let inputs = op.inputs();
    let mut values: Vec<Vec<f64>> = inputs.iter().map(|x| cast(&x.data)).collect();
    let upstream: Vec<f64> = cast(&numbers(98, op.forward(&values).len()));
    let loss = |values: &[Vec<f64>]| -> f64 { op.forward(values).iter().zip(&upstream).map(|(y, u)| y * u).sum() };
    let grads = op.backward(&values, &upstream);
    for (i, input) in inputs.iter().enumerate() {
        if matches!(input.place, Place::Constant(_)) {
            continue;
        }
        assert_eq!(grads[i].len(), values[i].len(), "{label}: d{}", input.name);
        let largest = grads[i].iter().fold(0.0, |a: f64, g| a.max(g.abs()));
        for j in (0..values[i].len()).step_by(values[i].len().div_ceil(60)) {
            const STEP: f64 = 1e-5;
            let old = values[i][j];
            values[i][j] = old + STEP;
            let above = loss(&values);
            values[i][j] = old - STEP;
            let slope = (above - loss(&values)) / (2.0 * STEP);
            values[i][j] = old;
            let err = (slope - grads[i][j]).abs();
            assert!(err <= 1e-6 * largest + 1e-7, "{label}: d{}[{j}] is {}, slope {slope}", input.name, grads[i][j]);
        }
    }
}

/// The gradient of a variable used twice is the sum of the gradients of two variables used once. `build` gets the variable
/// for both uses and makes an output; `weights` are all that its operations use.
#[track_caller]
pub fn check_used_twice(x: &Input, weights: &[f32], build: impl Fn(&mut Tape, Var, Var) -> Result<Var>) {
    let Place::Activation(shape) = x.place else { panic!("only activations are variables") };
    let gradients = |both: bool| -> [Vec<f32>; 2] {
        let (mut grads, mut memory) = (vec![0.0; weights.len()], Memory::new());
        let mut tape = Tape::new(weights, &mut grads, true, &mut memory);
        let first = tape.input(&x.data, shape, true).expect("it has its shape");
        let second = if both { first } else { tape.input(&x.data, shape, true).expect("it has its shape") };
        let y = build(&mut tape, first, second).expect("the shapes fit");
        let upstream = numbers(97, tape.value(y).len());
        tape.backward(y, &upstream).expect("the upstream gradient fits");
        [first, second].map(|var| tape.gradient(var).expect("the variable was used").to_vec())
    };
    let [first, second] = gradients(false);
    let [together, _] = gradients(true);
    assert!(first.iter().any(|&g| g != 0.0) && second.iter().any(|&g| g != 0.0), "both uses must matter");
    let largest = first.iter().chain(&second).fold(0.0, |a: f32, g| a.max(g.abs()));
    for (i, &got) in together.iter().enumerate() {
        let expected = first[i] + second[i];
        assert!((got - expected).abs() <= 1e-6 * largest, "d{}[{i}] is {got}, expected {expected}", x.name);
    }
}

/// The operation refuses, as `Error::Shape` of that name with one sentence that says `what`.
#[track_caller]
pub fn check_refused(operation: &str, what: &str, build: impl FnOnce(&mut Tape) -> Result<Var>) {
    let weights = vec![0.5; 1 << 14];
    let mut memory = Memory::new();
    match build(&mut Tape::inference(&weights, &mut memory)) {
        Ok(_) => panic!("{operation} accepted what it must refuse ({what})"),
        Err(Error::Shape { operation: found, what: message }) => {
            assert_eq!(found, operation);
            assert!(message.contains(what), "'{message}' does not say '{what}'");
        }
        Err(other) => panic!("{operation} refused with {other:?}"),
    }
}

/// A parameter of `len` numbers at the start of the weights.
pub fn any_param(len: usize) -> Param {
    Param { offset: 0, len }
}

/// A linear layer whose bias follows its weight at the start of the weights.
pub fn any_linear(outputs: usize, inputs: usize) -> Linear {
    let weight = any_param(outputs * inputs);
    Linear { weight, bias: Param { offset: weight.len, len: outputs }, inputs, outputs }
}

/// An activation of zeros.
pub fn zeros(tape: &mut Tape, shape: impl Into<Shape>) -> Var {
    let shape = shape.into();
    tape.input(&vec![0.0; shape.len()], shape, false).expect("it has its shape")
}
