//! Writes an images directory: entries, raw files, and the manifest when all is there.

mod abandon;
mod entries;
mod link;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::catalogue::ImageKind;
use crate::framing::MAX_ENTRY;
use crate::manifest::{MANIFEST_NAME, MANIFEST_TEMPORARY, Manifest, ManifestFile, ManifestInfo};
use crate::pages::PagesReader;
use crate::pieces::PieceHashes;
use crate::schema::ImageMessage;

pub use entries::EntryStream;
use entries::Sink;

/// Files up to this many bytes are hashed as they are written.
const HASHED: u64 = 4 << 20;
const BUFFER: usize = 64 << 10;

/// Whether a finished dump outlives a power failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Every file and the directory are synced before the manifest is written.
    Durable,
    /// Nothing is synced: for tmpfs, and for copies that are sent on at once.
    None,
}

/// Writing images failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The images directory cannot be opened or made.
    #[error("Opening the images directory {}", path.display())]
    OpenDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be created.
    #[error("Creating {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written, often because the file system is full.
    #[error("Writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of a dump that failed cannot be removed.
    #[error("Removing {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read again, to hash it.
    #[error("Reading {} to hash it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be brought to stable storage.
    #[error("Syncing {}", path.display())]
    Sync {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An entry is larger than any reader takes.
    #[error("An entry of {} would have {size} bytes, at most {MAX_ENTRY} are allowed", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The entry's size in bytes.
        size: u64,
    },
}

/// Writes one images directory; clones write to the same one, from any thread.
#[derive(Clone, Debug)]
pub struct ImageWriter {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    fd: OwnedFd,
    sync: Sync,
    began: SystemTime,
    /// Files made so far.
    files: Mutex<BTreeMap<String, Noted>>,
    held: Mutex<Held>,
    /// Nothing is written at all.
    nowhere: bool,
    /// There is a link to a parent that we made.
    linked: AtomicBool,
}

/// What is known of a file for the manifest.
#[derive(Debug)]
enum Noted {
    /// Nothing until [`ImageWriter::note_file`] or the end of its stream.
    Nothing,
    /// The hashes of its pieces, as far as they came.
    Pieces(Arc<PieceHashes>),
    /// All.
    All(ManifestFile),
}

/// Images that are kept in memory for now.
#[derive(Debug, Default)]
struct Held {
    /// Bytes that may be kept yet; `None` where images are written at once.
    room: Option<usize>,
    files: Vec<(String, Vec<u8>)>,
}

/// More bytes of images than this are not kept in memory.
const MOST_HELD: usize = 16 << 20;

/// More files than this are synced with their whole file system.
const SYNCED_ONE_BY_ONE: usize = 4;

