//! Descriptors of our caller in the place of saved files (`--inherit-fd fd[N]:KEY`).
//!
//! Keys are CRIU's: `pipe:[INODE]`, `file[MNT:INODE]` for files that the dump was told are external,
//! `/memfd:NAME`, or a path. Unix sockets and terminals look for theirs in their own modules.

use std::os::fd::{AsFd, RawFd};

use floe_image::messages::{FdTypes, FileEntry};
use floe_options::RestoreOptions;
use rustix::fs::OFlags;

use super::pipe;
use crate::restore::{Attempt, Planner, TreeImages, set_flags};

/// Plans the file from what the caller gave for it; false where that is nothing.
pub(super) fn plan_inherited<'i>(file: &'i FileEntry, planner: &mut Planner<'i>) -> bool {
    let Some((fd, key, flags)) = stand_in(file, planner.images, planner.options) else {
        return false;
    };
    let reopened = matches!(file.r#type(), FdTypes::Pipe | FdTypes::Fifo);
    planner.open(file.id, format!("take fd {fd} as {key}"), &[], move |_| {
        let given = floe_kernel::inherited::duplicate(fd)
            .during("Taking over", || format!("fd {fd} for {key}"))?;
        if !reopened {
            return Ok(given);
        }
        // An end of its own, so that its flags are its own too.
        let end = pipe::reopen(given.as_fd(), flags & OFlags::ACCMODE)?;
        set_flags(end.as_fd(), flags.bits())?;
        Ok(end)
    });
    true
}

/// The caller's descriptor for a file, the key that it was given by, and the file's flags.
fn stand_in(
    file: &FileEntry,
    images: &TreeImages,
    options: &RestoreOptions,
) -> Option<(RawFd, String, OFlags)> {
    if options.inherit_fds.is_empty() || !images.named_by(file.id).is_empty() {
        return None;
    }
    let path_of = |id| images.files.get(&id).and_then(|file| file.reg.as_ref());
    let (key, flags) = match file.r#type() {
        FdTypes::Pipe => {
            let end = file.pipe.as_ref()?;
            (format!("pipe:[{}]", end.pipe_id), end.flags)
        }
        FdTypes::Fifo => {
            let name = path_of(file.fifo.as_ref()?.regf_id.unwrap_or(file.id))?;
            (name.name.clone(), name.flags)
        }
        FdTypes::Memfd => {
            let entry = file.memfd.as_ref()?;
            (memfd_key(entry.inode_id, images)?, entry.flags)
        }
        FdTypes::Reg => {
            let entry = file.reg.as_ref()?;
            (entry.name.clone(), entry.flags)
        }
        _ => return None,
    };
    // The leading slash of a path may be left out, as in CRIU.
    let bare = key
        .strip_prefix('/')
        .filter(|_| file.r#type() == FdTypes::Reg);
    let wanted = |given: &str| given == key || Some(given) == bare;
    let given = options
        .inherit_fds
        .iter()
        .find(|given| wanted(&given.resource))?;
    Some((given.fd, key, OFlags::from_bits_retain(flags)))
}

fn memfd_key(inode: u32, images: &TreeImages) -> Option<String> {
    let name = super::memfd::name_of(images, inode)?;
    Some(format!("/memfd:{name}"))
}
