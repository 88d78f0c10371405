//! `floe report`: one page that shows a checkpoint and its chain.

mod page;
mod plot;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use crate::exit::{Exit, Failure};
use crate::own;

/// Writes one self-contained page about a checkpoint: rounds, memory, tasks, files.
#[derive(Parser)]
#[command(name = "floe report", after_help = Exit::HELP, disable_version_flag = true)]
struct Report {
    /// A directory of images (the newest of a chain), or an archive.
    path: PathBuf,
    /// The page to write.
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
}

/// Runs `floe report`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let line: Report = match own::parse("floe report", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let summary = own::summary(&line.path)?;
    let page = page::html(&summary);
    std::fs::write(&line.output, page)
        .with_context(|| format!("writing {}", line.output.display()))?;
    Ok(Exit::Done)
}
