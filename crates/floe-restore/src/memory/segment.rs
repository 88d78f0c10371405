//! Segments of shared anonymous memory, and the content of any shared memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use floe_image::{ImageDir, ImageKind};
use floe_kernel::ids::PAGE_SIZE;
use floe_kernel::shared_anonymous::SharedAnonymous;
use floe_memory::{PageIndex, StoredRun};

use super::error::MemoryError;
use super::plan::MemoryPlan;

/// Bytes that are copied at once.
const CHUNK: u64 = 512 * 1024;

/// A segment of shared anonymous memory to be made, see [`make_segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentPlan {
    /// Its id in the images.
    pub id: u64,
    /// Its size in bytes: the end of what is mapped of it.
    pub bytes: u64,
    /// Flags of mmap(2) for its pages.
    page_flags: i32,
}

/// The segments that the tasks of a tree need, each once.
pub fn plan_segments<'a>(plans: impl IntoIterator<Item = &'a MemoryPlan>) -> Vec<SegmentPlan> {
    let mut segments = BTreeMap::new();
    for (id, end, flags) in plans.into_iter().flat_map(MemoryPlan::segment_ends) {
        let huge = libc::MAP_HUGETLB | (libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT);
        let segment = segments.entry(id).or_insert(SegmentPlan {
            id,
            bytes: 0,
            page_flags: flags & huge,
        });
        segment.bytes = segment.bytes.max(end);
    }
    segments.into_values().collect()
}

/// Makes a segment with its content; tasks map the descriptor, which is read-write.
pub fn make_segment(plan: &SegmentPlan, images: &ImageDir) -> Result<OwnedFd, MemoryError> {
    let pages = segment_pages(plan.id, images)?;
    let mut segment =
        SharedAnonymous::new(plan.bytes as usize, plan.page_flags).map_err(|source| {
            MemoryError::Segment {
                id: plan.id,
                what: "making it",
                source,
            }
        })?;
    if plan.page_flags & libc::MAP_HUGETLB != 0 {
        copy_pages(plan.id, &pages, |offset, bytes| {
            segment.write_mapped(offset as usize, bytes);
            Ok(())
        })?;
    } else {
        write_pages(plan.id, &pages, segment.as_fd())?;
    }
    Ok(segment.into_fd())
}

/// Gives a file in memory (memfd), already of its size, the content of segment `id`.
pub fn fill_shared_file(
    file: BorrowedFd<'_>,
    id: u64,
    images: &ImageDir,
) -> Result<(), MemoryError> {
    write_pages(id, &segment_pages(id, images)?, file)
}

/// A segment that nobody wrote to has no image.
fn segment_pages(id: u64, images: &ImageDir) -> Result<PageIndex, MemoryError> {
    if images.has(ImageKind::ShmemPagemap, id) {
        Ok(PageIndex::read(images, ImageKind::ShmemPagemap, id)?)
    } else {
        Ok(PageIndex::default())
    }
}

fn write_pages(id: u64, pages: &PageIndex, file: BorrowedFd<'_>) -> Result<(), MemoryError> {
    let file = file.try_clone_to_owned().map(File::from);
    let file = file.map_err(|source| MemoryError::Segment {
        id,
        what: "duplicating its descriptor",
        source,
    })?;
    copy_pages(id, pages, |offset, bytes| file.write_all_at(bytes, offset))
}

fn copy_pages(
    id: u64,
    pages: &PageIndex,
    mut write: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
) -> Result<(), MemoryError> {
    let mut buffer = Vec::new();
    let mut opened: Option<(u32, File)> = None;
    for run in pages.runs() {
        if opened
            .as_ref()
            .is_none_or(|(number, _)| *number != run.file)
        {
            opened = Some((run.file, pages.open(run.file)?));
        }
        let (_, file) = opened.as_ref().expect("opened above");
        for piece in pieces(run) {
            buffer.resize(piece.len as usize, 0);
            file.read_exact_at(&mut buffer, piece.offset)
                .map_err(|source| MemoryError::ReadPages {
                    offset: piece.offset,
                    bytes: piece.len as usize,
                    source,
                })?;
            write(piece.start, &buffer).map_err(|source| MemoryError::Segment {
                id,
                what: "writing its content",
                source,
            })?;
        }
    }
    Ok(())
}

fn pieces(run: &StoredRun) -> impl Iterator<Item = StoredRun> + '_ {
    debug_assert_eq!(run.len % PAGE_SIZE, 0);
    (0..run.len.div_ceil(CHUNK)).map(|index| StoredRun {
        start: run.start + index * CHUNK,
        len: CHUNK.min(run.len - index * CHUNK),
        file: run.file,
        offset: run.offset + index * CHUNK,
    })
}
