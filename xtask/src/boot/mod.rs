//! `cargo xtask boot`: tests under kernels that this machine does not run.
//!
//! Kernels are Debian's packages, fetched by apt into the user's cache. They run in `qemu-system-x86_64` by
//! software emulation, with everything in an initramfs: no disk, no network, nothing left behind. The
//! binaries are those that cargo built here, at the paths that they have here.

mod apt;
mod cpio;
mod initramfs;
mod kernel;
mod machine;
mod security;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use initramfs::{Initramfs, Peer};
use kernel::Kernel;

/// Which kernels, and what to run inside.
#[derive(clap::Args)]
pub struct Arguments {
    /// A suite of Debian, whose kernel is taken, or the file of a kernel package.
    #[arg(long = "kernel", default_values = ["bookworm", "bookworm-backports"])]
    kernels: Vec<String>,
    /// A CRIU binary for chains that cross; the libraries that it needs go with it.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// The tree that the peer is from, where that is not the running system.
    #[arg(long, requires = "peer")]
    peer_tree: Option<PathBuf>,
    /// Binaries built for release.
    #[arg(long)]
    release: bool,
    /// MiB of memory for the guest.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Chains of the torture test.
    #[arg(long, default_value_t = 6)]
    torture: u32,
    /// A shell command to run inside in place of the sets.
    #[arg(long)]
    command: Option<String>,
    /// More files to take along at the paths that they have here, programs with their libraries.
    #[arg(long = "file")]
    files: Vec<PathBuf>,
    /// More for the command line of the kernel, with `--command`.
    #[arg(long, requires = "command", default_value = "")]
    append: String,
    /// Only these sets: check, chains, faults, torture, cross, apparmor, selinux, fixtures, networks.
    sets: Vec<String>,
}

/// Tests that are run inside by one command.
struct Set {
    name: &'static str,
    /// The test binary that it needs.
    test: Option<&'static str>,
    needs_peer: bool,
    /// Programs of this system that busybox has not, or less of.
    programs: &'static [&'static str],
    /// Under software emulation, with a margin.
    limit: Duration,
    /// `$TEST` is the test binary.
    script: &'static str,
    /// More for the command line of the kernel.
    append: &'static str,
}

/// SELinux in place of AppArmor, which Debian's kernels take without being told.
const SELINUX: &str = "security=selinux enforcing=1";

const SETS: &[Set] = &[
    Set {
        name: "check",
        test: None,
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(60),
        script: "sh /tests/check.sh",
        append: "",
    },
    Set {
        name: "chains",
        test: Some("chains"),
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(900),
        script: "$TEST --test-threads 2",
        append: "",
    },
    Set {
        name: "faults",
        test: Some("chain_faults"),
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(900),
        script: "$TEST --test-threads 2",
        append: "",
    },
    Set {
        name: "torture",
        test: Some("torture"),
        needs_peer: false,
        programs: &[],
        // And for each chain more.
        limit: Duration::from_secs(300),
        script: "FLOE_TORTURE=$TORTURE $TEST --nocapture",
        append: "",
    },
    Set {
        name: "cross",
        test: Some("chains_cross"),
        needs_peer: true,
        programs: &[],
        limit: Duration::from_secs(600),
        script: "$TEST --nocapture",
        append: "",
    },
    Set {
        name: "apparmor",
        test: Some("apparmor"),
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(900),
        script: "$TEST --test-threads 2",
        append: "",
    },
    Set {
        name: "selinux",
        test: Some("selinux"),
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(900),
        // One of them saves all that lies in the memory of the guest, where the others work.
        script: "$TEST --test-threads 1",
        append: SELINUX,
    },
    Set {
        name: "fixtures",
        test: Some("fixtures"),
        needs_peer: false,
        programs: &[],
        limit: Duration::from_secs(1200),
        // The peer sets hardware breakpoints at restore, which make QEMU 7.2 lose a kernel now and then.
        script: "unset FLOE_PEER_CRIU; $TEST --nocapture",
        append: "",
    },
    Set {
        name: "networks",
        test: Some("networks"),
        needs_peer: false,
        programs: &[
            "/usr/sbin/ip",
            "/usr/sbin/bridge",
            "/usr/sbin/sysctl",
            "/usr/bin/nsenter",
            "/usr/bin/unshare",
            "/usr/bin/setsid",
            "/usr/bin/dash",
        ],
        limit: Duration::from_secs(1200),
        // Programs of busybox that run others, a shell among them, prefer its own.
        script: "ln -s dash /usr/bin/sh; echo tcp 6 >/etc/protocols; $TEST --test-threads 1 --nocapture",
        append: "",
    },
];

/// What a chain of the torture test may take under emulation on a machine that others use too.
const CHAIN_LIMIT: Duration = Duration::from_secs(90);

/// What `check` runs.
const CHECK: &str = include_str!("check.sh");

/// One set as the guest runs it.
pub struct Job {
    name: String,
    limit: Duration,
    script: String,
    append: String,
}

