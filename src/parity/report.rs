//! What was compared, how far apart it is, and the table that says so.

use std::collections::BTreeMap;
use std::fmt;

/// One measured difference and how large it may be.
#[derive(Clone, Debug)]
pub struct Check {
    /// How the difference is measured.
    pub measure: &'static str,
    /// The difference; NaN when either side holds a NaN or an infinity.
    pub error: f64,
    /// The largest difference that passes.
    pub tolerance: f64,
}

impl Check {
    /// Largest difference, relative to the largest reference value.
    pub fn max(found: &[f64], reference: &[f64], tolerance: f64) -> Self {
        Check { measure: "max", error: ratio(largest_difference(found, reference), largest(reference)), tolerance }
    }

    /// Largest difference.
    pub fn absolute(found: &[f64], reference: &[f64], tolerance: f64) -> Self {
        Check { measure: "abs", error: largest_difference(found, reference), tolerance }
    }

    /// Largest difference of integers: they must be the same.
    pub fn exact(found: &[f64], reference: &[f64]) -> Self {
        Check { measure: "exact", ..Self::absolute(found, reference, 0.0) }
    }

    /// Largest over the elements of the difference relative to that element of the reference.
    pub fn each(found: &[f64], reference: &[f64], tolerance: f64) -> Self {
        let errors = found.iter().zip(reference).map(|(f, r)| ratio((f - r).abs(), r.abs()));
        Check { measure: "each", error: errors.fold(0.0, worse), tolerance }
    }

    /// Norm of the difference, relative to the norm of the reference.
    pub fn l2(found: &[f64], reference: &[f64], tolerance: f64) -> Self {
        let squares = |terms: &mut dyn Iterator<Item = f64>| terms.map(|x| x * x).sum::<f64>().sqrt();
        let difference = squares(&mut found.iter().zip(reference).map(|(f, r)| f - r));
        let error = ratio(difference, squares(&mut reference.iter().copied()));
        Check { measure: "L2", error, tolerance }
    }

    /// The same check under another name.
    pub fn named(self, measure: &'static str) -> Self {
        Check { measure, ..self }
    }

    /// Whether the difference is small enough. NaN and infinity are not, whatever the tolerance.
    pub fn passes(&self) -> bool {
        self.error.is_finite() && self.error <= self.tolerance
    }

    /// Share of the tolerance that is used up.
    pub fn share(&self) -> f64 {
        ratio(self.error, self.tolerance)
    }
}

/// `a / b`, and 0 / 0 = 0: nothing is no error even where nothing is allowed.
fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 && b == 0.0 { 0.0 } else { a / b }
}

/// The larger one; NaN is larger than anything.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

fn largest(x: &[f64]) -> f64 {
    x.iter().map(|v| v.abs()).fold(0.0, worse)
}

fn largest_difference(found: &[f64], reference: &[f64]) -> f64 {
    // inf - inf is NaN: an infinity never passes.
    found.iter().zip(reference).map(|(f, r)| (f - r).abs()).fold(0.0, worse)
}

/// One line of the table.
#[derive(Clone, Debug)]
pub enum Row {
    /// A tensor was compared; of several checks, the one that came closest to its tolerance or passed it furthest.
    Compared {
        /// File (without extension) and tensor.
        name: String,
        /// The check.
        check: Check,
    },
    /// Something could not be compared, which fails.
    Failed {
        /// File or tensor.
        name: String,
        /// One sentence.
        why: String,
    },
    /// Something was not compared, on purpose.
    Note {
        /// File or tensor.
        name: String,
        /// One sentence.
        why: String,
    },
}

/// All rows of one or more case directories.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order in which they were compared.
    pub rows: Vec<Row>,
    /// What was found, by row, where it is kept for [`Report::of_truth`].
    found: Option<BTreeMap<String, Vec<f64>>>,
    /// What rows are compared with in place of the files' tensors.
    truth: BTreeMap<String, Vec<f64>>,
    /// The largest error of every check.
    errors: Errors,
    /// Errors of a plain evaluation: [`FACTOR`] times that much is tolerated.
    plain: Errors,
}

