//! What a tape refuses, and that it says so instead of computing with numbers that are not there.

mod common;

use common::numbers;
use dtr_fused::autograd::{Memory, Tape, Var};
use dtr_fused::error::Result;
use dtr_fused::model::config::ModelConfig;
use dtr_fused::model::dit::{Dit, Init};
use dtr_fused::ops::attention::attention;
use dtr_fused::ops::channel_mask::{Keep, channel_mask};
use dtr_fused::ops::label_embed::label_embed;
use dtr_fused::ops::modulation::modulation;
use dtr_fused::ops::timestep_embed::timestep_embed;
use dtr_fused::params::{Layout, Linear, Param};
use dtr_fused::routing::Routing;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn sizes_that_wrap_around_are_not_those_of_nothing() {
    let mut memory = Memory::new();
    let mut tape = Tape::inference(&[], &mut memory);
    let message = tape.input(&[], [1 << 32, 1 << 32, 3], true).unwrap_err().to_string();
    assert!(message.contains("0 numbers cannot have the shape [4294967296, 4294967296, 3]"), "{message}");
    assert!(tape.input(&numbers(1, 24), [2, 3, 4], true).is_ok());
}

fn model() -> Dit {
    Dit::new(ModelConfig {
        hidden_size: 24,
        depth: 2,
        num_heads: 2,
        patch_size: 2,
        input_size: 4,
        in_channels: 1,
        num_classes: 3,
        null_class: true,
        mlp_ratio: 2.0,
        learn_sigma: true,
        routing: Routing::Paper,
        beta: 0.7,
        alpha: 4.0,
        routing_seed: 0,
    })
    .unwrap()
}

#[test]
fn what_was_released_is_refused_and_not_read_as_nothing() {
    let dit = model();
    let weights = dit.init(1, Init::Small);
    let mut memory = Memory::new();
    let mut tape = Tape::inference(&weights, &mut memory);
    let images = tape.input(&numbers(1, 2 * 16), [2, 1, 4, 4], false).unwrap();
    let trace = dit.forward_traced(&mut tape, images, &[3, 900], &[0, 1]).unwrap();
    let (gone, there) = (trace.blocks[0], tape.input(&numbers(2, 2 * 4 * 24), [2, 4, 24], false).unwrap());
    let mask = tape.input(&numbers(3, 2 * 24), [2, 24], false).unwrap();
    assert_eq!(tape.read(trace.out).unwrap().len(), 2 * 2 * 16);
    assert_eq!(tape.shape(gone), [0; 0]);
    for (name, refused) in [
        ("read", tape.read(gone).map(|_| ())),
        ("attention", attention(&mut tape, gone, 2).map(|_| ())),
        ("x", channel_mask(&mut tape, None, gone, mask, Keep::Active).map(|_| ())),
        ("base", channel_mask(&mut tape, Some(gone), there, mask, Keep::Active).map(|_| ())),
        ("mask", channel_mask(&mut tape, None, there, gone, Keep::Active).map(|_| ())),
    ] {
        let message = refused.expect_err(name).to_string();
        assert!(message.contains("was released"), "{name}: {message}");
    }
    let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tape.value(gone).len()));
    assert!(read.unwrap_err().downcast_ref::<String>().is_some_and(|message| message.contains("was released")));
}

/// Attention of 4 tokens, on a tape, and its operand.
fn attend(tape: &mut Tape) -> (Var, Var) {
    let qkv = tape.input(&numbers(5, 2 * 4 * 24), [2, 4, 24], true).unwrap();
    (qkv, attention(tape, qkv, 2).unwrap())
}

#[test]
fn a_backward_pass_that_is_refused_costs_nothing() {
    let (mut memory, upstream) = (Memory::new(), numbers(6, 2 * 4 * 8));
    let mut tape = Tape::inference(&[], &mut memory);
    let (_, y) = attend(&mut tape);
    let given = tape.input(&upstream, [2, 4, 8], false).unwrap();
    assert!(tape.backward_with(y, given).is_err() && tape.value(given) == upstream);

    let mut tape = Tape::new(&[], &mut [], false, &mut memory);
    let (qkv, y) = attend(&mut tape);
    let short = tape.input(&upstream[1..], [63], false).unwrap();
    assert!(tape.backward(y, &upstream[1..]).is_err() && tape.backward_with(y, short).is_err());
    assert_eq!(tape.value(short), &upstream[1..]);
    // What an operation made, and what one may have read.
    let early = tape.input(&upstream, [2, 4, 8], false).unwrap();
    let (_, other) = attend(&mut tape);
    let mask = tape.input(&[1.0; 16], [2, 8], false).unwrap();
    let made = channel_mask(&mut tape, None, early, mask, Keep::Active).unwrap();
    for used in [made, other, early, y] {
        let message = tape.backward_with(y, used).unwrap_err().to_string();
        assert!(message.contains("the last that is put on the tape"), "{message}");
    }
    let last = tape.input(&upstream, [2, 4, 8], false).unwrap();
    tape.backward_with(y, last).unwrap();
    let found = tape.gradient(qkv).unwrap().to_vec();
    assert!(tape.read(last).is_err() && tape.backward(y, &upstream).is_err());

    let mut tape = Tape::new(&[], &mut [], false, &mut memory);
    let (qkv, y) = attend(&mut tape);
    tape.backward(y, &upstream).unwrap();
    assert_eq!(tape.gradient(qkv).unwrap(), found);
}

