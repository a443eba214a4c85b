//! Running the program in tests of the command line.

use std::path::Path;
use std::process::{Command, Output};

/// Flags of a model that trains in milliseconds a step.
pub const TINY: &[&str] =
    &["--hidden-size", "32", "--depth", "1", "--num-heads", "2", "--batch-size", "16", "--sample-steps", "3"];

/// The program with `args`, in directory `place`.
pub fn command(place: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtr-fused"));
    // Whatever GPU or simulator there is: those that test one name it.
    command.current_dir(place).args(args).env("DTR_CUDA_LIBRARY", "/no/driver");
    #[cfg(unix)]
    heeding_signals(&mut command);
    command
}

/// Whoever started the tests may want signals ignored (a script, Ctrl-C for its jobs in the background), and that is inherited.
#[cfg(unix)]
#[allow(dead_code, reason = "not every test starts a shell")]
pub fn heeding_signals(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let heed = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: one of the calls that may be made between fork and exec.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: it makes no other calls.
    unsafe { command.pre_exec(heed) };
}

/// Sends `signal` to `child`, which was not waited for.
#[cfg(unix)]
#[allow(dead_code, reason = "not every test ends a program")]
pub fn kill(signal: libc::c_int, child: &std::process::Child) {
    // SAFETY: it sends a signal to a child that was not waited for: the number is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
}

/// Runs the program with `args` in directory `place`.
pub fn run(place: &Path, args: &[&str]) -> Output {
    command(place, args).output().expect("the program starts")
}

/// `dtr-fused train` of a tiny model.
pub fn train(place: &Path, args: &[&str]) -> Output {
    run(place, &[&["train"], TINY, args].concat())
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Asserts success and returns what was printed.
#[track_caller]
pub fn succeeds(output: Output) -> String {
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Asserts that the program ended with `code`, and that the last thing it said is one sentence that holds every part of `says`.
#[track_caller]
#[allow(dead_code, reason = "not every test makes it fail")]
pub fn fails(output: Output, code: i32, says: &[&str]) {
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    assert_eq!(text.lines().last(), Some(errors[0]), "{text}");
    assert!(!text.contains("panicked") && !errors[0].contains("a bug in dtr-fused"), "{text}");
    for part in says {
        assert!(errors[0].contains(part), "'{part}' is not in: {}", errors[0]);
    }
}
