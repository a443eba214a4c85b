//! The checks that hold operations against their references can fail: each is given something wrong and must say so.

mod common;

use common::*;
use dtr_fused::autograd::{Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::ops::modulation::{modulation, reference};
use dtr_fused::ops::real::Real;
use std::panic::{AssertUnwindSafe, catch_unwind};

fn expected() -> Expected {
    Expected { truth: vec![1.0, -2.0, 0.0, 0.5], plain_error: 1e-6, cancellation: 0.0, exact_zeros: true }
}

#[test]
fn a_small_error_passes() {
    assert_eq!(expected().check("x", 2.0, &[1.0, -2.000_002, 0.0, 0.499_999]), Ok(()));
}

#[test]
fn a_perturbed_value_fails() {
    for (i, change) in [(0, 4e-6), (1, -4e-6), (3, 4e-6)] {
        let mut x = [1.0, -2.0, 0.0, 0.5];
        x[i] += change;
        assert!(expected().check("x", 2.0, &x).is_err(), "{i}");
    }
}

#[test]
fn what_is_not_a_finite_number_fails() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for i in 0..4 {
            let mut x = [1.0, -2.0, 0.0, 0.5];
            x[i] = bad;
            assert!(expected().check("x", 2.0, &x).is_err(), "{bad} at {i}");
        }
    }
}

#[test]
fn a_zero_that_is_only_nearly_zero_fails() {
    let mut expected = expected();
    assert!(expected.check("x", 2.0, &[1.0, -2.0, 1e-12, 0.5]).is_err());
    expected.exact_zeros = false;
    assert!(expected.check("x", 2.0, &[1.0, -2.0, 1e-12, 0.5]).is_ok());
}

#[test]
fn another_length_fails() {
    assert!(expected().check("x", 2.0, &[1.0, -2.0, 0.0]).is_err());
    assert!(expected().check("x", 2.0, &[1.0, -2.0, 0.0, 0.5, 0.0]).is_err());
}

#[test]
fn a_reference_that_is_not_a_number_fails() {
    for bad in [f64::NAN, f64::INFINITY] {
        assert!(Expected { plain_error: bad, ..expected() }.check("x", 2.0, &[1.0, -2.0, 0.0, 0.5]).is_err());
        assert!(Expected { truth: vec![bad], ..expected() }.check("x", 2.0, &[1.0]).is_err());
    }
}

/// The modulation with a reference that is wrong in one place.
struct Wrong {
    output: bool,
    gradient: Option<usize>,
}

impl Operation for Wrong {
    fn inputs(&self) -> Vec<Input> {
        vec![activation("c", [3, 8]), weight("weight", 5 * 8, 8), weight("bias", 5, 1)]
    }

    fn on_tape(&self, tape: &mut Tape, given: &Given) -> Result<Var> {
        modulation(tape, given.var("c"), given.linear("weight", "bias"))
    }

    fn forward<R: Real>(&self, inputs: &[Vec<R>]) -> Vec<R> {
        let mut y = reference::forward(&inputs[0], &inputs[1], &inputs[2]);
        if self.output {
            y[3] = y[3] * R::from_f64(1.0 + 1e-4);
        }
        y
    }

    fn backward<R: Real>(&self, inputs: &[Vec<R>], upstream: &[R]) -> Vec<Vec<R>> {
        let (dc, dweight, dbias) = reference::backward(&inputs[0], &inputs[1], upstream, 5);
        let mut grads = vec![dc, dweight, dbias];
        if let Some(i) = self.gradient {
            let g = &mut grads[i][4];
            *g = *g * R::from_f64(1.0 + 1e-4);
        }
        grads
    }
}

fn fails(work: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(work)).is_err()
}

#[test]
fn an_operation_that_differs_from_its_reference_fails() {
    check_operation("right", &Wrong { output: false, gradient: None });
    assert!(fails(|| check_operation("y", &Wrong { output: true, gradient: None })));
    for i in 0..3 {
        assert!(fails(|| check_operation("gradient", &Wrong { output: false, gradient: Some(i) })), "{i}");
    }
}

#[test]
fn a_reference_that_differs_from_its_slopes_fails() {
    check_slopes("right", &Wrong { output: false, gradient: None });
    for i in 0..3 {
        assert!(fails(|| check_slopes("gradient", &Wrong { output: false, gradient: Some(i) })), "{i}");
    }
}
