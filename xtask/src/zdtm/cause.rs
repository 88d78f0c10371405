//! Why a test failed: a line of a log, or of what the test itself wrote.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of logs that only repeat that something failed.
const REPEATS: [&str; 5] = [
    "RLIMIT_NOFILE for self",
    "Dumping FAILED",
    "Restoring FAILED",
    "exited, status=",
    "Killing failed",
];

/// One line: the stage, and the first error in it.
pub(super) fn find(directory: &Path, test: &str, output: &str) -> String {
    let action = output
        .lines()
        .filter_map(|line| line.strip_prefix("Run criu "))
        .next_back()
        .unwrap_or_default();
    let stage = output
        .lines()
        .find_map(|line| line.split_once(&format!("Test {test} FAIL at ")))
        .map(|(_, rest)| rest.trim_matches([' ', '#']).to_owned());
    let engine_failed = stage
        .as_deref()
        .is_none_or(|stage| stage.to_lowercase().starts_with("criu"));
    let from_log = || newest_log(directory, test, action).and_then(|log| error_line(&log));
    let found = if engine_failed {
        from_log().or_else(|| own_words(directory, test))
    } else {
        own_words(directory, test).or_else(from_log)
    };
    let last = || output.lines().rev().find(|line| !line.trim().is_empty());
    let found = found.or_else(|| last().map(str::to_owned));
    let stage = stage.unwrap_or_else(|| action.to_owned());
    format!("[{stage}] {}", found.unwrap_or_default())
}

/// The log of the last run of `action`, among all pids and iterations.
fn newest_log(directory: &Path, test: &str, action: &str) -> Option<PathBuf> {
    let name = format!("{action}.log");
    let mut logs = Vec::new();
    let of_test = fs::read_dir(directory.join("dump").join(test)).ok()?;
    for pid in of_test.flatten() {
        for round in fs::read_dir(pid.path()).into_iter().flatten().flatten() {
            let log = round.path().join(&name);
            if let Ok(changed) = log.metadata().and_then(|meta| meta.modified()) {
                logs.push((changed, log));
            }
        }
    }
    logs.into_iter().max().map(|(_, log)| log)
}

fn error_line(log: &Path) -> Option<String> {
    let text = String::from_utf8_lossy(&fs::read(log).ok()?).into_owned();
    let mut errors = text
        .lines()
        .filter(|line| line.contains("Error") || line.contains("panicked"))
        .filter(|line| !REPEATS.iter().any(|repeat| line.contains(repeat)));
    // Behind the time and the place.
    let told = |line: &str| {
        let told = line.split_once("): ").map_or(line, |(_, told)| told);
        told.trim().to_owned()
    };
    let first = told(errors.next()?);
    // A list: its first item says more.
    match errors.next().filter(|_| first.ends_with(':')) {
        Some(item) => Some(format!("{first} {}", told(item))),
        None => Some(first),
    }
}

/// What the test wrote: its complaint, behind time and place.
fn own_words(directory: &Path, test: &str) -> Option<String> {
    ["out.inprogress", "out"].iter().find_map(|end| {
        let text = fs::read(directory.join(format!("{test}.{end}"))).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text
            .lines()
            .rev()
            .filter(|line| !line.starts_with('#'))
            .find(|line| line.contains("FAIL") || line.contains("ERR"))?;
        Some(line.trim().to_owned())
    })
}
