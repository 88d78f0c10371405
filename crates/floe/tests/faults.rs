//! The engine is killed at every step, and the images directory has no room: the program runs on
//! as it was, or nothing of a restore is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{Engine, Fixture, process, skips};

/// Steps after which a loop over all of them is taken for endless.
const MOST_STEPS: u32 = 3000;

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// What a dump may not change: mappings, tracers, masks, and states of every thread.
fn outside(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let mut facts = Vec::new();
    for pid in fixture.family() {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        facts.extend(maps.lines().map(|line| format!("{pid}: {line}")));
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = thread?.path().join("status");
            let status = fs::read_to_string(&path)?;
            let fields = ["TracerPid", "SigCgt", "SigPnd", "ShdPnd", "Seccomp:"];
            let lines = status
                .lines()
                .filter(|line| fields.iter().any(|field| line.starts_with(field)));
            facts.extend(lines.map(|line| format!("{}: {line}", path.display())));
            let state = status.lines().find(|line| line.starts_with("State"));
            let stopped = state.is_some_and(|line| line.contains('T') || line.contains('t'));
            facts.push(format!("{}: stopped {stopped}", path.display()));
        }
    }
    facts.sort();
    Ok(facts)
}

fn rules() -> String {
    let output = Command::new("nft").args(["list", "tables"]).output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into(),
    )
}

/// Mounts that a restore could have made; those of control groups are others' on this machine.
fn mounts() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let own = mounts.lines().filter(|line| !line.contains(" cgroup"));
    own.map(str::to_owned).collect()
}

fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Waits until the facts are as before: a killed tracer lets go a moment after its end.
fn same_soon(fixture: &Fixture, before: &[String]) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = outside(fixture)?;
        if now == before {
            return Ok(());
        }
        if Instant::now() > deadline {
            let new: Vec<_> = now.iter().filter(|fact| !before.contains(fact)).collect();
            let gone: Vec<_> = before.iter().filter(|fact| !now.contains(fact)).collect();
            bail!("new: {new:?}; gone: {gone:?}");
        }
        std::thread::yield_now();
    }
}

/// Kills the dump at each step; answers how many steps there are.
fn break_dumps(name: &str) -> anyhow::Result<u32> {
    let mut fixture = Fixture::start(name)?;
    fixture.check()?;
    let (before, rules_before) = (outside(&fixture)?, rules());
    fixture
        .dump(&floe(), &["--leave-running"])
        .context("without a fault")?;
    for step in 1..MOST_STEPS {
        let fault = format!("step:{step}");
        let outcome = fixture.try_dump(&floe(), &["--leave-running"], &[("FLOE_FAULT", &fault)])?;
        let broken = || format!("dump of {name} broken at step {step}");
        same_soon(&fixture, &before).with_context(broken)?;
        ensure!(rules() == rules_before, "{}: rules {}", broken(), rules());
        fixture.check().with_context(broken)?;
        if outcome.status.success() {
            return Ok(step - 1);
        }
    }
    bail!("the dump of {name} has no last step")
}

/// Whether the whole tree is there, answers, and has no tracer.
fn runs_whole(fixture: &mut Fixture, pids: &[i32]) -> bool {
    let mut now = fixture.family();
    let mut all = pids.to_vec();
    now.sort_unstable();
    all.sort_unstable();
    let is_free = |pid: &i32| process::status_field(*pid, "TracerPid").as_deref() == Some("0");
    now == all && now.iter().all(is_free) && fixture.check().is_ok()
}

/// Kills the restore at each step; answers how many steps there are.
fn break_restores(name: &str) -> anyhow::Result<u32> {
    let mut fixture = Fixture::start(name)?;
    let pids = fixture.family();
    fixture.dump(&floe(), &[])?;
    let (rules_before, mounts_before) = (rules(), mounts());
    let files_before = names(&fixture.home())?;
    for step in 1..MOST_STEPS {
        let fault = format!("step:{step}");
        let outcome = fixture.try_restore(&floe(), &[], &[("FLOE_FAULT", &fault)])?;
        if outcome.status.success() {
            fixture
                .check()
                .context("after the restore that was let be")?;
            return Ok(step - 1);
        }
        let broken = || format!("restore of {name} broken at step {step}");
        if runs_whole(&mut fixture, &pids) {
            // The last steps let go of a tree that is whole: it runs on without us.
            return Ok(step);
        }
        process::wait_for_ends(&pids, Duration::from_secs(5)).with_context(broken)?;
        ensure!(
            names(&fixture.home())? == files_before,
            "{}: files",
            broken()
        );
        ensure!(rules() == rules_before, "{}: rules {}", broken(), rules());
        let mounts = mounts();
        let new: Vec<_> = mounts.difference(&mounts_before).collect();
        ensure!(new.is_empty(), "{}: mounts {new:?}", broken());
    }
    bail!("the restore of {name} has no last step")
}

const PROGRAMS: [&str; 7] = [
    "plain",
    "tree",
    "threads-few",
    "register-count",
    "files-deleted",
    "unix-stream",
    "tcp-established",
];

/// The tests look for rules that were left, which they would find of each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// All programs are tried, so that one that fails hides no other.
fn over_all(break_all: fn(&str) -> anyhow::Result<u32>) {
    let _turn = ONE_AT_A_TIME.lock();
    let mut wrong = Vec::new();
    for name in PROGRAMS {
        match break_all(name) {
            Ok(steps) if steps > 3 => println!("{name}: {steps} steps"),
            Ok(steps) => wrong.push(format!("{name}: only {steps} steps")),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn programs_run_on_after_a_dump_that_was_killed_at_any_step() {
    if !skips::is_root("programs_run_on_after_a_dump_that_was_killed_at_any_step") {
        return;
    }
    over_all(break_dumps);
}

#[test]
fn nothing_is_left_of_a_restore_that_was_killed_at_any_step() {
    if !skips::is_root("nothing_is_left_of_a_restore_that_was_killed_at_any_step") {
        return;
    }
    over_all(break_restores);
}

/// Set in the copy of this test that runs in a mount namespace of its own.
const INSIDE: &str = "FLOE_TEST_IN_NAMESPACE";

/// The dump's images go to a file system of 256 KiB, which only this test sees.
#[test]
fn a_full_images_directory_is_said_and_the_program_runs_on() {
    let name = "a_full_images_directory_is_said_and_the_program_runs_on";
    if !skips::is_root(name) {
        return;
    }
    if std::env::var_os(INSIDE).is_some() {
        return dump_without_room().unwrap_or_else(|error| panic!("{error:#}"));
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

fn dump_without_room() -> anyhow::Result<()> {
    let mut fixture = Fixture::start("memory-cow")?;
    let before = outside(&fixture)?;
    let place = tempfile::tempdir()?;
    let options = Some(c"size=256k");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", place.path(), "tmpfs", flags, options)?;
    let outcome = floe().dump(fixture.pid, place.path(), &[])?;
    let said = outcome.cause();
    ensure!(!outcome.status.success(), "the dump succeeded");
    ensure!(said.contains("No space left"), "{said}");
    same_soon(&fixture, &before)?;
    fixture.check()?;
    rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::DETACH)?;
    Ok(())
}
