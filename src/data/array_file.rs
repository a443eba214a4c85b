//! Arrays of images or latents with labels, from one `.safetensors` file or a pair of `.npy` files.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::npy::NpyFile;
use super::{Dataset, MAX_CLASSES};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::regular_file;
use crate::safetensors_file::{SafetensorsFile, TensorView};

/// Most numbers that one sample may have.
pub(crate) const MAX_SAMPLE: usize = 1 << 26;

/// The tensor of standard deviations beside `latents`.
const STD: &str = "latents_std";

/// What the names of classes are called: in the metadata of a `.safetensors` file, and beside a `.npy` file.
const CLASSES: &str = "classes";
const CLASSES_FILE: &str = "classes.json";

/// Most bytes of a list of names that are read.
const MAX_NAMES_BYTES: u64 = 16 << 20;

/// Largest number that an image may have: its numbers are meant to be from -1 to 1, and resizing overshoots a little.
const MAX_PIXEL: f32 = 1.5;

/// The standard deviation that latents have for diffusion, roughly: noise has 1.
const SPREADS: std::ops::Range<f64> = 0.4..2.5;

/// Samples that are looked at when a file is opened, and numbers of them at most.
const LOOKED_AT: usize = 64;
const NUMBERS_LOOKED_AT: usize = 1 << 22;

/// Samples of an array file; they stay in the file and are read one by one from a memory map.
///
/// - `FILE.safetensors`: tensor `images` or `latents` `[N,C,H,W]` of f64, f32, f16, bf16 or (images only) u8, and `labels` `[N]` of
///   integers. Beside `latents` there may be `latents_std`, of the same shape: then each sample is a normal distribution with these
///   means and standard deviations, from which a [`Loader`](super::Loader) draws.
/// - `FILE.npy`: the same array, or images as u8 `[N,H,W,C]` with 1 or 3 channels; the labels are in `FILE.labels.npy` or
///   `labels.npy` beside it.
///
/// Classes may have names, a JSON list of strings: in the metadata of a `.safetensors` file as `classes`, of a `.npy` file in
/// `FILE.classes.json` beside it. Else they are called by their numbers.
///
/// u8 values 0..255 become -1..1, others stay as they are. Samples with values that are not finite, and images with values
/// far outside -1..1, are damaged samples, as are those with a negative standard deviation.
pub struct ArrayFile {
    path: PathBuf,
    file: File,
    layout: Layout,
    shape: [usize; 3],
    pictures: bool,
    labels: Vec<u32>, // [N]
    names: Vec<String>,
    on_disk: std::fs::File, // opened again, to see whether it was cut short
    len: u64,               // of it, when it was opened
    note: Option<String>,
}

