//! What Floe's own commands share: reading their words, printing.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Parser;
use floe_archive::check::{self, State};
use floe_image::ImageDir;

use crate::exit::{Exit, Failure};

/// Reads the words behind a command; on help or a mistake prints it and gives the exit code.
pub fn parse<T: Parser>(name: &'static str, args: &[OsString]) -> Result<T, Exit> {
    let name = std::iter::once(OsString::from(name));
    T::try_parse_from(name.chain(args.iter().cloned())).map_err(|error| {
        // Nobody is left to tell if the terminal is gone.
        let _ = error.print();
        if error.use_stderr() {
            Exit::Usage
        } else {
            Exit::Done
        }
    })
}

/// Writes to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(text.as_bytes());
    Ok(written.context("writing to standard output")?)
}

/// Threads for work that fills all processors.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Refuses a chain of which something is missing; a pre-dump may well be packed.
pub fn refuse_incomplete(dir: &ImageDir) -> Result<(), Failure> {
    let rows = check::quick(dir);
    let bad = rows
        .iter()
        .filter(|row| row.state == State::Bad && row.about != "kind");
    let lines: Vec<String> = bad
        .map(|row| match &row.remedy {
            Some(remedy) => format!("{}: {remedy}", row.text),
            None => row.text.clone(),
        })
        .collect();
    match lines.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(
            Exit::BadImage,
            anyhow::anyhow!(lines.join("\n")),
        )),
    }
}

/// Opens a directory of images or an archive; `-` is an archive on standard input.
pub fn open_images(path: &Path) -> Result<ImageDir, Failure> {
    let bad = |error: anyhow::Error| Failure::new(Exit::BadImage, error);
    if path != Path::new("-") && !path.is_file() {
        return ImageDir::open(path).map_err(|error| bad(error.into()));
    }
    floe_archive::archive::open_images(path).map_err(|error| bad(error.into()))
}
