//! Archives that come through a pipe: restored as they come, never held. Needs root; says `skipped`
//! without.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use testkit::sys::task::reap;
use testkit::{Engine, Fixture, process};

/// Most memory that a look into the archive of a program of 64 MiB may take, in bytes.
const MOST: u64 = 32 << 20;
/// Most memory that a restore of a program of 64 MiB may take beyond that of a small one, in bytes.
const MORE: u64 = 16 << 20;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

fn engine() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// A program, dumped and packed; the archive.
fn archived(name: &str) -> (Fixture, PathBuf) {
    let mut fixture = Fixture::start(name).expect("started");
    fixture.dump(&engine(), &[]).expect("dumped");
    let archive = fixture.images().with_extension("tar.zst");
    let words = [
        "pack".as_ref(),
        fixture.images(),
        "--level=-5".as_ref(),
        "-o".as_ref(),
        &archive,
    ];
    let mut pack = std::process::Command::new(env!("CARGO_BIN_EXE_floe"));
    assert!(
        pack.args(words)
            .status()
            .expect("the binary runs")
            .success()
    );
    for image in std::fs::read_dir(fixture.images())
        .expect("there")
        .flatten()
    {
        std::fs::remove_file(image.path()).expect("removed");
    }
    (fixture, archive)
}

/// A pipe with a name.
fn pipe(place: &Path) -> PathBuf {
    let path = place.join("pipe");
    let _ = std::fs::remove_file(&path);
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &path,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .expect("made");
    path
}

/// A pipe with a name, and who writes all of `from` into it.
fn piped(
    place: &Path,
    mut from: impl Read + Send + 'static,
) -> (PathBuf, std::thread::JoinHandle<()>) {
    let path = pipe(place);
    let to = path.clone();
    let writer = std::thread::spawn(move || {
        let mut pipe = File::options().write(true).open(to).expect("opened");
        // A reader that refuses it goes away.
        let _ = std::io::copy(&mut from, &mut pipe);
    });
    (path, writer)
}

/// A program, and the archive that its dump wrote.
fn dumped_to_archive(name: &str) -> (Fixture, PathBuf) {
    let mut fixture = Fixture::start(name).expect("started");
    let archive = fixture.images().with_extension("tar.zst");
    let options = ["--archive", archive.to_str().expect("plain")];
    fixture.dump(&engine(), &options).expect("dumped");
    (fixture, archive)
}

#[test]
fn programs_are_restored_from_a_pipe_in_little_memory() {
    restores_in_little_memory(archived);
}

#[test]
fn archives_that_a_dump_wrote_are_restored_from_a_pipe_as_they_come() {
    restores_in_little_memory(|name| {
        let (fixture, archive) = dumped_to_archive(name);
        let opened = floe_archive::archive::Archive::open(&archive).expect("whole");
        // Its images come first, so nothing is put aside.
        let format = opened.index().head.format;
        assert_eq!(format, floe_archive::archive::INDEX_FORMAT, "{name}");
        (fixture, archive)
    });
}

#[test]
fn a_dump_into_a_pipe_is_restored_at_its_other_end() {
    if !is_root() {
        return;
    }
    let mut fixture = Fixture::start("memory-shared").expect("started");
    let place = tempfile::tempdir().expect("a directory");
    let kept = place.path().join("kept");
    let (from, to) = (pipe(place.path()), kept.clone());
    let options = ["--archive", from.to_str().expect("plain")];
    let source = from.clone();
    let reading = std::thread::spawn(move || {
        let mut copy = File::create(to)?;
        std::io::copy(&mut File::open(source)?, &mut copy)
    });
    fixture.dump(&engine(), &options).expect("dumped");
    reading.join().expect("no panic").expect("read to its end");
    let (pipe, writer) = piped(fixture.images(), File::open(kept).expect("there"));
    let options = ["-i", pipe.to_str().expect("plain")];
    fixture.restore(&engine(), &options).expect("restored");
    writer.join().expect("all was read");
    fixture.check().expect("as it was");
    fixture.kill().expect("ours");
}

