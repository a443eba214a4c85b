//! Data whose classes have other numbers than where they lie.

use std::sync::Arc;

use super::Dataset;
use crate::error::Result;

/// `dataset` with the classes `names`, of which its class `i` is number `labels[i]`: some classes of a larger data set, say.
///
/// # Panics
/// When there are not as many `labels` as classes, or one has no name.
pub(crate) fn renumber(dataset: Arc<dyn Dataset>, labels: Vec<u32>, names: Vec<String>) -> Arc<dyn Dataset> {
    assert!(labels.len() == dataset.num_classes() && labels.iter().all(|&label| (label as usize) < names.len()));
    Arc::new(Renumbered { dataset, labels, names })
}

struct Renumbered {
    dataset: Arc<dyn Dataset>,
    labels: Vec<u32>,
    names: Vec<String>,
}

impl Dataset for Renumbered {
    fn shape(&self) -> [usize; 3] {
        self.dataset.shape()
    }

    fn class_names(&self) -> &[String] {
        &self.names
    }

    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn read(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<u32> {
        Ok(self.labels[self.dataset.read(index, flip, out)? as usize])
    }

    fn read_std(&self, index: usize, flip: bool, out: &mut [f32]) -> Result<bool> {
        self.dataset.read_std(index, flip, out)
    }

    fn number_of(&self, index: usize) -> usize {
        self.dataset.number_of(index)
    }

    fn is_pictures(&self) -> bool {
        self.dataset.is_pictures()
    }

    fn note(&self) -> Option<&str> {
        self.dataset.note()
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::made;
    use super::*;

    #[test]
    fn samples_keep_all_but_their_label() {
        let few = made(4, 2, |index, flip, out| {
            out.fill(index as f32 + if flip { 0.5 } else { 0.0 });
            Ok(index as u32 % 2)
        });
        let names = ["ant", "bee", "cat", "dog"].map(String::from).to_vec();
        let data = renumber(few, vec![3, 1], names.clone());
        assert_eq!((data.len(), data.num_classes(), data.class_names()), (4, 4, &names[..]));
        let mut out = [0.0; 16];
        let labels: Vec<u32> = (0..4).map(|index| data.read(index, true, &mut out).unwrap()).collect();
        assert_eq!((labels, out[0], data.number_of(2)), (vec![3, 1, 3, 1], 3.5, 2));
    }
}
