//! Dumps into directories that hold something already: an earlier checkpoint, what a killed dump has left.

use std::fs;
use std::process::Command;

use anyhow::ensure;
use testkit::Fixture;
use testkit::skips::as_root;

use super::{floe, floe_own, names, no_keeper, refused, said, script};

#[test]
fn what_killed_dumps_have_left_goes_with_the_next() {
    as_root("what_killed_dumps_have_left_goes_with_the_next", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let images = place.path().join("images");
        let (rounds, archive) = (images.join("generations"), images.join(".floe-archive-7"));
        for directory in [rounds.join("3"), archive.clone()] {
            fs::create_dir_all(&directory)?;
            fs::write(directory.join("pages-1.img"), "of a dump that was killed")?;
        }
        fs::write(rounds.join("notes"), "of the user")?;
        let pid = fixture.pid;
        // Somebody writes to it still.
        let lock = floe_dump::DirLock::take(&archive)?;
        let line = format!("dump -t {pid} -D images -R --archive archive");
        ensure!(floe(place.path(), &line)?.status.success(), "{line}");
        ensure!(archive.exists(), "it is in use");
        drop(lock);
        ensure!(floe(place.path(), &line)?.status.success(), "{line}");
        ensure!(!archive.exists(), "it is left");
        let lock = floe_dump::DirLock::take(&rounds)?;
        let line = format!("dump -t {pid} -D images -R");
        ensure!(floe(place.path(), &line)?.status.success(), "{line}");
        ensure!(rounds.join("3").exists(), "it is in use");
        drop(lock);
        ensure!(floe(place.path(), &line)?.status.success(), "{line}");
        ensure!(
            names(&rounds)?.iter().eq(["notes"]),
            "{:?}",
            names(&rounds)?
        );
        fixture.check()
    });
}

#[test]
fn a_directory_that_another_dump_writes_to_is_refused() {
    as_root("a_directory_that_another_dump_writes_to_is_refused", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let images = place.path().join("images");
        fs::create_dir(&images)?;
        fs::write(images.join("inventory.img"), "of the other")?;
        let _other = floe_dump::DirLock::take(&images)?;
        for command in ["dump", "pre-dump --track-mem"] {
            let line = format!("{command} -t {} -D images", fixture.pid);
            refused(
                place.path(),
                &line,
                1,
                &["is being written by another dump"],
            )?;
        }
        ensure!(
            names(&images)?.iter().eq(["inventory.img"]),
            "{:?}",
            names(&images)?
        );
        no_keeper(fixture.pid)?;
        fixture.check()
    });
}

#[test]
fn a_dump_that_fails_at_any_step_leaves_the_checkpoint_that_was_there() {
    let name = "a_dump_that_fails_at_any_step_leaves_the_checkpoint_that_was_there";
    as_root(name, || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let line = format!("dump -t {} -D images -R", fixture.pid);
        let output = floe(place.path(), &line)?;
        ensure!(output.status.success(), "{}", said(&output));
        let manifest = place.path().join("images/floe.json");
        let first = fs::read(&manifest)?;
        let before = names(&place.path().join("images"))?;
        // By itself, and by the end of its engine.
        let script = script(place.path(), "[ $CRTOOLS_SCRIPT_ACTION != post-dump ]")?;
        refused(
            place.path(),
            &format!("{line} --action-script {script}"),
            1,
            &["post-dump"],
        )?;
        for step in 1.. {
            ensure!(
                fs::read(&manifest)? == first,
                "step {step}: another one is there"
            );
            let now = names(&place.path().join("images"))?;
            ensure!(now == before, "step {step}: {before:?} became {now:?}");
            let mut killed = Command::new(env!("CARGO_BIN_EXE_floe"));
            killed.current_dir(place.path()).args(line.split(' '));
            if killed
                .env("FLOE_FAULT", format!("step:{step}"))
                .output()?
                .status
                .success()
            {
                break;
            }
            // The new one may be whole already.
            if fs::read(&manifest)? != first {
                break;
            }
        }
        let output = floe_own(place.path(), "verify images --no-machine")?;
        ensure!(output.status.success(), "{}", said(&output));
        fixture.check()
    });
}

#[test]
fn a_refused_dump_spares_the_checkpoint_that_it_would_replace() {
    as_root(
        "a_refused_dump_spares_the_checkpoint_that_it_would_replace",
        || {
            let mut fixture = Fixture::start("locks")?;
            let place = tempfile::tempdir()?;
            let pid = fixture.pid;
            let line = format!("dump -t {pid} -D images -R --file-locks");
            let output = floe(place.path(), &line)?;
            ensure!(output.status.success(), "{}", said(&output));
            for options in ["", "--iterate"] {
                let line = format!("dump -t {pid} -D images {options}");
                refused(place.path(), &line, 3, &["--file-locks"])?;
            }
            fixture.check()?;
            fixture.kill()?;
            let restored = floe(place.path(), "restore -D images -d --file-locks")?;
            ensure!(restored.status.success(), "{}", said(&restored));
            fixture.check()
        },
    );
}

#[test]
fn a_directory_without_a_generation_is_no_parent() {
    as_root("a_directory_without_a_generation_is_no_parent", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        fs::create_dir(place.path().join("empty"))?;
        let line = format!(
            "dump -t {} -D images --prev-images-dir ../empty",
            fixture.pid
        );
        refused(place.path(), &line, 5, &["holds no generation to build on"])?;
        fixture.check()
    });
}
