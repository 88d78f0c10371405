//! A live program, its chains by pre-dumps and by rounds, and every way back from an archive. Needs
//! root; says `skipped` without.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn floe(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.current_dir(directory).args(line.split_whitespace());
    command
}

fn done(output: &Output) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
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
    reap();
}

/// Held by a test that waits for any child.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Waits for all children, among them those that lost their parent: a zombie holds its pid.
fn reap() {
    use rustix::process::{WaitOptions, wait};
    while wait(WaitOptions::empty()).is_ok() {}
}

/// Chains of a counting shell, which is ended: generations `0` to `3`, and `rounds` in one directory.
/// The number is what it had reached before the last dumps.
fn chains(root: &Path) -> u64 {
    let counter = Counter::start(root);
    let pid = counter.0.id();
    let mut reached = beyond(root, 3);
    for number in 0..3 {
        std::fs::create_dir(root.join(number.to_string())).expect("made");
        let previous = match number {
            0 => String::new(),
            _ => format!("--prev-images-dir ../{}", number - 1),
        };
        run(root, &format!("pre-dump -t {pid} -D {number} {previous}"));
        reached = beyond(root, reached);
    }
    for directory in ["3", "rounds"] {
        std::fs::create_dir(root.join(directory)).expect("made");
    }
    let line = "--track-mem --leave-running -D 3 --prev-images-dir ../2";
    run(root, &format!("dump -t {pid} {line}"));
    let line = "--leave-running --iterate=1 --archive iterated.tar.zst";
    run(root, &format!("dump -t {pid} {line}"));
    let line = "--leave-running --archive direct.tar.zst";
    run(root, &format!("dump -t {pid} {line}"));
    run(root, &format!("dump -t {pid} -D rounds --iterate=2"));
    reap();
    reached
}

#[test]
fn a_chain_and_all_that_is_made_of_it_restore_to_the_same_program() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let _alone = ALONE.lock().expect("the other test succeeded");
    testkit::process::adopt_orphans().expect("allowed to everybody");
    let root = tempfile::tempdir().expect("a directory");
    let root = root.path();
    let first = chains(root);
    run(root, "pack 3 -o whole.tar.zst");
    run(root, "pack rounds -o rounds.tar.zst");
    run(root, "pack 0 -o base");
    run(root, "pack 1 --since 0 -o first");
    run(root, "pack 3 --since 1 -o second");
    run(root, "squash 3 -o squashed");
    copy_compressed(&root.join("squashed"), &root.join("compressed"));
    run(root, "unpack whole.tar.zst -C unpacked");
    run(root, "unpack second base first -C all");
    run(root, "unpack direct.tar.zst -C direct");
    for path in [
        "whole.tar.zst",
        "rounds.tar.zst",
        "iterated.tar.zst",
        "direct.tar.zst",
        "direct",
        "3",
        "rounds",
        "squashed",
        "compressed",
        "unpacked",
        "all",
    ] {
        run(root, &format!("verify {path}"));
    }
    let output = floe(root, "restore -i second -i base")
        .output()
        .expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(text.contains("Generation 1 is missing"), "{text}");
    for line in [
        "-D 3",
        "-D rounds",
        "-i whole.tar.zst",
        "-i rounds.tar.zst",
        "-i iterated.tar.zst",
        "-i direct.tar.zst",
        "-D direct",
        "-i second -i base -i first",
        "-D squashed",
        "-D unpacked",
        "-D all",
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
            now >= first && now < first + 200,
            "{line}: {now} after {first}"
        );
        end(root);
    }
    for archive in ["whole.tar.zst", "direct.tar.zst"] {
        restore_from_standard_input(root, archive, first);
    }
    // Pages that are given back make no other generation of it.
    run(root, "dedup --no-default-config -D 3");
    run(root, "verify 3");
    run(root, "pack 3 --since 1 -o again");
    run(
        root,
        "restore --no-default-config --dry-run -i again -i first -i base",
    );
}

#[test]
fn an_archive_that_cannot_be_written_leaves_the_program_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let _alone = ALONE.lock().expect("the other test succeeded");
    testkit::process::adopt_orphans().expect("allowed to everybody");
    let root = tempfile::tempdir().expect("a directory");
    let root = root.path();
    let mut counter = Counter::start(root);
    let mut reached = beyond(root, 1);
    for mode in ["", "--iterate=1", "--leave-running"] {
        let pid = counter.0.id();
        let line = format!("dump -t {pid} {mode} --archive /dev/full");
        let output = floe(root, &line).output().expect("the binary runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{mode}: {text}");
        assert!(text.contains("No space left"), "{mode}: {text}");
        reached = beyond(root, reached + 2);
        let left = std::fs::read_dir(root).expect("there").flatten();
        let left = left.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let left: Vec<_> = left.filter(|name| name.contains("archive")).collect();
        assert!(left.is_empty(), "{mode}: {left:?}");
    }
    assert!(
        counter.0.try_wait().expect("ours").is_none(),
        "it was ended"
    );
    drop(counter);
    reap();
}

/// A copy with compressed pages.
fn copy_compressed(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp").success());
    floe_archive::compress::compress(to, floe_image::frames::Codec::Lz4, 2).expect("compressed");
}

/// By a pipe, which cannot be read twice.
fn restore_from_standard_input(root: &Path, archive: &str, first: u64) {
    let mut cat = Command::new("cat");
    let archive = File::open(root.join(archive)).expect("packed");
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
