//! Dumps that are refused or fail: found early, and nothing is left of them.

mod directories;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::Fixture;
use testkit::rounds::keepers;
use testkit::skips::as_root;

fn floe(directory: &Path, line: &str) -> anyhow::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.current_dir(directory).arg("--no-default-config");
    Ok(command.args(line.split_whitespace()).output()?)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a dump that must fail with this exit code and these words.
fn refused(directory: &Path, line: &str, code: i32, words: &[&str]) -> anyhow::Result<String> {
    let output = floe(directory, line)?;
    let said = said(&output);
    ensure!(output.status.code() == Some(code), "{line}: {said}");
    for word in words {
        ensure!(said.contains(word), "{line}: no `{word}` in {said}");
    }
    Ok(said)
}

/// All names below a directory.
fn names(directory: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            let inside = self::names(&entry.path())?;
            names.extend(inside.into_iter().map(|inner| format!("{name}/{inner}")));
        }
        names.insert(name);
    }
    Ok(names)
}

/// A program, killed and reaped when dropped: a shell that takes a lock when a file `go` appears.
struct Locker(Child);

impl Locker {
    fn start(directory: &Path) -> anyhow::Result<Self> {
        let script = "while ! [ -e go ]; do sleep 0.01; done; exec 9>lock; flock 9; touch locked; \
                      while :; do sleep 0.1; done";
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script]).current_dir(directory);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(Stdio::null()).spawn()?;
        Ok(Locker(child))
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the keeper of a tree to end.
fn no_keeper(pid: i32) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !keepers(pid).is_empty() {
        ensure!(Instant::now() < deadline, "a keeper is left");
        std::thread::yield_now();
    }
    Ok(())
}

/// A script for `--action-script`.
fn script(directory: &Path, text: &str) -> anyhow::Result<String> {
    let path = directory.join("script.sh");
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path.display().to_string())
}

#[test]
fn a_dump_in_rounds_is_refused_before_the_first_and_leaves_nothing() {
    as_root(
        "a_dump_in_rounds_is_refused_before_the_first_and_leaves_nothing",
        || {
            for (name, remedy, allowed) in [
                ("locks", "--file-locks", "--file-locks"),
                ("tcp-established", "--tcp-established", "--tcp-established"),
            ] {
                let mut fixture = Fixture::start(name)?;
                let place = tempfile::tempdir()?;
                fs::create_dir(place.path().join("images"))?;
                let line = format!("dump -t {} -D images --iterate", fixture.pid);
                let said = refused(place.path(), &line, 3, &["Refused", remedy])?;
                ensure!(!said.contains("round 0"), "a round was made: {said}");
                ensure!(names(&place.path().join("images"))?.is_empty(), "{name}");
                no_keeper(fixture.pid)?;
                let line = format!("dump -t {} -D made --iterate", fixture.pid);
                refused(place.path(), &line, 3, &[])?;
                ensure!(!place.path().join("made").exists(), "{name}");
                fixture.check().context(name)?;
                let line = format!("dump -t {} -D images --iterate -R {allowed}", fixture.pid);
                let output = floe(place.path(), &line)?;
                ensure!(output.status.success(), "{name}: {}", self::said(&output));
            }
            Ok(())
        },
    );
}

#[test]
fn what_comes_into_the_way_during_the_rounds_is_refused_at_the_end_and_leaves_nothing() {
    as_root(
        "what_comes_into_the_way_during_the_rounds_is_refused_at_the_end_and_leaves_nothing",
        || {
            let place = tempfile::tempdir()?;
            let locker = Locker::start(place.path())?;
            let root = place.path().display();
            let text = format!(
                "[ -e {root}/first ] || {{ touch {root}/first; exit 0; }}\n\
                 touch {root}/go; while ! [ -e {root}/locked ]; do sleep 0.01; done"
            );
            let script = script(place.path(), &text)?;
            fs::create_dir(place.path().join("images"))?;
            let pid = locker.pid();
            let line = format!("dump -t {pid} -D images --iterate=2 --action-script {script}");
            refused(place.path(), &line, 3, &["round 1", "--file-locks"])?;
            ensure!(names(&place.path().join("images"))?.is_empty(), "left");
            no_keeper(pid)?;
            Ok(())
        },
    );
}

