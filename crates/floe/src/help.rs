//! `--help`, made from the tables of commands and flags.

use std::fmt::Write as _;

use floe_options::command::Command;
use floe_options::flags::{FLAGS, Flag, Kind};

use crate::command::OWN_COMMANDS;
use crate::exit::Exit;

/// The text for one command of CRIU's, or for all where there is none.
pub fn text(command: Option<Command>) -> String {
    let mut out = String::new();
    match command {
        Some(command) => usage_of(command, &mut out),
        None => overview(&mut out),
    }
    for (title, belongs) in sections(command) {
        section(title, &*belongs, &mut out);
    }
    out.push_str(
        "\nMost switches of CRIU are turned off by `--no-NAME`; the last of several wins.\n\n",
    );
    out.push_str(Exit::HELP);
    out
}

/// The options of a restore.
pub fn restore_options() -> String {
    let mut out = String::new();
    for (title, belongs) in sections(Some(Command::Restore)) {
        section(title, &*belongs, &mut out);
    }
    out
}

type Section = (&'static str, Box<dyn Fn(&Flag) -> bool>);

/// Titles, and which flags stand below them.
fn sections(command: Option<Command>) -> Vec<Section> {
    let every: Section = ("Options of every command", Box::new(Flag::is_for_every));
    if let Some(command) = command {
        let own = move |flag: &Flag| !flag.is_for_every() && flag.is_for(command);
        return vec![("Options", Box::new(own)), every];
    }
    let group = |dump: bool, restore: bool, check: bool| -> Box<dyn Fn(&Flag) -> bool> {
        Box::new(move |flag| {
            let dumps = flag.is_for(Command::Dump) || flag.is_for(Command::PreDump);
            let found = (
                dumps,
                flag.is_for(Command::Restore),
                flag.is_for(Command::Check),
            );
            !flag.is_for_every() && found == (dump, restore, check)
        })
    };
    vec![
        ("Options of dump", group(true, false, false)),
        ("Options of restore", group(false, true, false)),
        ("Options of dump and restore", group(true, true, false)),
        ("Options of check", group(false, false, true)),
        ("Options of servers", group(false, false, false)),
        every,
    ]
}

fn overview(out: &mut String) {
    out.push_str("Checkpoint and restore of processes, compatible with CRIU.\n\nUsage: floe COMMAND [OPTIONS]\n");
    out.push_str("\nCommands:\n");
    let criu = Command::ALL
        .iter()
        .filter(|(command, ..)| *command != Command::Exec && *command != Command::Show);
    for (_, name, about) in criu {
        row(name, about, out);
    }
    for own in OWN_COMMANDS.iter().filter(|own| !own.about.is_empty()) {
        row(own.name, own.about, out);
    }
    out.push_str("\n`floe COMMAND --help` tells about one command.\n");
}

fn usage_of(command: Command, out: &mut String) {
    let about = Command::ALL
        .iter()
        .find(|(other, ..)| *other == command)
        .map_or("", |(.., about)| about);
    let tail = match command {
        Command::Dump => "-t PID -D DIR | --archive FILE [OPTIONS]",
        Command::PreDump => "-t PID -D DIR [--prev-images-dir DIR] [OPTIONS]",
        Command::Restore => "-D DIR | -i FILE [OPTIONS] [--exec-cmd -- COMMAND [ARGS]]",
        Command::Swrk => "FD",
        _ => "[OPTIONS]",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "floe {}: {about}\n\nUsage: floe {} {tail}",
        command.name(),
        command.name()
    );
    if command == Command::Restore {
        out.push_str(
            "\nOf a directory all is compared with its checksums but the pages: `floe verify DIR` compares these, too.\n\
             An archive is compared in any case.\n",
        );
    }
}

fn section(title: &str, belongs: &dyn Fn(&Flag) -> bool, out: &mut String) {
    let mut flags = FLAGS
        .iter()
        .filter(|flag| !flag.help.is_empty() && belongs(flag))
        .peekable();
    if flags.peek().is_none() {
        return;
    }
    let _ = writeln!(out, "\n{title}:");
    for flag in flags {
        let mark = if flag.own { " (not in CRIU)" } else { "" };
        row(&form(flag), &format!("{}{mark}", flag.help), out);
    }
}

/// `-t, --tree PID`.
fn form(flag: &Flag) -> String {
    let short = flag
        .short
        .map_or("    ".into(), |short| format!("-{short}, "));
    match flag.kind {
        Kind::Switch(_) | Kind::Plain(_) => format!("{short}--{}", flag.long),
        Kind::Value(name, _) => format!("{short}--{} {name}", flag.long),
        Kind::Optional(name, _) => format!("{short}--{}[={name}]", flag.long),
    }
}

fn row(left: &str, right: &str, out: &mut String) {
    const COLUMN: usize = 34;
    let _ = if left.len() > COLUMN {
        writeln!(out, "  {left}\n  {:COLUMN$}  {right}", "")
    } else {
        writeln!(out, "  {left:COLUMN$}  {right}")
    };
}
