//! Chains when the last dump is broken, the disk is full, the keeper is killed at a bad moment, a pid comes
//! again, or memory has writers that no tracker sees.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::rounds::{best, end, keepers, log_of, outside, round, same, try_round};
use testkit::skips::as_root;
use testkit::{Engine, Fixture, process, skips};

/// Steps of a dump, more than it has.
const MOST_STEPS: u32 = 300;
/// Said where nothing is taken from the parent.
const WHOLE: &str = "all memory is copied";

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Waits until the facts are as before: a killed tracer lets go a moment after its end.
fn same_soon(fixture: &Fixture, before: &[String]) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match same(before, &outside(fixture)?) {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::yield_now(),
            Ok(()) => return Ok(()),
        }
    }
}

#[test]
fn a_last_dump_killed_at_any_step_leaves_the_chain_good() {
    as_root(
        "a_last_dump_killed_at_any_step_leaves_the_chain_good",
        || {
            let mut fixture = Fixture::start("memory-counted")?;
            let base = tempfile::tempdir_in("/dev/shm")?;
            let before = outside(&fixture)?;
            for number in 0..2 {
                round(fixture.pid, base.path(), number)?;
                fixture.check()?;
            }
            fixture.set_images(base.path().join("broken"));
            let mut steps = 0;
            loop {
                let fault = format!("step:{}", steps + 1);
                let options = [
                    "--leave-running",
                    "--prev-images-dir",
                    "../1",
                    "--track-mem",
                ];
                let outcome = fixture.try_dump(&floe(), &options, &[("FLOE_FAULT", &fault)])?;
                let what = || format!("the last dump broken at step {}", steps + 1);
                same_soon(&fixture, &before).with_context(what)?;
                // It writes some pages more.
                fixture.check().with_context(what)?;
                if outcome.status.success() {
                    break;
                }
                ensure!(steps < MOST_STEPS, "the dump has no last step");
                steps += 1;
            }
            ensure!(steps > 4, "only {steps} steps");
            end(&mut fixture, base.path(), (1, best()))
        },
    );
}

/// A keeper that dies while a round is made, a millisecond later each time.
#[test]
fn a_keeper_killed_during_a_round_costs_no_page() {
    as_root("a_keeper_killed_during_a_round_costs_no_page", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        let before = outside(&fixture)?;
        round(fixture.pid, base.path(), 0)?;
        let mut last = 0;
        for attempt in 1..12_u32 {
            let images = base.path().join(attempt.to_string());
            fs::create_dir(&images)?;
            let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
            command.args(["pre-dump", "--track-mem", "--tracker", best()]);
            command.args(["--prev-images-dir", &format!("../{last}")]);
            command.args(["--tree", &fixture.pid.to_string(), "--images-dir"]);
            let mut child = command.arg(&images).stderr(Stdio::null()).spawn()?;
            std::thread::sleep(Duration::from_millis(u64::from(attempt) * 3));
            let _ = process::kill_ours(&keepers(fixture.pid), Duration::from_secs(5));
            if child.wait()?.success() {
                last = attempt;
            }
            same_soon(&fixture, &before).with_context(|| format!("attempt {attempt}"))?;
            fixture.check()?;
        }
        end(&mut fixture, base.path(), (last, best()))
    });
}

/// Set in the copy of this test that runs in a mount namespace of its own.
const INSIDE: &str = "FLOE_TEST_IN_NAMESPACE";

#[test]
fn a_full_disk_in_a_round_or_the_last_dump_leaves_the_chain_good() {
    let name = "a_full_disk_in_a_round_or_the_last_dump_leaves_the_chain_good";
    if std::env::var_os(INSIDE).is_some() || !rustix::process::geteuid().is_root() {
        return as_root(name, without_room);
    }
    let own = std::env::current_exe().expect("our own path");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(own)
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{}", said.join("\n"));
}

/// The file system has room for the first round (some 8 MiB) and not for much more: what fits is found by
/// filling it.
fn without_room() -> anyhow::Result<()> {
    let mut fixture = Fixture::start("memory-counted")?;
    let place = tempfile::tempdir()?;
    let flags = rustix::mount::MountFlags::empty();
    let options = Some(c"size=24m");
    rustix::mount::mount("tmpfs", place.path(), "tmpfs", flags, options)?;
    let result = fill_up(&mut fixture, place.path());
    drop(fixture);
    rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::DETACH)?;
    result
}

fn fill_up(fixture: &mut Fixture, base: &Path) -> anyhow::Result<()> {
    let before = outside(fixture)?;
    let filler = base.join("filler");
    // In the first round, in a later one, in the last dump.
    for number in 0..2 {
        fill(&filler, 64 << 10)?;
        let outcome = try_round(fixture.pid, base, (number, best()), &[])?;
        refused(outcome.status.success(), &outcome.cause())?;
        same_soon(fixture, &before)?;
        fixture.check()?;
        ensure!(
            !base.join(format!("{number}/floe.json")).exists(),
            "a manifest"
        );
        fs::remove_file(&filler)?;
        round(fixture.pid, base, number)?;
        fixture.check()?;
    }
    fill(&filler, 64 << 10)?;
    fixture.set_images(base.join("last"));
    let options = ["--prev-images-dir", "../1", "--track-mem"];
    let outcome = fixture.try_dump(&floe(), &options, &[])?;
    refused(outcome.status.success(), &outcome.cause())?;
    same_soon(fixture, &before)?;
    fixture.check()?;
    fs::remove_file(&filler)?;
    end(fixture, base, (1, best()))
}

