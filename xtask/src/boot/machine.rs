//! The emulated machine, and what the guest says on its second serial line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::Job;
use super::kernel::Kernel;

const QEMU: &str = "qemu-system-x86_64";
/// From power on to the first word.
const BOOT: Duration = Duration::from_secs(120);
/// Lines of the kernel that are shown when something went wrong.
const LAST_WORDS: usize = 25;

/// An emulator that ends with us, however we end.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots and prints what the jobs print; answers the names of those that failed.
pub fn run(
    kernel: &Kernel,
    initrd: &Path,
    memory: u32,
    jobs: &[Job],
) -> anyhow::Result<Vec<String>> {
    let console = initrd.with_file_name("console");
    let append = jobs.first().map_or("", |job| &job.append);
    let mut machine = start(kernel, initrd, memory, append)?;
    let output = machine.0.stdout.take().context("standard output")?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line);
            if sender.send(line.trim_end().to_string()).is_err() {
                break;
            }
        }
    });
    let mut results = Results::new(jobs);
    let mut deadline = Instant::now() + BOOT;
    while !results.ended {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => {
                if let Some(limit) = results.hear(&line) {
                    deadline = Instant::now() + limit;
                }
            }
            Err(why) => {
                drop(machine);
                return Err(results.silence(why, &console));
            }
        }
    }
    Ok(results.failed)
}

fn start(kernel: &Kernel, initrd: &Path, memory: u32, append: &str) -> anyhow::Result<Machine> {
    let console = initrd.with_file_name("console");
    // Killed with us even where we cannot do it any more.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", QEMU]);
    // Five levels of page tables are more than older peers know; cmpxchg16b of QEMU 7.2 breaks Linux 6.12.
    command.args([
        "-accel",
        "tcg",
        "-cpu",
        "max,la57=off,cx16=off",
        "-smp",
        "2",
    ]);
    command.args(["-m", &memory.to_string(), "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-no-reboot", "-nic", "none"]);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    command.args(["-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.image);
    command.arg("-initrd").arg(initrd);
    let append = format!("console=ttyS0 panic=-1 rdinit=/init {append}");
    command.args(["-append", &append]);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("starting {QEMU} (package qemu-system-x86)"))?;
    Ok(Machine(child))
}

/// What was heard so far.
struct Results<'a> {
    jobs: &'a [Job],
    running: Option<(String, Instant)>,
    passed: usize,
    failed: Vec<String>,
    ended: bool,
}

impl<'a> Results<'a> {
    fn new(jobs: &'a [Job]) -> Self {
        Results {
            jobs,
            running: None,
            passed: 0,
            failed: Vec::new(),
            ended: false,
        }
    }

    /// Takes in a line; answers how long to wait for the next where that changes.
    fn hear(&mut self, line: &str) -> Option<Duration> {
        let Some(word) = line.strip_prefix("@@") else {
            println!("  {line}");
            return None;
        };
        match word.split(' ').collect::<Vec<_>>().as_slice() {
            ["begin", name] => {
                println!("-- {name}");
                self.running = Some((name.to_string(), Instant::now()));
                let job = self.jobs.iter().find(|job| job.name == *name)?;
                Some(job.limit + BOOT)
            }
            ["end", name, status] => {
                let (_, began) = self.running.take()?;
                let seconds = began.elapsed().as_secs();
                if *status == "0" {
                    self.passed += 1;
                    println!("-- {name}: passed, {seconds} s");
                } else {
                    self.failed.push(name.to_string());
                    println!("-- {name}: FAILED, status {status}, {seconds} s");
                }
                Some(BOOT)
            }
            ["done"] => {
                self.ended = self.passed + self.failed.len() == self.jobs.len();
                None
            }
            _ => None,
        }
    }

    /// The error of a guest that says nothing more.
    fn silence(&self, why: RecvTimeoutError, console: &Path) -> anyhow::Error {
        let what = match (&self.running, why) {
            (Some((name, _)), RecvTimeoutError::Timeout) => format!("{name} does not end"),
            (Some((name, _)), _) => format!("the machine stopped during {name}"),
            (None, RecvTimeoutError::Timeout) => "the machine does not come up".to_string(),
            (None, _) => "the machine stopped early".to_string(),
        };
        let said = fs::read(console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n");
        anyhow::anyhow!("{what}; the kernel's last words:\n{last}")
    }
}
