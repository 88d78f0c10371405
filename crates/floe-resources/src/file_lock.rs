//! Locks on files (`flock(2)`, `fcntl(2)`) and leases.
//!
//! Saved:    kind, mode and range of each, with a task and descriptor that hold it
//!           (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  taken again through that descriptor. Needs: the descriptors of the task.
//! Not kept: waiters; they ask again with their own task. The time left of a lease that is being
//!           broken: it begins again.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use floe_image::ImageKind;
use floe_image::messages::{FileLockEntry, FownEntry};
use floe_inject::{Arg, Program};
use floe_kernel::file_owner::{FileOwner, set_file_owner};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{NsKind, own_fd_path};
use floe_kernel::proc::{FileLock, LockKind, LockMode, parse_locks};
use floe_plan::Handle;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::namespace::own_of_root;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World, file_owner_of};

/// `file_lock_entry.flag`.
pub mod flag {
    pub const POSIX: u32 = 1;
    pub const FLOCK: u32 = 2;
    pub const OFD: u32 = 4;
    pub const LEASE: u32 = 8;
}

/// Added to the type of a lease that somebody waits for; the type is then what it is broken down to.
pub const BREAKING: u32 = 4;

/// Locks that were saved: what a duplicate of the descriptor would show again.
#[derive(Default)]
struct Saved(HashSet<SavedKey>);

#[derive(PartialEq, Eq, Hash)]
struct SavedKey {
    file: FileId,
    /// Locks of `fcntl` belong to a table of descriptors, all others to the description.
    owner: Option<HostPid>,
    kind: LockKind,
    range: (u64, Option<u64>),
}

/// Saves the locks that a descriptor holds.
pub fn collect_locks(
    id: FileId,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    if !fd.info().locked {
        return Ok(());
    }
    if !collector.options.file_locks {
        let what = format!("{}, locked", String::from_utf8_lossy(fd.target()));
        return Err(CollectError::Unsupported(Obstacle::fd(
            fd.pid(),
            fd.fd(),
            what,
            "use --file-locks",
        )));
    }
    let lines: Vec<u8> = fd
        .info()
        .values("lock")
        .flat_map(|line| [line, b"\n"].concat())
        .collect();
    for lock in parse_locks(&lines).map_err(|error| fd.proc().bad(error))? {
        let owner = (lock.kind == LockKind::Posix).then_some(fd.pid());
        let key = SavedKey {
            file: id,
            owner,
            kind: lock.kind,
            range: (lock.start, lock.end),
        };
        if collector.cache(Saved::default).0.insert(key) {
            collector.append_side(ImageKind::FileLocks, &entry(fd, &lock))?;
        }
    }
    Ok(())
}

fn entry(fd: &FdProbe<'_>, lock: &FileLock) -> FileLockEntry {
    let mode = match lock.mode {
        LockMode::Read => libc::F_RDLCK,
        LockMode::Write => libc::F_WRLCK,
        LockMode::Unlock => libc::F_UNLCK,
    };
    FileLockEntry {
        flag: match lock.kind {
            LockKind::Posix => flag::POSIX,
            LockKind::Flock => flag::FLOCK,
            LockKind::Ofd => flag::OFD,
            LockKind::Lease => flag::LEASE,
        },
        r#type: mode.cast_unsigned() | if lock.breaking { BREAKING } else { 0 },
        pid: fd.pids().number(fd.pid()).cast_signed(),
        fd: fd.fd().0,
        start: lock.start.cast_signed(),
        // Zero is "to the end of the file, wherever that is".
        len: lock
            .end
            .map_or(0, |end| (end + 1 - lock.start).cast_signed()),
    }
}

/// Adds the steps that take all locks again.
pub fn plan_locks(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let entries: Vec<FileLockEntry> = images.dir.read_all(ImageKind::FileLocks, 0)?;
    let mut tasks: BTreeMap<u32, Vec<Lock>> = BTreeMap::new();
    for entry in entries {
        let pid = entry.pid.cast_unsigned();
        tasks
            .entry(pid)
            .or_default()
            .push(Lock::new(entry, images)?);
    }
    for (pid, locks) in tasks {
        let name = format!("take {} file locks", locks.len());
        let makes = [Handle::Object("file locks", u64::from(pid))];
        planner.task_step(
            pid,
            name,
            (&[Handle::Descriptors(pid)], &makes),
            move |world| locks.iter().try_for_each(|lock| lock.take(world, pid)),
        );
    }
    Ok(())
}

/// A lock of the images and the file that it is on.
struct Lock {
    entry: FileLockEntry,
    file: u32,
    path: PathBuf,
    access: OFlags,
    owner: FownEntry,
}

