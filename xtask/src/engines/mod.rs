//! `cargo xtask engines`: container engines with our binary as their `criu`, one line for each scenario.
//!
//! The scenarios are shell scripts: what they test is a command line. Engines of the stable release run on
//! this machine as they are, newer ones in a tree of Debian's unstable release ([`sid`]), in a mount
//! namespace of their own.

pub mod console;
pub mod sid;
mod table;
pub mod tick;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// Which scenarios, and with what.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only this engine.
    #[arg(long)]
    engine: Option<String>,
    /// The binary; ours, built for release, by default.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Write the results to docs/engines.md.
    #[arg(long)]
    write: bool,
    /// Only these scenarios.
    names: Vec<String>,
}

/// Where an engine is found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Here,
    Sid,
}

struct Engine {
    /// As it is asked for and shown.
    name: &'static str,
    /// Its command.
    command: &'static str,
    place: Where,
    /// Packages that bring it.
    packages: &'static [&'static str],
    script: &'static str,
}

const OCI: &str = include_str!("oci.sh");
const PODMAN: &str = include_str!("podman.sh");
const DOCKER: &str = include_str!("docker.sh");
const CONTAINERD: &str = include_str!("containerd.sh");
const LIBCRIU: &str = include_str!("libcriu.sh");
/// A program of its own for `libcriu.sh`.
const LIBCRIU_CALLER: &str = include_str!("libcriu.c");
/// Real servers and their clients, for the scripts above.
const SERVERS: &str = include_str!("servers.sh");
/// What the scripts of podman, docker and containerd share.
const COUNTING: &str = include_str!("counting.sh");
const LAST_WORDS: usize = 12;
/// A script ends with this where it cannot be tried.
const SKIPPED: i32 = 77;
/// A script ends with this where the engine itself is at fault, whatever its `criu` does.
const FAULT: i32 = 78;
const LIMIT: Duration = Duration::from_secs(90);

const ENGINES: &[Engine] = &[
    Engine {
        name: "runc-here",
        command: "runc",
        place: Where::Here,
        packages: &["runc"],
        script: OCI,
    },
    Engine {
        name: "runc-sid",
        command: "runc",
        place: Where::Sid,
        packages: &["runc"],
        script: OCI,
    },
    Engine {
        name: "crun",
        command: "crun",
        place: Where::Sid,
        packages: &["crun", "libcriu2"],
        script: OCI,
    },
    Engine {
        name: "podman-here",
        command: "podman --runtime runc",
        place: Where::Here,
        packages: &["podman", "runc"],
        script: PODMAN,
    },
    Engine {
        name: "podman-runc",
        command: "podman --runtime runc",
        place: Where::Sid,
        packages: &["podman", "runc", "conmon", "netavark", "nftables"],
        script: PODMAN,
    },
    Engine {
        name: "podman-crun",
        command: "podman --runtime crun",
        place: Where::Sid,
        packages: &[
            "podman", "crun", "libcriu2", "conmon", "netavark", "nftables",
        ],
        script: PODMAN,
    },
    Engine {
        name: "docker",
        command: "docker",
        place: Where::Sid,
        packages: &["docker.io", "docker-cli", "containerd", "runc", "iptables"],
        script: DOCKER,
    },
    Engine {
        name: "containerd",
        command: "ctr",
        place: Where::Sid,
        packages: &["containerd", "runc"],
        script: CONTAINERD,
    },
    Engine {
        name: "libcriu",
        command: "gcc",
        place: Where::Sid,
        packages: &["libcriu-dev", "python3-pycriu", "gcc", "libc6-dev"],
        script: LIBCRIU,
    },
];

/// How a scenario ended.
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
    Fault(String),
}

impl Verdict {
    fn text(&self, seconds: f64) -> String {
        match self {
            Self::Passed => format!("ok ({seconds:.1} s)"),
            Self::Fault(why) => why.clone(),
            Self::Skipped(why) => format!("skipped: {why}"),
            Self::Failed(why) => format!("FAILED: {why}"),
        }
    }
}

