//! The images of one tree, decoded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use floe_image::messages::{
    CoreEntry, FdTypes, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, MmEntry, MntEntry,
    PstreeEntry, RemapFilePathEntry, TaskKobjIdsEntry,
};
use floe_image::{ImageDir, ImageKind};

use super::PlanError;
use crate::namespace::OwnerMap;
use crate::namespace::nested::Nested;
use crate::namespace::users::Users;

/// `vma_entry.status`: a shared mapping of a file.
const FILE_SHARED: u32 = 128;

/// `task_core_entry.task_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Runs, or sleeps.
    Alive,
    /// A zombie.
    Dead,
    /// Stopped by a signal.
    Stopped,
}

/// Everything that the images say of one task.
#[derive(Debug)]
pub struct TaskImages {
    /// Pid, parent, group, session, threads.
    pub entry: PstreeEntry,
    /// The leader's registers and the process-wide state.
    pub core: CoreEntry,
    /// The other threads by tid; the leader is not among them.
    pub threads: BTreeMap<u32, CoreEntry>,
    /// Which tasks share what.
    pub ids: Option<TaskKobjIdsEntry>,
    /// The address space; zombies have none.
    pub mm: Option<MmEntry>,
    /// Directories and umask; zombies have none.
    pub fs: Option<FsEntry>,
    /// Descriptors.
    pub fds: Vec<FdinfoEntry>,
}

impl TaskImages {
    /// The pid in the images.
    pub fn pid(&self) -> u32 {
        self.entry.pid
    }

    /// Whether it runs, is stopped, or is a zombie.
    pub fn state(&self) -> Result<TaskState, PlanError> {
        match self.core.tc.as_ref().map(|task| task.task_state) {
            Some(1) => Ok(TaskState::Alive),
            Some(3) => Ok(TaskState::Stopped),
            // 6 is what CRIU calls a zombie inside; its images have 2.
            Some(2 | 6) => Ok(TaskState::Dead),
            state => Err(PlanError::damaged(
                format!("core-{}.img", self.pid()),
                format!("task_state {state:?} is none that we know"),
            )),
        }
    }

    /// The table of descriptors that the task uses, shared between tasks with the same number.
    pub fn files_id(&self) -> u32 {
        self.ids.as_ref().map_or(self.pid(), |ids| ids.files_id)
    }
}

/// A descriptor that refers to an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The task.
    pub pid: u32,
    /// Its descriptor.
    pub fd: u32,
}

/// The images of one tree.
#[derive(Debug)]
pub struct TreeImages {
    /// Where they are.
    pub dir: ImageDir,
    /// What was dumped.
    pub inventory: InventoryEntry,
    /// The tasks, parents before children; the first is the root.
    pub tasks: Vec<TaskImages>,
    /// Open files by id. An entry has room for every kind and is large.
    pub files: BTreeMap<u32, Box<FileEntry>>,
    /// How to find files that have lost their name, by the id of the file.
    pub remaps: BTreeMap<u32, RemapFilePathEntry>,
    /// How we see the owners that the images name.
    pub owners: OwnerMap,
    /// User namespaces.
    pub users: Users,
    /// Mounts by the number of their namespace.
    pub mounts: BTreeMap<u32, Vec<MntEntry>>,
    /// Pid namespaces below the root's.
    pub nested: Nested,
    holders: BTreeMap<u32, Vec<Holder>>,
    /// The ids of open files by their type.
    types: BTreeMap<i32, Vec<u32>>,
    named: BTreeMap<u32, Vec<u32>>,
}

/// No kernel has pids above it (`PID_MAX_LIMIT`).
const MAX_PID: u32 = 1 << 22;

impl TreeImages {
    /// Reads and decodes the images of a directory.
    pub fn load(path: &Path) -> Result<Self, PlanError> {
        Self::read(ImageDir::open(path)?)
    }

