//! Two commands about one tree at a time.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::Fixture;
use testkit::rounds::keepers;
use testkit::skips::as_root;

/// A command of Floe's whose output is read at the end.
fn start(directory: &Path, line: &str) -> anyhow::Result<Child> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.current_dir(directory).args(line.split_whitespace());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// How it ended, and what it said.
fn end(mut child: Child) -> anyhow::Result<(bool, String)> {
    let mut text = String::new();
    child
        .stdout
        .take()
        .context("piped")?
        .read_to_string(&mut text)?;
    child
        .stderr
        .take()
        .context("piped")?
        .read_to_string(&mut text)?;
    Ok((child.wait()?.success(), text))
}

/// A round that takes much longer than the test, once it has begun.
fn slow_round(fixture: &Fixture, directory: &Path) -> anyhow::Result<Child> {
    let line = format!(
        "pre-dump --track-mem --max-rate 1M -t {} -D slow -o pre-dump.log",
        fixture.pid
    );
    let round = start(directory, &line)?;
    let begun = directory.join("slow/pages-1.img");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !begun.exists() {
        ensure!(Instant::now() < deadline, "no round has begun");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(round)
}

#[test]
fn who_waits_for_another_dump_says_so_and_goes_on_after_it() {
    as_root(
        "who_waits_for_another_dump_says_so_and_goes_on_after_it",
        || {
            for log in ["", "-o dump.log"] {
                let mut fixture = Fixture::start("memory-large")?;
                let place = tempfile::tempdir()?;
                let mut first = slow_round(&fixture, place.path())?;
                let line = format!("dump -t {} -D second -R {log}", fixture.pid);
                let mut second = start(place.path(), &line)?;
                let mut said = [0; 200];
                let stderr = second.stderr.as_mut().context("piped")?;
                let length = stderr.read(&mut said)?;
                let said = String::from_utf8_lossy(&said[..length]).into_owned();
                let by = format!("process {} is dumping the tree of task", first.id());
                ensure!(said.contains(&by) && said.contains("20 s"), "{said}");
                first.kill()?;
                first.wait()?;
                let (done, said) = end(second)?;
                ensure!(done, "{said}");
                fixture.check()?;
            }
            Ok(())
        },
    );
}

#[test]
fn a_tree_that_stands_still_for_another_dump_names_that() {
    as_root(
        "a_tree_that_stands_still_for_another_dump_names_that",
        || {
            let mut fixture = Fixture::start("memory-counted")?;
            let place = tempfile::tempdir()?;
            let script = place.path().join("script.sh");
            let text = "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\n\
                    touch $CRTOOLS_IMAGE_DIR/stands; while ! [ -e $CRTOOLS_IMAGE_DIR/go ]; do sleep 0.01; done\n";
            std::fs::write(&script, text)?;
            std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
            let (pid, script) = (fixture.pid, script.display());
            let first = format!("dump -t {pid} -D first -R --action-script {script}");
            let first = start(place.path(), &first)?;
            let deadline = Instant::now() + Duration::from_secs(20);
            while !place.path().join("first/stands").exists() {
                ensure!(Instant::now() < deadline, "the first dump has not begun");
                std::thread::sleep(Duration::from_millis(2));
            }
            let (done, said) = end(start(place.path(), &format!("dump -t {pid} -D second"))?)?;
            let by = format!("is being dumped by process {} at this moment", first.id());
            ensure!(!done && said.contains(&by), "{said}");
            ensure!(!place.path().join("second").exists(), "a directory is left");
            std::fs::write(place.path().join("first/go"), "")?;
            let (done, said) = end(first)?;
            ensure!(done, "{said}");
            fixture.check()
        },
    );
}

#[test]
fn the_status_of_a_tree_that_is_being_dumped_comes_at_once() {
    as_root(
        "the_status_of_a_tree_that_is_being_dumped_comes_at_once",
        || {
            let fixture = Fixture::start("memory-large")?;
            let place = tempfile::tempdir()?;
            let mut first = slow_round(&fixture, place.path())?;
            let began = Instant::now();
            let (done, said) = end(start(
                place.path(),
                &format!("track status {}", fixture.pid),
            )?)?;
            ensure!(began.elapsed() < Duration::from_secs(4), "it has waited");
            let by = format!("process {} is dumping it", first.id());
            ensure!(done && said.contains(&by), "{said}");
            let stop = start(place.path(), &format!("track stop {}", fixture.pid))?;
            first.kill()?;
            first.wait()?;
            let (done, said) = end(stop)?;
            ensure!(done, "{said}");
            let deadline = Instant::now() + Duration::from_secs(5);
            while !keepers(fixture.pid).is_empty() {
                ensure!(Instant::now() < deadline, "a keeper is left");
                std::thread::yield_now();
            }
            Ok(())
        },
    );
}