/// Two layers of `[4, 4]` that follow each other, and a table of labels in between; gradients of all weights, which were 9.
fn two_layers(layers: [Linear; 2], weights: &[f32], add: bool) -> (Result<()>, Vec<f32>) {
    let (mut memory, mut grads) = (Memory::new(), vec![9.0; weights.len()]);
    let mut tape = Tape::new(weights, &mut grads, add, &mut memory);
    let x = tape.input(&numbers(7, 12), [3, 4], false).unwrap();
    let x = modulation(&mut tape, x, layers[0]).unwrap();
    let table = Param { offset: 40, len: 8 };
    let x = label_embed(&mut tape, x, table, &[1, 0, 1]).unwrap();
    let y = modulation(&mut tape, x, layers[1]).unwrap();
    let done = tape.backward(y, &[1.0; 12]);
    (done, grads)
}

#[test]
fn a_parameter_that_is_used_twice_is_refused_unless_gradients_are_added() {
    let mut layout = Layout::default();
    let [first, second] = ["first", "second"].map(|name| layout.push_linear(name, 4, 4));
    layout.push("table", &[2, 4]);
    layout.push("unused", &[3]);
    let weights = numbers(8, layout.len());
    let (done, grads) = two_layers([first, second], &weights, false);
    done.unwrap();
    assert!(grads[..48].iter().all(|&g| g != 9.0) && grads[48..] == [9.0; 3], "{grads:?}");
    // The same layer, and one that shares its last row.
    let shifted = Linear { weight: Param { offset: 12, len: 16 }, bias: second.bias, ..first };
    for other in [first, shifted] {
        let message = two_layers([first, other], &weights, false).0.unwrap_err().to_string();
        assert!(message.contains("two layers have the weights"), "{message}");
    }
    // The two layers of one operation.
    let mut layout = Layout::default();
    let layer = layout.push_linear("both", 256, 256);
    let (weights, mut memory) = (numbers(9, layout.len()), Memory::new());
    let mut grads = vec![0.0; weights.len()];
    let mut tape = Tape::new(&weights, &mut grads, false, &mut memory);
    let (y, _) = timestep_embed(&mut tape, &[5], layer, layer).unwrap();
    let message = tape.backward(y, &[1.0; 256]).unwrap_err().to_string();
    assert!(message.contains("two layers have the weights"), "{message}");
    // What one layer twice adds up to is the sum of what two that are the same get.
    let mut equal = numbers(8, 51);
    equal.copy_within(0..20, 20);
    let (done, apart) = two_layers([first, second], &equal, false);
    done.unwrap();
    let (done, together) = two_layers([first, first], &equal, true);
    done.unwrap();
    for i in 0..20 {
        let expected = 9.0 + apart[i] + apart[20 + i];
        assert!(
            (together[i] - expected).abs() <= 1e-5 * expected.abs().max(1.0),
            "{i}: {} for {expected}",
            together[i]
        );
    }
}

#[test]
fn checkpointed_work_makes_its_result_and_the_same_one_again() {
    let mut memory = Memory::new();
    let refused = |message: String, what: &str| assert!(message.contains(what), "{message}");
    let mut tape = Tape::inference(&[], &mut memory);
    let (qkv, _) = attend(&mut tape);
    refused(tape.checkpointed(move |_| Ok(qkv)).unwrap_err().to_string(), "was on the tape before");
    let mut tape = Tape::new(&[], &mut [], false, &mut memory);
    let (qkv, _) = attend(&mut tape);
    refused(tape.checkpointed(move |_| Ok(qkv)).unwrap_err().to_string(), "was on the tape before");
    // What was refused is not recorded, and the tape goes on recording.
    let y = tape.checkpointed(move |tape| attention(tape, qkv, 2)).unwrap();
    tape.backward(y, &numbers(6, 64)).unwrap();

    let mut tape = Tape::new(&[], &mut [], false, &mut memory);
    let (qkv, _) = attend(&mut tape);
    let wide = tape.input(&numbers(5, 3 * 4 * 24), [3, 4, 24], true).unwrap();
    let times = AtomicUsize::new(0);
    let changing = move |tape: &mut Tape| match times.fetch_add(1, Ordering::Relaxed) {
        0 => attention(tape, qkv, 2),
        _ => attention(tape, wide, 2),
    };
    let y = tape.checkpointed(changing).unwrap();
    let message = tape.backward(y, &numbers(6, 64)).unwrap_err().to_string();
    refused(message, "the work made [2, 4, 8], but [3, 4, 8]");
}
