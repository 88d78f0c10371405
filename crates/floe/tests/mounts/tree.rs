//! A tree in mount and pid namespaces of its own.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::process;

/// How long a tree may take to stand.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Ends the script of every tree: the first process of a pid namespace, with files of the tree only.
pub const SLEEP: &str = "
touch $READY
exec </dev/null >/dev/null 2>&1
exec 10<&-
exec sleep 1000
";

/// A tree in new pid and mount namespaces; killed when dropped.
pub struct Tree {
    pub directory: tempfile::TempDir,
    pub pid: i32,
}

impl Tree {
    /// Runs `script`, which ends with [`SLEEP`], as the first process of the namespaces.
    pub fn start(script: &str) -> anyhow::Result<Tree> {
        Self::start_with(script, "ready")
    }

    /// As [`Tree::start`], with the name below the tree's directory that appears when it stands.
    pub fn start_with(script: &str, ready: &str) -> anyhow::Result<Tree> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let ready = directory.path().join(ready);
        fs::create_dir(directory.path().join("images"))?;
        let mut unshare = Command::new("unshare")
            .args([
                "--fork",
                "--pid",
                "--mount",
                "--mount-proc",
                "setsid",
                "bash",
                "-ec",
                script,
            ])
            .env("DIR", directory.path())
            .env("READY", &ready)
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + LIMIT;
        while !ready.exists() {
            if let Some(status) = unshare.try_wait()? {
                bail!("the script ended with {status}");
            }
            ensure!(Instant::now() < deadline, "the tree does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = fs::read_to_string(children)?.trim().parse()?;
        // The wrapper is of no use any more; its child becomes ours.
        unshare.kill()?;
        unshare.wait()?;
        let name = || fs::read_to_string(format!("/proc/{pid}/comm"));
        while name()?.trim() != "sleep" {
            ensure!(Instant::now() < deadline, "the tree does not sleep");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Tree { directory, pid })
    }

    pub fn images(&self) -> std::path::PathBuf {
        self.directory.path().join("images")
    }

    pub fn floe(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
        command.args(arguments).arg("-D").arg(self.images());
        Ok(command.output()?)
    }

    pub fn dump(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let pid = self.pid.to_string();
        let output = self.floe(&[&["dump", "-t", &pid], arguments].concat())?;
        expect_success(&output)?;
        process::wait_for_ends(&[self.pid], LIMIT)
    }

    pub fn restore(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        let pidfile = self.directory.path().join("pid");
        let path = pidfile.to_str().context("UTF-8")?;
        let output = self.floe(&[&["restore", "-d", "--pidfile", path], arguments].concat())?;
        expect_success(&output)?;
        self.pid = fs::read_to_string(&pidfile)?.trim().parse()?;
        Ok(())
    }

    /// The mounts without their numbers: those of mounts and devices are left out, those of sharing
    /// groups are counted up from one.
    pub fn mounts(&self) -> anyhow::Result<Vec<String>> {
        let mut lines: Vec<Vec<String>> = Vec::new();
        for pid in process::family(self.pid) {
            let text = match fs::read_to_string(format!("/proc/{pid}/mountinfo")) {
                // It has just ended, or will be reaped.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => continue,
                text => text?,
            };
            let words = |line: &str| line.split(' ').skip(3).map(str::to_string).collect();
            let mut own: Vec<Vec<String>> = text.lines().map(words).collect();
            own.sort_by_key(|words| words[1].clone());
            lines.append(&mut own);
        }
        let mut groups = BTreeMap::new();
        let number = |words: Vec<String>| {
            let named = words.into_iter().map(|word| match word.split_once(':') {
                Some((kind @ ("shared" | "master"), group)) => {
                    let next = groups.len() + 1;
                    format!("{kind}:{}", groups.entry(group.to_string()).or_insert(next))
                }
                _ => word,
            });
            named.collect::<Vec<_>>().join(" ")
        };
        Ok(lines.into_iter().map(number).collect())
    }

    /// Runs a command among the tree's mounts and pids, with `$DIR` as the tree had it.
    pub fn inside(&self, command: &[&str]) -> anyhow::Result<Output> {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &self.pid.to_string(), "-m", "-p", "-i", "-n", "-C"]);
        nsenter.args(command).env("DIR", self.directory.path());
        Ok(nsenter.output()?)
    }

    /// A file as the tree sees it.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/root{path}", self.pid);
        fs::read_to_string(&path).with_context(|| path)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if process::is_ours(self.pid) {
            let ended = process::kill_ours(&[self.pid], LIMIT);
            if let Err(error) = ended {
                eprintln!("a tree stays: {error:#}");
            }
        }
    }
}

pub fn expect_success(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}
