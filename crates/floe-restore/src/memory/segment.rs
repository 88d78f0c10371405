//! Segments of shared anonymous memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use floe_image::ImageDir;
use floe_kernel::shared_anonymous::SharedAnonymous;
use floe_memory::copy_segment;

use super::error::MemoryError;
use super::plan::MemoryPlan;

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
    let failed = |what| {
        move |source| MemoryError::Segment {
            id: plan.id,
            what,
            source,
        }
    };
    let mut segment =
        SharedAnonymous::new(plan.bytes as usize, plan.page_flags).map_err(failed("making it"))?;
    if plan.page_flags & libc::MAP_HUGETLB != 0 {
        copy_segment(images, plan.id, |offset, bytes| {
            let end = offset.checked_add(bytes.len() as u64);
            if end.is_none_or(|end| end > plan.bytes) {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
            segment.write_mapped(offset as usize, bytes);
            Ok(())
        })?;
    } else {
        let file = segment.as_fd().try_clone_to_owned().map(File::from);
        let file = file.map_err(failed("duplicating its descriptor"))?;
        copy_segment(images, plan.id, |offset, bytes| {
            file.write_all_at(bytes, offset)
        })?;
    }
    Ok(segment.into_fd())
}
