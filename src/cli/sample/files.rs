//! What sampling leaves behind: a grid of images, and all of them in an archive or a folder.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use super::archive::{Archive, Folder, image_len};
use crate::atomic_file::{AtomicFile, check_target};
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
    config: &'a TrainConfig,
    npz: Option<&'a Path>,
    overwrite: bool,
    first: usize,      // number of the first image
    labels: &'a [u32], // of it and those after it
    grid: Option<(&'a Path, Grid<'a>)>,
    archive: Option<Archive<'a>>,
    folder: Option<Folder<'a>>,
    made: usize,
}

/// Where all images are to be, beside the grid: an archive, and a folder.
#[derive(Clone, Copy)]
pub(super) struct All<'a> {
    pub(super) npz: Option<&'a Path>,
    /// Whether the archive may take the place of another.
    pub(super) overwrite: bool,
    pub(super) folder: Option<&'a Path>,
}

impl All<'_> {
    /// Whether they are to be anywhere.
    pub(super) fn are_kept(self) -> bool {
        self.npz.is_some() || self.folder.is_some()
    }
}

impl<'a> Files<'a> {
    /// Files for the images `only` of all, which have these `labels`: a grid if it is to be in `out`, and all. None has its name before it is whole.
    ///
    /// # Errors
    /// When one of them cannot be written, or would replace the `weights` or, unless it may, another archive.
    pub(super) fn create(
        out: Option<&'a Path>,
        all: All<'a>,
        weights: &Path,
        labels: &'a [u32],
        only: Range<usize>,
        config: &'a TrainConfig,
    ) -> Result<Self> {
        let All { npz, overwrite, folder } = all;
        check_outputs(out, all, weights)?;
        out.map(AtomicFile::create).transpose()?;
        let folder = folder.map(|path| Folder::create(path, labels, only.clone(), config)).transpose()?;
        let grid = out.map(|out| (out, Grid::new(labels, only.clone(), config)));
        let (first, labels) = (only.start, &labels[only]);
        let archive = npz.map(|path| Archive::create(path, labels.len(), config)).transpose()?;
        Ok(Files { config, npz, overwrite, first, labels, grid, archive, folder, made: 0 })
    }

    /// How many images were taken.
    pub(super) fn made(&self) -> usize {
        self.made
    }

    /// What the grid leaves out, if anything, of the images or, unless they were `chosen`, of the classes.
    pub(super) fn note(&self, chosen: bool) -> Option<String> {
        let (_, grid) = self.grid.as_ref()?;
        grid.note(self.labels.len(), self.npz.is_some() || self.folder.is_some(), chosen)
    }

    /// Takes the next images.
    ///
    /// # Errors
    /// When the archive, which is given up then, or a picture cannot be written.
    pub(super) fn take(&mut self, images: &[f32]) -> Result<()> {
        if let Some((_, grid)) = &mut self.grid {
            grid.take(self.made, images);
        }
        let n = images.len() / image_len(self.config);
        let (first, labels) = (self.first + self.made, &self.labels[self.made..][..n]);
        let pictures = self.folder.as_ref().map_or(Ok(()), |folder| folder.write(first, images, labels));
        let written = pictures.and_then(|()| {
            let written = self.archive.as_mut().map_or(Ok(()), |archive| archive.write(images));
            written.inspect_err(|_| self.archive = None)
        });
        // What is there is then what is counted, and another part may begin after it.
        written.inspect_err(|_| self.folder.iter().for_each(|folder| folder.remove(first, labels)))?;
        self.made += n;
        Ok(())
    }

