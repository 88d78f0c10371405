//! Dirty tracking: which pages are still what the last round copied.
//!
//! A round stops the program, arms the tracker and lets it run on; then pages are copied. What is written
//! after the arming is found by the next round. A tracker may call a page changed that is not (it is
//! copied once more), but never the reverse.

mod content;
mod none;
mod soft_dirty;
mod uffd;

use std::fmt::Debug;
use std::io;
use std::ops::Range;

use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::{HostPid, TaskAddr};

use crate::resolve::IndexError;
use crate::select::{PageRun, ScanError, Selection};
use floe_image::ImageError;

pub use content::{ContentTracker, MappedPages, Maps};
pub use none::NoTracker;
pub use soft_dirty::SoftDirtyTracker;
pub use uffd::UffdTracker;

/// A stretch of mappings whose pages are chosen in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    pub range: Range<TaskAddr>,
    pub selection: Selection,
}

/// The forms of tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerKind {
    /// Asynchronous write protection by a userfaultfd (Linux 6.7+).
    Uffd,
    /// Soft-dirty bits (CONFIG_MEM_SOFT_DIRTY).
    SoftDirty,
    /// Comparing with what the parent has.
    Content,
    /// Everything is copied every time.
    None,
}

impl TrackerKind {
    /// The name by which options and manifests know it.
    pub fn name(self) -> &'static str {
        match self {
            TrackerKind::Uffd => "uffd",
            TrackerKind::SoftDirty => "soft-dirty",
            TrackerKind::Content => "content",
            TrackerKind::None => "none",
        }
    }

    /// The best that this kernel offers, and why.
    pub fn best(features: &KernelFeatures) -> (TrackerKind, &'static str) {
        if features.uffd_wp_async && features.pagemap_scan {
            (
                TrackerKind::Uffd,
                "userfaultfd with asynchronous write protection and PAGEMAP_SCAN are there",
            )
        } else if features.soft_dirty {
            (
                TrackerKind::SoftDirty,
                "no asynchronous write protection, but soft-dirty bits are there",
            )
        } else {
            (
                TrackerKind::Content,
                "neither asynchronous write protection nor soft-dirty bits: pages are compared with \
                 the parent's",
            )
        }
    }

    /// Whether this kernel has what it needs.
    pub fn is_possible(self, features: &KernelFeatures) -> bool {
        match self {
            TrackerKind::Uffd => features.uffd_wp_async && features.pagemap_scan,
            TrackerKind::SoftDirty => features.soft_dirty,
            TrackerKind::Content | TrackerKind::None => true,
        }
    }
}

/// Tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel refused to tell, or to protect.
    #[error("Tracking writes of task {pid} in {start}-{end}")]
    Scan {
        pid: HostPid,
        start: TaskAddr,
        end: TaskAddr,
        #[source]
        source: io::Error,
    },
    /// Soft-dirty bits could not be cleared.
    #[error("Clearing the soft-dirty bits of task {pid}")]
    Clear {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Select(#[from] ScanError),
    /// A page could not be compared with the parent's.
    #[error("Comparing memory at {at:#x} with the parent's")]
    Compare {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("Reading the parent's index of pages")]
    Parent(#[from] IndexError),
    #[error("Reading the parent's pages")]
    ParentPages(#[from] ImageError),
}

/// Tells changed from unchanged pages of one task.
pub trait DirtyTracker: Debug + Send {
    /// Which form it is.
    fn kind(&self) -> TrackerKind;

    /// With the task stopped: has writes from now on noticed where they were before, and remembers which
    /// pages were written up to now.
    fn arm(&mut self, areas: &[Area]) -> Result<(), TrackError>;

    /// Has writes noticed in what [`DirtyTracker::arm`] left out because it was not tracked before. The
    /// task may run on already when its pages are read after this; all of them count as written.
    fn arm_fresh(&mut self) -> Result<(), TrackError>;

    /// With the task stopped for good: finds out now what [`DirtyTracker::unchanged`] will be asked for
    /// these areas, where the tracker can.
    fn survey(&mut self, areas: &[Area]) -> Result<(), TrackError>;

    /// Which of the pages in `present` (a set inside of `area`) are as the last round copied them: the
    /// last before [`DirtyTracker::arm`], where that was called.
    fn unchanged(&mut self, area: &Area, present: &[PageRun]) -> Result<Vec<PageRun>, TrackError>;
}
