//! The form of an archive, and reading one without unpacking it.
//!
//! An archive is a tar of `checkpoint/*` in independent zstd frames. Its last member,
//! `floe-archive.json`, is the index and lies in the last frame; see `docs/archive.md`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use floe_image::catalogue::ImageKind;
use floe_image::dir::PARENT_LINK;
use floe_image::frames::FramedReader;
use floe_image::manifest::DumpKind;
use floe_image::{ImageDir, ImageStore, PagesReader};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::held::Scratch;
use crate::stream::{Opened, Stream, with_cause};
use crate::unpack::UnpackError;

/// Name of the index.
pub const INDEX_NAME: &str = "floe-archive.json";
/// Name of the head, the first member: what a reader of a stream must know before the pages come.
pub const HEAD_NAME: &str = "floe-head.json";
/// Name of the member behind the head: copies of pages that a restore reads before all others.
pub const EARLY_NAME: &str = "floe-early.img";
/// Directory of the images in the archive.
pub const IMAGES: &str = "checkpoint/";
/// Version of the index of an archive whose images come before its pages.
pub const INDEX_FORMAT: u32 = 1;
/// Version of one whose pages come first, and whose head is in the index only; the newest that is read.
pub const INDEX_FORMAT_LATE: u32 = 2;
/// Largest index, in bytes.
pub const MAX_INDEX: u64 = 128 << 20;
/// Largest file other than pages that is read from an archive, in bytes: it is copied to be read.
const MAX_SMALL: u64 = 1 << 40;
/// Bytes of a tar header, and what members are padded to.
pub const BLOCK: u64 = 512;

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of the content in hex.
    pub blake3: String,
    /// Offset of the content in the tar, in bytes.
    pub offset: u64,
}

/// The generation that an increment builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its number.
    pub generation: u32,
    /// What stands for it and no other.
    pub digest: String,
}

/// The content of `floe-head.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// See [`INDEX_FORMAT`].
    pub format: u32,
    /// Whether the newest generation can be restored.
    pub kind: DumpKind,
    /// Number of the oldest generation in it.
    pub first: u32,
    /// Number of the newest.
    pub last: u32,
    /// What an increment builds on.
    pub base: Option<Base>,
    /// What stands for each generation from `first` to `last`.
    pub digests: Vec<String>,
    /// Files of pages and their sizes in bytes.
    pub pages: BTreeMap<String, u64>,
    /// Pages of which copies lie before the images.
    pub early: Vec<Early>,
}

/// Pages that a restore reads before all others, to plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Early {
    /// The file of pages.
    pub file: String,
    /// Offset in it, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the copy in its member; tasks share one.
    pub copy: u64,
}

impl Head {
    /// Whether the generation is in the archive.
    pub fn holds(&self, generation: u32) -> bool {
        (self.first..=self.last).contains(&generation)
    }

    /// What stands for a generation in the archive.
    fn digest(&self, generation: u32) -> Option<&String> {
        let index = generation.checked_sub(self.first)?;
        self.digests.get(index as usize)
    }
}

/// The content of `floe-archive.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// The same as at the beginning.
    #[serde(flatten)]
    pub head: Head,
    /// Every file by its name without the directory.
    pub members: BTreeMap<String, Member>,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file.
    #[error("Reading the archive {}", called(path))]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is no archive of ours, or damaged.
    #[error("{} is no whole archive of Floe: {what}", called(path))]
    Damaged { path: PathBuf, what: String },
    /// It is newer than this program.
    #[error("{} has format {format}; this version of Floe knows formats up to {INDEX_FORMAT_LATE}: use a newer one", path.display())]
    Format { path: PathBuf, format: u32 },
    /// A generation is in none of the archives.
    #[error("Generation {generation} is missing: {} builds on it, and none of the archives given has it ({have}). \
             Give the archive that has it, or make one with `floe pack{}`", path.display(), .since.map(|since| format!(" --since {since}")).unwrap_or_default())]
    Hole {
        path: PathBuf,
        generation: u32,
        have: String,
        since: Option<u32>,
    },
    /// The generation with that number is another one.
    #[error("{} builds on generation {generation} of another chain than {} holds: they were made of different dumps", path.display(), base.display())]
    OtherChain {
        path: PathBuf,
        base: PathBuf,
        generation: u32,
    },
    /// Only memory of a running program.
    #[error("The newest generation in {} is a pre-dump: it holds memory only. Add the archive of the final dump, made with `floe pack --since {last}`", path.display())]
    PreDump { path: PathBuf, last: u32 },
}

