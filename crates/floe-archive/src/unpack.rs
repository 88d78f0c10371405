//! Unpacking an archive: trusts nothing in it.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use floe_image::dir::PARENT_LINK;
use floe_image::manifest::MANIFEST_NAME;
use rustix::fs::{AtFlags, Mode, OFlags, openat};

use crate::archive::{Archive, ArchiveError, INDEX_NAME, Index, Part, order_set, parse};
use crate::tar_reader::{MAX_MEMBERS, Piece, TarReader};

/// Directory in which the older archives of a set are unpacked.
pub const EARLIER: &str = "earlier";
/// How many parts may wait between the decoder and the writer.
const WAITING: usize = 8;

/// How much may be unpacked.
#[derive(Clone, Copy, Debug)]
pub struct UnpackLimits {
    /// Bytes of all files: an archive of zeros is small.
    pub bytes: u64,
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnpackReport {
    /// Files.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Unpacking failed; what was made is removed again.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// An archive cannot be read, or the set has a hole.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The directory is not empty, or cannot be made.
    #[error("The directory {} must be new or empty", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A member that no archive of ours has.
    #[error("The archive has the member {name:?}, {what}: refused, nothing of ours looks so")]
    Refused { name: String, what: &'static str },
    /// It is larger than allowed.
    #[error(
        "The archive holds more than {limit} bytes or {MAX_MEMBERS} files: refused (raise --limit if you trust it)"
    )]
    TooLarge { limit: u64 },
    /// It cannot be decoded.
    #[error("Decoding the archive: it is damaged or was cut")]
    Decode(#[source] io::Error),
    /// A file cannot be written.
    #[error("Writing {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file is not what the index says.
    #[error("{name} in the archive is damaged: it differs from its checksum")]
    Checksum { name: String },
    /// A file of the index is not there, or there is no index.
    #[error("{name} is missing in the archive: it was cut")]
    Missing { name: String },
}

/// Unpacks a set of archives into `into`; older ones go to `earlier/` in it.
pub fn unpack_set(
    paths: &[PathBuf],
    into: &Path,
    limits: UnpackLimits,
) -> Result<UnpackReport, UnpackError> {
    if let [path] = paths {
        let named = |error| match error {
            UnpackError::Decode(_) => ArchiveError::of(path, error).into(),
            error => error,
        };
        if path == Path::new("-") {
            return unpack(io::stdin().lock(), into, limits).map_err(named);
        }
        // What comes through a pipe can be read once.
        if !path.is_file()
            && let Ok(pipe) = File::open(path)
        {
            return unpack(pipe, into, limits).map_err(named);
        }
    }
    let parts = paths.iter().map(|path| Archive::open(path).map(Part::File));
    let ordered = order_set(parts.collect::<Result<_, _>>()?)?;
    let failed = |source| UnpackError::Directory {
        path: into.to_path_buf(),
        source,
    };
    let is_new = !into.exists();
    // Before anything is put beside what is there.
    new_directory(into, false).map_err(failed)?;
    let outcome = unpack_ordered(&ordered, into, limits);
    if outcome.is_err() {
        // What cannot be removed is no part of a whole set.
        let _ = std::fs::remove_dir_all(into.join(EARLIER));
        if is_new {
            let _ = std::fs::remove_dir(into);
        }
    }
    outcome
}

/// Unpacks archives of which each builds on the one before it.
fn unpack_ordered(
    archives: &[Part],
    into: &Path,
    limits: UnpackLimits,
) -> Result<UnpackReport, UnpackError> {
    let mut report = UnpackReport::default();
    let mut parent: Option<u32> = None;
    for (number, archive) in archives.iter().enumerate() {
        let newest = number + 1 == archives.len();
        let target = if newest {
            into.to_path_buf()
        } else {
            into.join(EARLIER).join(archive.head().last.to_string())
        };
        let opened = File::open(archive.path());
        let file = opened.map_err(|source| ArchiveError::Read {
            path: archive.path().to_path_buf(),
            source,
        })?;
        let failed = |source| UnpackError::Directory {
            path: target.clone(),
            source,
        };
        if !newest {
            let earlier = into.join(EARLIER);
            private().recursive(true).create(earlier).map_err(failed)?;
        }
        let one = unpack_beside(file, &target, limits, newest && number > 0)?;
        report.files += one.files;
        report.bytes += one.bytes;
        if let Some(parent) = parent {
            let to = if newest {
                format!("{EARLIER}/{parent}")
            } else {
                format!("../{parent}")
            };
            std::os::unix::fs::symlink(to, target.join(PARENT_LINK)).map_err(failed)?;
        }
        parent = Some(archive.head().last);
    }
    Ok(report)
}

/// Unpacks one archive from a stream.
pub fn unpack(
    source: impl Read,
    into: &Path,
    limits: UnpackLimits,
) -> Result<UnpackReport, UnpackError> {
    unpack_beside(source, into, limits, false)
}

fn unpack_beside(
    source: impl Read,
    into: &Path,
    limits: UnpackLimits,
    has_earlier: bool,
) -> Result<UnpackReport, UnpackError> {
    let is_new = !into.exists();
    let directory = new_directory(into, has_earlier).map_err(|source| UnpackError::Directory {
        path: into.to_path_buf(),
        source,
    })?;
    let (sender, receiver) = sync_channel(WAITING);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_files(&directory, into, receiver));
        let decoded = decode(source, &sender, limits);
        drop(sender);
        let mut written = writer.join().expect("the writer does not panic");
        let outcome = match (decoded, written.failed.take()) {
            // The decoder also fails when the writer has gone.
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(error),
            (Ok(index), None) => finish(&directory, into, &written, &index),
        };
        if outcome.is_err() {
            for name in written.hashes.keys().chain([&MANIFEST_NAME.to_owned()]) {
                // What cannot be removed lacks its manifest all the same.
                let _ = rustix::fs::unlinkat(&directory, name.as_str(), AtFlags::empty());
            }
            if is_new {
                // Nothing of ours is in it.
                let _ = std::fs::remove_dir(into);
            }
        }
        outcome
    })
}

