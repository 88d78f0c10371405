//! An archive that a dump writes itself: its pages go into it as they are copied, and never lie elsewhere.
//!
//! The dump knows its images last. In a file, room before the pages is left for them ([`crate::front`]). Where
//! they do not fit, or the archive goes to a pipe, they come behind the pages: who reads such an archive from
//! a pipe has to keep the pages until then; from a file it is like any other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::SystemTime;

use floe_image::dir::PE_PRESENT;
use floe_image::frames::{Codec, Frame, FrameWriter, FramedReader};
use floe_image::manifest::{DumpKind, MANIFEST_NAME, Manifest, ManifestFile};
use floe_image::{ImageDir, ImageKind};
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{PageSink, PageStore};

use crate::Chain;
use crate::archive::{EARLY_NAME, HEAD_NAME, Head, INDEX_FORMAT, INDEX_FORMAT_LATE, Member};
use crate::chain::kind_of;
use crate::early::{Copies, KernelCode};
use crate::front::{Front, ROOM};
use crate::merged::is_taken;
use crate::pack::{PackError, PackReport, Packer, since_epoch};

/// The first member where the images come last, in place of a head: all that is known before the dump.
const LATE_HEAD: &str = r#"{"format":2,"late":true}"#;

/// What is done with the archive once it is whole: it is synced, and gets its name.
pub type Keep = Box<dyn FnOnce(PackReport) -> io::Result<()> + Send>;

/// Where an archive goes.
#[derive(Debug)]
pub enum Out {
    /// A file of its own, empty, which can be read and written at any place.
    File(File),
    /// What is written once and in order, as a pipe is.
    Pipe(File),
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (Out::File(file) | Out::Pipe(file)) = self;
        file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An archive in the making.
pub struct DirectArchive {
    images: PathBuf,
    level: i32,
    modified: u64,
    shared: Arc<Shared>,
    keep: Mutex<Option<Keep>>,
}

impl std::fmt::Debug for DirectArchive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirectArchive")
            .field("images", &self.images)
            .finish_non_exhaustive()
    }
}

struct Shared {
    state: Mutex<State>,
    turn: Condvar,
}

struct State {
    /// None when the archive is whole.
    packer: Option<Packer<Out>>,
    /// Bytes of pages that are announced, and that are written.
    announced: u64,
    written: u64,
    /// The file of pages that is being written.
    open: Option<Open>,
    empty: Vec<String>,
    failed: bool,
}

struct Open {
    offset: u64,
    hasher: blake3::Hasher,
}

