//! One name in several places: an operation `x` is `src/ops/x/`, `kernels/x.cu`, `pub mod x`, a node of the tape, `tests/x.rs`
//! and a group in `benches/ops.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The folders of src/ops, but those of what operations share.
fn operations() -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join("src/ops")).expect("src/ops is a folder");
    let folders = entries.map(|entry| entry.expect("its entries can be read")).filter(|entry| entry.path().is_dir());
    let names = folders.map(|folder| folder.file_name().into_string().expect("names are ASCII"));
    names.filter(|name| !["cpu", "cuda"].contains(&name.as_str())).collect()
}

/// What stands between `before` and `after` wherever both occur, in order.
fn between<'a>(text: &'a str, before: &'a str, after: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).map(move |rest| rest.split(after).next().unwrap_or_default())
}

#[test]
fn there_are_operations() {
    let operations = operations();
    assert!(operations.len() >= 9 && operations.contains("ln_linear"), "{operations:?}");
}

#[test]
fn every_operation_has_its_files() {
    for name in operations() {
        for path in ["src/ops/NAME/mod.rs", "src/ops/NAME/reference.rs", "kernels/NAME.cu", "tests/NAME.rs"] {
            let path = path.replace("NAME", &name);
            assert!(root().join(&path).is_file(), "{path} is missing");
        }
        let test = read(&format!("tests/{name}.rs"));
        for check in ["check_operation(", "check_on_cuda", "check_slopes(", "check_refused("] {
            assert!(test.contains(check), "tests/{name}.rs never calls {check}");
        }
    }
}

#[test]
fn every_operation_is_a_module_and_a_node() {
    let text = read("src/ops/mod.rs");
    let modules = between(&text, "pub mod ", ";").filter(|m| !["real", "cuda"].contains(m));
    let modules: BTreeSet<String> = modules.map(Into::into).collect();
    assert_eq!(modules, operations());
    let nodes = between(&text, "pub(crate) enum Node {", "}").next().expect("there is an enum of nodes");
    let saved: BTreeSet<String> = between(nodes, "(", "::Saved)").map(Into::into).collect();
    assert_eq!(saved, operations());
}

#[test]
fn every_operation_has_a_group_of_benchmarks() {
    let text = read("benches/ops.rs");
    let mut groups: BTreeSet<String> = between(&text, "group(c, \"", "\"").map(Into::into).collect();
    // Two of them, with the GELU between.
    assert!(groups.remove("mlp"));
    assert_eq!(groups, operations());
}