impl ImageWriter {
    /// Opens the directory, or makes it (not the directories above it).
    ///
    /// Manifest and inventory of an earlier dump are removed, so that neither this one nor a mixture of both
    /// passes for whole before [`Self::finish`].
    pub fn create(path: impl AsRef<Path>, sync: Sync) -> Result<ImageWriter, WriteError> {
        let path = path.as_ref().to_path_buf();
        match rustix::fs::mkdir(&path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                return Err(WriteError::OpenDir {
                    path,
                    source: errno.into(),
                });
            }
        }
        ImageWriter::from_fd(open_dir(&path)?, path, sync)
    }

    /// Opens a directory for `stats-*` alone: the images and the manifest in it stay as they are.
    pub fn for_statistics(path: impl AsRef<Path>) -> Result<ImageWriter, WriteError> {
        let path = path.as_ref().to_path_buf();
        Ok(ImageWriter::new(open_dir(&path)?, path, Sync::None))
    }

    /// Takes an opened directory, whose `path` is for messages only.
    pub fn from_fd(fd: OwnedFd, path: PathBuf, sync: Sync) -> Result<ImageWriter, WriteError> {
        let inventory = ImageKind::Inventory.file_name(0);
        for name in [MANIFEST_NAME, MANIFEST_TEMPORARY, &inventory] {
            match rustix::fs::unlinkat(&fd, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(WriteError::Create {
                        path: path.join(name),
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(ImageWriter::new(fd, path, sync))
    }

    /// A writer whose entries go nowhere: what is collected through it was only looked at. It makes no files.
    pub fn nowhere() -> Result<ImageWriter, WriteError> {
        let path = PathBuf::from("/");
        let mut writer = ImageWriter::new(open_dir(&path)?, path, Sync::None);
        let inner = Arc::get_mut(&mut writer.inner).expect("made here, there are no clones");
        inner.nowhere = true;
        Ok(writer)
    }

    /// Whether it was made by [`Self::nowhere`].
    pub fn is_nowhere(&self) -> bool {
        self.inner.nowhere
    }

    fn new(fd: OwnedFd, path: PathBuf, sync: Sync) -> ImageWriter {
        let files = Mutex::new(BTreeMap::new());
        ImageWriter {
            inner: Arc::new(Inner {
                path,
                fd,
                sync,
                began: SystemTime::now(),
                files,
                held: Mutex::default(),
                nowhere: false,
                linked: AtomicBool::new(false),
            }),
        }
    }

    /// From now on images are kept in memory, as far as there are not too many bytes of them: the files
    /// are made by [`Self::write_held`] or [`Self::finish`].
    pub fn hold(&self) {
        self.held().room = Some(MOST_HELD);
    }

    /// Writes what was kept, and writes at once from now on.
    pub fn write_held(&self) -> Result<(), WriteError> {
        for (name, bytes) in std::mem::take(&mut *self.held()).files {
            let mut file = self.create_file(&name)?;
            if let Err(source) = file.write_all(&bytes) {
                let path = self.file_path(&name);
                return Err(WriteError::Write { path, source });
            }
            let size = bytes.len() as u64;
            self.note_file(&name, size, (size <= HASHED).then(|| blake3::hash(&bytes)));
        }
        Ok(())
    }

    /// Takes room for some bytes; false where there is none.
    fn take_room(&self, bytes: usize) -> bool {
        let mut held = self.held();
        let left = held.room.and_then(|room| room.checked_sub(bytes));
        held.room = left.or(held.room);
        left.is_some()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        let held = self.inner.held.lock();
        held.expect("no thread panics while it holds the list of images")
    }

    /// The path that the directory was opened by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The directory's descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// Writes an image of one entry.
    pub fn write_one<M: ImageMessage>(
        &self,
        kind: ImageKind,
        id: u64,
        message: &M,
    ) -> Result<(), WriteError> {
        self.write_all(kind, id, std::slice::from_ref(message))
    }

    /// Writes an image of these entries; without any it has a header only.
    pub fn write_all<M: ImageMessage>(
        &self,
        kind: ImageKind,
        id: u64,
        messages: &[M],
    ) -> Result<(), WriteError> {
        let mut stream = self.stream(kind, id)?;
        for message in messages {
            stream.append(message)?;
        }
        stream.finish()
    }

    /// Begins an image whose entries come one by one.
    pub fn stream(&self, kind: ImageKind, id: u64) -> Result<EntryStream, WriteError> {
        let name = kind.file_name(id);
        let sink = match self.held().room {
            _ if self.is_nowhere() => Sink::Nowhere,
            Some(_) => Sink::Held(Vec::new()),
            None => Sink::File(self.begin(&name)?),
        };
        let mut stream = EntryStream::new((self, sink), name, kind);
        if let Some(magic) = kind.first_magic() {
            stream.append_raw(&magic.to_le_bytes())?;
        }
        if !kind.is_raw() {
            stream.append_raw(&kind.magic().to_le_bytes())?;
        }
        Ok(stream)
    }

    fn begin(&self, name: &str) -> Result<BufWriter<File>, WriteError> {
        Ok(BufWriter::with_capacity(BUFFER, self.create_file(name)?))
    }

    /// Creates a file without header (`pages-N` and the like) that the caller writes by itself.
    pub fn create_raw(&self, kind: ImageKind, id: u64) -> Result<File, WriteError> {
        debug_assert!(kind.is_raw());
        self.create_file(&kind.file_name(id))
    }

    /// Creates or empties a file of the directory by name, readable and writable by its owner only.
    pub fn create_file(&self, name: &str) -> Result<File, WriteError> {
        if self.is_nowhere() {
            return Err(WriteError::Create {
                path: self.file_path(name),
                source: io::ErrorKind::Unsupported.into(),
            });
        }
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match openat(&self.inner.fd, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => {
                self.files().insert(name.to_string(), Noted::Nothing);
                Ok(File::from(fd))
            }
            Err(errno) => Err(WriteError::Create {
                path: self.file_path(name),
                source: errno.into(),
            }),
        }
    }

    /// Tells the manifest a file's size in bytes and, where the caller computed it, its hash.
    ///
    /// Not needed for streams; a raw file that is never noted is read and hashed when all is finished.
    pub fn note_file(&self, name: &str, size: u64, hash: Option<blake3::Hash>) {
        let blake3 = hash.map(|hash| hash.to_hex().to_string());
        self.files()
            .insert(name.to_string(), Noted::All(ManifestFile { size, blake3 }));
    }

    /// Where a raw file's hashes can be noted while its bytes are at hand; what is not noted is read again.
    pub fn hash_pieces(&self, kind: ImageKind, id: u64) -> Arc<PieceHashes> {
        let pieces = Arc::<PieceHashes>::default();
        let name = kind.file_name(id);
        self.files().insert(name, Noted::Pieces(pieces.clone()));
        pieces
    }

    /// Hashes what is not hashed yet, syncs everything as asked for and writes the manifest: only now is
    /// the dump whole.
    pub fn finish(&self, info: ManifestInfo) -> Result<Manifest, WriteError> {
        self.write_held()?;
        let mut files = BTreeMap::new();
        for (name, noted) in self.files().iter() {
            let noted = match noted {
                Noted::All(file) => file.clone(),
                Noted::Pieces(pieces) => self.measure(name, Some(pieces))?,
                Noted::Nothing => self.measure(name, None)?,
            };
            files.insert(name.clone(), noted);
        }
        self.sync_files(files.keys())?;
        self.sync_dir()?;
        let mut manifest = Manifest::new(info, files);
        let began = self.inner.began.duration_since(UNIX_EPOCH);
        manifest.began_us = began
            .ok()
            .and_then(|since| since.as_micros().try_into().ok());
        self.write_manifest(&manifest)?;
        self.sync_dir()?;
        Ok(manifest)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), WriteError> {
        let path = self.file_path(MANIFEST_NAME);
        let mut text = serde_json::to_vec_pretty(manifest).expect("a manifest has text keys only");
        text.push(b'\n');
        let mut file = self.create_file(MANIFEST_TEMPORARY)?;
        self.files().remove(MANIFEST_TEMPORARY);
        if let Err(source) = file.write_all(&text) {
            return Err(WriteError::Write { path, source });
        }
        if let (Sync::Durable, Err(source)) = (self.inner.sync, file.sync_all()) {
            return Err(WriteError::Sync { path, source });
        }
        let fd = &self.inner.fd;
        rustix::fs::renameat(fd, MANIFEST_TEMPORARY, fd, MANIFEST_NAME).map_err(|errno| {
            WriteError::Create {
                path,
                source: errno.into(),
            }
        })
    }

    /// Size and hash of a file that somebody else wrote.
    fn measure(
        &self,
        name: &str,
        pieces: Option<&Arc<PieceHashes>>,
    ) -> Result<ManifestFile, WriteError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let opened = openat(&self.inner.fd, name, flags, Mode::empty()).map_err(io::Error::from);
        let measured = opened.and_then(|fd| {
            let content = PagesReader::Plain(File::from(fd));
            let size = content.size()?;
            let hash = match pieces {
                Some(pieces) => {
                    pieces.hash(size, |buffer, at| content.read_exact_at(buffer, at))?
                }
                None => content.hash()?,
            };
            let blake3 = Some(hash.to_hex().to_string());
            Ok(ManifestFile { size, blake3 })
        });
        measured.map_err(|source| WriteError::Read {
            path: self.file_path(name),
            source,
        })
    }

    /// One call for many files: each `fsync` commits the file system's journal anew.
    fn sync_files<'n>(
        &self,
        names: impl ExactSizeIterator<Item = &'n String>,
    ) -> Result<(), WriteError> {
        if self.inner.sync == Sync::None {
            return Ok(());
        }
        if names.len() <= SYNCED_ONE_BY_ONE {
            return names.into_iter().try_for_each(|name| self.sync_file(name));
        }
        rustix::fs::syncfs(&self.inner.fd).map_err(|errno| WriteError::Sync {
            path: self.inner.path.clone(),
            source: errno.into(),
        })
    }

    fn sync_file(&self, name: &str) -> Result<(), WriteError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(&self.inner.fd, name, flags, Mode::empty())
            .and_then(rustix::fs::fsync)
            .map_err(|errno| WriteError::Sync {
                path: self.file_path(name),
                source: errno.into(),
            })
    }

    fn sync_dir(&self) -> Result<(), WriteError> {
        if self.inner.sync == Sync::None {
            return Ok(());
        }
        rustix::fs::fsync(&self.inner.fd).map_err(|errno| WriteError::Sync {
            path: self.inner.path.clone(),
            source: errno.into(),
        })
    }

    fn file_path(&self, name: &str) -> PathBuf {
        self.inner.path.join(name)
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Noted>> {
        self.inner
            .files
            .lock()
            .expect("no thread panics while it holds the list of files")
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, WriteError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| WriteError::OpenDir {
        path: path.to_path_buf(),
        source: errno.into(),
    })
}
