//! `floe cpuinfo` and `floe image` on files of our own.

use std::path::Path;
use std::process::{Command, Output};

fn run(directory: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command
        .current_dir(directory)
        .env_remove("CRIU_CONFIG_FILE")
        .env("HOME", directory);
    command
        .args(line.split_whitespace())
        .output()
        .expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn with_cpuinfo() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = run(directory.path(), "cpuinfo dump -D .");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    directory
}

#[test]
fn the_cpu_matches_its_own_image_and_a_missing_one_exits_with_5() {
    let directory = with_cpuinfo();
    assert_eq!(
        run(directory.path(), "cpuinfo check").status.code(),
        Some(0)
    );
    std::fs::remove_file(directory.path().join("cpuinfo.img")).expect("the image is there");
    let output = run(directory.path(), "cpuinfo check");
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cpuinfo.img"));
}

#[test]
fn a_damaged_cpuinfo_exits_with_5() {
    let directory = with_cpuinfo();
    let path = directory.path().join("cpuinfo.img");
    let bytes = std::fs::read(&path).expect("the image is there");
    std::fs::write(&path, &bytes[..bytes.len() - 3]).expect("a file of our own");
    assert_eq!(
        run(directory.path(), "cpuinfo check").status.code(),
        Some(5)
    );
    let listed = run(directory.path(), "image ls");
    assert_eq!(listed.status.code(), Some(5));
    assert!(stdout(&listed).contains("DAMAGED"), "{}", stdout(&listed));
}

#[test]
fn decoding_and_encoding_gives_the_same_bytes() {
    let directory = with_cpuinfo();
    for options in ["", "--pretty"] {
        let decoded = run(
            directory.path(),
            &format!("image decode -i cpuinfo.img -o cpuinfo.json {options}"),
        );
        assert!(decoded.status.success());
        assert!(
            run(directory.path(), "image encode cpuinfo.json -o again.img")
                .status
                .success()
        );
        let read =
            |name: &str| std::fs::read(directory.path().join(name)).expect("the file was made");
        assert_eq!(read("again.img"), read("cpuinfo.img"), "{options}");
    }
}

#[test]
fn files_and_directories_are_shown() {
    let directory = with_cpuinfo();
    let shown = run(directory.path(), "image show cpuinfo.img");
    assert!(
        stdout(&shown).contains("\"capability_ver\": 2"),
        "{}",
        stdout(&shown)
    );
    let info = run(directory.path(), "image info cpuinfo.img");
    assert!(stdout(&info).contains("\"count\": 1"), "{}", stdout(&info));
    let listed = run(directory.path(), "image ls");
    assert!(stdout(&listed).contains("CPUINFO"), "{}", stdout(&listed));
}

#[test]
fn wrong_input_has_its_exit_code() {
    let directory = with_cpuinfo();
    std::fs::write(directory.path().join("not.json"), "[1").expect("a file of our own");
    for (line, code) in [
        ("image decode nowhere.img", 5),
        ("image show nowhere.img", 5),
        ("image decode not.json", 5),
        ("image encode not.json", 5),
        ("image show", 2),
        ("image shwo cpuinfo.img", 2),
        ("image --help", 0),
        ("image ls . ps", 0),
    ] {
        let output = run(directory.path(), line);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
