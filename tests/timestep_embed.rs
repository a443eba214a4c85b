//! `timestep_embed` against its reference.

mod common;

use common::*;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::real::Real;
use dtr_fused::ops::timestep_embed::{FREQUENCIES, reference, timestep_embed};

struct Case {
    timesteps: Vec<u32>,
    hidden: usize,
    channels: usize,
}

fn weights<R>(inputs: &[Vec<R>]) -> reference::Weights<'_, R> {
    let [w0, b0, w2, b2] = inputs else { panic!("four inputs") };
    reference::Weights { w0, b0, w2, b2 }
}

impl Operation for Case {
    fn inputs(&self) -> Vec<Input> {
        let (h, c) = (self.hidden, self.channels);
        let w0 = weight("w0", h * FREQUENCIES, FREQUENCIES / 8);
        vec![w0, weight("b0", h, 1), weight("w2", c * h, h), weight("b2", c, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        Ok(timestep_embed(tape, &self.timesteps, given.linear("w0", "b0"), given.linear("w2", "b2"))?.0)
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        reference::forward(&self.timesteps, &weights(inputs))
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let g = reference::backward(&self.timesteps, &weights(inputs), upstream);
        vec![g.dw0, g.db0, g.dw2, g.db2]
    }
}

#[test]
fn agrees_with_the_reference() {
    let many: Vec<u32> = (0..70).map(|i| below(1, i, 1000) as u32).collect();
    for (timesteps, hidden, channels) in [
        (vec![0], 1, 1),
        (vec![999], 60, 60),
        (vec![0, 1, 999, 500, 1], 60, 44),
        (many, 37, 130),
        (vec![3, 700], 300, 9),
    ] {
        let label = format!("t {timesteps:?}, hidden {hidden}, C {channels}");
        check_operation(&label, &Case { timesteps, hidden, channels });
    }
}

#[test]
fn on_cuda() {
    for (timesteps, hidden, channels) in [(vec![999], 64, 64), (vec![0, 1, 999, 500, 1, 7, 8, 9, 10], 40, 72)] {
        let label = format!("t {timesteps:?}, hidden {hidden}, C {channels}");
        cuda::check_on_cuda(&label, &Case { timesteps, hidden, channels });
    }
}

#[test]
fn waves_are_right_to_the_last_bit_but_one() {
    let t: Vec<u32> = (0..1000).collect();
    let weights = vec![0.0; FREQUENCIES + 4];
    let mut memory = Memory::new();
    let mut tape = Tape::inference(&weights, &mut memory);
    let (_, waves) = timestep_embed(&mut tape, &t, any_linear(1, FREQUENCIES), any_linear(1, 1)).unwrap();
    assert_eq!(tape.shape(waves), [1000, FREQUENCIES]);
    for (&t, row) in t.iter().zip(tape.value(waves).chunks_exact(FREQUENCIES)) {
        for (i, (&got, expected)) in row.iter().zip(reference::waves::<f64>(t)).enumerate() {
            let err = (f64::from(got) - expected).abs();
            assert!(err <= 6.1e-8, "wave {i} of {t} is {got}, expected {expected}");
        }
    }
}

#[test]
fn the_reference_has_the_slopes_it_says() {
    check_slopes("timestep_embed", &Case { timesteps: vec![0, 17, 999], hidden: 5, channels: 4 });
}

#[test]
fn misfits_are_refused() {
    check_refused("timestep_embed", "weights are [3, 255] and [4, 3]", |tape| {
        Ok(timestep_embed(tape, &[1], any_linear(3, 255), any_linear(4, 3))?.0)
    });
    check_refused("timestep_embed", "weights are [3, 256] and [4, 5]", |tape| {
        Ok(timestep_embed(tape, &[1], any_linear(3, 256), any_linear(4, 5))?.0)
    });
}
