//! Who is at the other end of a unix socket.
//!
//! Kernel contract: `SO_PEERCRED` tells who connected, or who made the pair (unix(7)), in the ids of our
//! namespaces; the pid is 0 where that process is not visible in our pid namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::ids::HostPid;

/// The process at the other end, when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its pid, if it is in our pid namespace or below it.
    pub pid: Option<HostPid>,
    /// Its effective user.
    pub uid: u32,
}

/// Asks for the peer of a connected unix socket.
pub fn credentials(socket: impl AsFd) -> io::Result<Peer> {
    let mut found = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `found` is a live, writable `ucred` and `length` its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer {
        pid: (found.pid > 0).then_some(HostPid(found.pid)),
        uid: found.uid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maker_of_a_pair_is_its_peer() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a pair can be made");
        let peer = credentials(&one).expect("a unix socket has a peer");
        let own = std::process::id().cast_signed();
        assert_eq!(peer.pid, Some(HostPid(own)));
    }
}
