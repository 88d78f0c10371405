//! `floe demo`: a live program is checkpointed, shown, restored, and goes on where it was.

mod counters;
mod janitor;
mod program;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use floe_image::{ImageDir, explore};

use crate::exit::{Exit, Failure};
use crate::statistics;
use counters::{Counter, Counters};
use janitor::Janitor;

/// Checkpoints and restores a live program, to see it: a key-value server and a client.
#[derive(Parser)]
#[command(name = "floe demo", after_help = Exit::HELP, disable_version_flag = true)]
struct Demo {
    /// What the server holds in memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,
    /// Where to put the images for the time of the demo.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Another program with CRIU's command line, for comparison.
    #[arg(long, value_name = "PROGRAM", hide = true)]
    engine: Option<PathBuf>,
}

/// Runs `floe demo` with the words behind `demo`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let name = OsString::from("floe demo");
    let demo = match Demo::try_parse_from(std::iter::once(&name).chain(args)) {
        Ok(demo) => demo,
        Err(error) => {
            // Nobody is left to tell if the terminal is gone.
            let _ = error.print();
            return Ok(if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Done
            });
        }
    };
    let parent = demo.directory.clone().unwrap_or_else(std::env::temp_dir);
    let directory = parent.join(format!("floe-demo-{}", std::process::id()));
    std::fs::create_dir_all(directory.join("images"))
        .with_context(|| format!("making {}", directory.display()))?;
    let janitor = Janitor::start(&directory)?;
    let outcome = Stage::new(&demo, &directory).and_then(|mut stage| stage.play());
    janitor.finish()?;
    outcome?;
    Ok(Exit::Done)
}

/// Runs one of the demo's own programs: `demo-part NAME MIB DIRECTORY`.
pub fn run_part(args: &[OsString]) -> Result<Exit, Failure> {
    let [name, mib, directory] = args else {
        return Err(Failure::new(
            Exit::Usage,
            anyhow::anyhow!("demo-part is called by `floe demo` only"),
        ));
    };
    let directory = Path::new(directory);
    let mib = mib
        .to_str()
        .and_then(|mib| mib.parse().ok())
        .context("a size in MiB")?;
    match name.to_str() {
        Some("root") => program::root(directory, mib)?,
        Some("server") => program::server(directory, mib)?,
        Some("client") => program::client(directory, mib)?,
        Some("janitor") => janitor::run(directory)?,
        _ => {
            return Err(Failure::new(
                Exit::Usage,
                anyhow::anyhow!("demo-part is called by `floe demo` only"),
            ));
        }
    }
    Ok(Exit::Done)
}

/// What the table at the end shows.
struct Times {
    dump: Duration,
    restore: Duration,
    frozen: Option<Duration>,
    gap: Duration,
    size: u64,
}

struct Stage<'a> {
    demo: &'a Demo,
    directory: &'a Path,
    counters: Counters,
    root: Child,
    is_terminal: bool,
}

