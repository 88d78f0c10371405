//! A program under test, from its start to its end, over dumps and restores.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::engine::{Engine, Outcome, built};
use crate::process;
use crate::program::{self, Missing, Program};

/// How long a program may take to start, to check, or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// A running program; dropping it kills all that it became.
pub struct Fixture {
    /// The program.
    pub program: &'static Program,
    /// Its root, the same before and after a restore.
    pub pid: i32,
    directory: TempDir,
    images: PathBuf,
    answers: OwnedFd,
    waiting: Vec<u8>,
    pids: Vec<i32>,
}

impl Fixture {
    /// Starts a program by name and waits until it is ready. The error is [`Missing`] if this
    /// machine lacks what it needs.
    pub fn start(name: &str) -> anyhow::Result<Self> {
        Self::start_in(name, &std::env::temp_dir())
    }

    /// The same with its files and images below `place`.
    pub fn start_in(name: &str, place: &Path) -> anyhow::Result<Self> {
        let program = program::find(name).with_context(|| format!("no program `{name}`"))?;
        process::adopt_orphans()?;
        let directory = tempfile::Builder::new()
            .prefix("floe-fixture-")
            .tempdir_in(place)?;
        let home = directory.path().join("home");
        fs::create_dir(&home)?;
        for path in [directory.path(), &home] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
        }
        let fifo = home.join("answer");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::from_raw_mode(0o666))?;
        fs::set_permissions(&fifo, fs::Permissions::from_mode(0o666))?;
        // Open for both directions, so that it never ends while nobody answers.
        let answers = rustix::fs::open(&fifo, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let output = File::create(home.join("output"))?;
        let mut command = Command::new(built("testkit", "testkit-fixture")?);
        let child = command
            .arg(name)
            .arg(&home)
            .current_dir(&home)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("starting testkit-fixture")?;
        let pid = child.id() as i32;
        let images = directory.path().join("images");
        let mut fixture = Self {
            program,
            pid,
            directory,
            images,
            answers,
            waiting: Vec::new(),
            pids: vec![pid],
        };
        match fixture.answer()?.as_str() {
            "ready" => Ok(fixture),
            other => match other.strip_prefix("skipped: ") {
                Some(why) => Err(Missing(why.into()).into()),
                None => Err(anyhow!("{name}: {other}")),
            },
        }
    }

    /// The directory of the program's files.
    pub fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// Where its images are.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Puts the images elsewhere.
    pub fn set_images(&mut self, images: PathBuf) {
        self.images = images;
    }

    /// All tasks of the tree as they are now.
    pub fn family(&self) -> Vec<i32> {
        process::family(self.pid)
    }

    /// Dumps with the options of the program and `options`; the tree is gone afterwards unless
    /// it failed or was to be left.
    pub fn dump(&mut self, engine: &Engine, options: &[&str]) -> anyhow::Result<Outcome> {
        let outcome = self.try_dump(engine, options, &[])?;
        let outcome = outcome.ok(&format!("dump by {}", engine.name))?;
        if !options.contains(&"--leave-running") {
            process::wait_for_ends(&self.pids, LIMIT).context("after the dump")?;
        }
        Ok(outcome)
    }

    /// Dumps, and answers however it ended.
    pub fn try_dump(
        &mut self,
        engine: &Engine,
        options: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Outcome> {
        let _ = fs::remove_dir_all(&self.images);
        fs::create_dir_all(&self.images)?;
        self.pids.extend(self.family());
        self.pids.sort_unstable();
        self.pids.dedup();
        let tree = self.pid.to_string();
        let all = [self.program.options, options].concat();
        engine.run(
            &["dump", "--tree", &tree],
            &self.images,
            "dump.log",
            &all,
            variables,
        )
    }

    /// Restores with the options of the program and `options`.
    pub fn restore(&mut self, engine: &Engine, options: &[&str]) -> anyhow::Result<Outcome> {
        let outcome = self.try_restore(engine, options, &[])?;
        outcome.ok(&format!("restore by {}", engine.name))
    }

    /// Restores, and answers however it ended.
    pub fn try_restore(
        &mut self,
        engine: &Engine,
        options: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Outcome> {
        let all = [self.program.options, options].concat();
        let words = ["restore", "--restore-detached"];
        engine.run(&words, &self.images, "restore.log", &all, variables)
    }

    /// Asks the program to compare its state with what it set up.
    pub fn check(&mut self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.pid).context("a pid")?;
        kill_process(pid, Signal::USR1).context("asking the program: it is gone")?;
        match self.answer()?.as_str() {
            "ok" => Ok(()),
            other => bail!("{}: {other}", self.program.name),
        }
    }

    /// Kills the tree and waits for its end.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.pids.extend(self.family());
        process::kill_ours(&self.pids, LIMIT)
    }

    /// A line from the program.
    fn answer(&mut self) -> anyhow::Result<String> {
        let deadline = Instant::now() + LIMIT;
        let ended = process::watch(self.pid).context("the program is gone")?;
        loop {
            if let Some(end) = self.waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.waiting.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            match process::wait_readable(&[&self.answers, &ended], deadline)? {
                Some(0) => {
                    let mut bytes = [0; 4096];
                    let length = (&File::from(self.answers.try_clone()?)).read(&mut bytes)?;
                    self.waiting.extend(&bytes[..length]);
                }
                Some(_) => bail!("{} ended: {}", self.program.name, self.output()),
                None => bail!("{} did not answer in {LIMIT:?}", self.program.name),
            }
        }
    }

    /// What the program printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.home().join("output")).unwrap_or_default()
    }

    /// One whole life: dump by one engine, restore by the other, check.
    pub fn cycle(name: &str, dumper: &Engine, restorer: &Engine) -> anyhow::Result<()> {
        let mut fixture = Self::start(name)?;
        fixture.check().context("before the dump")?;
        fixture.dump(dumper, &[])?;
        ensure!(!process::exists(fixture.pid), "the tree is still there");
        fixture.restore(restorer, &[])?;
        fixture.check().context("after the restore")?;
        fixture.check().context("when asked again")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("testkit: cleaning up {}: {error:#}", self.program.name);
        }
    }
}
