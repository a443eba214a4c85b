//! `dtr-fused parity`: does this implementation agree with tensors that another one made?

use std::path::PathBuf;

use clap::Args;

use super::offered::offered;
use crate::backend::Compute;
use crate::error::{Error, Result, printable};
use crate::parity::check_dir;
use crate::parity::report::Failures;
use crate::train::config::Precision;
use crate::train::progress::say;

const EXAMPLES: &str = "\
Examples:
  dtr-fused parity tests/golden/a             one case
  dtr-fused parity --quiet tests/golden       every case in it, and of each only what fails
  dtr-fused parity --device cuda --precision bf16 tests/golden/a
Exit code 1 when a tensor is off, a file is not understood, or nothing was compared. The format of a case: docs/parity-format.md.
";

/// Compare with tensors that another implementation made: name, error, tolerance, ok or FAIL for each
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ParityArgs {
    /// Case directories, or directories that hold case directories
    #[arg(required = true, value_name = "CASE_DIR")]
    dirs: Vec<PathBuf>,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// Precision of the products; in bf16 they may be off by three times the error of plain loops in bf16
    #[arg(long, value_name = Precision::NAMES, value_parser = offered::<Precision>(Precision::NAMES), hide_possible_values = true, default_value_t = Precision::F32)]
    precision: Precision,
    /// Print only what fails, and a summary
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn run(args: ParityArgs) -> Result<()> {
    let (compute, note) = Compute::open(&args.device, args.precision.elem())?;
    if let Some(note) = note {
        say(&note);
    }
    let (mut cases, mut compared, mut failed) = (0, 0, Vec::new());
    for dir in &args.dirs {
        for (case, report) in check_dir(dir, &compute)? {
            println!("{}", case.display());
            match args.quiet {
                true => println!("{}\n", printable(&Failures(&report).to_string())),
                false => println!("{}\n", printable(&report.to_string())),
            }
            cases += 1;
            compared += report.compared();
            if !report.passed() && !report.left_out() {
                failed.push(case.display().to_string());
            }
        }
    }
    if compared == 0 && failed.is_empty() {
        return Err(Error::Stopped(format!("nothing was compared, as {cases} cases were left out: see above")));
    }
    if !failed.is_empty() {
        return Err(Error::Stopped(format!("{} of {cases} cases do not agree: {}", failed.len(), failed.join(", "))));
    }
    println!("ok: {compared} tensors in {cases} cases agree");
    Ok(())
}
