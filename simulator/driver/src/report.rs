//! Where findings go: standard error for people, and files of JSON lines for tests.

use crate::state::Driver;
use cuda_sim::{Fault, LaunchReport, Leak};
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Findings so far: decides the exit code.
static FINDINGS: AtomicU64 = AtomicU64::new(0);

/// A message for people. A closed standard error must not stop a program, so failures are ignored.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "cuda-sim: {}", text.strip_prefix("cuda-sim: ").unwrap_or(text));
}

/// The same, once in a process.
pub fn say_once(said: &AtomicBool, text: &str) {
    if !said.swap(true, Ordering::Relaxed) {
        say(text);
    }
}

/// Appends one line to a file; that it cannot is said, because a test would wait for it in vain.
fn append(path: &Path, line: &Value) {
    let text = format!("{line}\n");
    let wrote = OpenOptions::new().create(true).append(true).open(path).and_then(|mut f| f.write_all(text.as_bytes()));
    if let Err(e) = wrote {
        say(&format!("cannot append to {}: {e}", path.display()));
    }
}

fn finding(d: &Driver, text: &str, line: &Value) {
    FINDINGS.fetch_add(1, Ordering::Relaxed);
    say(text);
    if let Some(path) = &d.config.report {
        append(path, line);
    }
}

/// A launch that failed or was refused.
pub fn fault(d: &Driver, kernel: &str, fault: &Fault) {
    let reports: Vec<_> = fault
        .reports
        .iter()
        .map(|r| json!({"class": r.class.name(), "line": r.line, "times": r.times, "text": r.text}))
        .collect();
    let line = json!({
        "event": if fault.is_refusal() { "refusal" } else { "fault" },
        "kernel": kernel,
        "class": fault.class.name(),
        "cuda_error": fault.cuda_error,
        "reports": reports,
    });
    finding(d, &fault.text, &line);
}

/// A copy to the host of bytes that nobody wrote.
pub fn unwritten_copy(d: &Driver, address: u64, bytes: u64, first: u64) {
    let text = format!(
        "a copy to the host of {bytes} bytes at {address:#x} reads memory that nobody wrote, from byte {} on",
        first - address
    );
    let line = json!({"event": "unwritten_copy", "address": address, "bytes": bytes, "offset": first - address});
    finding(d, &text, &line);
}

/// Device memory that its context did not free.
pub fn leaks(d: &Driver, leaks: &[Leak]) {
    for leak in leaks {
        let text = format!("leak: {} bytes at {:#x} ({}) were never freed", leak.bytes, leak.address, leak.label);
        let line = json!({"event": "leak", "address": leak.address, "bytes": leak.bytes, "label": leak.label});
        finding(d, &text, &line);
    }
}

/// The work of a launch that went well.
pub fn counters(d: &Driver, report: &LaunchReport) {
    if let Some(path) = &d.config.counters {
        match serde_json::to_value(report) {
            Ok(line) => append(path, &line),
            Err(e) => say(&format!("the counters of {} cannot be written: {e}", report.kernel)),
        }
    }
}

/// Runs when the process ends (or unloads the library): what is still allocated was leaked.
pub extern "C" fn at_exit() {
    // A panic here would abort a program that is done.
    let _ = std::panic::catch_unwind(|| {
        let Ok(d) = crate::state::driver() else { return };
        // A thread that still works on the device at exit keeps the lock: then there is nothing certain to say.
        let live = d.state.try_lock().is_ok_and(|s| !s.contexts.is_empty());
        if live {
            crate::context::report_leaks(d);
        }
        if FINDINGS.load(Ordering::Relaxed) > 0
            && let Some(code) = d.config.exit_code
        {
            // SAFETY: flushes all C streams, which `_exit` does not; then ends the process without running more handlers.
            unsafe {
                libc::fflush(std::ptr::null_mut());
                libc::_exit(code);
            }
        }
    });
}
