//! Every environment variable of the simulated driver.
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `CUDA_SIM_ARCH` | the GPU: `sm_80`, `sm_86`, `sm_89`, `sm_90`, `sm_120` | `sm_80` |
//! | `CUDA_SIM_SANITIZER` | `on`, `off`, or a list of checks to switch off: `-uninitialised`, `-races_shared`, `-races_global`, `-async_copies`, `-fences`, `-barriers`, `-leaks`, `-unwritten_copies` | `on` |
//! | `CUDA_SIM_SEED` | permutes the order of blocks and warps | in order |
//! | `CUDA_SIM_BUDGET` | warp instructions that one warp may execute in a launch | 50000000 |
//! | `CUDA_SIM_THREADS` | host threads | one per core |
//! | `CUDA_SIM_REPORT` | file to which every finding is appended, one JSON object a line | none |
//! | `CUDA_SIM_COUNTERS` | file to which every launch's counters are appended, one JSON object a line | none |
//! | `CUDA_SIM_PTXAS_LOG` | output of `ptxas -v` (or NVRTC's log): registers of kernels, for occupancy and refusals | estimates |
//! | `CUDA_SIM_EXIT_CODE` | exit code of a process in which anything was found, 1 to 255 | the process's own |

use cuda_sim::{Arch, Options, Sanitizer};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the environment asks for.
#[derive(Debug, Clone)]
pub struct Config {
    /// The simulated GPU.
    pub arch: Arch,
    /// Checks, seed, budget, host threads.
    pub options: Options,
    /// Whether memory that is never freed is reported.
    pub leaks: bool,
    /// Whether copies of unwritten device memory to the host are reported.
    pub unwritten_copies: bool,
    /// File of findings.
    pub report: Option<PathBuf>,
    /// File of counters.
    pub counters: Option<PathBuf>,
    /// Registers of a thread by kernel, from the assembler's log.
    pub registers: BTreeMap<String, u32>,
    /// Exit code of a process with findings.
    pub exit_code: Option<i32>,
}

const KNOWN: [&str; 9] =
    ["ARCH", "SANITIZER", "SEED", "BUDGET", "THREADS", "REPORT", "COUNTERS", "PTXAS_LOG", "EXIT_CODE"];

impl Config {
    /// Reads variables `CUDA_SIM_*` from `variables`. The error is a sentence that names the variable.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Result<Config, String> {
        let mut config = Config {
            arch: Arch::SM_80,
            options: Options::default(),
            leaks: true,
            unwritten_copies: true,
            report: None,
            counters: None,
            registers: BTreeMap::new(),
            exit_code: None,
        };
        for (name, value) in variables {
            let Some(key) = name.strip_prefix("CUDA_SIM_") else {
                continue;
            };
            let number = || value.parse::<u64>().map_err(|_| format!("{name}={value} is not a whole number"));
            match key {
                "ARCH" => {
                    config.arch = Arch::by_name(&value).ok_or_else(|| {
                        let names = Arch::ALL.map(|a| a.name).join(", ");
                        format!("{name}={value} is not simulated: use one of {names}")
                    })?;
                }
                "SANITIZER" => config.checks(&name, &value)?,
                "SEED" => config.options.seed = Some(number()?),
                "BUDGET" => config.options.budget = number()?.max(1),
                "THREADS" => config.options.threads = number()?.min(1024) as usize,
                "REPORT" => config.report = Some(value.into()),
                "COUNTERS" => {
                    config.options.counters = true;
                    config.counters = Some(value.into());
                }
                "PTXAS_LOG" => {
                    let log = std::fs::read_to_string(&value).map_err(|e| format!("{name}={value}: {e}"))?;
                    config.registers = registers(&log);
                    if config.registers.is_empty() {
                        return Err(format!(
                            "{name}={value} names no kernel's registers: it must be the output of ptxas -v"
                        ));
                    }
                }
                "EXIT_CODE" => match number()? {
                    code @ 1..=255 => config.exit_code = Some(code as i32),
                    _ => return Err(format!("{name}={value} is not in 1..=255")),
                },
                _ => {
                    let known = KNOWN.map(|k| format!("CUDA_SIM_{k}")).join(", ");
                    return Err(format!("{name} is not a variable of the simulator: it knows {known}"));
                }
            }
        }
        Ok(config)
    }

    fn checks(&mut self, name: &str, value: &str) -> Result<(), String> {
        match value {
            "on" => return Ok(()),
            "off" => {
                self.options.sanitizer = Sanitizer::OFF;
                self.leaks = false;
                self.unwritten_copies = false;
                return Ok(());
            }
            _ => {}
        }
        let checks = &mut self.options.sanitizer;
        for word in value.split(',') {
            *(match word.trim() {
                "-uninitialised" => &mut checks.uninitialised,
                "-races_shared" => &mut checks.races_shared,
                "-races_global" => &mut checks.races_global,
                "-async_copies" => &mut checks.async_copies,
                "-fences" => &mut checks.fences,
                "-barriers" => &mut checks.barriers,
                "-leaks" => &mut self.leaks,
                "-unwritten_copies" => &mut self.unwritten_copies,
                other => {
                    return Err(format!(
                        "{name}: `{other}` is no check; use on, off, or a list of -uninitialised, -races_shared, \
                         -races_global, -async_copies, -fences, -barriers, -leaks, -unwritten_copies"
                    ));
                }
            }) = false;
        }
        Ok(())
    }
}

