//! The knobs of a training run as flags: `--batch-size` for the key `batch_size`.

use clap::builder::StringValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use super::offered::Offered;
use crate::train::TrainConfig;
use crate::train::config::{Assignment, KNOBS, Knob, Layer};

/// Shown by `-h`; `--help` shows all.
const MAIN: &[&str] = &[
    "model",
    "data",
    "image_size",
    "routing",
    "beta",
    "alpha",
    "prediction",
    "loss_weight",
    "schedule",
    "steps",
    "batch_size",
    "lr",
    "device",
    "precision",
    "seed",
    "out",
];

/// The flags that were given.
#[derive(Clone, Debug, Default)]
pub(super) struct KnobFlags {
    /// One assignment per flag.
    pub(super) layer: Layer,
}

impl Args for KnobFlags {
    fn augment_args(command: Command) -> Command {
        let digits = TrainConfig::default();
        let published = TrainConfig::preset("DiT-XL/2", "digits").unwrap_or_default();
        KNOBS.iter().fold(command, |command, knob| command.arg(flag(knob, &digits, &published)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn flag(knob: &Knob, digits: &TrainConfig, published: &TrainConfig) -> Arg {
    let (small, large) = (digits.toml_of(knob.name), published.toml_of(knob.name));
    let default = match knob.name {
        // Shapes come with the model's name.
        "hidden_size" | "depth" | "num_heads" | "patch_size" => "default: the model's".into(),
        "model" => format!("default: {small}"),
        "learn_sigma" => format!("default: {small}; false for flow"),
        "flip" => "default: true for a folder of images, else false".into(),
        _ if small == large => format!("default: {small}"),
        _ => format!("default: {small}; {large} for DiT models"),
    };
    let value_name = match knob.name {
        "model" => "NAME",
        "data" | "validation_data" => "digits|DIR|FILE",
        "device" => "auto|cpu|cuda[:N]",
        "out" => "DIR",
        "init_from" => "FILE",
        _ => knob.value_name,
    };
    let arg = Arg::new(knob.name)
        .long(knob.name.replace('_', "-"))
        .value_name(value_name)
        .help(format!("{} [{default}]", knob.help))
        .help_heading(knob.section)
        .hide_short_help(!MAIN.contains(&knob.name));
    // Minus signs begin values such as -1, whose message says more than "unexpected argument".
    let arg = arg.allow_negative_numbers(true);
    let offered = match knob.name {
        "model" => Some(TrainConfig::model_names().join("|")),
        "device" => Some("auto|cpu|cuda".into()),
        _ => Some(knob.value_name.to_string()).filter(|names| names.contains('|')),
    };
    let arg = match offered {
        Some(names) => arg.value_parser(Offered(names, StringValueParser::new())).hide_possible_values(true),
        None => arg,
    };
    if knob.value_name == "true|false" { arg.num_args(0..=1).default_missing_value("true") } else { arg }
}

impl FromArgMatches for KnobFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = KnobFlags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let given = KNOBS.iter().filter(|knob| matches.value_source(knob.name) == Some(ValueSource::CommandLine));
        let assignment = |knob: &Knob| {
            let text = matches.get_one::<String>(knob.name)?.clone();
            Some(Assignment { key: knob.name.into(), text })
        };
        self.layer = Layer { origin: "the command line".into(), assignments: given.filter_map(assignment).collect() };
        Ok(())
    }
}
