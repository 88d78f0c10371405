//! Ptys, and the terminal that controls a session.

use std::os::fd::OwnedFd;

use anyhow::{Context, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{self, LocalModes, OptionalActions, Winsize};

use super::tasks::{Child, stat};
use super::{Check, Place, Program};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("pty", pty),
    Program::new("pty-controlling", controlling),
];

const SIZE: Winsize = Winsize {
    ws_row: 33,
    ws_col: 99,
    ws_xpixel: 0,
    ws_ypixel: 0,
};

fn open() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
    let mut modes = termios::tcgetattr(&slave)?;
    modes.local_modes &= !LocalModes::ECHO;
    termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
    termios::tcsetwinsize(&slave, SIZE)?;
    Ok((master, slave))
}

fn talk(master: &OwnedFd, slave: &OwnedFd) -> anyhow::Result<()> {
    let size = termios::tcgetwinsize(slave)?;
    ensure!(
        (size.ws_row, size.ws_col) == (SIZE.ws_row, SIZE.ws_col),
        "{} rows, {} columns",
        size.ws_row,
        size.ws_col
    );
    let modes = termios::tcgetattr(slave)?;
    ensure!(
        !modes.local_modes.contains(LocalModes::ECHO),
        "the terminal echoes"
    );
    ensure!(
        modes.local_modes.contains(LocalModes::ICANON),
        "the terminal is raw"
    );
    let mut bytes = [0; 64];
    rustix::io::write(master, b"a line\n")?;
    let length = rustix::io::read(slave, &mut bytes)?;
    ensure!(
        &bytes[..length] == b"a line\n",
        "the slave read {length} bytes"
    );
    rustix::io::write(slave, b"an answer")?;
    let length = rustix::io::read(master, &mut bytes)?;
    ensure!(
        &bytes[..length] == b"an answer",
        "the master read {length} bytes"
    );
    Ok(())
}

fn pty(_: &Place) -> anyhow::Result<Check> {
    let (master, slave) = open()?;
    let (other, gone) = open()?;
    drop(gone);
    Ok(Box::new(move || {
        talk(&master, &slave)?;
        ptsname(&other, Vec::new()).context("the master without a slave")?;
        Ok(())
    }))
}

/// A child with a session of its own on the pty, whose foreground group is a grandchild's.
fn controlling(place: &Place) -> anyhow::Result<Check> {
    let (master, slave) = open()?;
    let theirs = slave.try_clone()?;
    let mut child = Child::start(place, move |place| {
        rustix::process::setsid()?;
        task::take_terminal(std::os::fd::AsFd::as_fd(&theirs))?;
        let mut front = Child::start(place, |_| {
            rustix::process::setpgid(None, None)?;
            Ok(Box::new(|| Ok(())))
        })?;
        let group = rustix::process::Pid::from_raw(front.pid).context("a pid")?;
        crate::sys::signal::ignore(libc::SIGTTOU);
        termios::tcsetpgrp(&theirs, group)?;
        let own = std::process::id() as i32;
        // Session, terminal and foreground group: proc_pid_stat(5).
        let before = stat(own, &[6, 7, 8])?;
        Ok(Box::new(move || {
            front.check()?;
            let now = stat(own, &[6, 7, 8])?;
            ensure!(
                now == before,
                "session, terminal, foreground {now:?} were {before:?}"
            );
            let found = termios::tcgetpgrp(&theirs)?;
            ensure!(found == group, "the foreground group is {found:?}");
            rustix::fs::open("/dev/tty", OFlags::RDWR, Mode::empty())
                .context("opening /dev/tty")?;
            Ok(())
        }))
    })?;
    Ok(Box::new(move || {
        child.check()?;
        talk(&master, &slave)
    }))
}
