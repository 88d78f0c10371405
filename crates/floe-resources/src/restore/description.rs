//! What all open file descriptions have: flags, offset, owner.

use std::os::fd::{AsFd, BorrowedFd};

use floe_image::messages::FownEntry;
use floe_kernel::file_owner::{FileOwner, set_file_owner};
use floe_plan::Handle;
use rustix::fs::{OFlags, SeekFrom};

use crate::namespace::OwnerMap;

use super::{Attempt, ExecuteError, Planner};

/// Flags that `F_SETFL` can set; the others belong to `open`.
const SETTABLE: OFlags = OFlags::APPEND
    .union(OFlags::NONBLOCK)
    .union(OFlags::DIRECT)
    .union(OFlags::NOATIME)
    .union(OFlags::from_bits_retain(libc::O_ASYNC as u32));

/// Sets the flags of an open file description that its creation could not set.
pub fn set_flags(file: BorrowedFd<'_>, flags: u32) -> Result<(), ExecuteError> {
    let wanted = OFlags::from_bits_retain(flags) & SETTABLE;
    let now = rustix::fs::fcntl_getfl(file).during("Reading the flags of", || "a file".into())?;
    if now & SETTABLE == wanted {
        return Ok(());
    }
    rustix::fs::fcntl_setfl(file, wanted).during("Setting flags", || format!("{flags:#o}"))
}

/// Moves the offset; `u64::MAX` stands for a file that has none.
pub fn set_offset(file: BorrowedFd<'_>, offset: u64) -> Result<(), ExecuteError> {
    if offset == 0 || offset == u64::MAX {
        return Ok(());
    }
    rustix::fs::seek(file, SeekFrom::Start(offset))
        .map(drop)
        .during("Seeking to", || offset.to_string())
}

/// Adds the step that sets who gets the file's signals, where somebody does.
pub fn plan_owner(planner: &mut Planner<'_>, id: u32, owner: &FownEntry) {
    if owner.pid == 0 && owner.signum == 0 {
        return;
    }
    let owner = owner.clone();
    // The pid must exist when the owner is set.
    planner.step(
        format!("set the owner of file {id:#x}"),
        (
            &[Handle::Tree, Handle::File(id)],
            &[Handle::Object("owner", u64::from(id))],
        ),
        move |world| {
            let known = world.host_pid(owner.pid);
            let owner = FileOwner {
                pid: known.map_or(0, |pid| pid.0.cast_unsigned()),
                ..file_owner_of(&owner, &world.images.owners)
            };
            let file = world.file(id)?;
            set_file_owner(file.as_fd(), &owner)
                .during("Setting the owner of file", || format!("{id:#x}"))
        },
    );
}

/// The owner as the kernel is to be told.
pub fn file_owner_of(owner: &FownEntry, owners: &OwnerMap) -> FileOwner {
    FileOwner {
        uid: owners.uid_outside(owner.uid),
        euid: owners.uid_outside(owner.euid),
        signal: owner.signum,
        kind: owner.pid_type,
        pid: owner.pid,
    }
}
