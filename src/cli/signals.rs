//! Signals that end a long job: the first in good order, Ctrl-C once more at once.

use std::io;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use crate::train::progress::say;

/// Set by the first signal: finish the step, bring the job to its end.
pub(super) static STOP: AtomicBool = AtomicBool::new(false);

/// The first signal.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Number of the signal that Ctrl-C sends.
const INTERRUPT: i32 = 2;

/// `timeout` and some shells send a signal to a program and to its group: what comes this soon is the same signal again.
const SAME: Duration = Duration::from_millis(500);

/// What a shell reports of a program that the signal ended: 128 and its number.
pub(super) fn exit_code() -> u8 {
    128 + SIGNAL.load(Ordering::SeqCst) as u8
}

/// Acts on one signal; `interrupted` is when Ctrl-C was pressed first. `says` how the job ends.
fn received(signal: i32, interrupted: &mut Option<Instant>, says: &str) {
    let first = SIGNAL.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    STOP.store(true, Ordering::SeqCst);
    if signal != INTERRUPT {
        // A terminal that closes sends several of these: none of them may cost the checkpoint.
        if first {
            say(&format!("\nstopping after this step, {says}"));
        }
        return;
    }
    match interrupted {
        None => {
            *interrupted = Some(Instant::now());
            say(&format!("\nstopping after this step, {says}; press Ctrl-C again to stop at once"));
        }
        Some(before) if before.elapsed() > SAME => process::exit(128 + INTERRUPT),
        Some(_) => {}
    }
}

/// Lets Ctrl-C, SIGTERM and SIGHUP set [`STOP`]. `says` how the job ends, such as "with a checkpoint".
///
/// # Errors
/// When the system refuses; signals then end the program as ever.
#[cfg(unix)]
pub(super) fn stop_on_signals(says: &'static str) -> io::Result<()> {
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    // The handler may do next to nothing; it writes the signal's number into a pipe, and a thread reads it from there.
    static PIPE: AtomicI32 = AtomicI32::new(-1);
    extern "C" fn handler(signal: libc::c_int) {
        let number = signal as u8;
        // SAFETY: write may be called in a handler; the byte lives as long as the call, and the pipe is never closed.
        unsafe { libc::write(PIPE.load(Ordering::SeqCst), (&raw const number).cast(), 1) };
    }

    let (mut reader, writer) = io::pipe()?;
    PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let (mut number, mut interrupted) = ([0], None);
        while reader.read_exact(&mut number).is_ok() {
            received(i32::from(number[0]), &mut interrupted, says);
        }
    })?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: both structs are plain data, for which zeros are valid, and live as long as the calls; the handler calls
        // only functions that a handler may call.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            // Whoever started us wants it ignored: nohup its SIGHUP, a script Ctrl-C for its jobs in the background.
            if action.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            action = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets Ctrl-C set [`STOP`]. `says` how the job ends.
///
/// # Errors
/// When the system refuses; Ctrl-C then ends the program as ever.
#[cfg(not(unix))]
pub(super) fn stop_on_signals(says: &'static str) -> io::Result<()> {
    let mut interrupted = None;
    ctrlc::set_handler(move || received(INTERRUPT, &mut interrupted, says)).map_err(io::Error::other)
}

/// Makes a file that outgrows the limit of `ulimit -f` an error like that of a full disk, in place of a wordless end.
pub(super) fn ignore_file_limit() {
    // SAFETY: no handler is installed, and nothing else of this program deals with this signal.
    #[cfg(unix)]
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
