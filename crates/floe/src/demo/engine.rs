//! Runs this binary for the demo, and measures it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::statistics;

/// Commands with one directory of images.
pub struct Engine {
    images: PathBuf,
}

impl Engine {
    /// Images, logs and statistics go to `name` in the demo's directory.
    pub fn new(directory: &Path, name: &str) -> Engine {
        Engine {
            images: directory.join(name),
        }
    }

    /// Runs a command; `show` is given each line that it says, as it comes. How long it took.
    pub fn run(
        &self,
        command: &str,
        options: &[&str],
        mut show: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let own = std::env::current_exe().context("finding our own binary")?;
        let log = format!("{command}.log");
        let started = Instant::now();
        let mut engine = Command::new(own)
            .args([command, "--no-default-config", "-v4", "-o", &log, "-D"])
            .arg(&self.images)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command}"))?;
        let said = engine.stderr.take().context("it has no standard error")?;
        let mut lines = Vec::new();
        for line in BufReader::new(said).lines() {
            let line = line.with_context(|| format!("reading what {command} says"))?;
            show(&line)?;
            lines.push(line);
        }
        let status = engine
            .wait()
            .with_context(|| format!("waiting for {command}"))?;
        if status.success() {
            return Ok(started.elapsed());
        }
        // It says its name on each line, as we do.
        let said = lines
            .iter()
            .map(|line| line.strip_prefix("floe: ").unwrap_or(line));
        let said: Vec<&str> = said.collect();
        bail!("{command} failed ({status}):\n{}", said.join("\n"))
    }

    /// Bytes of the images.
    pub fn size(&self) -> anyhow::Result<u64> {
        let mut bytes = 0;
        let entries = std::fs::read_dir(&self.images).context("looking at the images")?;
        for entry in entries {
            bytes += entry
                .and_then(|entry| entry.metadata())
                .context("looking at the images")?
                .len();
        }
        Ok(bytes)
    }
}

/// How long the last dump stopped the program, by the statistics in a directory.
pub fn frozen(work_dir: &Path) -> anyhow::Result<Option<Duration>> {
    let stats = statistics::of_dump(work_dir).context("reading the statistics")?;
    Ok(stats.map(|stats| Duration::from_micros(stats.frozen_time.into())))
}
