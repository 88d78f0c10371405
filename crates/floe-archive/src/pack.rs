//! Packing a chain into one archive, in a stream.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use floe_image::catalogue::ImageKind;
use floe_image::frames::{Codec, FRAME_BYTES, FrameWriter};
use floe_image::manifest::{MANIFEST_NAME, Manifest, ManifestFile};
use floe_image::{ImageDir, ImageError};
use rustix::fs::FallocateFlags;

use crate::ChainError;
use crate::archive::{
    BLOCK, Base, EARLY_NAME, HEAD_NAME, Head, IMAGES, INDEX_FORMAT, INDEX_NAME, Index, Member,
};
use crate::early;
use crate::front::Front;
use crate::merged::{MergeError, Merged, MergedPages};

/// Pages are given back in pieces of so many bytes.
const GIVEN_BACK: u64 = 8 << 20;

/// How to pack.
#[derive(Clone, Copy, Debug)]
pub struct PackOptions {
    /// Only what is newer than this generation.
    pub since: Option<u32>,
    /// Level of zstd.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
}

/// What was packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackReport {
    /// Generations, from and to.
    pub generations: (u32, u32),
    /// Bytes of files before compression.
    pub content: u64,
    /// Bytes of the archive.
    pub written: u64,
}

/// Packing failed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The chain is not whole.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The chain cannot be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of the checkpoint cannot be read.
    #[error("Reading {name} of the checkpoint")]
    Read {
        name: String,
        #[source]
        source: io::Error,
    },
    /// The archive cannot be written: often the file system is full.
    #[error("Writing the archive")]
    Write(#[source] io::Error),
}

/// Packs the chain of `newest`.
pub fn pack(
    newest: &ImageDir,
    out: impl Write,
    options: &PackOptions,
) -> Result<PackReport, PackError> {
    pack_all(newest, out, options, None)
}

/// Packs the chain of `newest`, and gives back the room of each page below the directory `within` as soon as
/// it is packed: the chain is of no use afterwards, nor when packing fails.
pub fn pack_consuming(
    newest: &ImageDir,
    out: impl Write,
    options: &PackOptions,
    within: &Path,
) -> Result<PackReport, PackError> {
    pack_all(newest, out, options, Some(within.to_path_buf()))
}

fn pack_all(
    newest: &ImageDir,
    out: impl Write,
    options: &PackOptions,
    consume: Option<PathBuf>,
) -> Result<PackReport, PackError> {
    let merged = Merged::read(newest, options.since)?;
    let frames = FrameWriter::new(out, Codec::Zstd(options.level), options.threads);
    let frames = frames.map_err(PackError::Write)?;
    let mut packer = Packer::new(frames, since_epoch(merged.created()));
    packer.consume = consume;
    let mut head = head(&merged, options.since)?;
    let copies = early::of_chain(&merged)?;
    head.early = copies.places;
    packer.head(&head)?;
    packer.unlisted(EARLY_NAME, &copies.bytes)?;
    for name in &merged.files {
        packer.file(newest, name)?;
    }
    for space in &merged.memory {
        packer.bytes(&space.kind.file_name(space.id), &space.pagemap())?;
    }
    for space in &merged.memory {
        packer.pages(space)?;
    }
    let manifest = packer.manifest(&merged, options.since);
    packer.bytes(MANIFEST_NAME, manifest.as_bytes())?;
    let content = packer.members.values().map(|member| member.size).sum();
    let (_, written) = packer.finish(head)?;
    Ok(PackReport {
        generations: (merged.first, merged.last),
        content,
        written,
    })
}

pub(crate) fn since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// What the archive will hold.
fn head(merged: &Merged, since: Option<u32>) -> Result<Head, PackError> {
    let (chain, mut base, mut digests) = (&merged.chain, None, Vec::new());
    for (number, generation) in chain.generations().iter().enumerate() {
        let number = chain.number(number);
        if Some(number) == since {
            base = Some(Base {
                generation: number,
                digest: generation.digest()?,
            });
        }
        if number >= merged.first {
            digests.push(generation.digest()?);
        }
    }
    let pages = merged.memory.iter().map(|space| {
        let name = ImageKind::Pages.file_name(space.pages_id.into());
        (name, space.stored_bytes())
    });
    Ok(Head {
        format: INDEX_FORMAT,
        kind: merged.kind(),
        first: merged.first,
        last: merged.last,
        base,
        digests,
        pages: pages.collect(),
        early: Vec::new(),
    })
}

