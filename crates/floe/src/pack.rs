//! `floe pack`: a chain into one archive.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use floe_archive::Chain;
use floe_archive::direct::{DirectArchive, Out};
use floe_archive::pack::{PackError, PackOptions, PackReport, pack, pack_consuming};
use floe_dump::DirLock;
use floe_image::ImageDir;
use floe_inject::Watch;
use floe_memory::{PageStore, punch_chain};
use floe_options::Place;
use rustix::fs::{FileType, OFlags};

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
    let pack = |out: &mut dyn Write| pack(&dir, out, &options).map_err(failure);
    if line.output == Path::new("-") {
        refuse_closed_output()?;
    }
    write(&pack, &line.output)?;
    Ok(Exit::Done)
}

/// `dump --archive`: a directory for the images until the archive is whole.
///
/// The pages of a dump without a parent go into the archive as they are copied. Those of rounds lie in the
/// directory until they are packed.
pub struct OnTheWay {
    directory: PathBuf,
    /// In it.
    images: PathBuf,
    archive: PathBuf,
    options: PackOptions,
    direct: Option<Arc<DirectArchive>>,
    /// Tells whether the dump was called off.
    watch: Watch,
    /// While it is held, the directory is in use.
    _ours: DirLock,
}

impl OnTheWay {
    /// Makes the directory in that of the images, and lets the dump write to it. `codec` may name a level.
    pub fn begin(
        archive: &Path,
        codec: Option<&str>,
        (place, in_rounds): (&mut Place, bool),
        watch: &Watch,
    ) -> Result<OnTheWay, Failure> {
        if archive == Path::new("-") {
            refuse_closed_output()?;
        }
        let parent = archive.parent().filter(|parent| *parent != Path::new(""));
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            return Err(anyhow::anyhow!(
                "--archive: there is no directory {}: make it first",
                parent.display()
            )
            .into());
        }
        let level = codec.and_then(|codec| codec.strip_prefix("zstd:"));
        let level = level.and_then(|level| level.parse().ok());
        remove_those_of_killed(&place.images_dir);
        let directory = directory_of(&place.images_dir, std::process::id().cast_signed());
        let images = directory.join("images");
        let ours = DirLock::take(&directory);
        let made = std::fs::DirBuilder::new().mode(0o700).create(&images);
        made.with_context(|| format!("making {}", images.display()))?;
        let mut on_the_way = OnTheWay {
            _ours: ours.map_err(|error| Failure::new(Exit::Failed, error))?,
            directory,
            images,
            archive: archive.to_path_buf(),
            options: PackOptions {
                since: None,
                level: level.unwrap_or(LEVEL),
                threads: own::processors(),
            },
            direct: None,
            watch: watch.clone(),
        };
        if place.prev_images_dir.is_none() && !in_rounds {
            match on_the_way.begin_direct() {
                Ok(direct) => on_the_way.direct = Some(Arc::new(direct)),
                Err(failure) => {
                    on_the_way.give_up();
                    return Err(failure);
                }
            }
        }
        if let Some(previous) = &mut place.prev_images_dir {
            *previous = place.images_dir.join(&*previous);
        }
        if place.work_dir == place.images_dir {
            place.work_dir = on_the_way.images.clone();
        }
        place.images_dir = on_the_way.images.clone();
        Ok(on_the_way)
    }

    fn begin_direct(&self) -> Result<DirectArchive, Failure> {
        let output = Output::open(&self.archive)?;
        let file = output.file.try_clone().context("copying a descriptor")?;
        let path = self.archive.clone();
        let out = match output.part {
            Some(_) => Out::File(file),
            None => Out::Pipe(file),
        };
        let watch = self.watch.clone();
        let keep = Box::new(move |report: PackReport| {
            if watch.is_cancelled() {
                return Err(called_off());
            }
            output.keep(&path)?;
            say(&path, &report);
            Ok(())
        });
        let (images, threads) = (self.images.clone(), self.options.threads);
        DirectArchive::begin(out, images, (self.options.level, threads), keep).map_err(failure)
    }

    /// Takes pages as they are copied; `None` where they go to the directory.
    pub fn store(&self) -> Option<Arc<dyn PageStore>> {
        let direct = self.direct.clone();
        direct.map(|direct| direct as Arc<dyn PageStore>)
    }

    /// The dump is whole, and its tree is still there: makes the archive of it.
    pub fn seal(&self) -> Result<(), Failure> {
        if let Some(direct) = &self.direct {
            return direct.seal().map_err(failure);
        }
        let dir = ImageDir::open(&self.images);
        let dir = dir.map_err(|error| Failure::new(Exit::BadImage, error))?;
        give_back_replaced(&dir, &self.images)?;
        let pack = |out: &mut dyn Write| {
            let mut out = Watched(out, &self.watch);
            let report = pack_consuming(&dir, &mut out, &self.options, &self.images);
            let report = report.map_err(failure)?;
            // Nothing is written from here to the name.
            out.flush()
                .map_err(|error| failure(PackError::Write(error)))?;
            Ok(report)
        };
        write(&pack, &self.archive)
    }

    /// Removes what an engine that was killed has left: an archive that is not whole, and the directory, which
    /// nobody needs without it or beside it.
    pub fn remove_left(archive: &Path, images_dir: &Path, engine: i32) {
        let _ = std::fs::remove_dir_all(directory_of(images_dir, engine));
        let part = part_of(archive).filter(|_| archive != Path::new("-"));
        if let Some(part) = part {
            let _ = std::fs::remove_file(part);
        }
    }

    /// Removes the directory: nothing in it is needed.
    pub fn give_up(self) {
        // What is left of it has no manifest, or is in the archive.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Takes nothing any more when the dump is called off: its tree stands still as long as there is something to write.
struct Watched<'a>(&'a mut dyn Write, &'a Watch);

impl Watched<'_> {
    fn check(&self) -> io::Result<()> {
        match self.1.is_cancelled() {
            true => Err(called_off()),
            false => Ok(()),
        }
    }
}

