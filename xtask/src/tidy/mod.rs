//! `cargo xtask tidy`: rules of the code that neither the compiler nor clippy knows.

pub mod dependencies;
mod lexer;
mod source;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// One broken rule at one place.
struct Finding {
    place: String,
    rule: String,
}

/// Checks everything, prints every finding, and fails if there is one.
pub fn run() -> anyhow::Result<()> {
    let root = crate::root();
    let mut findings = dependencies::check(&root)?;
    let files = rust_files(&root)?;
    for file in &files {
        let text = std::fs::read_to_string(root.join(file))
            .with_context(|| format!("reading {}", file.display()))?;
        findings.extend(source::check(file, &text));
    }
    for finding in &findings {
        println!("{}: {}", finding.place, finding.rule);
    }
    match findings.len() {
        0 => {
            println!("tidy: {} files are fine", files.len());
            Ok(())
        }
        count => bail!("{count} places are not tidy"),
    }
}

/// Every Rust file that git has or would take, relative to the root.
fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut list = Command::new("git");
    list.current_dir(root).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        "*.rs",
    ]);
    let output = list.output().context("starting git")?;
    if !output.status.success() {
        bail!(
            "git ls-files failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    // A file that was removed but not committed yet is still listed.
    Ok(names
        .lines()
        .map(PathBuf::from)
        .filter(|file| root.join(file).exists())
        .collect())
}
