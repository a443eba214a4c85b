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

/// Where the handler writes. It may do next to nothing, so a thread reads the signal's number from there and acts.
#[cfg(unix)]
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Opens [`PIPE`] and returns the end to read from.
#[cfg(unix)]
fn open_pipe() -> io::Result<io::PipeReader> {
    use std::os::fd::{AsRawFd, IntoRawFd};

    let (reader, writer) = io::pipe()?;
    // A handler that waits may never return, and a pipe that is full of signals says enough.
    // SAFETY: the descriptor is open, and this request takes an integer.
    if unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
    Ok(reader)
}

#[cfg(unix)]
extern "C" fn handler(signal: libc::c_int) {
    let number = signal as u8;
    // SAFETY: write may be called in a handler; the byte lives as long as the call, and the pipe is never closed. errno is the
    // thread's own, and what the signal interrupted may be about to read it.
    unsafe {
        let errno = errno();
        let before = *errno;
        libc::write(PIPE.load(Ordering::SeqCst), (&raw const number).cast(), 1);
        *errno = before;
    }
}

/// The place of this thread's errno.
#[cfg(unix)]
fn errno() -> *mut libc::c_int {
    #[cfg(any(target_os = "solaris", target_os = "illumos"))]
    use libc::___errno as place;
    #[cfg(any(target_os = "android", target_os = "netbsd", target_os = "openbsd", target_os = "cygwin"))]
    use libc::__errno as place;
    #[cfg(any(target_os = "linux", target_os = "dragonfly", target_os = "hurd", target_os = "redox"))]
    use libc::__errno_location as place;
    #[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
    use libc::__error as place;

    // SAFETY: it has no preconditions, and may be called in a handler.
    unsafe { place() }
}

/// Lets Ctrl-C, SIGTERM and SIGHUP set [`STOP`]. `says` how the job ends, such as "with a checkpoint".
///
/// # Errors
/// When the system refuses; signals then end the program as ever.
#[cfg(unix)]
pub(super) fn stop_on_signals(says: &'static str) -> io::Result<()> {
    use std::io::Read;

    let mut reader = open_pipe()?;
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_handler_neither_waits_nor_changes_errno() {
        let _reader = open_pipe().unwrap();
        // SAFETY: errno is the thread's own.
        unsafe { *errno() = libc::ENOENT };
        // More than any pipe holds.
        for _ in 0..(1 << 20) + 1 {
            handler(INTERRUPT);
        }
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
    }
}
