//! Options that sockets of all families have (`socket(7)`).
//!
//! Saved:    buffer sizes and locks, time-outs, flags, priority, mark, device, linger, classic filter.
//! Rebuilt:  set on the finished socket, because sending unread data again takes more room. Needs: the socket.
//! Not kept: `SO_PEEK_OFF`, `SO_BUSY_POLL`, `SO_TIMESTAMP*`, eBPF filters (refused).

use std::io;
use std::os::fd::BorrowedFd;

use floe_image::messages::SkOptsEntry;
use floe_kernel::sockopt::{
    FilterInstruction, SO_BUF_LOCK, SocketOption, option_bytes, option_number, set_option_bytes,
    set_option_number, set_socket_filter, socket_filter,
};

use crate::restore::{Attempt, ExecuteError};

/// An option of `SOL_SOCKET`.
pub(super) const fn general(name: i32) -> SocketOption {
    SocketOption(libc::SOL_SOCKET, name)
}

/// The longest name of a network device, with its zero byte.
const DEVICE_NAME: usize = 16;

/// The family of a socket; `None` for what is no socket.
pub(super) fn family_of(file: BorrowedFd<'_>) -> Option<i32> {
    option_number(file, general(libc::SO_DOMAIN)).ok()
}

/// Reads all options of a socket of this family.
pub(super) fn collect_options(socket: BorrowedFd<'_>, family: i32) -> io::Result<SkOptsEntry> {
    let number = |name| option_number(socket, general(name));
    let flag = |name| Ok::<_, io::Error>(Some(number(name)? != 0));
    let (so_snd_tmo_sec, so_snd_tmo_usec) = time_out(socket, libc::SO_SNDTIMEO)?;
    let (so_rcv_tmo_sec, so_rcv_tmo_usec) = time_out(socket, libc::SO_RCVTIMEO)?;
    let mark = number(libc::SO_MARK)?.cast_unsigned();
    // The kernel knows these two for sockets that carry credentials only (Linux 6.16).
    let credentials = family == libc::AF_UNIX || family == libc::AF_NETLINK;
    Ok(SkOptsEntry {
        so_sndbuf: number(libc::SO_SNDBUF)?.cast_unsigned(),
        so_rcvbuf: number(libc::SO_RCVBUF)?.cast_unsigned(),
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: flag(libc::SO_REUSEADDR)?,
        so_reuseport: flag(libc::SO_REUSEPORT)?,
        so_priority: Some(number(libc::SO_PRIORITY)?.cast_unsigned()),
        so_rcvlowat: Some(number(libc::SO_RCVLOWAT)?.cast_unsigned()),
        so_mark: (mark != 0).then_some(mark),
        so_passcred: if credentials {
            flag(libc::SO_PASSCRED)?
        } else {
            None
        },
        so_passsec: if credentials {
            flag(libc::SO_PASSSEC)?
        } else {
            None
        },
        so_dontroute: flag(libc::SO_DONTROUTE)?,
        so_no_check: flag(libc::SO_NO_CHECK)?,
        so_broadcast: flag(libc::SO_BROADCAST)?,
        so_keepalive: flag(libc::SO_KEEPALIVE)?,
        so_oobinline: Some(number(libc::SO_OOBINLINE)?.cast_unsigned()),
        so_linger: linger(socket)?,
        so_buf_lock: number(SO_BUF_LOCK).ok().map(i32::cast_unsigned),
        so_bound_dev: bound_device(socket)?,
        so_filter: socket_filter(socket)?
            .iter()
            .map(encode_instruction)
            .collect(),
        ..SkOptsEntry::default()
    })
}

fn time_out(socket: BorrowedFd<'_>, name: i32) -> io::Result<(u64, u64)> {
    let bytes = option_bytes(socket, general(name), 16)?;
    let word = |at: usize| {
        let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
        word.map(u64::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)
    };
    Ok((word(0)?, word(8)?))
}

