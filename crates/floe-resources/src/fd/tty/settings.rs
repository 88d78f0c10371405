//! Settings and size of a terminal, between kernel and images.

use std::io;
use std::os::fd::BorrowedFd;

use floe_image::messages::{TermiosEntry, TtyInfoEntry, WinsizeEntry};
use floe_kernel::tty::{self, Termios, TermiosSet};
use rustix::termios::Winsize;

use crate::restore::{Attempt, ExecuteError};

/// Reads settings and size into an entry. A terminal that was hung up has none.
pub(super) fn read(tty: BorrowedFd<'_>, info: &mut TtyInfoEntry) -> io::Result<()> {
    let current = match tty::termios(tty, TermiosSet::Current) {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
        other => other?,
    };
    info.termios = Some(to_image(&current));
    info.termios_locked = Some(to_image(&tty::termios(tty, TermiosSet::Locked)?));
    let size = rustix::termios::tcgetwinsize(tty)?;
    info.winsize = Some(WinsizeEntry {
        ws_row: size.ws_row.into(),
        ws_col: size.ws_col.into(),
        ws_xpixel: size.ws_xpixel.into(),
        ws_ypixel: size.ws_ypixel.into(),
    });
    Ok(())
}

/// Applies settings and size.
pub(super) fn apply(tty: BorrowedFd<'_>, info: &TtyInfoEntry) -> Result<(), ExecuteError> {
    let what = || format!("terminal {:#x}", info.id);
    if let Some(locked) = &info.termios_locked {
        let locked = to_kernel(locked);
        // Needs a privilege in the initial user namespace, which mostly nobody used.
        if locked != Termios::default() {
            tty::set_termios(tty, TermiosSet::Locked, &locked)
                .during("Locking settings of", what)?;
        }
    }
    if let Some(current) = &info.termios {
        tty::set_termios(tty, TermiosSet::Current, &to_kernel(current))
            .during("Setting up", what)?;
    }
    if let Some(size) = &info.winsize {
        let size = Winsize {
            ws_row: size.ws_row as u16,
            ws_col: size.ws_col as u16,
            ws_xpixel: size.ws_xpixel as u16,
            ws_ypixel: size.ws_ypixel as u16,
        };
        rustix::termios::tcsetwinsize(tty, size).during("Setting the size of", what)?;
    }
    Ok(())
}

fn to_image(termios: &Termios) -> TermiosEntry {
    TermiosEntry {
        c_iflag: termios.iflag,
        c_oflag: termios.oflag,
        c_cflag: termios.cflag,
        c_lflag: termios.lflag,
        c_line: termios.line.into(),
        // The speed is in `c_cflag`.
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: termios.cc.iter().map(|c| u32::from(*c)).collect(),
    }
}

/// Missing characters are zero, that is, off.
fn to_kernel(entry: &TermiosEntry) -> Termios {
    let mut termios = Termios {
        iflag: entry.c_iflag,
        oflag: entry.c_oflag,
        cflag: entry.c_cflag,
        lflag: entry.c_lflag,
        line: entry.c_line as u8,
        ..Termios::default()
    };
    for (slot, value) in termios.cc.iter_mut().zip(&entry.c_cc) {
        *slot = *value as u8;
    }
    termios
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_the_image() {
        let mut termios = Termios {
            iflag: 1,
            oflag: 2,
            cflag: 0o17,
            lflag: 4,
            line: 5,
            cc: [7; 19],
        };
        termios.cc[18] = 255;
        assert_eq!(to_kernel(&to_image(&termios)), termios);
    }
}
