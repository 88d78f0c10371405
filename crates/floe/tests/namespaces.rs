//! Trees with pid, UTS, IPC, time and user namespaces of their own. Needs root and util-linux; says
//! `skipped` without.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::{process, skips};

/// How long a tree may take to stand.
const LIMIT: Duration = Duration::from_secs(20);
/// By how much the tree's monotonic clock is ahead, in seconds.
const AHEAD: &str = "1000500";

/// The first process of the namespaces, and a child with a UTS namespace of its own.
const SCRIPT: &str = "
exec </dev/null >/dev/null 2>&1
hostname outer-floe
echo 1555568162 1418103359 1849538473 22875 >/proc/sys/kernel/sem || true
unshare --uts sh -c 'hostname inner-floe; touch $READY; exec sleep 1000' &
exec sleep 1001
";

/// A tree; killed when dropped.
struct Tree {
    directory: tempfile::TempDir,
    pid: i32,
}

impl Tree {
    fn start(kinds: &[&str]) -> anyhow::Result<Tree> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let ready = directory.path().join("ready");
        fs::create_dir(directory.path().join("images"))?;
        let mut unshare = Command::new("unshare")
            .arg("--fork")
            .args(kinds)
            .args(["setsid", "sh", "-ec", SCRIPT])
            .env("READY", &ready)
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + LIMIT;
        let children = |pid: u32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm"));
        let mut pid = 0;
        while !ready.exists() || name(pid).is_ok_and(|name| name.trim() != "sleep") {
            ensure!(Instant::now() < deadline, "the tree does not stand");
            pid = children(unshare.id())?.trim().parse().unwrap_or(0);
            std::thread::sleep(Duration::from_millis(5));
        }
        // The wrapper is of no use any more; its child becomes ours.
        unshare.kill()?;
        unshare.wait()?;
        Ok(Tree { directory, pid })
    }

    fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    fn dump_and_restore(&mut self) -> anyhow::Result<()> {
        let floe = |arguments: &[&str]| -> anyhow::Result<()> {
            let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
            let output = command
                .args(arguments)
                .arg("-D")
                .arg(self.images())
                .output()?;
            expect_success(&output)
        };
        floe(&["dump", "-t", &self.pid.to_string()])?;
        process::wait_for_ends(&[self.pid], LIMIT)?;
        let pidfile = self.directory.path().join("pid");
        let path = pidfile.to_str().context("UTF-8")?;
        floe(&["restore", "-d", "--pidfile", path])?;
        self.pid = fs::read_to_string(&pidfile)?.trim().parse()?;
        Ok(())
    }

    /// The child, as we know it.
    fn child(&self) -> anyhow::Result<i32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid))?;
        Ok(children.trim().parse()?)
    }

    /// What must be as it was: pids inside, host names, owners, and the seconds of the clock.
    fn facts(&self) -> anyhow::Result<Vec<String>> {
        let child = self.child()?;
        let mut facts = Vec::new();
        for pid in [self.pid, child] {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find(|line| line.starts_with("NSpid:"));
            let inner = line.and_then(|line| line.split_whitespace().last());
            facts.push(inner.unwrap_or("no pid").to_string());
            let hostname = Command::new("nsenter")
                .args(["--uts", "--target", &pid.to_string(), "hostname"])
                .output()?;
            facts.push(String::from_utf8_lossy(&hostname.stdout).trim().to_string());
            facts.push(fs::read_to_string(format!("/proc/{pid}/uid_map"))?);
            facts.push(fs::read_to_string(format!("/proc/{pid}/loginuid"))?);
            let limits = Command::new("nsenter")
                .args(["--ipc", "--target", &pid.to_string()])
                .args(["cat", "/proc/sys/kernel/sem"])
                .output()?;
            facts.push(String::from_utf8_lossy(&limits.stdout).trim().to_string());
            let clocks = fs::read_to_string(format!("/proc/{pid}/timens_offsets"))?;
            let words: Vec<&str> = clocks.split_whitespace().collect();
            // Some seconds may pass between dump and restore, which do not count.
            let seconds: i64 = words.get(1).context("an offset")?.parse()?;
            facts.push(format!("{}", seconds / 1000));
        }
        Ok(facts)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if process::is_ours(self.pid)
            && let Err(error) = process::kill_ours(&[self.pid], LIMIT)
        {
            eprintln!("a tree stays: {error:#}");
        }
    }
}