/// Registers by kernel from lines like `Compiling entry function 'f' for 'sm_80'` and `Used 32 registers`.
fn registers(log: &str) -> BTreeMap<String, u32> {
    let (mut found, mut kernel) = (BTreeMap::new(), None);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().map(str::to_owned);
        } else if let Some((_, rest)) = line.split_once("Used ")
            && let Some((count, _)) = rest.split_once(" registers")
            && let (Ok(count), Some(kernel)) = (count.parse(), kernel.take())
        {
            found.insert(kernel, count);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Result<Config, String> {
        Config::new(pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())))
    }

    #[test]
    fn defaults_are_an_a100_with_every_check() {
        let c = config(&[("PATH", "/bin")]).unwrap();
        assert_eq!(c.arch.name, "sm_80");
        assert_eq!(c.options, Options::default());
        assert!(c.leaks && c.unwritten_copies && c.exit_code.is_none());
    }

    #[test]
    fn each_check_can_be_switched_off_alone() {
        let c = config(&[("CUDA_SIM_SANITIZER", "-races_global,-leaks")]).unwrap();
        assert_eq!(c.options.sanitizer, Sanitizer { races_global: false, ..Sanitizer::ON });
        assert!(!c.leaks && c.unwritten_copies);
        let off = config(&[("CUDA_SIM_SANITIZER", "off")]).unwrap();
        assert_eq!(off.options.sanitizer, Sanitizer::OFF);
        assert!(!off.leaks && !off.unwritten_copies);
    }

    #[test]
    fn bad_values_and_unknown_names_are_refused_by_name() {
        for (name, value) in [
            ("CUDA_SIM_ARCH", "sm_70"),
            ("CUDA_SIM_SEED", "x"),
            ("CUDA_SIM_SANITIZER", "races"),
            ("CUDA_SIM_EXIT_CODE", "0"),
            ("CUDA_SIM_PTXAS_LOG", "/no/such/file"),
            ("CUDA_SIM_ARHC", "sm_80"),
        ] {
            let error = config(&[(name, value)]).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn registers_come_from_the_assemblers_log() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
                   ptxas info    : Function properties for a\n\
                   ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem\n\
                   ptxas info    : Compiling entry function 'b' for 'sm_80'\n\
                   ptxas info    : Used 8 registers\n";
        let want = [("a".to_owned(), 40), ("b".to_owned(), 8)];
        assert_eq!(registers(log), BTreeMap::from(want));
    }
}
