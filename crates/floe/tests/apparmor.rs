//! Programs under AppArmor profiles. `cargo xtask boot apparmor` has the kernel and the profiles.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::{Engine, Fixture, process, skips};

/// Where the guest has compiled policy, by number: in the order of `profiles.apparmor`.
const POLICY: &str = "/policy/apparmor";
const KERNEL: &str = "/sys/kernel/security/apparmor";

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Runs a test, or says that it is skipped where AppArmor or the profiles are missing.
fn under_apparmor(name: &str, test: impl FnOnce() -> anyhow::Result<()>) {
    if !skips::is_root(name) {
        return;
    }
    let has_policy = Path::new(POLICY).exists() && Path::new(KERNEL).exists();
    let done = match has_policy {
        true => test(),
        false => Err(skips::missing(
            "no AppArmor with the profiles of `cargo xtask boot`",
        )),
    };
    skips::or_skip(name, done).unwrap_or_else(|error| panic!("{error:#}"));
}

/// Starts something under a profile.
fn under<T: Send + 'static>(
    profile: &str,
    start: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let order = format!("exec {profile}");
    // What a thread says of the next `exec` holds for the children that it forks.
    let start = move || {
        fs::write("/proc/thread-self/attr/apparmor/exec", order).context("choosing a profile")?;
        start()
    };
    std::thread::spawn(start).join().expect("no panic")
}

/// Starts a program under a profile.
fn confined(program: &'static str, profile: &str) -> anyhow::Result<Fixture> {
    under(profile, move || Fixture::start(program))
}

