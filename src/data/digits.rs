//! The handwritten digits of `assets/`: 1,797 images of 8x8 pixels, so small that a CPU learns them in a minute.

use image::ImageFormat;

use super::Dataset;
use crate::error::{Error, Result};

const SIDE: usize = 8;
const PIXELS: usize = SIDE * SIDE;
const COLUMNS: usize = 45;

/// UCI optdigits as scikit-learn ships them; source and licence are in `assets/README.md`.
pub struct Digits {
    images: Vec<f32>, // [1797, 1, 8, 8], ink 0..16 as -1..1
    labels: Vec<u32>, // [1797]
    names: Vec<String>,
}

impl Digits {
    /// Unpacks the digits.
    ///
    /// # Errors
    /// Only when the program was built with damaged assets.
    pub fn new() -> Result<Self> {
        let damaged = |what: &dyn std::fmt::Display| {
            Error::file("assets/digits.png", format!("was damaged in this build: {what}"))
        };
        let labels: Vec<u32> = include_bytes!("../../assets/digits.txt").iter().map(|&c| u32::from(c - b'0')).collect();
        let sheet = image::load_from_memory_with_format(include_bytes!("../../assets/digits.png"), ImageFormat::Png);
        let sheet = sheet.map_err(|e| damaged(&e))?.into_luma8();
        let rows = labels.len().div_ceil(COLUMNS);
        if sheet.dimensions() != ((COLUMNS * SIDE) as u32, (rows * SIDE) as u32) {
            return Err(damaged(&format!("{:?} pixels", sheet.dimensions())));
        }
        let mut images = Vec::with_capacity(labels.len() * PIXELS);
        for i in 0..labels.len() {
            let (top, left) = (i / COLUMNS * SIDE, i % COLUMNS * SIDE);
            for y in top..top + SIDE {
                // A grey value is 15 times the ink, and 8 of ink is the middle.
                images
                    .extend((left..left + SIDE).map(|x| f32::from(sheet[(x as u32, y as u32)].0[0] / 15) / 8.0 - 1.0));
            }
        }
        Ok(Digits { images, labels, names: (0..10).map(|digit| digit.to_string()).collect() })
    }

    /// All images `[1797, 1, 8, 8]`, in [-1, 1].
    pub fn images(&self) -> &[f32] {
        &self.images
    }

    /// All labels `[1797]`, 0 to 9.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }
}

impl Dataset for Digits {
    fn shape(&self) -> [usize; 3] {
        [1, SIDE, SIDE]
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        out.copy_from_slice(&self.images[index * PIXELS..(index + 1) * PIXELS]);
        if flip {
            out.chunks_mut(SIDE).for_each(<[f32]>::reverse);
        }
        Ok(self.labels[index])
    }
}
