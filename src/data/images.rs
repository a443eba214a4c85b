//! A folder with one subfolder of PNG, JPEG or WebP images per class, or with images alone.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::DirEntry;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use super::resize::center_crop;
use super::{Dataset, MAX_CLASSES};
use crate::error::{Error, Result};
use crate::system_memory::memory_bytes;

/// Longest image file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Most pixels that an image may claim to have.
const MAX_PIXELS: u64 = 100_000_000;

/// Most bytes that a decoder may allocate: [`MAX_PIXELS`] of 8 bytes, and room to work.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// Most bytes of images that are kept once they were read, and the part of the machine's memory that they may take.
const MAX_KEPT_BYTES: u64 = 1 << 30;
const PART_KEPT: u64 = 8;

/// Largest side of the squares that images are brought to.
const MAX_SIZE: usize = 4096;

/// Images `DIR/CLASS/IMAGE` as `[3, size, size]` in [-1, 1]; of a folder without folders and links to such, `DIR/IMAGE`, all of one class.
///
/// Labels are the places of the class folders in alphabetical order (of code points, as in torchvision's `ImageFolder`).
/// Images are cropped and scaled exactly as ADM and DiT do with Pillow ([`center_crop`]); PNG and WebP images therefore
/// agree with theirs to the bit (but for those of 16 bits a channel), JPEGs as far as two decoders agree (on test pictures by a level, by two with subsampled colour).
/// Transparency is dropped and orientation tags are ignored, as there.
///
/// An image is decoded and scaled once, and kept in memory after that while there is room: the first 1 GiB of them, or an eighth of the
/// memory where that is less.
pub struct ImageFolder {
    size: usize,
    names: Vec<String>,
    folders: Vec<PathBuf>,          // [classes]
    files: Vec<(u32, Box<OsStr>)>,  // [images]: class, file name; ordered by both
    kept: Vec<OnceLock<Box<[u8]>>>, // [images]: [H,W,C] of those that were read
    room: AtomicUsize,              // bytes of more of them
    note: Option<String>,
}

impl ImageFolder {
    /// Lists the images of `root`; none is opened yet. `size` is the side in pixels that they will have.
    ///
    /// Links are followed only to places inside `root`; others are left out, as are files that are not named `.png`, `.jpg`, `.jpeg` or
    /// `.webp`, or lie anywhere but in a class folder. The [`note`](Dataset::note) tells how many; hidden entries are ignored.
    ///
    /// # Errors
    /// [`Error::Usage`] for a size of 0 or above 4096; [`Error::File`] when a folder cannot be read, there are neither class
    /// folders nor images, or more than [`MAX_CLASSES`], or one of them has no images.
    pub fn open(root: impl AsRef<Path>, size: usize) -> Result<Self> {
        let root = root.as_ref();
        Self::list(root, size, Some(root.canonicalize().map_err(|e| unreadable(root, &e))?))
    }

