//! Netlink: requests, dumps, attributes.
//!
//! Contract relied on: netlink(7). A dump ends with NLMSG_DONE; a refused request is answered by
//! NLMSG_ERROR with a negative errno; messages and attributes are aligned to four bytes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
/// Make the object if there is none.
pub const NLM_F_CREATE: u16 = 0x400;
/// Add it behind those that there are.
pub const NLM_F_APPEND: u16 = 0x800;
/// Refuse with `EEXIST` if there is one.
pub const NLM_F_EXCL: u16 = 0x200;
const NLM_F_DUMP: u16 = 0x300;
/// The attribute holds attributes.
const NLA_F_NESTED: u16 = 1 << 15;
const HEADER: usize = 16;
/// The kernel fills no bigger buffer with one answer of a dump.
const RECEIVE: usize = 64 * 1024;

/// A netlink socket that talks to the kernel.
#[derive(Debug)]
pub struct NetlinkSocket(OwnedFd);

impl NetlinkSocket {
    /// Opens a socket of this protocol, such as `NETLINK_SOCK_DIAG`.
    pub fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: no pointers; a good result is a new descriptor.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(NetlinkSocket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Asks for a dump and hands the body of each message of it to `each`.
    pub fn dump(
        &self,
        kind: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.send(&message(kind, NLM_F_REQUEST | NLM_F_DUMP, body))?;
        let mut buffer = vec![0; RECEIVE];
        loop {
            let got = self.receive(&mut buffer)?;
            for part in messages(&buffer[..got]) {
                let part = part?;
                match part.kind {
                    NLMSG_DONE | NLMSG_ERROR => return error_code(part.body),
                    _ => each(part.body)?,
                }
            }
        }
    }

    /// Asks for a dump; its messages one behind the other as the kernel wrote them, headers included.
    pub fn dump_raw(&self, kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
        self.send(&message(kind, NLM_F_REQUEST | NLM_F_DUMP, body))?;
        let mut buffer = vec![0; RECEIVE];
        let mut all = Vec::new();
        loop {
            let got = self.receive(&mut buffer)?;
            for part in messages(&buffer[..got]) {
                let part = part?;
                match part.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        error_code(part.body)?;
                        return Ok(all);
                    }
                    _ => {
                        all.extend_from_slice(part.whole);
                        all.resize(all.len().next_multiple_of(4), 0);
                    }
                }
            }
        }
    }

    /// Sends one request and waits until it is done.
    pub fn request(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.transact(&message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body), 1)
    }

    /// Sends one request that is answered by one message; the body of that.
    pub fn ask(&self, kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
        self.send(&message(kind, NLM_F_REQUEST, body))?;
        let mut buffer = vec![0; RECEIVE];
        let got = self.receive(&mut buffer)?;
        let first = messages(&buffer[..got]).next();
        let first = first.ok_or(io::ErrorKind::InvalidData)??;
        if first.kind == NLMSG_ERROR {
            error_code(first.body)?;
        }
        Ok(first.body.to_vec())
    }

    /// Sends requests made by [`message`] with `NLM_F_ACK` and waits for `acks` good answers; the first bad
    /// one is the error.
    pub fn transact(&self, requests: &[u8], acks: usize) -> io::Result<()> {
        self.send(requests)?;
        let mut buffer = vec![0; RECEIVE];
        let mut seen = 0;
        while seen < acks {
            let got = self.receive(&mut buffer)?;
            for part in messages(&buffer[..got]) {
                let part = part?;
                if part.kind == NLMSG_ERROR {
                    error_code(part.body)?;
                    seen += 1;
                }
            }
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.0, bytes, rustix::net::SendFlags::empty())?;
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most the length of `buffer`, which is live.
        let got = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        if got < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(got.cast_unsigned())
        }
    }
}

impl From<NetlinkSocket> for OwnedFd {
    fn from(socket: NetlinkSocket) -> Self {
        socket.0
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The bytes of one message.
pub fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len() + 3);
    bytes.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(body);
    pad(&mut bytes);
    bytes
}

/// Appends an attribute.
pub fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    pad(bytes);
}

/// Appends an attribute that holds those that `fill` appends.
pub fn nested(bytes: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    attribute(bytes, kind | NLA_F_NESTED, &inner);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Kind and value of each attribute; what is too short to be one ends the walk.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let size = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..size)?;
        bytes = bytes.get(size.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NLA_F_NESTED, value))
    })
}

/// The errno at the start of the body of NLMSG_ERROR and NLMSG_DONE.
fn error_code(body: &[u8]) -> io::Result<()> {
    match body.get(..4).and_then(|code| code.try_into().ok()) {
        Some(code) => match i32::from_ne_bytes(code) {
            code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
            _ => Ok(()),
        },
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// One message among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub kind: u16,
    /// What follows the header.
    pub body: &'a [u8],
    /// Header and body.
    pub whole: &'a [u8],
}

/// Walks the messages of one datagram; `InvalidData` ends the walk.
pub fn messages(mut rest: &[u8]) -> impl Iterator<Item = io::Result<Message<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = (|| {
            let size = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
            let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
            let (body, whole) = (rest.get(HEADER..size)?, rest.get(..size)?);
            Some((size, Message { kind, body, whole }))
        })();
        match parsed {
            Some((size, message)) => {
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
                Some(Ok(message))
            }
            None => {
                rest = &[];
                Some(Err(io::ErrorKind::InvalidData.into()))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut bytes = Vec::new();
        attribute(&mut bytes, 3, b"abcde");
        nested(&mut bytes, 4, |inner| attribute(inner, 1, b"x"));
        assert_eq!(bytes.len(), 12 + 12);
        let read: Vec<(u16, &[u8])> = attributes(&bytes).collect();
        assert_eq!(read[0], (3, &b"abcde"[..]));
        assert_eq!(attributes(read[1].1).next(), Some((1, &b"x"[..])));
        assert_eq!(attributes(&bytes[..7]).count(), 0);
    }
}
