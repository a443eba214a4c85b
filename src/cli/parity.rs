//! `dtr-fused parity`: does this implementation agree with tensors that another one made?

use crate::error::{Error, Result};
use crate::parity::check_dir;
use crate::parity::report::Failures;
use std::path::PathBuf;

/// Compare with tensors made by another implementation, and say how far apart they are.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  dtr-fused parity tests/golden/a                   one case
  dtr-fused parity tests/golden                     every case in it
The format of a case: docs/parity-format.md. Exit code 1 when anything is off, not understood, or nothing was compared.")]
pub struct Args {
    /// Case directories, or directories of cases
    #[arg(required = true, value_name = "CASE_DIR")]
    pub dirs: Vec<PathBuf>,
    /// Where to compute
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Precision of the products
    #[arg(long, default_value = "f32")]
    pub precision: String,
    /// Print only what fails, and the summary
    #[arg(long, short)]
    pub quiet: bool,
}

/// Prints one table a case. True when something was compared in every case and all of it agrees.
///
/// # Errors
/// When a directory cannot be read, or the device or precision is not one there is.
pub fn run(args: &Args) -> Result<bool> {
    if !["cpu", "auto"].contains(&args.device.as_str()) {
        return Err(Error::usage(format!("device '{}' cannot be compared yet: give cpu", args.device)));
    }
    if args.precision != "f32" {
        return Err(Error::usage(format!("precision '{}' has no tolerances yet: give f32", args.precision)));
    }
    let mut all = Vec::new();
    for dir in &args.dirs {
        for (case, report) in check_dir(dir)? {
            println!("{}", case.display());
            match args.quiet {
                true => println!("{}\n", Failures(&report)),
                false => println!("{report}\n"),
            }
            all.push((case, report));
        }
    }
    let failed: Vec<_> = all.iter().filter(|(_, report)| !report.passed()).collect();
    let compared: usize = all.iter().map(|(_, report)| report.compared()).sum();
    if failed.is_empty() && !all.is_empty() {
        println!("ok: {compared} tensors in {} cases agree", all.len());
    } else {
        let names: Vec<String> = failed.iter().map(|(case, _)| case.display().to_string()).collect();
        println!("FAIL: {} of {} cases: {}", failed.len(), all.len(), names.join(", "));
    }
    Ok(failed.is_empty() && !all.is_empty())
}
