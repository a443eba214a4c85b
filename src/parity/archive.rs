//! The tensors of one file of a case, as numbers.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::safetensors_file::{SafetensorsFile, TensorView};
use std::path::Path;

/// An open file of a case. A tensor `X` may be stored as `X.f64` (the reference), `X` or `X.f32`.
pub struct Archive {
    file: SafetensorsFile,
    /// The file's name without extension: the first part of its rows' names.
    pub stem: String,
}

impl Archive {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read or is no safetensors file.
    pub fn open(path: &Path, stem: &str) -> Result<Self> {
        Ok(Archive { file: SafetensorsFile::open(path)?, stem: stem.to_string() })
    }

    /// Names of the tensors without `.f64` and `.f32`, each once, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.file.names().map(|name| base(name).to_string()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// The file's own description of itself.
    pub fn meaning(&self) -> &str {
        self.file.metadata().get("meaning").map_or("", String::as_str)
    }

    /// Whether there is a tensor `name`, in any precision.
    pub fn has(&self, name: &str) -> bool {
        self.view(name).is_some()
    }

    /// Shape of the tensor `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(self.need(name)?.shape)
    }

    /// The most exact version of `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn f64s(&self, name: &str) -> Result<Vec<f64>> {
        let view = self.need(name)?;
        if view.element == Element::F64 {
            return Ok(view.bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect());
        }
        if let Some(integers) = integers(&view) {
            return Ok(integers.into_iter().map(|i| i as f64).collect());
        }
        Ok(to_f32(&view).into_iter().map(f64::from).collect())
    }

    /// `name` as f32.
    ///
    /// # Errors
    /// When there is none.
    pub fn f32s(&self, name: &str) -> Result<Vec<f32>> {
        Ok(to_f32(&self.need(name)?))
    }

    /// `name` as f32, which must have the given shape.
    ///
    /// # Errors
    /// When there is none, or of another shape.
    pub fn f32s_of(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check_shape(name, shape)?;
        self.f32s(name)
    }

    /// The non-negative integers of `name`, of the given shape.
    ///
    /// # Errors
    /// When there is none, it has another shape, or holds something else.
    pub fn indices(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>> {
        self.check_shape(name, shape)?;
        let values = integers(&self.need(name)?).unwrap_or_default();
        let found: Vec<u32> = values.iter().filter_map(|&i| u32::try_from(i).ok()).collect();
        if found.len() != shape.iter().product::<usize>() {
            return Err(self.error(format!("tensor '{name}' must hold integers of at least 0")));
        }
        Ok(found)
    }

    /// An error about this file.
    pub fn error(&self, what: String) -> Error {
        Error::file(self.file.path(), what)
    }

    /// Refuses a tensor `name` of another shape.
    ///
    /// # Errors
    /// When there is none, or of another shape.
    pub fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let found = self.shape(name)?;
        if found != shape {
            return Err(self.error(format!("tensor '{name}' has the shape {found:?}, expected {shape:?}")));
        }
        Ok(())
    }

    fn view(&self, name: &str) -> Option<TensorView<'_>> {
        [".f64", "", ".f32"].into_iter().find_map(|suffix| self.file.get(&format!("{name}{suffix}")))
    }

    fn need(&self, name: &str) -> Result<TensorView<'_>> {
        match self.view(name) {
            Some(view) => Ok(view),
            None => self.file.tensor(name),
        }
    }
}

fn base(name: &str) -> &str {
    name.strip_suffix(".f64").or_else(|| name.strip_suffix(".f32")).unwrap_or(name)
}

fn integers(view: &TensorView<'_>) -> Option<Vec<i128>> {
    view.bytes.chunks_exact(view.element.size()).map(|bytes| view.element.to_integer(bytes)).collect()
}

fn to_f32(view: &TensorView<'_>) -> Vec<f32> {
    let mut out = vec![0.0; view.elements()];
    view.to_f32(&mut out);
    out
}

/// f32 as f64.
pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}
