//! `cuda-sim` as a user runs it: what it prints, and with what code it ends.

use std::process::Command;

/// Runs the program on cases of `tests/cases`; gives its exit code and what it printed, errors last.
fn run(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cuda-sim"));
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    let output = command.current_dir(cases).args(args).output().expect("the program starts");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("UTF-8"));
    (output.status.code(), said.concat())
}

#[track_caller]
fn ends(args: &[&str], code: i32, says: &[&str]) {
    let (found, said) = run(args);
    assert_eq!(found, Some(code), "{said}");
    for part in says {
        assert!(said.contains(part), "'{part}' is missing: {said}");
    }
}

#[test]
fn cases_that_pass_exit_with_0() {
    ends(&["run", "cu_grid_info_sm80"], 0, &["PASS  cu_grid_info_sm80", "1 cases ran, 0 failed"]);
    // One that must be reported, and is.
    ends(&["run", "neg_race_shared_sm80", "twin_race_shared_sm80"], 0, &["2 cases ran, 0 failed"]);
    ends(&["run", "--verbose", "neg_race_shared_sm80"], 0, &["data_race_shared: kernel bad_race_shared"]);
}

#[test]
fn one_case_that_fails_exits_with_1() {
    // A race that nobody looks for.
    let faulty = ["run", "--no-sanitizer", "cu_grid_info_sm80", "neg_race_shared_sm80", "cu_tables_sm80"];
    let says =
        ["PASS  cu_grid_info_sm80", "FAIL  neg_race_shared_sm80", "PASS  cu_tables_sm80", "3 cases ran, 1 failed"];
    ends(&faulty, 1, &says);
    // A loop that is endless, as far as the budget tells.
    ends(&["run", "--budget", "3", "cu_divergence_sm80"], 1, &["FAIL  cu_divergence_sm80", "the budget is used up"]);
}

#[test]
fn what_is_not_there_exits_with_1() {
    ends(&["run", "no_such_case"], 1, &["FAIL  no_such_case", "0 cases ran, 1 failed"]);
    ends(&["run", "cu_grid_info_sm80", "no_such_case"], 1, &["PASS  cu_grid_info_sm80", "1 cases ran, 1 failed"]);
    ends(&["run", "--arch", "sm_70", "cu_grid_info_sm80"], 1, &["the architecture sm_70 is not simulated"]);
    ends(&["disasm", "no_such_file.ptx"], 1, &["no_such_file.ptx"]);
    ends(&["run"], 2, &["<DIRS>"]);
}

#[test]
fn counters_are_printed_in_words_or_as_json() {
    let (code, said) = run(&["run", "--json", "cu_grid_info_sm80"]);
    assert_eq!(code, Some(0), "{said}");
    let (from, to) = (said.find('{').expect("an object"), said.rfind('}').expect("an object"));
    let counters: serde_json::Value = serde_json::from_str(&said[from..=to]).unwrap();
    assert!(counters.as_object().is_some_and(|counters| !counters.is_empty()), "{said}");
    let [(_, with), (_, without)] =
        [&["run", "--counters", "cu_grid_info_sm80"][..], &["run", "cu_grid_info_sm80"]].map(run);
    assert!(with.lines().count() > without.lines().count() + 5, "{with}");
}

#[test]
fn a_kernel_is_shown_decoded() {
    let (code, said) = run(&["disasm", "cu_grid_info_sm80/kernel.ptx", "--arch", "sm_80"]);
    assert_eq!(code, Some(0), "{said}");
    let first = said.lines().next().unwrap_or_default();
    let count = first.strip_prefix("grid_info: ").and_then(|rest| rest.split_once(" instructions"));
    let count: usize = count.and_then(|(count, _)| count.parse().ok()).unwrap_or_else(|| panic!("{first}"));
    let instructions = said.lines().filter(|line| line.contains("  line ")).count();
    assert!(count > 10 && instructions == count, "{instructions} of {count} instructions: {said}");
    assert!(said.contains("%ctaid.x") && said.contains("st.global"), "{said}");
}