/// By [`key`].
type Errors = BTreeMap<(String, usize, &'static str), f64>;

/// Under which the error of check `number` of a row is kept. Where errors grow from step to step, and by chance more here
/// than there (a trajectory; AdamW, which makes large steps of small gradients), all rows of a kind share the largest. So do the
/// norms of a parameter's gradient under all losses: of one number the plain error may be small by chance (of the bias of QKV in one case,
/// four draws were off by 6e-4 to 2.4e-3, from loss to loss, and the fused gradients by 1e-3 to 2e-3).
fn key(row: &str, number: usize, measure: &'static str) -> (String, usize, &'static str) {
    let grows = row.starts_with("train") || row.starts_with("sampling");
    let norm = row.split_once(' ').map(|(_, what)| what).filter(|what| what.starts_with("gradnorm."));
    match (row.split_once('.').filter(|_| grows), norm) {
        (Some((kind, _)), _) => (kind.to_string(), 0, measure),
        (None, Some(norm)) => (norm.to_string(), number, measure),
        (None, None) => (row.to_string(), number, measure),
    }
}

/// How much larger than that of a plain evaluation an error may be.
const FACTOR: f64 = 3.0;

impl Report {
    /// Compares a tensor; `checks` are made only when the number of elements is that of the reference.
    pub fn compare(
        &mut self,
        name: impl Into<String>,
        found: &[f64],
        reference: &[f64],
        checks: impl FnOnce(&[f64], &[f64]) -> Vec<Check>,
    ) {
        let name = name.into();
        if found.len() != reference.len() || found.is_empty() {
            self.fail(name, format!("has {} elements, expected {}", reference.len(), found.len()));
            return;
        }
        if let Some(all) = &mut self.found {
            all.insert(name.clone(), found.to_vec());
        }
        let reference =
            self.truth.get(&name).filter(|truth| truth.len() == found.len()).map_or(reference, Vec::as_slice);
        let mut checks = checks(found, reference);
        for (number, check) in checks.iter_mut().enumerate() {
            let key = key(&name, number, check.measure);
            if let Some(error) = self.plain.get(&key) {
                check.tolerance = check.tolerance.max(FACTOR * error);
            }
            let largest = self.errors.entry(key).or_insert(0.0);
            *largest = worse(*largest, check.error);
        }
        let rank = |check: &Check| if check.error.is_nan() { f64::INFINITY } else { check.share() };
        let worst = checks.into_iter().max_by(|a, b| rank(a).total_cmp(&rank(b)));
        match worst {
            Some(check) => self.rows.push(Row::Compared { name, check }),
            None => self.fail(name, "no check applies to it".into()),
        }
    }

    /// A report that keeps what is found, as the truth for others.
    pub(super) fn keeping() -> Self {
        Report { found: Some(BTreeMap::new()), ..Report::default() }
    }

    /// A report in which everything is compared with what `truth` found.
    pub(super) fn of_truth(truth: Report) -> Self {
        Report { truth: truth.found.unwrap_or_default(), ..Report::default() }
    }

    /// A report that tolerates three times the largest error in each row of `plain`.
    pub(super) fn tolerating(plain: &[Report]) -> Self {
        let mut errors = Errors::new();
        for (key, &error) in plain.iter().flat_map(|report| &report.errors).filter(|(_, error)| error.is_finite()) {
            let largest = errors.entry(key.clone()).or_insert(0.0);
            *largest = error.max(*largest);
        }
        Report { plain: errors, ..Report::default() }
    }

    /// Something could not be compared.
    pub fn fail(&mut self, name: impl Into<String>, why: String) {
        self.rows.push(Row::Failed { name: name.into(), why });
    }

    /// Something was left out on purpose.
    pub fn note(&mut self, name: impl Into<String>, why: impl Into<String>) {
        self.rows.push(Row::Note { name: name.into(), why: why.into() });
    }

    /// Number of tensors that were compared.
    pub fn compared(&self) -> usize {
        self.rows.iter().filter(|row| matches!(row, Row::Compared { .. })).count()
    }

    /// Number of rows that fail.
    pub fn failures(&self) -> usize {
        self.rows.iter().filter(|row| row.fails()).count()
    }

    /// Whether something was compared and nothing failed.
    pub fn passed(&self) -> bool {
        self.compared() > 0 && self.failures() == 0
    }

    /// Whether nothing was compared on purpose, and nothing failed.
    pub fn left_out(&self) -> bool {
        self.compared() == 0 && self.failures() == 0 && !self.rows.is_empty()
    }

    /// One line for everything: counts, and the tensor that came closest to its tolerance.
    pub fn summary(&self) -> String {
        let counts = format!("{} tensors compared, {} failed", self.compared(), self.failures());
        if self.left_out() {
            let why = self.rows.iter().find_map(|row| if let Row::Note { why, .. } = row { Some(why) } else { None });
            return format!("nothing was compared, on purpose: {}", why.map_or("", String::as_str));
        }
        if self.compared() == 0 {
            return format!("FAIL: nothing was compared, {} failed", self.failures());
        }
        let closest = (self.rows.iter())
            .filter_map(|row| match row {
                Row::Compared { name, check } if check.passes() => Some((name, check.share())),
                _ => None,
            })
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let closest = closest.map_or(String::new(), |(name, share)| {
            format!("; closest to its tolerance: {name} ({:.0} %)", 100.0 * share)
        });
        format!("{}: {counts}{closest}", if self.passed() { "ok" } else { "FAIL" })
    }
}

impl Row {
    /// Whether this row makes the comparison fail.
    pub fn fails(&self) -> bool {
        match self {
            Row::Compared { check, .. } => !check.passes(),
            Row::Failed { .. } => true,
            Row::Note { .. } => false,
        }
    }

    /// File (without extension) and tensor.
    pub fn name(&self) -> &str {
        match self {
            Row::Compared { name, .. } | Row::Failed { name, .. } | Row::Note { name, .. } => name,
        }
    }
}

impl fmt::Display for Report {
    /// The table: one line a row, the columns aligned, failures marked at both ends; then the summary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_table(f, &self.rows.iter().collect::<Vec<_>>())?;
        write!(f, "{}", self.summary())
    }
}