/// Seconds to linger, where that is switched on.
fn linger(socket: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let bytes = option_bytes(socket, general(libc::SO_LINGER), 8)?;
    match *bytes {
        [0, 0, 0, 0, ..] => Ok(None),
        [_, _, _, _, a, b, c, d] => Ok(Some(u32::from_ne_bytes([a, b, c, d]))),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The device that a socket is bound to.
pub(super) fn bound_device(socket: BorrowedFd<'_>) -> io::Result<Option<String>> {
    let name = option_bytes(socket, general(libc::SO_BINDTODEVICE), DEVICE_NAME)?;
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    Ok((end > 0).then(|| String::from_utf8_lossy(&name[..end]).into_owned()))
}

/// The image's order of fields does not depend on the machine.
fn encode_instruction(instruction: &FilterInstruction) -> u64 {
    u64::from(instruction.code) << 48
        | u64::from(instruction.jump_true) << 40
        | u64::from(instruction.jump_false) << 32
        | u64::from(instruction.value)
}

fn decode_instruction(word: u64) -> FilterInstruction {
    FilterInstruction {
        code: (word >> 48) as u16,
        jump_true: (word >> 40) as u8,
        jump_false: (word >> 32) as u8,
        value: word as u32,
    }
}

/// Sets every option but those about sharing a port, which depend on other sockets.
pub(super) fn set_options(
    socket: BorrowedFd<'_>,
    options: &SkOptsEntry,
) -> Result<(), ExecuteError> {
    let set = |name: i32, value: u32| {
        set_option_number(socket, general(name), value.cast_signed())
            .during("Setting socket option", || format!("{name} to {value}"))
    };
    set_buffers(socket, options)?;
    let numbers = [
        (libc::SO_PRIORITY, options.so_priority),
        (libc::SO_RCVLOWAT, options.so_rcvlowat),
        (libc::SO_MARK, options.so_mark.filter(|mark| *mark != 0)),
    ];
    for (name, value) in numbers {
        value.map_or(Ok(()), |value| set(name, value))?;
    }
    let flags = [
        (libc::SO_PASSCRED, options.so_passcred == Some(true)),
        (libc::SO_PASSSEC, options.so_passsec == Some(true)),
        (libc::SO_DONTROUTE, options.so_dontroute == Some(true)),
        (libc::SO_NO_CHECK, options.so_no_check == Some(true)),
        (libc::SO_BROADCAST, options.so_broadcast == Some(true)),
        (libc::SO_KEEPALIVE, options.so_keepalive == Some(true)),
        (
            libc::SO_OOBINLINE,
            options.so_oobinline.is_some_and(|on| on != 0),
        ),
    ];
    for (name, _) in flags.into_iter().filter(|(_, on)| *on) {
        set(name, 1)?;
    }
    let bytes = |name: i32, value: &[u8]| {
        set_option_bytes(socket, general(name), value)
            .during("Setting socket option", || name.to_string())
    };
    if let Some(seconds) = options.so_linger {
        bytes(
            libc::SO_LINGER,
            &pair_bytes(1u32.to_ne_bytes(), seconds.to_ne_bytes()),
        )?;
    }
    for (name, seconds, micros) in [
        (
            libc::SO_SNDTIMEO,
            options.so_snd_tmo_sec,
            options.so_snd_tmo_usec,
        ),
        (
            libc::SO_RCVTIMEO,
            options.so_rcv_tmo_sec,
            options.so_rcv_tmo_usec,
        ),
    ] {
        bytes(
            name,
            &pair_bytes(seconds.to_ne_bytes(), micros.to_ne_bytes()),
        )?;
    }
    if let Some(device) = &options.so_bound_dev {
        bytes(libc::SO_BINDTODEVICE, device.as_bytes())?;
    }
    let filter: Vec<_> = options
        .so_filter
        .iter()
        .copied()
        .map(decode_instruction)
        .collect();
    if !filter.is_empty() {
        set_socket_filter(socket, &filter).during("Attaching a socket filter of", || {
            format!("{} instructions", filter.len())
        })?;
    }
    Ok(())
}

fn pair_bytes<const N: usize>(first: [u8; N], second: [u8; N]) -> Vec<u8> {
    [first, second].concat()
}

/// Sets buffer sizes, past the limits of the machine where that is allowed, and what of them is locked.
pub(super) fn set_buffers(
    socket: BorrowedFd<'_>,
    options: &SkOptsEntry,
) -> Result<(), ExecuteError> {
    force_buffers(socket, [options.so_sndbuf / 2, options.so_rcvbuf / 2])
        .during("Setting the buffers of", || "a socket".into())?;
    if let Some(lock) = options.so_buf_lock {
        set_option_number(socket, general(SO_BUF_LOCK), lock.cast_signed())
            .during("Locking the buffers of", || "a socket".into())?;
    }
    Ok(())
}

/// Makes room for whatever a queue held, whoever sends it. The kernel doubles the values.
pub(super) fn open_buffers(socket: BorrowedFd<'_>) -> Result<(), ExecuteError> {
    let most = i32::MAX.cast_unsigned() / 2;
    force_buffers(socket, [most, most]).during("Widening the buffers of", || "a socket".into())
}

/// Makes room for what is sent; the room for what is received is told to the peer and stays as it is.
pub(super) fn open_send_buffer(socket: BorrowedFd<'_>) -> Result<(), ExecuteError> {
    let most = i32::MAX / 2;
    set_option_number(socket, general(libc::SO_SNDBUFFORCE), most)
        .during("Widening the send buffer of", || "a socket".into())
}

fn force_buffers(socket: BorrowedFd<'_>, [send, receive]: [u32; 2]) -> io::Result<()> {
    for (forced, plain, size) in [
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, send),
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, receive),
    ] {
        match set_option_number(socket, general(forced), size.cast_signed()) {
            // Without CAP_NET_ADMIN the machine's limit holds.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                set_option_number(socket, general(plain), size.cast_signed())?;
            }
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn options_survive_a_round_through_the_entry() {
        let first = std::net::UdpSocket::bind("127.0.0.1:0").expect("free");
        let set = |name, value| {
            set_option_number(first.as_fd(), general(name), value).expect("known");
        };
        set(libc::SO_SNDBUF, 10_000);
        set(libc::SO_BROADCAST, 1);
        set(libc::SO_PRIORITY, 3);
        first
            .set_read_timeout(Some(std::time::Duration::from_millis(1500)))
            .expect("valid");
        let entry = collect_options(first.as_fd(), libc::AF_INET).expect("readable");
        assert_eq!((entry.so_sndbuf, entry.so_buf_lock), (20_000, Some(1)));
        assert_eq!((entry.so_rcv_tmo_sec, entry.so_passcred), (1, None));
        let second = std::net::UdpSocket::bind("127.0.0.1:0").expect("free");
        set_options(second.as_fd(), &entry).expect("settable");
        assert_eq!(
            collect_options(second.as_fd(), libc::AF_INET).expect("readable"),
            entry
        );
    }

    #[test]
    fn instructions_keep_every_field() {
        let word = 0x0006_0102_dead_beef;
        assert_eq!(encode_instruction(&decode_instruction(word)), word);
    }
}
