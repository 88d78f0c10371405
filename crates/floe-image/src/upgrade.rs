//! Brings images of older layouts to the current one: the only place that knows old forms.
//!
//! - File descriptions once had an image a kind (`reg-files`, `pipes`, ...); now `files` has all.
//! - Mappings, signal actions, credentials, timers, limits and queued signals of a task once had
//!   images of their own; now they are in `mm` and `core`.

use std::collections::HashSet;

use crate::catalogue::ImageKind;
use crate::dir::{ImageDir, PE_PARENT, PE_PRESENT};
use crate::error::ImageError;
use crate::messages::{
    CoreEntry, CredsEntry, EventpollFileEntry, EventpollTfdEntry, FanotifyFileEntry,
    FanotifyMarkEntry, FdTypes, FdinfoEntry, FileEntry, InotifyFileEntry, InotifyWdEntry,
    InventoryEntry, ItimerEntry, MmEntry, PagemapEntry, PosixTimerEntry, RemapFilePathEntry,
    RemapType, RlimitEntry, SaEntry, SiginfoEntry, SignalQueueEntry, TaskKobjIdsEntry,
    TaskRlimitsEntry, TaskTimersEntry, ThreadCoreEntry,
};
use crate::schema::ImageMessage;

/// Number of interval timers of a task.
const INTERVAL_TIMERS: usize = 3;

/// Newest `inventory_entry.img_version` that is read.
pub const IMAGE_VERSION: u32 = 2;
/// Bit of `remap_file_path_entry.remap_id` by which older versions marked a ghost.
const OLD_GHOST_BIT: u32 = 1 << 31;

/// The number of pages and flags as every current reader expects them.
pub(crate) fn pagemap_entry(mut entry: PagemapEntry) -> PagemapEntry {
    if entry.nr_pages.is_none() {
        entry.nr_pages = Some(entry.compat_nr_pages.into());
    }
    if entry.flags.is_none() {
        // Before flags existed, an entry was either in the parent or in the pages file.
        let flags = if entry.in_parent() {
            PE_PARENT
        } else {
            PE_PRESENT
        };
        entry.flags = Some(flags);
    }
    entry
}

impl ImageDir {
    /// The inventory; a version that this crate does not know is an error.
    pub fn read_inventory(&self) -> Result<InventoryEntry, ImageError> {
        let inventory: InventoryEntry = self.read_one(ImageKind::Inventory, 0)?;
        if inventory.img_version == 0 || inventory.img_version > IMAGE_VERSION {
            let found = inventory.img_version;
            let what = format!(
                "its images have version {found}, known are 1 to {IMAGE_VERSION}: use a newer Floe"
            );
            let path = self.path().join(ImageKind::Inventory.file_name(0));
            return Err(ImageError::Upgrade { path, what });
        }
        Ok(inventory)
    }

    /// The descriptors of a task: numbered by its table, in older versions by its pid.
    pub fn read_fdinfo(
        &self,
        inventory: &InventoryEntry,
        pid: u64,
        ids: &TaskKobjIdsEntry,
    ) -> Result<Vec<FdinfoEntry>, ImageError> {
        let id = if inventory.fdinfo_per_id() {
            ids.files_id.into()
        } else {
            pid
        };
        self.read_all(ImageKind::Fdinfo, id)
    }

    /// Where deleted files are kept, each entry with its type.
    pub fn read_remaps(&self) -> Result<Vec<RemapFilePathEntry>, ImageError> {
        let mut remaps: Vec<RemapFilePathEntry> = self.read_all(ImageKind::RemapFpath, 0)?;
        for remap in remaps.iter_mut().filter(|remap| remap.remap_type.is_none()) {
            let is_ghost = remap.remap_id & OLD_GHOST_BIT != 0;
            remap.remap_id &= !OLD_GHOST_BIT;
            remap.set_remap_type(if is_ghost {
                RemapType::Ghost
            } else {
                RemapType::Linked
            });
        }
        Ok(remaps)
    }