/// What a file is called in messages.
fn called(path: &Path) -> Cow<'_, str> {
    match path == Path::new("-") {
        true => "standard input".into(),
        false => path.to_string_lossy(),
    }
}

impl ArchiveError {
    /// Names the file that could not be unpacked: it cannot be read, or it is not what it should be.
    pub(crate) fn of(path: &Path, error: UnpackError) -> ArchiveError {
        let path = path.to_path_buf();
        match error {
            UnpackError::Archive(error) => error,
            UnpackError::Decode(source) if source.raw_os_error().is_some() => {
                ArchiveError::Read { path, source }
            }
            UnpackError::Decode(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                let what = "it is empty, or was cut".into();
                ArchiveError::Damaged { path, what }
            }
            error => ArchiveError::Damaged {
                path,
                what: with_cause(&error),
            },
        }
    }
}

/// An opened archive.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    frames: Arc<FramedReader>,
    index: Index,
    scratch: Scratch,
}

impl Archive {
    /// Opens an archive that can be read at any place.
    pub fn open(path: &Path) -> Result<Archive, ArchiveError> {
        let opened = File::open(path).map_err(|source| ArchiveError::Read {
            path: path.to_path_buf(),
            source,
        });
        Archive::from_file(opened?, path)
    }

    /// Reads table and index of a file that can be read at any place.
    pub fn from_file(file: File, path: &Path) -> Result<Archive, ArchiveError> {
        let damaged = |what: String| ArchiveError::Damaged {
            path: path.to_path_buf(),
            what,
        };
        let frames = FramedReader::open(file).map_err(|error| damaged(error.to_string()))?;
        let text = index_text(&frames).map_err(|error| damaged(error.to_string()))?;
        let index: Index = parse(&text, path)?;
        check_head(&index.head, path)?;
        for (name, member) in &index.members {
            let end = member.offset.checked_add(member.size);
            if !is_plain_name(name) || end.is_none_or(|end| end > frames.len()) {
                return Err(damaged(format!(
                    "its index has the impossible member {name:?}"
                )));
            }
        }
        Ok(Archive {
            path: path.to_path_buf(),
            frames: Arc::new(frames),
            index,
            scratch: Scratch::open(),
        })
    }

    /// The index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn into_images(self, base: Option<ImageDir>) -> ImageDir {
        let path = self.path.clone();
        ImageDir::from_store(
            Arc::new(ArchivedImages {
                archive: self,
                base,
            }),
            path,
        )
    }
}

/// Where an archive comes from.
enum Input {
    /// It can be read at any place.
    File(File),
    /// It can be read once.
    Pipe(File),
}

/// Opens a path; `-` is standard input.
fn open_input(path: &Path) -> io::Result<Input> {
    let mut file = match path == Path::new("-") {
        true => File::from(io::stdin().as_fd().try_clone_to_owned()?),
        false => File::open(path)?,
    };
    let is_file = file.metadata()?.is_file() && file.seek(SeekFrom::Start(0)).is_ok();
    Ok(if is_file {
        Input::File(file)
    } else {
        Input::Pipe(file)
    })
}

/// Reads a head or an index; the format first, as a newer one may lack what this one must have.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, ArchiveError> {
    let path = path.to_path_buf();
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let damaged = |error: serde_json::Error| ArchiveError::Damaged {
        path: path.clone(),
        what: format!("its index is damaged: {error}"),
    };
    let Versioned { format } = serde_json::from_slice(text).map_err(damaged)?;
    if format > INDEX_FORMAT_LATE {
        return Err(ArchiveError::Format { path, format });
    }
    serde_json::from_slice(text).map_err(damaged)
}

