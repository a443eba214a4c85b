//! `dtr-fused completions` as a user runs it.

#[allow(dead_code)] // every test file uses what it needs
mod program;

use program::{run, succeeds};

#[test]
fn scripts_complete_commands_and_flags() {
    let place = tempfile::tempdir().unwrap();
    for (shell, registers) in [
        ("bash", " -o default dtr-fused\n"),
        ("zsh", "#compdef dtr-fused"),
        ("fish", "complete -c dtr-fused "),
        ("elvish", "edit:completion:arg-completer[dtr-fused]"),
        ("powershell", "-CommandName 'dtr-fused'"),
    ] {
        let script = succeeds(run(place.path(), &["completions", shell]));
        assert!(script.contains(registers), "{shell}: '{registers}' is missing");
        let commands = ["train", "sample", "parity", "bench", "kernels", "info", "completions"];
        for word in commands.iter().chain(&["grad-clip", "routing", "checkpoint-activations", "npz", "profile"]) {
            assert!(script.contains(word), "{shell}: {word} is not completed");
        }
    }
}
