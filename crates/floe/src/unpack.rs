//! `floe unpack`: archives into a directory.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::Parser;
use floe_archive::unpack::{UnpackError, UnpackLimits, unpack_set};

use crate::exit::{Exit, Failure};
use crate::own;

/// Unpacks an archive, or a base with its increments in any order, into a new or empty directory.
#[derive(Parser)]
#[command(name = "floe unpack", after_help = Exit::HELP, disable_version_flag = true)]
struct Unpack {
    /// Archives; `-` alone is standard input.
    #[arg(required = true, value_name = "FILE")]
    archives: Vec<PathBuf>,
    /// The directory.
    #[arg(short = 'C', long, value_name = "DIR")]
    directory: PathBuf,
    /// Most bytes to unpack: an archive of zeros is small.
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 40)]
    limit: u64,
}

/// Runs `floe unpack`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let line: Unpack = match own::parse("floe unpack", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let limits = UnpackLimits { bytes: line.limit };
    let report = unpack_set(&line.archives, &line.directory, limits).map_err(failure)?;
    let text = format!(
        "{}: {} files, {} bytes\n",
        line.directory.display(),
        report.files,
        report.bytes
    );
    // The work is done whether anybody reads this or not.
    let _ = std::io::stderr().write_all(text.as_bytes());
    Ok(Exit::Done)
}

fn failure(error: UnpackError) -> Failure {
    let exit = match error {
        UnpackError::Directory { .. } | UnpackError::Write { .. } => Exit::Failed,
        _ => Exit::BadImage,
    };
    Failure::new(exit, error)
}