/// The labels of all threads of the tree.
fn labels(fixture: &Fixture) -> anyhow::Result<Vec<String>> {
    let mut labels = Vec::new();
    for pid in fixture.family() {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let text = fs::read_to_string(thread?.path().join("attr/apparmor/current"))?;
            labels.push(text.trim_end().to_string());
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
fn keeps(program: &'static str, profile: &str) -> anyhow::Result<()> {
    let mut fixture = confined(program, profile)?;
    let before = labels(&fixture)?;
    let is_under = |label: &String| label.starts_with(profile);
    ensure!(before.iter().all(is_under), "{program} has {before:?}");
    cycle(&mut fixture, &[]).with_context(|| format!("{program} under {profile}"))?;
    let after = labels(&fixture)?;
    ensure!(after == before, "{program} had {before:?}, has {after:?}");
    Ok(())
}

#[test]
fn threads_children_and_users_keep_their_profile() {
    under_apparmor("apparmor-keeps", || {
        for program in [
            "identity",
            "threads",
            "tree",
            "thread-credentials",
            "seccomp-filter",
        ] {
            keeps(program, "floe-open")?;
        }
        Ok(())
    });
}

#[test]
fn a_profile_may_forbid_all_that_a_restore_does() {
    under_apparmor("apparmor-tight", || {
        keeps("identity", "floe-tight")?;
        keeps("threads", "floe-tight")
    });
}

#[test]
fn what_is_unconfined_stays_so() {
    under_apparmor("apparmor-unconfined", || {
        let mut fixture = Fixture::start("identity")?;
        cycle(&mut fixture, &[])?;
        let after = labels(&fixture)?;
        ensure!(after == ["unconfined"], "{after:?}");
        Ok(())
    });
}

#[test]
fn a_chosen_profile_replaces_the_saved_one() {
    under_apparmor("apparmor-chosen", || {
        let mut fixture = confined("threads", "floe-open")?;
        cycle(&mut fixture, &["--lsm-profile", "apparmor:floe-other"])?;
        let after = labels(&fixture)?;
        let is_other = |label: &String| label == "floe-other (enforce)";
        ensure!(after.len() > 1 && after.iter().all(is_other), "{after:?}");
        cycle(&mut fixture, &["--lsm-profile", "apparmor:unconfined"])?;
        let after = labels(&fixture)?;
        ensure!(after.iter().all(|label| label == "unconfined"), "{after:?}");
        Ok(())
    });
}

#[test]
fn a_profile_that_is_not_loaded_is_refused_before_anything_is_made() {
    under_apparmor("apparmor-missing", || {
        let mut fixture = confined("identity", "floe-open")?;
        fixture.dump(&floe(), &[])?;
        let outcome = fixture.try_restore(&floe(), &["--lsm-profile", "apparmor:nowhere"], &[])?;
        let cause = outcome.cause();
        ensure!(outcome.status.code() == Some(3), "{cause}");
        ensure!(
            cause.contains("nowhere") && cause.contains("apparmor_parser"),
            "{cause}"
        );
        ensure!(!process::exists(fixture.pid), "a task was made");
        fixture.restore(&floe(), &[])?;
        fixture.check()
    });
}

#[test]
fn a_task_in_a_hat_is_refused_and_runs_on() {
    under_apparmor("apparmor-hat", || {
        let script = "echo -n 'changehat 0000000000000001^hat' >/proc/self/attr/current; \
                      while :; do sleep 0.1; done";
        let mut shell = Command::new("sh");
        let mut child = under("floe-open", move || {
            shell.args(["-c", script]).stdin(Stdio::null());
            Ok(shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
        })?;
        let images = tempfile::tempdir()?;
        let label = format!("/proc/{}/attr/apparmor/current", child.id());
        let deadline = Instant::now() + Duration::from_secs(20);
        while !fs::read_to_string(&label)?.starts_with("floe-open//hat") {
            ensure!(Instant::now() < deadline, "it did not come into the hat");
            std::thread::sleep(Duration::from_millis(20));
        }
        let dumped = floe().dump(child.id() as i32, images.path(), &["--shell-job"])?;
        let cause = dumped.cause();
        let still_there = child.try_wait()?.is_none();
        child.kill()?;
        child.wait()?;
        ensure!(still_there, "it ended");
        ensure!(
            dumped.status.code() == Some(3) && cause.contains("hat"),
            "{cause}"
        );
        Ok(())
    });
}

#[test]
fn policy_of_a_namespace_goes_along() {
    under_apparmor("apparmor-namespace", || {
        let namespace = Path::new(KERNEL).join("policy/namespaces/floe-ns");
        fs::create_dir(&namespace).context("making a namespace of policy")?;
        let policy = fs::read(Path::new(POLICY).join("0"))?;
        fs::write(namespace.join(".replace"), policy)?;
        let profile = ":floe-ns:floe-open";
        let mut fixture = confined("threads", profile)?;
        let before = labels(&fixture)?;
        ensure!(before[0] == ":floe-ns:floe-open (enforce)", "{before:?}");
        fixture.dump(&floe(), &[])?;
        fixture
            .restore(&floe(), &[])
            .context("into the namespace that is there")?;
        fixture.check()?;
        fixture.dump(&floe(), &[])?;
        fs::remove_dir(&namespace)?;
        fixture
            .restore(&floe(), &[])
            .context("into a namespace that is made")?;
        fixture.check()?;
        let after = labels(&fixture)?;
        ensure!(after == before, "had {before:?}, has {after:?}");
        drop(fixture);
        Ok(fs::remove_dir(&namespace)?)
    });
}

#[test]
fn containers_keep_their_profile() {
    under_apparmor("apparmor-containers", || {
        // Without mounts of its own: the guest's root, which cannot be moved, stays theirs.
        let kinds = ["--pid", "--ipc", "--uts"];
        container(&kinds)?;
        container(&[&kinds[..], &["--user", "--map-root-user"]].concat())
    });
}

/// The programs are started anew inside, for their file to be seen from there.
const CONTAINER: &str = "exec </dev/null >/dev/null 2>&1
/bin/busybox sleep 1000 & exec /bin/busybox sleep 1001";

/// Starts a shell with a child in namespaces of its own, under a profile; dumps and restores it.
fn container(kinds: &[&'static str]) -> anyhow::Result<()> {
    process::adopt_orphans()?;
    let directory = tempfile::tempdir()?;
    let images = directory.path().join("images");
    fs::create_dir(&images)?;
    let mut unshare = Command::new("unshare");
    unshare.arg("--fork").args(kinds);
    unshare.args(["setsid", "sh", "-c", CONTAINER]);
    unshare
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut outer = under("floe-open", move || Ok(unshare.spawn()?))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    let root = loop {
        let family = process::family(outer.id() as i32);
        let comm = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if family.len() == 3 && family[1..].iter().all(|pid| comm(pid) == "busybox\n") {
            break family[1];
        }
        ensure!(
            Instant::now() < deadline,
            "the tree does not stand: {family:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    outer.kill()?;
    outer.wait()?;
    floe().dump(root, &images, &[])?.ok("dump")?;
    process::wait_for_ends(&[root], Duration::from_secs(20))?;
    let pidfile = directory.path().join("pid");
    let option = pidfile.to_str().context("UTF-8")?;
    floe()
        .restore(&images, &["--pidfile", option])?
        .ok("restore")?;
    let root: i32 = fs::read_to_string(&pidfile)?.trim().parse()?;
    let family = process::family(root);
    let label = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/attr/apparmor/current"));
    let labels: Vec<String> = family.iter().map(label).collect::<Result<_, _>>()?;
    process::kill_ours(&family, Duration::from_secs(20))?;
    ensure!(
        labels == ["floe-open (enforce)\n"; 2],
        "{kinds:?}: {labels:?}"
    );
    Ok(())
}

#[test]
fn profiles_cross_with_criu() {
    under_apparmor("apparmor-cross", || {
        let criu = Engine::peer().ok_or_else(|| skips::missing("no peer"))?;
        for (dumper, restorer) in [(floe(), criu.clone()), (criu, floe())] {
            let mut fixture = confined("threads", "floe-open")?;
            let before = labels(&fixture)?;
            fixture.dump(&dumper, &[])?;
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