/// Writes the members of an archive.
pub(crate) struct Packer<W: Write> {
    pub(crate) frames: FrameWriter<W>,
    pub(crate) members: BTreeMap<String, Member>,
    /// Content that stands before ours.
    shift: u64,
    modified: u64,
    /// Pages below this directory are given back.
    consume: Option<PathBuf>,
}

impl<W: Write> Packer<W> {
    /// The members will have been changed at `modified`, in seconds since 1970.
    pub(crate) fn new(frames: FrameWriter<W>, modified: u64) -> Packer<W> {
        Packer {
            frames,
            members: BTreeMap::new(),
            shift: 0,
            modified,
            consume: None,
        }
    }

    fn header(&mut self, name: &str, size: u64) -> Result<u64, PackError> {
        let header = header(name, size, self.modified).map_err(PackError::Write)?;
        self.frames
            .write_all(header.as_bytes())
            .map_err(PackError::Write)?;
        Ok(self.shift + self.frames.position())
    }

    /// Notes members that stand before all others, and their frames.
    pub(crate) fn put_before(&mut self, front: Front) {
        self.shift = front.content();
        let mut behind = std::mem::replace(&mut self.members, front.members);
        for member in behind.values_mut() {
            member.offset += self.shift;
        }
        self.members.append(&mut behind);
        self.frames.put_before(front.frames);
    }

    /// Ends a member: padding, and its row in the index.
    pub(crate) fn end(&mut self, name: &str, member: Member) -> Result<(), PackError> {
        self.pad(member.size)?;
        self.members.insert(name.to_owned(), member);
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<(), PackError> {
        let padding = size.next_multiple_of(BLOCK) - size;
        let zeros = &[0; BLOCK as usize][..padding as usize];
        self.frames.write_all(zeros).map_err(PackError::Write)
    }

    /// The first member.
    pub(crate) fn head(&mut self, head: &Head) -> Result<(), PackError> {
        let text = serde_json::to_vec(head).expect("a head has text keys only");
        self.unlisted(HEAD_NAME, &text)
    }

    /// A member that is no image.
    pub(crate) fn unlisted(&mut self, name: &str, content: &[u8]) -> Result<(), PackError> {
        self.header(name, content.len() as u64)?;
        self.frames.write_all(content).map_err(PackError::Write)?;
        self.pad(content.len() as u64)
    }

    pub(crate) fn bytes(&mut self, name: &str, content: &[u8]) -> Result<(), PackError> {
        let size = content.len() as u64;
        let offset = self.header(&format!("{IMAGES}{name}"), size)?;
        self.frames.write_all(content).map_err(PackError::Write)?;
        let blake3 = blake3::hash(content).to_hex().to_string();
        self.end(
            name,
            Member {
                size,
                blake3,
                offset,
            },
        )
    }

    pub(crate) fn file(&mut self, dir: &ImageDir, name: &str) -> Result<(), PackError> {
        let failed = |source| PackError::Read {
            name: name.to_owned(),
            source,
        };
        let Some(file) = dir.open_file(name)? else {
            return Err(failed(io::ErrorKind::NotFound.into()));
        };
        let size = file.metadata().map_err(failed)?.len();
        let offset = self.header(&format!("{IMAGES}{name}"), size)?;
        let mut hasher = blake3::Hasher::new();
        let mut file = file.take(size);
        let mut buffer = vec![0; FRAME_BYTES.min(size as usize + 1)];
        let mut done = 0;
        while done < size {
            let read = file.read(&mut buffer).map_err(failed)?;
            if read == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            hasher.update(&buffer[..read]);
            self.frames
                .write_all(&buffer[..read])
                .map_err(PackError::Write)?;
            done += read as u64;
        }
        let blake3 = hasher.finalize().to_hex().to_string();
        self.end(
            name,
            Member {
                size,
                blake3,
                offset,
            },
        )
    }

    /// Begins a file of pages; they begin a frame, so that a reader decodes nothing in vain.
    pub(crate) fn begin_pages(&mut self, name: &str, size: u64) -> Result<u64, PackError> {
        let offset = self.header(&format!("{IMAGES}{name}"), size)?;
        self.frames.cut().map_err(PackError::Write)?;
        Ok(offset)
    }

    /// The pages of an address space.
    fn pages(&mut self, space: &MergedPages) -> Result<(), PackError> {
        let name = ImageKind::Pages.file_name(space.pages_id.into());
        let size = space.stored_bytes();
        let offset = self.begin_pages(&name, size)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; FRAME_BYTES];
        let mut opened = None;
        for run in space.stored() {
            if opened.as_ref().is_none_or(|(file, _)| *file != run.file) {
                opened = Some((run.file, space.index.open(run.file)?));
            }
            let (_, pages) = opened.as_ref().expect("opened above");
            let (mut done, mut given) = (0, 0);
            while done < run.len {
                let part = &mut buffer[..(run.len - done).min(FRAME_BYTES as u64) as usize];
                let read = pages.read_exact_at(part, run.offset + done);
                read.map_err(|source| PackError::Read {
                    name: name.clone(),
                    source,
                })?;
                hasher.update(part);
                self.frames.write_all(part).map_err(PackError::Write)?;
                done += part.len() as u64;
                if done - given >= GIVEN_BACK || done == run.len {
                    let packed = (run.offset + given, done - given);
                    self.give_back(space.index.path(run.file), packed)?;
                    given = done;
                }
            }
        }
        let blake3 = hasher.finalize().to_hex().to_string();
        self.end(
            &name,
            Member {
                size,
                blake3,
                offset,
            },
        )
    }

