//! Pictures for people: a grid of samples as a PNG.

use std::io::Write;
use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::atomic_file::AtomicFile;
use crate::error::{Error, Result};

/// Pixels between the samples of a grid (and around it).
const GAP: usize = 2;

/// Grey of the gaps: seen beside black and beside white.
const GAP_GREY: u8 = 160;

/// Writes `pixels` `[N,C,H,W]` (`shape`) as a PNG of `columns` samples per row, each pixel as a square of `scale` x `scale`.
///
/// The first three channels are shown as RGB (the first as grey, if there are fewer): those of `images` from -1, black, to 1,
/// full, cut beyond; those of latents each stretched from its smallest to its largest value in the whole grid. What is not a
/// number is black. The file appears whole or not at all.
///
/// # Errors
/// [`Error::Usage`] when the sizes do not fit together, one is 0, or the picture would be larger than a PNG can be;
/// [`Error::File`] when writing fails.
pub fn grid_png(
    path: impl AsRef<Path>,
    pixels: &[f32],
    shape: [usize; 4],
    columns: usize,
    scale: usize,
    images: bool,
) -> Result<()> {
    let grid = Grid::new(pixels, shape, columns, scale, images)?;
    let mut file = AtomicFile::create(path.as_ref())?;
    let encoder = PngEncoder::new(&mut file);
    let encoded = encoder.write_image(&grid.draw(), grid.width as u32, grid.height as u32, ExtendedColorType::Rgb8);
    encoded.map_err(|e| file.error(&e))?;
    file.flush().map_err(|e| file.error(&e))?;
    file.commit()
}

/// Where everything is in the picture.
struct Grid<'a> {
    pixels: &'a [f32],
    shape: [usize; 4],
    columns: usize,
    scale: usize,
    width: usize,
    height: usize,
    images: bool,
}

impl<'a> Grid<'a> {
    fn new(pixels: &'a [f32], shape: [usize; 4], columns: usize, scale: usize, images: bool) -> Result<Self> {
        let elements = shape.iter().try_fold(1usize, |n, &side| n.checked_mul(side));
        if elements != Some(pixels.len()) || pixels.is_empty() || columns == 0 || scale == 0 {
            let what = format!(
                "{} numbers of shape {shape:?} in {columns} columns at scale {scale} are no picture",
                pixels.len()
            );
            return Err(Error::usage(what));
        }
        let [n, _, h, w] = shape;
        let columns = columns.min(n);
        let side = |count: usize, cell: usize| {
            let cell = cell.checked_mul(scale)?.checked_add(GAP)?;
            count.checked_mul(cell)?.checked_add(GAP).filter(|&side| side <= i32::MAX as usize)
        };
        let (width, height) = (side(columns, w), side(n.div_ceil(columns), h));
        match width.zip(height).filter(|(w, h)| w * h <= i32::MAX as usize) {
            Some((width, height)) => Ok(Grid { pixels, shape, columns, scale, width, height, images }),
            None => Err(Error::usage(format!("{n} pictures of {w}x{h} at scale {scale} are too many for one grid"))),
        }
    }

    /// The picture, RGB.
    fn draw(&self) -> Vec<u8> {
        let [n, channels, h, w] = self.shape;
        let plane = h * w;
        let shown = if channels < 3 { [0, 0, 0] } else { [0, 1, 2] };
        let ranges = shown.map(|c| if self.images { (-1.0, 1.0) } else { self.range(c) });
        let mut picture = vec![GAP_GREY; self.width * self.height * 3];
        for i in 0..n {
            let sample = &self.pixels[i * channels * plane..][..channels * plane];
            let left = GAP + i % self.columns * (w * self.scale + GAP);
            let top = GAP + i / self.columns * (h * self.scale + GAP);
            for y in 0..h * self.scale {
                let row = &mut picture[((top + y) * self.width + left) * 3..][..w * self.scale * 3];
                for (x, rgb) in row.chunks_exact_mut(3).enumerate() {
                    let place = y / self.scale * w + x / self.scale;
                    for ((value, &c), &(low, high)) in rgb.iter_mut().zip(&shown).zip(&ranges) {
                        *value = byte(sample[c * plane + place], low, high);
                    }
                }
            }
        }
        picture
    }

    /// Smallest and largest finite value of channel `c`.
    fn range(&self, c: usize) -> (f32, f32) {
        let [_, channels, h, w] = self.shape;
        let planes = self.pixels.chunks_exact(h * w).skip(c).step_by(channels);
        let finite = planes.flatten().copied().filter(|x| x.is_finite());
        finite.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    }
}

/// `low` is 0, `high` is 255, the nearest in between.
fn byte(x: f32, low: f32, high: f32) -> u8 {
    // The cast cuts off at 0 and 255 and makes NaN 0.
    ((x - low) / (high - low) * 255.0).round() as u8
}

/// The picture's values as bytes: -1 is 0, 1 is 255, the nearest in between, cut beyond; what is not a number is 0.
pub fn to_byte(x: f32) -> u8 {
    byte(x, -1.0, 1.0)
}
