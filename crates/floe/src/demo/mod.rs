//! `floe demo`: the memory of a live program is copied in rounds while it answers, what is left in one
//! short stop; it is restored from the one archive, and goes on where it was.

mod counters;
mod engine;
mod janitor;
mod program;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use floe_archive::summary::Summary;

use crate::exit::{Exit, Failure};
use crate::own;
use counters::{Counter, Counters};
use engine::Engine;
use janitor::Janitor;

/// Checkpoints and restores a live program, to see it: a key-value server and a client.
///
/// A plain dump stops it for as long as its memory is copied. Then the same in rounds, into one archive,
/// from which it is restored. Needs root; leaves nothing behind.
#[derive(Parser)]
#[command(name = "floe demo", after_help = Exit::HELP, disable_version_flag = true)]
struct Demo {
    /// What the server holds in memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=65536))]
    size: u64,
    /// Where to put the images for the time of the demo (default: memory, if there is room).
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Runs `floe demo` with the words behind `demo`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let demo: Demo = match own::parse("floe demo", args) {
        Ok(demo) => demo,
        Err(exit) => return Ok(exit),
    };
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            Exit::Kernel,
            anyhow::anyhow!(
                "The demo needs root, for what it saves has a TCP connection: sudo floe demo"
            ),
        ));
    }
    let parent = demo
        .directory
        .clone()
        .unwrap_or_else(|| roomy(demo.size << 20));
    let directory = parent.join(format!("floe-demo-{}", std::process::id()));
    for name in ["plain", "rounds"] {
        let path = directory.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    }
    let janitor = Janitor::start(&directory)?;
    let outcome = Stage::new(&demo, &directory).and_then(|mut stage| stage.play());
    janitor.finish()?;
    outcome?;
    Ok(Exit::Done)
}

/// A file system in memory that has room for what the demo writes, or the directory for such files.
fn roomy(bytes: u64) -> PathBuf {
    let memory = Path::new("/dev/shm");
    // The plain dump, the rounds and the archive.
    let fits = rustix::fs::statvfs(memory)
        .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) > bytes.saturating_mul(4));
    if fits {
        memory.to_path_buf()
    } else {
        std::env::temp_dir()
    }
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

/// One way to dump, for the table at the end.
struct Dump {
    /// From the start of the command to its end.
    time: Duration,
    /// How long the program stood still, as the engine says.
    frozen: Option<Duration>,
    /// What it takes on disk, in bytes.
    size: u64,
}

