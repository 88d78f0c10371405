//! An archive that comes through a pipe: its images are held, its pages pass by.
//!
//! The archive begins with all images but the pages, so a restore can plan and make the tasks before the
//! first page comes. Pages that are asked for out of their order are kept, compressed, until they are
//! read. What the index at the end says is checked when all was read, before the tasks run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use floe_image::manifest::MANIFEST_NAME;
use floe_image::{ImageDir, ImageStore, PagesReader, PassingPages};

use crate::archive::{ArchiveError, Early, Head, Index, check_base, check_head, parse};
use crate::held::HeldFiles;
use crate::recorder::Recorder;
use crate::scanned::ScannedImages;
use crate::tar_reader::{Piece, TarReader};
use crate::unpack::{UnpackError, UnpackLimits};

/// Most bytes that are read from a stream.
const LIMITS: UnpackLimits = UnpackLimits { bytes: 64 << 40 };
/// Pages that wait are compressed at this level of zstd.
const KEPT_LEVEL: i32 = 1;

/// What the beginning of a stream tells.
pub enum Opened {
    /// Images come before pages.
    Stream(Box<Stream>),
    /// Pages come first: all of it, to be read at any place.
    Late(File),
}

/// The part of a head that tells where the whole head is.
#[derive(serde::Deserialize)]
struct PagesFirst {
    /// In the index only.
    #[serde(default)]
    late: bool,
}

/// An archive in a pipe, read up to its first page.
#[derive(Debug)]
pub struct Stream {
    path: PathBuf,
    head: Head,
    images: HeldFiles,
    pages: Arc<Mutex<Passing>>,
}

impl Stream {
    /// Reads the images; `path` is for messages only. An archive whose pages come first is kept whole in a
    /// file without a name.
    pub fn open(source: Box<dyn Read + Send>, path: &Path) -> Result<Opened, ArchiveError> {
        let (source, recorded) = Recorder::new(source);
        let damaged = |error: UnpackError| ArchiveError::of(path, error);
        let mut tar = TarReader::new(source, LIMITS);
        let Piece::Head(text) = tar.next_piece().map_err(damaged)? else {
            return Err(damaged(UnpackError::Missing {
                name: crate::archive::HEAD_NAME.into(),
            }));
        };
        let failed = |source| ArchiveError::Read {
            path: path.to_path_buf(),
            source,
        };
        if parse::<PagesFirst>(&text, path)?.late {
            drop(tar);
            return recorded.keep_all().map(Opened::Late).map_err(failed);
        }
        recorded.stop();
        let head: Head = parse(&text, path)?;
        check_head(&head, path)?;
        let mut pages = Passing {
            tar,
            early: EarlyPages::default(),
            open: None,
            part: None,
            kept: BTreeMap::new(),
            last: None,
            found: BTreeMap::new(),
            index: None,
            ended: false,
        };
        let images = pages.images(&head).map_err(failed)?;
        Ok(Opened::Stream(Box::new(Stream {
            path: path.to_path_buf(),
            head,
            images,
            pages: Arc::new(Mutex::new(pages)),
        })))
    }

    /// What it holds.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What it is called in messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads to the end and compares everything with the index; the images, whose pages are not kept.
    pub fn scan(mut self) -> Result<ImageDir, ArchiveError> {
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| ArchiveError::Read { path, source }
        };
        let mut pages = lock(&self.pages);
        pages.pass(&mut self.images).map_err(failed(&self.path))?;
        pages
            .check(&self.head, &self.path)
            .map_err(failed(&self.path))?;
        let found = std::mem::take(&mut pages.found);
        let early = Arc::new(std::mem::take(&mut pages.early));
        drop(pages);
        let images = ScannedImages {
            images: self.images,
            pages: self.head.pages.keys().cloned().collect(),
            found,
            early,
        };
        Ok(ImageDir::from_store(Arc::new(images), self.path))
    }

    /// The images, with those that they build on.
    pub fn into_images(self, base: Option<ImageDir>) -> ImageDir {
        let path = self.path.clone();
        ImageDir::from_store(Arc::new(StreamedImages { stream: self, base }), path)
    }
}