#[test]
fn a_dump_that_fails_at_the_end_leaves_its_log_only() {
    as_root("a_dump_that_fails_at_the_end_leaves_its_log_only", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let script = script(place.path(), "[ $CRTOOLS_SCRIPT_ACTION != post-dump ]")?;
        let images = place.path().join("images");
        fs::create_dir(&images)?;
        for options in ["", "--iterate=2", "-R", "--iterate=1 --archive ../a"] {
            let line = format!(
                "dump -t {} -D images -o dump.log --action-script {script} {options}",
                fixture.pid
            );
            refused(place.path(), &line, 1, &["post-dump"])?;
            let left = names(&images)?;
            ensure!(left.iter().eq(["dump.log"]), "`{options}` leaves {left:?}");
            no_keeper(fixture.pid)?;
        }
        fixture.check()
    });
}

#[test]
fn an_engine_that_is_killed_in_its_rounds_leaves_none_of_them() {
    as_root(
        "an_engine_that_is_killed_in_its_rounds_leaves_none_of_them",
        || {
            let mut fixture = Fixture::start("memory-counted")?;
            let place = tempfile::tempdir()?;
            fs::create_dir(place.path().join("images"))?;
            for options in ["", "--archive file.tar.zst"] {
                for step in 1..100 {
                    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
                    command.args(["dump", "--no-default-config", "-R", "--iterate=2"]);
                    command.args(["-D", "images", "-t", &fixture.pid.to_string()]);
                    command
                        .args(options.split_whitespace())
                        .current_dir(place.path());
                    command.env("FLOE_FAULT", format!("step:{step}"));
                    let output = command.output()?;
                    if output.status.success() {
                        ensure!(step > 10, "only {step} steps");
                        break;
                    }
                    ensure!(
                        !said(&output).contains("waiting for its end"),
                        "{}",
                        said(&output)
                    );
                    let left = names(&place.path().join("images"))?;
                    let rounds = left.iter().any(|name| name.contains("generations"));
                    let whole = left.contains("floe.json");
                    ensure!(rounds == whole, "step {step} `{options}`: {left:?}");
                    if options.is_empty() && whole {
                        break;
                    }
                    ensure!(whole || !left.contains("parent"), "a link is left");
                    no_keeper(fixture.pid).with_context(|| format!("step {step} `{options}`"))?;
                    if !options.is_empty() {
                        ensure!(left.is_empty(), "step {step}: {left:?}");
                        ensure!(!place.path().join("file.tar.zst.part").exists(), "{step}");
                    }
                    fixture.check()?;
                }
                for entry in fs::read_dir(place.path().join("images"))? {
                    let path = entry?.path();
                    match path.is_dir() && !path.is_symlink() {
                        true => fs::remove_dir_all(path)?,
                        false => fs::remove_file(path)?,
                    }
                }
                let stop = format!("track stop {}", fixture.pid);
                ensure!(floe_own(place.path(), &stop)?.status.success(), "{stop}");
            }
            Ok(())
        },
    );
}

#[test]
fn a_keeper_and_rounds_from_before_outlive_a_failure() {
    as_root("a_keeper_and_rounds_from_before_outlive_a_failure", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let pid = fixture.pid;
        let line = format!("dump -t {pid} -D images -R --track-mem --iterate=2");
        let output = floe(place.path(), &line)?;
        ensure!(output.status.success(), "{}", said(&output));
        let before = names(&place.path().join("images/generations"))?;
        let kept = keepers(pid);
        ensure!(kept.len() == 1, "keepers: {kept:?}");
        let script = script(place.path(), "[ $CRTOOLS_SCRIPT_ACTION != post-dump ]")?;
        let line = format!("dump -t {pid} -D images --iterate=2 --action-script {script}");
        refused(place.path(), &line, 1, &["post-dump"])?;
        ensure!(names(&place.path().join("images/generations"))? == before);
        ensure!(keepers(pid) == kept, "the keeper from before has ended");
        fixture.check()?;
        // A whole one takes their place.
        let line = format!("dump -t {pid} -D images -R --iterate=2");
        let output = floe(place.path(), &line)?;
        ensure!(output.status.success(), "{}", said(&output));
        let now = names(&place.path().join("images/generations"))?;
        ensure!(now.is_disjoint(&before), "{before:?} are left in {now:?}");
        ensure!(keepers(pid) == kept, "the keeper from before has ended");
        let stop = format!("track stop {pid}");
        ensure!(floe_own(place.path(), &stop)?.status.success(), "{stop}");
        let output = floe(place.path(), &line)?;
        ensure!(output.status.success(), "{}", said(&output));
        let left = keepers(pid);
        ensure!(left.is_empty(), "{left:?}, which nobody asked for");
        fixture.check()
    });
}

