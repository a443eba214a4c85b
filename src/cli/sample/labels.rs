//! Which images are made: the label of each, and which part of them.

use std::ops::Range;

use super::SampleArgs;
use super::files::GRID_ROWS;
use crate::error::{Error, Result, printable};
use crate::train::TrainConfig;

/// Names of classes that a message lists.
const MOST_LISTED: usize = 20;

/// The label of every image, by class. `names` are those of the classes, if they are known.
pub(super) fn labels(args: &SampleArgs, config: &TrainConfig, names: Option<&[String]>) -> Result<Vec<u32>> {
    let all = config.num_classes as u32;
    let classes = if config.no_classes() {
        if !args.classes.is_empty() {
            return Err(Error::usage(
                "--classes are given, but this model was trained without (label_dropout 1): leave them out",
            ));
        }
        vec![all]
    } else if args.classes.is_empty() {
        // Images that nobody asked for and the grid does not show are not made.
        let rows = if args.num.is_some() || args.npz.is_some() { all } else { all.min(GRID_ROWS as u32) };
        (0..rows).collect()
    } else {
        let classes = args.classes.iter().map(|text| classes_of(text, all, names));
        classes.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
    };
    let num = args.num.unwrap_or(10 * classes.len());
    if num == 0 || num > 1 << 24 {
        return Err(Error::usage(format!("--num is {num}, but it must be between 1 and {}", 1 << 24)));
    }
    let share = |i: usize| num / classes.len() + usize::from(i < num % classes.len());
    Ok(classes.iter().enumerate().flat_map(|(i, &class)| std::iter::repeat_n(class, share(i))).collect())
}

/// The classes that `text` means: a number, numbers `A..B` without B, or a name.
fn classes_of(text: &str, all: u32, names: Option<&[String]>) -> Result<Range<u32>> {
    let number = |text: &str, end: u32| if text.is_empty() { Some(end) } else { text.parse().ok() };
    let range = match text.split_once("..") {
        Some((first, end)) => number(first, 0).zip(number(end, all)),
        None => text.parse().ok().map(|class: u32| (class, class.saturating_add(1))),
    };
    let named = || names?.iter().position(|name| name == text);
    match (range, named()) {
        (Some((first, end)), _) if first < end && end <= all => Ok(first..end),
        (None, Some(class)) if class < all as usize => Ok(class as u32..class as u32 + 1),
        (Some(_), _) => Err(Error::usage(format!("class {text} is outside 0..{all}: this model knows {all} classes"))),
        (None, _) => {
            let listed = names.map_or(String::new(), |names| {
                let more = if names.len() > MOST_LISTED { ", .. (info lists them all)" } else { "" };
                let names: Vec<String> = names.iter().take(MOST_LISTED).map(|name| printable(name)).collect();
                format!(", or one of {}{more}", names.join(", "))
            });
            Err(Error::usage(format!(
                "there is no class '{text}': give numbers below {all}, such as 3 or 0..10{listed}"
            )))
        }
    }
}

/// What `--only` leaves of `n` images.
pub(super) fn part(text: &str, n: usize) -> Result<Range<usize>> {
    let number = |text: &str, end| if text.is_empty() { Some(end) } else { text.parse().ok() };
    let range = text.split_once("..").and_then(|(a, b)| Some(number(a, 0)?..number(b, n)?));
    range.filter(|range| range.start < range.end && range.end <= n).ok_or_else(|| {
        let what = "but it must be A..B (or A.. or ..B) with A < B";
        Error::usage(format!("--only is {text}, {what} and B at most {n}, the number of images"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_numbers_and_names() {
        let names = ["10", "cat", "dog, small", "a..b"].map(String::from);
        let of = |text| classes_of(text, 4, Some(&names));
        for (text, expected) in
            [("0", 0..1), ("3", 3..4), ("1..3", 1..3), ("..", 0..4), ("2..", 2..4), ("cat", 1..2), ("dog, small", 2..3)]
        {
            assert_eq!(of(text).unwrap(), expected, "{text}");
        }
        for outside in ["4", "10", "2..2", "3..1", "0..5", "4294967295"] {
            assert!(of(outside).unwrap_err().to_string().contains("is outside 0..4"), "{outside}");
        }
        for (unknown, names, listed) in
            [("cow", Some(&names[..]), ", or one of 10, cat, dog, small, a..b"), ("-1", None, "0..10")]
        {
            let message = classes_of(unknown, 4, names).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("there is no class '{unknown}'")) && message.ends_with(listed),
                "{message}"
            );
        }
        // More names than the model has classes.
        assert!(classes_of("dog, small", 2, Some(&names)).is_err());
    }
}
