//! The example trains and samples.

#[path = "../examples/train_on_cpu.rs"]
mod train_on_cpu;

#[test]
fn the_example_runs() {
    train_on_cpu::main().unwrap();
}
