//! Bytes that wait in a pair of terminals. They can only be read, not looked at, so they are put back at
//! once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use floe_kernel::tty::{self, Switch, Termios, TermiosSet};
use rustix::event::{PollFd, PollFlags, Timespec};

/// More than the kernel keeps for one end.
const MOST: usize = 64 * 1024;
/// The kernel takes bytes over from the other end in the background.
const PATIENCE: Duration = Duration::from_millis(200);

/// What waits to be read at each end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Queued {
    pub at_master: Vec<u8>,
    pub at_slave: Vec<u8>,
}

/// Copies what waits in a pair.
pub(super) fn copy(master: BorrowedFd<'_>) -> io::Result<Queued> {
    // A description of our own: nothing of the program's is made non-blocking.
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let slave = match tty::open_slave(master, flags) {
        // Locked: nobody ever opened the slave.
        Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Queued::default()),
        other => other?,
    };
    if waiting(master)? == 0 && waiting(slave.as_fd())? == 0 {
        return Ok(Queued::default());
    }
    let packets = tty::switch(master, Switch::PacketMode)?;
    if packets {
        tty::set_switch(master, Switch::PacketMode, false)?;
    }
    // Emptying the slave makes the kernel take over what was typed, and echo it to the master.
    let at_slave = drain(slave.as_fd())?;
    let queued = Queued {
        at_master: drain(master)?,
        at_slave,
    };
    put(master, &slave, &queued)?;
    if packets {
        tty::set_switch(master, Switch::PacketMode, true)?;
    }
    Ok(queued)
}

/// Puts bytes into a pair so that they are read as they are here: nothing is echoed, translated or taken
/// for a signal. Settings are afterwards as before.
pub(super) fn put(master: BorrowedFd<'_>, slave: &OwnedFd, queued: &Queued) -> io::Result<()> {
    if *queued == Queued::default() {
        return Ok(());
    }
    let before = tty::termios(master, TermiosSet::Current)?;
    let plain = Termios {
        iflag: 0,
        oflag: 0,
        lflag: before.lflag & libc::ICANON,
        ..before
    };
    tty::set_termios(master, TermiosSet::Current, &plain)?;
    let result = write(slave.as_fd(), &queued.at_master)
        .and_then(|()| write(master, &queued.at_slave))
        .and_then(|()| settle(slave.as_fd(), queued.at_slave.len()));
    tty::set_termios(master, TermiosSet::Current, &before)?;
    result
}

/// How many bytes can be read; the kernel is made to take over what was written.
fn waiting(tty: BorrowedFd<'_>) -> io::Result<usize> {
    ready(tty, PollFlags::IN, Duration::ZERO)?;
    Ok(rustix::io::ioctl_fionread(tty)? as usize)
}

fn ready(tty: BorrowedFd<'_>, wanted: PollFlags, time: Duration) -> io::Result<bool> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: time.as_nanos() as i64,
    };
    let mut poll = [PollFd::from_borrowed_fd(tty, wanted)];
    rustix::event::poll(&mut poll, Some(&timeout))?;
    Ok(poll[0].revents().contains(wanted))
}

fn drain(tty: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // An end in line mode gives one line at a time.
    while bytes.len() < MOST && waiting(tty)? > 0 {
        let mut piece = [0; 4096];
        match rustix::io::read(tty, &mut piece)? {
            0 => break,
            read => bytes.extend_from_slice(&piece[..read]),
        }
    }
    Ok(bytes)
}

fn write(tty: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // A terminal that was stopped (^S) takes nothing.
        if !ready(tty, PollFlags::OUT, PATIENCE)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let done = rustix::io::write(tty, bytes)?;
        bytes = &bytes[done..];
    }
    Ok(())
}

/// Waits until the bytes have arrived, so that settings that come after do not change them.
fn settle(slave: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while waiting(slave)? < bytes && Instant::now() < deadline {
        std::thread::yield_now();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, openpt, unlockpt};

    fn pair() -> (OwnedFd, OwnedFd) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pty");
        unlockpt(&master).expect("a pty");
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK;
        let slave = tty::open_slave(master.as_fd(), flags).expect("its slave");
        (master, slave)
    }

    #[test]
    fn bytes_stay_in_the_pair_that_they_are_copied_from() {
        let (master, slave) = pair();
        rustix::io::write(&slave, b"out\n").expect("room");
        rustix::io::write(&master, b"one\ntwo\n").expect("room");
        let first = copy(master.as_fd()).expect("copied");
        assert_eq!(first.at_slave, b"one\ntwo\n");
        // The echo of what was typed, and translated line ends.
        let text = String::from_utf8_lossy(&first.at_master).into_owned();
        assert!(
            text.starts_with("out\r\n") && text.contains("two\r\n"),
            "{text:?}"
        );
        assert_eq!(copy(master.as_fd()).expect("copied"), first);
    }

    #[test]
    fn bytes_are_put_into_another_pair_as_they_are() {
        let (master, slave) = pair();
        let queued = Queued {
            at_master: b"a\r\nb".to_vec(),
            at_slave: b"line\n".to_vec(),
        };
        put(master.as_fd(), &slave, &queued).expect("put");
        assert_eq!(copy(master.as_fd()).expect("copied"), queued);
    }
}
