//! What sampling leaves behind: a grid of images, and all of them in an archive or a folder.

use std::fs;
use std::ops::Range;
use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use crate::atomic_file::{AtomicFile, check_target};
use crate::data::npz::NpzWriter;
use crate::element::Element;
use crate::error::{Error, Result, printable};
use crate::picture::grid_png;
use crate::train::progress::say;
use crate::train::{TrainConfig, samples};

/// A grid shows at most this many images of a class.
const GRID_COLUMNS: usize = 16;
/// A grid shows at most this many classes.
pub(super) const GRID_ROWS: usize = 64;

/// The files that images are made for, one image after the other.
pub(super) struct Files<'a> {
    out: &'a Path,
    npz: Option<&'a Path>,
    labels: &'a [u32],
    grid: Grid<'a>,
    archive: Option<Archive<'a>>,
    folder: Option<Folder<'a>>,
    made: usize,
}

/// Where all images are to be, beside the grid: an archive, and a folder.
#[derive(Clone, Copy)]
pub(super) struct All<'a> {
    pub(super) npz: Option<&'a Path>,
    pub(super) folder: Option<&'a Path>,
}

impl All<'_> {
    /// Whether they are to be anywhere.
    pub(super) fn are_kept(self) -> bool {
        self.npz.is_some() || self.folder.is_some()
    }
}

impl<'a> Files<'a> {
    /// Files for the images `only` of all, which have these `labels`. None has its name before it is whole.
    ///
    /// # Errors
    /// When one of them cannot be written, or would replace the `weights`.
    pub(super) fn create(
        out: &'a Path,
        all: All<'a>,
        weights: &Path,
        labels: &'a [u32],
        only: Range<usize>,
        config: &'a TrainConfig,
    ) -> Result<Self> {
        let All { npz, folder } = all;
        check_outputs(out, npz, weights)?;
        AtomicFile::create(out)?;
        let folder = folder.map(|path| Folder::create(path, labels.len(), only.clone(), config)).transpose()?;
        let labels = &labels[only];
        let archive = npz.map(|path| Archive::create(path, labels.len(), config)).transpose()?;
        Ok(Files { out, npz, labels, grid: Grid::new(labels, config), archive, folder, made: 0 })
    }

    /// How many images were taken.
    pub(super) fn made(&self) -> usize {
        self.made
    }

    /// What the grid leaves out, if anything, of the images or, unless they were `chosen`, of the classes.
    pub(super) fn note(&self, chosen: bool) -> Option<String> {
        self.grid.note(self.labels.len(), self.npz.is_some() || self.folder.is_some(), chosen)
    }

    /// Takes the next images.
    ///
    /// # Errors
    /// When the archive, which is given up then, or a picture cannot be written.
    pub(super) fn take(&mut self, images: &[f32]) -> Result<()> {
        self.grid.take(self.made, images);
        let written = self.archive.as_mut().map_or(Ok(()), |archive| archive.write(images));
        written.inspect_err(|_| self.archive = None)?;
        let labels = &self.labels[self.made..];
        self.folder.as_mut().map_or(Ok(()), |folder| folder.write(images, labels))?;
        self.made += images.len() / image_len(self.grid.config);
        Ok(())
    }

    /// Writes the files, and says where the samples of `name` are. Either is written even if the other cannot be.
    ///
    /// # Errors
    /// When one of them cannot be written.
    pub(super) fn finish(self, name: &Path) -> Result<()> {
        let Files { out, npz, labels, grid, archive, folder, made } = self;
        let archived = archive.map_or(Ok(()), |archive| archive.finish(labels));
        let drawn = grid.write(out, made);
        let [name, out] = [name, out].map(shown);
        if drawn.is_ok() {
            println!("Samples of {name} are in {out}");
        }
        if let (Some(npz), Ok(())) = (npz, &archived) {
            println!("{made} images of {name} are in {}", shown(npz));
        }
        if let Some(folder) = folder {
            println!("{made} images of {name} are in {}", shown(folder.path));
        }
        archived.and(drawn)
    }

