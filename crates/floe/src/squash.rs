//! `floe squash`: a chain becomes one full checkpoint.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use floe_archive::squash::{SquashError, squash, squash_in_place};
use floe_image::ImageDir;

use crate::exit::{Exit, Failure};
use crate::own;

/// Makes one full checkpoint of a directory and all that it builds on. The older directories stay.
#[derive(Parser)]
#[command(name = "floe squash", after_help = Exit::HELP, disable_version_flag = true)]
struct Squash {
    /// The newest directory of the chain.
    dir: PathBuf,
    /// A new directory for the result (default: it takes the place of DIR).
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Runs `floe squash`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let line: Squash = match own::parse("floe squash", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let dir = ImageDir::open(&line.dir).map_err(|error| Failure::new(Exit::BadImage, error))?;
    own::refuse_incomplete(&dir)?;
    let squashed = match &line.output {
        Some(output) => squash(&dir, output),
        None => squash_in_place(&line.dir),
    };
    let report = squashed.map_err(failure)?;
    let shown = line.output.as_ref().unwrap_or(&line.dir).display();
    let text = format!(
        "{shown}: {} generations in one, {} bytes of pages\n",
        report.generations, report.bytes
    );
    // The work is done whether anybody reads this or not.
    let _ = std::io::stderr().write_all(text.as_bytes());
    Ok(Exit::Done)
}

fn failure(error: SquashError) -> Failure {
    let exit = match error {
        SquashError::Merge(_) | SquashError::Image(_) => Exit::BadImage,
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}