fn restores_in_little_memory(archived: impl Fn(&str) -> (Fixture, PathBuf)) {
    if !is_root() {
        return;
    }
    let restored = |name: &str| {
        let (mut fixture, archive) = archived(name);
        let (pipe, writer) = piped(fixture.images(), File::open(archive).expect("packed"));
        let options = ["-i", pipe.to_str().expect("plain")];
        let outcome = fixture.restore(&engine(), &options).expect(name);
        writer.join().expect("all was read");
        fixture.check().expect(name);
        fixture.kill().expect("ours");
        outcome.memory
    };
    // What the command takes for itself, most of it the code of a build for tests.
    let least = restored("blocked");
    for name in [
        "memory-large",
        "memory-cow",
        "memory-shared",
        "memory-memfd",
        "memory-private",
    ] {
        let memory = restored(name);
        assert!(memory < least + MORE, "{name}: {memory} for {least} bytes");
    }
}

#[test]
fn a_stream_that_is_cut_or_damaged_leaves_no_task() {
    if !is_root() {
        return;
    }
    let (mut fixture, archive) = archived("memory-private");
    let whole = std::fs::read(archive).expect("packed");
    let cut = whole[..whole.len() / 2].to_vec();
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 4;
    let end_missing = whole[..whole.len() - 700].to_vec();
    for (what, bytes) in [
        ("cut", cut),
        ("flipped", flipped),
        ("without its end", end_missing),
    ] {
        let (pipe, writer) = piped(fixture.images(), Cursor::new(bytes));
        let options = ["-i", pipe.to_str().expect("plain")];
        let outcome = fixture
            .try_restore(&engine(), &options, &[])
            .expect("it ran");
        writer.join().expect("it ends");
        assert_eq!(
            outcome.status.code(),
            Some(5),
            "{what}: {}",
            outcome.printed
        );
        assert!(
            outcome.printed.contains("damaged or was cut"),
            "{what}: {}",
            outcome.printed
        );
        assert!(
            !Path::new(&format!("/proc/{}", fixture.pid)).exists(),
            "{what}"
        );
    }
    let (pipe, writer) = piped(fixture.images(), Cursor::new(whole));
    let options = ["-i", pipe.to_str().expect("plain")];
    fixture.restore(&engine(), &options).expect("the whole one");
    writer.join().expect("all was read");
    fixture.check().expect("as it was");
    fixture.kill().expect("ours");
}

#[test]
fn verify_and_inspect_read_a_stream_in_little_memory() {
    if !is_root() {
        return;
    }
    let (fixture, archive) = archived("memory-large");
    let ask = |command: &str, path: &Path| {
        let printed = fixture.images().join("printed");
        let mut floe = std::process::Command::new(env!("CARGO_BIN_EXE_floe"));
        floe.args([command, path.to_str().expect("plain")])
            .stdout(File::create(&printed).expect("created"));
        let pid = floe.spawn().expect("the binary runs").id() as i32;
        process::wait_readable(&[&process::watch(pid).expect("ours")], deadline())
            .expect("watched");
        let (memory, status) = reap(pid).expect("ours").expect("it ends");
        let name = path.display().to_string();
        let text = std::fs::read_to_string(printed).expect("written");
        (status, memory, text.replace(&name, "ARCHIVE"))
    };
    for command in ["verify", "inspect"] {
        let (pipe, writer) = piped(fixture.images(), File::open(&archive).expect("packed"));
        let (status, memory, text) = ask(command, &pipe);
        writer.join().expect("all was read");
        assert_eq!(status, 0, "{text}");
        assert!(memory < MOST, "{command}: {memory} bytes");
        // Only the time that hashing took is another one.
        let told = |text: &str| {
            let lines = text.lines().filter(|line| !line.contains("GiB/s"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(told(&text), told(&ask(command, &archive).2), "{command}");
    }
    // In the file, as the memory of this process counts for its children (getrusage(2)).
    let file = File::options().write(true).open(&archive).expect("packed");
    let middle = file.metadata().expect("a file").len() / 2;
    std::os::unix::fs::FileExt::write_all_at(&file, b"other", middle).expect("written");
    let (pipe, writer) = piped(fixture.images(), File::open(&archive).expect("packed"));
    assert_ne!(ask("verify", &pipe).0, 0, "a damaged one");
    writer.join().expect("it ends");
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}
