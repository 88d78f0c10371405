//! What Floe's own commands share: reading their words, printing.

use std::ffi::OsString;
use std::io::Write;

use anyhow::Context;
use clap::Parser;

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
