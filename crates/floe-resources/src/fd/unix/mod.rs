//! Unix sockets (`unix(7)`): streams, datagrams and sequenced packets.
//!
//! Saved:    name and file, state, peer, backlog, waiting clients, shut directions, options, unread messages.
//! Rebuilt:  bound and listening, or made in pairs; then connected, filled, shut. Needs: files in messages.
//! Not kept: credentials of connected peers (`SO_PEERCRED`), out-of-band bytes.

mod collect;
mod listeners;
mod name;
mod named;
mod peers;
mod plan;

pub use listeners::Listeners;

use floe_image::messages::{FdTypes, FileEntry};

use super::{FdKind, FdRestore};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{PlanError, Planner};

/// See the module.
pub struct UnixSocket;

/// `unix_sk_entry.uflags`: the socket is outside of the tree and is found by its name.
const EXTERNAL: u32 = 1;
/// `unix_sk_entry.uflags`: its peer was the engine's own service.
const SERVICE: u32 = 2;
/// `unix_sk_entry.uflags`: a plug-in makes it.
const CALLBACK: u32 = 4;

const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;

impl FdKind for UnixSocket {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target().starts_with(b"socket:[")
            && super::socket_options::family_of(fd.file()) == Some(libc::AF_UNIX)
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        collect::collect(id, fd, collector)
    }
}

impl FdRestore for UnixSocket {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Unixsk
    }

    /// The first socket brings all others along, because who makes whom depends on all of them.
    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let mut sockets = planner.images.of_type(FdTypes::Unixsk);
        if sockets.next().is_some_and(|first| first.id == file.id) {
            plan::plan_all(planner)?;
        }
        Ok(())
    }
}
