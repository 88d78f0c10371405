//! Chains of pre-dumps when something goes wrong, and what a tracked program can see of them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use testkit::rounds::{best, end, keepers, log_of, outside, round, same, try_round};
use testkit::skips::{self, as_root};
use testkit::{Engine, Fixture, process};

/// Steps of a pre-dump, more than it has.
const MOST_STEPS: u32 = 100;

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

#[test]
fn a_tracked_program_notices_nothing() {
    as_root("a_tracked_program_notices_nothing", || {
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
    as_root("a_killed_keeper_means_a_whole_copy", || {
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
    as_root("a_round_killed_at_any_step_leaves_the_chain_good", || {
        for (name, first) in [
            ("threads-few", 0),
            ("threads-few", 1),
            ("register-count", 0),
        ] {
            let mut fixture = Fixture::start(name)?;
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
                let what = || format!("{name}: round {first} broken at step {step}");
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
    as_root("a_broken_round_is_no_parent_and_the_one_before_is", || {
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
fn images_do_not_take_the_place_of_what_they_build_on() {
    as_root("images_do_not_take_the_place_of_what_they_build_on", || {
        let mut fixture = Fixture::start("memory-churn")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        for number in 0..2 {
            round(fixture.pid, base.path(), number)?;
        }
        let before = fs::read(base.path().join("0/floe.json"))?;
        for (command, previous) in [
            ("pre-dump", "."),
            ("dump", "../0"),
            ("dump", "../1"),
            ("dump --iterate", "../1"),
        ] {
            let mut floe = Command::new(env!("CARGO_BIN_EXE_floe"));
            floe.args(command.split(' '))
                .args(["--prev-images-dir", previous]);
            floe.args(["--tree", &fixture.pid.to_string()]);
            let output = floe
                .arg("--images-dir")
                .arg(base.path().join("0"))
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(2),
                "{command} {previous}: {said}"
            );
            ensure!(
                said.contains("would take the place of what they build on"),
                "{said}"
            );
        }
        ensure!(
            fs::read(base.path().join("0/floe.json"))? == before,
            "it was written"
        );
        end(&mut fixture, base.path(), (1, best()))
    });
}

#[test]
fn a_full_dump_into_the_parents_directory_is_told_from_the_parent() {
    let name = "a_full_dump_into_the_parents_directory_is_told_from_the_parent";
    as_root(name, || {
        let mut fixture = Fixture::start("memory-churn")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        round(fixture.pid, base.path(), 0)?;
        let dump = |directory: &str, more: &[&str]| -> anyhow::Result<()> {
            let mut floe = Command::new(env!("CARGO_BIN_EXE_floe"));
            floe.args([
                "dump",
                "--leave-running",
                "--tree",
                &fixture.pid.to_string(),
            ]);
            let status = floe
                .args(more)
                .arg("--images-dir")
                .arg(base.path().join(directory))
                .status()?;
            ensure!(status.success(), "{directory}: {status}");
            Ok(())
        };
        dump("1", &["--prev-images-dir", "../0"])?;
        dump("0", &[])?;
        fixture.kill()?;
        let mut floe = Command::new(env!("CARGO_BIN_EXE_floe"));
        let output = floe
            .args(["restore", "-d", "-D"])
            .arg(base.path().join("1"))
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(5), "{said}");
        ensure!(said.contains("builds on another checkpoint than"), "{said}");
        Ok(())
    });
}

#[test]
fn two_rounds_at_once_take_turns_or_one_is_refused() {
    as_root("two_rounds_at_once_take_turns_or_one_is_refused", || {
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
    as_root("a_program_that_ended_between_rounds_is_named", || {
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

/// Which pages of shared memory a round has itself: `nr_pages` of each entry that is not in the parent.
fn shared_pages(images: &Path) -> anyhow::Result<Vec<u64>> {
    let mut own = Vec::new();
    for entry in fs::read_dir(images)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("pagemap-shmem-") {
            continue;
        }
        let shown = Command::new(env!("CARGO_BIN_EXE_floe"))
            .args(["image", "show"])
            .arg(&path)
            .output()?;
        let shown: serde_json::Value = serde_json::from_slice(&shown.stdout)?;
        let entries = shown["entries"].as_array().context("it has entries")?;
        // The first names the file of the pages.
        own.extend(entries[1..].iter().filter_map(|entry| {
            let inherited = entry.to_string().contains("PE_PARENT");
            (!inherited).then(|| entry["nr_pages"].as_u64())?
        }));
    }
    Ok(own)
}

#[test]
fn shared_memory_is_copied_once_and_then_where_it_changed() {
    as_root(
        "shared_memory_is_copied_once_and_then_where_it_changed",
        || {
            for tracker in floe().trackers()? {
                shared_rounds("memory-shared", 16, tracker)?;
                // All of a segment in huge pages counts as there.
                shared_rounds("memory-shared-hugetlb", 3 * 512, tracker)?;
            }
            Ok(())
        },
    );
}

/// Two rounds and the final dump of a program that writes at most three pages in each check.
fn shared_rounds(program: &str, pages: u64, tracker: &str) -> anyhow::Result<()> {
    let mut fixture = match Fixture::start(program) {
        Err(error) if error.is::<testkit::program::Missing>() => {
            return skips::skip(program, &error.to_string());
        }
        other => other?,
    };
    let base = tempfile::tempdir_in("/dev/shm")?;
    let copied = |number: u32| -> anyhow::Result<u64> {
        let outcome = try_round(fixture.pid, base.path(), (number, tracker), &[])?;
        outcome.ok(&format!("round {number} by {tracker}"))?;
        let own = shared_pages(&base.path().join(number.to_string()))?;
        Ok(own.iter().sum())
    };
    let first = copied(0)?;
    ensure!(first >= pages, "{tracker} copied {first} pages first");
    let still = copied(1)?;
    let expected = if tracker == "none" { first } else { 0 };
    ensure!(still == expected, "{tracker} copied {still} pages then");
    fixture.check()?;
    end(&mut fixture, base.path(), (1, tracker))?;
    let last = shared_pages(&base.path().join("last"))?.iter().sum::<u64>();
    ensure!(
        tracker == "none" || last <= 3,
        "{tracker} copied {last} pages last"
    );
    Ok(())
}