/// The program as it was before.
struct Before {
    pids: [u32; 3],
    connection: String,
    answers: u64,
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
        let mut before = self.start()?;
        let plain = self.plain_dump(&before)?;
        let plain_gap = self.longest_wait()?;
        let rounds = self.dump_in_rounds(&before)?;
        self.reap(before.pids);
        before.answers = self.counters.get(Counter::Answers)?;
        let restore = self.restore()?;
        let answers = before.answers;
        self.wait_for("waiting for further answers", |stage| {
            Ok(stage.counters.get(Counter::Answers)? > answers + 2000)
        })?;
        self.prove(&before)?;
        let gap = Duration::from_micros(self.counters.get(Counter::LongestGap)?);
        self.table([&plain, &rounds], restore, [plain_gap, gap])
    }

    /// Waits until the program does what it is for.
    fn start(&mut self) -> anyhow::Result<Before> {
        let size = self.demo.size;
        self.say(&format!(
            "a key-value server with {size} MiB, which it rewrites all the time, and a client that checks every answer"
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
            "[1/5] running: root {root}, server {server}, client {client}, {connection}"
        ))?;
        Ok(Before {
            pids: [root, server, client],
            connection,
            answers: 0,
        })
    }

    /// One dump that stops the program for all of it; the program runs on.
    fn plain_dump(&mut self, before: &Before) -> anyhow::Result<Dump> {
        self.begin_measuring()?;
        let engine = Engine::new(self.directory, "plain");
        let options = [
            "-t",
            &before.pids[0].to_string(),
            "--tcp-established",
            "--leave-running",
        ];
        let time = engine.run("dump", &options, |_| Ok(()))?;
        let frozen = engine::frozen(&self.directory.join("plain"))?;
        self.say(&format!(
            "[2/5] a plain dump stops the program while its memory is copied: {}; it runs on",
            shown(frozen)
        ))?;
        Ok(Dump {
            time,
            frozen,
            size: engine.size()?,
        })
    }

    /// The longest wait of the client since [`Self::begin_measuring`].
    fn longest_wait(&mut self) -> anyhow::Result<Duration> {
        let answers = self.counters.get(Counter::Answers)?;
        self.wait_for("waiting for answers", |stage| {
            Ok(stage.counters.get(Counter::Answers)? > answers + 64)
        })?;
        let gap = Duration::from_micros(self.counters.get(Counter::LongestGap)?);
        self.begin_measuring()?;
        Ok(gap)
    }

    /// Lets the client measure its waits anew.
    fn begin_measuring(&mut self) -> anyhow::Result<()> {
        let phase = self.counters.get(Counter::Phase)? + 1;
        self.counters.set(Counter::Phase, phase)?;
        self.wait_for("waiting for the client", |stage| {
            Ok(stage.counters.get(Counter::PhaseSeen)? == phase)
        })
    }

    /// The same in rounds, into one archive; the program is gone after it.
    fn dump_in_rounds(&self, before: &Before) -> anyhow::Result<Dump> {
        self.say("[3/5] the same in rounds, while it runs; then a short stop for what is left:")?;
        let engine = Engine::new(self.directory, "rounds");
        let archive = self.archive();
        let archive = archive
            .to_str()
            .context("a directory whose name is no UTF-8")?;
        let work_dir = self.directory.to_str().context("the same")?;
        let options = [
            "-t",
            &before.pids[0].to_string(),
            "--tcp-established",
            "--iterate",
            "--max-freeze",
            "5ms",
            "--compress",
            "zstd:1",
            // Where the statistics stay.
            "-W",
            work_dir,
            "--archive",
            archive,
        ];
        let time = engine.run("dump", &options, |line| self.say(&format!("      {line}")))?;
        self.show_archive()?;
        Ok(Dump {
            time,
            frozen: engine::frozen(self.directory)?,
            size: std::fs::metadata(archive)
                .context("looking at the archive")?
                .len(),
        })
    }

    fn restore(&self) -> anyhow::Result<Duration> {
        let archive = self.archive();
        let archive = archive
            .to_str()
            .context("a directory whose name is no UTF-8")?;
        let options = ["--tcp-established", "--restore-detached", "-i", archive];
        let time = Engine::new(self.directory, "rounds").run("restore", &options, |_| Ok(()))?;
        self.say(&format!(
            "[4/5] restored from the archive in {}",
            seconds(time)
        ))?;
        Ok(time)
    }

    fn archive(&self) -> PathBuf {
        self.directory.join("demo.tar.zst")
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
            std::thread::sleep(Duration::from_millis(20));
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

    /// Shows the tasks in the archive.
    fn show_archive(&self) -> anyhow::Result<()> {
        let images = floe_archive::archive::open_images(&self.archive());
        let summary = Summary::read(&images.context("opening the archive")?);
        for task in summary.context("reading the archive")?.tasks {
            let stored = own::size(task.stored);
            let (pid, threads, comm) = (task.pid, task.threads, task.comm);
            self.say(&format!(
                "      in the archive: {pid} {comm}, threads {threads}, {stored} of pages"
            ))?;
        }
        Ok(())
    }

    fn prove(&self, before: &Before) -> anyhow::Result<()> {
        if !janitor::all_there(self.directory, before.pids[0]) {
            bail!("the processes do not have their old pids");
        }
        if self.connection()? != before.connection {
            bail!("the connection is another one");
        }
        let (answers, wrong) = (
            self.counters.get(Counter::Answers)?,
            self.counters.get(Counter::Wrong)?,
        );
        if wrong > 0 {
            bail!("{wrong} answers were wrong");
        }
        let more = answers - before.answers;
        self.say(&format!(
            "[5/5] it goes on: same pids, same connection, {more} more answers, none wrong"
        ))
    }

    fn table(
        &self,
        dumps: [&Dump; 2],
        restore: Duration,
        gaps: [Duration; 2],
    ) -> anyhow::Result<()> {
        let mut rows = vec![["".to_owned(), "plain dump".into(), "in rounds".into()]];
        let mut row = |name: &str, cells: [String; 2]| {
            let [plain, rounds] = cells;
            rows.push([name.into(), plain, rounds]);
        };
        row(
            "stood still for the dump",
            dumps.map(|dump| shown(dump.frozen)),
        );
        row("dump, all in all", dumps.map(|dump| seconds(dump.time)));
        row("size", dumps.map(|dump| own::size(dump.size)));
        row("restore", ["-".into(), seconds(restore)]);
        self.say("")?;
        for [name, plain, rounds] in rows {
            self.say(&format!("  {name:28} {plain:>12} {rounds:>12}"))?;
        }
        let [plain, rounds] = gaps.map(seconds);
        self.say("")?;
        self.say(&format!(
            "  The client waited {plain} for an answer during the plain dump. During the one in rounds it was\n  \
             gone for {rounds}: until the archive was written and it was restored from it."
        ))
    }
}

fn shown(time: Option<Duration>) -> String {
    time.map_or_else(|| "unknown".into(), seconds)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
