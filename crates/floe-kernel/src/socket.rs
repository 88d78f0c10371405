//! Socket calls with addresses as bytes, and messages that carry descriptors.
//!
//! Contract relied on: an address is read and written as `sa_family_t` and family-specific bytes, at most
//! `sizeof(sockaddr_storage)`; descriptors received in SCM_RIGHTS are new and ours.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::sockopt::{SocketOption, option_bytes};

/// Room for any socket address.
const ADDRESS: usize = size_of::<libc::sockaddr_storage>();
/// Room for the most descriptors that one message carries (`SCM_MAX_FD`), and credentials.
const CONTROL: usize = 4096;
const SIOCUNIXFILE: libc::c_ulong = 0x89e0;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes a socket, close-on-exec and blocking.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes two connected unix sockets, close-on-exec and blocking.
pub fn unix_pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    check(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            kind | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    })?;
    // SAFETY: new descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Binds to an address.
pub fn bind(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the length of `address`, which is live.
    check(unsafe {
        let size = address.len() as libc::socklen_t;
        libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), size)
    })
    .map(drop)
}

/// Connects to an address.
pub fn connect(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the length of `address`, which is live.
    check(unsafe {
        let size = address.len() as libc::socklen_t;
        libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), size)
    })
    .map(drop)
}

/// The address that a socket is bound to.
pub fn local_address(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut address = vec![0u8; ADDRESS];
    let mut size = ADDRESS as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes into `address`, which is as long.
    check(unsafe {
        let pointer = address.as_mut_ptr().cast();
        libc::getsockname(socket.as_raw_fd(), pointer, &raw mut size)
    })?;
    address.truncate(size as usize);
    Ok(address)
}

/// The address, as long as those of its family are, that a socket is or was connected to; `ENOTCONN` for none.
pub fn peer_address(socket: BorrowedFd<'_>, length: usize) -> io::Result<Vec<u8>> {
    // Unlike getpeername(2) it works for connections that are closed, and is particular about the length.
    let peer = SocketOption(libc::SOL_SOCKET, libc::SO_PEERNAME);
    option_bytes(socket, peer, length)
}

/// Lets a socket accept connections.
pub fn listen(socket: BorrowedFd<'_>, backlog: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog.cast_signed()) }).map(drop)
}

/// Closes directions: `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`.
pub fn shutdown(socket: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), how) }).map(drop)
}

/// The file (`O_PATH`) that a unix socket was bound to; `ENOENT` for one that has no file.
pub fn bound_file(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let fd = check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE, 0) })?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn int_ioctl(socket: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<u32> {
    let mut value = 0i32;
    // SAFETY: all callers pass requests that write one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut value) })?;
    Ok(value.cast_unsigned())
}

/// Unread bytes of a stream.
pub fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    int_ioctl(socket, libc::FIONREAD)
}

/// Bytes of a TCP stream that are not acknowledged, sent or not.
pub fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    int_ioctl(socket, libc::TIOCOUTQ)
}

/// Bytes of a TCP stream that are not sent yet.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    int_ioctl(socket, SIOCOUTQNSD)
}

/// A message as [`peek`] saw it.
#[derive(Debug)]
pub struct Peeked {
    /// Bytes in the buffer.
    pub length: usize,
    /// The message was longer than the buffer.
    pub truncated: bool,
    /// Our copies of the descriptors that it carries.
    pub rights: Vec<OwnedFd>,
    /// It carries credentials, or something else that is no descriptor.
    pub other_control: bool,
}

/// Reads the next message or stretch of a stream without taking it; `WouldBlock` when there is none.
/// With `SO_PEEK_OFF` set, further calls see what follows.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Peeked> {
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeroes is a valid msghdr, whose pointers are set below.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: header, vector, buffer and control are live and as long as they say.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut peeked = Peeked {
        length: got.cast_unsigned(),
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        rights: Vec::new(),
        other_control: header.msg_flags & libc::MSG_CTRUNC != 0,
    };
    // SAFETY: the kernel has filled `control` with whole messages up to `msg_controllen`; CMSG_FIRSTHDR and
    // CMSG_NXTHDR stay inside of it, and `control` is aligned for cmsghdr. SCM_RIGHTS holds new descriptors.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(head) = message.as_ref() {
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = head.cmsg_len - libc::CMSG_LEN(0) as usize;
                let first: *const RawFd = libc::CMSG_DATA(message).cast();
                for index in 0..bytes / size_of::<RawFd>() {
                    let fd = first.add(index).read_unaligned();
                    peeked.rights.push(OwnedFd::from_raw_fd(fd));
                }
            } else {
                peeked.other_control = true;
            }
            message = libc::CMSG_NXTHDR(&raw const header, message);
        }
    }
    Ok(peeked)
}

/// Sends a message with descriptors, without blocking and without SIGPIPE; returns the bytes taken.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], rights: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid msghdr, whose pointers are set below.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let size = size_of_val(rights) as u32;
    // SAFETY: arithmetic only.
    let space = unsafe { libc::CMSG_SPACE(size) } as usize;
    if space > CONTROL {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if !rights.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = space;
        // SAFETY: `control` has room for the one message, as checked, and is aligned for it.
        unsafe {
            let message = libc::CMSG_FIRSTHDR(&raw const header);
            (*message).cmsg_level = libc::SOL_SOCKET;
            (*message).cmsg_type = libc::SCM_RIGHTS;
            (*message).cmsg_len = libc::CMSG_LEN(size) as usize;
            let first: *mut RawFd = libc::CMSG_DATA(message).cast();
            for (index, fd) in rights.iter().enumerate() {
                first.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: header, vector, bytes and control are live and as long as they say; sendmsg reads only.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(sent.cast_unsigned())
    }
}

/// Sends one packet to an address through a raw socket.
pub fn send_to(socket: BorrowedFd<'_>, bytes: &[u8], address: &[u8]) -> io::Result<()> {
    // SAFETY: bytes and address are live and as long as said; sendto reads only.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_NOSIGNAL,
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_with_descriptors_is_peeked_and_stays() {
        let (a, b) = unix_pair(libc::SOCK_DGRAM).expect("pair");
        send(a.as_fd(), b"hello", &[a.as_fd(), b.as_fd()]).expect("room");
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let peeked = peek(b.as_fd(), &mut buffer).expect("there");
            assert_eq!((peeked.length, peeked.rights.len()), (5, 2));
            assert!(!peeked.truncated && !peeked.other_control);
        }
        assert!(peek(b.as_fd(), &mut buffer[..2]).expect("there").truncated);
        let error = peek(a.as_fd(), &mut buffer).expect_err("empty");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_empty_message_is_peeked_once_and_stepped_over() {
        let (a, b) = unix_pair(libc::SOCK_DGRAM).expect("pair");
        send(a.as_fd(), b"", &[]).expect("room");
        send(a.as_fd(), b"more", &[]).expect("room");
        let offset = SocketOption(libc::SOL_SOCKET, libc::SO_PEEK_OFF);
        crate::sockopt::set_option_number(b.as_fd(), offset, 0).expect("known");
        let mut buffer = [0; 16];
        assert_eq!(peek(b.as_fd(), &mut buffer).expect("there").length, 0);
        assert_eq!(peek(b.as_fd(), &mut buffer).expect("there").length, 4);
        let error = peek(b.as_fd(), &mut buffer).expect_err("no more");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
