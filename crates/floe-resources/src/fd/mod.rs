//! Kinds of descriptors, one module each.
//!
//! To add a kind: write a module with a unit struct, the five header lines and `impl FdKind`, and add
//! one line to [`FD_KINDS`]. `recognises` sees an [`FdProbe`] (our duplicate of the descriptor, its link,
//! metadata and fdinfo) and must not be true for what another kind recognises. `collect` runs once for
//! each open file description and returns its entry; entries of other images go through
//! [`Collector::append_side`], whatever is asked of the kernel once a dump through
//! [`Collector::cache`], and work that needs to know all descriptors through [`Collector::defer`].
//! What cannot be saved is `CollectError::Unsupported` with a remedy: all of them are shown at once.

pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fifo;
pub mod memfd;
pub mod pidfd;
pub mod pipe;
pub mod regular;
pub mod remap;
pub mod signalfd;
pub mod timerfd;

use floe_image::messages::FileEntry;

use crate::collect::{CollectError, Collector, FdProbe, FileId};

/// How one kind of descriptor is saved.
pub trait FdKind: Sync {
    /// Whether the descriptor is of this kind.
    fn recognises(&self, fd: &FdProbe<'_>) -> bool;

    /// Saves the open file description behind the descriptor as number `id`.
    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError>;
}

/// Every kind; the first that recognises a descriptor saves it.
pub const FD_KINDS: &[&dyn FdKind] = &[
    &eventfd::EventFd,
    &epoll::Epoll,
    &signalfd::SignalFd,
    &timerfd::TimerFd,
    &pidfd::PidFd,
    &pipe::Pipe,
    &fifo::Fifo,
    &memfd::MemFd,
    &device::Device,
    &regular::RegularFile,
];

/// An entry of `files.img` without its content.
pub(crate) fn file_entry(kind: floe_image::messages::FdTypes, id: FileId) -> FileEntry {
    FileEntry {
        r#type: kind as i32,
        id: id.0,
        ..FileEntry::default()
    }
}
