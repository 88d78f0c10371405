//! Planning terminals.

use std::collections::BTreeMap;
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyType};
use floe_options::Need;
use floe_plan::Handle;

use super::queue::Queued;
use super::{Tty, execute, is_master, other_end};
use crate::fd::{FdRestore, payload};
use crate::restore::{PlanError, Planner, TreeImages, plan_owner};

/// One open file description of a terminal.
#[derive(Clone)]
pub(super) struct End<'i> {
    pub entry: &'i TtyFileEntry,
    pub info: Rc<TtyInfoEntry>,
    /// Where it is opened.
    pub path: String,
    /// Permissions of the device.
    pub mode: Option<u32>,
}

/// A pseudo-terminal: both ends with all their descriptions.
pub(super) struct Pair<'i> {
    pub index: u32,
    pub master: Option<End<'i>>,
    pub slaves: Vec<End<'i>>,
    pub queued: Queued,
}

impl<'i> Pair<'i> {
    /// Any of its descriptions.
    fn ends(&self) -> impl Iterator<Item = &End<'i>> {
        self.master.iter().chain(&self.slaves)
    }

    /// Whether it was hung up: its master is gone.
    pub fn is_hung_up(&self) -> bool {
        self.ends().all(|end| end.info.termios.is_none())
    }

    /// The session that it controls.
    fn session(&self) -> Option<(u32, u32)> {
        let mut sessions = self.ends().map(|end| (end.info.sid, end.info.pgrp));
        sessions.find(|(sid, _)| *sid != 0)
    }
}

impl FdRestore for Tty {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Tty
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.tty)?;
        let infos: Vec<TtyInfoEntry> = planner.images.dir.read_all(ImageKind::TtyInfo, 0)?;
        let infos: BTreeMap<u32, Rc<TtyInfoEntry>> = infos
            .into_iter()
            .map(|info| (info.id, Rc::new(info)))
            .collect();
        let end = end_of(entry, &infos, planner.images)?;
        plan_owner(planner, entry.id, &entry.fown);
        if let Some(fd) = execute::inherited_descriptor(planner.options, &end.info) {
            let name = format!("take over terminal {:#x}", end.info.id);
            plan_session(planner, &end.info, entry.id)?;
            planner.open(entry.id, name, &[], move |world| {
                execute::take_over(world, fd, &end)
            });
            return Ok(());
        }
        match end.info.r#type() {
            TtyType::Pty => plan_pair(&end, &infos, planner),
            TtyType::Ctty => plan_current(end, planner),
            TtyType::Console | TtyType::Vt | TtyType::Serial => {
                plan_session(planner, &end.info, entry.id)?;
                let name = format!("open {}", end.path);
                planner.open(entry.id, name, &[], move |world| {
                    execute::note_control(world, &end);
                    execute::open_device(&end)
                });
                Ok(())
            }
            TtyType::ExtTty | TtyType::Unknown => Err(PlanError::NeedsOption {
                object: format!(
                    "Terminal tty[{:x}:{:x}] of the caller",
                    end.info.rdev,
                    end.info.dev()
                ),
                need: Need::Descriptor(format!("tty[{:x}:{:x}]", end.info.rdev, end.info.dev())),
            }),
        }
    }
}

fn end_of<'i>(
    entry: &'i TtyFileEntry,
    infos: &BTreeMap<u32, Rc<TtyInfoEntry>>,
    images: &'i TreeImages,
) -> Result<End<'i>, PlanError> {
    let info = infos.get(&entry.tty_info_id).ok_or_else(|| {
        let what = format!("terminal {:#x} is missing", entry.tty_info_id);
        PlanError::damaged("tty-info.img", what)
    })?;
    if info.r#type() == TtyType::Pty && info.pty.is_none() {
        let what = format!("pty {:#x} has no number", info.id);
        return Err(PlanError::damaged("tty-info.img", what));
    }
    let name = entry.regf_id.and_then(|id| images.files.get(&id));
    let name = name.and_then(|file| file.reg.as_ref());
    let path = match name {
        Some(name) => name.name.clone(),
        None if is_master(info.id) => "/dev/ptmx".to_string(),
        None => format!("/dev/pts/{}", info.id >> 1),
    };
    Ok(End {
        entry,
        info: info.clone(),
        path,
        mode: name.and_then(|name| name.mode),
    })
}

/// The first description of a pair brings the others along.
fn plan_pair<'i>(
    end: &End<'i>,
    infos: &BTreeMap<u32, Rc<TtyInfoEntry>>,
    planner: &mut Planner<'i>,
) -> Result<(), PlanError> {
    let images = planner.images;
    let id = end.info.id;
    let all = images.files.values().filter_map(|file| file.tty.as_ref());
    let same = all.filter(|tty| [id, other_end(id)].contains(&tty.tty_info_id));
    let ends: Vec<End<'i>> = same
        .map(|entry| end_of(entry, infos, images))
        .collect::<Result<_, _>>()?;
    if ends[0].entry.id != end.entry.id {
        return Ok(());
    }
    let makes: Vec<Handle> = ends.iter().map(|end| Handle::File(end.entry.id)).collect();
    for end in &ends {
        planner.consume("files.img", u64::from(end.entry.id));
    }
    let pair = pair_of(ends, planner)?;
    let index = pair.index;
    if pair.master.is_none() && !pair.is_hung_up() {
        return plan_adopted(pair, &makes, planner);
    }
    if let Some((session, group)) = pair.session() {
        let file = pair.slaves.first().or(pair.master.as_ref());
        let file = file.expect("a pair has an end").entry.id;
        check_leader(planner.images, session, index)?;
        plan_foreground(planner, (session, group), file);
    }
    let name = format!("make pty {index} with {} descriptions", makes.len());
    planner.step(name, (&[], &makes), move |world| {
        execute::make_pair(world, &pair)
    });
    Ok(())
}