/// Checks that a head fits itself.
pub(crate) fn check_head(head: &Head, path: &Path) -> Result<(), ArchiveError> {
    let count = head.last.checked_sub(head.first);
    let fits = count.map(|count| count as usize + 1) == Some(head.digests.len())
        && head.pages.keys().all(|name| is_plain_name(name));
    match fits {
        true => Ok(()),
        false => Err(ArchiveError::Damaged {
            path: path.to_path_buf(),
            what: "its index does not fit its generations".into(),
        }),
    }
}

/// The text of the index, which is the first member of the last frame.
fn index_text(frames: &FramedReader) -> io::Result<Vec<u8>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let last = frames.frames().last().ok_or_else(|| bad("it is empty"))?;
    if u64::from(last.len) > MAX_INDEX {
        return Err(bad("its index is larger than any that is written"));
    }
    let mut content = vec![0; last.len as usize];
    frames.decode(last, &mut content)?;
    let mut tar = tar::Archive::new(content.as_slice());
    let mut entry = tar
        .entries()?
        .next()
        .ok_or_else(|| bad("its last frame holds no index"))??;
    if entry.path_bytes().as_ref() != INDEX_NAME.as_bytes() {
        return Err(bad("its last frame holds no index"));
    }
    let mut text = Vec::new();
    entry.read_to_end(&mut text)?;
    Ok(text)
}

/// A name of a file directly in the directory.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.contains(['/', '\0'])
        && ![".", "..", PARENT_LINK].contains(&name)
}

/// One of a set of archives.
#[derive(Debug)]
pub enum Part {
    /// A file.
    File(Archive),
    /// What comes through a pipe.
    Stream(Stream),
}

impl Part {
    fn open(path: &Path) -> Result<Part, ArchiveError> {
        let input = open_input(path).map_err(|source| ArchiveError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        match input {
            Input::File(file) => Archive::from_file(file, path).map(Part::File),
            Input::Pipe(pipe) => match Stream::open(Box::new(pipe), path)? {
                Opened::Stream(stream) => Ok(Part::Stream(*stream)),
                Opened::Late(file) => Archive::from_file(file, path).map(Part::File),
            },
        }
    }

    /// What it holds.
    pub fn head(&self) -> &Head {
        match self {
            Part::File(archive) => &archive.index.head,
            Part::Stream(stream) => stream.head(),
        }
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        match self {
            Part::File(archive) => &archive.path,
            Part::Stream(stream) => stream.path(),
        }
    }

    fn into_images(self, base: Option<ImageDir>) -> ImageDir {
        match self {
            Part::File(archive) => archive.into_images(base),
            Part::Stream(stream) => stream.into_images(base),
        }
    }
}

/// The images of archives that make one chain: base and increments in any order. What comes through a
/// pipe is not held: its pages can be read once, in their order.
pub fn open_set(paths: &[PathBuf]) -> Result<ImageDir, ArchiveError> {
    let parts = paths.iter().map(|path| Part::open(path));
    let ordered = order_set(parts.collect::<Result<_, _>>()?)?;
    let newest = ordered.last().expect("a set is never empty");
    if newest.head().kind == DumpKind::PreDump {
        return Err(ArchiveError::PreDump {
            path: newest.path().to_path_buf(),
            last: newest.head().last,
        });
    }
    let images = ordered
        .into_iter()
        .fold(None, |base, part| Some(part.into_images(base)));
    Ok(images.expect("a set is never empty"))
}

/// The images of one archive, whatever they are, to be looked at; `-` is standard input. What comes through a
/// pipe is read to its end first: its checksums are compared, and its pages are not kept.
pub fn open_images(path: &Path) -> Result<ImageDir, ArchiveError> {
    match Part::open(path)? {
        Part::File(archive) => Ok(archive.into_images(None)),
        Part::Stream(stream) => stream.scan(),
    }
}

/// The archives that the newest one needs, oldest first.
pub(crate) fn order_set(mut left: Vec<Part>) -> Result<Vec<Part>, ArchiveError> {
    // With equal ends the one that reaches further back is wanted.
    left.sort_by_key(|part| (part.head().last, std::cmp::Reverse(part.head().first)));
    let have: Vec<String> = left
        .iter()
        .map(|part| format!("{} to {}", part.head().first, part.head().last))
        .collect();
    let have = have.join(", ");
    let mut ordered: Vec<Part> = left.pop().into_iter().collect();
    while let Some((base, path)) = ordered
        .first()
        .and_then(|first| Some((first.head().base.clone()?, first.path().to_path_buf())))
    {
        let number = base.generation;
        let Some(found) = left.iter().rposition(|part| part.head().holds(number)) else {
            let lasts = left.iter().map(|part| part.head().last);
            return Err(ArchiveError::Hole {
                path,
                generation: number,
                have,
                since: lasts.filter(|last| *last < number).max(),
            });
        };
        let found = left.remove(found);
        // It may hold newer ones, too; those must be the same that were built on.
        let newer = ordered.first().expect("there is one").head();
        let last = found.head().last;
        let same_last = last == number || newer.digest(last) == found.head().digest(last);
        if found.head().digest(number) != Some(&base.digest) || !same_last {
            return Err(ArchiveError::OtherChain {
                path,
                base: found.path().to_path_buf(),
                generation: number,
            });
        }
        ordered.insert(0, found);
    }
    Ok(ordered)
}

/// Images that stay in their archive.
#[derive(Debug)]
struct ArchivedImages {
    archive: Archive,
    base: Option<ImageDir>,
}

impl ImageStore for ArchivedImages {
    fn names(&self) -> Vec<String> {
        self.archive.index.members.keys().cloned().collect()
    }

