//! An archive that a dump writes itself: its pages go into it as they are copied, and never lie elsewhere.
//!
//! So the pages come first, then the images, the manifest and the index. Who reads such an archive from a
//! pipe has to keep the pages until the images come; from a file it is like any other.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::SystemTime;

use floe_image::frames::{Codec, FrameWriter};
use floe_image::manifest::{MANIFEST_NAME, Manifest, ManifestFile};
use floe_image::{ImageDir, ImageKind};
use floe_memory::{PageSink, PageStore};

use crate::Chain;
use crate::archive::{HEAD_NAME, Head, INDEX_FORMAT_LATE, Member};
use crate::merged::is_taken;
use crate::pack::{PackError, PackReport, Packer, since_epoch};

/// The first member, in place of a head: all that is known before the dump.
const LATE_HEAD: &str = r#"{"format":2,"late":true}"#;

/// What is done with the archive once it is whole: it is synced, and gets its name.
pub type Keep<W> = Box<dyn FnOnce(W, PackReport) -> io::Result<()> + Send>;

/// An archive in the making.
pub struct DirectArchive<W: Write> {
    images: PathBuf,
    shared: Arc<Shared<W>>,
    keep: Mutex<Option<Keep<W>>>,
}

impl<W: Write> std::fmt::Debug for DirectArchive<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirectArchive")
            .field("images", &self.images)
            .finish_non_exhaustive()
    }
}

struct Shared<W: Write> {
    state: Mutex<State<W>>,
    turn: Condvar,
}

struct State<W: Write> {
    /// None when the archive is whole.
    packer: Option<Packer<W>>,
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

impl<W: Write + Send + 'static> DirectArchive<W> {
    /// Begins an archive in `out`, whose images will lie in the directory `images`.
    pub fn begin(
        out: W,
        images: PathBuf,
        (level, threads): (i32, usize),
        keep: Keep<W>,
    ) -> Result<Self, PackError> {
        let frames = FrameWriter::new(out, Codec::Zstd(level), threads);
        let modified = since_epoch(SystemTime::now());
        let mut packer = Packer::new(frames.map_err(PackError::Write)?, modified);
        packer.unlisted(HEAD_NAME, LATE_HEAD.as_bytes())?;
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
        let dir = ImageDir::open(&self.images)?;
        let chain = Chain::open(&dir)?;
        for name in empty {
            packer.bytes(&name, &[])?;
        }
        let pages = packer.members.iter();
        let pages = pages.map(|(name, member)| (name.clone(), member.size));
        let head = Head {
            format: INDEX_FORMAT_LATE,
            kind: floe_image::manifest::DumpKind::Full,
            first: chain.newest_number(),
            last: chain.newest_number(),
            base: None,
            digests: vec![chain.newest().digest()?],
            pages: pages.collect(),
            early: Vec::new(),
        };
        let mut names = dir.file_names()?;
        names.retain(|name| is_taken(&dir, name) || ImageKind::of_file_name(name).is_some());
        names.sort();
        for name in names {
            packer.file(&dir, &name)?;
        }
        let manifest = manifest(&chain, &packer.members)?;
        packer.bytes(MANIFEST_NAME, manifest.as_bytes())?;
        let content = packer.members.values().map(|member| member.size).sum();
        let generations = (head.first, head.last);
        let (out, written) = packer.finish(head)?;
        let report = PackReport {
            generations,
            content,
            written,
        };
        let keep = self
            .keep
            .lock()
            .expect("nobody panics while sealing")
            .take();
        match keep {
            Some(keep) => keep(out, report).map_err(PackError::Write),
            None => Err(PackError::Write(gone())),
        }
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

impl<W: Write + Send + 'static> PageStore for DirectArchive<W> {
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

impl<W: Write> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        let state = self.state.lock();
        state.expect("nobody panics while writing the archive")
    }
}

/// One file of pages, whose parts come from several threads: each waits for its turn.
struct PagesMember<W: Write> {
    shared: Arc<Shared<W>>,
    name: String,
    /// Pages of all files before it, in bytes.
    start: u64,
    size: u64,
}

impl<W: Write> std::fmt::Debug for PagesMember<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagesMember")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<W: Write + Send> PageSink for PagesMember<W> {
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

impl<W: Write> PagesMember<W> {
    fn append(&self, state: &mut State<W>, bytes: &[u8]) -> io::Result<()> {
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
