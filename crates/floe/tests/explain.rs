//! `floe explain` as a user calls it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn explain(argument: &str, input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.args(["explain", argument]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary runs");
    let mut stdin = child.stdin.take().expect("piped");
    // It need not read what it was not asked to.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_message_a_file_and_standard_input_are_the_same() {
    let message = "Error (criu/file-lock.c:1): Some file locks are hold by dumping tasks!";
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), message).expect("written");
    for (argument, input) in [
        (message, ""),
        ("-", message),
        (&*file.path().to_string_lossy(), ""),
    ] {
        let output = explain(argument, input);
        assert_eq!(output.status.code(), Some(0));
        assert!(
            stdout(&output).contains("--file-locks"),
            "{}",
            stdout(&output)
        );
    }
}

#[test]
fn a_message_that_names_a_log_is_explained_by_that_log() {
    let mut log = tempfile::Builder::new()
        .suffix(".log")
        .tempfile()
        .expect("a file");
    writeln!(log, "(00.1) Error (criu/tty.c:1): tty: Found dangling tty").expect("written");
    let message = format!(
        "criu failed: type NOTIFY errno 0\nlog file: {}",
        log.path().display()
    );
    let output = explain(&message, "");
    assert!(
        stdout(&output).contains("--shell-job"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn an_unknown_error_exits_with_1() {
    let output = explain("something new has failed", "");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains("something new"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn the_first_cause_in_the_logs_of_a_directory_is_explained() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().display().to_string();
    let nothing = explain(&path, "");
    assert_eq!(nothing.status.code(), Some(1));
    let told = stdout(&nothing);
    assert!(
        told.contains("dump.log") && told.contains("floe verify"),
        "{told}"
    );
    let logs = [
        ("dump.log", "(00.1) Dumping finished successfully"),
        (
            "z.log",
            "(00.1) Error (criu/tty.c:1): tty: Found dangling tty",
        ),
        ("notes.txt", "(00.1) Error (criu/x.c:1): io_uring"),
    ];
    for (name, text) in logs {
        std::fs::write(directory.path().join(name), text).expect("written");
    }
    let output = explain(&path, "");
    let told = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(
        told.contains("z.log") && told.contains("--shell-job"),
        "{told}"
    );
}

#[test]
fn what_was_answered_before_is_not_explained_again() {
    let pasted = "floe: something new has failed\nfloe: what to do: use --tcp-established";
    let output = explain(pasted, "");
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
}
