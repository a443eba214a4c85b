//! Square images as ADM and DiT make them: halve while the image is twice too large, scale bicubically, cut out the middle.
//!
//! Both scalings are Pillow's, bit for bit: each output pixel is a weighted mean over the support of the filter (stretched
//! by the scale when shrinking), first along rows, then along columns, in 22-bit fixed point and rounded to 8 bits after each
//! pass. `tests/data_images.rs` holds them against Pillow's own output.

use image::{Rgb, RgbImage};

/// Bits after the point of a weight: with 8 bits of pixel and 2 spare (weights overshoot), 32 in all.
const FRACTION: u32 = 22;

/// The `size` x `size` middle of `image`, whose shorter side is first scaled to `size`.
pub fn center_crop(mut image: RgbImage, size: u32) -> RgbImage {
    while image.width().min(image.height()) >= 2 * size {
        let (width, height) = (image.width() / 2, image.height() / 2);
        let columns = axis(image.width(), width, 0..width, 0.5, area);
        let rows = axis(image.height(), height, 0..height, 0.5, area);
        image = resample(&image, &columns, &rows);
    }
    let scale = f64::from(size) / f64::from(image.width().min(image.height()));
    let middle = |side: u32| {
        let scaled = (f64::from(side) * scale).round_ties_even() as u32;
        let first = (scaled - size) / 2;
        // Only what the crop keeps is computed: a thin image could otherwise grow without bound.
        axis(side, scaled, first..first + size, 2.0, bicubic)
    };
    let (columns, rows) = (middle(image.width()), middle(image.height()));
    resample(&image, &columns, &rows)
}

/// Which pixels of the input an output pixel is made of.
struct Tap {
    first: u32,
    weights: Vec<i32>, // times 2^FRACTION, sum 1
}

/// Mean of the pixels under the stretched box.
fn area(x: f64) -> f64 {
    f64::from(u8::from(x > -0.5 && x <= 0.5))
}

/// Keys' cubic convolution with a = -1/2.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Taps of the outputs `wanted` when a side of `from` pixels becomes one of `to`.
fn axis(from: u32, to: u32, wanted: std::ops::Range<u32>, support: f64, filter: fn(f64) -> f64) -> Vec<Tap> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let support = support * stretch;
    let tap = |out: u32| {
        let center = (f64::from(out) + 0.5) * scale;
        // Conversions to unsigned cut at 0, as wanted at the left edge.
        let first = (center - support + 0.5) as u32;
        let last = ((center + support + 0.5) as u32).min(from);
        let mut weights: Vec<f64> =
            (first..last).map(|x| filter((f64::from(x) - center + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = weights.iter().sum();
        if sum != 0.0 {
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        let fixed = |w: f64| (w * f64::from(1 << FRACTION) + 0.5_f64.copysign(w)) as i32;
        Tap { first, weights: weights.into_iter().map(fixed).collect() }
    };
    wanted.map(tap).collect()
}

/// The image with one column per tap of `columns` and one row per tap of `rows`.
fn resample(image: &RgbImage, columns: &[Tap], rows: &[Tap]) -> RgbImage {
    let (width, wide) = (columns.len(), image.width() as usize);
    let pixels = image.as_raw().as_chunks::<3>().0;
    // Rows that no tap needs are left out: of a thin image those are nearly all.
    let first = rows.iter().map(|tap| tap.first as usize).min().unwrap_or(0);
    let end = rows.iter().map(|tap| tap.first as usize + tap.weights.len()).max().unwrap_or(0);
    let mut narrow = Vec::with_capacity(width * (end - first));
    for row in pixels.chunks_exact(wide).take(end).skip(first) {
        narrow.extend(columns.iter().map(|tap| mean(tap, row[tap.first as usize..].iter())));
    }
    let mut out = Vec::with_capacity(width * rows.len());
    for tap in rows {
        let top = &narrow[(tap.first as usize - first) * width..];
        out.extend((0..width).map(|x| mean(tap, top[x..].iter().step_by(width))));
    }
    RgbImage::from_fn(width as u32, rows.len() as u32, |x, y| Rgb(out[y as usize * width + x as usize]))
}

/// The weighted mean of as many of `pixels` as there are weights.
#[inline(always)]
fn mean<'a>(tap: &Tap, pixels: impl Iterator<Item = &'a [u8; 3]>) -> [u8; 3] {
    let mut sum = [1i32 << (FRACTION - 1); 3];
    for (&weight, pixel) in tap.weights.iter().zip(pixels) {
        for (sum, &value) in sum.iter_mut().zip(pixel) {
            *sum += weight * i32::from(value);
        }
    }
    sum.map(|s| (s >> FRACTION).clamp(0, 255) as u8)
}
