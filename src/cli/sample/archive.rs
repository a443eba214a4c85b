//! All images, in an archive or in a folder.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::files::shown;
use crate::atomic_file::AtomicFile;
use crate::data::npz::NpzWriter;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::train::TrainConfig;

/// Numbers of an image.
pub(super) fn image_len(config: &TrainConfig) -> usize {
    config.in_channels * config.image_size * config.image_size
}

/// The bytes of an image `[C, H, W]`, `[H, W, C]`.
fn bytes_of(image: &[f32], channels: usize) -> Vec<u8> {
    let pixels = image.len() / channels;
    // As the DiT authors round: half a step up, then down.
    let byte = |i: usize| (127.5 * image[i % channels * pixels + i / channels] + 128.0).clamp(0.0, 255.0) as u8;
    (0..image.len()).map(byte).collect()
}

/// A folder of pictures, `NUMBER-CLASS.png`.
pub(super) struct Folder<'a> {
    config: &'a TrainConfig,
    pub(super) path: &'a Path,
    color: ExtendedColorType,
    digits: usize,
}

impl<'a> Folder<'a> {
    /// A folder for the images `only` of all, which have these `labels`. It must be new, or hold none but others of all.
    pub(super) fn create(path: &'a Path, labels: &[u32], only: Range<usize>, config: &'a TrainConfig) -> Result<Self> {
        let color = match config.in_channels {
            1 if config.are_images() => ExtendedColorType::L8,
            3 if config.are_images() => ExtendedColorType::Rgb8,
            channels => {
                let kind = if config.are_images() { "images" } else { "latents" };
                return Err(Error::usage(format!(
                    "--images are pictures, but this model makes {kind} of {channels} channels: give --npz"
                )));
            }
        };
        let fail = |e: std::io::Error| Error::file(path, format!("cannot be written: {e}"));
        fs::create_dir_all(path).map_err(fail)?;
        let digits = (labels.len() - 1).to_string().len().max(6);
        let folder = Folder { config, path, color, digits };
        for entry in fs::read_dir(path).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            // What a kill left, or a file manager.
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let number = name.to_str().and_then(|name| name.split_once('-')?.0.parse().ok());
            let other = number.filter(|number| !only.contains(number) && *number < labels.len());
            if other.is_none_or(|number| *name != *folder.name(number, labels[number])) {
                let what =
                    format!("holds {}, which is none of the images that --only leaves out", shown(name.as_ref()));
                return Err(Error::file(path, what + ": give another folder"));
            }
        }
        AtomicFile::create(folder.path.join(folder.name(only.start, 0)))?;
        Ok(folder)
    }

    /// The name of image `number`.
    fn name(&self, number: usize, label: u32) -> String {
        format!("{number:0digits$}-{label}.png", digits = self.digits)
    }

    /// Writes the images from number `first` on, of which these are the `labels`.
    pub(super) fn write(&self, first: usize, images: &[f32], labels: &[u32]) -> Result<()> {
        let side = self.config.image_size as u32;
        for (i, image) in images.chunks_exact(image_len(self.config)).enumerate() {
            let mut file = AtomicFile::create(self.path.join(self.name(first + i, labels[i])))?;
            let encoder = PngEncoder::new(&mut file);
            let encoded = encoder.write_image(&bytes_of(image, self.config.in_channels), side, side, self.color);
            encoded.map_err(|e| file.error(&e))?;
            // Waiting for the disk after each would take longer than to make them.
            file.commit_unsynced()?;
        }
        Ok(())
    }

    /// Removes the images from number `first` on, of which these are the `labels`, as far as they were written.
    pub(super) fn remove(&self, first: usize, labels: &[u32]) {
        for (i, label) in labels.iter().enumerate() {
            let _ = fs::remove_file(self.path.join(self.name(first + i, *label)));
        }
    }
}

/// The .npz, written as the images come: all of them may be more than memory holds.
pub(super) struct Archive<'a> {
    config: &'a TrainConfig,
    path: PathBuf,
    file: NpzWriter,
}

impl<'a> Archive<'a> {
    pub(super) fn create(path: &Path, n: usize, config: &'a TrainConfig) -> Result<Self> {
        let (c, side) = (config.in_channels, config.image_size);
        let mut file = NpzWriter::create(path)?;
        match config.are_images() {
            true => file.begin("arr_0", Element::U8, &[n, side, side, c])?,
            false => file.begin("arr_0", Element::F32, &[n, c, side, side])?,
        }
        Ok(Archive { config, path: path.into(), file })
    }

    pub(super) fn write(&mut self, images: &[f32]) -> Result<()> {
        let c = self.config.in_channels;
        if !self.config.are_images() {
            return self.file.write(bytemuck::cast_slice(images));
        }
        images.chunks_exact(image_len(self.config)).try_for_each(|image| self.file.write(&bytes_of(image, c)))
    }

    /// Ends the images, of which the `labels` tell how many there are, and writes these. Returns the name of the file: another than was
    /// asked for if there is one by now, unless it may `replace` that.
    pub(super) fn finish(mut self, labels: &[u32], replace: bool) -> Result<PathBuf> {
        self.file.cut(labels.len())?;
        self.file.begin("arr_1", Element::I64, &[labels.len()])?;
        for &label in labels {
            self.file.write(&i64::from(label).to_le_bytes())?;
        }
        if replace { self.file.finish().map(|()| self.path) } else { self.file.finish_new() }
    }
}