enum File {
    Safetensors(SafetensorsFile, &'static str), // and the tensor's name
    Npy(NpyFile),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    ChannelsFirst,
    ChannelsLast,
}

impl ArrayFile {
    /// Opens `path` and reads its labels. There are as many classes as have names, or else `num_classes`, or as many as the largest
    /// label asks for; of one class (`num_classes` is 1) labels need not be there. A `.npy` file does not say whether its samples are
    /// images: `pictures` does, else bytes are, and samples of 1 or 3 channels.
    ///
    /// # Errors
    /// [`Error::File`] when a file is missing or damaged, an array has the wrong shape or type, a label is outside its range, there are
    /// more names than `num_classes` or one twice, or images are not from -1 to 1; [`Error::Usage`] when `num_classes` is 0 or above
    /// [`MAX_CLASSES`].
    pub fn open(path: impl AsRef<Path>, num_classes: Option<usize>, pictures: Option<bool>) -> Result<Self> {
        let path = path.as_ref();
        if let Some(n) = num_classes.filter(|n| !(1..=MAX_CLASSES).contains(n)) {
            return Err(Error::usage(format!("num_classes is {n}; it can be 1 to {MAX_CLASSES}")));
        }
        let fail = |what: String| Error::file(path, what);
        let names = |list| checked_names(list, num_classes.unwrap_or(MAX_CLASSES));
        let (file, named, names, labels) = if path.extension().is_some_and(|e| e == "npy") {
            let (names, labels) = match labels_beside(path) {
                Err(_) if num_classes == Some(1) => (None, None),
                labels_path => {
                    let (names_path, labels_path) = (path.with_extension(CLASSES_FILE), labels_path?);
                    let list = match regular_file::read(&names_path, MAX_NAMES_BYTES) {
                        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                        Err(e) => Err(format!("cannot be read: {e}")),
                        Ok(text) => serde_json::from_slice(&text).map_err(|e| format!("is no JSON list of names: {e}")),
                    };
                    let names = list.and_then(names).map_err(|what| Error::file(names_path, what))?;
                    let labels = read_labels(NpyFile::open(&labels_path)?.view(), num_classes, names.as_deref());
                    (names, Some(labels.map_err(|what| Error::file(labels_path, what))?))
                }
            };
            (File::Npy(NpyFile::open(path)?), None, names, labels)
        } else {
            let file = SafetensorsFile::open(path)?;
            let name = match (file.get("images"), file.get("latents")) {
                (Some(_), None) => "images",
                (None, Some(_)) => "latents",
                (Some(_), Some(_)) => {
                    return Err(fail("has both 'images' and 'latents'; keep the one to train on".into()));
                }
                (None, None) => {
                    return Err(fail(format!(
                        "has no tensor 'images' or 'latents' of shape [N, C, H, W]; of distributions call the means 'latents' and the \
                         standard deviations '{STD}'"
                    )));
                }
            };
            let (names, labels) = match file.get("labels") {
                None if num_classes == Some(1) => (None, None),
                _ => {
                    // Others may mean something else by the word.
                    let list = file.metadata().get(CLASSES).and_then(|text| serde_json::from_str(text).ok());
                    let names = names(list).map_err(fail)?;
                    let labels = read_labels(file.tensor("labels")?, num_classes, names.as_deref()).map_err(fail)?;
                    (names, Some(labels))
                }
            };
            (File::Safetensors(file, name), Some(name == "images"), names, labels)
        };
        let array = file.array();
        let (layout, shape) = samples_of(array).map_err(fail)?;
        let labels = labels.unwrap_or_else(|| vec![0; array.shape[0]]);
        if array.shape[0] != labels.len() {
            return Err(fail(format!("has {} samples but {} labels", array.shape[0], labels.len())));
        }
        if let Some(std) = file.std().filter(|std| !std.element.is_float() || std.shape != array.shape) {
            let (shape, element, expected) = (std.shape, std.element, array.shape);
            let what =
                format!("has '{STD}' {shape:?} of {element:?}; floating-point numbers {expected:?} are expected");
            return Err(fail(what));
        }
        let as_they_look = array.element == Element::U8 || matches!(shape[0], 1 | 3);
        let pictures = named.or(pictures).unwrap_or(as_they_look);
        if !pictures && array.element == Element::U8 {
            return Err(fail("has latents of type u8; latents are floating-point numbers".into()));
        }
        let classes = num_classes.or_else(|| labels.iter().max().map(|&label| label as usize + 1)).unwrap_or(1);
        let names = names.unwrap_or_else(|| (0..classes).map(|class| class.to_string()).collect());
        let path = path.to_path_buf();
        let opened = regular_file::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (len, on_disk) = opened.map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
        let mut file = ArrayFile { path, layout, shape, pictures, labels, names, file, on_disk, len, note: None };
        let notes = file.look_at_samples()?.into_iter().chain(file.classes_without_samples());
        let notes: Vec<_> = notes.map(|note| format!("{}: {note}", file.path.display())).collect();
        file.note = (!notes.is_empty()).then(|| notes.join("\n"));
        Ok(file)
    }

    /// Looks at some samples, so that a whole set of another range is told, or refused, before anything is trained on it.
    fn look_at_samples(&self) -> Result<Vec<String>> {
        if self.file.array().element == Element::U8 {
            return Ok(Vec::new());
        }
        let mut out = vec![0.0; self.shape.iter().product()];
        let count = LOOKED_AT.min(NUMBERS_LOOKED_AT / out.len()).clamp(1, self.len());
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        let (mut sum, mut squares, mut damaged) = (0.0, 0.0, 0);
        for i in 0..count {
            let index = i * self.len() / count;
            self.numbers(index, &mut out);
            if let Some(what) = self.out_of_range(index, &out) {
                return Err(Error::file(&self.path, what));
            }
            // Others may be good.
            if self.read_std(index, false, &mut out).and_then(|_| self.read(index, false, &mut out)).is_err() {
                damaged += 1;
                continue;
            }
            (low, high) = out.iter().fold((low, high), |(low, high), &x| (low.min(x), high.max(x)));
            sum += out.iter().map(|&x| f64::from(x)).sum::<f64>();
            squares += sum_of_squares(&out);
            // The square of what is drawn is, on average, that of its mean and that of its standard deviation.
            if self.deviations(index, &mut out) {
                squares += sum_of_squares(&out);
            }
        }
        let mut notes = Vec::new();
        if damaged > 0 {
            let or = if self.file.std().is_some() { ", or have a negative standard deviation" } else { "" };
            notes.push(format!("{damaged} of the {count} samples looked at are not finite{or}"));
        }
        let numbers = ((count - damaged) * out.len()) as f64;
        let spread = (squares / numbers - (sum / numbers).powi(2)).max(0.0).sqrt();
        if self.pictures && low >= 0.0 && high > 0.0 {
            let what =
                "the images seem to be from 0 to 1, but -1 to 1 is expected: if 0 is black in them, save 2 x - 1";
            notes.push(what.into());
        }
        // Of no sample at all it would be 0.
        if !self.pictures && damaged < count && spread.is_finite() && !SPREADS.contains(&spread) {
            notes.push(format!(
                "the latents have a standard deviation of about {spread:.2}, where 1 is expected: scale them, as those of Stable Diffusion's \
                 encoder are by 0.18215"
            ));
        }
        Ok(notes)
    }