pub(crate) fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn invalid(error: UnpackError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, with_cause(&error))
}

/// Which part of which file.
type Place = (String, u64);

/// A part of a file of pages that is at hand.
#[derive(Debug)]
struct Part {
    place: Place,
    bytes: Vec<u8>,
    /// Bytes that nobody has read yet.
    unread: usize,
}

/// A part that came before it was asked for.
#[derive(Debug)]
struct Kept {
    compressed: Vec<u8>,
    len: usize,
    unread: usize,
}

/// A file on its way.
struct Open {
    name: String,
    size: u64,
    offset: u64,
    hasher: blake3::Hasher,
}

/// Copies of pages that came first.
#[derive(Debug, Default)]
pub(crate) struct EarlyPages {
    places: Vec<Early>,
    bytes: Vec<u8>,
}

impl EarlyPages {
    /// Fills the buffer if all of it is here.
    pub(crate) fn read(&self, name: &str, buffer: &mut [u8], offset: u64) -> bool {
        let Some(end) = offset.checked_add(buffer.len() as u64) else {
            return false;
        };
        let found = self.places.iter().find(|place| {
            place.file == name && place.offset <= offset && end <= place.offset + place.len
        });
        let bytes = found.and_then(|place| {
            let at = usize::try_from(place.copy.checked_add(offset - place.offset)?).ok()?;
            self.bytes.get(at..at.checked_add(buffer.len())?)
        });
        bytes.map(|bytes| buffer.copy_from_slice(bytes)).is_some()
    }

    /// Bytes of a part that nobody will ask for again.
    fn within(&self, (name, start): &Place, len: usize) -> usize {
        let end = start + len as u64;
        let of_file = self.places.iter().filter(|place| place.file == *name);
        let lengths = of_file.map(|place| {
            let last = end.min(place.offset + place.len);
            last.saturating_sub(place.offset.max(*start))
        });
        lengths.sum::<u64>() as usize
    }
}

struct Passing {
    tar: TarReader<Recorder>,
    early: EarlyPages,
    open: Option<Open>,
    part: Option<Part>,
    kept: BTreeMap<Place, Kept>,
    /// The kept part that was read last, not compressed.
    last: Option<(Place, Vec<u8>)>,
    /// Size and hash of what has passed.
    found: BTreeMap<String, (u64, blake3::Hash)>,
    index: Option<Vec<u8>>,
    ended: bool,
}

impl std::fmt::Debug for Passing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passing")
            .field("kept", &self.kept.len())
            .finish_non_exhaustive()
    }
}

impl Passing {
    /// Reads all images before the first page.
    fn images(&mut self, head: &Head) -> io::Result<HeldFiles> {
        let bound = |place: &Early| place.offset.checked_add(place.len).is_some();
        if !head.early.iter().all(bound) {
            return Err(invalid(UnpackError::Checksum {
                name: crate::archive::HEAD_NAME.into(),
            }));
        }
        self.early.places = head.early.clone();
        let mut images = HeldFiles::new();
        loop {
            match self.advance()? {
                Some(Advance::Begun(name, size)) => {
                    if head.pages.contains_key(&name) || name == MANIFEST_NAME {
                        return Ok(images);
                    }
                    images.begin(name, size)?;
                }
                Some(Advance::Part) => {
                    if let Some(part) = self.part.take() {
                        images.append(&part.bytes)?;
                    }
                }
                None => return Ok(images),
            }
        }
    }