    /// Keeps what there is in the archive, if there is one and none of that name was there before, as in the folder, and a grid of it. Says
    /// how much is where, if anything is.
    ///
    /// # Errors
    /// When the archive cannot be written.
    pub(super) fn keep(self) -> Result<Option<String>> {
        let Files { out, npz, labels, grid, archive, folder, made: made @ 1.. } = self else {
            return Ok(None);
        };
        let mut places: Vec<String> = folder.iter().map(|folder| shown(folder.path)).collect();
        // What was there before may be whole.
        if let (Some(npz), Some(archive)) = (npz.filter(|npz| !npz.exists()), archive) {
            archive.finish(&labels[..made])?;
            places.push(shown(npz));
        }
        if places.is_empty() {
            return Ok(None);
        }
        grid.write(out, made).unwrap_or_else(|e| say(&format!("no grid: {}", printable(&e.to_string()))));
        Ok(Some(format!("; {made} of {} images are in {}", labels.len(), places.join(" and "))))
    }
}

/// A path as messages show it.
fn shown(path: &Path) -> String {
    printable(&path.display().to_string())
}

/// Refuses files that cannot both be written, or not without losing the weights.
fn check_outputs(out: &Path, npz: Option<&Path>, weights: &Path) -> Result<()> {
    for (path, ending) in [(Some(out), "png"), (npz, "npz")] {
        let Some(path) = path else { continue };
        check_target(path)?;
        // A slip of the hand must not cost weights.
        if path.exists() && !path.extension().is_some_and(|found| found.eq_ignore_ascii_case(ending)) {
            return Err(Error::file(path, format!("is there already, and no .{ending}: give the name of a new file")));
        }
    }
    // `a` and `./a` are the same file, which need not exist yet.
    let place = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (parent.canonicalize().unwrap_or_else(|_| parent.into()), path.file_name().map(ToOwned::to_owned))
    };
    if let Some(path) = [Some(out), npz].into_iter().flatten().find(|path| place(path) == place(weights)) {
        return Err(Error::file(path, "holds the weights: give the name of another file to write"));
    }
    match npz {
        Some(npz) if place(npz) == place(out) => Err(Error::usage(format!(
            "--out and --npz are both {}, but a file can hold the grid or the archive: give two names",
            npz.display()
        ))),
        _ => Ok(()),
    }
}

/// The first images of each class, a row a class; classes with fewer end in black.
struct Grid<'a> {
    config: &'a TrainConfig,
    shown: Vec<(usize, usize)>, // number of the image, its place in the grid; by the first
    columns: usize,
    rows: usize,
    pixels: Vec<f32>, // [rows * columns, C, H, W]
}

impl<'a> Grid<'a> {
    fn new(labels: &[u32], config: &'a TrainConfig) -> Self {
        let classes: Vec<&[u32]> = labels.chunk_by(|a, b| a == b).take(GRID_ROWS).collect();
        let columns = classes.iter().map(|class| class.len()).max().unwrap_or(1).min(GRID_COLUMNS);
        let (mut shown, mut first) = (Vec::new(), 0);
        for (row, class) in classes.iter().enumerate() {
            shown.extend((0..class.len().min(columns)).map(|i| (first + i, row * columns + i)));
            first += class.len();
        }
        let pixels = vec![-1.0; classes.len() * columns * image_len(config)];
        Grid { config, shown, columns, rows: classes.len(), pixels }
    }

    /// What it leaves out of `made` images or, unless they were `chosen`, of the classes, if anything.
    fn note(&self, made: usize, archived: bool, chosen: bool) -> Option<String> {
        let (shown, all) = (self.shown.len(), self.config.num_classes);
        if shown < made {
            let rest = if archived { "" } else { "; --npz FILE keeps them all" };
            return Some(format!(
                "the grid shows {shown} of {made} images: {GRID_COLUMNS} of a class and {GRID_ROWS} classes at most{rest}"
            ));
        }
        (!chosen && self.rows == GRID_ROWS && all > GRID_ROWS)
            .then(|| format!("the grid shows {GRID_ROWS} of {all} classes: choose others with --classes"))
    }