    /// What there is to say about classes that no label names, if any: the model would not learn them.
    fn classes_without_samples(&self) -> Option<String> {
        let mut found = vec![false; self.names.len()];
        self.labels.iter().for_each(|&label| found[label as usize] = true);
        let empty: Vec<usize> = (0..found.len()).filter(|&class| !found[class]).collect();
        let first = empty.first()?;
        let why = if empty == [0] { ": if labels are counted from 1, subtract 1" } else { "" };
        let named = if self.names[*first] == first.to_string() { "" } else { &format!(" ('{}')", self.names[*first]) };
        Some(format!("no sample has {} of the {} labels, {first}{named} for one{why}", empty.len(), found.len()))
    }

    /// What is wrong with the range of an image, if anything.
    fn out_of_range(&self, index: usize, numbers: &[f32]) -> Option<String> {
        let far = numbers.iter().find(|x| x.is_finite() && x.abs() > MAX_PIXEL).filter(|_| self.pictures)?;
        Some(format!(
            "has {far} in image {index}, but images are numbers from -1 to 1, or bytes: scale them, or if they are latents \
             give --data-kind latents, or save them in a .safetensors file as 'latents'"
        ))
    }

    /// Refuses a file that has less than when it was opened: to touch a part of a map that its file has no more ends the process.
    fn check_whole(&self) -> Result<()> {
        if self.on_disk.metadata().is_ok_and(|now| now.len() < self.len) {
            return Err(Error::file(&self.path, "was cut short while it was in use"));
        }
        Ok(())
    }

    /// Exchanges left and right.
    fn mirror(&self, out: &mut [f32]) {
        out.chunks_mut(self.shape[2]).for_each(<[f32]>::reverse);
    }

    /// The standard deviations of a sample, if it has any.
    fn deviations(&self, index: usize, out: &mut [f32]) -> bool {
        let std = self.file.std();
        if let Some(std) = std {
            std.element.to_f32(bytes_of(std, index, out.len()), out);
        }
        std.is_some()
    }

    /// The numbers of a sample, u8 as -1..1.
    fn numbers(&self, index: usize, out: &mut [f32]) {
        let array = self.file.array();
        let channels = self.shape[0];
        let bytes = bytes_of(array, index, out.len());
        match self.layout {
            Layout::ChannelsFirst => array.element.to_f32(bytes, out),
            Layout::ChannelsLast => {
                let plane = out.len() / channels;
                for (place, pixel) in bytes.chunks_exact(channels).enumerate() {
                    for (c, &value) in pixel.iter().enumerate() {
                        out[c * plane + place] = f32::from(value);
                    }
                }
            }
        }
        if array.element == Element::U8 {
            out.iter_mut().for_each(|x| *x = *x / 127.5 - 1.0);
        }
    }
}

impl File {
    fn array(&self) -> TensorView<'_> {
        match self {
            File::Safetensors(file, name) => file.get(name).expect("looked up when the file was opened"),
            File::Npy(file) => file.view(),
        }
    }

    /// The standard deviations of latents, where there are any.
    fn std(&self) -> Option<TensorView<'_>> {
        match self {
            File::Safetensors(file, "latents") => file.get(STD),
            _ => None,
        }
    }
}

/// Sample `index` of an array of samples of so many numbers.
fn bytes_of(array: TensorView<'_>, index: usize, numbers: usize) -> &[u8] {
    let size = numbers * array.element.size();
    &array.bytes[index * size..(index + 1) * size]
}

fn sum_of_squares(numbers: &[f32]) -> f64 {
    numbers.iter().map(|&x| f64::from(x).powi(2)).sum()
}

/// Whether `path` is an array file that has no labels.
pub(crate) fn lacks_labels(path: &Path) -> bool {
    match path.extension().is_some_and(|e| e == "npy") {
        true => path.is_file() && labels_beside(path).is_err(),
        false => SafetensorsFile::open(path).is_ok_and(|file| file.get("labels").is_none()),
    }
}

