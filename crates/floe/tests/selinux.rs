//! Programs under SELinux, which enforces the policy of `cargo xtask boot selinux`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::{Engine, Fixture, process, skips};

/// The start of all contexts of tasks.
const ROLE: &str = "system_u:system_r:";

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Runs a test, or says that it is skipped where our policy is not in force.
fn under_selinux(name: &str, test: impl FnOnce() -> anyhow::Result<()>) {
    if !skips::is_root(name) {
        return;
    }
    let is_ours = Path::new("/policy/selinux").exists();
    let enforces = fs::read("/sys/fs/selinux/enforce").is_ok_and(|text| text == b"1");
    let done = match is_ours && enforces {
        true => test(),
        false => Err(skips::missing(
            "no SELinux with the policy of `cargo xtask boot`",
        )),
    };
    skips::or_skip(name, done).unwrap_or_else(|error| panic!("{error:#}"));
}

fn context(short: &str) -> String {
    format!("{ROLE}{short}")
}

/// Starts something under a context.
fn under<T: Send + 'static>(
    context: &str,
    start: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let context = context.to_string();
    // What a thread says of the next `exec` holds for the children that it forks.
    let start = move || {
        fs::write("/proc/thread-self/attr/exec", context).context("choosing a context")?;
        start()
    };
    std::thread::spawn(start).join().expect("no panic")
}

fn confined(program: &'static str, short: &str) -> anyhow::Result<Fixture> {
    under(&context(short), move || Fixture::start(program))
}

fn attribute(pid: impl std::fmt::Display, name: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/attr/{name}"))?;
    Ok(text.trim_end_matches(['\0', '\n']).to_string())
}

/// The contexts of all threads and sockets of the tree.
fn labels(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let mut labels = Vec::new();
    for pid in fixture.family() {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let tid = thread?.file_name().into_string().unwrap_or_default();
            labels.push(attribute(format_args!("{pid}/task/{tid}"), "current")?);
        }
        labels.extend(sockets(pid)?);
    }
    Ok(labels)
}

fn sockets(pid: i32) -> anyhow::Result<Vec<String>> {
    let mut labels = Vec::new();
    let mut fds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))?.collect::<Result<_, _>>()?;
    fds.sort_by_key(|fd| fd.file_name());
    for fd in fds {
        // It may be the one by which the program answers.
        let target = fs::read_link(fd.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("socket:") {
            let mut text = [0; 256];
            let length = rustix::fs::getxattr(fd.path(), "security.selinux", &mut text[..])?;
            let text = String::from_utf8_lossy(&text[..length]);
            labels.push(format!("socket {}", text.trim_end_matches('\0')));
        }
    }
    Ok(labels)
}

/// Dumps and restores, with these options for the restore.
fn cycle(fixture: &mut Fixture, options: &[&str]) -> anyhow::Result<()> {
    fixture.check().context("before the dump")?;
    fixture
        .dump(&floe(), &["--leave-running"])
        .context("a dump that leaves it running")?;
    fixture
        .check()
        .context("after a dump that left it running")?;
    fixture.dump(&floe(), &[])?;
    fixture.restore(&floe(), options)?;
    fixture.check().context("after the restore")
}

/// Asserts that a program has its labels again.
fn keeps(program: &'static str, short: &str) -> anyhow::Result<()> {
    let mut fixture = confined(program, short)?;
    let before = labels(&fixture)?;
    ensure!(
        before.iter().all(|label| label.contains(short)),
        "{program} has {before:?}"
    );
    cycle(&mut fixture, &[]).with_context(|| format!("{program} under {short}"))?;
    let after = labels(&fixture)?;
    ensure!(after == before, "{program} had {before:?}, has {after:?}");
    Ok(())
}

#[test]
fn threads_children_and_users_keep_their_context() {
    under_selinux("selinux-keeps", || {
        for program in ["identity", "threads", "tree", "thread-credentials"] {
            keeps(program, "open_t:s0:c1,c2")?;
        }
        keeps("threads", "narrow_t:s0")
    });
}

#[test]
fn a_context_may_forbid_what_a_restore_does() {
    under_selinux("selinux-narrow", || keeps("identity", "narrow_t:s0"));
}

#[test]
fn a_context_without_executable_memory_is_refused_and_the_program_runs_on() {
    under_selinux("selinux-execmem", || {
        let mut fixture = confined("identity", "still_t:s0")?;
        let outcome = fixture.try_dump(&floe(), &[], &[])?;
        let cause = outcome.cause();
        ensure!(
            outcome.status.code() == Some(3) && cause.contains("execmem"),
            "{cause}"
        );
        fixture.check()
    });
}

#[test]
fn a_context_that_floe_may_not_change_into_is_refused_before_anything_is_made() {
    under_selinux("selinux-change", || {
        let mut fixture = confined("identity", "open_t:s0")?;
        fixture.dump(&floe(), &[])?;
        let foreign = context("foreign_t:s0");
        let option = format!("selinux:{foreign}");
        let outcome = fixture.try_restore(&floe(), &["--lsm-profile", &option], &[])?;
        let cause = outcome.cause();
        ensure!(
            outcome.status.code() == Some(3) && cause.contains("may not change"),
            "{cause}"
        );
        ensure!(!process::exists(fixture.pid), "a task was made");
        Ok(())
    });
}

