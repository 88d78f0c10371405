//! `floe pack`: a chain into one archive.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use floe_archive::pack::{PackError, PackOptions, PackReport, pack};
use floe_image::ImageDir;
use floe_options::Place;

use crate::exit::{Exit, Failure};
use crate::own;

/// Level of zstd where none is given.
const LEVEL: i32 = 3;

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
    #[arg(short, long, default_value_t = LEVEL, allow_hyphen_values = true)]
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
    write(&dir, &line.output, &options)?;
    Ok(Exit::Done)
}

/// Packs to a file, or `-`, and says so.
fn write(dir: &ImageDir, output: &Path, options: &PackOptions) -> Result<(), Failure> {
    // A pipe or a device is written to as it is.
    let is_other = std::fs::metadata(output).is_ok_and(|found| !found.is_file());
    let report = if output == Path::new("-") {
        pack(dir, io::stdout().lock(), options).map_err(failure)?
    } else if is_other {
        let opened = File::options().write(true).open(output);
        let file = opened.with_context(|| format!("opening {}", output.display()))?;
        pack(dir, file, options).map_err(failure)?
    } else {
        to_file(dir, output, options)?
    };
    let (first, last) = report.generations;
    let text = format!(
        "{}: generations {first} to {last}, {} from {}\n",
        output.display(),
        own::size(report.written),
        own::size(report.content)
    );
    // Standard output may be the archive.
    let _ = io::stderr().write_all(text.as_bytes());
    Ok(())
}

/// A directory for the images of `dump --archive`, until the archive is whole.
///
/// Compressing takes longer than copying, and a tree that stands still should not wait for it.
pub struct OnTheWay {
    directory: PathBuf,
    archive: PathBuf,
    level: i32,
}

impl OnTheWay {
    /// Makes the directory in that of the images, and lets the dump write to it. `codec` may name a level.
    pub fn begin(
        archive: &Path,
        codec: Option<&str>,
        place: &mut Place,
    ) -> Result<OnTheWay, Failure> {
        let parent = archive.parent().filter(|parent| *parent != Path::new(""));
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            return Err(
                anyhow::anyhow!("--archive: there is no directory {}", parent.display()).into(),
            );
        }
        let level = codec.and_then(|codec| codec.strip_prefix("zstd:"));
        let level = level.and_then(|level| level.parse().ok());
        let name = format!(".floe-archive-{}", std::process::id());
        let directory = place.images_dir.join(name);
        let made = std::fs::DirBuilder::new().mode(0o700).create(&directory);
        made.with_context(|| format!("making {}", directory.display()))?;
        if let Some(previous) = &mut place.prev_images_dir {
            *previous = place.images_dir.join(&*previous);
        }
        if place.work_dir == place.images_dir {
            place.work_dir = directory.clone();
        }
        place.images_dir = directory.clone();
        Ok(OnTheWay {
            directory,
            archive: archive.to_path_buf(),
            level: level.unwrap_or(LEVEL),
        })
    }

    /// The dump is whole: packs it. If that fails the directory stays, as the tree may be gone.
    pub fn finish(self) -> Result<(), Failure> {
        let options = PackOptions {
            since: None,
            level: self.level,
            threads: own::processors(),
        };
        let opened = ImageDir::open(&self.directory);
        let packed = opened
            .map_err(|error| Failure::new(Exit::BadImage, error))
            .and_then(|dir| write(&dir, &self.archive, &options));
        packed.map_err(|failure| {
            let kept = format!(
                "the dump is whole in {}: `floe pack` it to another place, or restore from there",
                self.directory.display()
            );
            Failure::new(failure.exit, failure.error.context(kept))
        })?;
        self.give_up();
        Ok(())
    }

    /// Removes the directory.
    pub fn give_up(self) {
        // What is left of it has no manifest, or is a whole dump that does not harm.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
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
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        let directory = File::open(parent.unwrap_or(Path::new(".")));
        directory
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("syncing the directory of {shown}"))?;
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
