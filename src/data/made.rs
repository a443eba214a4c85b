//! Data sets for tests.

use std::sync::Arc;

use super::Dataset;
use crate::error::Result;

/// Samples `[1, 4, 4]` that a function makes.
struct Made<F> {
    samples: usize,
    names: Vec<String>,
    make: F,
}

/// A data set of so many samples and classes; `make` is its [`read`](Dataset::read).
pub(crate) fn made<F>(samples: usize, classes: usize, make: F) -> Arc<dyn Dataset>
where
    F: Fn(usize, bool, &mut [f32]) -> Result<u32> + Send + Sync + 'static,
{
    let names = (0..classes).map(|class| format!("class {class}")).collect();
    Arc::new(Made { samples, names, make })
}

impl<F: Fn(usize, bool, &mut [f32]) -> Result<u32> + Send + Sync> Dataset for Made<F> {
    fn shape(&self) -> [usize; 3] {
        [1, 4, 4]
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self) -> usize {
        self.samples
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        (self.make)(index, flip, out)
    }
}
