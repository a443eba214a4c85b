//! What a tape refuses, and that it says so instead of computing with numbers that are not there.

mod common;

use common::numbers;
use dtr_fused::autograd::{Memory, Tape};

#[test]
fn sizes_that_wrap_around_are_not_those_of_nothing() {
    let mut memory = Memory::new();
    let mut tape = Tape::inference(&[], &mut memory);
    let message = tape.input(&[], [1 << 32, 1 << 32, 3], true).unwrap_err().to_string();
    assert!(message.contains("0 numbers cannot have the shape [4294967296, 4294967296, 3]"), "{message}");
    assert!(tape.input(&numbers(1, 24), [2, 3, 4], true).is_ok());
}
