//! The binary as users and scripts call it: exit codes, messages, configuration, log.

use std::path::Path;
use std::process::{Command, Output};

fn floe(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command
        .current_dir(directory)
        .env_remove("CRIU_CONFIG_FILE")
        .env_remove("CRIU_DEPRECATED")
        .env("HOME", directory);
    command
}

fn run(directory: &Path, line: &str) -> Output {
    floe(directory)
        .args(line.split_whitespace())
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn exit_codes_and_messages_of_wrong_usage() {
    let directory = temporary();
    for (line, expected) in [
        ("", "a command is required"),
        ("dmup", "did you mean `dump`?"),
        (
            "dump --tcp-establishe-d",
            "did you mean `--tcp-established`?",
        ),
        ("dump", "`dump` needs the tree's root: -t PID"),
        (
            "dump -t none",
            "bad value `none` for `-t`: expected a positive pid",
        ),
        (
            "dump -t 1 --max-rounds 3",
            "`--max-rounds` has no effect here: it limits the rounds of --iterate",
        ),
        ("dump -t 1 --max-freeze 1ms", "`--max-freeze` has no effect"),
        ("dump -t 1 --max-time 1s", "`--max-time` has no effect"),
        ("dump -t 1 --max-rate 1M", "`--max-rate` has no effect"),
        (
            "dump -t 1 --iterate=2 --max-rounds 3",
            "--iterate=N makes N rounds",
        ),
        (
            "pre-dump -t 1 --iterate",
            "`--iterate` is for `dump`, not for `pre-dump`",
        ),
        ("dump -t 1 --dry-run", "`--dry-run` is for `restore`"),
        (
            "restore --tracker uffd",
            "`--tracker` is for `dump` and `pre-dump`",
        ),
        ("restore extra", "takes no further arguments, got `extra`"),
        ("restore /etc", "did you mean `-D /etc`?"),
        ("dump 123 -D images", "did you mean `-t 123`?"),
        ("dump -t 1 --iterate 3", "did you mean `--iterate=3`?"),
        ("verify one two", "-i BASE -i INCREMENT"),
        ("track status 4194303", "There is no task 4194303"),
        ("track stop 4194303", "There is no task 4194303"),
        ("restore -S", "--restore-sibling needs --restore-detached"),
        (
            "check --feature pagemap_scam",
            "did you mean `pagemap_scan`?",
        ),
        (
            "--config /nonexistent check",
            "reading configuration file /nonexistent",
        ),
    ] {
        let output = run(directory.path(), line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(
            text(&output.stderr).contains(expected),
            "{line}: {}",
            text(&output.stderr)
        );
        assert!(output.stdout.is_empty(), "{line}");
    }
}

#[test]
fn options_not_supported_yet_are_named_and_exit_with_3() {
    let directory = temporary();
    for (line, expected) in [
        (
            "dump -t 1 --page-server --port 1 --lazy-pages",
            "--lazy-pages is not supported yet",
        ),
        (
            "dump -t 1 --page-server --port 1 --tls",
            "--tls is not supported yet",
        ),
        ("page-server --port 1 --tls", "--tls is not supported yet"),
    ] {
        let output = run(directory.path(), line);
        assert_eq!(output.status.code(), Some(3), "{line}");
        assert!(
            text(&output.stderr).contains(expected),
            "{line}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_missing_directory_is_named_with_what_to_do() {
    let directory = temporary();
    for (line, code, said) in [
        ("restore -D nowhere", 5, "directory nowhere (--images-dir)"),
        // A dump makes the last directory of a path, no more.
        (
            "dump -t 999999999 -D nowhere/deep",
            1,
            "making nowhere/deep (--images-dir)",
        ),
    ] {
        let output = run(directory.path(), line);
        assert_eq!(output.status.code(), Some(code));
        let told = text(&output.stderr);
        assert!(
            told.contains(said) && told.contains("what to do:"),
            "{told}"
        );
    }
}

#[test]
fn options_of_our_own_are_settled_by_a_file_and_those_of_criu_may_be_idle() {
    let directory = temporary();
    std::fs::write(directory.path().join("conf"), "max-rounds 3\n").expect("writable");
    for line in [
        "--config conf dump -t 4194303",
        "pre-dump -t 4194303 --max-rate 1M --tcp-established --ghost-limit 1M --restore-detached",
        "dump -t 4194303 --iterate --max-time 1s --weak-sysctls",
    ] {
        let output = run(directory.path(), line);
        assert!(
            text(&output.stderr).contains("There is no task 4194303"),
            "{line}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn the_help_of_a_command_has_what_it_honours() {
    let directory = temporary();
    for (command, has, has_not) in [
        (
            "dump",
            "--iterate --max-rounds --archive --tcp-established --port --track-mem",
            "--new-pidns --dry-run --inherit-fd --pidfile --lazy-pages",
        ),
        (
            "pre-dump",
            "--tree --prev-images-dir --track-mem --tracker --max-rate --page-server --port --timeout",
            "--iterate --archive --tcp-established --leave-running --shell-job --pidfile --feature",
        ),
        (
            "dedup",
            "--images-dir --log-file",
            "--tree --status-fd --auto-dedup",
        ),
        (
            "restore",
            "--input --pidfile --new-pidns",
            "--tree --iterate --auto-dedup",
        ),
        ("check", "--feature --log-file", "--images-dir --tree"),
        ("page-server", "--port --prev-images-dir --daemon", "--tree"),
    ] {
        let output = run(directory.path(), &format!("{command} --help"));
        let help = text(&output.stdout);
        let words: Vec<&str> = help
            .split_whitespace()
            .map(|word| word.split('[').next().unwrap_or(word))
            .collect();
        for option in has.split(' ') {
            assert!(words.contains(&option), "{command} lacks {option}: {help}");
        }
        for option in has_not.split(' ') {
            assert!(!words.contains(&option), "{command} has {option}: {help}");
        }
    }
}

#[test]
fn help_and_version_exit_with_0() {
    let directory = temporary();
    for (line, expected) in [
        ("--help", "Exit codes:"),
        ("dump -h", "--tcp-established"),
        ("help dump", "--tcp-established"),
        ("help pack", "--since"),
        ("help", "Exit codes:"),
        ("--version", "floe 0."),
        ("-V", "floe 0."),
        ("dump --nothing-here --help", ""),
    ] {
        let output = run(directory.path(), line);
        if expected.is_empty() {
            assert_eq!(output.status.code(), Some(2), "{line}");
            continue;
        }
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(text(&output.stdout).contains(expected), "{line}");
    }
}

#[test]
fn called_as_criu_it_has_the_version_of_criu() {
    let directory = temporary();
    let link = directory.path().join("criu");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_floe"), &link)
        .expect("a link in our own directory");
    let output = Command::new(link)
        .arg("--version")
        .output()
        .expect("the binary runs");
    let lines: Vec<String> = text(&output.stdout).lines().map(Into::into).collect();
    assert_eq!(lines.first().map(String::as_str), Some("Version: 4.2"));
    assert!(
        lines.get(1).is_some_and(|line| line.starts_with("floe ")),
        "{lines:?}"
    );
}

/// Each source names another log; the one that is made tells which source won.
#[test]
fn later_sources_overwrite_earlier_ones() {
    let cases = [
        (&["user"][..], "user.log"),
        (&["user", "env"], "env.log"),
        (&["user", "env", "explicit"], "explicit.log"),
        (&["user", "env", "explicit", "line"], "line.log"),
    ];
    for (sources, expected) in cases {
        let directory = temporary();
        let path = directory.path();
        let mut command = floe(path);
        for source in sources {
            let file = path.join(format!("{source}.conf"));
            std::fs::write(&file, format!("log-file {source}.log # comment\n"))
                .expect("a file of our own");
            match *source {
                "user" => {
                    std::fs::create_dir(path.join(".criu")).expect("a directory of our own");
                    std::fs::rename(&file, path.join(".criu/default.conf")).expect("both are ours");
                }
                "env" => drop(command.env("CRIU_CONFIG_FILE", &file)),
                "explicit" => drop(command.arg("--config").arg(&file)),
                _ => drop(command.args(["-o", "line.log"])),
            }
        }
        assert!(
            command
                .arg("check")
                .output()
                .expect("the binary runs")
                .status
                .code()
                .is_some()
        );
        let logs: Vec<String> = std::fs::read_dir(path)
            .expect("our own directory")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .filter(|name| name.ends_with(".log"))
            .collect();
        assert_eq!(logs, [expected], "{sources:?}");
    }
}

#[test]
fn default_files_can_be_turned_off_and_errors_in_them_are_placed() {
    let directory = temporary();
    std::fs::create_dir(directory.path().join(".criu")).expect("a directory of our own");
    std::fs::write(
        directory.path().join(".criu/default.conf"),
        "\nshell-jobs\n",
    )
    .expect("a file of our own");
    let output = run(directory.path(), "check");
    assert_eq!(output.status.code(), Some(2));
    let message = text(&output.stderr);
    assert!(message.contains(".criu/default.conf, line 2"), "{message}");
    assert!(message.contains("did you mean `shell-job`?"), "{message}");
    assert_eq!(
        run(directory.path(), "check --no-default-config")
            .status
            .code(),
        Some(0)
    );
}

#[test]
fn the_log_is_in_the_work_directory_and_has_lines_like_those_of_criu() {
    let directory = temporary();
    for sub in ["images", "work"] {
        std::fs::create_dir(directory.path().join(sub)).expect("a directory of our own");
    }
    let output = run(
        directory.path(),
        "dump -t 1 --lazy-pages -D images -W work -o dump.log -v4",
    );
    assert_eq!(output.status.code(), Some(3));
    let log =
        std::fs::read_to_string(directory.path().join("work/dump.log")).expect("the log is there");
    let line = log
        .lines()
        .find(|line| line.contains("Error (floe): --lazy-pages"))
        .unwrap_or_else(|| panic!("{log}"));
    assert!(line.starts_with("(00."), "{line}");
    assert!(text(&output.stderr).contains("--lazy-pages is not supported yet"));
}

#[test]
fn check_shows_a_table_and_answers_for_one_feature() {
    let directory = temporary();
    let output = run(directory.path(), "check");
    let table = text(&output.stdout);
    assert!(table.starts_with("feature"), "{table}");
    assert!(table.contains("clone3_set_tid"), "{table}");
    assert_eq!(
        run(directory.path(), "check --feature pidfd_store")
            .status
            .code(),
        Some(0)
    );
    assert_eq!(
        run(directory.path(), "check --feature apparmor_stacking")
            .status
            .code(),
        Some(4)
    );
    let list = text(&run(directory.path(), "check --feature list").stdout);
    assert!(list.lines().any(|name| name == "uffd-noncoop"), "{list}");
}

#[test]
fn the_reason_for_a_bad_value_is_said_once() {
    let directory = temporary();
    for line in [
        "dump -t x",
        "dump -t 1 --tracker foo",
        "restore --external foo",
        "verify --cpu-cap=foo .",
    ] {
        let output = run(directory.path(), line);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert_eq!(told.matches("expected").count(), 1, "{told}");
    }
}