    /// Keeps what it shows of `images`, of which the first is number `first`.
    fn take(&mut self, first: usize, images: &[f32]) {
        let len = image_len(self.config);
        let after = first + images.len() / len;
        for &(image, place) in self.shown.iter().filter(|(image, _)| (first..after).contains(image)) {
            self.pixels[place * len..][..len].copy_from_slice(&images[(image - first) * len..][..len]);
        }
    }

    /// Writes the rows of the first `made` images.
    fn write(&self, path: &Path, made: usize) -> Result<()> {
        let (channels, side) = (self.config.in_channels, self.config.image_size);
        let last = self.shown.iter().rev().find(|(image, _)| *image < made).map_or(0, |&(_, place)| place);
        let n = (last / self.columns + 1) * self.columns;
        grid_png(
            path,
            &self.pixels[..n * image_len(self.config)],
            [n, channels, side, side],
            self.columns,
            samples::scale_of(side),
            self.config.are_images(),
        )
    }
}

/// Numbers of an image.
fn image_len(config: &TrainConfig) -> usize {
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
struct Folder<'a> {
    config: &'a TrainConfig,
    path: &'a Path,
    color: ExtendedColorType,
    next: usize,
    digits: usize,
}

impl<'a> Folder<'a> {
    /// A folder for the images `only` of `n`. It must be new or empty, but parts of all may come together in one.
    fn create(path: &'a Path, n: usize, only: Range<usize>, config: &'a TrainConfig) -> Result<Self> {
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
        if only.len() == n && fs::read_dir(path).map_err(fail)?.next().is_some() {
            return Err(Error::file(path, "is not empty: give another folder"));
        }
        Ok(Folder { config, path, color, next: only.start, digits: (n - 1).to_string().len().max(6) })
    }

    /// Writes the next images, of which these are the `labels`.
    fn write(&mut self, images: &[f32], labels: &[u32]) -> Result<()> {
        let side = self.config.image_size as u32;
        for (image, label) in images.chunks_exact(image_len(self.config)).zip(labels) {
            let path = self.path.join(format!("{:0digits$}-{label}.png", self.next, digits = self.digits));
            let temporary = path.with_extension("tmp");
            let mut png = Vec::new();
            let encoder = PngEncoder::new(&mut png);
            let encoded = encoder.write_image(&bytes_of(image, self.config.in_channels), side, side, self.color);
            let encoded = encoded.map_err(std::io::Error::other);
            let written =
                encoded.and_then(|()| fs::write(&temporary, png)).and_then(|()| fs::rename(&temporary, &path));
            written.map_err(|e| {
                let _ = fs::remove_file(&temporary);
                Error::file(&path, format!("cannot be written: {e}"))
            })?;
            self.next += 1;
        }
        Ok(())
    }
}

/// The .npz, written as the images come: all of them may be more than memory holds.
struct Archive<'a> {
    config: &'a TrainConfig,
    file: NpzWriter,
}

impl<'a> Archive<'a> {
    fn create(path: &Path, n: usize, config: &'a TrainConfig) -> Result<Self> {
        let (c, side) = (config.in_channels, config.image_size);
        let mut file = NpzWriter::create(path)?;
        match config.are_images() {
            true => file.begin("arr_0", Element::U8, &[n, side, side, c])?,
            false => file.begin("arr_0", Element::F32, &[n, c, side, side])?,
        }
        Ok(Archive { config, file })
    }

    fn write(&mut self, images: &[f32]) -> Result<()> {
        let c = self.config.in_channels;
        if !self.config.are_images() {
            return self.file.write(bytemuck::cast_slice(images));
        }
        images.chunks_exact(image_len(self.config)).try_for_each(|image| self.file.write(&bytes_of(image, c)))
    }

    /// Ends the images, of which the `labels` tell how many there are, and writes these.
    fn finish(mut self, labels: &[u32]) -> Result<()> {
        self.file.cut(labels.len())?;
        self.file.begin("arr_1", Element::I64, &[labels.len()])?;
        for &label in labels {
            self.file.write(&i64::from(label).to_le_bytes())?;
        }
        self.file.finish()
    }
}
