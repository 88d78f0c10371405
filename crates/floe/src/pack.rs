//! `floe pack`: a chain into one archive.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use floe_archive::pack::{PackError, PackOptions, PackReport, pack};
use floe_image::ImageDir;

use crate::exit::{Exit, Failure};
use crate::own;

/// Packs a checkpoint with all that it builds on into one archive, each page once (the newest).
///
/// The archive is a tar of zstd frames: `tar --zstd -xf FILE` reads it too.
#[derive(Parser)]
#[command(name = "floe pack", after_help = Exit::HELP, disable_version_flag = true)]
struct Pack {
    /// The newest directory of the chain.
    dir: PathBuf,
    /// The archive to write; `-` is standard output.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Only what is newer than this generation: an increment to an earlier archive.
    #[arg(long, value_name = "GENERATION")]
    since: Option<u32>,
    /// Level of compression, as of zstd.
    #[arg(short, long, default_value_t = 3, allow_hyphen_values = true)]
    level: i32,
    /// Threads that compress (default: one a CPU).
    #[arg(short = 'T', long)]
    threads: Option<usize>,
}

/// Runs `floe pack`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let line: Pack = match own::parse("floe pack", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let dir = ImageDir::open(&line.dir).map_err(|error| Failure::new(Exit::BadImage, error))?;
    own::refuse_incomplete(&dir)?;
    let options = PackOptions {
        since: line.since,
        level: line.level,
        threads: line.threads.unwrap_or_else(own::processors),
    };
    let report = match line.output == Path::new("-") {
        true => pack(&dir, io::stdout().lock(), &options).map_err(failure)?,
        false => to_file(&dir, &line.output, &options)?,
    };
    let (first, last) = report.generations;
    let text = format!(
        "{}: generations {first} to {last}, {} bytes from {}\n",
        line.output.display(),
        report.written,
        report.content
    );
    // Standard output may be the archive.
    let _ = io::stderr().write_all(text.as_bytes());
    Ok(Exit::Done)
}

/// Writes beside the archive and renames, so that no half of one bears its name.
fn to_file(dir: &ImageDir, path: &Path, options: &PackOptions) -> Result<PackReport, Failure> {
    let shown = path.display();
    let mut name = path
        .file_name()
        .context("the archive needs a name")?
        .to_os_string();
    name.push(".part");
    let part = path.with_file_name(name);
    let file = File::create(&part).with_context(|| format!("creating {}", part.display()))?;
    let packed = pack(dir, BufWriter::new(&file), options).map_err(failure);
    let saved = packed.and_then(|report| {
        file.sync_all()
            .with_context(|| format!("syncing {shown}"))?;
        std::fs::rename(&part, path).with_context(|| format!("renaming to {shown}"))?;
        Ok(report)
    });
    if saved.is_err() {
        // It may be in the way of the next try, no more.
        let _ = std::fs::remove_file(&part);
    }
    saved
}

fn failure(error: PackError) -> Failure {
    let exit = match error {
        PackError::Write(_) => Exit::Failed,
        _ => Exit::BadImage,
    };
    Failure::new(exit, error)
}
