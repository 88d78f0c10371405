//! Terminals and pseudo-terminals: what `ioctl_tty(2)` offers beyond rustix.
//!
//! Contract relied on: each request reads or writes exactly the structure that it names, and answers
//! `ENOTTY` where the terminal has no such thing and `EIO` where it is hung up.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct termios` of the kernel (`asm-generic/termbits.h`), not that of libc.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Termios {
    /// How input is processed.
    pub iflag: u32,
    /// How output is processed.
    pub oflag: u32,
    /// Speed and format of a line.
    pub cflag: u32,
    /// Echo, line editing, signals.
    pub lflag: u32,
    /// The line discipline.
    pub line: u8,
    /// Special characters.
    pub cc: [u8; 19],
}

/// Which settings of a terminal: its own, or those that only a privileged task may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TermiosSet {
    /// `TCGETS`, `TCSETS`.
    Current,
    /// `TIOCGLCKTRMIOS`, `TIOCSLCKTRMIOS`: bits set here cannot be changed.
    Locked,
}

/// A switch of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// A slave cannot be opened yet (`TIOCGPTLCK`); masters only.
    PtyLock,
    /// Nobody else can open it (`TIOCGEXCL`).
    Exclusive,
    /// Reads of a master begin with a byte that tells events (`TIOCGPKT`); masters only.
    PacketMode,
}

/// Requests that the libc crate lacks or types differently (`asm-generic/ioctls.h`).
mod raw {
    pub const TIOCGPTN: u64 = 0x8004_5430;
    pub const TIOCSPTLCK: u64 = 0x4004_5431;
    pub const TIOCGPKT: u64 = 0x8004_5438;
    pub const TIOCGPTLCK: u64 = 0x8004_5439;
    pub const TIOCGEXCL: u64 = 0x8004_5440;
    pub const TIOCPKT: u64 = 0x5420;
    pub const TIOCEXCL: u64 = 0x540c;
    pub const TIOCNXCL: u64 = 0x540d;
    pub const TIOCGPGRP: u64 = 0x540f;
    pub const TIOCGSID: u64 = 0x5429;
    pub const TIOCGLCKTRMIOS: u64 = 0x5456;
    pub const TIOCSLCKTRMIOS: u64 = 0x5457;
    pub const TCGETS: u64 = 0x5401;
    pub const TCSETS: u64 = 0x5402;
}

/// `TIOCSCTTY`, for a program that a session leader runs itself.
pub const TIOCSCTTY: u32 = 0x540e;
/// `TIOCSPGRP`, for a program that a task of the session runs itself.
pub const TIOCSPGRP: u32 = 0x5410;
/// `TIOCGPTPEER`, for a program that opens the slave of a master.
pub const TIOCGPTPEER: u32 = 0x5441;

fn request(tty: BorrowedFd<'_>, request: u64, argument: usize) -> io::Result<i32> {
    // SAFETY: callers pass a flag, or the address of a live structure of the request's own type.
    let result = unsafe { libc::ioctl(tty.as_raw_fd(), request as libc::Ioctl, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn number(tty: BorrowedFd<'_>, what: u64) -> io::Result<i32> {
    let mut value = 0i32;
    request(tty, what, &raw mut value as usize)?;
    Ok(value)
}

/// Reads the settings.
pub fn termios(tty: BorrowedFd<'_>, set: TermiosSet) -> io::Result<Termios> {
    let mut value = Termios::default();
    let what = match set {
        TermiosSet::Current => raw::TCGETS,
        TermiosSet::Locked => raw::TIOCGLCKTRMIOS,
    };
    request(tty, what, &raw mut value as usize)?;
    Ok(value)
}

/// Changes the settings at once; nothing queued is lost. `EPERM` for locked ones without privilege.
pub fn set_termios(tty: BorrowedFd<'_>, set: TermiosSet, value: &Termios) -> io::Result<()> {
    let what = match set {
        TermiosSet::Current => raw::TCSETS,
        TermiosSet::Locked => raw::TIOCSLCKTRMIOS,
    };
    request(tty, what, std::ptr::from_ref(value) as usize).map(drop)
}

/// Whether a switch is on.
pub fn switch(tty: BorrowedFd<'_>, which: Switch) -> io::Result<bool> {
    let what = match which {
        Switch::PtyLock => raw::TIOCGPTLCK,
        Switch::Exclusive => raw::TIOCGEXCL,
        Switch::PacketMode => raw::TIOCGPKT,
    };
    number(tty, what).map(|value| value != 0)
}

/// Turns a switch on or off.
pub fn set_switch(tty: BorrowedFd<'_>, which: Switch, on: bool) -> io::Result<()> {
    let value = i32::from(on);
    let pointer = &raw const value as usize;
    match (which, on) {
        (Switch::PtyLock, _) => request(tty, raw::TIOCSPTLCK, pointer),
        (Switch::PacketMode, _) => request(tty, raw::TIOCPKT, pointer),
        (Switch::Exclusive, true) => request(tty, raw::TIOCEXCL, 0),
        (Switch::Exclusive, false) => request(tty, raw::TIOCNXCL, 0),
    }
    .map(drop)
}

/// The number of a pty, asked of its master.
pub fn pty_index(master: BorrowedFd<'_>) -> io::Result<u32> {
    number(master, raw::TIOCGPTN).map(i32::cast_unsigned)
}

/// Opens the slave of a pty with these `open(2)` flags; `EIO` while it is locked.
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let fd = request(master, u64::from(TIOCGPTPEER), flags as usize)?;
    // SAFETY: the descriptor is new and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The session that a terminal controls. Only a master can be asked from outside of that session.
pub fn session(tty: BorrowedFd<'_>) -> io::Result<u32> {
    number(tty, raw::TIOCGSID).map(i32::cast_unsigned)
}

/// The foreground group of a terminal. Only a master can be asked from outside of its session.
pub fn foreground_group(tty: BorrowedFd<'_>) -> io::Result<u32> {
    number(tty, raw::TIOCGPGRP).map(i32::cast_unsigned)
}
