//! `floe verify`: is a checkpoint whole, can it be restored here, and with which options?

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use floe_archive::check::{self, HashReport, Row, State};
use floe_image::ImageDir;
use floe_kernel::features::KernelFeatures;
use floe_options::{Command, CommandLine, NoHooks, Settings, UsageError};
use floe_restore::{Outlook, PidSpace};

use crate::exit::{Exit, Failure};
use crate::{command, engine, help, own};

const USAGE: &str = "\
Checks a checkpoint: files, checksums, the chain, whether this machine can restore it, and which options
a restore must be given.

Usage: floe verify [OPTIONS] PATH | -D DIR | -i FILE

PATH is a directory of images (the newest of a chain), or an archive (`-` is standard input). The options of
restore are taken, too, from the command line and from configuration files: what is said of this machine is
for a restore with these.

Options of verify:
  --quick                             look at all but the pages, as a restore does first
  --no-machine                        do not look at this machine: the checkpoint is for another one
  --json                              print JSON
";

const CODES: &str = "
Exit codes of verify:
  0  whole, and can be restored here (with the options that it lists as needed)
  2  wrong usage
  3  whole, but something is in the way of a restore on this machine
  5  not whole, not readable, or not there
";

/// What the command line asks for besides a restore's options.
#[derive(Default)]
struct Asked {
    quick: bool,
    no_machine: bool,
    json: bool,
}

/// What was found.
struct Answer {
    images: Vec<Row>,
    hashed: HashReport,
    outlook: Outlook,
    exit: Exit,
}

/// Runs `floe verify`; 5 where the images are not whole, 3 where they cannot be restored here.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let (asked, words) = take_own(command::utf8(args)?);
    let line = CommandLine::parse(words)?;
    let mut settings = Settings::default();
    line.apply(&mut settings)?;
    if settings.help {
        own::print(&format!("{USAGE}{}{CODES}", help::restore_options()))?;
        return Ok(Exit::Done);
    }
    let settings = command::configured(&line, &settings)?;
    let named = settings.images_dir.is_some() || !settings.archives.is_empty();
    let (path, rest) = match line.words.split_first() {
        Some((path, rest)) if !named => (Some(Path::new(path)), rest),
        None if !named => return Err(no_path().into()),
        _ => (None, &line.words[..]),
    };
    if let ([second, ..], Some(_)) = (rest, path) {
        let error = UsageError::Several {
            given: second.clone(),
        };
        return Err(error.into());
    }
    settings.check(Command::Restore, rest)?;
    line.refuse_idle(Command::Restore, &settings)?;
    command::refuse_not_yet(Command::Restore, &settings)?;
    let dir = match path {
        Some(path) => own::open_images(path)?,
        None => engine::images(&settings.restore_options(Arc::new(NoHooks)))?,
    };
    let answer = look(&dir, &settings, &asked);
    own::print(&match asked.json {
        true => json(&answer),
        false => text(&answer),
    })?;
    Ok(answer.exit)
}

fn no_path() -> UsageError {
    UsageError::Needs {
        command: "verify",
        what: "a directory of images or an archive",
    }
}

/// Takes out the words that no restore knows.
fn take_own(mut words: Vec<String>) -> (Asked, Vec<String>) {
    let mut asked = Asked::default();
    let end = words.iter().position(|word| word == "--");
    let command = words.split_off(end.unwrap_or(words.len()));
    words.retain(|word| {
        let field = match word.as_str() {
            "--quick" => &mut asked.quick,
            "--no-machine" => &mut asked.no_machine,
            "--json" => &mut asked.json,
            _ => return true,
        };
        *field = true;
        false
    });
    words.extend(command);
    (asked, words)
}

