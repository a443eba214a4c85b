//! Whether data are those of before: by a few of their samples.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::Dataset;

/// Samples that are compared, and numbers of them at most.
const COMPARED: usize = 32;
const NUMBERS_COMPARED: usize = 1 << 24;

/// Means that differ by less are of the same sample: another decoder of pictures may round otherwise.
const MEANS_DIFFER: f64 = 2e-3;

/// Labels and means of a few samples, spread evenly over `dataset`: `LABEL:MEAN` with spaces between them, `-` for one that cannot be read.
/// Numbers weigh 0.5 to 1.5 in the mean, by their places: samples may all have the same of equal weights, and be mirrored.
pub(crate) fn fingerprint(dataset: &dyn Dataset) -> String {
    let mut values = vec![0.0; dataset.shape().iter().product()];
    let count = COMPARED.min(NUMBERS_COMPARED / values.len()).clamp(1, dataset.len());
    let of_sample = |i| {
        // A data set may be anybody's: the loader tells of one that panics.
        let read = catch_unwind(AssertUnwindSafe(|| dataset.read(i * dataset.len() / count, false, &mut values)));
        let Ok(Ok(label)) = read else { return "-".into() };
        let weighed = values.iter().enumerate().map(|(i, &value)| weight(i) * f64::from(value));
        let mean = weighed.sum::<f64>() / values.len() as f64;
        format!("{label}:{mean:.6}")
    };
    (0..count).map(of_sample).collect::<Vec<_>>().join(" ")
}

/// Far from those of its neighbours, whatever the sizes are.
fn weight(place: usize) -> f64 {
    0.5 + (place as f64 * 0.618_033_988_749_894_9).fract()
}

/// How many samples are others, by the fingerprints of as many of before and now, if any are. One that could not be read may be the same.
pub(crate) fn difference(were: &str, are: &str) -> Option<String> {
    let parsed = |sample: &str| {
        let (label, mean) = sample.split_once(':')?;
        Some((label.parse::<u32>().ok()?, mean.parse::<f64>().ok()?))
    };
    let both = |(was, is)| Some((parsed(was)?, parsed(is)?));
    let pairs: Vec<_> = were.split(' ').zip(are.split(' ')).filter_map(both).collect();
    let other = |((label, mean), (is, mean_is)): &((u32, f64), (u32, f64))| {
        label != is || (mean - mean_is).abs() > MEANS_DIFFER
    };
    let others = pairs.iter().filter(|pair| other(pair)).count();
    (others > 0).then(|| format!("{others} of {} samples that were compared", pairs.len()))
}

#[cfg(test)]
mod tests {
    use super::super::made::made;
    use super::*;
    use crate::error::Error;
    use std::sync::{Arc, Mutex};

    /// The fingerprint of `samples` of which `labels` and brightness tell their number, but those that `change` changes: None is
    /// damaged.
    fn of(samples: usize, change: impl Fn(usize) -> Option<[u32; 2]> + Send + Sync + 'static) -> String {
        fingerprint(&*made(samples, 10, move |index, flip, out| {
            let [label, value] = change(index).ok_or(Error::file("sample", "is damaged"))?;
            out.fill(if flip { f32::NAN } else { 0.5 });
            out[index % 16] = value as f32;
            Ok(label)
        }))
    }

    fn plain(index: usize) -> Option<[u32; 2]> {
        Some([index as u32 % 10, index as u32])
    }

    #[test]
    fn few_samples_are_read_and_from_everywhere() {
        for (samples, expected) in [(1, 1), (31, 31), (1000, 32)] {
            let read = Arc::new(Mutex::new(Vec::new()));
            let seen = read.clone();
            of(samples, move |index| {
                seen.lock().unwrap().push(index);
                plain(index)
            });
            let read = read.lock().unwrap();
            assert_eq!(read.len(), expected);
            assert!(read[0] == 0 && read.windows(2).all(|pair| (1..=32).contains(&(pair[1] - pair[0]))), "{read:?}");
            assert!(samples - read[expected - 1] <= 32, "{read:?}");
        }
    }

    #[test]
    fn another_label_or_value_or_order_is_told() {
        let before = of(10, plain);
        assert_eq!(difference(&before, &of(10, plain)), None);
        let one = Some("1 of 10 samples that were compared".to_string());
        assert_eq!(difference(&before, &of(10, |i| if i == 3 { Some([4, 3]) } else { plain(i) })), one);
        assert_eq!(difference(&before, &of(10, |i| if i == 9 { Some([9, 8]) } else { plain(i) })), one);
        assert_eq!(
            difference(&before, &of(10, |i| plain([1, 0][..].get(i).copied().unwrap_or(i)))).unwrap(),
            "2 of 10 samples that were compared"
        );
    }

    #[test]
    fn samples_of_the_same_mean_are_told_apart() {
        let of = |mirrored: bool| {
            fingerprint(&*made(10, 1, move |_, _, out| {
                out.iter_mut().enumerate().for_each(|(i, x)| *x = if (i % 4 < 2) != mirrored { 0.5 } else { -0.5 });
                Ok(0)
            }))
        };
        assert_eq!(difference(&of(false), &of(true)).unwrap(), "10 of 10 samples that were compared");
    }

    #[test]
    fn a_data_set_that_panics_is_not_compared() {
        let panics = fingerprint(&*made(3, 1, |index, _, _| if index == 1 { panic!("at 1") } else { Ok(0) }));
        assert_eq!(panics, "0:0.000000 - 0:0.000000");
    }

    /// As two decoders of pictures may.
    #[test]
    fn what_rounds_otherwise_is_the_same() {
        let of = |more: f32| {
            fingerprint(&*made(10, 10, move |index, _, out| {
                out.fill(index as f32 / 10.0 + more);
                Ok(0)
            }))
        };
        assert_eq!(difference(&of(0.0), &of(0.001)), None);
        assert_eq!(difference(&of(0.0), &of(0.01)).unwrap(), "10 of 10 samples that were compared");
    }

    #[test]
    fn a_sample_that_cannot_be_read_may_be_the_same() {
        let before = of(10, plain);
        let damaged = of(10, |i| plain(i).filter(|_| i != 3));
        assert_eq!(difference(&before, &damaged), None);
        assert_eq!(difference(&damaged, &before), None);
        assert_eq!(difference(&before, &of(10, |_| None)), None);
        let other = of(10, |i| plain(if i == 9 { 0 } else { i }).filter(|_| i != 3));
        assert_eq!(difference(&before, &other).unwrap(), "1 of 9 samples that were compared");
    }
}
