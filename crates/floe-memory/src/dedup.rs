//! Giving back the room of pages that a later generation replaces.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;

use floe_image::dir::PE_PRESENT;
use floe_image::manifest::{Manifest, ManifestError};
use floe_image::{ImageDir, ImageError, ImageKind};
use floe_kernel::ids::{ByteCount, PAGE_SIZE};
use rustix::fs::FallocateFlags;

use crate::resolve::{IndexError, PageIndex};

/// Room could not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DedupError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("Punching pages out of {}", path.display())]
    Punch {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A stretch of a file that nobody needs any more: the file, offset and length in bytes.
type Hole = (PathBuf, u64, u64);

/// Punches the pages that `images` holds itself out of its parents; returns the bytes given back. The
/// parents cannot be restored by themselves any more.
pub fn punch_replaced(images: &ImageDir) -> Result<ByteCount, DedupError> {
    let Some(parent) = images.parent()? else {
        return Ok(ByteCount(0));
    };
    let mut holes = Vec::new();
    for kind in [ImageKind::Pagemap, ImageKind::ShmemPagemap] {
        for id in images.ids(kind)? {
            if parent.has(kind, id) {
                find_replaced(images, &parent, (kind, id), &mut holes)?;
            }
        }
    }
    leave_compressed(&mut holes);
    forget_hashes(&holes)?;
    for (path, offset, len) in &holes {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| Ok(rustix::fs::fallocate(&file, flags, *offset, *len)?));
        punched.map_err(|source| DedupError::Punch {
            path: path.clone(),
            source,
        })?;
    }
    Ok(ByteCount(holes.iter().map(|(_, _, len)| len).sum()))
}

/// No room of single pages can be given back in files of frames, which lie beside the names of plain ones.
fn leave_compressed(holes: &mut Vec<Hole>) {
    let paths: BTreeSet<PathBuf> = holes.iter().map(|(path, ..)| path.clone()).collect();
    for path in paths.into_iter().filter(|path| !path.exists()) {
        tracing::warn!(
            "the pages of {} are compressed: those that are replaced keep their room; `floe squash` makes one \
             checkpoint of the chain",
            path.display()
        );
        holes.retain(|(holed, ..)| *holed != path);
    }
}

fn find_replaced(
    images: &ImageDir,
    parent: &ImageDir,
    (kind, id): (ImageKind, u64),
    holes: &mut Vec<Hole>,
) -> Result<(), DedupError> {
    let (_, entries) = images.read_pagemap(kind, id)?;
    let index = PageIndex::read(parent, kind, id)?;
    for entry in entries {
        if entry.flags() & PE_PRESENT == 0 {
            continue;
        }
        let end = entry.vaddr + entry.nr_pages() * PAGE_SIZE;
        let runs = index.runs_in(entry.vaddr..end);
        holes.extend(runs.map(|run| (index.path(run.file), run.offset, run.len)));
    }
    Ok(())
}

/// What has holes differs from its checksum, so the manifests say that it has none.
fn forget_hashes(holes: &[Hole]) -> Result<(), DedupError> {
    let paths: BTreeSet<&PathBuf> = holes.iter().map(|(path, _, _)| path).collect();
    let directories: BTreeSet<_> = paths.iter().filter_map(|path| path.parent()).collect();
    for directory in directories {
        let Some(mut manifest) = Manifest::read(&ImageDir::open(directory)?)? else {
            continue;
        };
        for (name, file) in &mut manifest.files {
            if paths.contains(&directory.join(name)) {
                file.blake3 = None;
            }
        }
        manifest.replace(directory)?;
    }
    Ok(())
}

/// Does so for a whole chain, from `images` down to the first generation.
pub fn punch_chain(images: &ImageDir) -> Result<ByteCount, DedupError> {
    let mut total = punch_replaced(images)?.0;
    let mut newest = images.parent()?;
    while let Some(images) = newest {
        total += punch_replaced(&images)?.0;
        newest = images.parent()?;
    }
    Ok(ByteCount(total))
}
