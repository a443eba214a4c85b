//! Findings of a launch: collected, made unique, put in order of cause and effect.

use super::Launch;
use crate::error::{Fault, FaultClass, Report};

pub(crate) struct Reports {
    list: Vec<Report>,
    max: usize,
}

/// Fatal faults end the launch where they happen.
fn is_fatal(class: FaultClass) -> bool {
    use FaultClass::*;
    matches!(class, OobGlobal | OobShared | OobLocal | Misaligned | Timeout | Trap)
}

/// A smaller rank explains a larger one: a skipped barrier or wait makes races, a race within a block makes races
/// between blocks (its barriers pass on what was acquired), a race makes reads of unwritten bytes. A missing fence explains
/// nothing else here, since the simulator computes as if it were there.
fn rank(class: FaultClass) -> u32 {
    use FaultClass::*;
    match class {
        BarrierDivergence => 0,
        AsyncCopyHazard => 1,
        DataRaceShared => 2,
        DataRaceGlobal => 3,
        MissingFence => 4,
        _ => 5,
    }
}

impl Reports {
    pub(crate) fn new(max: usize) -> Reports {
        Reports { list: Vec::new(), max: max.max(1) }
    }

    /// Adds a finding; the same class at the same line is counted, not repeated. The text is made only when needed.
    pub(crate) fn add(&mut self, class: FaultClass, line: u32, text: impl FnOnce() -> String) {
        if let Some(r) = self.list.iter_mut().find(|r| r.class == class && r.line == line) {
            r.times += 1;
        } else if self.list.len() < self.max || !self.list.iter().any(|r| r.class == class) {
            self.list.push(Report { class, text: text(), line, times: 1 });
        }
    }

    /// The fault of the launch, without what is only a consequence.
    pub(crate) fn fault(mut self, l: &Launch<'_>) -> Option<Fault> {
        let soft = |r: &Report| !is_fatal(r.class);
        if self.list.iter().any(soft) {
            self.list.retain(soft);
            let best = self.list.iter().map(|r| rank(r.class)).min().unwrap_or(0);
            self.list.retain(|r| rank(r.class) == best);
        }
        let class = self.list.first()?.class;
        let mut text = format!("cuda-sim: kernel {} failed", l.program.name);
        for r in &self.list {
            let times = if r.times > 1 { format!(" [{} times at this line]", r.times) } else { String::new() };
            text.push_str(&format!("\n  {}: {}{times}", r.class, r.text));
        }
        Some(Fault { class, cuda_error: class.cuda_error(), text, reports: self.list })
    }
}