impl Write for Watched<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.check()?;
        self.0.flush()
    }
}

/// Whoever has asked for the dump is gone: the archive does not get its name.
fn called_off() -> io::Error {
    io::Error::other("the dump was called off")
}

/// Refuses to write an archive to where nobody can have it. Where standard output was closed at the start, the
/// null device takes its place, open both ways.
fn refuse_closed_output() -> Result<(), Failure> {
    let stdout = io::stdout();
    let flags = rustix::fs::fcntl_getfl(&stdout);
    let is_both_ways = flags.is_ok_and(|flags| flags.contains(OFlags::RDWR));
    let is_null = rustix::fs::fstat(&stdout).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3)
    });
    match is_both_ways && is_null {
        false => Ok(()),
        true => Err(Failure::new(
            Exit::Usage,
            anyhow::anyhow!(
                "--archive: `-` is standard output, which is closed: nobody would have the archive. Give a file, or a pipe"
            ),
        )),
    }
}

/// Gives back the room of pages that later rounds replace; what the rounds build on is not ours.
fn give_back_replaced(dir: &ImageDir, directory: &Path) -> Result<(), Failure> {
    let chain = Chain::open(dir).map_err(|error| Failure::new(Exit::BadImage, error))?;
    let mut generations = chain.generations().iter();
    if generations.all(|generation| generation.dir.path().starts_with(directory)) {
        let given = punch_chain(dir).map_err(|error| Failure::new(Exit::Failed, error))?;
        tracing::info!(bytes = given.0, "gave back room of replaced pages");
    }
    Ok(())
}

/// How directories of images that go into an archive begin; the engine's pid follows.
const ON_THE_WAY: &str = ".floe-archive-";

/// Where an engine puts images that go into an archive.
fn directory_of(images_dir: &Path, engine: i32) -> PathBuf {
    images_dir.join(format!("{ON_THE_WAY}{engine}"))
}

/// Removes such directories of engines that were killed together with whoever looked after them.
fn remove_those_of_killed(images_dir: &Path) {
    let entries = std::fs::read_dir(images_dir)
        .into_iter()
        .flatten()
        .flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(ON_THE_WAY));
    left.for_each(|entry| DirLock::remove_left(&entry.path()));
}

/// The name of an archive until it is whole.
fn part_of(archive: &Path) -> Option<PathBuf> {
    let mut name = archive.file_name()?.to_os_string();
    name.push(".part");
    Some(archive.with_file_name(name))
}

/// Where an archive goes: a file that gets its name when it is whole, or whatever is there.
struct Output {
    file: File,
    /// The file's name until then.
    part: Option<PathBuf>,
}

impl Output {
    fn open(path: &Path) -> Result<Output, Failure> {
        if path == Path::new("-") {
            let fd = io::stdout().as_fd().try_clone_to_owned();
            let file = File::from(fd.context("copying standard output")?);
            return Ok(Output { file, part: None });
        }
        // A pipe or a device is written to as it is.
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            let opened = File::options().write(true).open(path);
            let file = opened.with_context(|| format!("opening {}", path.display()))?;
            return Ok(Output { file, part: None });
        }
        let part = part_of(path).context("the archive needs a name")?;
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600);
        let file = options.open(&part);
        let file = file.with_context(|| format!("creating {}", part.display()))?;
        let part = Some(part);
        Ok(Output { file, part })
    }

    /// The archive is whole: it gets its name, to last.
    fn keep(mut self, path: &Path) -> io::Result<()> {
        let Some(part) = &self.part else {
            return Ok(());
        };
        self.file.sync_all()?;
        std::fs::rename(part, path)?;
        self.part = None;
        let parent = path.parent().filter(|parent| *parent != Path::new(""));
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // It may be in the way of the next try, no more.
            let _ = std::fs::remove_file(part);
        }
    }
}

/// Packs to a file, or `-`, and says so; no half of an archive bears its name.
fn write(
    pack: &dyn Fn(&mut dyn Write) -> Result<PackReport, Failure>,
    path: &Path,
) -> Result<(), Failure> {
    let output = Output::open(path)?;
    let report = pack(&mut BufWriter::new(&output.file))?;
    let kept = output.keep(path);
    kept.with_context(|| format!("keeping {}", path.display()))?;
    say(path, &report);
    Ok(())
}

fn say(path: &Path, report: &PackReport) {
    let (first, last) = report.generations;
    let text = format!(
        "{}: generations {first} to {last}, {} from {}\n",
        path.display(),
        own::size(report.written),
        own::size(report.content)
    );
    // Standard output may be the archive.
    let _ = io::stderr().write_all(text.as_bytes());
}

fn failure(error: PackError) -> Failure {
    let exit = match error {
        PackError::Write(_) => Exit::Failed,
        _ => Exit::BadImage,
    };
    Failure::new(exit, error)
}
