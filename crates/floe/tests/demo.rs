//! `floe demo`: the whole story, and that it leaves nothing behind.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn demo(directory: &Path, size: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command
        .args(["demo", "--size", size, "--directory"])
        .arg(directory)
        .stdin(Stdio::null());
    command
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

/// Processes whose command line names the directory.
fn left_behind(directory: &Path) -> usize {
    let wanted = directory.as_os_str().as_encoded_bytes();
    let names = |entry: &std::fs::DirEntry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line.windows(wanted.len()).any(|window| window == wanted)
    };
    std::fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter(names)
        .count()
}

#[test]
fn server_client_and_connection_go_on_after_the_restore() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = demo(directory.path(), "16")
        .output()
        .expect("the binary runs");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(output.status.code(), Some(0), "{out}{err}");
    assert!(
        out.contains("same pids, same connection") && out.contains("none wrong"),
        "{out}"
    );
    for part in [
        "[2/5] a plain dump",
        "round 0",
        "stopped after",
        "[4/5] restored from the archive",
        "stood still",
    ] {
        assert!(out.contains(part), "`{part}` is not in: {out}");
    }
    assert_eq!(
        std::fs::read_dir(directory.path())
            .expect("our own directory")
            .count(),
        0
    );
    assert_eq!(left_behind(directory.path()), 0);
}

#[test]
fn a_killed_demo_is_cleaned_up() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut child = demo(directory.path(), "64")
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let deadline = Instant::now() + Duration::from_secs(20);
    // The demo itself, its janitor, root, server and client.
    while left_behind(directory.path()) < 5 {
        assert!(Instant::now() < deadline, "the demo did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("our own child");
    child.wait().expect("our own child");
    while left_behind(directory.path()) > 0
        || std::fs::read_dir(directory.path()).is_ok_and(|mut left| left.next().is_some())
    {
        assert!(Instant::now() < deadline, "something is left behind");
        std::thread::sleep(Duration::from_millis(5));
    }
}
