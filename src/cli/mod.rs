//! The command line: one file per command.

mod bench;
mod completions;
mod info;
mod knobs;
mod sample;
mod train;

use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};

/// Exit code when what was asked for makes no sense; clap uses the same.
const USAGE: u8 = 2;
/// Exit code when something sensible failed.
const FAILURE: u8 = 1;
/// What a shell reports of a program that ended because nobody reads its output any more: 128 + SIGPIPE.
const BROKEN_PIPE: i32 = 141;

/// Diffusion transformers with Denoising Task Routing: train, sample, compare.
#[derive(Debug, Parser)]
#[command(name = "dtr-fused", version, arg_required_else_help = true, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  dtr-fused train                              train a small model on handwritten digits (two minutes on two cores)
  dtr-fused train --data photos --image-size 64 --model DiT-S/4
  dtr-fused sample --checkpoint runs/digits-paper-0001
  dtr-fused info runs/digits-paper-0001        what a run holds
";

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Sample(sample::SampleArgs),
    Bench(bench::BenchArgs),
    Info(info::InfoArgs),
    Completions(completions::CompletionsArgs),
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(report_panic));
    // Arguments that make no sense end the process here, with exit code 2.
    let cli = Cli::parse();
    match panic::catch_unwind(|| run(cli.command)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("error: {error}");
            ExitCode::from(if matches!(error, Error::Usage(_)) { USAGE } else { FAILURE })
        }
        // The hook has said what there is to say.
        Err(_) => ExitCode::from(FAILURE),
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Train(args) => train::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Info(args) => info::run(args),
        Command::Completions(args) => completions::run(args),
    }
}

/// Turns a panic into one sentence. A closed or full standard output is no bug: `println!` panics on both.
fn report_panic(info: &PanicHookInfo) {
    let message = info.payload_as_str().unwrap_or("no message").replace('\n', " ");
    if let Some(what) = message.strip_prefix("failed printing to std") {
        if !what.contains("Broken pipe") {
            eprintln!(
                "error: the output cannot be written: {}",
                what.split_once(": ").map_or(what, |(_, error)| error)
            );
            std::process::exit(i32::from(FAILURE));
        }
        std::process::exit(BROKEN_PIPE);
    }
    let place = info.location().map_or(String::new(), |at| format!(" at {}:{}", at.file(), at.line()));
    eprintln!(
        "error: this is a bug in dtr-fused {}{place}: {message}; please report this line",
        env!("CARGO_PKG_VERSION")
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains(&format!("dtr-fused {}", command.get_name())), "{}", command.get_name());
            assert!(command.get_about().is_some(), "{}", command.get_name());
        }
    }
}