/// Fills the file system but for `left` bytes.
fn fill(filler: &Path, left: u64) -> anyhow::Result<()> {
    let place = filler.parent().context("a directory")?;
    let room = rustix::fs::statvfs(place)?;
    let free = room.f_bavail * room.f_frsize;
    let file = fs::File::create(filler)?;
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::empty(),
        0,
        free.saturating_sub(left).max(1),
    )?;
    Ok(())
}

fn refused(succeeded: bool, said: &str) -> anyhow::Result<()> {
    ensure!(!succeeded, "there was room");
    ensure!(said.contains("No space left"), "{said}");
    Ok(())
}

/// A restored program has its pid again, and is not the one whose memory the chain has.
#[test]
fn a_pid_that_came_again_is_another_program() {
    as_root("a_pid_that_came_again_is_another_program", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let base = tempfile::tempdir_in("/dev/shm")?;
        round(fixture.pid, base.path(), 0)?;
        let old = keepers(fixture.pid);
        fixture.set_images(base.path().join("elsewhere"));
        fixture.dump(&floe(), &[])?;
        fixture.restore(&floe(), &[])?;
        fixture.check()?;
        round(fixture.pid, base.path(), 1)?;
        let log = log_of(base.path(), 1)?;
        ensure!(best() == "content" || log.contains(WHOLE), "{log}");
        let kept = keepers(fixture.pid);
        ensure!(
            kept.iter().all(|keeper| !old.contains(keeper)),
            "an old keeper"
        );
        fixture.check()?;
        end(&mut fixture, base.path(), (1, best()))
    });
}

#[test]
fn memory_that_is_moved_by_whole_tables_is_found() {
    as_root("memory_that_is_moved_by_whole_tables_is_found", || {
        for tracker in floe().trackers()? {
            let mut fixture = Fixture::start("memory-moved")?;
            let base = tempfile::tempdir_in("/dev/shm")?;
            for number in 0..2 {
                let outcome = try_round(fixture.pid, base.path(), (number, tracker), &[])?;
                outcome.ok(&format!("round {number} by {tracker}"))?;
                fixture.check()?;
            }
            end(&mut fixture, base.path(), (1, tracker)).with_context(|| tracker.to_string())?;
        }
        Ok(())
    });
}

/// Huge pages of the file system for them, and memory that the kernel may make huge pages of.
#[test]
fn huge_pages_are_in_the_rounds() {
    as_root("huge_pages_are_in_the_rounds", || {
        for tracker in floe().trackers()? {
            for name in ["memory-counted-hugetlb", "memory-counted-huge"] {
                let mut fixture = match Fixture::start(name) {
                    Err(error) if error.is::<testkit::program::Missing>() => {
                        skips::skip(name, &error.to_string())?;
                        continue;
                    }
                    other => other?,
                };
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
fn memory_with_unseen_writers_is_copied_whole() {
    as_root("memory_with_unseen_writers_is_copied_whole", || {
        let tracks = ["uffd", "soft-dirty"];
        for name in ["aio-context", "io-uring-buffers", "own-userfaultfd"] {
            let started = Fixture::start(name);
            let mut fixture = match started {
                Err(error) if error.is::<testkit::program::Missing>() => {
                    skips::skip(name, &error.to_string())?;
                    continue;
                }
                other => other?,
            };
            let base = tempfile::tempdir_in("/dev/shm")?;
            let before = outside(&fixture)?;
            for number in 0..2 {
                round(fixture.pid, base.path(), number)?;
                same(&before, &outside(&fixture)?)?;
                fixture.check()?;
                let log = log_of(base.path(), number)?;
                let is_said = log.contains("all of it is copied");
                ensure!(is_said == tracks.contains(&best()), "{name}: {log}");
            }
            if name == "aio-context" {
                end(&mut fixture, base.path(), (1, best()))?;
                continue;
            }
            // No checkpoint can have it: said, and the program runs on.
            fixture.set_images(base.path().join("last"));
            let outcome = fixture.try_dump(&floe(), &["--prev-images-dir", "../1"], &[])?;
            if outcome.status.success() {
                bail!("{name} was dumped");
            }
            same_soon(&fixture, &before)?;
            fixture.check()?;
        }
        Ok(())
    });
}

#[test]
fn a_round_that_is_held_back_ends_with_its_caller() {
    let name = "a_round_that_is_held_back_ends_with_its_caller";
    skips::as_root(name, || {
        let mut fixture = Fixture::start("memory-large")?;
        let place = tempfile::tempdir()?;
        let mut caller = Command::new(env!("CARGO_BIN_EXE_floe"))
            .args([
                "dump",
                "--no-default-config",
                "--iterate",
                "--max-rate",
                "1M",
            ])
            .args(["-t", &fixture.pid.to_string(), "-D"])
            .arg(place.path())
            .spawn()?;
        let begun = place.path().join("generations/0/pages-1.img");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !begun.exists() {
            ensure!(Instant::now() < deadline, "no round has begun");
            std::thread::sleep(Duration::from_millis(2));
        }
        caller.kill()?;
        caller.wait()?;
        // It would take a minute, and the next dump waits for its end.
        let began = Instant::now();
        fixture.dump(&floe(), &["--leave-running"])?;
        ensure!(
            began.elapsed() < Duration::from_secs(20),
            "the round went on"
        );
        fixture.check()
    });
}