/// Runs the scenarios one after the other.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let binary = match (&arguments.binary, std::env::var_os("FLOE_BIN")) {
        (Some(path), _) => std::path::absolute(path)?,
        (None, Some(path)) => std::path::absolute(path)?,
        (None, None) => crate::build_release("floe", "floe")?,
    };
    let wanted = |engine: &&Engine| {
        let asked = arguments.engine.as_deref();
        asked.is_none_or(|asked| {
            engine.name.split('-').next() == Some(asked) || engine.name == asked
        })
    };
    let engines: Vec<&Engine> = ENGINES.iter().filter(wanted).collect();
    ensure!(!engines.is_empty(), "no such engine");
    let mut results = Vec::new();
    for engine in engines {
        let stage = match Stage::prepare(engine, &binary) {
            Ok(stage) => stage,
            Err(error) => {
                println!("{} skipped: {error:#}", engine.name);
                continue;
            }
        };
        for scenario in scenarios(engine.script) {
            if !arguments.names.is_empty() && !arguments.names.iter().any(|name| name == scenario) {
                continue;
            }
            let started = Instant::now();
            let verdict = stage.run(engine, scenario)?;
            let took = started.elapsed().as_secs_f64();
            println!("{} {scenario}: {}", engine.name, verdict.text(took));
            results.push(table::Ran {
                engine: engine.name,
                scenario,
                verdict,
            });
        }
    }
    if arguments.write {
        table::write(&results)?;
    }
    let failed = |ran: &&table::Ran| matches!(ran.verdict, Verdict::Failed(_));
    let (failures, total) = (results.iter().filter(failed).count(), results.len());
    ensure!(failures == 0, "{failures} of {total} scenarios failed");
    Ok(())
}

