//! `dtr-fused train`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::knobs::KnobFlags;
use super::signals::{self, STOP};
use crate::error::{Error, Result, printable};
use crate::train::config::{Assignment, Layer};
use crate::train::progress::say;
use crate::train::{TrainConfig, checkpoint, resume, trainer};

const EXAMPLES: &str = "\
Values are taken from the defaults of the model, then the file of --config, then --set, then the other flags.

Examples:
  dtr-fused train                                       digits, about a minute on two cores
  dtr-fused train --routing sublayer --beta 0.5         our variant that skips half of all channels
  dtr-fused train --data photos --image-size 64 --model DiT-S/4 --batch-size 32 --steps 20000
  dtr-fused train --resume runs/digits-paper-0001       go on after a kill, bit for bit
  dtr-fused train --resume runs/digits-paper-0001 --steps 2000
  dtr-fused train --print-config > my.toml              a file with every knob, to edit
  dtr-fused train --config my.toml --set lr=1e-4 ema_decay=0.9995

Ctrl-C, SIGTERM and SIGHUP stop after the step in progress, with a checkpoint; --resume goes on. The exit code is then 130
(Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), and 0 only when all steps are done.
";

/// Train a diffusion transformer; with no arguments, a small one on handwritten digits
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(super) struct TrainArgs {
    /// Read the configuration from this TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set keys of the configuration
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    set: Vec<String>,
    /// Go on with the run in this directory from its latest checkpoint, or from the checkpoint in this directory
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Print the whole configuration, every knob with a comment, and exit
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    knobs: KnobFlags,
}

pub(super) fn run(args: TrainArgs) -> Result<ExitCode> {
    let layers = layers(&args)?;
    let Some(path) = &args.resume else {
        let config = TrainConfig::from_layers(&layers)?;
        TrainConfig::notes_on(&layers).iter().for_each(|note| say(&format!("note: {note}")));
        if args.print_config {
            print!("{}", config.to_toml());
            return Ok(ExitCode::SUCCESS);
        }
        stop_on_signals();
        return Ok(report(&trainer::start(config, &STOP)?));
    };
    let place = checkpoint::resolve(path)?;
    let Some(run) = &place.run else {
        return Err(Error::file(
            path,
            "is a checkpoint outside of its run: --resume needs DIR/checkpoints/STEP with the run's config.toml in DIR",
        ));
    };
    // The latest is found when no other process trains the run any more.
    let checkpoint = place.checkpoint.as_deref().filter(|_| run != path);
    let config = resume::config_of(run)?.resumed_with(&layers)?;
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    stop_on_signals();
    Ok(report(&trainer::resume(config, run, checkpoint, &STOP)?))
}

/// What was given beyond the defaults, in rising order of weight.
fn layers(args: &TrainArgs) -> Result<Vec<Layer>> {
    let mut layers: Vec<Layer> = args.config.as_deref().map(Layer::from_file).transpose()?.into_iter().collect();
    let assignments = args.set.iter().map(|argument| Assignment::from_argument(argument)).collect::<Result<_>>()?;
    layers.push(Layer { origin: "--set".into(), assignments });
    layers.push(args.knobs.layer.clone());
    Ok(layers)
}

fn stop_on_signals() {
    // A process whose signals cannot be caught trains all the same; a kill costs it the steps since the last checkpoint.
    if let Err(error) = signals::stop_on_signals("with a checkpoint") {
        say(&format!("note: Ctrl-C will stop without a checkpoint: {error}"));
    }
}

/// Says how training ended and what to type next.
fn report(outcome: &trainer::Outcome) -> ExitCode {
    let run = quoted(&outcome.run);
    let (line, code) = if outcome.finished {
        let samples = outcome.samples.as_deref().map(quoted);
        let there = samples
            .map_or(format!("The run is in {run}; for samples"), |path| format!("Samples are in {path}; for more"));
        let line = format!("{there}, type: dtr-fused sample --checkpoint {run}");
        let done =
            format!("All {0} steps were done already: to train on, give --steps with more than {0}. ", outcome.step);
        (if outcome.step == outcome.began { done + &line } else { line }, ExitCode::SUCCESS)
    } else {
        let line = format!(
            "Stopped after step {} with a checkpoint; to go on, type: dtr-fused train --resume {run}",
            outcome.step
        );
        (line, ExitCode::from(signals::exit_code()))
    };
    // The run is on the disk: that nobody reads this line is no failure.
    let _ = writeln!(io::stdout(), "{}", printable(&line));
    code
}

/// A path as one can paste it into a shell.
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    if path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_can_be_pasted() {
        assert_eq!(quoted(Path::new("runs/digits-paper-0001")), "runs/digits-paper-0001");
        assert_eq!(quoted(Path::new("my run's")), r"'my run'\''s'");
    }
}