    /// Reads the rest: pages are hashed and left, the manifest is added to the images.
    fn pass(&mut self, images: &mut HeldFiles) -> io::Result<()> {
        let mut size = self.open.as_ref().map_or(0, |open| open.size);
        loop {
            let manifest = self.open.as_ref().filter(|open| open.name == MANIFEST_NAME);
            if let Some(open) = manifest.filter(|open| open.offset == 0) {
                if size > floe_image::manifest::MAX_MANIFEST {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                images.begin(open.name.clone(), size)?;
            }
            match self.advance()? {
                Some(Advance::Begun(_, begun)) => size = begun,
                Some(Advance::Part) => {
                    let part = self.part.take();
                    if let Some(part) = part.filter(|part| part.place.0 == MANIFEST_NAME) {
                        images.append(&part.bytes)?;
                    }
                }
                None => return Ok(()),
            }
        }
    }

    /// Reads one piece; nothing at the end.
    fn advance(&mut self) -> io::Result<Option<Advance>> {
        if self.ended {
            return Ok(None);
        }
        loop {
            match self.tar.next_piece().map_err(invalid)? {
                Piece::Begin { name, size } => {
                    self.close();
                    if self.found.contains_key(&name) {
                        let what = "which is there twice";
                        return Err(invalid(UnpackError::Refused { name, what }));
                    }
                    self.open = Some(Open {
                        name: name.clone(),
                        size,
                        offset: 0,
                        hasher: blake3::Hasher::new(),
                    });
                    return Ok(Some(Advance::Begun(name, size)));
                }
                Piece::Content(bytes) => {
                    let open = self.open.as_mut().expect("content follows a beginning");
                    open.hasher.update(&bytes);
                    let place = (open.name.clone(), open.offset);
                    open.offset += bytes.len() as u64;
                    let early = self.early.within(&place, bytes.len());
                    let unread = bytes.len().saturating_sub(early);
                    self.part = Some(Part {
                        place,
                        bytes,
                        unread,
                    });
                    return Ok(Some(Advance::Part));
                }
                Piece::Head(_) => {}
                Piece::Early(bytes) => self.early.bytes = bytes,
                Piece::Index(text) => self.index = Some(text),
                Piece::End => {
                    self.close();
                    self.ended = true;
                    return Ok(None);
                }
            }
        }
    }

    fn close(&mut self) {
        if let Some(open) = self.open.take() {
            self.found
                .insert(open.name, (open.offset, open.hasher.finalize()));
        }
    }

    fn read(&mut self, name: &str, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        if self.early.read(name, buffer, offset) {
            return Ok(());
        }
        while !buffer.is_empty() {
            let mut done = self.read_part(name, buffer, offset);
            if done == 0 {
                done = self.read_kept(name, buffer, offset)?;
            }
            if done > 0 {
                buffer = &mut buffer[done..];
                offset += done as u64;
                continue;
            }
            self.keep()?;
            if self.advance()?.is_none() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Copies what is at hand.
    fn read_part(&mut self, name: &str, buffer: &mut [u8], offset: u64) -> usize {
        let Some(part) = self.part.as_mut().filter(|part| part.place.0 == name) else {
            return 0;
        };
        let done = copy((part.place.1, &part.bytes), buffer, offset);
        part.unread = part.unread.saturating_sub(done);
        done
    }

    /// Copies what was kept.
    fn read_kept(&mut self, name: &str, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let before = (name.to_owned(), offset);
        let Some((place, kept)) = self.kept.range_mut(..=before).next_back() else {
            return Ok(0);
        };
        if place.0 != name || offset - place.1 >= kept.len as u64 {
            return Ok(0);
        }
        let place = place.clone();
        if self.last.as_ref().is_none_or(|(last, _)| *last != place) {
            let bytes = zstd::bulk::decompress(&kept.compressed, kept.len)?;
            self.last = Some((place.clone(), bytes));
        }
        let (_, bytes) = self.last.as_ref().expect("just set");
        let done = copy((place.1, bytes), buffer, offset);
        kept.unread = kept.unread.saturating_sub(done);
        if kept.unread == 0 {
            self.kept.remove(&place);
            self.last = None;
        }
        Ok(done)
    }

    /// Keeps what is at hand if somebody will want it later.
    fn keep(&mut self) -> io::Result<()> {
        let Some(part) = self.part.take().filter(|part| part.unread > 0) else {
            return Ok(());
        };
        let kept = Kept {
            compressed: zstd::bulk::compress(&part.bytes, KEPT_LEVEL)?,
            len: part.bytes.len(),
            unread: part.unread,
        };
        self.kept.insert(part.place, kept);
        Ok(())
    }

    /// Reads to the end and compares all with the index.
    fn check(&mut self, head: &Head, path: &Path) -> io::Result<()> {
        while self.advance()?.is_some() {}
        let missing = |name: &str| invalid(UnpackError::Missing { name: name.into() });
        let Some(text) = self.index.take() else {
            return Err(missing(crate::archive::INDEX_NAME));
        };
        let index: Index = parse(&text, path).map_err(io::Error::other)?;
        if index.head != *head {
            return Err(invalid(UnpackError::Checksum {
                name: crate::archive::HEAD_NAME.into(),
            }));
        }
        crate::unpack::compare(&self.found, &index).map_err(invalid)
    }
}

enum Advance {
    Begun(String, u64),
    Part,
}

/// Copies from bytes that lie at an offset; how many were copied.
fn copy((start, bytes): (u64, &[u8]), buffer: &mut [u8], offset: u64) -> usize {
    let Some(inside) = offset
        .checked_sub(start)
        .filter(|inside| *inside < bytes.len() as u64)
    else {
        return 0;
    };
    let found = &bytes[inside as usize..];
    let done = found.len().min(buffer.len());
    buffer[..done].copy_from_slice(&found[..done]);
    done
}

/// The images of a stream.
#[derive(Debug)]
struct StreamedImages {
    stream: Stream,
    base: Option<ImageDir>,
}

impl StreamedImages {
    fn passing(&self) -> MutexGuard<'_, Passing> {
        lock(&self.stream.pages)
    }
}

fn lock(pages: &Mutex<Passing>) -> MutexGuard<'_, Passing> {
    pages
        .lock()
        .expect("nobody panics while reading the stream")
}

impl ImageStore for StreamedImages {
    fn names(&self) -> Vec<String> {
        let pages = self.stream.head.pages.keys();
        self.stream.images.names().chain(pages).cloned().collect()
    }