    /// Writes the files, and says where the samples of `name` are. Either is written even if the other cannot be.
    ///
    /// # Errors
    /// When one of them cannot be written.
    pub(super) fn finish(self, name: &Path) -> Result<()> {
        let Files { labels, grid, archive, folder, made, overwrite, .. } = self;
        let archived = archive.map(|archive| archive.finish(labels, overwrite)).transpose();
        let drawn = grid.map(|(out, grid)| grid.write(out, made).map(|()| out)).transpose();
        let name = shown(name);
        if let Ok(Some(out)) = drawn {
            println!("Samples of {name} are in {}", shown(out));
        }
        if let Ok(Some(npz)) = &archived {
            println!("{made} images of {name} are in {}", shown(npz));
        }
        if let Some(folder) = folder {
            println!("{made} images of {name} are in {}", shown(folder.path));
        }
        archived.and(drawn).map(|_| ())
    }

    /// Keeps what there is in the archive, unless that would replace one, as in the folder, and a grid of it. Says how much is where, if
    /// anything is.
    pub(super) fn keep(self) -> Option<String> {
        let Files { npz, overwrite, labels, grid, archive, folder, made: made @ 1.., .. } = self else {
            return None;
        };
        let failed = |what: &str, e: &Error| say(&format!("{what}: {}", printable(&e.to_string())));
        let mut places: Vec<String> = folder.iter().map(|folder| shown(folder.path)).collect();
        // What was there before may be whole. One that came meanwhile stays, and this one gets another name.
        let before = npz.filter(|npz| overwrite && npz.exists());
        if let (Some(archive), None) = (archive, before) {
            match archive.finish(&labels[..made], false) {
                Ok(npz) => places.push(shown(&npz)),
                Err(e) => failed("no archive", &e),
            }
        }
        if places.is_empty() {
            return None;
        }
        let none = before.map_or(String::new(), |npz| format!(" (none in {}, which was there before)", shown(npz)));
        if let Some((out, grid)) = grid.filter(|(out, _)| before.is_none() || !out.exists()) {
            grid.write(out, made).unwrap_or_else(|e| failed("no grid", &e));
        }
        Some(format!("; {made} of {} images are in {}{none}", labels.len(), places.join(" and ")))
    }
}

/// A path as messages show it.
pub(super) fn shown(path: &Path) -> String {
    printable(&path.display().to_string())
}

/// Refuses files that cannot both be written, or not without losing the weights or an archive.
fn check_outputs(out: Option<&Path>, all: All, weights: &Path) -> Result<()> {
    let All { npz, overwrite, folder } = all;
    const OTHER_PICTURES: [&str; 5] = ["jpg", "jpeg", "webp", "gif", "bmp"];
    let ending = |path: &Path| path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
    if let Some(out) = out
        && ending(out).is_some_and(|ending| OTHER_PICTURES.contains(&&*ending))
    {
        return Err(Error::usage(format!(
            "--out is {}, but the grid is a PNG: give a name that ends in .png",
            shown(out)
        )));
    }
    for (flag, path) in [("--out", out), ("--npz", npz)] {
        if path == Some(Path::new("-")) {
            return Err(Error::usage(format!("{flag} is -, but what it names must be a file: give its name")));
        }
    }
    for (path, ending) in [(out, "png"), (npz, "npz")] {
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
    if let Some(path) = [out, npz].into_iter().flatten().find(|path| place(path) == place(weights)) {
        return Err(Error::file(path, "holds the weights: give the name of another file to write"));
    }
    if let Some(npz) = npz.filter(|npz| out.is_some_and(|out| place(npz) == place(out))) {
        return Err(Error::usage(format!(
            "--out and --npz are both {}, but a file can hold the grid or the archive: give two names",
            npz.display()
        )));
    }
    // Hours of work may be in it.
    if let Some(npz) = npz.filter(|npz| npz.exists() && !overwrite) {
        return Err(Error::file(npz, "is there already: give another file, or --overwrite to replace it"));
    }
    let Some(folder) = folder else { return Ok(()) };
    for (flag, path) in [("--out", out), ("--npz", npz)] {
        let Some(path) = path else { continue };
        if place(path) == place(folder) || folder.canonicalize().is_ok_and(|folder| place(path).0 == folder) {
            return Err(Error::usage(format!(
                "{flag} is {} and --images {}, but a folder of pictures holds nothing else: give another place",
                path.display(),
                folder.display()
            )));
        }
    }
    Ok(())
}

/// The first images of each of the first classes, a row a class; classes with fewer end in black.
struct Grid<'a> {
    config: &'a TrainConfig,
    shown: Vec<(usize, usize)>, // number of the image, its place in the grid; by the first
    columns: usize,
    rows: usize,
    pixels: Vec<f32>, // [rows * columns, C, H, W]
}