    /// Reads and decodes opened images.
    pub fn read(dir: ImageDir) -> Result<Self, PlanError> {
        let inventory = dir.read_inventory()?;
        let per_id = inventory.fdinfo_per_id.unwrap_or(false);
        let mut tasks = Vec::new();
        for entry in dir.read_all::<PstreeEntry>(ImageKind::Pstree, 0)? {
            tasks.push(load_task(&dir, entry, per_id)?);
        }
        if tasks.is_empty() {
            return Err(PlanError::damaged("pstree.img", "it lists no task"));
        }
        let mut files: BTreeMap<u32, Box<FileEntry>> = BTreeMap::new();
        for mut file in dir.read_files()? {
            // The name of a tun file is an entry with the same number.
            if let Some(earlier) = files.remove(&file.id) {
                if earlier.tunf.is_none() && file.tunf.is_none() {
                    let what = format!("file {:#x} is there twice", file.id);
                    return Err(PlanError::damaged("files.img", what));
                }
                file.reg = file.reg.or(earlier.reg);
                if let Some(tun) = earlier.tunf {
                    (file.tunf, file.r#type) = (Some(tun), earlier.r#type);
                }
            }
            files.insert(file.id, file);
        }
        let remaps = dir.read_remaps()?;
        let mut images = TreeImages {
            owners: OwnerMap::default(),
            users: Users::default(),
            mounts: read_mounts(&dir)?,
            nested: Nested::read(&tasks)?,
            holders: holders(&tasks),
            types: types(&files),
            named: named(&files),
            remaps: remaps
                .into_iter()
                .map(|remap| (remap.orig_id, remap))
                .collect(),
            dir,
            inventory,
            tasks,
            files,
        };
        images.users = Users::read(&images)?;
        images.owners = images.users.of_root();
        images.check_tree()?;
        images.check_descriptors()?;
        Ok(images)
    }

    /// The root of the tree.
    pub fn root(&self) -> &TaskImages {
        &self.tasks[0]
    }

    /// A task by its pid.
    pub fn task(&self, pid: u32) -> Option<&TaskImages> {
        self.tasks.iter().find(|task| task.pid() == pid)
    }

    /// Descriptors that refer to this open file description, lowest pid and number first. Tasks that
    /// share their table count once, as the first of them.
    pub fn holders(&self, file: u32) -> &[Holder] {
        self.holders.get(&file).map_or(&[], Vec::as_slice)
    }

    /// The open files of a type, lowest id first.
    pub fn of_type(&self, kind: FdTypes) -> impl Iterator<Item = &FileEntry> {
        let ids = self.types.get(&i32::from(kind));
        ids.into_iter().flatten().map(|id| &*self.files[id])
    }

    /// Fifos and terminals whose name the regular file `id` keeps: it is never opened for itself.
    pub fn named_by(&self, id: u32) -> &[u32] {
        self.named.get(&id).map_or(&[], Vec::as_slice)
    }

    /// Whether some shared mapping of this file lets its task write.
    pub fn is_written_through_mapping(&self, file: u32) -> bool {
        let spaces = self.tasks.iter().filter_map(|task| task.mm.as_ref());
        let mut vmas = spaces.flat_map(|mm| mm.vmas.iter());
        vmas.any(|vma| {
            let mapped = vma.status & FILE_SHARED != 0 && vma.shmid == u64::from(file);
            mapped
                && vma
                    .fdflags
                    .is_some_and(|flags| flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32)
        })
    }

    fn check_tree(&self) -> Result<(), PlanError> {
        let mut seen = BTreeSet::new();
        for (index, task) in self.tasks.iter().enumerate() {
            let pid = task.pid();
            if index > 0 && !seen.contains(&task.entry.ppid) {
                return Err(PlanError::damaged(
                    "pstree.img",
                    format!("task {pid} comes before its parent {}", task.entry.ppid),
                ));
            }
            for tid in std::iter::once(pid).chain(task.threads.keys().copied()) {
                if tid == 0 || tid > MAX_PID || !seen.insert(tid) {
                    return Err(PlanError::damaged(
                        "pstree.img",
                        format!("id {tid} of task {pid} is taken or no pid at all"),
                    ));
                }
            }
            let leaders = [("group", task.entry.pgid), ("session", task.entry.sid)];
            if let Some((what, id)) = leaders.iter().find(|(_, id)| *id > MAX_PID) {
                let text = format!("the {what} {id} of task {pid} is no pid at all");
                return Err(PlanError::damaged("pstree.img", text));
            }
            task.state()?;
        }
        Ok(())
    }

    fn check_descriptors(&self) -> Result<(), PlanError> {
        for task in &self.tasks {
            let mut numbers = BTreeSet::new();
            for fd in &task.fds {
                let image = || format!("fdinfo-{}.img", task.files_id());
                if fd.fd > i32::MAX as u32 / 2 || !numbers.insert(fd.fd) {
                    return Err(PlanError::damaged(
                        image(),
                        format!("descriptor {} is there twice or out of range", fd.fd),
                    ));
                }
                if !self.files.contains_key(&fd.id)
                    && FdTypes::try_from(fd.r#type) != Ok(FdTypes::CtlTty)
                {
                    return Err(PlanError::damaged(
                        image(),
                        format!(
                            "descriptor {} is file {:#x}, which files.img lacks",
                            fd.fd, fd.id
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The mounts of every namespace that the images have.
fn read_mounts(dir: &ImageDir) -> Result<BTreeMap<u32, Vec<MntEntry>>, PlanError> {
    let mut mounts = BTreeMap::new();
    for id in dir.ids(ImageKind::Mnts)? {
        let mut entries: Vec<MntEntry> = dir.read_all(ImageKind::Mnts, id)?;
        entries.iter_mut().for_each(crate::mount::upgrade_flags);
        let id = u32::try_from(id)
            .map_err(|_| PlanError::damaged(format!("mountpoints-{id}.img"), "its number"))?;
        mounts.insert(id, entries);
    }
    Ok(mounts)
}

fn load_task(
    dir: &ImageDir,
    entry: PstreeEntry,
    fdinfo_per_id: bool,
) -> Result<TaskImages, PlanError> {
    let pid = u64::from(entry.pid);
    let core = dir.read_core(pid)?;
    let dead = core
        .tc
        .as_ref()
        .is_some_and(|task| matches!(task.task_state, 2 | 6));
    let mut threads = BTreeMap::new();
    // CRIU leaves the only thread of a zombie unset: the number is anything.
    let others = entry
        .threads
        .iter()
        .filter(|tid| **tid != entry.pid && !dead);
    for &tid in others {
        threads.insert(tid, dir.read_core(u64::from(tid))?);
    }
    let ids = dir.read_ids(pid)?;
    let table = match &ids {
        Some(ids) if fdinfo_per_id => u64::from(ids.files_id),
        _ => pid,
    };
    Ok(TaskImages {
        mm: if dead { None } else { Some(dir.read_mm(pid)?) },
        fs: if dead {
            None
        } else {
            Some(dir.read_one(ImageKind::Fs, pid)?)
        },
        fds: if dead {
            Vec::new()
        } else {
            dir.read_all(ImageKind::Fdinfo, table)?
        },
        entry,
        core,
        threads,
        ids,
    })
}

/// Which files are opened under the name in another entry, by the id of that entry.
fn named(files: &BTreeMap<u32, Box<FileEntry>>) -> BTreeMap<u32, Vec<u32>> {
    let mut named: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for file in files.values() {
        let fifo = file.fifo.as_ref().and_then(|fifo| fifo.regf_id);
        let tty = file.tty.as_ref().and_then(|tty| tty.regf_id);
        if let Some(name) = fifo.or(tty).filter(|name| *name != file.id) {
            named.entry(name).or_default().push(file.id);
        }
    }
    named
}

fn types(files: &BTreeMap<u32, Box<FileEntry>>) -> BTreeMap<i32, Vec<u32>> {
    let mut types: BTreeMap<i32, Vec<u32>> = BTreeMap::new();
    for (id, file) in files {
        types.entry(file.r#type).or_default().push(*id);
    }
    types
}

fn holders(tasks: &[TaskImages]) -> BTreeMap<u32, Vec<Holder>> {
    let mut holders: BTreeMap<u32, Vec<Holder>> = BTreeMap::new();
    let mut tables = BTreeSet::new();
    for task in tasks.iter().filter(|task| tables.insert(task.files_id())) {
        for fd in &task.fds {
            holders.entry(fd.id).or_default().push(Holder {
                pid: task.pid(),
                fd: fd.fd,
            });
        }
    }
    holders
}
