//! `floe explain`: what a log or a message of any engine means.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use floe_explain::{Explanation, Finding};

use crate::exit::{Exit, Failure};
use crate::own;

/// Most bytes of a log that are read: the first cause stands near its beginning.
const MAX_LOG: u64 = 64 << 20;

/// Where a text is from that is no file.
const MESSAGE: &str = "the message";

/// Finds the first cause in a log of Floe, CRIU, runc, crun, Podman or Docker, and says what to do.
#[derive(Parser)]
#[command(name = "floe explain", after_help = Exit::HELP, disable_version_flag = true)]
struct Explain {
    /// A log file, a directory with logs (dump.log, restore.log, *.log), `-` for standard input, or the
    /// message itself.
    #[arg(required = true, value_name = "FILE|DIR|-|TEXT")]
    what: Vec<String>,
}

/// Runs `floe explain`; the exit code is 1 where nothing is known.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let Explain { what } = match own::parse("floe explain", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let directory = Path::new(&what[0]);
    if what.len() == 1 && directory.is_dir() {
        return explain_directory(directory);
    }
    let (mut source, text) = read(&what)?;
    let mut finding = floe_explain::explain(&text);
    // A runtime's message names the log that knows more.
    let passed_on = matches!(&finding, Finding::Known(known) if known.symptom);
    if let (true, Some((path, log))) = (passed_on, named_log(&text)) {
        let better = floe_explain::explain(&log);
        if matches!(&better, Finding::Known(known) if !known.symptom) {
            (source, finding) = (path, better);
        }
    }
    let (text, exit) = answer(&source, &finding, &what);
    own::print(&text)?;
    Ok(exit)
}

fn answer(source: &str, finding: &Finding, what: &[String]) -> (String, Exit) {
    match finding {
        Finding::Known(known) => (known_text(source, known), Exit::Done),
        Finding::Unknown { line, number } => (
            format!(
                "First error ({source}, line {number}):\n  {line}\n\nNo explanation of it is known. Run the command again with -v4 and look at the lines above it.\n"
            ),
            Exit::Failed,
        ),
        Finding::Nothing if source == MESSAGE && what.len() == 1 => (
            format!(
                "There is no file `{}`, and as a message it reports no error.\n",
                what[0]
            ),
            Exit::Failed,
        ),
        Finding::Nothing => (
            format!("No line of {source} reports an error.\n"),
            Exit::Failed,
        ),
    }
}

/// Explains the log of a directory that knows the most: the first with a cause, in the order of [`logs`].
fn explain_directory(directory: &Path) -> Result<Exit, Failure> {
    let mut best: Option<(u8, String, Finding)> = None;
    for path in logs(directory)? {
        let shown = path.display().to_string();
        let (source, text) = read(&[shown])?;
        let finding = floe_explain::explain(&text);
        let rank = match &finding {
            Finding::Known(known) if !known.symptom => 0,
            Finding::Known(_) => 1,
            Finding::Unknown { .. } => 2,
            Finding::Nothing => 3,
        };
        if best.as_ref().is_none_or(|(least, ..)| rank < *least) {
            best = Some((rank, source, finding));
        }
    }
    let (text, exit) = match &best {
        Some((_, source, finding)) => answer(source, finding, &[]),
        None => (
            format!(
                "There is no log in {0} (dump.log, restore.log or another *.log). Give the log or the message; a run\n\
                 with `-o FILE` writes one. If {0} holds a checkpoint, `floe verify {0}` looks at that.\n",
                directory.display()
            ),
            Exit::Failed,
        ),
    };
    own::print(&text)?;
    Ok(exit)
}

/// The logs of a directory: those with the names that engines give them, then the others by name.
fn logs(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    const NAMES: [&str; 4] = ["restore.log", "dump.log", "pre-dump.log", "criu.log"];
    let shown = || format!("reading {}", directory.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(shown)? {
        let path = entry.with_context(shown)?.path();
        if path.extension().is_some_and(|end| end == "log") && path.is_file() {
            found.push(path);
        }
    }
    let place = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        let known = NAMES.iter().position(|known| name == *known);
        (known.unwrap_or(NAMES.len()), path.clone())
    };
    found.sort_by_key(place);
    Ok(found)
}

/// Where the text is from, and the text.
fn read(what: &[String]) -> Result<(String, String), Failure> {
    let whole = what.join(" ");
    let mut bytes = Vec::new();
    if whole == "-" {
        let mut input = std::io::stdin().take(MAX_LOG);
        input
            .read_to_end(&mut bytes)
            .context("reading standard input")?;
        return Ok(("standard input".into(), lossy(&bytes)));
    }
    let path = Path::new(&whole);
    match std::fs::File::open(path) {
        Ok(file) => {
            let read = file.take(MAX_LOG).read_to_end(&mut bytes);
            read.with_context(|| format!("reading {whole}"))?;
            Ok((whole, lossy(&bytes)))
        }
        // A word without spaces is meant as a file.
        Err(error) if what.len() == 1 && !whole.contains(' ') && whole.contains('/') => {
            Err(anyhow::Error::new(error)
                .context(format!("reading {whole}"))
                .into())
        }
        Err(_) => Ok((MESSAGE.into(), whole)),
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The log that a runtime's message names and that is still there.
fn named_log(text: &str) -> Option<(String, String)> {
    let words = text.split(|c: char| c.is_whitespace() || "\"'`,;()".contains(c));
    let mut paths = words.filter(|word| word.starts_with('/') && word.ends_with(".log"));
    paths.find_map(|path| {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).ok()?;
        file.take(MAX_LOG).read_to_end(&mut bytes).ok()?;
        Some((path.to_owned(), lossy(&bytes)))
    })
}

fn known_text(source: &str, known: &Explanation) -> String {
    let kind = if known.symptom { "Symptom" } else { "Cause" };
    format!(
        "{kind} ({source}, line {}):\n  {}\n\nWhat happened: {}\n\nWhat to do: {}\n\n  {}\n",
        known.number, known.line, known.what, known.remedy, known.command
    )
}

/// The same for an error of our own, as lines that follow it.
pub fn of_failure(lines: &[String]) -> Vec<String> {
    match floe_explain::explain(&lines.join("\n")) {
        Finding::Known(known) if !known.symptom => vec![
            format!("what happened: {}", known.what),
            format!("what to do: {}", known.remedy),
            format!("try: {}", known.command),
        ],
        _ => Vec::new(),
    }
}
