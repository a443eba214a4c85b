//! `dtr-fused train`.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use super::knobs::KnobFlags;
use crate::error::{Error, Result};
use crate::train::config::{Assignment, Layer};
use crate::train::{TrainConfig, checkpoint, trainer};

/// Set by Ctrl-C: finish the step, write a checkpoint, end.
static STOP: AtomicBool = AtomicBool::new(false);

const EXAMPLES: &str = "\
Values are taken from the defaults of the model, then the file of --config, then --set, then the other flags.

Examples:
  dtr-fused train                                       digits, about two minutes on two cores
  dtr-fused train --routing sublayer --beta 0.5         our variant that skips half of all channels
  dtr-fused train --data photos --image-size 64 --model DiT-S/4 --batch-size 32 --steps 20000
  dtr-fused train --resume runs/digits-paper-0001       go on after a kill, bit for bit
  dtr-fused train --resume runs/digits-paper-0001 --steps 2000
  dtr-fused train --print-config > my.toml              a file with every knob, to edit
  dtr-fused train --config my.toml --set lr=1e-4 ema_decay=0.9995
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

pub(super) fn run(args: TrainArgs) -> Result<()> {
    let layers = layers(&args)?;
    let Some(path) = &args.resume else {
        let config = TrainConfig::from_layers(&layers)?;
        TrainConfig::note_on(&layers).iter().for_each(|note| eprintln!("note: {note}"));
        if args.print_config {
            print!("{}", config.to_toml());
            return Ok(());
        }
        stop_on_signals();
        return report(&trainer::start(config, &STOP)?);
    };
    let place = checkpoint::resolve(path)?;
    let Some(run) = &place.run else {
        return Err(Error::file(
            path,
            "is a checkpoint outside of its run: --resume needs DIR/checkpoints/STEP with the run's config.toml in DIR",
        ));
    };
    let config = TrainConfig::from_file(&run.join(checkpoint::CONFIG))?.resumed_with(&layers)?;
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    stop_on_signals();
    report(&trainer::resume(config, run, place.checkpoint.as_deref(), &STOP)?)
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
    let handler = || {
        if STOP.swap(true, Ordering::Relaxed) {
            process::exit(130);
        }
        eprintln!("\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without");
    };
    // A process whose signals cannot be caught trains all the same; a kill costs it the steps since the last checkpoint.
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("note: Ctrl-C will stop without a checkpoint: {error}");
    }
}

fn report(outcome: &trainer::Outcome) -> Result<()> {
    let run = quoted(&outcome.run);
    if !outcome.finished {
        println!(
            "Stopped after step {} with a checkpoint; to go on, type: dtr-fused train --resume {run}",
            outcome.step
        );
        return Ok(());
    }
    let samples = outcome.samples.as_deref().map_or(run.clone(), quoted);
    println!("Samples are in {samples}; for more, type: dtr-fused sample --checkpoint {run}");
    Ok(())
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
