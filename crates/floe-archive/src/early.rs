//! Copies of the pages that a restore reads while it plans, before the memory of any task: the code of
//! the kernel in each (vDSO), which must be compared with the running kernel's.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use floe_image::messages::MmEntry;
use floe_image::{ImageDir, ImageError, ImageKind};

use crate::archive::Early;
use crate::merged::Merged;
use crate::pack::PackError;

/// Bit in a mapping's status.
const VDSO: u32 = 1 << 3;
/// A longer stretch is none that a kernel makes, in bytes.
const MOST: u64 = 1 << 20;

/// Copies, each content once, and where they are from.
#[derive(Default)]
pub(crate) struct Copies {
    pub(crate) places: Vec<Early>,
    pub(crate) bytes: Vec<u8>,
    known: HashMap<Vec<u8>, u64>,
}

impl Copies {
    /// Copies the stretch of pages of a task that begins at `offset` in its file, if it is such code.
    pub(crate) fn take(
        &mut self,
        (code, pages): (&KernelCode, Range<u64>),
        (file, offset): (&str, u64),
        read: impl FnOnce(&mut [u8]) -> Result<io::Result<()>, ImageError>,
    ) -> Result<(), PackError> {
        let len = pages.end - pages.start;
        let inside = |part: &Range<u64>| part.start < pages.end && pages.start < part.end;
        if len > MOST || !code.0.iter().any(inside) {
            return Ok(());
        }
        let mut bytes = vec![0; len as usize];
        read(&mut bytes)?.map_err(|source| PackError::Read {
            name: file.to_owned(),
            source,
        })?;
        let copy = *self.known.entry(bytes).or_insert_with_key(|bytes| {
            self.bytes.extend_from_slice(bytes);
            (self.bytes.len() - bytes.len()) as u64
        });
        self.places.push(Early {
            file: file.to_owned(),
            offset,
            len,
            copy,
        });
        Ok(())
    }
}

/// Where a task has code of the kernel.
pub(crate) struct KernelCode(Vec<Range<u64>>);

impl KernelCode {
    /// Reads it from the task's mappings.
    pub(crate) fn of(dir: &ImageDir, id: u64) -> Result<KernelCode, ImageError> {
        let mm: Option<MmEntry> = dir.read_optional(ImageKind::Mm, id)?;
        let vmas = mm.iter().flat_map(|mm| &mm.vmas);
        let code = vmas.filter(|vma| vma.status & VDSO != 0);
        Ok(KernelCode(code.map(|vma| vma.start..vma.end).collect()))
    }
}

/// Takes all of a chain.
pub(crate) fn of_chain(merged: &Merged) -> Result<Copies, PackError> {
    let newest = &merged.chain.newest().dir;
    let mut copies = Copies::default();
    for space in &merged.memory {
        if space.kind != ImageKind::Pagemap {
            continue;
        }
        let code = KernelCode::of(newest, space.id)?;
        let file = ImageKind::Pages.file_name(space.pages_id.into());
        let mut offset = 0;
        for run in space.stored() {
            let read = |bytes: &mut [u8]| {
                let pages = space.index.open(run.file)?;
                Ok(pages.read_exact_at(bytes, run.offset))
            };
            copies.take((&code, run.start..run.end()), (&file, offset), read)?;
            offset += run.len;
        }
    }
    Ok(copies)
}
