//! Saving terminals.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::messages::{
    FdTypes, FileEntry, RegFileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry,
    TtyType,
};
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::proc::parse_stat;
use floe_kernel::tty::{self, Switch};
use floe_options::External;
use rustix::fs::{FileType, major, minor};

use super::terminal_id;
use super::{EXTERNAL_INDEX, Kind, MAX_PTY_INDEX, Tty, is_master, other_end, queue, settings};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::fd::{FdKind, file_entry};

/// What the kernel adds to the name of a slave whose master is gone.
const DELETED: &[u8] = b" (deleted)";

/// The terminals of a dump by their id in the images.
#[derive(Default)]
struct Terminals(BTreeMap<u32, Terminal>);

struct Terminal {
    info: TtyInfoEntry,
    file: OwnedFd,
    /// Who has it open, for messages.
    pid: HostPid,
    fd: TaskFd,
}

impl FdKind for Tty {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.file_type() == FileType::CharacterDevice
            && !fd.is_path()
            && Kind::of(fd.stat().st_rdev).is_some()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let external = is_external(fd, collector);
        let info = info_of(fd, external, collector)?;
        let tty_info_id = note(info, fd, collector)?;
        let regf_id = if external {
            None
        } else {
            Some(collect_name(fd, collector)?)
        };
        let entry = TtyFileEntry {
            id: id.0,
            tty_info_id,
            flags: fd.flags(),
            fown: fd.owner()?,
            regf_id,
        };
        Ok(FileEntry {
            tty: Some(entry),
            ..file_entry(FdTypes::Tty, id)
        })
    }
}

fn is_external(fd: &FdProbe<'_>, collector: &Collector<'_>) -> bool {
    collector.options.external.contains(&External::Tty {
        rdev: fd.stat().st_rdev,
        dev: fd.stat().st_dev,
    })
}

/// The name under which restore opens it.
fn collect_name(fd: &FdProbe<'_>, collector: &mut Collector<'_>) -> Result<u32, CollectError> {
    let id = collector.ids().fresh();
    let name = fd.target().strip_suffix(DELETED).unwrap_or(fd.target());
    let entry = RegFileEntry {
        id: id.0,
        flags: fd.flags(),
        fown: fd.owner()?,
        name: String::from_utf8(name.to_vec()).map_err(|_| fd.garbled("the name of a terminal"))?,
        mode: Some(fd.stat().st_mode),
        ..RegFileEntry::default()
    };
    collector.add_file(FileEntry {
        reg: Some(entry),
        ..file_entry(FdTypes::Reg, id)
    });
    Ok(id.0)
}

fn info_of(
    fd: &FdProbe<'_>,
    external: bool,
    collector: &mut Collector<'_>,
) -> Result<TtyInfoEntry, CollectError> {
    let failed = |source: io::Error| fd.failed("Asking a terminal", source);
    let kind = Kind::of(fd.stat().st_rdev).expect("it was recognised");
    let index = match kind {
        Kind::Master => tty::pty_index(fd.file()).map_err(failed)?,
        Kind::Slave { index } => index,
        _ => 0,
    };
    if index > MAX_PTY_INDEX {
        let what = format!("pty {index}");
        let remedy = format!("the images have room for numbers up to {MAX_PTY_INDEX}");
        return Err(CollectError::Unsupported(Obstacle::fd(
            fd.pid(),
            fd.fd(),
            what,
            remedy,
        )));
    }
    let is_pty = matches!(kind, Kind::Master | Kind::Slave { .. });
    let (sid, pgrp) = session_of(fd, kind)?;
    let mut info = TtyInfoEntry {
        id: terminal_id(kind, index),
        r#type: kind.image_type() as i32,
        locked: is_on(fd.file(), Switch::PtyLock).map_err(failed)?,
        exclusive: is_on(fd.file(), Switch::Exclusive).map_err(failed)?,
        packet_mode: is_on(fd.file(), Switch::PacketMode).map_err(failed)?,
        sid,
        pgrp,
        rdev: fd.stat().st_rdev as u32,
        pty: is_pty.then_some(TtyPtyEntry { index }),
        dev: Some(fd.stat().st_dev as u32),
        uid: Some(collector.owners().uid_inside(fd.stat().st_uid)),
        gid: Some(collector.owners().gid_inside(fd.stat().st_gid)),
        ..TtyInfoEntry::default()
    };
    if external {
        let known = collector.cache(Terminals::default).0.values();
        let before = known.filter(|other| other.info.r#type == TtyType::ExtTty as i32);
        info.id = (EXTERNAL_INDEX + 1 + before.count() as u32) << 1;
        info.r#type = TtyType::ExtTty as i32;
        info.pty = None;
    }
    settings::read(fd.file(), &mut info).map_err(failed)?;
    Ok(info)
}

/// What the other end cannot have, or a terminal that was hung up, is off.
fn is_on(tty: BorrowedFd<'_>, which: Switch) -> io::Result<bool> {
    match tty::switch(tty, which) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EIO)) => Ok(false),
        other => other,
    }
}

