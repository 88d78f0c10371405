//! Cleans up after the demo, whatever became of it: a process that waits until the demo's end
//! of a pipe is closed, by the demo or by its death.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use super::program::{part, read_pids};

/// The demo's end. Dropping it cleans up, too, but does not wait.
pub struct Janitor(Child);

impl Janitor {
    /// Starts the process for the demo in `directory`.
    pub fn start(directory: &Path) -> anyhow::Result<Self> {
        let mut command = part(&["janitor", "0"], directory)?;
        command
            .stdin(Stdio::piped())
            .spawn()
            .map(Self)
            .context("starting the demo's janitor")
    }

    /// Tells it to clean up and waits until all is gone.
    pub fn finish(mut self) -> anyhow::Result<()> {
        drop(self.0.stdin.take());
        self.0
            .wait()
            .map(drop)
            .context("waiting for the demo's janitor")
    }
}

/// The janitor's own life.
pub fn run(directory: &Path) -> anyhow::Result<()> {
    // Ctrl-C at the terminal is for the demo, and must not end who cleans up behind it.
    rustix::process::setsid().context("making a session")?;
    let mut nothing = Vec::new();
    // An error means the same as the end: nobody is there any more.
    let _ = std::io::stdin().read_to_end(&mut nothing);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left = processes(directory);
        if left.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in left {
            // Gone in the meantime is as good.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))
}

/// The demo's program, each process by its command line, which name the directory. A pid alone could be
/// somebody else's by now. A zombie has no command line.
pub fn processes(directory: &Path) -> Vec<Pid> {
    let wanted = directory.as_os_str().as_encoded_bytes();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let belongs = |pid: u32| {
        let line = std::fs::read(PathBuf::from(format!("/proc/{pid}/cmdline"))).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"demo-part")
            && words.next() != Some(b"janitor")
            && words.any(|word| word == wanted)
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| belongs(*pid))
        .filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
        .collect()
}

/// Whether root, server and client are all there under these pids.
pub fn all_there(directory: &Path, root: u32) -> bool {
    let Some([server, client]) = read_pids(directory) else {
        return false;
    };
    let found: Vec<i32> = processes(directory)
        .iter()
        .map(|pid| pid.as_raw_nonzero().get())
        .collect();
    [root, server, client]
        .iter()
        .all(|pid| i32::try_from(*pid).is_ok_and(|pid| found.contains(&pid)))
}