    /// [`open`](Self::open), but links are followed wherever they lead.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_links(root: impl AsRef<Path>, size: usize) -> Result<Self> {
        Self::list(root.as_ref(), size, None)
    }

    fn list(root: &Path, size: usize, inside: Option<PathBuf>) -> Result<Self> {
        if size == 0 || size > MAX_SIZE {
            return Err(Error::usage(format!("image_size is {size}; it can be 1 to {MAX_SIZE}")));
        }
        let new_scan = || Scan { inside: inside.clone(), links: 0, files: 0, folders: 0 };
        let mut scan = new_scan();
        let mut classes = scan.entries(root, |path, _| path.is_dir())?;
        let mut flat = new_scan();
        let without_classes = classes.is_empty() && !flat.entries(root, is_image_file)?.is_empty();
        if without_classes && flat.folders > 0 {
            let what = "has images, and links to folders outside of it, which may be meant as classes: remove the links or the images, or set \
                        follow_links to true";
            return Err(Error::file(root, what));
        }
        if without_classes {
            scan = new_scan();
            classes.push(OsString::new()); // the folder itself
        }
        if classes.is_empty() {
            let what = match scan.links {
                0 => "has no class folders",
                _ => "has only class folders that are links out of it (follow_links = true takes them)",
            };
            return Err(Error::file(
                root,
                format!("{what}; images are expected as {0}/CLASS/IMAGE.png, or all as {0}/IMAGE.png", root.display()),
            ));
        }
        if classes.len() > MAX_CLASSES {
            return Err(Error::file(
                root,
                format!("has {} class folders; at most {MAX_CLASSES} can be used", classes.len()),
            ));
        }
        let room = memory_bytes().map_or(MAX_KEPT_BYTES, |memory| (memory / PART_KEPT).min(MAX_KEPT_BYTES)) as usize;
        let (names, folders, files, kept) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut folder = ImageFolder { size, names, folders, files, kept, room: room.into(), note: None };
        for (class, name) in (0..).zip(classes) {
            let path = root.join(&name);
            let (links, folders) = (scan.links, scan.folders);
            let images = scan.entries(&path, is_image_file)?;
            if images.is_empty() && scan.links > links {
                let root = root.display();
                return Err(Error::file(
                    path,
                    format!(
                        "is a class folder whose images are links that lead out of {root}: set follow_links to true, or copy them there"
                    ),
                ));
            }
            if images.is_empty() {
                let inside = if scan.folders > folders {
                    "; folders in it are not looked into: give the folder whose folders are the classes, with the images in them"
                } else {
                    "; fill or remove it"
                };
                return Err(Error::file(path, format!("is a class folder without PNG, JPEG or WebP images{inside}")));
            }
            folder.files.extend(images.into_iter().map(|image| (class, image.into_boxed_os_str())));
            let name = if without_classes { "0".into() } else { name.to_string_lossy() };
            folder.names.push(name.into_owned());
            folder.folders.push(path);
        }
        folder.kept.resize_with(folder.files.len(), OnceLock::new);
        let one = without_classes.then(|| "there are no class folders, so all images are of one class".to_string());
        let left_out = scan.left_out().map(|what| format!("{what} were left out"));
        let notes: Vec<String> = one.into_iter().chain(left_out).collect();
        folder.note = (!notes.is_empty()).then(|| format!("{}: {}", root.display(), notes.join("; ")));
        Ok(folder)
    }

    /// Where image `index` lies.
    pub fn path(&self, index: usize) -> PathBuf {
        let (class, name) = &self.files[index];
        self.folders[*class as usize].join(&**name)
    }

    /// The bytes `[H,W,C]` of image `index`.
    fn pixels(&self, index: usize) -> Result<Cow<'_, [u8]>> {
        let kept = &self.kept[index];
        if let Some(pixels) = kept.get() {
            return Ok(Cow::Borrowed(pixels));
        }
        let path = self.path(index);
        let image = decode(&path).map_err(|what| Error::file(&path, what))?;
        let pixels = center_crop(image, self.size as u32).into_raw();
        let room = self.room.fetch_update(Relaxed, Relaxed, |room| room.checked_sub(pixels.len()));
        Ok(if room.is_ok() { Cow::Borrowed(kept.get_or_init(|| pixels.into())) } else { Cow::Owned(pixels) })
    }
}

