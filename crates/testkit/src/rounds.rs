//! Rounds of pre-dumps, and what a tracked program can see of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::engine::{Engine, Outcome};
use crate::fixture::Fixture;
use crate::process;

/// The best tracker that this kernel has.
pub fn best() -> &'static str {
    let trackers = Engine::floe().and_then(|floe| floe.trackers());
    trackers.expect("`floe check` answers")[0]
}

/// One round into `base/NUMBER`, on top of the one before.
pub fn try_round(
    pid: i32,
    base: &Path,
    (number, tracker): (u32, &str),
    variables: &[(&str, &str)],
) -> anyhow::Result<Outcome> {
    let images = base.join(number.to_string());
    let _ = fs::remove_dir_all(&images);
    fs::create_dir_all(&images)?;
    let previous = number.checked_sub(1).map(|before| format!("../{before}"));
    let mut options = vec!["--track-mem", "--tracker", tracker];
    if let Some(previous) = &previous {
        options.extend(["--prev-images-dir", previous]);
    }
    let tree = pid.to_string();
    let words = ["pre-dump", "--tree", &tree];
    Engine::floe()?.run(&words, &images, "pre-dump.log", &options, variables)
}

/// The same by the best tracker, which succeeds.
pub fn round(pid: i32, base: &Path, number: u32) -> anyhow::Result<()> {
    let outcome = try_round(pid, base, (number, best()), &[])?;
    outcome.ok(&format!("round {number}")).map(drop)
}

/// The last dump of a chain, on top of round `number`, a restore, and the program's own check.
pub fn end(
    fixture: &mut Fixture,
    base: &Path,
    (number, tracker): (u32, &str),
) -> anyhow::Result<()> {
    fixture.set_images(base.join("last"));
    let previous = format!("../{number}");
    let mut options = vec!["--prev-images-dir", &previous, "--tracker", tracker];
    // Of a program that forks, only now is known whom there is to reap.
    options.push("--leave-stopped");
    let outcome = fixture.try_dump(&Engine::floe()?, &options, &[])?;
    outcome.ok("the last dump")?;
    fixture.kill()?;
    fixture.restore(&Engine::floe()?, &[])?;
    fixture.check().context("after the restore")
}

/// What the program could notice: its mappings and its descriptors.
pub fn outside(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let mut facts = Vec::new();
    for pid in fixture.family() {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        facts.extend(maps.lines().map(|line| format!("{pid}: {line}")));
        let mut descriptors = BTreeSet::new();
        for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = fd?.path();
            // Open only while it answers a question.
            let Ok(link) = fs::read_link(&path) else {
                continue;
            };
            if link.ends_with("answer") {
                continue;
            }
            descriptors.insert(format!("{} {}", path.display(), link.display()));
        }
        facts.extend(descriptors);
        let tracer = process::status_field(pid, "TracerPid");
        facts.push(format!("{pid}: traced by {tracer:?}"));
    }
    Ok(facts)
}

/// Whether the facts are the same; the error names those that are not.
pub fn same(before: &[String], now: &[String]) -> anyhow::Result<()> {
    let new: Vec<_> = now.iter().filter(|fact| !before.contains(fact)).collect();
    let gone: Vec<_> = before.iter().filter(|fact| !now.contains(fact)).collect();
    ensure!(
        new.is_empty() && gone.is_empty(),
        "new: {new:?}; gone: {gone:?}"
    );
    Ok(())
}

/// Pids of keepers of the tree.
pub fn keepers(root: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.get(1) == Some(&&b"keeper"[..])
            && words.get(2) == Some(&root.to_string().as_bytes())
        {
            found.push(pid);
        }
    }
    found
}

/// The log of a round.
pub fn log_of(base: &Path, number: u32) -> anyhow::Result<String> {
    Ok(fs::read_to_string(
        base.join(number.to_string()).join("pre-dump.log"),
    )?)
}
