//! Rebuilding terminals.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use floe_image::messages::TtyInfoEntry;
use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskFd;
use floe_kernel::namespace::own_proc_path;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::tty::{self, Switch};
use floe_options::{Action, HookEvent, RestoreOptions};
use rustix::fs::{Mode, OFlags};

use super::early::{EarlyMasters, numbered_master};
use super::plan::{End, Pair};
use super::{queue, settings};
use crate::namespace::OwnerMap;
use crate::restore::{Attempt, ExecuteError, World, set_flags};

/// Which terminal a session leader takes: the file, and whether it is a slave or a master.
#[derive(Default)]
struct Controlling(BTreeMap<u32, Controls>);

#[derive(Clone, Copy)]
enum Controls {
    /// This very terminal.
    Itself(u32),
    /// The slave of this master.
    SlaveOf(u32),
}

/// Makes a pair and opens all its descriptions.
pub(super) fn make_pair(world: &mut World<'_>, pair: &Pair<'_>) -> Result<(), ExecuteError> {
    let (path, flags) = match &pair.master {
        Some(end) => (end.path.as_str(), open_flags(end)),
        None => ("/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC),
    };
    let master = open_master(world, path, flags, pair.index)?;
    let what = || format!("pty {}", pair.index);
    tty::set_switch(master.as_fd(), Switch::PtyLock, false).during("Unlocking", what)?;
    for end in &pair.slaves {
        let slave = open_slave(end, master.as_fd(), &world.images.owners)?;
        world.keep_file(end.entry.id, slave)?;
    }
    let Some(end) = &pair.master else {
        return Ok(()); // Closing the master hangs the slaves up, as they were.
    };
    fill(master.as_fd(), pair).during("Putting back the bytes that waited in", what)?;
    let slaves = pair.slaves.iter().map(|slave| &slave.info);
    let mut infos = slaves.chain([&end.info]);
    if let Some(info) = infos.find(|info| info.termios.is_some()) {
        settings::apply(master.as_fd(), info)?;
    }
    switch_modes(world, pair, master.as_fd()).during("Switching modes of", what)?;
    note_session(world, pair);
    world.keep_file(end.entry.id, master)
}

/// Makes a pair whose master the caller holds from now on (`orphan-pts-master`). A caller who lets us use
/// its own terminal, and has one, gives that.
pub(super) fn make_orphan(world: &mut World<'_>, pair: &Pair<'_>) -> Result<(), ExecuteError> {
    if world.options.shell_job && rustix::termios::isatty(io::stdin()) {
        return adopt(world, pair);
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open_master(world, "/dev/ptmx", flags, pair.index)?;
    let what = || format!("pty {}", pair.index);
    tty::set_switch(master.as_fd(), Switch::PtyLock, false).during("Unlocking", what)?;
    for end in &pair.slaves {
        let slave = open_slave(end, master.as_fd(), &world.images.owners)?;
        settings::apply(slave.as_fd(), &end.info)?;
        note_control(world, end);
        world.keep_file(end.entry.id, slave)?;
    }
    let event = HookEvent {
        action: Action::OrphanPtsMaster,
        root_pid: None,
        master: Some(master.as_fd()),
    };
    Ok(world.options.hooks.run(event)?)
}

/// Only a slave that was opened through its master, as `openpty` does, lacks `O_LARGEFILE`.
fn open_slave(
    end: &End<'_>,
    master: BorrowedFd<'_>,
    owners: &OwnerMap,
) -> Result<OwnedFd, ExecuteError> {
    let what = || end.path.clone();
    let flags = open_flags(end);
    let slave = if flags.contains(OFlags::LARGEFILE) {
        rustix::fs::open(&end.path, flags, Mode::empty()).map_err(io::Error::from)
    } else {
        tty::open_slave(master, flags.bits() as i32)
    };
    let slave = slave.during("Opening", what)?;
    if let (Some(uid), Some(gid)) = (end.info.uid, end.info.gid) {
        let uid = owners.uid(uid);
        let gid = owners.gid(gid);
        rustix::fs::fchown(&slave, uid, gid).during("Setting the owner of", what)?;
    }
    if let Some(mode) = end.mode {
        rustix::fs::fchmod(&slave, Mode::from_raw_mode(mode))
            .during("Setting the mode of", what)?;
    }
    Ok(slave)
}

/// Exclusive use and the lock come last: they keep us out too.
fn switch_modes(world: &World<'_>, pair: &Pair<'_>, master: BorrowedFd<'_>) -> io::Result<()> {
    let Some(end) = &pair.master else {
        return Ok(());
    };
    let modes = [
        (Switch::PacketMode, end.info.packet_mode),
        (Switch::Exclusive, end.info.exclusive),
        (Switch::PtyLock, end.info.locked),
    ];
    for (mode, _) in modes.into_iter().filter(|(_, on)| *on) {
        tty::set_switch(master, mode, true)?;
    }
    let exclusive = pair.slaves.iter().find(|slave| slave.info.exclusive);
    match exclusive.and_then(|slave| world.file(slave.entry.id).ok()) {
        Some(slave) => tty::set_switch(slave, Switch::Exclusive, true),
        None => Ok(()),
    }
}

fn open_master(
    world: &mut World<'_>,
    path: &str,
    flags: OFlags,
    index: u32,
) -> Result<OwnedFd, ExecuteError> {
    if let Some(master) = EarlyMasters::take(world, index) {
        set_flags(master.as_fd(), flags.bits())?;
        return Ok(master);
    }
    let open = || rustix::fs::open(path, flags, Mode::empty());
    numbered_master(index, || open().map_err(io::Error::from))
}

fn fill(master: BorrowedFd<'_>, pair: &Pair<'_>) -> io::Result<()> {
    if pair.queued == queue::Queued::default() {
        return Ok(());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let slave = tty::open_slave(master, flags)?;
    queue::put(master, &slave, &pair.queued)
}

fn open_flags(end: &End<'_>) -> OFlags {
    OFlags::from_bits_retain(end.entry.flags) | OFlags::NOCTTY | OFlags::CLOEXEC
}

fn note_session(world: &mut World<'_>, pair: &Pair<'_>) {
    let master = pair.master.iter();
    let session = master
        .chain(&pair.slaves)
        .map(|end| end.info.sid)
        .find(|sid| *sid != 0);
    let file = match (pair.slaves.first(), &pair.master) {
        (Some(slave), _) => Controls::Itself(slave.entry.id),
        (None, Some(master)) => Controls::SlaveOf(master.entry.id),
        (None, None) => return,
    };
    if let Some(session) = session {
        world.state::<Controlling>().0.insert(session, file);
    }
}

/// Lets a task that has just become a session leader take its terminal, where it had one. Its children
/// inherit it, so this comes before they are forked.
pub fn take_controlling_terminal(world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
    let Some(controls) = world.state::<Controlling>().0.get(&pid).copied() else {
        return Ok(());
    };
    let mut program = Program::new();
    let request = Arg::from(tty::TIOCSCTTY);
    match controls {
        Controls::Itself(id) => {
            let fd = Arg::from(world.number_in_task(pid, id)?);
            let args = [fd, request, Arg::from(0)];
            program.call("ioctl(TIOCSCTTY)", libc::SYS_ioctl, &args);
        }
        Controls::SlaveOf(id) => {
            let master = Arg::from(world.number_in_task(pid, id)?);
            let flags = Arg::from(libc::O_RDWR | libc::O_NOCTTY);
            let args = [master, Arg::from(tty::TIOCGPTPEER), flags];
            let slave = program.call("ioctl(TIOCGPTPEER)", libc::SYS_ioctl, &args);
            let args = [Arg::from(slave), request, Arg::from(0)];
            program.call("ioctl(TIOCSCTTY)", libc::SYS_ioctl, &args);
            program.call("close", libc::SYS_close, &[Arg::from(slave)]);
        }
    }
    world.run(pid, &program).map(drop)
}

/// Sets the foreground group of a terminal, as a task of its session.
pub(super) fn set_foreground(
    world: &mut World<'_>,
    (pid, group): (u32, u32),
    file: u32,
) -> Result<(), ExecuteError> {
    let number = world.file(file)?.as_raw_fd();
    let fd = Arg::from(world.hand_over(pid, number)?);
    let mut program = Program::new();
    let group = world.images.nested.seen_by(pid, group);
    let group = program.buffer(&group.to_le_bytes());
    let args = [fd, Arg::from(tty::TIOCSPGRP), Arg::from(group)];
    program.call("ioctl(TIOCSPGRP)", libc::SYS_ioctl, &args);
    program.call("close", libc::SYS_close, &[fd]);
    world.run(pid, &program).map(drop)
}

/// Opens a terminal that is no pty.
pub(super) fn open_device(end: &End<'_>) -> Result<OwnedFd, ExecuteError> {
    let device = rustix::fs::open(&end.path, open_flags(end), Mode::empty())
        .during("Opening", || end.path.clone())?;
    settings::apply(device.as_fd(), &end.info)?;
    Ok(device)
}

/// Opens `/dev/tty` as a task of the session.
pub(super) fn open_current(
    world: &mut World<'_>,
    pid: u32,
    end: &End<'_>,
) -> Result<OwnedFd, ExecuteError> {
    let mut program = Program::new();
    let mut path = end.path.clone().into_bytes();
    path.push(0);
    let path = program.buffer(&path);
    let flags = Arg::from(open_flags(end).bits());
    let args = [Arg::from(libc::AT_FDCWD), Arg::from(path), flags];
    let opened = program.call("openat of /dev/tty", libc::SYS_openat, &args);
    let outcome = world.run(pid, &program)?.expect("the program has a call");
    let number = outcome.result(opened) as RawFd;
    let host = world.puppet(pid)?.pid();
    let file = Pidfd::open(host)
        .and_then(|task| task.duplicate_fd(TaskFd(number)))
        .during("Taking /dev/tty from", || format!("task {pid}"))?;
    let mut program = Program::new();
    program.call("close", libc::SYS_close, &[Arg::from(number)]);
    world.run(pid, &program)?;
    Ok(file)
}

/// The caller's descriptor that stands for a terminal (`--inherit-fd fd[N]:tty[RDEV:DEV]`).
pub(super) fn inherited_descriptor(options: &RestoreOptions, info: &TtyInfoEntry) -> Option<RawFd> {
    let wanted = format!("tty[{:x}:{:x}]", info.rdev, info.dev());
    let mut given = options.inherit_fds.iter();
    given
        .find(|inherit| inherit.resource == wanted)
        .map(|inherit| inherit.fd)
}

/// Uses a terminal of the caller's in place of a saved one.
pub(super) fn take_over(
    world: &mut World<'_>,
    fd: RawFd,
    end: &End<'_>,
) -> Result<OwnedFd, ExecuteError> {
    let file = reopen(fd, end)?;
    settings::apply(file.as_fd(), &end.info)?;
    note_control(world, end);
    Ok(file)
}

/// Notes the session that a terminal controls by itself, for its leader to take it.
pub(super) fn note_control(world: &mut World<'_>, end: &End<'_>) {
    if end.info.sid != 0 {
        let file = Controls::Itself(end.entry.id);
        world.state::<Controlling>().0.insert(end.info.sid, file);
    }
}

/// Another description, so that flags of the caller's are left alone.
fn reopen(fd: RawFd, end: &End<'_>) -> Result<OwnedFd, ExecuteError> {
    let path = own_proc_path(&format!("self/fd/{fd}"));
    rustix::fs::open(&path, open_flags(end), Mode::empty()).during("Opening again", || path.clone())
}

/// Puts our own terminal in the place of all slaves of a pair.
pub(super) fn adopt(world: &mut World<'_>, pair: &Pair<'_>) -> Result<(), ExecuteError> {
    let stdin = io::stdin();
    if !rustix::termios::isatty(&stdin) {
        let none = io::Error::new(
            io::ErrorKind::NotFound,
            "our standard input is no terminal; run the restore in one, with --shell-job",
        );
        return Err(none).during("Taking over", || format!("terminal {}", pair.index));
    }
    for end in &pair.slaves {
        let file = reopen(stdin.as_raw_fd(), end)?;
        settings::apply(file.as_fd(), &end.info)?;
        set_flags(file.as_fd(), end.entry.flags)?;
        world.keep_file(end.entry.id, file)?;
    }
    Ok(())
}