impl<'a> Grid<'a> {
    /// Of the images `only` of all, which have these `labels`. The rows have the order of the classes in all of them.
    fn new(labels: &[u32], only: Range<usize>, config: &'a TrainConfig) -> Self {
        let made: BTreeSet<u32> = labels[only.clone()].iter().copied().collect();
        let mut rows: Vec<(u32, usize)> = Vec::new(); // class, its images
        for &label in labels.iter().filter(|label| made.contains(*label)) {
            if rows.len() == made.len().min(GRID_ROWS) {
                break;
            }
            if rows.iter().all(|(class, _)| *class != label) {
                rows.push((label, 0));
            }
        }
        let mut cells = Vec::new(); // image, row, column
        for (image, &label) in labels[only].iter().enumerate() {
            let row = rows.iter().position(|(class, images)| *class == label && *images < GRID_COLUMNS);
            if let Some(row) = row {
                cells.push((image, row, rows[row].1));
                rows[row].1 += 1;
            }
        }
        let columns = rows.iter().map(|(_, images)| *images).max().unwrap_or(1);
        let shown = cells.into_iter().map(|(image, row, column)| (image, row * columns + column)).collect();
        let pixels = vec![-1.0; rows.len() * columns * image_len(config)];
        Grid { config, shown, columns, rows: rows.len(), pixels }
    }

    /// What it leaves out of `made` images or, unless they were `chosen`, of the classes, if anything.
    fn note(&self, made: usize, archived: bool, chosen: bool) -> Option<String> {
        let (shown, all) = (self.shown.len(), self.config.num_classes);
        if shown < made {
            let rest = if archived { "" } else { "; --npz FILE or --images DIR keeps them all" };
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
        let last = self.shown.iter().filter(|(image, _)| *image < made).map(|&(_, place)| place).max().unwrap_or(0);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The archive has what was made before the picture that could not be written, and what was there before stays.
    #[test]
    fn a_picture_that_cannot_be_written_costs_no_archive() {
        let place = tempfile::tempdir().unwrap();
        let [out, npz, pictures] = ["grid.png", "all.npz", "pictures"].map(|name| place.path().join(name));
        let mut config = TrainConfig::default();
        config.fit_to_data(4, 1, 10).unwrap();
        let labels = [3; 6];
        let stopped = || {
            let all = All { npz: Some(&npz), overwrite: true, folder: Some(&pictures) };
            let mut files = Files::create(Some(&out), all, Path::new("weights"), &labels, 0..6, &config).unwrap();
            files.take(&[0.5; 2 * 16]).unwrap();
            std::fs::remove_dir_all(&pictures).unwrap();
            assert!(files.take(&[-0.5; 2 * 16]).unwrap_err().to_string().contains("000002-3.png: cannot be written"));
            files.keep().unwrap()
        };
        let said = stopped();
        assert!(
            said.starts_with("; 2 of 6 images are in ")
                && said.contains("/pictures and ")
                && said.ends_with("/all.npz"),
            "{said}"
        );
        let [archive, grid] = [&npz, &out].map(|path| std::fs::read(path).unwrap());
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("'shape': (2, 4, 4, 1)") && text.contains("'shape': (2,)"));
        // Again: this one is not replaced, nor is its grid.
        std::fs::write(&out, "mine").unwrap();
        let said = stopped();
        assert!(said.contains("/pictures (none in ") && said.ends_with("/all.npz, which was there before)"), "{said}");
        assert!(std::fs::read(&npz).unwrap() == archive && std::fs::read(&out).unwrap() == b"mine" && grid.len() > 100);
    }

    /// A batch that was not written whole is not there, so that another part may begin with it.
    #[test]
    fn pictures_are_as_many_as_are_told() {
        let place = tempfile::tempdir().unwrap();
        let [out, pictures] = ["grid.png", "pictures"].map(|name| place.path().join(name));
        let mut config = TrainConfig::default();
        config.fit_to_data(4, 1, 10).unwrap();
        let labels = [3; 8];
        let create = |only| {
            let all = All { npz: None, overwrite: false, folder: Some(&pictures) };
            Files::create(Some(&out), all, Path::new("weights"), &labels, only, &config)
        };
        let mut files = create(2..8).unwrap();
        files.take(&[0.5; 2 * 16]).unwrap();
        let in_the_way = pictures.join("000005-3.png");
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(files.take(&[0.5; 3 * 16]).is_err());
        std::fs::remove_dir(&in_the_way).unwrap();
        assert!(files.keep().unwrap().starts_with("; 2 of 6 images are in "));
        let mut names: Vec<_> = std::fs::read_dir(&pictures).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["000002-3.png", "000003-3.png"]);
        create(4..8).unwrap();
    }

