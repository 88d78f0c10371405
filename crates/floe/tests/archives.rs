//! A live program, its chain made by hand, and every way back from an archive. Needs root; says
//! `skipped` without.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use testkit::chain::split_dump;

fn floe(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.current_dir(directory).args(line.split_whitespace());
    command
}

fn done(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
}

fn run(directory: &Path, line: &str) {
    done(&floe(directory, line).output().expect("the binary runs"));
}

/// A shell that answers each line with what it remembers in its memory.
struct Counter(Child);

const SCRIPT: &str = "x=0; big=$(head -c 300000 /dev/zero | tr '\\0' q); \
    while :; do x=$((x+1)); echo \"$x ${#big}\" >out.new; mv out.new out; sleep 0.05; done";

impl Counter {
    fn start(directory: &Path) -> Counter {
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", SCRIPT]).current_dir(directory);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Counter(command.spawn().expect("setsid is part of every system"))
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the program has counted to; it goes on from where it was.
fn count(directory: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(directory.join("out")).ok()?;
    let (number, length) = text.trim().split_once(' ')?;
    assert_eq!(length, "300000");
    number.parse().ok()
}

/// Waits until the program has counted beyond `number`.
fn beyond(directory: &Path, number: u64) -> u64 {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        if let Some(found) = count(directory).filter(|found| *found > number) {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "it does not count");
        std::thread::yield_now();
    }
}

/// Ends a restored tree: the shell leads a session of its own.
fn end(directory: &Path) {
    let text = std::fs::read_to_string(directory.join("pid")).expect("the pidfile");
    let pid = rustix::process::Pid::from_raw(text.parse().expect("a pid")).expect("a pid");
    let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    let stat = format!("/proc/{text}");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while Path::new(&stat).exists() {
        assert!(std::time::Instant::now() < deadline, "nobody reaps it");
        // Init reaps it; in a container of ours nobody may, and a zombie holds the pid.
        let _ = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        std::thread::yield_now();
    }
}

/// The directories of a chain of three generations of a counting shell, which is ended.
fn chain(root: &Path) -> (Vec<PathBuf>, u64) {
    let counter = Counter::start(root);
    beyond(root, 3);
    std::fs::create_dir(root.join("full")).expect("made");
    run(root, &format!("dump -t {} -D full", counter.0.id()));
    let reached = count(root).expect("it wrote");
    drop(counter);
    (
        split_dump(&root.join("full"), root, 3).expect("a chain"),
        reached,
    )
}

#[test]
fn a_chain_and_all_that_is_made_of_it_restore_to_the_same_program() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let root = tempfile::tempdir().expect("a directory");
    let root = root.path();
    let (_, mut reached) = chain(root);
    run(root, "pack 2 -o whole.tar.zst");
    run(root, "pack 0 -o base");
    run(root, "pack 2 --since 0 -o increment");
    run(root, "squash 2 -o squashed");
    copy_compressed(&root.join("squashed"), &root.join("compressed"));
    run(root, "unpack whole.tar.zst -C unpacked");
    run(root, "unpack increment base -C both");
    let first = reached;
    for line in [
        "-D 2",
        "-i whole.tar.zst",
        "-i increment -i base",
        "-D squashed",
        "-D unpacked",
        "-D both",
        "-D compressed",
    ] {
        let line = format!(
            "restore --no-default-config -d --pidfile {}/pid -W {} {line}",
            root.display(),
            root.display()
        );
        std::fs::remove_file(root.join("out")).expect("there");
        run(root, &line);
        let now = beyond(root, 0);
        assert!(
            now > first && now < first + 100,
            "{line}: {now} after {first}"
        );
        reached = reached.max(now);
        end(root);
    }
    restore_from_standard_input(root, first);
}

/// A copy with compressed pages.
fn copy_compressed(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp").success());
    floe_archive::compress::compress(to, floe_image::frames::Codec::Lz4, 2).expect("compressed");
}

/// By a pipe, which cannot be read twice.
fn restore_from_standard_input(root: &Path, first: u64) {
    let mut cat = Command::new("cat");
    let archive = File::open(root.join("whole.tar.zst")).expect("packed");
    let mut cat = cat
        .stdin(archive)
        .stdout(Stdio::piped())
        .spawn()
        .expect("cat");
    let line = "restore --no-default-config -d --pidfile pid -i -";
    std::fs::remove_file(root.join("out")).expect("there");
    let mut command = floe(root, line);
    done(
        &command
            .stdin(cat.stdout.take().expect("piped"))
            .output()
            .expect("the binary runs"),
    );
    cat.wait().expect("our own child");
    assert!(beyond(root, first) > first);
    end(root);
}
