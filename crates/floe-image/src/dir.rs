//! An images directory: finds images by kind and number and reads them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use crate::catalogue::{Extra, ImageKind};
use crate::error::ImageError;
use crate::frames::{Codec, FramedReader};
use crate::framing::ImageReader;
use crate::messages::{
    GhostChunkEntry, GhostFileEntry, IpcMsg, IpcMsgEntry, PagemapEntry, PagemapHead, TcpStreamEntry,
};
use crate::pages::PagesReader;
use crate::schema::ImageMessage;
use crate::store::ImageStore;
use crate::upgrade::pagemap_entry;

/// Name of the link to the directory that an incremental dump builds on.
pub const PARENT_LINK: &str = "parent";
/// Name of the directory in which a dump in rounds has them.
pub const GENERATIONS: &str = "generations";
/// Most directories in a chain of parents.
pub const MAX_PARENTS: usize = 10_000;
/// Most subdirectories looked at for a hint.
const MAX_HINT_ENTRIES: usize = 1000;

/// `pagemap_entry.flags`: the page is in the parent.
pub const PE_PARENT: u32 = 1;
/// `pagemap_entry.flags`: the page may be restored later.
pub const PE_LAZY: u32 = 2;
/// `pagemap_entry.flags`: the page is in the pages file.
pub const PE_PRESENT: u32 = 4;

#[derive(Clone, Debug)]
enum Backing {
    Directory(Arc<OwnedFd>),
    Store(Arc<dyn ImageStore>),
}

/// An opened images directory; clones share the descriptor.
#[derive(Clone, Debug)]
pub struct ImageDir {
    path: PathBuf,
    backing: Backing,
    /// Device and inode of this directory and of its children in the chain.
    chain: Vec<(u64, u64)>,
}

/// A deleted file's image: its entry, and where its content lies in `file`.
#[derive(Debug)]
pub struct GhostImage {
    /// The entry.
    pub entry: GhostFileEntry,
    /// The image file, to read the content from by offset.
    pub file: File,
    /// Stretches of content in the order of the file; what none covers is a hole.
    pub extents: Vec<GhostExtent>,
}

/// A stretch of a deleted file's content, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GhostExtent {
    /// Offset in the image file.
    pub image_offset: u64,
    /// Offset in the deleted file.
    pub file_offset: u64,
    /// Length.
    pub length: u64,
}

/// A SysV message queue and the messages in it.
#[derive(Clone, Debug)]
pub struct MessageQueue {
    /// The queue.
    pub entry: IpcMsgEntry,
    /// Its messages with their text, first in first.
    pub messages: Vec<(IpcMsg, Vec<u8>)>,
}

/// A TCP connection's state and queues.
#[derive(Clone, Debug)]
pub struct TcpStream {
    /// The state.
    pub entry: TcpStreamEntry,
    /// Received bytes that the program has not read.
    pub receive_queue: Vec<u8>,
    /// Sent bytes that the peer has not acknowledged.
    pub send_queue: Vec<u8>,
}