    /// Two programs that were given the same name: the second finds the file of the first.
    #[test]
    fn an_archive_that_came_meanwhile_is_not_replaced() {
        let place = tempfile::tempdir().unwrap();
        let [out, npz] = ["grid.png", "all.npz"].map(|name| place.path().join(name));
        let mut config = TrainConfig::default();
        config.fit_to_data(4, 1, 10).unwrap();
        let create = |overwrite| {
            let all = All { npz: Some(&npz), overwrite, folder: None };
            let mut files = Files::create(Some(&out), all, Path::new("weights"), &[3], 0..1, &config).unwrap();
            files.take(&[if overwrite { 0.5 } else { -0.5 }; 16]).unwrap();
            files
        };
        let (files, stopped) = ([create(false), create(false)], create(false));
        let second = npz.with_file_name("all-1.npz");
        for files in files {
            files.finish(Path::new("model")).unwrap();
        }
        let [first, other] = [&npz, &second].map(|path| std::fs::read(path).unwrap());
        assert!(first == other, "{} and {} bytes", first.len(), other.len());
        let said = stopped.keep().unwrap();
        assert!(said.ends_with("/all-2.npz"), "{said}");
        create(true).finish(Path::new("model")).unwrap();
        assert!(std::fs::read(&npz).unwrap() != first && std::fs::read(&second).unwrap() == other);
    }

    /// A part may begin with any class.
    #[test]
    fn rows_of_a_part_are_those_of_the_whole() {
        let mut config = TrainConfig::default();
        config.fit_to_data(4, 1, 10).unwrap();
        let labels: Vec<u32> = (0..40).map(|i| [5, 2, 7, 1][i % 4]).collect();
        // Images 6..16 begin with class 7, and have no more than 3 of each.
        let grid = Grid::new(&labels, 6..16, &config);
        let of_part = &labels[6..16];
        let rows =
            |class| grid.shown.iter().filter(move |(i, _)| of_part[*i] == class).map(|(_, place)| place / grid.columns);
        for (row, class) in [5, 2, 7, 1].into_iter().enumerate() {
            assert!(rows(class).count() > 0 && rows(class).all(|found| found == row), "{class}");
        }
        assert_eq!((grid.rows, grid.columns), (4, 3));
        // Classes that a part has none of have no row.
        assert_eq!(Grid::new(&labels, 6..8, &config).shown, [(0, 0), (1, 1)]);
    }
}
