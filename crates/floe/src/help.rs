//! `--help`, made from the tables of commands and flags.

use std::fmt::Write as _;

use floe_options::command::Command;
use floe_options::flags::{FLAGS, Flag, For, Kind};

use crate::command::OWN_COMMANDS;
use crate::exit::Exit;

/// The text for one command of CRIU's, or for all where there is none.
pub fn text(command: Option<Command>) -> String {
    let mut out = String::new();
    match command {
        Some(command) => usage_of(command, &mut out),
        None => overview(&mut out),
    }
    for (title, used_by) in SECTIONS {
        if command.is_none_or(|command| concerns(used_by, command)) {
            section(title, used_by, &mut out);
        }
    }
    out.push_str("\nSwitches are turned off by `--no-NAME`; the last of several wins.\n\n");
    out.push_str(Exit::HELP);
    out
}

/// The options of a restore.
pub fn restore_options() -> String {
    let mut out = String::new();
    for (title, used_by) in SECTIONS {
        if concerns(used_by, Command::Restore) {
            section(title, used_by, &mut out);
        }
    }
    out
}

const SECTIONS: [(&str, For); 6] = [
    ("Options of dump", For::Dump),
    ("Options of restore", For::Restore),
    ("Options of dump and restore", For::Both),
    ("Options of check", For::Check),
    ("Options of servers", For::Server),
    ("Options of every command", For::Every),
];

fn concerns(used_by: For, command: Command) -> bool {
    match used_by {
        For::Every => true,
        For::Dump => matches!(command, Command::Dump | Command::PreDump),
        For::Restore => command == Command::Restore,
        For::Both => matches!(command, Command::Dump | Command::PreDump | Command::Restore),
        For::Check => command == Command::Check,
        For::Server => matches!(
            command,
            Command::PageServer | Command::LazyPages | Command::Service
        ),
    }
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
            "\nOf a directory names and sizes are compared, not what is in the pages: `floe verify DIR` compares\n\
             every checksum. An archive is compared in any case.\n",
        );
    }
}

fn section(title: &str, used_by: For, out: &mut String) {
    let _ = writeln!(out, "\n{title}:");
    for flag in FLAGS
        .iter()
        .filter(|flag| flag.used_by == used_by && !flag.help.is_empty())
    {
        row(&form(flag), flag.help, out);
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
