//! Copies of the pages that a restore reads while it plans, before the memory of any task: the code of
//! the kernel in each (vDSO), which must be compared with the running kernel's.

use std::collections::HashMap;

use floe_image::ImageKind;
use floe_image::messages::MmEntry;

use crate::archive::Early;
use crate::merged::Merged;
use crate::pack::PackError;

/// Bit in a mapping's status.
const VDSO: u32 = 1 << 3;
/// A longer stretch is none that a kernel makes, in bytes.
const MOST: u64 = 1 << 20;

/// Notes where they are; their content, each once.
pub(crate) fn collect(merged: &Merged, places: &mut Vec<Early>) -> Result<Vec<u8>, PackError> {
    let newest = &merged.chain.newest().dir;
    let mut copies = Vec::new();
    let mut known: HashMap<Vec<u8>, u64> = HashMap::new();
    for space in &merged.memory {
        if space.kind != ImageKind::Pagemap {
            continue;
        }
        let Some(mm) = newest.read_optional::<MmEntry>(ImageKind::Mm, space.id)? else {
            continue;
        };
        let code: Vec<_> = mm
            .vmas
            .iter()
            .filter(|vma| vma.status & VDSO != 0)
            .collect();
        let file = ImageKind::Pages.file_name(space.pages_id.into());
        let mut offset = 0;
        for run in space.stored() {
            let inside = |vma: &&&floe_image::messages::VmaEntry| {
                vma.start < run.end() && run.start < vma.end && run.len <= MOST
            };
            if code.iter().any(|vma| inside(&vma)) {
                let mut bytes = vec![0; run.len as usize];
                let read = space
                    .index
                    .open(run.file)?
                    .read_exact_at(&mut bytes, run.offset);
                read.map_err(|source| PackError::Read {
                    name: file.clone(),
                    source,
                })?;
                let copy = *known.entry(bytes).or_insert_with_key(|bytes| {
                    copies.extend_from_slice(bytes);
                    (copies.len() - bytes.len()) as u64
                });
                places.push(Early {
                    file: file.clone(),
                    offset,
                    len: run.len,
                    copy,
                });
            }
            offset += run.len;
        }
    }
    Ok(copies)
}