impl<'a> Stage<'a> {
    fn new(demo: &'a Demo, directory: &'a Path) -> anyhow::Result<Self> {
        let counters = Counters::create(directory).context("making the counters")?;
        // The restored root becomes our child, whoever would inherit it else.
        rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))
            .context("becoming a subreaper")?;
        let errors = std::fs::File::create(directory.join("program.log"))
            .context("making the program's log")?;
        let mut command = program::part(&["root", &demo.size.to_string()], directory)?;
        let root = command
            .stderr(errors)
            .spawn()
            .context("starting the program")?;
        Ok(Self {
            demo,
            directory,
            counters,
            root,
            is_terminal: std::io::stdout().is_terminal(),
        })
    }

    fn play(&mut self) -> anyhow::Result<()> {
        let size = self.demo.size;
        self.say(&format!(
            "a key-value server with {size} MiB and a client that checks every answer"
        ))?;
        self.wait_for("filling the server's memory", |stage| {
            Ok(stage.counters.get(Counter::Filled)? == size * program::PAGES_PER_MIB)
        })?;
        self.wait_for("waiting for the first answers", |stage| {
            Ok(stage.counters.get(Counter::Answers)? > 2000)
        })?;
        let connection = self.connection()?;
        let root = self.root.id();
        let [server, client] =
            program::read_pids(self.directory).context("the program has no pids")?;
        self.say(&format!(
            "[1/4] running: root {root}, server {server}, client {client}, {connection}"
        ))?;

        let dump = self.engine("dump", &["-t", &root.to_string(), "--tcp-established"])?;
        self.reap([root, server, client]);
        let before = self.counters.get(Counter::Answers)?;
        self.say(&format!(
            "[2/4] dumped in {}, {before} answers checked; the program is gone",
            seconds(dump)
        ))?;
        let size = self.show_images()?;
        let restore = self.engine("restore", &["--tcp-established", "--restore-detached"])?;
        self.say(&format!("[3/4] restored in {}", seconds(restore)))?;
        self.wait_for("waiting for further answers", |stage| {
            Ok(stage.counters.get(Counter::Answers)? > before + 2000)
        })?;
        self.prove(root, &connection, before)?;
        let stats = statistics::of_dump(&self.images()).context("reading the statistics")?;
        let frozen = stats.map(|stats| Duration::from_micros(stats.frozen_time.into()));
        let gap = Duration::from_micros(self.counters.get(Counter::LongestGap)?);
        self.table(&Times {
            dump,
            restore,
            frozen,
            gap,
            size,
        })
    }

    fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    fn say(&self, text: &str) -> anyhow::Result<()> {
        writeln!(std::io::stdout(), "{text}").context("writing to standard output")
    }

    /// Both ends of the connection, as the kernel has it in its list.
    fn connection(&self) -> anyhow::Result<String> {
        let (client, server) = (
            self.counters.get(Counter::ClientPort)?,
            self.counters.get(Counter::ServerPort)?,
        );
        let list = std::fs::read_to_string("/proc/net/tcp").context("reading /proc/net/tcp")?;
        let ends = format!("0100007F:{client:04X} 0100007F:{server:04X} 01");
        if !list.contains(&ends) {
            bail!("the client's connection is not in /proc/net/tcp");
        }
        Ok(format!("connection 127.0.0.1:{client} -> :{server}"))
    }

    /// Waits for an event with a deadline; ends at once when the program has ended.
    fn wait_for(
        &mut self,
        what: &str,
        done: impl Fn(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60 + self.demo.size / 16);
        // A task has no command line for a moment while it starts.
        let mut missed = 0;
        while !done(self)? {
            missed = if janitor::processes(self.directory).is_empty() {
                missed + 1
            } else {
                0
            };
            if self.counters.get(Counter::Wrong)? > 0 || missed > 2 {
                let log =
                    std::fs::read_to_string(self.directory.join("program.log")).unwrap_or_default();
                bail!("{what}: the program failed: {}", log.trim_end());
            }
            if Instant::now() > deadline {
                bail!("{what}: it took too long");
            }
            self.draw(what)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        if self.is_terminal {
            write!(std::io::stdout(), "\r\x1b[K").context("writing to standard output")?;
        }
        Ok(())
    }

    /// A line that changes, on a terminal only.
    fn draw(&self, what: &str) -> anyhow::Result<()> {
        if !self.is_terminal {
            return Ok(());
        }
        let mib = self.counters.get(Counter::Filled)? / program::PAGES_PER_MIB;
        let answers = self.counters.get(Counter::Answers)?;
        let mut out = std::io::stdout();
        write!(out, "\r\x1b[K{what}: {mib} MiB, {answers} answers")
            .context("writing to standard output")?;
        out.flush().context("writing to standard output")
    }

    /// Runs this binary (or the other one) and measures it.
    fn engine(&self, command: &str, options: &[&str]) -> anyhow::Result<Duration> {
        let own = std::env::current_exe().context("finding our own binary")?;
        let log = format!("{command}.log");
        let mut engine = Command::new(self.demo.engine.as_ref().unwrap_or(&own));
        engine
            .args([command, "--no-default-config", "-v4", "-o", &log, "-D"])
            .arg(self.images())
            .args(options);
        let started = Instant::now();
        let output = engine
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {command}"))?;
        let time = started.elapsed();
        if output.status.success() {
            return Ok(time);
        }
        let log = std::fs::read_to_string(self.images().join(log)).unwrap_or_default();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
        let said = String::from_utf8_lossy(&output.stderr);
        // It says its name on each line, as we do.
        let said: Vec<&str> = said
            .lines()
            .map(|line| line.strip_prefix("floe: ").unwrap_or(line))
            .collect();
        let lines = if said.is_empty() { errors } else { said };
        bail!(
            "{command} failed ({}):\n{}",
            output.status,
            lines.join("\n")
        )
    }

    /// A dead task keeps its pid until it is waited for. Those that are not our children are
    /// somebody else's to wait for.
    fn reap(&self, pids: [u32; 3]) {
        for pid in pids {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw);
            let _ = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        }
    }

    /// Shows tasks and largest files; the size of all.
    fn show_images(&self) -> anyhow::Result<u64> {
        let dir = ImageDir::open(self.images()).context("opening the images")?;
        for task in explore::tasks(&dir).context("reading the tasks")? {
            self.say(&format!("      {task}"))?;
        }
        let mut files = explore::list(&dir).context("reading the images")?;
        files.sort_by_key(|file| std::cmp::Reverse(file.size));
        for file in files.iter().take(3) {
            self.say(&format!("      {:>12} bytes  {}", file.size, file.name))?;
        }
        self.say(&format!("      {:>12} files in all", files.len()))?;
        Ok(files.iter().map(|file| file.size).sum())
    }

    fn prove(&self, root: u32, connection: &str, before: u64) -> anyhow::Result<()> {
        if !janitor::all_there(self.directory, root) {
            bail!("the processes do not have their old pids");
        }
        if self.connection()? != connection {
            bail!("the connection is another one");
        }
        let (answers, wrong) = (
            self.counters.get(Counter::Answers)?,
            self.counters.get(Counter::Wrong)?,
        );
        if wrong > 0 {
            bail!("{wrong} answers were wrong");
        }
        let more = answers - before;
        self.say(&format!(
            "[4/4] it goes on: same pids, same connection, {more} more answers, none wrong"
        ))
    }

    fn table(&self, times: &Times) -> anyhow::Result<()> {
        let frozen = times.frozen.map_or_else(|| "unknown".into(), seconds);
        self.say("")?;
        self.say(&format!(
            "  freeze time   {frozen:>10}   the program stood still for the dump"
        ))?;
        self.say(&format!("  dump time     {:>10}", seconds(times.dump)))?;
        self.say(&format!("  restore time  {:>10}", seconds(times.restore)))?;
        self.say(&format!(
            "  longest wait  {:>10}   for an answer, by the client's clock",
            seconds(times.gap)
        ))?;
        self.say(&format!(
            "  image size    {:>6} MiB",
            times.size.div_ceil(1 << 20)
        ))
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}
