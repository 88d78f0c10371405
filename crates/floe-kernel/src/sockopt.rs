//! Socket options, as numbers and as bytes.
//!
//! Contract relied on: `getsockopt` writes at most the length that it is given and reports how much it
//! wrote; `setsockopt` only reads. `SO_GET_FILTER` and `SO_ATTACH_FILTER` count instructions, not bytes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A level and the number of an option there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOption(pub i32, pub i32);

/// Options of `SOL_SOCKET` that libc lacks.
pub const SO_BUF_LOCK: i32 = 72;

/// One instruction of a classic socket filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FilterInstruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub value: u32,
}

/// Reads an option of at most `limit` bytes; the result is as long as the kernel made it.
pub fn option_bytes(
    socket: BorrowedFd<'_>,
    SocketOption(level, name): SocketOption,
    limit: usize,
) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; limit];
    let mut size = limit as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes into `value`, which is as long.
    let result = unsafe {
        let pointer = value.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), level, name, pointer, &raw mut size)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    value.truncate(size as usize);
    Ok(value)
}

/// Reads an option that is a number; some are a single byte.
pub fn option_number(socket: BorrowedFd<'_>, option: SocketOption) -> io::Result<i32> {
    match *option_bytes(socket, option, 4)? {
        [a, b, c, d] => Ok(i32::from_ne_bytes([a, b, c, d])),
        [byte] => Ok(i32::from(byte)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Sets an option to bytes.
pub fn set_option_bytes(
    socket: BorrowedFd<'_>,
    SocketOption(level, name): SocketOption,
    value: &[u8],
) -> io::Result<()> {
    // SAFETY: the kernel reads the length of `value`, which is live.
    let result = unsafe {
        let size = value.len() as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), size)
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets an option to a number.
pub fn set_option_number(
    socket: BorrowedFd<'_>,
    option: SocketOption,
    value: i32,
) -> io::Result<()> {
    set_option_bytes(socket, option, &value.to_ne_bytes())
}

const GET_FILTER: i32 = libc::SO_GET_FILTER;

/// The classic filter of a socket; empty for none. `EACCES` for one that is not classic.
pub fn socket_filter(socket: BorrowedFd<'_>) -> io::Result<Vec<FilterInstruction>> {
    let mut count: libc::socklen_t = 0;
    // SAFETY: with a count of zero the kernel only writes the count.
    let result = unsafe {
        let none = std::ptr::null_mut();
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            GET_FILTER,
            none,
            &raw mut count,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let empty = FilterInstruction {
        code: 0,
        jump_true: 0,
        jump_false: 0,
        value: 0,
    };
    let mut filter = vec![empty; count as usize];
    if filter.is_empty() {
        return Ok(filter);
    }
    // SAFETY: the kernel writes at most `count` instructions, for which there is room; any bits are an
    // instruction.
    let result = unsafe {
        let pointer = filter.as_mut_ptr().cast();
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            GET_FILTER,
            pointer,
            &raw mut count,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    filter.truncate(count as usize);
    Ok(filter)
}

/// Gives a socket a classic filter.
pub fn set_socket_filter(socket: BorrowedFd<'_>, filter: &[FilterInstruction]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads the structure and `len` instructions behind it, all live; it writes neither.
    let result = unsafe {
        let size = size_of_val(&program) as libc::socklen_t;
        let pointer = (&raw const program).cast();
        let socket = socket.as_raw_fd();
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            pointer,
            size,
        )
    };
    if result < 0 {
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
    fn numbers_and_filters_are_read_back() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("free");
        let broadcast = SocketOption(libc::SOL_SOCKET, libc::SO_BROADCAST);
        set_option_number(socket.as_fd(), broadcast, 1).expect("known");
        assert_eq!(option_number(socket.as_fd(), broadcast).expect("known"), 1);
        assert!(socket_filter(socket.as_fd()).expect("none").is_empty());
        let accept = FilterInstruction {
            code: 6,
            jump_true: 0,
            jump_false: 0,
            value: 0xffff,
        };
        set_socket_filter(socket.as_fd(), &[accept]).expect("valid");
        assert_eq!(socket_filter(socket.as_fd()).expect("classic"), [accept]);
    }
}