    /// All file descriptions, whichever layout they are stored in.
    pub fn read_files(&self) -> Result<Vec<Box<FileEntry>>, ImageError> {
        let mut files = Vec::new();
        if let Some(mut reader) = self.optional_reader(ImageKind::Files, 0)? {
            while let Some(file) = reader.next_message::<FileEntry>()? {
                files.push(Box::new(file));
            }
        }
        // Both layouts side by side come from a converted directory: `files` wins.
        let known: HashSet<u32> = files.iter().map(|file| file.id).collect();
        let mut old = Vec::new();
        self.read_old_plain_files(&mut old)?;
        self.read_old_watches(&mut old)?;
        let more = old.into_iter().filter(|file| !known.contains(&file.id));
        files.extend(more.map(Box::new));
        Ok(files)
    }

    fn read_old_plain_files(&self, files: &mut Vec<FileEntry>) -> Result<(), ImageError> {
        macro_rules! old {
            ($kind:ident, $type:ident, $field:ident) => {
                for entry in self.read_all(ImageKind::$kind, 0)? {
                    let mut file = file_entry(FdTypes::$type);
                    let entry = file.$field.insert(entry);
                    file.id = entry.id;
                    files.push(file);
                }
            };
        }
        old!(RegFiles, Reg, reg);
        old!(ExtFiles, Ext, ext);
        old!(NsFiles, Ns, nsf);
        old!(EventfdFile, Eventfd, efd);
        old!(Signalfd, Signalfd, sgfd);
        old!(Pipes, Pipe, pipe);
        old!(Fifo, Fifo, fifo);
        old!(Unixsk, Unixsk, usk);
        old!(Inetsk, Inetsk, isk);
        old!(Packetsk, Packetsk, psk);
        old!(NetlinkSk, Netlinksk, nlsk);
        old!(TtyFiles, Tty, tty);
        old!(Tunfile, Tunf, tunf);
        old!(Timerfd, Timerfd, tfd);
        old!(BpfmapFile, Bpfmap, bpf);
        old!(Pidfd, Pidfd, pidfd);
        Ok(())
    }

    /// Files whose watches were in a second image, each with the id of its file.
    fn read_old_watches(&self, files: &mut Vec<FileEntry>) -> Result<(), ImageError> {
        let mut targets: Vec<EventpollTfdEntry> = self.read_all(ImageKind::EventpollTfd, 0)?;
        for mut entry in self.read_all::<EventpollFileEntry>(ImageKind::EventpollFile, 0)? {
            entry
                .tfd
                .extend(targets.extract_if(.., |target| target.id == entry.id));
            files.push(FileEntry {
                id: entry.id,
                epfd: Some(entry),
                ..file_entry(FdTypes::Eventpoll)
            });
        }
        self.all_claimed(ImageKind::EventpollTfd, targets.len())?;

        let mut watches: Vec<InotifyWdEntry> = self.read_all(ImageKind::InotifyWd, 0)?;
        for mut entry in self.read_all::<InotifyFileEntry>(ImageKind::InotifyFile, 0)? {
            entry
                .wd
                .extend(watches.extract_if(.., |watch| watch.id == entry.id));
            files.push(FileEntry {
                id: entry.id,
                ify: Some(entry),
                ..file_entry(FdTypes::Inotify)
            });
        }
        self.all_claimed(ImageKind::InotifyWd, watches.len())?;

        let mut marks: Vec<FanotifyMarkEntry> = self.read_all(ImageKind::FanotifyMark, 0)?;
        for mut entry in self.read_all::<FanotifyFileEntry>(ImageKind::FanotifyFile, 0)? {
            entry
                .mark
                .extend(marks.extract_if(.., |mark| mark.id == entry.id));
            files.push(FileEntry {
                id: entry.id,
                ffy: Some(entry),
                ..file_entry(FdTypes::Fanotify)
            });
        }
        self.all_claimed(ImageKind::FanotifyMark, marks.len())
    }

    fn all_claimed(&self, kind: ImageKind, left: usize) -> Result<(), ImageError> {
        if left == 0 {
            return Ok(());
        }
        let what = format!("{left} of its entries belong to no file of the dump");
        Err(ImageError::Upgrade {
            path: self.path().join(kind.file_name(0)),
            what,
        })
    }

    /// A task's address space, with its mappings whichever layout they are stored in.
    pub fn read_mm(&self, pid: u64) -> Result<MmEntry, ImageError> {
        let mut mm: MmEntry = self.read_one(ImageKind::Mm, pid)?;
        if mm.vmas.is_empty() {
            mm.vmas = self.read_all(ImageKind::Vmas, pid)?;
        }
        Ok(mm)
    }