impl ImageDir {
    /// Opens the directory; a path to anything else is an error.
    pub fn open(path: impl AsRef<Path>) -> Result<ImageDir, ImageError> {
        let path = path.as_ref().to_path_buf();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => ImageDir::from_fd(fd, path),
            Err(errno) => Err(ImageError::OpenDir {
                path,
                source: errno.into(),
            }),
        }
    }

    /// Takes an opened directory, whose `path` is for messages only.
    pub fn from_fd(fd: OwnedFd, path: PathBuf) -> Result<ImageDir, ImageError> {
        let id = match rustix::fs::fstat(&fd) {
            Ok(stat) => (stat.st_dev, stat.st_ino),
            Err(errno) => {
                return Err(ImageError::OpenDir {
                    path,
                    source: errno.into(),
                });
            }
        };
        Ok(ImageDir {
            path,
            backing: Backing::Directory(Arc::new(fd)),
            chain: vec![id],
        })
    }

    /// Takes images that are no directory; `path` is for messages only.
    pub fn from_store(store: Arc<dyn ImageStore>, path: PathBuf) -> ImageDir {
        ImageDir {
            path,
            backing: Backing::Store(store),
            chain: Vec::new(),
        }
    }

    /// The path that the directory was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory that this incremental dump builds on, by the link `parent`; `None` without one.
    pub fn parent(&self) -> Result<Option<ImageDir>, ImageError> {
        let fd = match &self.backing {
            Backing::Directory(fd) => fd,
            Backing::Store(store) => return Ok(store.parent()),
        };
        let path = self.path.join(PARENT_LINK);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match openat(fd, PARENT_LINK, flags, Mode::empty()) {
            Ok(fd) => fd,
            // A link to nowhere is ENOENT too, and no reason to lose pages in silence.
            Err(Errno::NOENT) if rustix::fs::readlinkat(fd, PARENT_LINK, Vec::new()).is_err() => {
                return Ok(None);
            }
            Err(errno) => {
                return Err(ImageError::OpenDir {
                    path,
                    source: errno.into(),
                });
            }
        };
        let mut parent = ImageDir::from_fd(fd, path)?;
        if self.chain.contains(&parent.chain[0]) {
            return Err(ImageError::ParentLoop {
                path: self.path.clone(),
            });
        }
        if self.chain.len() >= MAX_PARENTS {
            return Err(ImageError::ParentChain {
                path: self.path.clone(),
                limit: MAX_PARENTS,
            });
        }
        parent.chain.extend(&self.chain);
        Ok(Some(parent))
    }

    /// Whether it is a directory, and no archive, which compares its small files itself.
    pub fn is_directory(&self) -> bool {
        matches!(self.backing, Backing::Directory(_))
    }

    /// Whether both are one directory, by whatever path.
    pub fn is_same(&self, other: &ImageDir) -> bool {
        self.chain
            .first()
            .is_some_and(|id| other.chain.first() == Some(id))
    }

    /// Whether pages come by once, in their order, so that they must be read so.
    pub fn passes_by(&self) -> bool {
        match &self.backing {
            Backing::Directory(_) => false,
            Backing::Store(store) => store.passes_by(),
        }
    }

    /// Reads what is left of images that pass by, and checks what could not be checked before: only
    /// then it is certain that all pages were right.
    pub fn check_rest(&self) -> Result<(), ImageError> {
        match &self.backing {
            Backing::Directory(_) => Ok(()),
            Backing::Store(store) => store.check_rest().map_err(|source| ImageError::Read {
                path: self.path.clone(),
                offset: 0,
                source,
            }),
        }
    }

    /// Whether the image is there.
    pub fn has(&self, kind: ImageKind, id: u64) -> bool {
        self.file_size(&kind.file_name(id)).is_some()
    }

    /// Numbers of all images of a kind, in rising order (`[0]` for a kind without a number).
    pub fn ids(&self, kind: ImageKind) -> Result<Vec<u64>, ImageError> {
        let mut ids: Vec<u64> = self
            .images()?
            .into_iter()
            .filter(|(found, _)| *found == kind)
            .map(|(_, id)| id.unwrap_or(0))
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Kind and number of every image in the directory, in no particular order.
    pub fn images(&self) -> Result<Vec<(ImageKind, Option<u64>)>, ImageError> {
        let names = self.file_names()?;
        Ok(names
            .iter()
            .filter_map(|name| ImageKind::of_file_name(name))
            .collect())
    }

    /// Names of all files in the directory, in no particular order.
    pub fn file_names(&self) -> Result<Vec<String>, ImageError> {
        let error = |errno: Errno| ImageError::OpenDir {
            path: self.path.clone(),
            source: errno.into(),
        };
        let fd = match &self.backing {
            Backing::Directory(fd) => fd,
            Backing::Store(store) => return Ok(store.names()),
        };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(fd).map_err(error)? {
            let name = entry
                .map_err(error)?
                .file_name()
                .to_string_lossy()
                .into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Opens a file of the directory by name; `None` when it is absent.
    pub fn open_file(&self, name: &str) -> Result<Option<File>, ImageError> {
        let opened = match &self.backing {
            Backing::Directory(fd) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                match openat(fd, name, flags, Mode::empty()) {
                    Ok(fd) => Ok(Some(File::from(fd))),
                    Err(Errno::NOENT) => Ok(None),
                    Err(errno) => Err(errno.into()),
                }
            }
            Backing::Store(store) => store.open(name),
        };
        opened.map_err(|source| self.unreadable(name, source))
    }

    fn unreadable(&self, name: &str, source: io::Error) -> ImageError {
        ImageError::Read {
            path: self.path.join(name),
            offset: 0,
            source,
        }
    }

    /// The content of any file as it is stored, to be read at any place; `None` when it is absent.
    pub fn open_content(&self, name: &str) -> Result<Option<PagesReader>, ImageError> {
        match &self.backing {
            Backing::Directory(_) => Ok(self.open_file(name)?.map(PagesReader::Plain)),
            Backing::Store(store) => store
                .pages(name)
                .map_err(|source| self.unreadable(name, source)),
        }
    }

    /// Opens `pages-ID`, plain or compressed; absent is an error.
    pub fn open_pages(&self, id: u64) -> Result<PagesReader, ImageError> {
        let name = ImageKind::Pages.file_name(id);
        if let Some(plain) = self.open_content(&name)? {
            return Ok(plain);
        }
        for codec in [Codec::Zstd(0), Codec::Lz4] {
            let name = format!("{name}{}", codec.suffix());
            if let Some(file) = self.open_file(&name)? {
                let frames = FramedReader::open(file);
                let frames = frames.map_err(|source| self.unreadable(&name, source))?;
                let len = frames.len();
                return Ok(PagesReader::Framed {
                    frames: Arc::new(frames),
                    start: 0,
                    len,
                });
            }
        }
        Err(self.missing(ImageKind::Pages, name))
    }

    /// Opens a file without header (`pages-N`, `route-N`, archives of tmpfs); absent is an error.
    pub fn open_raw(&self, kind: ImageKind, id: u64) -> Result<File, ImageError> {
        let name = kind.file_name(id);
        self.open_file(&name)?
            .ok_or_else(|| self.missing(kind, name))
    }

    /// Opens an image and reads its header; absent is an error with a hint.
    pub fn reader(&self, kind: ImageKind, id: u64) -> Result<ImageReader, ImageError> {
        let found = self.optional_reader(kind, id)?;
        found.ok_or_else(|| self.missing(kind, kind.file_name(id)))
    }

    /// Opens an image and reads its header; `None` when it is absent.
    pub fn optional_reader(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<ImageReader>, ImageError> {
        let name = kind.file_name(id);
        let Some(file) = self.open_file(&name)? else {
            return Ok(None);
        };
        ImageReader::from_file(kind, file, self.path.join(name)).map(Some)
    }

    /// The only entry of an image that must be there.
    pub fn read_one<M: ImageMessage>(&self, kind: ImageKind, id: u64) -> Result<M, ImageError> {
        expect_entry::<M>(kind);
        self.reader(kind, id)?.only_message()
    }

    /// The only entry of an image; `None` when it is absent.
    pub fn read_optional<M: ImageMessage>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<M>, ImageError> {
        expect_entry::<M>(kind);
        match self.optional_reader(kind, id)? {
            Some(mut reader) => reader.only_message().map(Some),
            None => Ok(None),
        }
    }

    /// All entries of an image without number that must be there with at least one.
    pub fn read_one_or_more<M: ImageMessage>(&self, kind: ImageKind) -> Result<Vec<M>, ImageError> {
        let path = self.reader(kind, 0)?.path().to_path_buf();
        let entries = self.read_all(kind, 0)?;
        if entries.is_empty() {
            return Err(ImageError::Empty {
                path,
                expected: M::NAME,
            });
        }
        Ok(entries)
    }

    /// Length of a file in bytes; `None` when it is absent.
    pub fn file_size(&self, name: &str) -> Option<u64> {
        match &self.backing {
            Backing::Directory(fd) => {
                let stat = rustix::fs::statat(fd, name, rustix::fs::AtFlags::empty()).ok()?;
                u64::try_from(stat.st_size).ok()
            }
            Backing::Store(store) => store.size(name),
        }
    }

    /// All entries of an image; an absent one is empty.
    pub fn read_all<M: ImageMessage>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Vec<M>, ImageError> {
        expect_entry::<M>(kind);
        let Some(mut reader) = self.optional_reader(kind, id)? else {
            return Ok(Vec::new());
        };
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_message()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// All entries with the bytes after each (without padding); an absent image is empty.
    ///
    /// For pipe and socket queues, semaphores, BPF maps and SysV segments. Ghosts and message
    /// queues have readers of their own.
    pub fn read_with_extra<M: ImageMessage>(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Vec<(M, Vec<u8>)>, ImageError> {
        expect_entry::<M>(kind);
        debug_assert!(!matches!(kind.extra(), Extra::Ghost | Extra::MessageQueue));
        let Some(mut reader) = self.optional_reader(kind, id)? else {
            return Ok(Vec::new());
        };
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_message()? {
            entries.push((entry, reader.read_extra()?));
        }
        Ok(entries)
    }

    /// The state and queues of a TCP connection, by its socket's inode.
    pub fn read_tcp_stream(&self, inode: u64) -> Result<TcpStream, ImageError> {
        let mut reader = self.reader(ImageKind::TcpStream, inode)?;
        let Some(entry) = reader.next_message::<TcpStreamEntry>()? else {
            let path = reader.path().to_path_buf();
            return Err(ImageError::Empty {
                path,
                expected: TcpStreamEntry::NAME,
            });
        };
        let receive_queue = reader.read_payload(entry.inq_len.into())?;
        let send_queue = reader.read_payload(entry.outq_len.into())?;
        Ok(TcpStream {
            entry,
            receive_queue,
            send_queue,
        })
    }

    /// The message queues of an IPC namespace; an absent image is empty.
    pub fn read_message_queues(&self, id: u64) -> Result<Vec<MessageQueue>, ImageError> {
        let Some(mut reader) = self.optional_reader(ImageKind::IpcnsMsg, id)? else {
            return Ok(Vec::new());
        };
        let mut queues = Vec::new();
        while let Some(entry) = reader.next_message::<IpcMsgEntry>()? {
            let mut messages = Vec::new();
            for _ in 0..entry.qnum {
                let Some(message) = reader.next_message::<IpcMsg>()? else {
                    let path = reader.path().to_path_buf();
                    return Err(ImageError::Empty {
                        path,
                        expected: IpcMsg::NAME,
                    });
                };
                let size = u64::from(message.msize);
                let text = reader.read_payload(size)?;
                reader.skip("padding", size.next_multiple_of(8) - size)?;
                messages.push((message, text));
            }
            queues.push(MessageQueue { entry, messages });
        }
        Ok(queues)
    }

    /// A deleted file's entry and where its content lies; the content itself is not read.
    pub fn open_ghost(&self, id: u64) -> Result<GhostImage, ImageError> {
        let mut reader = self.reader(ImageKind::GhostFile, id)?;
        let Some(entry) = reader.next_message::<GhostFileEntry>()? else {
            let path = reader.path().to_path_buf();
            return Err(ImageError::Empty {
                path,
                expected: GhostFileEntry::NAME,
            });
        };
        let mut extents = Vec::new();
        if entry.chunks() {
            while let Some(chunk) = reader.next_message::<GhostChunkEntry>()? {
                extents.push(GhostExtent {
                    image_offset: reader.offset(),
                    file_offset: chunk.off,
                    length: chunk.len,
                });
                reader.skip("a chunk of the deleted file", chunk.len)?;
            }
        } else if reader.left() > 0 {
            extents.push(GhostExtent {
                image_offset: reader.offset(),
                file_offset: 0,
                length: reader.left(),
            });
        }
        let file = reader.into_source()?;
        Ok(GhostImage {
            entry,
            file,
            extents,
        })
    }

    /// A pagemap, with the older `compat_nr_pages` and `in_parent` brought to the current form.
    pub fn read_pagemap(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<(PagemapHead, Vec<PagemapEntry>), ImageError> {
        debug_assert_eq!(kind.extra(), Extra::PagemapTail);
        let mut reader = self.reader(kind, id)?;
        let Some(head) = reader.next_message::<PagemapHead>()? else {
            let path = reader.path().to_path_buf();
            return Err(ImageError::Empty {
                path,
                expected: PagemapHead::NAME,
            });
        };
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_message()? {
            entries.push(pagemap_entry(entry));
        }
        Ok((head, entries))
    }

    fn missing(&self, kind: ImageKind, name: String) -> ImageError {
        let hint = match kind {
            ImageKind::Inventory => self.inventory_hint(),
            _ => ": the dump was not finished, or copied only in part".to_string(),
        };
        ImageError::Missing {
            kind,
            name,
            dir: self.path.clone(),
            hint,
        }
    }

    /// Where the user most likely meant to point.
    fn inventory_hint(&self) -> String {
        let inventory = ImageKind::Inventory.file_name(0);
        let names = match fs::read_dir(&self.path) {
            Ok(entries) => entries.take(MAX_HINT_ENTRIES).flatten(),
            Err(_) => return String::new(),
        };
        let mut empty = true;
        let mut nested = Vec::new();
        for entry in names {
            empty = false;
            let is_parent = entry.file_name() == OsStr::new(PARENT_LINK);
            if !is_parent && entry.path().join(&inventory).is_file() {
                nested.push(entry.path());
            }
        }
        nested.sort();
        if let Some(found) = nested.first() {
            return format!(
                ": its subdirectory {} has one, was that meant?",
                found.display()
            );
        }
        let above = self.path.join("..");
        if above.join(&inventory).is_file() {
            let above = above.canonicalize().unwrap_or(above);
            return format!(": {} above it has one, was that meant?", above.display());
        }
        if empty {
            return ": the directory is empty".to_string();
        }
        ": no checkpoint is there, or its dump was not finished".to_string()
    }
}

fn expect_entry<M: ImageMessage>(kind: ImageKind) {
    debug_assert_eq!(
        kind.entry_name(),
        Some(M::NAME),
        "{kind:?} is read as its own message"
    );
}
