//! Why memory cannot be restored.

use std::io;

use floe_image::ImageError;
use floe_inject::InjectError;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcError;

use super::region::Source;

/// Why there is no layout: found before anything is made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("The mapping {start:#x}-{end:#x} in the image is impossible: the image is damaged")]
    BadRange { start: u64, end: u64 },
    #[error("The mappings at {first:#x} and {second:#x} overlap: the image is damaged")]
    Overlap { first: u64, second: u64 },
    #[error(
        "The mapping at {start:#x} refers to the impossible file id {id}: the image is damaged"
    )]
    FileId { start: u64, id: u64 },
    #[error("The mapping at {start:#x} is of an unknown kind (status {status:#x})")]
    Unknown { start: u64, status: u32 },
    #[error("The mapping at {start:#x} is {what}, which cannot be restored: {remedy}")]
    Unsupported {
        start: u64,
        what: &'static str,
        remedy: &'static str,
    },
    #[error(
        "The image has content for {start:#x}, where nothing is mapped: mm and pagemap are of different dumps"
    )]
    StrayPages { start: u64 },
    #[error(
        "The vDSO in the image is another kernel's: {problem}; \
         restore on the kernel that the checkpoint was made on"
    )]
    ForeignVdso { problem: String },
    #[error(
        "The address spaces of the tree leave no common hole of {bytes} bytes for the executor"
    )]
    NoHole { bytes: u64 },
    #[error("The arena at {start:#x} lies where the task has a mapping")]
    ArenaInUse { start: u64 },
    #[error("Reading our own address space")]
    OwnMaps(#[source] ProcError),
    #[error("Reading our own vDSO")]
    OwnVdso(#[source] io::Error),
    #[error("The mapping at {start:#x} does not lie in System V segment {id} as the image has it")]
    Segment { start: u64, id: u64 },
    #[error(
        "System V segment {id} at {start:#x} has an unmapped part with other memory in its place, \
         where it cannot be attached any more"
    )]
    SegmentInTheWay { start: u64, id: u64 },
    #[error("Context of asynchronous I/O at {start:#x}: {problem}")]
    AioRing { start: u64, problem: String },
}

/// Why memory could not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(transparent)]
    Inject(#[from] InjectError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Index(#[from] floe_memory::IndexError),
    #[error(transparent)]
    Segments(#[from] floe_memory::CopyOutError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("Task {pid}: {needed:?} is needed for the mapping at {start:#x}, but was not opened")]
    NotOpened {
        pid: HostPid,
        start: u64,
        needed: Source,
    },
    #[error("Task {pid}: {what}")]
    Task {
        pid: HostPid,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Reading {bytes} bytes of pages at offset {offset} of the image")]
    ReadPages {
        offset: u64,
        bytes: usize,
        #[source]
        source: io::Error,
    },
    #[error("Task {pid}: {how} of {bytes} bytes of content at {start:#x}")]
    Fill {
        pid: HostPid,
        how: &'static str,
        start: u64,
        bytes: usize,
        #[source]
        source: io::Error,
    },
    #[error("Shared memory segment {id}: {what}")]
    Segment {
        id: u64,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Task {pid}: /proc/{pid}/exe stays another file, because the program still maps it")]
    ExeBusy { pid: HostPid },
}