fn pair_of<'i>(ends: Vec<End<'i>>, planner: &Planner<'i>) -> Result<Pair<'i>, PlanError> {
    let index = ends[0].info.id >> 1;
    let data: Vec<TtyDataEntry> = planner.images.dir.read_all(ImageKind::TtyData, 0)?;
    let of = |id: u32| {
        let mut waiting = data.iter().filter(|entry| entry.tty_id == id);
        waiting
            .next()
            .map_or(Vec::new(), |entry| entry.data.clone())
    };
    let (masters, slaves): (Vec<_>, Vec<_>) =
        ends.into_iter().partition(|end| is_master(end.info.id));
    if masters.len() > 1 {
        let what = format!("pty {index} has two masters");
        return Err(PlanError::damaged("files.img", what));
    }
    Ok(Pair {
        index,
        master: masters.into_iter().next(),
        slaves,
        queued: Queued {
            at_master: of(index << 1 | 1),
            at_slave: of(index << 1),
        },
    })
}

/// A slave without its master is replaced by the terminal of the caller, or the caller gets the master of a
/// new one.
fn plan_adopted<'i>(
    pair: Pair<'i>,
    makes: &[Handle],
    planner: &mut Planner<'i>,
) -> Result<(), PlanError> {
    if planner.options.orphan_pts_master {
        if let Some((session, group)) = pair.session() {
            let file = pair.slaves[0].entry.id;
            if planner.images.task(session).is_some() {
                plan_foreground(planner, (session, group), file);
            }
        }
        let name = format!("make pty {} and hand its master out", pair.index);
        planner.step(name, (&[], makes), move |world| {
            execute::make_orphan(world, &pair)
        });
        return Ok(());
    }
    if !planner.options.shell_job {
        return Err(PlanError::NeedsOption {
            object: format!(
                "Terminal /dev/pts/{}, whose master was not dumped,",
                pair.index
            ),
            need: Need::ShellJob,
        });
    }
    let file = pair.slaves[0].entry.id;
    let root = &planner.images.root().entry;
    if root.sid != root.pid && root.pgid == root.pid {
        plan_foreground(planner, (root.pid, root.pgid), file);
    }
    let name = "take over our own terminal";
    planner.step(name, (&[], makes), move |world| {
        execute::adopt(world, &pair)
    });
    Ok(())
}

fn check_leader(images: &TreeImages, session: u32, index: u32) -> Result<(), PlanError> {
    if images.task(session).is_some() {
        return Ok(());
    }
    Err(PlanError::Unsupported {
        object: format!(
            "Terminal /dev/pts/{index}, which controls session {session} from outside of the tree,"
        ),
        remedy: "dump the leader of the session too",
    })
}

/// A terminal that is no pty may control a session too.
fn plan_session(
    planner: &mut Planner<'_>,
    info: &TtyInfoEntry,
    file: u32,
) -> Result<(), PlanError> {
    if info.sid != 0 && planner.images.task(info.sid).is_some() {
        plan_foreground(planner, (info.sid, info.pgrp), file);
    }
    Ok(())
}

/// Adds the step in which a task of the session sets the foreground group.
fn plan_foreground(planner: &mut Planner<'_>, (pid, group): (u32, u32), file: u32) {
    let mut tasks = planner.images.tasks.iter();
    if group == 0 || !tasks.any(|task| task.entry.pgid == group) {
        return;
    }
    let needs = [Handle::Object("groups", 0), Handle::File(file)];
    let makes = [Handle::Object("foreground", u64::from(file))];
    let name = format!("give the terminal to group {group}");
    planner.task_step(pid, name, (&needs, &makes), move |world| {
        execute::set_foreground(world, (pid, group), file)
    });
}

/// `/dev/tty` is opened by a task whose session has the terminal.
fn plan_current<'i>(end: End<'i>, planner: &mut Planner<'i>) -> Result<(), PlanError> {
    let id = end.entry.id;
    let Some(holder) = planner.images.holders(id).first() else {
        let what = format!("terminal {id:#x} is nobody's");
        return Err(PlanError::damaged("files.img", what));
    };
    let pid = holder.pid;
    let needs = [Handle::Born(pid), Handle::Session(pid), Handle::Tree];
    planner.open(id, "open /dev/tty", &needs, move |world| {
        execute::open_current(world, pid, &end)
    });
    Ok(())
}