/// Makes directories for their owner only.
fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

fn new_directory(path: &Path, has_earlier: bool) -> io::Result<rustix::fd::OwnedFd> {
    match private().create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    let mut inside = std::fs::read_dir(path)?.flatten();
    if inside.any(|entry| !(has_earlier && entry.file_name() == EARLIER)) {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Takes the tar apart; gives the index.
fn decode(
    source: impl Read,
    sender: &SyncSender<Piece>,
    limits: UnpackLimits,
) -> Result<Vec<u8>, UnpackError> {
    let mut tar = TarReader::new(source, limits);
    let mut index = None;
    loop {
        match tar.next_piece()? {
            Piece::Index(text) => index = Some(text),
            Piece::End => break,
            // A send fails when the writer has failed, which says more.
            piece => sender
                .send(piece)
                .map_err(|_| UnpackError::Decode(io::ErrorKind::BrokenPipe.into()))?,
        }
    }
    index.ok_or_else(|| UnpackError::Missing {
        name: INDEX_NAME.into(),
    })
}

/// What the writer has done.
#[derive(Default)]
struct Written {
    hashes: BTreeMap<String, (u64, blake3::Hash)>,
    /// Content of the manifest, which is written when all is checked.
    manifest: Vec<u8>,
    failed: Option<UnpackError>,
}

/// A file that is being written.
struct Open {
    name: String,
    /// None for the manifest, which is kept back.
    file: Option<File>,
    hasher: blake3::Hasher,
    size: u64,
}

fn write_files(directory: &rustix::fd::OwnedFd, into: &Path, pieces: Receiver<Piece>) -> Written {
    let mut written = Written::default();
    let mut open: Option<Open> = None;
    for piece in pieces {
        let outcome = match piece {
            Piece::Begin { name, .. } => {
                written.close(open.take());
                begin(directory, name, &written).map(|begun| open = Some(begun))
            }
            Piece::Content(content) => match &mut open {
                Some(open) => written.append(open, &content, into),
                None => Ok(()),
            },
            Piece::Head(_) | Piece::Early(_) | Piece::Index(_) | Piece::End => Ok(()),
        };
        if let Err(error) = outcome {
            written.close(open.take());
            written.failed = Some(error);
            return written;
        }
    }
    written.close(open.take());
    written
}

fn begin(
    directory: &rustix::fd::OwnedFd,
    name: String,
    written: &Written,
) -> Result<Open, UnpackError> {
    if written.hashes.contains_key(&name) {
        return Err(UnpackError::Refused {
            name,
            what: "which is there twice",
        });
    }
    let file = match name == MANIFEST_NAME {
        true => None,
        false => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = openat(directory, name.as_str(), flags, Mode::RUSR | Mode::WUSR);
            let opened = opened.map_err(|errno| UnpackError::Write {
                path: PathBuf::from(&name),
                source: errno.into(),
            })?;
            Some(File::from(opened))
        }
    };
    Ok(Open {
        name,
        file,
        hasher: blake3::Hasher::new(),
        size: 0,
    })
}

impl Written {
    fn append(&mut self, open: &mut Open, content: &[u8], into: &Path) -> Result<(), UnpackError> {
        open.hasher.update(content);
        open.size += content.len() as u64;
        match &mut open.file {
            None if open.size > floe_image::manifest::MAX_MANIFEST => Err(UnpackError::Refused {
                name: open.name.clone(),
                what: "which is too large",
            }),
            None => {
                self.manifest.extend_from_slice(content);
                Ok(())
            }
            Some(file) => file
                .write_all(content)
                .map_err(|source| UnpackError::Write {
                    path: into.join(&open.name),
                    source,
                }),
        }
    }

    fn close(&mut self, open: Option<Open>) {
        if let Some(open) = open {
            self.hashes
                .insert(open.name, (open.size, open.hasher.finalize()));
        }
    }
}

/// Compares all with the index; only then the manifest is written, by which the checkpoint is whole.
fn finish(
    directory: &rustix::fd::OwnedFd,
    into: &Path,
    written: &Written,
    index: &[u8],
) -> Result<UnpackReport, UnpackError> {
    compare(&written.hashes, &parse(index, into)?)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened =
        openat(directory, MANIFEST_NAME, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from);
    let saved = opened.and_then(|fd| File::from(fd).write_all(&written.manifest));
    saved.map_err(|source| UnpackError::Write {
        path: into.join(MANIFEST_NAME),
        source,
    })?;
    Ok(UnpackReport {
        files: written.hashes.len(),
        bytes: written.hashes.values().map(|(size, _)| size).sum(),
    })
}

/// Compares sizes and hashes of all files with the index.
pub(crate) fn compare(
    found: &BTreeMap<String, (u64, blake3::Hash)>,
    index: &Index,
) -> Result<(), UnpackError> {
    for (name, member) in &index.members {
        let Some((size, hash)) = found.get(name) else {
            return Err(UnpackError::Missing { name: name.clone() });
        };
        if *size != member.size || hash.to_hex().as_str() != member.blake3 {
            return Err(UnpackError::Checksum { name: name.clone() });
        }
    }
    if let Some(name) = found.keys().find(|name| !index.members.contains_key(*name)) {
        return Err(UnpackError::Refused {
            name: name.clone(),
            what: "which its index does not list",
        });
    }
    Ok(())
}