/// The labels of `FILE.npy`.
fn labels_beside(path: &Path) -> Result<PathBuf> {
    let candidates = [path.with_extension("labels.npy"), path.with_file_name("labels.npy")];
    let missing = || {
        let [own, common] = &candidates;
        Error::file(
            path,
            format!(
                "has no labels beside it: neither {} nor {} exists (of samples without classes all may be 0, and with \
                 --label-dropout 1 none are needed)",
                own.display(),
                common.display()
            ),
        )
    };
    candidates.iter().find(|candidate| candidate.exists()).cloned().ok_or_else(missing)
}

/// The names, if there are any, of at most `most` classes; otherwise what is wrong with them.
fn checked_names(names: Option<Vec<String>>, most: usize) -> std::result::Result<Option<Vec<String>>, String> {
    let list = names.as_deref().unwrap_or_default();
    if names.is_some() && !(1..=most).contains(&list.len()) {
        return Err(format!("names {} classes; 1 to {most} are expected", list.len()));
    }
    let mut seen = HashSet::new();
    if let Some(twice) = list.iter().find(|name| !seen.insert(*name)) {
        return Err(format!("names the class '{twice}' twice"));
    }
    if let Some(odd) = list.iter().find(|name| name.contains(char::is_control)) {
        return Err(format!("names the class {odd:?}, with control characters"));
    }
    Ok(names)
}

/// Labels `[N]`, each below the number of `names`, if there are any, or `num_classes` (or [`MAX_CLASSES`]).
fn read_labels(
    array: TensorView,
    num_classes: Option<usize>,
    names: Option<&[String]>,
) -> std::result::Result<Vec<u32>, String> {
    if array.shape.len() != 1 || !array.element.is_integer() {
        return Err(format!("has labels {:?} of {:?}; integers [N] are expected", array.shape, array.element));
    }
    let limit = names.map(<[String]>::len).or(num_classes).unwrap_or(MAX_CLASSES);
    let why = names.map_or(String::new(), |names| format!(": {} classes have names", names.len()));
    let label = |(i, bytes)| {
        let label = array.element.to_integer(bytes).unwrap_or(-1);
        let inside = usize::try_from(label).ok().filter(|&label| label < limit);
        inside
            .map(|label| label as u32)
            .ok_or_else(|| format!("has label {label} for sample {i}; labels are 0 to {}{why}", limit - 1))
    };
    array.bytes.chunks_exact(array.element.size()).enumerate().map(label).collect()
}

/// Layout and `[C,H,W]` of the samples of `array`.
fn samples_of(array: TensorView) -> std::result::Result<(Layout, [usize; 3]), String> {
    let (element, shape) = (array.element, array.shape);
    let &[n, a, b, c] = shape else {
        return Err(format!("has shape {shape:?}; [N, C, H, W] is expected"));
    };
    if !element.is_float() && element != Element::U8 {
        return Err(format!("has elements of type {element:?}; f64, f32, f16, bf16 or u8 are expected"));
    }
    let few = |channels| matches!(channels, 1 | 3);
    let (layout, sample) = if element == Element::U8 && few(c) && !few(a) {
        (Layout::ChannelsLast, [c, a, b])
    } else {
        (Layout::ChannelsFirst, [a, b, c])
    };
    if n == 0 || sample.contains(&0) {
        return Err(format!("has shape {shape:?}: there is nothing in it"));
    }
    if n > u32::MAX as usize || sample.iter().product::<usize>() > MAX_SAMPLE {
        return Err(format!("has shape {shape:?}; at most {} samples of {MAX_SAMPLE} numbers are read", u32::MAX));
    }
    Ok((layout, sample))
}

impl Dataset for ArrayFile {
    fn shape(&self) -> [usize; 3] {
        self.shape
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        let label = self.labels[index];
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "numbers of a sample");
        self.check_whole()?;
        self.numbers(index, out);
        if let Some(place) = out.iter().position(|x| !x.is_finite()) {
            return Err(Error::file(&self.path, format!("has {} at place {place} of sample {index}", out[place])));
        }
        if let Some(what) = self.out_of_range(index, out) {
            return Err(Error::file(&self.path, what));
        }
        if flip {
            self.mirror(out);
        }
        Ok(label)
    }

    fn read_std(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<bool> {
        assert_eq!(out.len(), self.shape.iter().product::<usize>(), "numbers of a sample");
        self.check_whole()?;
        if !self.deviations(index, out) {
            return Ok(false);
        }
        if let Some(place) = out.iter().position(|&std| !std.is_finite() || std < 0.0) {
            let what = format!(
                "has {} at place {place} of '{STD}' of sample {index}; none is negative or not finite",
                out[place]
            );
            return Err(Error::file(&self.path, what));
        }
        if flip {
            self.mirror(out);
        }
        Ok(true)
    }

    fn is_pictures(&self) -> bool {
        self.pictures
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}