    /// Punches out what was packed; file systems that cannot are left alone.
    fn give_back(&self, path: PathBuf, (offset, len): (u64, u64)) -> Result<(), PackError> {
        let within = self.consume.as_ref();
        if within.is_none_or(|within| !path.starts_with(within)) {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let file = File::options().write(true).open(&path);
        let file = file.map_err(|source| PackError::Read {
            name: path.display().to_string(),
            source,
        })?;
        let _ = rustix::fs::fallocate(&file, flags, offset, len);
        Ok(())
    }

    /// The manifest of the merged checkpoint.
    fn manifest(&self, merged: &Merged, since: Option<u32>) -> String {
        let files = self.members.iter().map(|(name, member)| {
            let file = ManifestFile {
                size: member.size,
                blake3: Some(member.blake3.clone()),
            };
            (name.clone(), file)
        });
        let parent = since.map(|since| format!("{}/{since}", crate::unpack::EARLIER));
        let manifest = Manifest::new(merged.manifest_info(parent), files.collect());
        serde_json::to_string_pretty(&manifest).expect("a manifest has text keys only") + "\n"
    }

    /// The index and the end of the tar, in a frame of their own.
    pub(crate) fn finish(mut self, head: Head) -> Result<(W, u64), PackError> {
        let index = Index {
            head,
            members: self.members,
        };
        let text = serde_json::to_vec(&index).expect("an index has text keys only");
        let header =
            header(INDEX_NAME, text.len() as u64, self.modified).map_err(PackError::Write)?;
        let mut last = header.as_bytes().to_vec();
        last.extend_from_slice(&text);
        last.resize(
            last.len().next_multiple_of(BLOCK as usize) + 2 * BLOCK as usize,
            0,
        );
        self.frames.write_frame(&last).map_err(PackError::Write)?;
        self.frames.finish().map_err(PackError::Write)
    }
}

fn header(name: &str, size: u64, modified: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o600);
    header.set_mtime(modified);
    header.set_cksum();
    Ok(header)
}
