//! `dtr-fused completions`.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::error::Result;

const EXAMPLES: &str = "\
Examples:
  dtr-fused completions bash > ~/.local/share/bash-completion/completions/dtr-fused
  dtr-fused completions fish > ~/.config/fish/completions/dtr-fused.fish
";

/// Print a script that completes the commands and flags in a shell
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn run(args: CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "dtr-fused", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
    // A failure to flush is that of a closed pipe, which println would report in the same way.
    let _ = std::io::stdout().flush();
    Ok(())
}