impl DirectArchive {
    /// Begins an archive in `out`, whose images will lie in the directory `images`.
    pub fn begin(
        mut out: Out,
        images: PathBuf,
        (level, threads): (i32, usize),
        keep: Keep,
    ) -> Result<Self, PackError> {
        let is_pipe = matches!(out, Out::Pipe(_));
        if let Out::File(file) = &mut out {
            file.seek(SeekFrom::Start(ROOM)).map_err(PackError::Write)?;
        }
        let frames = FrameWriter::new(out, Codec::Zstd(level), threads);
        let modified = since_epoch(SystemTime::now());
        let mut packer = Packer::new(frames.map_err(PackError::Write)?, modified);
        if is_pipe {
            packer.unlisted(HEAD_NAME, LATE_HEAD.as_bytes())?;
        }
        let state = State {
            packer: Some(packer),
            announced: 0,
            written: 0,
            open: None,
            empty: Vec::new(),
            failed: false,
        };
        Ok(DirectArchive {
            images,
            level,
            modified,
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                turn: Condvar::new(),
            }),
            keep: Mutex::new(Some(keep)),
        })
    }

    /// All pages are written, and all images lie in the directory: ends the archive.
    pub fn seal(&self) -> Result<(), PackError> {
        let mut state = self.shared.lock();
        let whole = !state.failed && state.written == state.announced;
        let packer = state.packer.take().filter(|_| whole);
        let empty = std::mem::take(&mut state.empty);
        drop(state);
        let mut packer = packer.ok_or_else(|| PackError::Write(gone()))?;
        let images = Images::read(&self.images, empty, &packer)?;
        let front = self.front(&images, &mut packer)?;
        let head = match front {
            Some(head) => head,
            None => {
                images.pack(&mut packer)?;
                images.head.clone()
            }
        };
        let manifest = manifest(&images.chain, &packer.members)?;
        packer.bytes(MANIFEST_NAME, manifest.as_bytes())?;
        let report = PackReport {
            generations: (head.first, head.last),
            content: packer.members.values().map(|member| member.size).sum(),
            written: packer.finish(head)?.1,
        };
        let keep = self
            .keep
            .lock()
            .expect("nobody panics while sealing")
            .take();
        match keep {
            Some(keep) => keep(report).map_err(PackError::Write),
            None => Err(PackError::Write(gone())),
        }
    }

    /// Puts the images before the pages, and answers the head; `None` where they do not fit, or nothing was
    /// left for them.
    fn front(&self, images: &Images, packer: &mut Packer<Out>) -> Result<Option<Head>, PackError> {
        let (frames, out) = packer.frames.drain().map_err(PackError::Write)?;
        let Out::File(file) = out else {
            return Ok(None);
        };
        let behind = frames.iter().map(|frame| u64::from(frame.stored_len)).sum();
        let frames = frames.iter().map(|frame| Frame {
            stored_at: frame.stored_at + ROOM,
            ..*frame
        });
        let pages = file.try_clone().map_err(PackError::Write)?;
        let pages = FramedReader::of(pages, frames.collect());
        let copies = images.early(&packer.members, &pages)?;
        let mut head = images.head.clone();
        (head.format, head.early) = (INDEX_FORMAT, copies.places);
        let all = Front::make(self.level, self.modified, |packer| {
            packer.head(&head)?;
            packer.unlisted(EARLY_NAME, &copies.bytes)?;
            images.pack(packer)
        })?;
        let head = all.as_ref().map(|_| head);
        let mut front = match all {
            Some(all) => all,
            None => Front::make(self.level, self.modified, |packer| {
                packer.unlisted(HEAD_NAME, LATE_HEAD.as_bytes())
            })?
            .ok_or_else(|| PackError::Write(gone()))?,
        };
        let (_, out) = packer.frames.drain().map_err(PackError::Write)?;
        if let Out::File(file) = out {
            front.place(file, behind).map_err(PackError::Write)?;
        }
        packer.put_before(front);
        Ok(head)
    }
}

/// The images of a dump whose pages are in its archive.
struct Images {
    dir: ImageDir,
    chain: Chain,
    names: Vec<String>,
    /// Files of pages without a page.
    empty: Vec<String>,
    /// The head of an archive whose images come last.
    head: Head,
}

impl Images {
    fn read(
        path: &std::path::Path,
        empty: Vec<String>,
        packer: &Packer<Out>,
    ) -> Result<Images, PackError> {
        let dir = ImageDir::open(path)?;
        let chain = Chain::open(&dir)?;
        let pages = packer.members.iter();
        let pages = pages.map(|(name, member)| (name.clone(), member.size));
        let none = empty.iter().map(|name| (name.clone(), 0));
        let head = Head {
            format: INDEX_FORMAT_LATE,
            kind: DumpKind::Full,
            first: chain.newest_number(),
            last: chain.newest_number(),
            base: None,
            digests: vec![chain.newest().digest()?],
            pages: pages.chain(none).collect(),
            early: Vec::new(),
        };
        let mut names = dir.file_names()?;
        names.retain(|name| is_taken(&dir, name) || ImageKind::of_file_name(name).is_some());
        names.sort();
        Ok(Images {
            dir,
            chain,
            names,
            empty,
            head,
        })
    }

    /// Packs all of them; what has no pages last, as a reader of a stream takes all before it for images.
    fn pack<W: Write>(&self, packer: &mut Packer<W>) -> Result<(), PackError> {
        for name in &self.names {
            packer.file(&self.dir, name)?;
        }
        self.empty
            .iter()
            .try_for_each(|name| packer.bytes(name, &[]))
    }

