//! The command line: runs case directories, shows decoded programs.

use clap::{Parser, Subcommand};
use cuda_sim::{Arch, Device, Options, Sanitizer, case};
use std::path::PathBuf;
use std::process::ExitCode;

/// A simulated CUDA driver: runs PTX on the CPU, checks it like a sanitizer and counts its work like a profiler.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run case directories (kernel.ptx, manifest.json, inputs.safetensors, expected.safetensors); exit 1 on any failure.
    Run {
        /// Case directories.
        #[arg(required = true)]
        dirs: Vec<PathBuf>,
        /// The GPU to simulate instead of the one that the case names: sm_80, sm_86, sm_89, sm_90, sm_120.
        #[arg(long)]
        arch: Option<String>,
        /// Print the counters of each launch.
        #[arg(long)]
        counters: bool,
        /// Print the counters as JSON.
        #[arg(long)]
        json: bool,
        /// Switch the sanitizer off (bounds and alignment are always checked).
        #[arg(long)]
        no_sanitizer: bool,
        /// Permute the order of blocks and warps.
        #[arg(long)]
        seed: Option<u64>,
        /// Warp instructions that one warp may execute before it counts as endless.
        #[arg(long)]
        budget: Option<u64>,
        /// Host threads; 0 means one per core.
        #[arg(long, default_value_t = 0)]
        threads: usize,
        /// Print the sanitizer's reports also of cases that must have them.
        #[arg(long, short)]
        verbose: bool,
    },
    /// Print the decoded program of a PTX file.
    Disasm {
        /// PTX file.
        file: PathBuf,
        /// The GPU to simulate.
        #[arg(long, default_value = "sm_120")]
        arch: String,
    },
}

fn arch(name: &str) -> Result<Arch, String> {
    Arch::by_name(name)
        .ok_or_else(|| format!("the architecture {name} is not simulated: use sm_80, sm_86, sm_89, sm_90 or sm_120"))
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("cuda-sim: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<bool, String> {
    match cli.command {
        Command::Disasm { file, arch: name } => {
            let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
            // Code for one exact architecture needs that one.
            let target = text.lines().find_map(|l| l.trim().strip_prefix(".target")).unwrap_or("").trim();
            let exact = if target.ends_with('a') { Arch::by_name(target) } else { None };
            let device = Device::new(exact.map_or_else(|| arch(&name), Ok)?, Options::default());
            let module = device.load_module(&text).map_err(|e| format!("{}: {e}", file.display()))?;
            for name in module.functions() {
                if let Some(f) = module.function(name) {
                    println!("{}", f.disassemble());
                }
            }
            Ok(true)
        }
        Command::Run { dirs, arch: name, counters, json, no_sanitizer, seed, budget, threads, verbose } => {
            let gpu = name.as_deref().map(arch).transpose()?;
            let default = Options::default();
            let options = Options {
                sanitizer: if no_sanitizer { Sanitizer::OFF } else { Sanitizer::ON },
                seed,
                budget: budget.unwrap_or(default.budget),
                threads,
                counters: counters || json,
                max_reports: default.max_reports,
            };
            let (mut failures, mut ran) = (0, 0);
            for dir in &dirs {
                match case::run(dir, gpu, options.clone()) {
                    Ok(o) => {
                        ran += 1;
                        failures += usize::from(!o.passed);
                        println!("{}  {:<40} {}", if o.passed { "PASS" } else { "FAIL" }, o.name, o.summary);
                        if (!o.passed || verbose) && !o.details.is_empty() {
                            println!("{}", o.details);
                        }
                        if let Some(r) = &o.report {
                            if json {
                                println!("{}", r.json());
                            } else if counters {
                                println!("{}", r.table());
                            }
                        }
                    }
                    Err(e) => {
                        failures += 1;
                        println!("FAIL  {:<40} {e}", dir.display());
                    }
                }
            }
            println!("{ran} cases ran, {failures} failed");
            Ok(failures == 0 && ran > 0)
        }
    }
}