/// A report of which only the rows that fail are shown.
pub struct Failures<'a>(pub &'a Report);

impl fmt::Display for Failures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<&Row> = self.0.rows.iter().filter(|row| row.fails()).collect();
        if !rows.is_empty() {
            write_table(f, &rows)?;
        }
        write!(f, "{}", self.0.summary())
    }
}

fn write_table(f: &mut fmt::Formatter<'_>, rows: &[&Row]) -> fmt::Result {
    let width = rows.iter().map(|row| row.name().chars().count()).max().unwrap_or(0).clamp(6, 72);
    writeln!(f, "  {:width$}  {:6}  {:>8}  {:>9}  {:>5}", "tensor", "by", "error", "tolerance", "used")?;
    for row in rows {
        let mark = if row.fails() { '!' } else { ' ' };
        write!(f, "{mark} {:width$}  ", row.name())?;
        match row {
            Row::Compared { check, .. } => {
                let Check { measure, error, tolerance } = check;
                let verdict = if check.passes() { "ok" } else { "FAIL" };
                let used = match check.share() {
                    share if share < 10.0 => format!("{:.0} %", 100.0 * share),
                    _ => String::new(),
                };
                writeln!(f, "{measure:6}  {error:>8.1e}  {tolerance:>9.1e}  {used:>5}  {verdict}")?;
            }
            Row::Failed { why, .. } => writeln!(f, "FAIL: {why}")?,
            Row::Note { why, .. } => writeln!(f, "not compared: {why}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(found: &[f64], reference: &[f64]) -> bool {
        let mut report = Report::default();
        report.compare("x", found, reference, |f, r| vec![Check::max(f, r, 1e-3), Check::l2(f, r, 1e-3)]);
        assert_eq!(report.passed(), report.failures() == 0);
        !report.passed()
    }

    #[test]
    fn only_what_is_near_passes() {
        let reference = [1.0, -2.0, 0.0];
        assert!(!fails(&[1.0005, -2.0, 0.0], &reference));
        assert!(fails(&[1.0005, -2.0, 0.01], &reference));
        assert!(fails(&[1.0, 2.0, 0.0], &reference));
        // Zero is compared with zero.
        assert!(!fails(&[0.0; 2], &[0.0; 2]));
        assert!(fails(&[1e-9, 0.0], &[0.0; 2]));
    }

    #[test]
    fn nothing_that_is_not_a_number_passes() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let (with, without) = ([1.0, bad, 3.0], [1.0, 2.0, 3.0]);
            assert!(fails(&with, &without) && fails(&without, &with) && fails(&with, &with), "{bad}");
            for check in [Check::each, Check::absolute, Check::max, Check::l2] {
                for tolerance in [1e-3, f64::INFINITY] {
                    assert!(!check(&with, &without, tolerance).passes(), "{bad}");
                    assert!(!check(&with, &with, tolerance).passes(), "{bad}");
                }
            }
            assert!(!Check::exact(&with, &with).passes());
        }
    }

    #[test]
    fn norms_of_a_parameter_and_rows_of_training_share_what_is_tolerated() {
        let same = |a: &str, b: &str| key(a, 0, "each") == key(b, 0, "each");
        assert!(same(
            "loss_cosine_uw gradnorm.blocks.0.attn.qkv.bias",
            "loss_linear_p2 gradnorm.blocks.0.attn.qkv.bias"
        ));
        assert!(!same(
            "loss_cosine_uw gradnorm.blocks.0.attn.qkv.bias",
            "loss_cosine_uw gradnorm.blocks.1.attn.qkv.bias"
        ));
        assert!(!same("grads_cosine_uw grad.final_layer.linear.bias", "grads_linear_uw grad.final_layer.linear.bias"));
        assert!(same("train20 final.x_embedder.proj.bias", "train20 final.blocks.0.mlp.fc1.bias"));
    }

    #[test]
    fn sizes_must_agree_and_something_must_be_there() {
        assert!(fails(&[1.0], &[1.0, 1.0]));
        assert!(fails(&[], &[]));
        assert!(!Report::default().passed());
        let mut only_notes = Report::default();
        only_notes.note("x", "why");
        assert!(!only_notes.passed() && only_notes.summary().contains("nothing was compared"));
    }

    #[test]
    fn the_worst_check_decides_and_failures_stand_out() {
        let mut report = Report::default();
        let checks = |f: &[f64], r: &[f64]| vec![Check::max(f, r, 1.0), Check::exact(f, r), Check::l2(f, r, 1.0)];
        report.compare("near", &[1.0], &[1.001], checks);
        report.compare("nan", &[f64::NAN], &[1.0], checks);
        report.compare("same", &[1.0], &[1.0], checks);
        assert_eq!((report.compared(), report.failures()), (3, 2));
        let text = report.to_string();
        assert_eq!(text.lines().filter(|line| line.starts_with("! ") && line.ends_with("FAIL")).count(), 2, "{text}");
        assert!(text.lines().last().unwrap().starts_with("FAIL: 3 tensors compared, 2 failed"), "{text}");
    }
}
