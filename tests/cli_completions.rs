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
        // Values, too; clap has none for Elvish and PowerShell.
        let values = match shell {
            "bash" => ["\"paper sublayer random dense\"", "\"ddim ddpm dpm++\"", "DiT-B/4 "],
            "zsh" => ["(paper sublayer random dense)", "(ddim ddpm dpm++)", "DiT-B/4 "],
            "fish" => ["paper\\t", "dpm++\\t", "DiT-B/4\\t"],
            _ => continue,
        };
        for value in values {
            assert!(script.contains(value), "{shell}: {value} is not completed");
        }
    }
}
