//! Progress of training or sampling on standard error: a bar on a terminal, a line every few seconds elsewhere.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::error::printable;

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Writes a line to standard error. That nobody reads it any more (a closed terminal, a full disk under a log) must not end
/// the work, as `eprintln!` would.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Progress of a job of a known number of steps.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: u64,
    start: u64,
    began: Instant,
    output: Output,
}

#[derive(Debug)]
enum Output {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    /// Starts at `step` of `total`; `what` names the job (`"training"`).
    pub fn new(what: &'static str, step: u64, total: u64) -> Self {
        let bar = ProgressBar::new(total).with_position(step);
        // Hidden where there is no terminal, or one that cannot move its cursor (TERM=dumb).
        let output = if !bar.is_hidden() {
            let template = "{prefix} {wide_bar:.blue/black.bright} {pos}/{len}  {msg}";
            bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("━━─"));
            bar.set_prefix(what);
            Output::Bar(bar)
        } else {
            Output::Lines { last: None }
        };
        Progress { what, total, start: step, began: Instant::now(), output }
    }

    /// Shows that `step` steps are done, with `figures` (`"loss 0.12  1234 images/s"`) and the time left.
    pub fn set(&mut self, step: u64, figures: &str) {
        let left = time_left(self.began.elapsed(), self.start, step, self.total);
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(format!("{figures}  {left}"));
            }
            Output::Lines { last } => {
                if step >= self.total || last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    say(&format!("{} {step}/{}  {figures}  {left}", self.what, self.total));
                }
            }
        }
    }

    /// Shows that something else is done meanwhile (`"sampling 12/50"`), at the step that was shown last.
    pub fn meanwhile(&mut self, what: String) {
        match &mut self.output {
            Output::Bar(bar) => bar.set_prefix(what),
            Output::Lines { last } => {
                if last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    say(&what);
                }
            }
        }
    }

    /// Goes back to the job itself after [`meanwhile`](Self::meanwhile).
    pub fn end_meanwhile(&self) {
        if let Output::Bar(bar) = &self.output {
            bar.set_prefix(self.what);
        }
    }

    /// Prints a line without tearing the bar.
    pub fn say(&self, line: &str) {
        let line = printable(line);
        match &self.output {
            Output::Bar(bar) => bar.suspend(|| say(&line)),
            Output::Lines { .. } => say(&line),
        }
    }

    /// Ends the bar and leaves its last state on the screen.
    pub fn finish(&self) {
        if let Output::Bar(bar) = &self.output {
            bar.abandon();
        }
    }
}

/// `1m05s left`, from the mean speed since the start; empty when nothing is known or left.
fn time_left(elapsed: Duration, start: u64, step: u64, total: u64) -> String {
    let done = step.saturating_sub(start);
    if done == 0 || step >= total {
        return String::new();
    }
    let seconds = (elapsed.as_secs_f64() / done as f64 * (total - step) as f64).round() as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s left"),
        (0, 0, _) => format!("{minutes}m{:02}s left", seconds % 60),
        (0, ..) => format!("{hours}h{minutes:02}m left"),
        _ => format!("{days}d{hours:02}h left"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_follows_the_speed_since_the_start() {
        let left = |seconds, start, step, total| time_left(Duration::from_secs(seconds), start, step, total);
        assert_eq!(left(10, 0, 10, 75), "1m05s left");
        assert_eq!(left(10, 100, 110, 150), "40s left");
        assert_eq!(left(100, 0, 100, 7300), "2h00m left");
        assert_eq!(left(86_400, 0, 1, 4), "3d00h left");
        assert_eq!(left(10, 5, 5, 50), "");
        assert_eq!(left(10, 0, 50, 50), "");
    }
}