#[test]
fn sockets_keep_their_context() {
    under_selinux("selinux-sockets", || {
        for program in ["tcp-established", "unix-stream", "udp"] {
            keeps(program, "open_t:s0")?;
        }
        cycle(&mut confined("selinux-sockets", "open_t:s0")?, &[])
    });
}

#[test]
fn contexts_of_mounts_are_kept_or_replaced() {
    under_selinux("selinux-mounts", || {
        // Not in memory, of which the tree gets a copy: there it would answer nobody.
        let start = || Fixture::start_in("selinux-mount", Path::new("/var/tmp"));
        let mut fixture = under(&context("open_t:s0"), start)?;
        cycle(&mut fixture, &[])?;
        fixture.dump(&floe(), &[])?;
        let chosen = "system_u:object_r:file_t:s0:c0,c2";
        fixture.restore(&floe(), &["--lsm-mount-context", chosen])?;
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", fixture.pid))?;
        let has_it = mounts.contains(&format!("context=\"{chosen}\""));
        ensure!(has_it, "{mounts}");
        Ok(())
    });
}

#[test]
fn a_chosen_context_replaces_the_saved_one() {
    under_selinux("selinux-chosen", || {
        let chosen = context("other_t:s0:c0");
        let option = format!("selinux:{chosen}");
        for program in ["threads", "tcp-established"] {
            let mut fixture = confined(program, "open_t:s0:c1,c2")?;
            cycle(&mut fixture, &["--lsm-profile", &option])?;
            let after = labels(&fixture)?;
            ensure!(
                after.iter().all(|label| label.ends_with(&chosen)),
                "{program}: {after:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn a_context_that_the_policy_does_not_know_is_refused_before_anything_is_made() {
    under_selinux("selinux-unknown", || {
        let mut fixture = confined("identity", "open_t:s0")?;
        fixture.dump(&floe(), &[])?;
        let nobody = context("nobody_t:s0");
        let option = format!("selinux:{nobody}");
        let outcome = fixture.try_restore(&floe(), &["--lsm-profile", &option], &[])?;
        let cause = outcome.cause();
        ensure!(
            outcome.status.code() == Some(3) && cause.contains(&nobody),
            "{cause}"
        );
        ensure!(!process::exists(fixture.pid), "a task was made");
        fixture.restore(&floe(), &[])?;
        fixture.check()
    });
}

#[test]
fn what_a_task_chose_for_new_objects_is_kept() {
    under_selinux("selinux-attributes", || {
        let chosen = context("other_t:s0");
        let names = ["sockcreate", "exec", "fscreate", "keycreate"];
        let set = names.map(|name| format!("echo -n {chosen} >/proc/self/attr/{name};"));
        let script = format!("{} read line <fifo", set.concat());
        let directory = tempfile::tempdir()?;
        let mut fifo = Command::new("mkfifo");
        fifo.arg("fifo").current_dir(directory.path()).status()?;
        let mut shell = Command::new("setsid");
        shell
            .args(["sh", "-c", &script])
            .current_dir(directory.path());
        shell
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        process::adopt_orphans()?;
        let child = under(&context("open_t:s0"), move || Ok(shell.spawn()?))?;
        let pid = child.id() as i32;
        let all_set = || {
            names
                .iter()
                .all(|name| attribute(pid, name).is_ok_and(|is| is == chosen))
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !all_set() {
            ensure!(Instant::now() < deadline, "it does not choose");
            std::thread::sleep(Duration::from_millis(20));
        }
        let images = directory.path().join("images");
        fs::create_dir(&images)?;
        floe().dump(pid, &images, &[])?.ok("dump")?;
        process::wait_for_ends(&[pid], Duration::from_secs(20))?;
        floe().restore(&images, &[])?.ok("restore")?;
        let is_kept = all_set();
        process::kill_ours(&[pid], Duration::from_secs(20))?;
        ensure!(is_kept, "it lost what it chose");
        Ok(())
    });
}

#[test]
fn contexts_cross_with_criu() {
    under_selinux("selinux-cross", || {
        let criu = Engine::peer().ok_or_else(|| skips::missing("no peer"))?;
        for (dumper, restorer) in [(criu.clone(), floe()), (floe(), criu)] {
            let mut fixture = confined("threads", "open_t:s0:c1,c2")?;
            let before = labels(&fixture)?;
            fixture.dump(&dumper, &[])?;
            let core = fs::read(fixture.images().join(format!("core-{}.img", fixture.pid)))?;
            if !core.windows(4).any(|bytes| bytes == b"_t:s") {
                return Err(skips::missing("no SELinux in the peer"));
            }
            fixture.restore(&restorer, &[])?;
            fixture.check()?;
            let after = labels(&fixture)?;
            ensure!(
                after == before,
                "by {}: had {before:?}, has {after:?}",
                restorer.name
            );
        }
        Ok(())
    });
}
