//! Chains of pre-dumps when something goes wrong, and what a tracked program can see of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use testkit::engine::Outcome;
use testkit::{Engine, Fixture, process, skips};

/// Steps of a pre-dump, more than it has.
const MOST_STEPS: u32 = 100;

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// The best tracker that this kernel has.
fn best() -> &'static str {
    let trackers = floe().trackers().expect("`floe check` answers");
    trackers[0]
}

fn run(name: &str, test: fn() -> anyhow::Result<()>) {
    if !rustix::process::geteuid().is_root() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return;
    }
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

/// One round into `base/NUMBER`, on top of the one before.
fn try_round(
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
    floe().run(&words, &images, "pre-dump.log", &options, variables)
}

fn round(pid: i32, base: &Path, number: u32) -> anyhow::Result<()> {
    let outcome = try_round(pid, base, (number, best()), &[])?;
    outcome.ok(&format!("round {number}")).map(drop)
}

/// The last dump of a chain, on top of round `number`, a restore, and the program's own check.
fn end(fixture: &mut Fixture, base: &Path, (number, tracker): (u32, &str)) -> anyhow::Result<()> {
    fixture.set_images(base.join("last"));
    let previous = format!("../{number}");
    let mut options = vec!["--prev-images-dir", &previous, "--tracker", tracker];
    // Of a program that forks, only now is known whom there is to reap.
    options.push("--leave-stopped");
    let outcome = fixture.try_dump(&floe(), &options, &[])?;
    outcome.ok("the last dump")?;
    fixture.kill()?;
    fixture.restore(&floe(), &[])?;
    fixture.check().context("after the restore")
}

/// What the program could notice: its mappings and its descriptors.
fn outside(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
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

fn same(before: &[String], now: &[String]) -> anyhow::Result<()> {
    let new: Vec<_> = now.iter().filter(|fact| !before.contains(fact)).collect();
    let gone: Vec<_> = before.iter().filter(|fact| !now.contains(fact)).collect();
    ensure!(
        new.is_empty() && gone.is_empty(),
        "new: {new:?}; gone: {gone:?}"
    );
    Ok(())
}

/// Pids of keepers of the tree.
fn keepers(root: i32) -> Vec<i32> {
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

fn log_of(base: &Path, number: u32) -> anyhow::Result<String> {
    Ok(fs::read_to_string(
        base.join(number.to_string()).join("pre-dump.log"),
    )?)
}

#[test]
fn a_tracked_program_notices_nothing() {
    run("a_tracked_program_notices_nothing", || {
        for name in ["memory-cow", "memory-shared", "tree", "threads-few"] {
            for tracker in floe().trackers()? {
                let mut fixture = Fixture::start(name)?;
                let base = tempfile::tempdir_in("/dev/shm")?;
                let before = outside(&fixture)?;
                for number in 0..2 {
                    let what = format!("round {number} of {name} by {tracker}");
                    let outcome = try_round(fixture.pid, base.path(), (number, tracker), &[])?;
                    outcome.ok(&what)?;
                    same(&before, &outside(&fixture)?).context(what.clone())?;
                    fixture.check().context(what)?;
                }
                end(&mut fixture, base.path(), (1, tracker))
                    .with_context(|| format!("{name} by {tracker}"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_killed_keeper_means_a_whole_copy() {
    run("a_killed_keeper_means_a_whole_copy", || {
        let mut fixture = Fixture::start("memory-churn")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        round(fixture.pid, base.path(), 0)?;
        let kept = keepers(fixture.pid);
        ensure!(kept.len() == 1, "keepers: {kept:?}");
        process::kill_ours(&kept, std::time::Duration::from_secs(5))?;
        round(fixture.pid, base.path(), 1)?;
        let log = log_of(base.path(), 1)?;
        ensure!(log.contains("all memory is copied"), "{log}");
        round(fixture.pid, base.path(), 2)?;
        end(&mut fixture, base.path(), (2, best()))
    });
}

#[test]
fn a_round_killed_at_any_step_leaves_the_chain_good() {
    run("a_round_killed_at_any_step_leaves_the_chain_good", || {
        for first in [0, 1] {
            let mut fixture = Fixture::start("threads-few")?;
            let base = tempfile::tempdir_in("/dev/shm")?;
            let before = outside(&fixture)?;
            for number in 0..first {
                round(fixture.pid, base.path(), number)?;
            }
            let mut step = 1;
            loop {
                let fault = format!("step:{step}");
                let variables = [("FLOE_FAULT", fault.as_str())];
                let outcome = try_round(fixture.pid, base.path(), (first, best()), &variables)?;
                let what = || format!("round {first} broken at step {step}");
                same(&before, &outside(&fixture)?).with_context(what)?;
                fixture.check().with_context(what)?;
                if outcome.status.success() {
                    break;
                }
                ensure!(step < MOST_STEPS, "a round has no last step");
                step += 1;
            }
            ensure!(step > 4, "only {step} steps");
            end(&mut fixture, base.path(), (first, best()))?;
        }
        Ok(())
    });
}

#[test]
fn a_broken_round_is_no_parent_and_the_one_before_is() {
    run("a_broken_round_is_no_parent_and_the_one_before_is", || {
        let mut fixture = Fixture::start("memory-churn")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        round(fixture.pid, base.path(), 0)?;
        let variables = [("FLOE_FAULT", "step:4")];
        let outcome = try_round(fixture.pid, base.path(), (1, best()), &variables)?;
        ensure!(!outcome.status.success(), "there is no fourth step");
        // Changes were counted from the broken round on, so nothing of the first one is trusted.
        end(&mut fixture, base.path(), (0, best()))
    });
}

#[test]
fn two_rounds_at_once_take_turns_or_one_is_refused() {
    run("two_rounds_at_once_take_turns_or_one_is_refused", || {
        let mut fixture = Fixture::start("memory-churn")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        round(fixture.pid, base.path(), 0)?;
        let rounds: Vec<_> = (0..3)
            .map(|number| {
                let images = base.path().join(format!("beside-{number}"));
                fs::create_dir(&images)?;
                let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
                command.args(["pre-dump", "--track-mem", "--prev-images-dir", "../0"]);
                command.args(["--tracker", best(), "--tree", &fixture.pid.to_string()]);
                command.arg("--images-dir").arg(images);
                Ok(command.spawn()?)
            })
            .collect::<anyhow::Result<_>>()?;
        let mut good = 0;
        for mut round in rounds {
            good += u32::from(round.wait()?.success());
        }
        ensure!(good > 0, "none of the rounds was made");
        fixture.check()?;
        end(&mut fixture, base.path(), (0, best()))
    });
}

#[test]
fn a_program_that_ended_between_rounds_is_named() {
    run("a_program_that_ended_between_rounds_is_named", || {
        let mut fixture = Fixture::start("plain")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        let pid = fixture.pid;
        round(pid, base.path(), 0)?;
        fixture.kill()?;
        let outcome = try_round(pid, base.path(), (1, best()), &[])?;
        let said = outcome.cause();
        ensure!(!outcome.status.success(), "a round of nothing");
        ensure!(said.contains(&pid.to_string()), "{said}");
        ensure!(!base.path().join("1/floe.json").exists(), "a manifest");
        ensure!(base.path().join("0/floe.json").exists(), "the first round");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !keepers(pid).is_empty() {
            ensure!(
                std::time::Instant::now() < deadline,
                "the keeper outlived the tree"
            );
            std::thread::yield_now();
        }
        Ok(())
    });
}
