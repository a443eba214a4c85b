//! Which images are made: the label of each, and which part of them.

use std::ops::Range;

use super::SampleArgs;
use super::files::GRID_ROWS;
use crate::error::{Error, Result, printable};
use crate::train::TrainConfig;

/// Names of classes that a message lists, and letters of each.
const MOST_LISTED: usize = 20;
const MOST_LETTERS: usize = 40;

/// The label of every image: where all are kept, the classes in turn, and else class by class. `names` are those of the classes, if they are
/// known.
pub(super) fn labels(args: &SampleArgs, config: &TrainConfig, names: &[String]) -> Result<Vec<u32>> {
    let all = config.num_classes;
    if all == 0 {
        return Err(Error::usage("num_classes is 0 in the configuration of this model, but a run has at least 1"));
    }
    let classes = if config.no_classes() {
        if !args.classes.is_empty() {
            return Err(Error::usage(
                "--classes are given, but this model was trained without (label_dropout 1): leave them out",
            ));
        }
        vec![all]
    } else if args.classes.is_empty() {
        // Images that nobody asked for and the grid does not show are not made.
        let rows =
            if args.num.is_some() || args.npz.is_some() || args.images.is_some() { all } else { all.min(GRID_ROWS) };
        (0..rows).collect()
    } else {
        let classes = args.classes.iter().map(|text| classes_of(text, all, &names[..names.len().min(all)]));
        classes.collect::<Result<Vec<_>>>()?.concat()
    };
    let num = args.num.unwrap_or(10 * classes.len());
    if num == 0 || num > 1 << 24 {
        return Err(Error::usage(format!("--num is {num}, but it must be between 1 and {}", 1 << 24)));
    }
    // An evaluation may take the images in blocks, each of which must then have all classes.
    if args.npz.is_some() || args.images.is_some() {
        return Ok((0..num).map(|i| classes[i % classes.len()] as u32).collect());
    }
    let share = |i: usize| num / classes.len() + usize::from(i < num % classes.len());
    Ok(classes.iter().enumerate().flat_map(|(i, &class)| std::iter::repeat_n(class as u32, share(i))).collect())
}

/// The classes, of `all`, that a value of `--classes` means: a name, which may have commas, or several between commas.
fn classes_of(text: &str, all: usize, names: &[String]) -> Result<Vec<usize>> {
    if text.contains(',') && names.iter().any(|name| name == text) {
        return Ok(some_classes(text, all, names)?.collect());
    }
    let some = text.split(',').map(|text| some_classes(text, all, names));
    Ok(some.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// The classes that a number, a range of numbers or a name means.
fn some_classes(text: &str, all: usize, names: &[String]) -> Result<Range<usize>> {
    let refused = |why: &str| {
        let last = all - 1;
        let mut ways = format!("give numbers from 0 to {last} or ranges such as 0..{all}");
        if !names.is_empty() {
            let more = if names.len() > MOST_LISTED { ", .. (info lists all)" } else { "" };
            let names: Vec<String> = names.iter().take(MOST_LISTED).map(|name| shown(name)).collect();
            ways += &format!(", or of {}{more}", names.join(", "));
        }
        Error::usage(format!("--classes has {}, {why}: {ways}", shown(text)))
    };
    match (text.parse::<usize>().ok(), names.iter().position(|name| name == text)) {
        (Some(number), Some(class)) if number != class && number < all => {
            let [of_name, of_number] = [class, number].map(|class| format!("{class}..{}", class + 1));
            Err(Error::usage(format!(
                "--classes has {}, which is the name of class {class} and the number of another: give {of_name} for the name, {of_number} \
                 for the number",
                shown(text)
            )))
        }
        (_, Some(class)) => Ok(class..class + 1),
        (Some(number), None) if number < all => Ok(number..number + 1),
        (Some(_), None) => Err(refused(&format!("but there are only {all} classes"))),
        (None, None) if text.contains("..") => {
            range(text, all).ok_or_else(|| refused(&format!("but a range is A..B with A < B and B at most {all}")))
        }
        (None, None) => Err(refused("but there is no such class")),
    }
}

/// A name as a message shows it.
fn shown(name: &str) -> String {
    let cut: String = name.chars().take(MOST_LETTERS).collect();
    let rest = if cut.len() < name.len() { ".." } else { "" };
    format!("'{}{rest}'", printable(&cut))
}

/// What `A..B`, `A..` or `..B` leaves of `n`, if it is that, and anything.
pub(super) fn range(text: &str, n: usize) -> Option<Range<usize>> {
    let number = |text: &str, end| if text.is_empty() { Some(end) } else { text.parse().ok() };
    let (first, end) = text.split_once("..")?;
    Some(number(first, 0)?..number(end, n)?).filter(|range| range.start < range.end && range.end <= n)
}

/// What `--only` leaves of `n` images.
pub(super) fn part(text: &str, n: usize) -> Result<Range<usize>> {
    range(text, n).ok_or_else(|| {
        let what = "but it must be A..B (or A.. or ..B) with A < B";
        Error::usage(format!("--only is {text}, {what} and B at most {n}, the number of images"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_numbers_and_names() {
        let names = ["10", "cat", "dog, small", "3", "0"].map(String::from);
        let of = |text| classes_of(text, 5, &names);
        for (text, expected) in [
            ("10", &[0][..]),
            ("3", &[3]),
            ("2", &[2]),
            ("1..3", &[1, 2]),
            ("..", &[0, 1, 2, 3, 4]),
            ("3..,cat", &[3, 4, 1]),
            ("dog, small", &[2]),
            ("cat,2,cat", &[1, 2, 1]),
        ] {
            assert_eq!(of(text).unwrap(), expected, "{text}");
        }
        let message = of("0").unwrap_err().to_string();
        let says = "--classes has '0', which is the name of class 4 and the number of another: give 4..5 for the name, 0..1 for the number";
        assert_eq!(message, says);
        let ways = "give numbers from 0 to 4 or ranges such as 0..5, or of '10', 'cat', 'dog, small', '3', '0'";
        for (text, why) in [
            ("5", "'5', but there are only 5 classes"),
            ("2..2", "'2..2', but a range is A..B with A < B and B at most 5"),
            ("3..1", "'3..1', but a range is"),
            ("0..6", "'0..6', but a range is"),
            ("cat,cow", "'cow', but there is no such class"),
            ("", "'', but there is no such class"),
            ("-1", "'-1', but there is no such class"),
        ] {
            let message = of(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("--classes has {why}")) && message.ends_with(ways), "{message}");
        }
        let long = ["x".repeat(1000)];
        let message = classes_of(&"y".repeat(1000), 1, &long).unwrap_err().to_string();
        assert!(message.len() < 300 && message.contains("x..'") && message.contains("y..'"), "{message}");
    }
}
