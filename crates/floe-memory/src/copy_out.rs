//! Copying the content of a segment out of its images, for memory that no task maps yet.

use std::io;
use std::sync::Arc;

use floe_image::{ImageDir, ImageError, ImageKind, PagesReader};

use crate::{IndexError, PageIndex};

/// Bytes that are copied at once.
const CHUNK: u64 = 512 * 1024;

/// Why the content of a segment could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyOutError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("Reading {bytes} bytes of pages at offset {offset} of the image")]
    Read {
        offset: u64,
        bytes: usize,
        #[source]
        source: io::Error,
    },
    #[error("Writing {bytes} bytes of content at {at:#x}")]
    Write {
        at: u64,
        bytes: usize,
        #[source]
        source: io::Error,
    },
}

/// Gives `write` every stretch of content of segment `id` with its offset; what is left out is zero.
pub fn copy_segment(
    images: &ImageDir,
    id: u64,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), CopyOutError> {
    // A segment that nobody wrote to has no image.
    if !images.has(ImageKind::ShmemPagemap, id) {
        return Ok(());
    }
    let pages = PageIndex::read(images, ImageKind::ShmemPagemap, id)?;
    let mut buffer = Vec::new();
    let mut opened: Option<(u32, Arc<PagesReader>)> = None;
    for run in pages.runs() {
        if opened
            .as_ref()
            .is_none_or(|(number, _)| *number != run.file)
        {
            opened = Some((run.file, pages.open(run.file)?));
        }
        let (_, file) = opened.as_ref().expect("opened above");
        let mut done = 0;
        while done < run.len {
            let bytes = CHUNK.min(run.len - done) as usize;
            buffer.resize(bytes, 0);
            let offset = run.offset + done;
            let read = file.read_exact_at(&mut buffer, offset);
            read.map_err(|source| CopyOutError::Read {
                offset,
                bytes,
                source,
            })?;
            let at = run.start + done;
            write(at, &buffer).map_err(|source| CopyOutError::Write { at, bytes, source })?;
            done += bytes as u64;
        }
    }
    Ok(())
}
