//! Writers that no tracker sees.
//!
//! The kernel notices writes where they go through page tables. Pages that a device or the kernel holds
//! (`pin_user_pages`) are written past them: buffers registered with io_uring, RDMA or VFIO (counted as
//! `VmPin`), asynchronous direct I/O on its way (the ring of an AIO context, an io_uring). Synchronous
//! direct I/O has ended when its thread is stopped. What cannot be seen: pages pinned by another process
//! for itself (`process_vm_readv` does not, `vmsplice` of shared pages does).

use floe_kernel::proc::Mapping;

use crate::error::DumpError;
use crate::freeze::FrozenTask;

/// What the task has that may write its memory unseen, in words.
pub fn unseen_writer(
    task: &FrozenTask,
    mappings: &[Mapping],
) -> Result<Option<&'static str>, DumpError> {
    if mappings
        .iter()
        .any(|mapping| mapping.name.starts_with(b"/[aio]"))
    {
        return Ok(Some("a context of asynchronous I/O"));
    }
    if pinned(&task.proc.read("status")?) {
        return Ok(Some("pinned memory"));
    }
    for fd in task.proc.list("fd")? {
        let link = task.proc.read_link(&format!("fd/{fd}")).unwrap_or_default();
        match link.as_slice() {
            b"anon_inode:[io_uring]" => return Ok(Some("an io_uring")),
            // It would find its ranges taken.
            b"anon_inode:[userfaultfd]" => return Ok(Some("a userfaultfd of its own")),
            _ => {}
        }
    }
    Ok(None)
}

fn pinned(status: &[u8]) -> bool {
    status
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"VmPin:"))
        .is_some_and(|rest| rest.iter().any(|byte| (b'1'..=b'9').contains(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_memory_is_seen() {
        assert!(!pinned(b"VmLck:\t       8 kB\nVmPin:\t       0 kB\n"));
        assert!(pinned(b"VmPin:\t      10 kB\n"));
        assert!(!pinned(b""));
    }
}