    /// Copies of pages that a restore reads first.
    fn early(
        &self,
        members: &BTreeMap<String, Member>,
        pages: &FramedReader,
    ) -> Result<Copies, PackError> {
        let mut copies = Copies::default();
        for name in &self.names {
            let Some((ImageKind::Pagemap, Some(id))) = kind_of(name) else {
                continue;
            };
            let code = KernelCode::of(&self.dir, id)?;
            let (head, entries) = self.dir.read_pagemap(ImageKind::Pagemap, id)?;
            let file = ImageKind::Pages.file_name(head.pages_id.into());
            let Some(member) = members.get(&file) else {
                continue;
            };
            let mut offset = 0;
            for entry in entries
                .iter()
                .filter(|entry| entry.flags() & PE_PRESENT != 0)
            {
                let len = entry.nr_pages() * PAGE_SIZE;
                let read =
                    |bytes: &mut [u8]| Ok(pages.read_exact_at(bytes, member.offset + offset));
                let run = entry.vaddr..entry.vaddr + len;
                copies.take((&code, run), (&file, offset), read)?;
                offset += len;
            }
        }
        Ok(copies)
    }
}

fn gone() -> io::Error {
    io::Error::other("not all pages were written")
}

/// The manifest of the dump with the pages in it.
fn manifest(chain: &Chain, members: &BTreeMap<String, Member>) -> Result<String, PackError> {
    let mut manifest = match &chain.newest().manifest {
        Some(manifest) => manifest.clone(),
        None => return Err(PackError::Write(gone())),
    };
    let file = |member: &Member| ManifestFile {
        size: member.size,
        blake3: Some(member.blake3.clone()),
    };
    let files = members
        .iter()
        .map(|(name, member)| (name.clone(), file(member)));
    manifest.files = files.collect();
    Ok(text(&manifest))
}

fn text(manifest: &Manifest) -> String {
    serde_json::to_string_pretty(manifest).expect("a manifest has text keys only") + "\n"
}

impl PageStore for DirectArchive {
    fn begin(&self, pages_id: u32, bytes: u64) -> Arc<dyn PageSink> {
        let name = ImageKind::Pages.file_name(u64::from(pages_id));
        let mut state = self.shared.lock();
        if bytes == 0 {
            state.empty.push(name.clone());
        }
        let start = state.announced;
        state.announced += bytes;
        Arc::new(PagesMember {
            shared: self.shared.clone(),
            name,
            start,
            size: bytes,
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock();
        state.expect("nobody panics while writing the archive")
    }
}

/// One file of pages, whose parts come from several threads: each waits for its turn.
struct PagesMember {
    shared: Arc<Shared>,
    name: String,
    /// Pages of all files before it, in bytes.
    start: u64,
    size: u64,
}

impl std::fmt::Debug for PagesMember {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagesMember")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl PageSink for PagesMember {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.shared.lock();
        while !state.failed && state.written != self.start + offset {
            state = self
                .shared
                .turn
                .wait(state)
                .expect("nobody panics while writing the archive");
        }
        if state.failed {
            return Err(gone());
        }
        let written = self.append(&mut state, bytes);
        state.failed = written.is_err();
        self.shared.turn.notify_all();
        written
    }

    fn give_up(&self) {
        self.shared.lock().failed = true;
        self.shared.turn.notify_all();
    }
}

impl PagesMember {
    fn append(&self, state: &mut State, bytes: &[u8]) -> io::Result<()> {
        let packer = state.packer.as_mut().ok_or_else(gone)?;
        if state.written == self.start {
            let offset = packer.begin_pages(&self.name, self.size).map_err(plain)?;
            let hasher = blake3::Hasher::new();
            state.open = Some(Open { offset, hasher });
        }
        let open = state.open.as_mut().ok_or_else(gone)?;
        open.hasher.update(bytes);
        packer.frames.write_all(bytes)?;
        state.written += bytes.len() as u64;
        if state.written == self.start + self.size {
            let member = Member {
                size: self.size,
                blake3: open.hasher.finalize().to_hex().to_string(),
                offset: open.offset,
            };
            packer.end(&self.name, member).map_err(plain)?;
        }
        Ok(())
    }
}

fn plain(error: PackError) -> io::Error {
    match error {
        PackError::Write(error) => error,
        other => io::Error::other(other),
    }
}
