//! Grids of samples as PNG files.

use dtr_fused::picture::{grid_png, to_byte};
use image::RgbImage;

/// The grid of images, or of latents where there are as many channels as latents have.
fn draw(pixels: &[f32], shape: [usize; 4], columns: usize, scale: usize) -> RgbImage {
    draw_as(matches!(shape[1], 1 | 3), pixels, shape, columns, scale)
}

fn draw_as(images: bool, pixels: &[f32], shape: [usize; 4], columns: usize, scale: usize) -> RgbImage {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("grid.png");
    grid_png(&path, pixels, shape, columns, scale, images).unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "temporary files are left behind");
    image::open(path).unwrap().into_rgb8()
}

const GAP: [u8; 3] = [160; 3];

#[test]
fn grey_samples_stand_in_rows_with_gaps() {
    // Three samples of 1x2 in two columns, each pixel 3x3.
    let picture = draw(&[-1.0, 1.0, 0.0, -2.0, f32::NAN, 7.0], [3, 1, 1, 2], 2, 3);
    assert_eq!(picture.dimensions(), (2 + 2 * (6 + 2), 2 + 2 * (3 + 2)));
    let at = |x, y| picture.get_pixel(x, y).0;
    assert_eq!([at(0, 0), at(1, 2), at(8, 3), at(2, 5), at(17, 11)], [GAP; 5]);
    assert_eq!([at(2, 2), at(4, 4), at(5, 2), at(7, 4)], [[0; 3], [0; 3], [255; 3], [255; 3]]);
    assert_eq!([at(10, 2), at(13, 4)], [[128; 3], [0; 3]], "the second sample, cut below -1");
    assert_eq!([at(2, 7), at(5, 9)], [[0; 3], [255; 3]], "the third sample: not a number, cut above 1");
    assert_eq!(at(12, 8), GAP, "there is no fourth sample");
}

#[test]
fn colours_are_colours() {
    let picture = draw(&[1.0, -1.0, -1.0, 1.0, 0.2, 0.6], [1, 3, 1, 2], 5, 1);
    assert_eq!(picture.dimensions(), (6, 5));
    assert_eq!(picture.get_pixel(2, 2).0, [255, 0, 153]);
    assert_eq!(picture.get_pixel(3, 2).0, [0, 255, 204]);
}

#[test]
fn latents_are_stretched_over_the_whole_grid() {
    // Two samples of 4x1x1: channel 0 is 10 and 20, channel 1 constant, channel 2 not finite once.
    let picture = draw(&[10.0, 3.0, f32::INFINITY, 9.0, 20.0, 3.0, -5.0, 9.0], [2, 4, 1, 1], 2, 1);
    assert_eq!(picture.get_pixel(2, 2).0[0], 0);
    assert_eq!(picture.get_pixel(5, 2).0[0], 255);
    let two = draw(&[1.0, 9.0, 2.0, 9.0, 3.0, 9.0], [3, 2, 1, 1], 3, 1);
    assert_eq!([2, 5, 8].map(|x| two.get_pixel(x, 2).0), [[0; 3], [128; 3], [255; 3]], "two channels: the first, grey");
    let three = draw_as(false, &[10.0, 0.0, 7.0, 20.0, 8.0, 7.5], [2, 3, 1, 1], 2, 1);
    assert_eq!([2, 5].map(|x| three.get_pixel(x, 2).0), [[0; 3], [255; 3]], "three channels may be latents too");
}

#[test]
fn bytes_are_the_nearest() {
    assert_eq!([-1.0, 1.0, 0.0, -9.0, 9.0, f32::NAN].map(to_byte), [0, 255, 128, 0, 255, 0]);
    assert!((0..=255u8).all(|v| to_byte(f32::from(v) / 127.5 - 1.0) == v));
}

#[test]
fn grids_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("grid.png");
    let refusal = |pixels: &[f32], shape, columns, scale| {
        grid_png(&path, pixels, shape, columns, scale, true).unwrap_err().to_string()
    };
    assert!(refusal(&[0.0; 5], [1, 1, 2, 3], 1, 1).contains("5 numbers of shape [1, 1, 2, 3]"));
    assert!(refusal(&[], [0, 1, 2, 3], 1, 1).contains("are no picture"));
    assert!(refusal(&[0.0; 6], [1, 1, 2, 3], 0, 1).contains("in 0 columns"));
    assert!(refusal(&[0.0; 6], [1, 1, 2, 3], 1, 0).contains("at scale 0"));
    assert!(refusal(&[0.0; 6], [1, 1, 2, 3], 1, 1 << 40).contains("too many for one grid"));
    assert!(refusal(&[0.0; 6], [1, 1, 2, 3], 1, usize::MAX).contains("too many for one grid"));
    assert!(refusal(&[0.0; 6], [1 << 60, 1 << 60, 2, 3], 1, 1).contains("are no picture"));
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    let error = grid_png(dir.path().join("missing/grid.png"), &[0.0], [1; 4], 1, 1, true).unwrap_err().to_string();
    assert!(error.contains("missing/grid.png: cannot be written"), "{error}");
}