    fn open(&self, name: &str) -> io::Result<Option<File>> {
        let Some(member) = self.archive.index.members.get(name) else {
            return Ok(None);
        };
        if matches!(ImageKind::of_file_name(name), Some((ImageKind::Pages, _))) {
            return Err(io::Error::other("pages are read where they are"));
        }
        if member.size > MAX_SMALL {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut file = self.archive.scratch.file(member.size)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; (256 << 10).min(member.size as usize)];
        let mut done = 0;
        while done < member.size {
            let part = (member.size - done).min(buffer.len() as u64) as usize;
            self.archive
                .frames
                .read_exact_at(&mut buffer[..part], member.offset + done)?;
            hasher.update(&buffer[..part]);
            file.write_all(&buffer[..part])?;
            done += part as u64;
        }
        if hasher.finalize().to_hex().as_str() != member.blake3 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it differs from its checksum: the archive is damaged",
            ));
        }
        file.seek(SeekFrom::Start(0))?;
        Ok(Some(file))
    }

    fn pages(&self, name: &str) -> io::Result<Option<PagesReader>> {
        let member = self.archive.index.members.get(name);
        Ok(member.map(|member| PagesReader::Framed {
            frames: self.archive.frames.clone(),
            start: member.offset,
            len: member.size,
        }))
    }

    fn size(&self, name: &str) -> Option<u64> {
        self.archive
            .index
            .members
            .get(name)
            .map(|member| member.size)
    }

    fn parent(&self) -> Option<ImageDir> {
        self.base.clone()
    }

    fn passes_by(&self) -> bool {
        self.base.as_ref().is_some_and(ImageDir::passes_by)
    }

    fn check_rest(&self) -> io::Result<()> {
        check_base(self.base.as_ref())
    }
}

/// Checks the rest of what images build on.
pub(crate) fn check_base(base: Option<&ImageDir>) -> io::Result<()> {
    base.map_or(Ok(()), ImageDir::check_rest)
        .map_err(io::Error::other)
}
