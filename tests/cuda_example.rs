//! The example runs, and what it computes is right: it compares with the reference itself.

mod common;

#[path = "../examples/fused_ops.rs"]
mod fused_ops;

#[test]
fn the_example_runs_on_memory_of_its_own() {
    // Opens nothing, but says where the simulator and NVRTC are.
    drop(common::cuda::device());
    fused_ops::main().unwrap();
}
