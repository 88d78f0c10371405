//! Shells: a pipeline, and a session on a terminal.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use super::{Engines, Tree, detached, eventually, place};
use crate::process;

/// Numbers flow from a loop through two filters into a file: none is lost, none comes twice.
pub fn pipeline(engines: &Engines<'_>) -> anyhow::Result<()> {
    const SCRIPT: &str = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.002; done \
        | sed -u 's/^/x/' | sed -u 's/^x//' > numbers";
    let directory = place()?;
    let mut command = detached("sh")?;
    command.args(["-c", SCRIPT]);
    let mut tree = Tree::start(command, directory.path())?;
    let file = directory.path().join("numbers");
    let lines = || -> anyhow::Result<usize> { Ok(fs::read_to_string(&file)?.lines().count()) };
    let reaches = |count: usize| {
        eventually(|| {
            let found = lines()?;
            ensure!(found >= count, "{found} of {count} lines");
            Ok(())
        })
    };
    reaches(50)?;
    tree.pass_through(engines, &[])?;
    let now = lines()?;
    reaches(now + 50).context("after the restore")?;
    let text = fs::read_to_string(&file)?;
    for (expected, line) in text.lines().enumerate() {
        ensure!(line == expected.to_string(), "line {expected} is {line:?}");
    }
    Ok(())
}

/// A server with a shell on its pty.
pub fn tmux(engines: &Engines<'_>) -> anyhow::Result<()> {
    let directory = place()?;
    process::adopt_orphans()?;
    tell(
        directory.path(),
        &[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            "sh",
        ],
    )?;
    let pid = tell(directory.path(), &["display-message", "-p", "#{pid}"])?;
    let mut tree = Tree::of(pid.trim().parse()?, directory.path().join("output"))?;
    type_line(directory.path(), "number=41; echo ready")?;
    shows(directory.path(), "\nready")?;
    tree.pass_through(engines, &["--ext-unix-sk"])?;
    shows(directory.path(), "\nready").context("after the restore")?;
    type_line(directory.path(), "echo is $((number + 1)) now")?;
    shows(directory.path(), "\nis 42 now")
}

/// One command of tmux, whose server is the one of this directory.
fn tell(directory: &Path, words: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("tmux")
        .arg("-S")
        .arg(directory.join("socket"))
        .args(words)
        .current_dir(directory)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .env("TERM", "screen")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tmux {words:?}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}

fn type_line(directory: &Path, line: &str) -> anyhow::Result<()> {
    tell(directory, &["send-keys", "-l", line])?;
    tell(directory, &["send-keys", "Enter"]).map(drop)
}

fn shows(directory: &Path, text: &str) -> anyhow::Result<()> {
    eventually(|| {
        let screen = tell(directory, &["capture-pane", "-p"])?;
        ensure!(
            format!("\n{screen}").contains(text),
            "the screen is {screen:?}"
        );
        Ok(())
    })
}