    fn open(&self, name: &str) -> io::Result<Option<File>> {
        self.stream.images.open(name)
    }

    fn pages(&self, name: &str) -> io::Result<Option<PagesReader>> {
        let Some(size) = self.stream.head.pages.get(name) else {
            return Ok(self.open(name)?.map(PagesReader::Plain));
        };
        Ok(Some(PagesReader::Passing(Arc::new(PassingFile {
            name: name.to_owned(),
            size: *size,
            pages: self.stream.pages.clone(),
        }))))
    }

    fn size(&self, name: &str) -> Option<u64> {
        match self.stream.head.pages.get(name) {
            Some(size) => Some(*size),
            None => self.stream.images.size(name),
        }
    }

    fn parent(&self) -> Option<ImageDir> {
        self.base.clone()
    }

    fn passes_by(&self) -> bool {
        true
    }

    fn check_rest(&self) -> io::Result<()> {
        self.passing().check(&self.stream.head, &self.stream.path)?;
        check_base(self.base.as_ref())
    }
}

/// One file of pages of a stream.
#[derive(Debug)]
struct PassingFile {
    name: String,
    size: u64,
    pages: Arc<Mutex<Passing>>,
}

impl PassingPages for PassingFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        lock(&self.pages).read(&self.name, buffer, offset)
    }

    fn known_hash(&self) -> Option<blake3::Hash> {
        None
    }
}