/// The scenarios of a script, in its order.
fn scenarios(script: &'static str) -> impl Iterator<Item = &'static str> {
    script
        .lines()
        .filter_map(|line| line.strip_prefix("scenario_")?.split_once("()"))
        .map(|(name, _)| name)
}

/// A directory with what the scenarios need, and how commands are run.
struct Stage {
    directory: tempfile::TempDir,
    root: Option<PathBuf>,
}

impl Stage {
    fn prepare(engine: &Engine, binary: &Path) -> anyhow::Result<Self> {
        let root = match engine.place {
            Where::Here => None,
            Where::Sid => Some(sid::tree(&[engine.packages, of_servers(engine)].concat())?),
        };
        // Podman takes no directory with a longer name than 50 bytes.
        let directory = tempfile::Builder::new().prefix("floe-").tempdir()?;
        stage_files(directory.path(), &[("scenario.sh", engine.script)])?;
        fs::copy(binary, directory.path().join("criu")).context("copying the binary")?;
        let stage = Self { directory, root };
        let program = engine.command.split(' ').next().unwrap_or_default();
        if stage.root.is_none() && !in_path(program) {
            bail!(
                "{program} is not installed: apt-get install {}",
                engine.packages.join(" ")
            );
        }
        Ok(stage)
    }

    fn run(&self, engine: &Engine, scenario: &str) -> anyhow::Result<Verdict> {
        let directory = self.directory.path();
        let inner = match self.root {
            None => directory.to_path_buf(),
            Some(_) => PathBuf::from("/run/floe-engines"),
        };
        let mut command = match &self.root {
            None => here(directory),
            Some(root) => sid::enter(root, directory, &inner),
        };
        let line = format!(
            "mkdir {scenario} && cd {scenario} && sh ../scenario.sh {scenario}; end=$?; cd ..; \
             [ -n \"${{KEEP:-}}\" ] || rm -rf {scenario}; exit $end"
        );
        let path = std::env::var("PATH").unwrap_or_default();
        let output = directory.join("scenario.log");
        let file = fs::File::create(&output)?;
        command
            .args(["-c", &format!("cd {} && {line}", inner.display())])
            .env(
                "PATH",
                format!("{}:/usr/sbin:/usr/bin:/sbin:/bin:{path}", inner.display()),
            )
            .env("ENGINE", engine.command)
            .env("XTASK", inner.join("xtask"))
            .env("BUSYBOX", inner.join("busybox"))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let mut child = command.spawn().context("starting a scenario")?;
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if started.elapsed() > LIMIT {
                child.kill()?;
                child.wait()?;
                return Ok(Verdict::Failed(format!("took more than {LIMIT:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        remove_groups();
        let said = fs::read_to_string(&output).unwrap_or_default();
        let lines: Vec<&str> = said
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let shown = lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n    ");
        Ok(match status.code() {
            Some(0) => Verdict::Passed,
            Some(SKIPPED) => Verdict::Skipped(shown),
            Some(FAULT) => Verdict::Fault(shown),
            _ => Verdict::Failed(shown),
        })
    }
}

/// Puts what scripts need into `directory`: this program, busybox, servers, and `scripts` by name.
pub fn stage_files(directory: &Path, scripts: &[(&str, &str)]) -> anyhow::Result<()> {
    let own = std::env::current_exe().context("finding our own binary")?;
    fs::copy(own, directory.join("xtask")).context("copying xtask")?;
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().map(Path::new);
    let busybox = busybox
        .filter(|path| is_static(path))
        .find(|path| path.exists())
        .context("busybox is not installed: apt-get install busybox-static")?;
    fs::copy(busybox, directory.join("busybox")).context("copying busybox")?;
    let common = [
        ("servers.sh", SERVERS),
        ("counting.sh", COUNTING),
        ("libcriu.c", LIBCRIU_CALLER),
    ];
    for (name, text) in common.iter().chain(scripts) {
        fs::write(directory.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    // Containers with users of their own must reach their files.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// A shell on this machine, whose networks and mounts nobody else sees.
fn here(directory: &Path) -> Command {
    const SCRIPT: &str = r#"mount -t proc proc /proc; "$1" ip link set lo up; shift; exec sh "$@""#;
    let mut command = alone(SCRIPT);
    command.arg(directory.join("busybox"));
    command
}

/// A shell that runs `script`, whose arguments are to be added, with mounts, networks and pids of its own:
/// all that it starts, daemons too, ends with it, however that comes.
fn alone(script: &str) -> Command {
    const NAMESPACES: [&str; 6] = [
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--propagation=private",
    ];
    let mut command = Command::new("unshare");
    command.args(NAMESPACES).args(["sh", "-c", script, "sh"]);
    command
}

/// Packages of the servers, where the engine's script runs them.
fn of_servers(engine: &Engine) -> &'static [&'static str] {
    if engine.script.contains("/servers.sh") {
        &["redis-server", "nginx-light", "postgresql", "libc-bin"]
    } else {
        &[]
    }
}

/// Control groups of hierarchies that the engine does not see: a restore makes them in all.
fn remove_groups() {
    let below = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories.map(|entry| entry.path()).collect()
    };
    let hierarchies = below(Path::new("/sys/fs/cgroup"));
    let tops = hierarchies.iter().flat_map(|hierarchy| below(hierarchy));
    for top in tops {
        let name = top.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("floe-") && name != "libpod_parent" && name != "docker" {
            continue;
        }
        for group in below(&top).into_iter().chain([top]) {
            // One that is not empty belongs to somebody else's run.
            let _ = fs::remove_dir(group);
        }
    }
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).exists())
}

/// Only a program without libraries runs in a root that holds nothing else.
fn is_static(program: &Path) -> bool {
    let output = Command::new("ldd").arg(program).output();
    output.is_ok_and(|output| !output.status.success())
}