impl Lock {
    fn new(entry: FileLockEntry, images: &TreeImages) -> Result<Lock, PlanError> {
        let damaged = |what: &str| {
            let object = format!("the lock of fd {} of task {}", entry.fd, entry.pid);
            PlanError::damaged("filelocks.img", format!("{object} {what}"))
        };
        let task = images.task(entry.pid.cast_unsigned());
        let task = task.ok_or_else(|| damaged("has no task"))?;
        let sharers = images
            .tasks
            .iter()
            .filter(|other| other.files_id() == task.files_id());
        let fd = sharers
            .flat_map(|task| &task.fds)
            .find(|fd| fd.fd == entry.fd.cast_unsigned())
            .ok_or_else(|| damaged("has no descriptor"))?;
        let name = images.files.get(&fd.id).and_then(|file| file.reg.as_ref());
        Ok(Lock {
            file: fd.id,
            path: name
                .map(|file| file.name.clone().into())
                .unwrap_or_default(),
            access: OFlags::from_bits_retain(name.map_or(0, |file| file.flags)) & OFlags::ACCMODE,
            owner: name.map(|file| file.fown.clone()).unwrap_or_default(),
            entry,
        })
    }

    fn take(&self, world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
        let mut program = Program::new();
        let fd = Arg::from(self.entry.fd);
        let label = |kind| format!("{kind} lock of {}", self.path.display());
        let fcntl = |program: &mut Program, kind, command: i32| {
            let range = program.buffer(&self.range());
            let args = [fd, Arg::from(command), Arg::from(range)];
            program.call(label(kind), libc::SYS_fcntl, &args);
        };
        match self.entry.flag {
            flag::POSIX => fcntl(&mut program, "POSIX", libc::F_SETLK),
            flag::OFD => fcntl(&mut program, "OFD", libc::F_OFD_SETLK),
            flag::FLOCK => {
                let operation = match self.entry.r#type as i32 {
                    libc::F_RDLCK => libc::LOCK_SH,
                    _ => libc::LOCK_EX,
                };
                let args = [fd, Arg::from(operation | libc::LOCK_NB)];
                program.call(label("flock"), libc::SYS_flock, &args);
            }
            flag::LEASE => return self.take_lease(world, pid),
            other => {
                let what = format!("lock of unknown kind {other}");
                return Err(ExecuteError::from_plan(PlanError::damaged(
                    "filelocks.img",
                    what,
                )));
            }
        }
        world.run(pid, &program).map(drop)
    }

    /// `struct flock`.
    fn range(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&(self.entry.r#type as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.entry.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.entry.len.to_le_bytes());
        bytes
    }

    fn take_lease(&self, world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
        let breaking = self.entry.r#type & BREAKING != 0;
        let target = (self.entry.r#type & !BREAKING) as i32;
        let held = match breaking {
            true if self.access == OFlags::RDONLY => libc::F_RDLCK,
            true => libc::F_WRLCK,
            false => target,
        };
        let mut program = Program::new();
        let label = format!("lease of {}", self.path.display());
        let fd = Arg::from(self.entry.fd);
        // In a user namespace nobody has CAP_LEASE for files of others, root does not either.
        let owner = self.owner_of_file(world)?;
        if let Some(owner) = owner {
            program.call("setfsuid", libc::SYS_setfsuid, &[Arg::from(owner)]);
        }
        let args = [fd, Arg::from(libc::F_SETLEASE), Arg::from(held)];
        program.call(label.clone(), libc::SYS_fcntl, &args);
        if breaking {
            // The holder was told already: nobody gets the signal while we break the lease again.
            let args = [fd, Arg::from(libc::F_SETOWN), Arg::from(0)];
            program.call(label, libc::SYS_fcntl, &args);
        }
        if owner.is_some() {
            let (root, _) = world.images.owners.first();
            program.call("setfsuid", libc::SYS_setfsuid, &[Arg::from(root)]);
        }
        world.run(pid, &program)?;
        if !breaking {
            return Ok(());
        }
        self.break_lease(target, world)?;
        let known = world.host_pid(self.owner.pid);
        let owner = FileOwner {
            pid: known.map_or(0, |pid| pid.0.cast_unsigned()),
            ..file_owner_of(&self.owner, &world.images.owners)
        };
        set_file_owner(world.file(self.file)?, &owner)
            .during("Setting the owner of", || self.path.display().to_string())
    }

    /// Whose file it is, as a task in a user namespace of the tree's own sees it.
    fn owner_of_file(&self, world: &World<'_>) -> Result<Option<u32>, ExecuteError> {
        if own_of_root(world.images, NsKind::User).is_none() {
            return Ok(None);
        }
        let stat = rustix::fs::fstat(world.file(self.file)?);
        let stat = stat.during("Looking at", || self.path.display().to_string())?;
        Ok(Some(world.images.owners.uid_inside(stat.st_uid)))
    }

    /// Opens the file in a way that the lease forbids, without waiting for it to be given up.
    fn break_lease(&self, target: i32, world: &World<'_>) -> Result<(), ExecuteError> {
        let access = if target == libc::F_UNLCK {
            OFlags::WRONLY
        } else {
            OFlags::RDONLY
        };
        let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // By the descriptor: the tree may have another root than we.
        let file = own_fd_path(world.file(self.file)?);
        match rustix::fs::open(file, flags, Mode::empty()) {
            Err(Errno::WOULDBLOCK) => Ok(()),
            Err(errno) => {
                Err(errno).during("Breaking the lease of", || self.path.display().to_string())
            }
            Ok(_) => Err(ExecuteError::from_plan(PlanError::damaged(
                "filelocks.img",
                format!("nothing breaks the lease of {}", self.path.display()),
            ))),
        }
    }
}