/// Boots each kernel and runs the sets; fails when one failed or a kernel did not come to its end.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let sets = chosen(arguments)?;
    let tests: Vec<&str> = sets.iter().filter_map(|set| set.test).collect();
    let built = build(&tests, arguments.release)?;
    let jobs = jobs(arguments, &sets, &built)?;
    let mut failed = Vec::new();
    for name in &arguments.kernels {
        let kernel = Kernel::find(name)?;
        // Each boot has its own command line of the kernel.
        for jobs in jobs.chunk_by(|one, next| one.append == next.append) {
            println!("\n== {} {}", kernel.release, jobs[0].append);
            let wrong = boot(arguments, &kernel, (&built, &sets, jobs))?;
            failed.extend(
                wrong
                    .iter()
                    .map(|set| format!("{set} ({})", kernel.release)),
            );
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn chosen(arguments: &Arguments) -> anyhow::Result<Vec<&'static Set>> {
    if arguments.command.is_some() {
        // With all binaries, for looking around.
        return Ok(SETS.iter().collect());
    }
    for name in &arguments.sets {
        ensure!(
            SETS.iter().any(|set| set.name == name),
            "there is no set `{name}`"
        );
    }
    let wanted = |set: &&Set| match arguments.sets.as_slice() {
        [] => !set.needs_peer || arguments.peer.is_some(),
        names => names.iter().any(|name| name == set.name),
    };
    Ok(SETS.iter().filter(wanted).collect())
}

/// What cargo built: the binary under test, the programs of testkit, and the test binaries by name.
struct Built {
    floe: PathBuf,
    fixture: PathBuf,
    tests: Vec<(String, PathBuf)>,
}

impl Built {
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let tests = self.tests.iter().map(|(_, path)| path);
        [&self.floe, &self.fixture].into_iter().chain(tests)
    }
}

fn build(tests: &[&str], release: bool) -> anyhow::Result<Built> {
    let mut found = Vec::new();
    let binaries = vec![
        "build",
        "--package",
        "floe",
        "--package",
        "testkit",
        "--bins",
    ];
    let mut commands = vec![binaries];
    if !tests.is_empty() {
        let mut words = vec!["test", "--no-run", "--package", "floe"];
        words.extend(tests.iter().flat_map(|test| ["--test", test]));
        commands.push(words);
    }
    for words in commands {
        let mut command = Command::new(crate::cargo());
        command.current_dir(crate::root()).args(words).args([
            "--quiet",
            "--message-format",
            "json",
        ]);
        if release {
            command.arg("--release");
        }
        let output = command.output().context("starting cargo")?;
        ensure!(
            output.status.success(),
            "building failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        found.extend(executables(&output.stdout)?);
    }
    let mut take = |name: &str, is_test: bool| -> anyhow::Result<PathBuf> {
        let at = found
            .iter()
            .position(|(found, test, _)| found == name && *test == is_test)
            .with_context(|| format!("cargo built no `{name}`"))?;
        Ok(found.swap_remove(at).2)
    };
    Ok(Built {
        floe: take("floe", false)?,
        fixture: take("testkit-fixture", false)?,
        tests: tests
            .iter()
            .map(|test| Ok((test.to_string(), take(test, true)?)))
            .collect::<anyhow::Result<_>>()?,
    })
}

/// Name, whether it is a test, and path of everything that cargo's messages name.
fn executables(messages: &[u8]) -> anyhow::Result<Vec<(String, bool, PathBuf)>> {
    let mut found = Vec::new();
    for line in messages.split(|&byte| byte == b'\n') {
        if line.is_empty() {
            continue;
        }
        let message: serde_json::Value =
            serde_json::from_slice(line).context("reading a message of cargo")?;
        let Some(path) = message["executable"].as_str() else {
            continue;
        };
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let is_test = message["profile"]["test"].as_bool().unwrap_or_default();
        found.push((name.to_string(), is_test, PathBuf::from(path)));
    }
    Ok(found)
}

fn jobs(arguments: &Arguments, sets: &[&Set], built: &Built) -> anyhow::Result<Vec<Job>> {
    if let Some(command) = &arguments.command {
        return Ok(vec![Job {
            name: "command".into(),
            limit: Duration::from_secs(1800),
            script: command.clone(),
            append: arguments.append.clone(),
        }]);
    }
    let job = |set: &&Set| {
        let path = match set.test {
            None => "",
            Some(name) => {
                let test = built.tests.iter().find(|(test, _)| test == name);
                let (_, path) = test.context("a test that was built")?;
                path.to_str().context("a path that is text")?
            }
        };
        let chains = match set.name {
            "torture" => arguments.torture,
            _ => 0,
        };
        Ok(Job {
            name: set.name.into(),
            limit: set.limit + CHAIN_LIMIT * chains,
            script: format!("TEST={path} TORTURE={}; {}", arguments.torture, set.script),
            append: set.append.into(),
        })
    };
    sets.iter().map(job).collect()
}

/// Runs the jobs under one kernel; answers which failed.
fn boot(
    arguments: &Arguments,
    kernel: &Kernel,
    (built, sets, jobs): (&Built, &[&Set], &[Job]),
) -> anyhow::Result<Vec<String>> {
    let directory = tempfile::tempdir()?;
    let mut image = Initramfs::new(directory.path());
    for file in built.files() {
        image.program(file)?;
    }
    for file in &arguments.files {
        image.file(file)?;
    }
    let of_sets = sets.iter().flat_map(|set| set.programs).map(Path::new);
    for program in of_sets.filter(|program| program.exists()) {
        image.program(program)?;
    }
    let floe = built.floe.to_str().context("a path that is text")?;
    let mut peer_path = None;
    if let Some(path) = &arguments.peer {
        let tree = arguments.peer_tree.as_deref().unwrap_or(Path::new("/"));
        peer_path = Some(image.peer(&Peer { path, tree })?);
    }
    image.kernel_modules(kernel)?;
    image.text("/tests/check.sh", 0o755, CHECK)?;
    security::apparmor(&mut image)?;
    security::selinux(&mut image)?;
    image.system(floe, peer_path.as_deref(), jobs)?;
    let initrd = image.write()?;
    let wrong = machine::run(kernel, &initrd, arguments.memory, jobs)?;
    if wrong.len() == jobs.len() && jobs.len() > 1 {
        bail!("every set failed under {}", kernel.release);
    }
    Ok(wrong)
}
