//! The example learns what it is shown.

#[path = "../examples/train_on_cpu.rs"]
#[allow(dead_code, reason = "its main")]
mod train_on_cpu;

#[test]
fn the_example_trains_and_samples() {
    let place = tempfile::tempdir().unwrap();
    let (loss, images) = train_on_cpu::train(place.path()).unwrap();
    assert!(loss < 0.1, "{loss}");
    assert!(place.path().join("checkpoints/0000400/ema.safetensors").exists());
    for (number, image) in images.chunks(64).enumerate() {
        let white = |at: usize| if number < 2 { at / 8 < 4 } else { at % 8 < 4 };
        let right = image.iter().enumerate().filter(|&(at, &x)| (x > 0.0) == white(at)).count();
        assert!(right > 56, "{right} of 64 pixels of image {number}");
    }
}
