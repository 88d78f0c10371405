//! An engine under test: any program that speaks CRIU's command line.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::process;
use crate::sys::task;

/// How long an engine may take for one command.
const LIMIT: Duration = Duration::from_secs(120);

/// A binary and what it is called in tables.
#[derive(Debug, Clone)]
pub struct Engine {
    /// `floe` or the peer's name.
    pub name: String,
    /// The binary.
    pub path: PathBuf,
}

/// What became of one command.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// From its start to its end.
    pub took: Duration,
    /// The most memory that it held, in bytes.
    pub memory: u64,
    /// What it printed.
    pub printed: String,
    log: PathBuf,
}

impl Outcome {
    /// The cause of a failure: what was printed, and the errors in the log.
    pub fn cause(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let errors: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("Error") || line.contains("ERROR"))
            .filter(|line| !line.contains("RLIMIT_NOFILE for self"))
            .collect();
        let errors = match errors.as_slice() {
            [] => String::new(),
            [one] => format!("; log: {one}"),
            [first, .., last] => format!("; log: {first} ... {last}"),
        };
        format!("{}: {}{errors}", self.status, self.printed.trim())
    }

    /// An error with the cause if it failed.
    pub fn ok(self, what: &str) -> anyhow::Result<Self> {
        if !self.status.success() {
            bail!("{what}: {}", self.cause());
        }
        Ok(self)
    }
}

impl Engine {
    /// Names a binary.
    pub fn new(name: &str, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
        }
    }

    /// The peer that `FLOE_PEER_CRIU` names.
    pub fn peer() -> Option<Self> {
        std::env::var_os("FLOE_PEER_CRIU").map(|path| Self::new("criu", path))
    }

    /// The binary under test: `FLOE_BIN`, or the one that cargo built beside the running program.
    pub fn floe() -> anyhow::Result<Self> {
        if let Some(path) = std::env::var_os("FLOE_BIN") {
            return Ok(Self::new("floe", path));
        }
        Ok(Self::new("floe", built("floe", "floe")?))
    }

    /// Whether this binary can dump at all: the answer of `check`.
    pub fn works(&self) -> anyhow::Result<()> {
        let output = Command::new(&self.path)
            .arg("check")
            .stdin(Stdio::null())
            .output();
        let output = output.with_context(|| format!("running {}", self.path.display()))?;
        if !output.status.success() {
            let printed = String::from_utf8_lossy(&output.stderr);
            bail!("{} check: {}: {}", self.name, output.status, printed.trim());
        }
        Ok(())
    }

    /// The forms of dirty tracking that this kernel has, the best first; `none` and `content` are always
    /// there.
    pub fn trackers(&self) -> anyhow::Result<Vec<&'static str>> {
        let output = Command::new(&self.path)
            .arg("check")
            .stdin(Stdio::null())
            .output();
        let output = output.with_context(|| format!("running {}", self.path.display()))?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let has = |feature: &str| {
            let mut rows = printed.lines().map(|row| row.split_whitespace());
            rows.any(|mut row| row.next() == Some(feature) && row.next() == Some("yes"))
        };
        let mut found = Vec::new();
        if has("uffd_wp_async") && has("pagemap_scan") {
            found.push("uffd");
        }
        if has("soft_dirty") {
            found.push("soft-dirty");
        }
        found.extend(["content", "none"]);
        Ok(found)
    }

    /// Dumps the tree of `pid` to `images`; the log is `dump.log` there.
    pub fn dump(&self, pid: i32, images: &Path, options: &[&str]) -> anyhow::Result<Outcome> {
        let tree = pid.to_string();
        let words = ["dump", "--tree", &tree];
        self.run(&words, images, "dump.log", options, &[])
    }

    /// Restores from `images` without waiting for the tree; the log is `restore.log` there.
    pub fn restore(&self, images: &Path, options: &[&str]) -> anyhow::Result<Outcome> {
        let words = ["restore", "--restore-detached"];
        self.run(&words, images, "restore.log", options, &[])
    }

    /// Runs a command with `variables` in its environment, its log in `images`.
    pub fn run(
        &self,
        words: &[&str],
        images: &Path,
        log: &str,
        options: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Outcome> {
        let printed = images.with_extension("printed");
        let out =
            File::create(&printed).with_context(|| format!("creating {}", printed.display()))?;
        let mut command = Command::new(&self.path);
        command
            .args(words)
            .arg("--images-dir")
            .arg(images)
            .args(["--log-file", log, "-v4"])
            .args(options)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("running {}", self.path.display()))?;
        let pid = child.id() as i32;
        let watched = process::watch(pid)?;
        if process::wait_readable(&[&watched], started + LIMIT)?.is_none() {
            process::kill_ours(&[pid], Duration::from_secs(10))?;
            bail!("{} {} took more than {LIMIT:?}", self.name, words[0]);
        }
        let took = started.elapsed();
        let (memory, status) = task::reap(pid)?.context("the engine ended and did not")?;
        Ok(Outcome {
            status: ExitStatus::from_raw(status),
            took,
            memory,
            printed: fs::read_to_string(&printed).unwrap_or_default(),
            log: images.join(log),
        })
    }
}

/// A binary of the workspace, built by cargo if it is not there.
pub fn built(package: &str, binary: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding our own binary")?;
    let directory = own.parent().context("our own binary lies nowhere")?;
    let directory = match directory.file_name() {
        Some(name) if name == "deps" => directory.parent().context("deps lies nowhere")?,
        _ => directory,
    };
    let path = directory.join(binary);
    if path.exists() {
        return Ok(path);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--package", package, "--bin", binary]);
    if directory.ends_with("release") {
        build.arg("--release");
    }
    let status = build.status().context("starting cargo")?;
    if !status.success() || !path.exists() {
        bail!("{} is not there and cannot be built", path.display());
    }
    Ok(path)
}
