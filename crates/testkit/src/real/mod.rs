//! Programs that people run, through a dump and a restore, judged by their own clients.

mod postgres;
mod runtimes;
mod servers;
mod shells;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::process;
use crate::{Engine, skips};

/// How long a program may take to start or to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// A real program: what must be installed, and its test.
pub struct RealProgram {
    /// Its name in tables.
    pub name: &'static str,
    /// Commands that must be there.
    needs: &'static [&'static str],
    run: fn(&Engines<'_>) -> anyhow::Result<()>,
}

/// Who dumps and who restores.
pub struct Engines<'a> {
    /// Dumps.
    pub dumper: &'a Engine,
    /// Restores.
    pub restorer: &'a Engine,
}

/// All real programs.
pub const PROGRAMS: &[RealProgram] = &[
    RealProgram {
        name: "redis",
        needs: &["redis-server"],
        run: servers::redis,
    },
    RealProgram {
        name: "memcached",
        needs: &["memcached"],
        run: servers::memcached,
    },
    RealProgram {
        name: "nginx",
        needs: &["nginx"],
        run: servers::nginx,
    },
    RealProgram {
        name: "postgresql",
        needs: &["initdb", "postgres", "psql", "setpriv"],
        run: postgres::run,
    },
    RealProgram {
        name: "python3",
        needs: &["python3"],
        run: runtimes::python,
    },
    RealProgram {
        name: "node",
        needs: &["node"],
        run: runtimes::node,
    },
    RealProgram {
        name: "java",
        needs: &["javac", "java"],
        run: runtimes::java,
    },
    RealProgram {
        name: "pipeline",
        needs: &["sh", "sed"],
        run: shells::pipeline,
    },
    RealProgram {
        name: "tmux",
        needs: &["tmux"],
        run: shells::tmux,
    },
];

impl RealProgram {
    /// Runs it: dump by one engine, restore by the other. The error is
    /// [`crate::program::Missing`] where something is not installed.
    pub fn cycle(&self, dumper: &Engine, restorer: &Engine) -> anyhow::Result<()> {
        for command in self.needs {
            if find(command).is_none() {
                return Err(skips::missing(format!("{command} is not installed")));
            }
        }
        (self.run)(&Engines { dumper, restorer })
    }
}

/// Where a command is, also where only root looks and where Debian hides those of PostgreSQL.
fn find(command: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin".into(), "/sbin".into()]);
    for version in fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
    {
        places.push(version.path().join("bin"));
    }
    let found = places.into_iter().map(|place| place.join(command));
    found.into_iter().find(|path| path.exists())
}

/// A command by its full path, in a session of its own and without our environment. It replaces
/// `setsid`, so that its pid is the one that was started.
fn detached(command: &str) -> anyhow::Result<Command> {
    let path = find(command).with_context(|| format!("{command} is not installed"))?;
    let mut detached = Command::new("setsid");
    detached
        .arg(path)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", "/tmp");
    Ok(detached)
}

/// A directory that every user can use.
fn place() -> anyhow::Result<TempDir> {
    let directory = tempfile::Builder::new().prefix("floe-real-").tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))?;
    Ok(directory)
}

/// A running program and all that descends from it; dropping it kills them.
struct Tree {
    root: i32,
    pids: Vec<i32>,
    images: TempDir,
    output: PathBuf,
}

impl Tree {
    /// Starts a command with its output in a file of `directory`.
    fn start(mut command: Command, directory: &Path) -> anyhow::Result<Self> {
        process::adopt_orphans()?;
        let output = directory.join("output");
        let file = File::create(&output)?;
        let child = command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        Self::of(child.id() as i32, output)
    }

    /// Takes over what runs already.
    fn of(root: i32, output: PathBuf) -> anyhow::Result<Self> {
        Ok(Self {
            root,
            pids: vec![root],
            images: tempfile::Builder::new().prefix("floe-images-").tempdir()?,
            output,
        })
    }

    /// Dumps, waits for the end of all tasks, restores.
    fn pass_through(&mut self, engines: &Engines<'_>, options: &[&str]) -> anyhow::Result<()> {
        self.pids = process::family(self.root);
        let images = self.images.path().join("images");
        fs::create_dir_all(&images)?;
        let dumper = engines.dumper;
        let dump = dumper.dump(self.root, &images, options)?;
        dump.ok(&format!("dump by {}", dumper.name))?;
        process::wait_for_ends(&self.pids, LIMIT).context("after the dump")?;
        // Tasks that the tree started since we looked.
        let late = process::orphans(self.root);
        process::wait_for_ends(&late, LIMIT).context("after the dump")?;
        let restorer = engines.restorer;
        let restore = restorer.restore(&images, options)?;
        restore.ok(&format!("restore by {}", restorer.name))?;
        let now = process::family(self.root);
        ensure!(now.contains(&self.root), "the root is not back");
        self.pids.extend(now);
        Ok(())
    }

    /// Asks the root to end (`SIGTERM`), and waits until all tasks have.
    fn end(&mut self) -> anyhow::Result<()> {
        self.pids.extend(process::family(self.root));
        let root = Pid::from_raw(self.root).context("a pid")?;
        kill_process(root, Signal::TERM)?;
        process::wait_for_ends(&self.pids, LIMIT).context("asked to end")
    }

    fn said(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap_or_default();
        text.lines().rev().take(5).collect::<Vec<_>>().join(" | ")
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.pids.extend(process::family(self.root));
        if let Err(error) = process::kill_ours(&self.pids, LIMIT) {
            eprintln!("testkit: cleaning up: {error:#}");
        }
    }
}

/// Options for programs with connections; nftables because the older tools may be missing.
const CONNECTED: [&str; 4] = [
    "--tcp-established",
    "--network-lock",
    "nftables",
    "--file-locks",
];

/// A port that nobody uses now.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// Tries until it succeeds; the last error if it does not in time.
fn eventually<T>(mut attempt: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => return Err(error),
            // Nothing announces what we wait for; the pause only spares the processor.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// A connection that stays open through the dump and the restore.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects, as soon as the program listens.
    fn connect(port: u16, tree: &Tree) -> anyhow::Result<Self> {
        let stream = eventually(|| {
            ensure!(
                process::exists(tree.root),
                "the program ended: {}",
                tree.said()
            );
            Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?)
        });
        let stream = stream.with_context(|| format!("connecting: {}", tree.said()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let result = self.stream.get_mut().write_all(text.as_bytes());
        result.context("sending over the kept connection")
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line);
        let length = length.context("waiting for an answer over the kept connection")?;
        if length == 0 {
            bail!("the kept connection was closed");
        }
        Ok(line.trim_end().to_owned())
    }

    fn bytes(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        let read = self.stream.read_exact(&mut bytes);
        read.context("reading over the kept connection")?;
        Ok(bytes)
    }

    /// One question, one line of answer.
    fn ask(&mut self, text: &str) -> anyhow::Result<String> {
        self.send(text)?;
        self.line()
    }
}