fn expect_success(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

fn comes_back(kinds: &[&str]) -> anyhow::Result<()> {
    let mut tree = Tree::start(kinds)?;
    let before = tree.facts()?;
    assert_eq!(before[0], "1");
    assert_eq!((&*before[1], &*before[7]), ("outer-floe", "inner-floe"));
    tree.dump_and_restore()?;
    assert_eq!(before, tree.facts()?);
    Ok(())
}

#[test]
fn pids_names_and_clocks_come_back() {
    if skips::is_root("pids_names_and_clocks_come_back") {
        let kinds = ["--pid", "--uts", "--ipc", "--time", "--monotonic", AHEAD];
        comes_back(&kinds).expect("the tree comes back");
    }
}

#[test]
fn a_user_namespace_comes_back_with_its_owners() {
    if skips::is_root("a_user_namespace_comes_back_with_its_owners") {
        let kinds = ["--pid", "--uts", "--ipc", "--user", "--map-root-user"];
        comes_back(&kinds).expect("the tree comes back");
    }
}

#[test]
fn a_tree_comes_back_into_a_pid_namespace_of_somebody_else() {
    if skips::is_root("a_tree_comes_back_into_a_pid_namespace_of_somebody_else") {
        shared_pids().expect("the tree comes back");
    }
}

fn children(pid: i32) -> anyhow::Result<Vec<i32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?)
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(
            Instant::now() < deadline,
            "what is waited for does not come"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The first process of the namespace is not of the tree, and reaps it.
fn shared_pids() -> anyhow::Result<()> {
    process::adopt_orphans()?;
    let directory = tempfile::tempdir()?;
    let script = "setsid sleep 1000 </dev/null >/dev/null 2>&1 & wait; exec sleep 1001";
    let mut unshare = Command::new("unshare")
        .args(["--fork", "--pid", "--kill-child", "sh", "-c", script])
        .stdin(Stdio::null())
        .spawn()?;
    let child = |pid: i32| children(pid).ok()?.first().copied();
    let named = |pid: i32, name: &str| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (comm.trim() == name).then_some(pid)
    };
    let first = wait_for(|| child(unshare.id() as i32))?;
    let root = wait_for(|| named(child(first)?, "sleep"))?;
    let inner = process::status_field(root, "NSpid").context("a status")?;
    let inner = inner.split_whitespace().last().map(str::to_string);
    let link = fs::read_link(format!("/proc/{root}/ns/pid"))?;
    let link = link.to_string_lossy();
    let inode = link.trim_matches(|c: char| !c.is_ascii_digit());

    let floe = |line: String| {
        let script = format!("exec 9</proc/{first}/ns/pid; exec $FLOE {line}");
        Command::new("sh")
            .args(["-c", &script])
            .current_dir(directory.path())
            .env("FLOE", env!("CARGO_BIN_EXE_floe"))
            .output()
    };
    let refused = floe(format!("dump -t {root}"))?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("--external pid["), "{said}");
    expect_success(&floe(format!(
        "dump -t {root} --external pid[{inode}]:shared"
    ))?)?;
    wait_for(|| named(first, "sleep"))?;
    let output = floe("restore -d --pidfile pid --inherit-fd fd[9]:shared".into())?;
    expect_success(&output)?;
    let root: i32 = fs::read_to_string(directory.path().join("pid"))?.parse()?;
    let again = process::status_field(root, "NSpid").context("a status")?;
    assert_eq!(again.split_whitespace().last().map(str::to_string), inner);
    assert_eq!(
        fs::read_link(format!("/proc/{root}/ns/pid"))?,
        fs::read_link(format!("/proc/{first}/ns/pid"))?
    );
    unshare.kill()?;
    unshare.wait()?;
    Ok(())
}