/// Session and foreground group. A master can be asked; of others only their session knows, so that the
/// task tells whether it is its terminal.
fn session_of(fd: &FdProbe<'_>, kind: Kind) -> Result<(u32, u32), CollectError> {
    if kind == Kind::Master {
        return Ok((
            fd.pids().owner(tty::session(fd.file()).unwrap_or(0)),
            fd.pids()
                .owner(tty::foreground_group(fd.file()).unwrap_or(0)),
        ));
    }
    let proc = fd.proc();
    let stat = parse_stat(&proc.read("stat")?).map_err(|error| proc.bad(error))?;
    let rdev = fd.stat().st_rdev;
    let controls = match kind {
        Kind::Current => stat.tty != 0,
        _ => device_number(stat.tty) == (major(rdev), minor(rdev)),
    };
    if controls {
        let group = u32::try_from(stat.tty_group).unwrap_or(0);
        Ok((fd.pids().number(stat.sid), fd.pids().owner(group)))
    } else {
        Ok((0, 0))
    }
}

/// Takes apart `tty_nr` of `/proc/<pid>/stat`.
fn device_number(number: u32) -> (u32, u32) {
    (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00)
}

/// Remembers a terminal; the checks and the images wait until all are known.
fn note(
    info: TtyInfoEntry,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<u32, CollectError> {
    let id = info.id;
    let file = fd.file().try_clone_to_owned();
    let file = file.map_err(|source| fd.failed("Duplicating", source))?;
    let terminals = &mut collector.cache(Terminals::default).0;
    if terminals.is_empty() {
        collector.defer(finish);
    }
    let terminals = &mut collector.cache(Terminals::default).0;
    let (sid, pgrp) = (info.sid, info.pgrp);
    let known = terminals.entry(id).or_insert(Terminal {
        info,
        file,
        pid: fd.pid(),
        fd: fd.fd(),
    });
    if known.info.sid == 0 {
        (known.info.sid, known.info.pgrp) = (sid, pgrp);
    }
    Ok(id)
}

fn finish(collector: &mut Collector<'_>) -> Result<(), CollectError> {
    let terminals = std::mem::take(&mut collector.cache(Terminals::default).0);
    for obstacle in obstacles(&terminals, collector) {
        collector.obstacle(obstacle);
    }
    for (id, terminal) in &terminals {
        collector.append_side(ImageKind::TtyInfo, &terminal.info)?;
        if terminal.info.pty.is_some() && is_master(*id) && terminals.contains_key(&other_end(*id))
        {
            save_queue(*id, terminal, collector)?;
        }
    }
    Ok(())
}

fn save_queue(
    id: u32,
    master: &Terminal,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let queued = queue::copy(master.file.as_fd()).map_err(|source| CollectError::Fd {
        pid: master.pid,
        fd: master.fd,
        action: "Copying the bytes that wait in a terminal",
        source,
    })?;
    for (tty_id, data) in [(id, queued.at_master), (other_end(id), queued.at_slave)] {
        if !data.is_empty() {
            collector.append_side(ImageKind::TtyData, &TtyDataEntry { tty_id, data })?;
        }
    }
    Ok(())
}

/// Terminals that restore could not bring back.
fn obstacles(terminals: &BTreeMap<u32, Terminal>, collector: &Collector<'_>) -> Vec<Obstacle> {
    let adopted = collector.options.shell_job || collector.options.orphan_pts_master;
    let mut found = Vec::new();
    let mut unpaired = 0;
    for (id, terminal) in terminals {
        let info = &terminal.info;
        let is_slave = info.pty.is_some() && !is_master(*id);
        let alone = is_slave && info.termios.is_some() && !terminals.contains_key(&other_end(*id));
        unpaired += usize::from(alone);
        if alone && !adopted {
            let what = format!(
                "terminal /dev/pts/{}, whose master is outside of the tree",
                id >> 1
            );
            let remedy = "use --shell-job if this is the terminal you work in, dump the program that \
                          holds the master too, or start it with setsid and its output in files";
            found.push(Obstacle::fd(terminal.pid, terminal.fd, what, remedy));
        } else if alone && unpaired > 1 {
            let what = format!("terminal /dev/pts/{}, a second one from outside", id >> 1);
            let remedy = "only one terminal can be taken over at restore; redirect the other";
            found.push(Obstacle::fd(terminal.pid, terminal.fd, what, remedy));
        }
        let leader = info.sid;
        let has_master = is_master(*id) || terminals.contains_key(&other_end(*id));
        let is_pair = info.pty.is_some() && has_master;
        if is_pair && info.sid != 0 && !collector.has_number(leader) {
            let what = format!(
                "terminal /dev/pts/{}, which controls session {leader} outside of the tree",
                id >> 1
            );
            let remedy = "dump the leader of that session too";
            found.push(Obstacle::fd(terminal.pid, terminal.fd, what, remedy));
        }
        if info.r#type == TtyType::Ctty as i32 && !adopted {
            let owned = terminals
                .values()
                .any(|other| other.info.pty.is_some() && other.info.sid == info.sid);
            if info.sid == 0 || !owned {
                let what = "/dev/tty, while nobody has the terminal itself open";
                let remedy = "use --shell-job if this is the terminal you work in, or close it";
                found.push(Obstacle::fd(terminal.pid, terminal.fd, what, remedy));
            }
        }
    }
    found
}
