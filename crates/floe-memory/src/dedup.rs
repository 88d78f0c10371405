//! Giving back the room of pages that a later generation replaces.

use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;

use floe_image::dir::PE_PRESENT;
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
    #[error("Punching pages out of {}", path.display())]
    Punch {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Punches the pages that `images` holds itself out of its parents; returns the bytes given back. The
/// parents cannot be restored by themselves any more.
pub fn punch_replaced(images: &ImageDir) -> Result<ByteCount, DedupError> {
    let mut total = 0;
    let Some(parent) = images.parent()? else {
        return Ok(ByteCount(0));
    };
    for kind in [ImageKind::Pagemap, ImageKind::ShmemPagemap] {
        for id in images.ids(kind)? {
            if parent.has(kind, id) {
                total += punch_one(images, &parent, (kind, id))?;
            }
        }
    }
    Ok(ByteCount(total))
}

fn punch_one(
    images: &ImageDir,
    parent: &ImageDir,
    (kind, id): (ImageKind, u64),
) -> Result<u64, DedupError> {
    let (_, entries) = images.read_pagemap(kind, id)?;
    let index = PageIndex::read(parent, kind, id)?;
    let mut punched = 0;
    for entry in entries {
        if entry.flags() & PE_PRESENT == 0 {
            continue;
        }
        let end = entry.vaddr + entry.nr_pages() * PAGE_SIZE;
        for run in index.runs_in(entry.vaddr..end) {
            let path = index.path(run.file);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|file| Ok(rustix::fs::fallocate(&file, flags, run.offset, run.len)?))
                .map_err(|source| DedupError::Punch { path, source })?;
            punched += run.len;
        }
    }
    Ok(punched)
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
