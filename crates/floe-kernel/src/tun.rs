//! Files of `/dev/net/tun` and the network namespace of sockets.
//!
//! Contract relied on: `linux/if_tun.h`. A file makes a device, or attaches to one that is there, by
//! `TUNSETIFF`; a device that is not persistent goes with its last file. Each request reads or writes exactly
//! the structure that it names.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `IFF_TUN`: the device carries IP packets.
pub const IFF_TUN: u32 = 1;
/// `IFF_TAP`: the device carries Ethernet frames.
pub const IFF_TAP: u32 = 2;
/// `IFF_MULTI_QUEUE`.
pub const IFF_MULTI_QUEUE: u32 = 0x100;
/// `IFF_DETACH_QUEUE`: the file is one queue of several, and off.
pub const IFF_DETACH_QUEUE: u32 = 0x400;
/// `IFF_PERSIST`.
pub const IFF_PERSIST: u32 = 0x800;
/// `IFF_NO_PI`.
pub const IFF_NO_PI: u32 = 0x1000;
/// `IFF_NOFILTER`: nothing filters what a queue gets.
pub const IFF_NOFILTER: u32 = 0x1000;
/// `IFF_VNET_HDR`.
pub const IFF_VNET_HDR: u32 = 0x4000;

/// Requests that the libc crate lacks.
mod raw {
    pub const SIOCGSKNS: u64 = 0x894c;
    pub const TUNSETIFF: u64 = 0x4004_54ca;
    pub const TUNSETPERSIST: u64 = 0x4004_54cb;
    pub const TUNSETOWNER: u64 = 0x4004_54cc;
    pub const TUNSETGROUP: u64 = 0x4004_54ce;
    pub const TUNGETIFF: u64 = 0x8004_54d2;
    pub const TUNGETSNDBUF: u64 = 0x8004_54d3;
    pub const TUNSETSNDBUF: u64 = 0x4004_54d4;
    pub const TUNGETVNETHDRSZ: u64 = 0x8004_54d7;
    pub const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
    pub const TUNSETQUEUE: u64 = 0x4004_54d9;
    pub const TUNSETIFINDEX: u64 = 0x4004_54da;
    pub const TUNGETFILTER: u64 = 0x8010_54db;
}

/// A number of a tun device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunNumber {
    /// Bytes that may wait to be read.
    SendBuffer,
    /// Size of the header before each packet.
    Header,
}

/// What only is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunSetting {
    /// A user by id, who may attach to it.
    Owner,
    /// A group by id.
    Group,
    /// 1: the device stays when its last file is closed.
    Persist,
}

/// Size of `struct ifreq`.
const REQUEST: usize = 40;
/// Where its name ends and the flags begin.
const NAME: usize = 16;

/// Name and `IFF_*` of the device that a file is attached to; `None` for none.
pub fn tun_device(file: BorrowedFd<'_>) -> io::Result<Option<(String, u32)>> {
    let mut request = [0u8; REQUEST];
    // SAFETY: the kernel writes one `struct ifreq`, whose size `request` has.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), raw::TUNGETIFF as _, request.as_mut_ptr()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EBADFD) => Ok(None),
            _ => Err(error),
        };
    }
    let end = request[..NAME].iter().position(|byte| *byte == 0);
    let name = String::from_utf8_lossy(&request[..end.unwrap_or(NAME)]).into_owned();
    let flags = u16::from_ne_bytes([request[NAME], request[NAME + 1]]);
    Ok(Some((name, u32::from(flags))))
}

fn device_request(
    file: BorrowedFd<'_>,
    request: u64,
    (name, flags): (&str, u32),
) -> io::Result<()> {
    let mut body = [0u8; REQUEST];
    if name.len() >= NAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    body[..name.len()].copy_from_slice(name.as_bytes());
    body[NAME..NAME + 2].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: the kernel reads and writes one `struct ifreq`, whose size `body` has.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, body.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a device, or attaches the file to one that is there.
pub fn attach_tun(file: BorrowedFd<'_>, name: &str, flags: u32) -> io::Result<()> {
    device_request(file, raw::TUNSETIFF, (name, flags))
}

/// Switches the file's queue of its device off.
pub fn detach_tun_queue(file: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    device_request(file, raw::TUNSETQUEUE, (name, IFF_DETACH_QUEUE))
}

/// Chooses the number of the device that the file will make.
pub fn choose_tun_index(file: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    // SAFETY: the kernel reads one number.
    if unsafe { libc::ioctl(file.as_raw_fd(), raw::TUNSETIFINDEX as _, &raw const index) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Reads a number of the device that the file is attached to.
pub fn tun_number(file: BorrowedFd<'_>, what: TunNumber) -> io::Result<u32> {
    let request = match what {
        TunNumber::SendBuffer => raw::TUNGETSNDBUF,
        TunNumber::Header => raw::TUNGETVNETHDRSZ,
    };
    let mut value = 0u32;
    // SAFETY: the kernel writes one number.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Sets a number of the device that the file is attached to.
pub fn set_tun_number(file: BorrowedFd<'_>, what: TunNumber, value: u32) -> io::Result<()> {
    let request = match what {
        TunNumber::SendBuffer => raw::TUNSETSNDBUF,
        TunNumber::Header => raw::TUNSETVNETHDRSZ,
    };
    // SAFETY: the kernel reads one number.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw const value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets what the device that the file is attached to is about.
pub fn set_tun(file: BorrowedFd<'_>, what: TunSetting, value: u32) -> io::Result<()> {
    let request = match what {
        TunSetting::Owner => raw::TUNSETOWNER,
        TunSetting::Group => raw::TUNSETGROUP,
        TunSetting::Persist => raw::TUNSETPERSIST,
    };
    // SAFETY: these requests take their number by value.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, libc::c_ulong::from(value)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a program filters what a tap device's queue gets; the program itself cannot be read.
pub fn has_tap_filter(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: all zero is a valid empty filter.
    let mut filter: libc::sock_fprog = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `struct sock_fprog`.
    if unsafe { libc::ioctl(file.as_raw_fd(), raw::TUNGETFILTER as _, &raw mut filter) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(filter.len != 0)
}

/// The network namespace of a socket or tun file, opened. `EPERM` without `CAP_NET_ADMIN` there.
pub fn network_of(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a good result is a new descriptor.
    let fd = unsafe { libc::ioctl(file.as_raw_fd(), raw::SIOCGSKNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_socket_tells_its_namespace() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("free");
        let found = match network_of(socket.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return eprintln!("skipped: no CAP_NET_ADMIN");
            }
            other => rustix::fs::fstat(other.expect("a socket")).expect("open"),
        };
        let own = rustix::fs::stat("/proc/thread-self/ns/net").expect("there");
        assert_eq!((found.st_dev, found.st_ino), (own.st_dev, own.st_ino));
    }
}