impl Dataset for ImageFolder {
    fn shape(&self) -> [usize; 3] {
        [3, self.size, self.size]
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        let pixels = self.pixels(index)?;
        let plane = self.size * self.size;
        assert_eq!(out.len(), 3 * plane, "numbers of a sample");
        for (place, pixel) in pixels.chunks_exact(3).enumerate() {
            let (x, y) = (place % self.size, place / self.size);
            let x = if flip { self.size - 1 - x } else { x };
            for (c, &value) in pixel.iter().enumerate() {
                out[c * plane + y * self.size + x] = f32::from(value) / 127.5 - 1.0;
            }
        }
        Ok(self.files[index].0)
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

/// What was found, and left out.
struct Scan {
    inside: Option<PathBuf>, // canonical: where links may lead
    links: usize,            // that led elsewhere, or nowhere
    files: usize,            // without the name of an image, or beside class folders
    folders: usize,          // in class folders
}

impl Scan {
    /// Names of the entries of `folder` that are not hidden and that `wanted` wants, sorted.
    fn entries(&mut self, folder: &Path, wanted: impl Fn(&Path, &OsStr) -> bool) -> Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(|e| unreadable(folder, &e))? {
            let entry = entry.map_err(|e| unreadable(folder, &e))?;
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            match (wanted(&path, &name), path.is_dir()) {
                (false, true) => self.folders += 1,
                _ if self.leads_out(&entry) => self.links += 1,
                (false, false) => self.files += 1,
                (true, _) => names.push(name),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// `2 links that lead out of it or nowhere, 1 folders in class folders`, if anything.
    fn left_out(&self) -> Option<String> {
        let kinds = [
            (
                self.links,
                if self.inside.is_some() { "links that lead out of it or nowhere" } else { "links that lead nowhere" },
            ),
            (self.folders, "folders in class folders"),
            (self.files, "files that are no PNG, JPEG or WebP images of a class"),
        ];
        let told = kinds.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
        Some(told.collect::<Vec<_>>().join(", ")).filter(|told| !told.is_empty())
    }

    fn leads_out(&self, entry: &DirEntry) -> bool {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let may = |target: PathBuf| self.inside.as_ref().is_none_or(|inside| target.starts_with(inside));
        is_link && !entry.path().canonicalize().is_ok_and(may)
    }
}

fn unreadable(path: &Path, e: &std::io::Error) -> Error {
    Error::file(path, format!("cannot be read: {e}"))
}

fn is_image_file(path: &Path, name: &OsStr) -> bool {
    is_image(name) && path.is_file()
}

fn is_image(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str).unwrap_or_default();
    ["png", "jpg", "jpeg", "webp"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The pixels of an image file; otherwise what is wrong with it.
fn decode(path: &Path) -> std::result::Result<RgbImage, String> {
    let damaged = |e: &dyn std::fmt::Display| format!("is damaged or no image: {e}");
    let file = std::fs::metadata(path).map_err(|e| format!("cannot be read: {e}"))?;
    if !file.is_file() || file.len() > MAX_FILE_BYTES {
        return Err(format!("is not a file of at most {MAX_FILE_BYTES} bytes"));
    }
    let bytes = std::fs::read(path).map_err(|e| format!("cannot be read: {e}"))?;
    let decoded = catch_unwind(AssertUnwindSafe(|| {
        let mut reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format().map_err(|e| damaged(&e))?;
        // The decoder would paint what is missing grey.
        if reader.format() == Some(ImageFormat::Jpeg) && !reaches_the_end_of_a_jpeg(&bytes) {
            return Err("is a JPEG that was cut short".into());
        }
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAX_DECODER_BYTES);
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(|e| damaged(&e))?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 || u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(format!("claims to be {width}x{height} pixels large; at most {MAX_PIXELS} pixels are read"));
        }
        Ok(DynamicImage::from_decoder(decoder).map_err(|e| damaged(&e))?.into_rgb8())
    }));
    // Decoders are large and the files can be made to break them; what they leave behind is local to the call.
    decoded.unwrap_or_else(|_| Err("makes its decoder fail".into()))
}

/// Whether the segments of a JPEG lead to its end-of-image marker (ITU-T T.81, annex B).
fn reaches_the_end_of_a_jpeg(bytes: &[u8]) -> bool {
    // Restarts and the start of the image.
    const WITHOUT_LENGTH: std::ops::RangeInclusive<u8> = 0xD0..=0xD8;
    let mut at = 0;
    loop {
        // Coded data and fill bytes stand between segments; in coded data a zero follows every 0xFF.
        let Some(skip) = bytes[at..].windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xFF)) else {
            return false;
        };
        at += skip + 2;
        match bytes[at - 1] {
            0xD9 => return true,
            marker if WITHOUT_LENGTH.contains(&marker) => {}
            _ => match bytes[at..] {
                [high, low, ..] => at += usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        }
        if at > bytes.len() {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_read_once_while_there_is_room() {
        let place = tempfile::tempdir().unwrap();
        for (i, name) in ["a.png", "b.png"].into_iter().enumerate() {
            RgbImage::from_fn(5, 4, |x, y| image::Rgb([x as u8 * 40, y as u8 * 50, i as u8]))
                .save(place.path().join(name))
                .unwrap();
        }
        let folder = ImageFolder::open(place.path(), 4).unwrap();
        folder.room.store(2 * 48 - 1, Relaxed);
        let read = |index, flip| {
            let mut out = [f32::NAN; 48];
            folder.read(index, flip, &mut out).map(|_| out.map(f32::to_bits))
        };
        let both = [[0, 1].map(|i| read(i, false).unwrap()), [0, 1].map(|i| read(i, true).unwrap())];
        assert!(both[0][0] != both[1][0] && both[0][0] != both[0][1]);
        std::fs::remove_dir_all(place.path()).unwrap();
        assert!(read(0, false).unwrap() == both[0][0] && read(0, true).unwrap() == both[1][0]);
        assert!(read(1, false).unwrap_err().to_string().contains("b.png: cannot be read"));
    }
}
