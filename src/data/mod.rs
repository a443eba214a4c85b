//! What a model is trained on: labelled images or latents, read one by one ([`Dataset`]) and put together to batches in
//! background threads ([`Loader`]).

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

pub mod array_file;
pub mod digits;
pub(crate) mod fingerprint;
mod held_out;
pub mod images;
pub mod loader;
#[cfg(test)]
pub(crate) mod made;
pub mod npy;
pub mod npz;
pub(crate) mod renumbered;
pub mod resize;

pub use held_out::hold_out;
pub use loader::{Batch, Loader, LoaderOptions};

/// Most classes that a data set may have. A class costs a row of the label table; the largest sets in use have 21,841.
pub const MAX_CLASSES: usize = 65_536;

/// Labelled samples of one shape that can be read in any order, from any thread.
pub trait Dataset: Send + Sync {
    /// Channels, height and width of every sample.
    fn shape(&self) -> [usize; 3];

    /// Name of every class; a label is a place in this list.
    fn class_names(&self) -> &[String];

    /// Number of classes: labels are smaller.
    fn num_classes(&self) -> usize {
        self.class_names().len()
    }

    /// Number of samples: at least 1, at most `u32::MAX`.
    fn len(&self) -> usize;

    /// Whether there are no samples. Never so in the data sets of this crate: opening one without samples is an error.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes sample `index` to `out` `[C,H,W]` and returns its label. Images are in [-1, 1], latents as they are, and of a
    /// distribution its mean ([`read_std`](Self::read_std)); with `flip` left and right are exchanged.
    ///
    /// # Errors
    /// When the sample is damaged: the message names it. Reading it again gives the same result.
    ///
    /// # Panics
    /// When `index` is not below [`len`](Self::len) or `out` has not the size of a sample.
    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32>;

    /// Where sample `index` is a normal distribution, writes its standard deviations to `out` `[C,H,W]`, finite and not negative, and
    /// returns true: [`Loader`] draws from it each time that the sample is seen. Else returns false, and `out` may hold anything.
    /// A data set that wraps another must pass this on.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    ///
    /// # Panics
    /// As [`read`](Self::read).
    fn read_std(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<bool> {
        let _ = (index, flip, out);
        Ok(false)
    }

    /// The number that messages give sample `index`: another where the samples are some of a larger data set.
    fn number_of(&self, index: usize) -> usize {
        index
    }

    /// Whether the samples are pictures in [-1, 1] (and not latents).
    fn is_pictures(&self) -> bool {
        true
    }

    /// A sentence that the user should see once, for example that some files were left out.
    fn note(&self) -> Option<&str> {
        None
    }
}

/// Whether a mirrored sample of the data that `what` names is as good as the sample itself: photographs in folders are, while
/// mirrored digits are not digits and the decoder of mirrored latents does not give mirrored images.
pub fn may_flip(what: &str) -> bool {
    let path = Path::new(what);
    what != "digits" && (path.is_dir() || !is_array_file(path))
}

/// Whether the file names labels by their numbers, whatever the classes are called: folders number them by their names.
pub(crate) fn is_array_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors" || extension == "npy")
}

/// How [`open`] takes what it finds.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Side of the square that images of a folder are brought to, in pixels.
    pub image_size: Option<usize>,
    /// Widens the range of labels of an array file beyond the largest label found; with 1 it needs no labels.
    pub num_classes: Option<usize>,
    /// Whether the samples of a `.npy` file are images.
    pub pictures: Option<bool>,
    /// Follow links that lead out of a folder of images.
    pub follow_links: bool,
}

/// Opens the data set that `what` names: `digits`, a folder of class subfolders ([`images::ImageFolder`]), or a
/// `.safetensors` or `.npy` file ([`array_file::ArrayFile`]).
///
/// # Errors
/// [`Error::Usage`] when `what` is none of these or the image size is missing, and those of the kind of data set.
pub fn open(what: &str, options: OpenOptions) -> Result<Arc<dyn Dataset>> {
    let OpenOptions { image_size, num_classes, pictures, follow_links } = options;
    if what == "digits" {
        return Ok(Arc::new(digits::Digits::new()?));
    }
    let path = Path::new(what);
    if path.is_dir() {
        let size =
            image_size.ok_or_else(|| Error::usage(format!("the images of {what} need a size: set image_size")))?;
        let folder = match follow_links {
            true => images::ImageFolder::open_with_links(path, size),
            false => images::ImageFolder::open(path, size),
        };
        return Ok(Arc::new(folder?));
    }
    if !path.exists() {
        let what = "does not exist; data is 'digits', a folder of class folders, a .safetensors or a .npy file";
        return Err(Error::file(path, what));
    }
    if !is_array_file(path) {
        return Err(Error::file(path, "is neither a folder of images nor a .safetensors or .npy file"));
    }
    Ok(Arc::new(array_file::ArrayFile::open(path, num_classes, pictures)?))
}