/// CLONE_FILES, CLONE_FS and CLONE_NEWNET.
const APART: &str = "import ctypes, os, threading, time
def apart():
    for flag in (0x400, 0x200, 0x40000000): assert ctypes.CDLL(None).unshare(flag) == 0
    os.chdir('/usr')
    open(READY, 'w')
    time.sleep(1000)
READY = os.path.abspath('ready')
threading.Thread(target=apart).start()
time.sleep(1000)";

#[test]
fn what_a_thread_has_for_itself_is_refused() {
    as_root("what_a_thread_has_for_itself_is_refused", || {
        let place = tempfile::tempdir()?;
        let mut command = Command::new("setsid");
        command
            .args(["python3", "-c", APART])
            .current_dir(place.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let program = Locker(command.stderr(Stdio::null()).spawn()?);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !place.path().join("ready").exists() {
            ensure!(Instant::now() < deadline, "the program does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        let line = format!("dump -t {}", program.pid());
        let wanted = [
            "with a net namespace of its own",
            "with a table of descriptors of its own",
            "with a working directory of its own",
        ];
        refused(place.path(), &line, 3, &wanted)?;
        Ok(())
    });
}

#[test]
fn an_archive_that_nobody_would_have_is_refused() {
    as_root("an_archive_that_nobody_would_have_is_refused", || {
        let mut fixture = Fixture::start("memory-counted")?;
        for options in ["", "--iterate"] {
            let line = format!(
                "exec {} dump -t {} --archive - {options} >&-",
                env!("CARGO_BIN_EXE_floe"),
                fixture.pid
            );
            let output = Command::new("bash").args(["-c", &line]).output()?;
            ensure!(output.status.code() == Some(2), "{}", said(&output));
            ensure!(
                said(&output).contains("which is closed"),
                "{}",
                said(&output)
            );
        }
        fixture.check()
    });
}

/// Whoever waits for the command thinks it undone, so it must be: at whatever moment the signal comes.
#[test]
fn an_archive_of_a_dump_that_was_called_off_is_not_kept() {
    let name = "an_archive_of_a_dump_that_was_called_off_is_not_kept";
    as_root(name, || {
        for delay in [20, 60, 100, 140, 180, 240, 320] {
            let mut fixture = Fixture::start("memory-large")?;
            let place = tempfile::tempdir()?;
            let (archive, images) = (place.path().join("archive"), place.path().join("images"));
            fs::write(&archive, "an earlier one")?;
            fs::create_dir(&images)?;
            let line = format!(
                "dump -t {} -D images --iterate=2 --archive archive",
                fixture.pid
            );
            let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
            command.current_dir(place.path()).args(line.split(' '));
            let mut dump = command.stderr(Stdio::null()).spawn()?;
            std::thread::sleep(Duration::from_millis(delay));
            let pid = rustix::process::Pid::from_child(&dump);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
            let ended = dump.wait()?;
            // The engine takes a moment longer.
            let deadline = Instant::now() + Duration::from_secs(20);
            while !names(&images)?.is_empty() {
                ensure!(
                    Instant::now() < deadline,
                    "after {delay} ms: {:?}",
                    names(&images)?
                );
                std::thread::sleep(Duration::from_millis(5));
            }
            if ended.success() {
                continue; // It was faster.
            }
            let left = fs::read(&archive)?;
            let state =
                fs::read_to_string(format!("/proc/{}/stat", fixture.pid)).unwrap_or_default();
            if !state.is_empty() && !state.contains(") Z ") {
                ensure!(
                    left == b"an earlier one",
                    "after {delay} ms: the program runs, and has an archive"
                );
                fixture.check()?;
            } else {
                ensure!(
                    left != b"an earlier one",
                    "after {delay} ms: neither is there"
                );
            }
        }
        Ok(())
    });
}

#[test]
fn statistics_that_cannot_be_written_are_no_failure() {
    as_root("statistics_that_cannot_be_written_are_no_failure", || {
        let mut fixture = Fixture::start("memory-counted")?;
        let place = tempfile::tempdir()?;
        let line = format!("dump -t {} -D images -W /proc", fixture.pid);
        let output = floe(place.path(), &line)?;
        ensure!(output.status.success(), "{}", said(&output));
        ensure!(
            said(&output).contains("the statistics cannot be written"),
            "{}",
            said(&output)
        );
        fixture.kill()?;
        let output = floe(place.path(), "restore -d -D images -W /proc")?;
        ensure!(output.status.success(), "{}", said(&output));
        fixture.check()
    });
}

#[test]
fn a_first_round_that_fails_leaves_neither_images_nor_a_keeper() {
    as_root(
        "a_first_round_that_fails_leaves_neither_images_nor_a_keeper",
        || {
            let fixture = Fixture::start("memory-large")?;
            let place = tempfile::tempdir()?;
            let images = place.path().join("images");
            fs::create_dir(&images)?;
            // The program has more memory than may be written.
            let line = format!(
                "ulimit -f 64; trap '' XFSZ; exec {} pre-dump --track-mem -t {} -D {} -o pre-dump.log",
                env!("CARGO_BIN_EXE_floe"),
                fixture.pid,
                images.display()
            );
            let output = Command::new("bash").args(["-c", &line]).output()?;
            ensure!(!output.status.success(), "it had enough room");
            let left = names(&images)?;
            ensure!(left.iter().eq(["pre-dump.log"]), "{left:?} are left");
            no_keeper(fixture.pid)
        },
    );
}

#[test]
fn a_squashed_dump_in_rounds_is_one_checkpoint_without_its_rounds() {
    as_root(
        "a_squashed_dump_in_rounds_is_one_checkpoint_without_its_rounds",
        || {
            let mut fixture = Fixture::start("memory-counted")?;
            let place = tempfile::tempdir()?;
            let line = format!("dump -t {} -D images --iterate=2 -o dump.log", fixture.pid);
            let output = floe(place.path(), &line)?;
            ensure!(output.status.success(), "{}", said(&output));
            let output = floe_own(place.path(), "squash images")?;
            ensure!(output.status.success(), "{}", said(&output));
            let left = names(&place.path().join("images"))?;
            ensure!(
                left.contains("dump.log") && !left.contains("generations"),
                "{left:?}"
            );
            fixture.kill()?;
            let restored = floe(place.path(), "restore -D images -d")?;
            ensure!(restored.status.success(), "{}", said(&restored));
            fixture.check()
        },
    );
}

#[test]
fn a_refusal_explains_each_thing_that_is_in_the_way() {
    as_root("a_refusal_explains_each_thing_that_is_in_the_way", || {
        let place = tempfile::tempdir()?;
        fs::write(place.path().join("go"), "")?;
        let script = "exec 9>lock; flock 9; exec 8>big; rm big; head -c 3000000 /dev/urandom >&8; \
                      touch locked; while :; do sleep 0.1; done";
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", script]).current_dir(place.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let program = Locker(command.stderr(Stdio::null()).spawn()?);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !place.path().join("locked").exists() {
            ensure!(Instant::now() < deadline, "the program does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        let line = format!("dump -t {} -D images", program.pid());
        let said = refused(
            place.path(),
            &line,
            3,
            &[
                "try: --file-locks",
                "try: --ghost-limit",
                "big, deleted, with",
            ],
        )?;
        let remedies = said.matches("what to do:").count();
        ensure!(remedies == 2, "{remedies} remedies: {said}");
        Ok(())
    });
}

#[test]
fn a_pid_that_cannot_be_dumped_says_why_by_its_exit_code() {
    as_root(
        "a_pid_that_cannot_be_dumped_says_why_by_its_exit_code",
        || {
            let place = tempfile::tempdir()?;
            refused(
                place.path(),
                "dump -t 4194303",
                2,
                &["There is no task", "pgrep"],
            )?;
            // Threads of the kernel descend from this one, if it can be seen.
            if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
                refused(place.path(), "dump -t 2", 3, &["is a thread of the kernel"])?;
            }
            let own = format!("dump -t {}", std::process::id());
            let said = refused(
                place.path(),
                &own,
                2,
                &["is this very program", "setsid -f floe"],
            )?;
            ensure!(!said.contains("--help"), "{said}");
            Ok(())
        },
    );
}

#[test]
fn an_ordinary_user_is_told_what_it_takes() {
    as_root("an_ordinary_user_is_told_what_it_takes", || {
        let place = tempfile::tempdir()?;
        let binary = place.path().join("floe");
        fs::copy(env!("CARGO_BIN_EXE_floe"), &binary)?;
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777))?;
        for (words, word) in [
            (
                &["dump", "--tree", "1", "--images-dir", "images"][..],
                "may not be traced",
            ),
            (&["demo"], "sudo floe demo"),
        ] {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
            command.arg(&binary).args(words).current_dir(place.path());
            let output = command.output()?;
            let said = said(&output);
            ensure!(output.status.code() == Some(4), "{words:?}: {said}");
            ensure!(said.contains(word), "{words:?}: {said}");
        }
        Ok(())
    });
}

/// A command of Floe's own, whose name stands first.
fn floe_own(directory: &Path, line: &str) -> anyhow::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    let command = command.current_dir(directory);
    Ok(command.args(line.split_whitespace()).output()?)
}