    /// The ids of a task's kernel objects; `None` when neither layout has them.
    pub fn read_ids(&self, pid: u64) -> Result<Option<TaskKobjIdsEntry>, ImageError> {
        match self.read_optional(ImageKind::Ids, pid)? {
            Some(ids) => Ok(Some(ids)),
            None => Ok(self
                .read_optional::<CoreEntry>(ImageKind::Core, pid)?
                .and_then(|core| core.ids)),
        }
    }

    /// A task's or thread's core, with all that older layouts stored elsewhere.
    pub fn read_core(&self, tid: u64) -> Result<CoreEntry, ImageError> {
        let mut core: CoreEntry = self.read_one(ImageKind::Core, tid)?;
        self.upgrade_task(&mut core, tid)?;
        if let Some(thread) = &mut core.thread_core {
            self.upgrade_thread(thread, tid)?;
            if let Some(task) = &core.tc {
                inherit_from_task(thread, task);
            }
        }
        Ok(core)
    }

    fn upgrade_task(&self, core: &mut CoreEntry, pid: u64) -> Result<(), ImageError> {
        let Some(task) = &mut core.tc else {
            return Ok(());
        };
        if task.sigactions.is_empty() {
            task.sigactions = self.read_all::<SaEntry>(ImageKind::Sigact, pid)?;
        }
        if task.timers.is_none() {
            task.timers = self.read_old_timers(pid)?;
        }
        if task.rlimits.is_none() {
            let rlimits: Vec<RlimitEntry> = self.read_all(ImageKind::Rlimit, pid)?;
            task.rlimits = (!rlimits.is_empty()).then_some(TaskRlimitsEntry { rlimits });
        }
        if task.signals_s.is_none() {
            task.signals_s = self.read_old_queue(ImageKind::Signal, pid)?;
        }
        Ok(())
    }

    fn upgrade_thread(&self, thread: &mut ThreadCoreEntry, tid: u64) -> Result<(), ImageError> {
        if thread.creds.is_none() {
            thread.creds = self.read_optional::<CredsEntry>(ImageKind::Creds, tid)?;
        }
        if thread.signals_p.is_none() {
            thread.signals_p = self.read_old_queue(ImageKind::Psignal, tid)?;
        }
        Ok(())
    }

    fn read_old_timers(&self, pid: u64) -> Result<Option<TaskTimersEntry>, ImageError> {
        let interval: Vec<ItimerEntry> = self.read_all(ImageKind::Itimers, pid)?;
        let posix: Vec<PosixTimerEntry> = self.read_all(ImageKind::PosixTimers, pid)?;
        if interval.is_empty() && posix.is_empty() {
            return Ok(None);
        }
        let found = interval.len();
        let Ok::<[ItimerEntry; INTERVAL_TIMERS], _>([real, virt, prof]) = interval.try_into()
        else {
            let what = format!("{found} interval timers, a task has {INTERVAL_TIMERS}");
            let path = self.path().join(ImageKind::Itimers.file_name(pid));
            return Err(ImageError::Upgrade { path, what });
        };
        Ok(Some(TaskTimersEntry {
            real,
            virt,
            prof,
            posix,
        }))
    }

    fn read_old_queue(
        &self,
        kind: ImageKind,
        id: u64,
    ) -> Result<Option<SignalQueueEntry>, ImageError> {
        debug_assert_eq!(kind.entry_name(), Some(SiginfoEntry::NAME));
        let signals: Vec<SiginfoEntry> = self.read_all(kind, id)?;
        Ok((!signals.is_empty()).then_some(SignalQueueEntry { signals }))
    }
}

/// What older versions stored once for the task and newer ones for each thread.
fn inherit_from_task(thread: &mut ThreadCoreEntry, task: &crate::messages::TaskCoreEntry) {
    if thread.blk_sigset.is_none() {
        thread.blk_sigset = Some(task.blk_sigset);
        thread.blk_sigset_extended = task.blk_sigset_extended;
    }
    if thread.comm.is_none() {
        thread.comm = Some(task.comm.clone());
    }
    if thread.seccomp_mode.is_none() {
        thread.seccomp_mode = task.old_seccomp_mode;
        thread.seccomp_filter = thread.seccomp_filter.or(task.old_seccomp_filter);
    }
}

fn file_entry(kind: FdTypes) -> FileEntry {
    FileEntry {
        r#type: kind.into(),
        ..FileEntry::default()
    }
}
