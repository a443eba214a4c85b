//! The command line: one file per command.

mod bench;
mod bench_cuda;
mod completions;
mod compute;
mod info;
mod info_runs;
mod kernels;
mod knobs;
mod offered;
mod parity;
mod sample;
mod signals;
mod source;
mod train;
mod validate;

use std::ffi::OsString;
use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::error::{Error, Result, printable};
use crate::train::progress::say;

/// Exit code when what was asked for makes no sense; clap uses the same.
const USAGE: u8 = 2;
/// Exit code when something sensible failed.
const FAILURE: u8 = 1;
/// What a shell reports of a program that ended because nobody reads its output any more: 128 + SIGPIPE.
const BROKEN_PIPE: i32 = 141;

/// Diffusion transformers with Denoising Task Routing: train, sample, compare.
#[derive(Debug, Parser)]
#[command(name = "dtr-fused", bin_name = "dtr-fused", version, arg_required_else_help = true, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  dtr-fused train                              train a small model on handwritten digits (about a minute on two cores)
  dtr-fused train --data photos --image-size 64 --model DiT-S/4
  dtr-fused sample --checkpoint runs/digits-paper-0001
  dtr-fused info runs/digits-paper-0001        what a run holds
";

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::TrainArgs),
    Sample(sample::SampleArgs),
    Bench(bench::BenchArgs),
    Kernels(kernels::KernelsArgs),
    Validate(validate::ValidateArgs),
    Info(info::InfoArgs),
    Parity(parity::ParityArgs),
    Completions(completions::CompletionsArgs),
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(report_panic));
    signals::ignore_file_limit();
    let outcome = panic::catch_unwind(|| match Cli::try_parse() {
        Ok(cli) => run(cli.command),
        // Help and version, asked for or in place of a missing command.
        Err(message)
            if !message.use_stderr() || message.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            message.exit()
        }
        Err(message) if message.kind() == ErrorKind::InvalidUtf8 => {
            Err(Error::Usage(not_text(&std::env::args_os().collect::<Vec<_>>())))
        }
        Err(message) => Err(Error::Usage(one_sentence(&message.to_string()))),
    });
    match outcome {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            // Of one line, whatever the names and values in it are; but a compiler's log has many.
            let text = error.to_string();
            let text = if matches!(error, Error::Stopped(_)) { text } else { text.replace('\n', "\\n") };
            say(&format!("error: {}", printable(&text)));
            ExitCode::from(if matches!(error, Error::Usage(_)) { USAGE } else { FAILURE })
        }
        // The hook has said what there is to say.
        Err(_) => ExitCode::from(FAILURE),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    crate::backend::cpu::simd::limit()?;
    match command {
        Command::Train(args) => return train::run(args),
        Command::Sample(args) => return sample::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Validate(args) => validate::run(args),
        Command::Info(args) => info::run(args),
        Command::Parity(args) => parity::run(args),
        Command::Completions(args) => completions::run(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// clap's message without its usage lines: what is wrong, and the near name if there is one.
fn one_sentence(message: &str) -> String {
    let lines = message.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<&str> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    let sentence = words.join(" ").replace(" tip: ", "; ");
    format!("{} (--help lists what there is)", sentence.trim_start_matches("error: "))
}

/// Which of `args` is not UTF-8: clap does not tell.
fn not_text(args: &[OsString]) -> String {
    let place = args.iter().position(|arg| arg.to_str().is_none()).unwrap_or(0);
    let flag = place.checked_sub(1).and_then(|before| args[before].to_str()).filter(|flag| flag.starts_with("--"));
    let of = flag.map_or(String::new(), |flag| format!(" of {flag}"));
    let value = args.get(place).map_or("".into(), |arg| arg.to_string_lossy());
    format!("the argument '{value}'{of} is not UTF-8: give it (rename the file, say) in UTF-8")
}

/// Turns a panic into one sentence. A closed or full standard output is no bug: `println!` panics on both.
fn report_panic(info: &PanicHookInfo) {
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    let message = message.unwrap_or("no message").replace('\n', " ");
    if let Some(what) = message.strip_prefix("failed printing to std") {
        if !what.contains("Broken pipe") {
            let why = what.split_once(": ").map_or(what, |(_, error)| error);
            say(&format!("error: the output cannot be written: {why}"));
            std::process::exit(i32::from(FAILURE));
        }
        std::process::exit(BROKEN_PIPE);
    }
    let place = info.location().map_or(String::new(), |at| format!(" at {}:{}", at.file(), at.line()));
    let version = env!("CARGO_PKG_VERSION");
    say(&format!("error: this is a bug in dtr-fused {version}{place}: {message}; please report this line"));
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
    fn a_wrong_argument_is_one_sentence() {
        let message = |args: &[&str]| one_sentence(&Cli::try_parse_from(args).unwrap_err().to_string());
        assert_eq!(
            message(&["dtr-fused", "train", "--batchsize", "3"]),
            "unexpected argument '--batchsize' found; a similar argument exists: '--batch-size' (--help lists what there is)"
        );
        for args in [
            &["dtr-fused", "info"][..],
            &["dtr-fused", "trian"],
            &["dtr-fused", "train", "--lr"],
            &["dtr-fused", "train", "x"],
        ] {
            let message = message(args);
            assert!(!message.contains('\n') && !message.contains("Usage") && message.len() > 40, "{message}");
        }
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
