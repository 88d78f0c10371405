//! Rings of packet sockets (`packet(7)`, `PACKET_RX_RING`).
//!
//! Saved:    the socket that is mapped, as the file of the mapping.
//! Rebuilt:  the socket is mapped again. Needs: the socket with its rings.
//! Not kept: packets in the ring.

use floe_image::messages::{FdTypes, FdinfoEntry, VmaEntry};
use floe_kernel::proc::ProcDir;

use super::{AddressSpace, status};
use crate::collect::{CollectError, Obstacle};

/// The inode of a mapped socket, by the name of its mapping.
pub(super) fn inode(name: &[u8]) -> Option<u64> {
    let digits = name.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Puts the socket's file in the place of its inode, once the task's table of descriptors is collected.
/// `table` is `None` where the task shares that of an earlier one.
pub fn find_socket_files(
    space: &mut AddressSpace,
    proc: &ProcDir,
    table: Option<&[FdinfoEntry]>,
) -> Result<(), CollectError> {
    let entries = space.vmas.iter_mut().map(|vma| &mut vma.entry);
    for vma in entries.filter(|vma| vma.status & status::SOCKET != 0) {
        let file = match table {
            Some(table) => find(vma, proc, table)?,
            None => None,
        };
        let Some(file) = file else {
            return Err(CollectError::Unsupported(Obstacle {
                pid: proc.pid(),
                object: format!("mapping {:#x}-{:#x} of a socket", vma.start, vma.end),
                remedy: "keep the socket open as long as it is mapped".to_string(),
            }));
        };
        vma.shmid = u64::from(file);
    }
    Ok(())
}

fn find(
    vma: &VmaEntry,
    proc: &ProcDir,
    table: &[FdinfoEntry],
) -> Result<Option<u32>, CollectError> {
    for fd in table.iter().filter(|fd| fd.r#type() == FdTypes::Packetsk) {
        if inode(&proc.read_link(&format!("fd/{}", fd.fd))?) == Some(vma.shmid) {
            return Ok(Some(fd.id));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::inode;

    #[test]
    fn a_socket_is_known_by_its_inode() {
        assert_eq!(inode(b"socket:[4711]"), Some(4711));
        assert_eq!(inode(b"/dev/zero"), None);
        assert_eq!(inode(b"socket:[x]"), None);
    }
}