fn look(dir: &ImageDir, settings: &Settings, asked: &Asked) -> Answer {
    let (images, hashed) = match asked.quick {
        true => {
            let rows = check::before_restore(dir, own::processors());
            (rows, HashReport::default())
        }
        false => check::full(dir, own::processors()),
    };
    let mut answer = Answer {
        images,
        hashed,
        outlook: Outlook::default(),
        exit: Exit::Done,
    };
    if is_bad(&answer.images) {
        answer.exit = Exit::BadImage;
    } else if !asked.quick && !asked.no_machine {
        let options = settings.restore_options(Arc::new(NoHooks));
        let pids = match settings.new_pidns {
            true => PidSpace::New,
            false => PidSpace::Callers,
        };
        let features = KernelFeatures::probe();
        answer.outlook = floe_restore::check_machine(dir, (&options, pids), &features);
        answer.exit = exit_of(&mut answer);
    }
    answer
}

/// Images that contradict each other are found by planning only: they are not whole either.
fn exit_of(answer: &mut Answer) -> Exit {
    let damaged = std::mem::take(&mut answer.outlook.damaged);
    answer.images.extend(damaged);
    if is_bad(&answer.images) {
        Exit::BadImage
    } else if is_bad(&answer.outlook.machine) {
        Exit::Unsupported
    } else {
        Exit::Done
    }
}

fn is_bad(rows: &[Row]) -> bool {
    rows.iter().any(|row| row.state == State::Bad)
}

impl Answer {
    /// What each row is about: its title for people, and its name.
    fn sections(&self) -> [(&'static str, &'static str, &[Row]); 3] {
        [
            ("The images", "images", &self.images),
            ("This machine", "machine", &self.outlook.machine),
            ("A restore must be given", "options", &self.outlook.needed),
        ]
    }
}

fn text(answer: &Answer) -> String {
    let mut out = String::new();
    for (title, _, rows) in answer.sections() {
        if !rows.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{title}:");
        }
        rows.iter().for_each(|row| row_text(row, &mut out));
    }
    let hashed = &answer.hashed;
    if hashed.bytes > 0 {
        let seconds = hashed.time.as_secs_f64().max(1e-9);
        let _ = writeln!(
            out,
            "{} bytes compared with their checksums at {:.1} GiB/s",
            hashed.bytes,
            hashed.bytes as f64 / seconds / (1u64 << 30) as f64
        );
    }
    out.push_str(&verdict(answer));
    out
}

fn verdict(answer: &Answer) -> String {
    let options = answer.outlook.options.join(" ");
    let here = !answer.outlook.machine.is_empty();
    match answer.exit {
        Exit::BadImage => "The checkpoint is NOT whole.\n".into(),
        Exit::Done if !here => "The checkpoint is whole.\n".into(),
        Exit::Done if options.is_empty() => {
            "The checkpoint is whole, and can be restored here.\n".into()
        }
        Exit::Done => {
            format!("The checkpoint is whole, and can be restored here with: {options}\n")
        }
        _ => "The checkpoint is whole, but cannot be restored here as things are.\n".into(),
    }
}

fn row_text(row: &Row, out: &mut String) {
    let mark = match row.state {
        State::Good => "ok   ",
        State::Note => "note ",
        State::Needed => "need ",
        State::Bad => "BAD  ",
    };
    let _ = writeln!(out, "{mark}{:10} {}", row.about, row.text);
    if let Some(remedy) = &row.remedy {
        let _ = writeln!(out, "                -> {remedy}");
    }
}

fn json(answer: &Answer) -> String {
    let mut checks = Vec::new();
    for (_, section, rows) in answer.sections() {
        checks.extend(rows.iter().map(|row| {
            let state = match row.state {
                State::Good => "good",
                State::Note => "note",
                State::Needed => "needed",
                State::Bad => "bad",
            };
            serde_json::json!({
                "section": section, "about": row.about, "state": state, "text": row.text,
                "remedy": row.remedy,
            })
        }));
    }
    let value = serde_json::json!({
        "whole": answer.exit != Exit::BadImage,
        "restorable": answer.exit == Exit::Done,
        "needs": answer.outlook.options,
        "checks": checks,
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_behind_two_dashes_are_the_commands() {
        let words = ["--json", "DIR", "--tcp-close", "--", "ls", "--quick"];
        let (asked, rest) = take_own(words.map(String::from).to_vec());
        assert!(asked.json && !asked.quick && !asked.no_machine);
        assert_eq!(rest, ["DIR", "--tcp-close", "--", "ls", "--quick"]);
    }
}
