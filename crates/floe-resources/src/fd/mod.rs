//! Kinds of descriptors, one module each.
//!
//! To add a kind: write a module with a unit struct, the five header lines and `impl FdKind`, and add
//! one line to [`FD_KINDS`]. `recognises` sees an [`FdProbe`] (our duplicate of the descriptor, its link,
//! metadata and fdinfo) and must not be true for what another kind recognises. `collect` runs once for
//! each open file description and returns its entry; entries of other images go through
//! [`Collector::append_side`], whatever is asked of the kernel once a dump through
//! [`Collector::cache`], and work that needs to know all descriptors through [`Collector::defer`].
//! What cannot be saved is `CollectError::Unsupported` with a remedy: all of them are shown at once.
//! Its restore half is `impl FdRestore` in the same module, with a line in [`RESTORE_KINDS`].

pub mod bpf_map;
pub mod build_id;
pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fanotify;
pub mod fifo;
pub mod inet;
mod inherit;
pub mod inotify;
pub mod memfd;
pub mod namespace;
pub mod netlink;
pub mod packet;
pub mod pidfd;
pub mod pipe;
mod queue;
pub mod regular;
pub mod remap;
pub mod signalfd;
mod socket_options;
mod socket_queue;
pub mod timerfd;
pub mod tty;
mod tun;
pub mod unchanged;
pub mod unix;
mod watch;

use floe_image::messages::{FdTypes, FileEntry};

use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{PlanError, Planner};
use crate::task::label::sockets::SocketLabels;

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
    &inotify::Inotify,
    &fanotify::Fanotify,
    &pidfd::PidFd,
    &bpf_map::BpfMap,
    &namespace::Namespace,
    &unix::UnixSocket,
    &inet::InetSocket,
    &netlink::NetlinkSocket,
    &packet::PacketSocket,
    &pipe::Pipe,
    &fifo::Fifo,
    &memfd::MemFd,
    &tun::TunFile,
    &device::Device,
    &tty::Tty,
    &queue::PosixQueue,
    &regular::RegularFile,
];

/// An entry of `files.img` without its content.
pub(crate) fn file_entry(kind: FdTypes, id: FileId) -> FileEntry {
    FileEntry {
        r#type: kind as i32,
        id: id.0,
        ..FileEntry::default()
    }
}

/// How one kind of descriptor is rebuilt.
pub trait FdRestore: Sync {
    /// The type of its entries in `files.img`.
    fn fd_type(&self) -> FdTypes;

    /// Adds the steps that make the open file description of `file` ([`Planner::open`]).
    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError>;
}

/// Every kind that can be rebuilt.
pub const RESTORE_KINDS: &[&dyn FdRestore] = &[
    &eventfd::EventFd,
    &epoll::Epoll,
    &signalfd::SignalFd,
    &timerfd::TimerFd,
    &unix::UnixSocket,
    &inet::InetSocket,
    &netlink::NetlinkSocket,
    &packet::PacketSocket,
    &pipe::Pipe,
    &fifo::Fifo,
    &memfd::MemFd,
    &pidfd::PidFd,
    &inotify::Inotify,
    &fanotify::Fanotify,
    &bpf_map::BpfMap,
    &namespace::Namespace,
    &tun::TunFile,
    &tty::Tty,
    &regular::RegularFile,
];

/// Adds the steps for every entry of `files.img`.
pub fn plan_files(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    remap::plan_names(planner)?;
    let queues = queue::Queues::plan(planner)?;
    let labels = SocketLabels::plan(planner)?;
    for file in images.files.values() {
        planner.label_sockets(labels.of(file.id));
        if inherit::plan_inherited(file, planner) || queues.plan_descriptor(file, planner)? {
            continue;
        }
        let kind = FdTypes::try_from(file.r#type)
            .ok()
            .and_then(|wanted| RESTORE_KINDS.iter().find(|kind| kind.fd_type() == wanted));
        match kind {
            Some(kind) => kind.plan(file, planner)?,
            None => {
                let name = FdTypes::try_from(file.r#type).map_or_else(
                    |_| format!("type {}", file.r#type),
                    |kind| format!("{kind:?}"),
                );
                return Err(PlanError::Unsupported {
                    object: format!("File {:#x} ({name})", file.id),
                    remedy: "this version has no such kind; restore it with the version that made the images",
                });
            }
        }
    }
    planner.label_sockets(None);
    Ok(())
}

/// The part of an entry that its type promises.
pub(crate) fn payload<'i, T>(file: &'i FileEntry, part: &'i Option<T>) -> Result<&'i T, PlanError> {
    part.as_ref().ok_or_else(|| {
        PlanError::damaged(
            "files.img",
            format!("file {:#x} lacks the part that its type promises", file.id),
        )
    })
}
