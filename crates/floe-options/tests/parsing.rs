//! The forms of CRIU's command line and configuration files.

use std::path::Path;
use std::time::Duration;

use floe_options::config::apply_text;
use floe_options::policy::{ByteLimit, ManageCgroups, NetworkLock};
use floe_options::settings::FinalState;
use floe_options::{Command, CommandLine, Settings, UsageError};

fn line(text: &str) -> Result<(Settings, CommandLine), UsageError> {
    let line = CommandLine::parse(text.split_whitespace().map(Into::into))?;
    let mut settings = Settings::default();
    line.apply(&mut settings)?;
    Ok((settings, line))
}

fn settings(text: &str) -> Settings {
    line(text)
        .unwrap_or_else(|error| panic!("{text}: {error}"))
        .0
}

fn config(text: &str) -> Result<Settings, UsageError> {
    let mut settings = Settings::default();
    apply_text(text, Path::new("test.conf"), &mut settings).map(|()| settings)
}

#[test]
fn options_stand_before_and_after_the_command() {
    for text in [
        "-t 7 -D d dump",
        "dump -t 7 -D d",
        "-t7 dump -Dd",
        "dump --tree=7 --images-dir d",
        "--tre 7 dump -D d",
    ] {
        let (settings, line) = line(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(settings.tree.map(|tree| tree.get()), Some(7), "{text}");
        assert_eq!(
            settings.images_dir.as_deref(),
            Some(Path::new("d")),
            "{text}"
        );
        assert_eq!(line.command(&[]).expect(text).0, Command::Dump);
    }
}

#[test]
fn verbosity_has_all_of_its_forms() {
    let cases = [
        ("dump", 2),
        ("dump -v", 3),
        ("dump -vv", 4),
        ("dump -vvv", 5),
        ("dump -v4", 4),
        ("dump -v0", 0),
        ("-v1 dump", 1),
        ("dump --verbosity=4", 4),
        ("dump --verbosity", 3),
        ("dump -v -v", 4),
        ("dump -Rjv4", 4),
        ("check --no-default-config -verbosity=0 --feature userns", 0),
    ];
    for (text, level) in cases {
        assert_eq!(settings(text).log.level, level, "{text}");
    }
    assert_eq!(
        line("dump -v 4").expect("options are fine").1.words,
        ["dump", "4"]
    );
}

#[test]
fn switches_are_negated_and_the_last_one_wins() {
    assert!(settings("dump --tcp-established").sockets.tcp_established);
    assert!(
        !settings("dump --tcp-established --no-tcp-established")
            .sockets
            .tcp_established
    );
    assert!(!settings("dump -j --no-shell-job").shell_job);
    assert!(!settings("dump --no-ghost-fiemap").ghost_fiemap);
    assert_eq!(settings("dump -R -s").final_state, FinalState::Stopped);
    assert_eq!(settings("dump -s -R").final_state, FinalState::Running);
}

#[test]
fn values_are_read_where_they_are_given() {
    let settings = settings(
        "restore -dSj --ghost-limit 64M --timeout 3 --network-lock skip --manage-cgroups=full -x5,6",
    );
    assert!(settings.detached && settings.sibling && settings.shell_job);
    assert_eq!(settings.ghost_limit, ByteLimit(64 << 20));
    assert_eq!(settings.timeout, Duration::from_secs(3));
    assert_eq!(settings.sockets.network_lock, NetworkLock::Skip);
    assert_eq!(settings.cgroups.manage, ManageCgroups::Full);
    assert_eq!(settings.external.len(), 2);
}

#[test]
fn words_after_a_double_dash_are_not_options() {
    let (settings, line) = line("restore --exec-cmd -D x -- prog -t --tree").expect("a good line");
    assert!(settings.exec_cmd);
    let (command, rest) = line.command(&[]).expect("a command");
    assert_eq!(
        (command, rest.join(" ").as_str()),
        (Command::Restore, "prog -t --tree")
    );
    assert_eq!(settings.check(command, rest), Ok(()));
}

#[test]
fn errors_name_the_nearest() {
    let cases = [
        ("dump --leave-runing", "did you mean `--leave-running`?"),
        (
            "dump --tcp-establish-ed",
            "did you mean `--tcp-established`?",
        ),
        ("dump --no-tcp-closed", "did you mean `--no-tcp-close`?"),
        (
            "dump -tree 5",
            "bad value `ree` for `-t`: expected a positive pid",
        ),
        ("dump -images-dir x", "did you mean `--images-dir`?"),
        ("dump -T 5", "did you mean `-t`?"),
        ("dump --network-lock nftable", "did you mean `nftables`?"),
        ("dump --manage-cgroups=stirct", "did you mean `strict`?"),
        ("dump -t 0", "expected a positive pid"),
        ("dump -t", "option `-t` needs a value (PID)"),
        ("dump --tree", "option `--tree` needs a value (PID)"),
        ("dump --shell-job=yes", "takes no value, got `yes`"),
        ("dump --tcp", "is ambiguous: --tcp-established"),
        (
            "dump --external foo[1]:x",
            "`foo` is not a type of external resource",
        ),
        ("dump --ghost-limit big", "expected a size such as"),
    ];
    for (text, expected) in cases {
        let error = line(text)
            .err()
            .unwrap_or_else(|| panic!("{text} was accepted"))
            .to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn commands_are_known_or_near() {
    let command = |text| {
        line(text).and_then(|(_, line)| line.command(&["image"]).map(|(command, _)| command))
    };
    assert_eq!(command("cpuinfo dump"), Ok(Command::CpuinfoDump));
    assert_eq!(command("-v4 pre-dump -t 1"), Ok(Command::PreDump));
    for (text, expected) in [
        ("dmup", "did you mean `dump`?"),
        ("restor", "did you mean `restore`?"),
        ("imgae", "did you mean `image`?"),
        ("cpuinfo chek", "did you mean `cpuinfo check`?"),
        ("cpuinfo", "needs an action"),
        ("-v4", "a command is required"),
    ] {
        let error = command(text).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn conflicts_are_found() {
    for (text, expected) in [
        ("restore -S", "needs --restore-detached"),
        ("restore -d --exec-cmd -- a", "exclude each other"),
        ("restore --exec-cmd", "needs a command"),
        ("dump", "-t PID"),
        ("dump -t 1 x", "no further arguments, got `x`"),
        ("dump -t 1 --inherit-fd fd[3]:x", "restore only"),
        ("swrk", "descriptor"),
    ] {
        let (settings, line) = line(text).expect(text);
        let (command, rest) = line.command(&[]).expect(text);
        let error = settings.check(command, rest).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn configuration_files_have_comments_quotes_and_negation() {
    let text = "tcp-established\nwork-dir \"/home/me/my \\\"work\\\" directory\"\n#this is a comment\n\
        no-restore-sibling   # this is another comment\n\n  verbosity 4 # more\nghost-limit=2M\nmanage-cgroups full\n\
        log-file \"\"\n";
    let settings = config(text).expect("a good file");
    assert!(settings.sockets.tcp_established && !settings.sibling);
    assert_eq!(
        settings.work_dir.as_deref(),
        Some(Path::new("/home/me/my \"work\" directory"))
    );
    assert_eq!(settings.log.level, 4);
    assert_eq!(settings.ghost_limit, ByteLimit(2 << 20));
    assert_eq!(settings.cgroups.manage, ManageCgroups::Full);
}

#[test]
fn bad_configuration_names_file_and_line() {
    for (text, expected) in [
        (
            "\ntcp-establishd",
            "test.conf, line 2: unknown option `tcp-establishd`; did you mean `tcp-established`?",
        ),
        ("work-dir \"open", "the closing double quote is missing"),
        ("work-dir a b", "one value only"),
        ("--tcp-close", "without dashes"),
        ("shell-job yes", "takes no value"),
        ("tree x", "expected a positive pid"),
        ("dump", "unknown option"),
    ] {
        let error = config(text).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn what_cannot_be_done_yet_is_named() {
    let not_yet = |text: &str| {
        let (settings, line) = line(text).expect(text);
        let command = line.command(&[]).expect(text).0;
        settings
            .not_yet(command)
            .iter()
            .map(|row| row.option)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        not_yet("dump -t 1 --track-mem --lazy-pages"),
        ["--lazy-pages"]
    );
    assert!(not_yet("restore --join-ns net:1 --empty-ns net").is_empty());
    assert!(not_yet("dump -t 1 --auto-dedup --pre-dump-mode read --empty-ns net").is_empty());
}
