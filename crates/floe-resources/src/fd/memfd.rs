//! Memory files (`memfd_create(2)`), also as what shared mappings are of.
//!
//! Saved:    offset, flags and owner of each description; name, owner, mode, size, seals and pages once
//!           for each file.
//! Rebuilt:  created, filled, sealed, then reopened for each description. Needs: nothing.
//! Not kept: nothing.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, MemfdFileEntry, MemfdInodeEntry};
use floe_kernel::ids::{HostPid, PAGE_SIZE};
use rustix::fs::{FileType, Mode, OFlags, Stat};

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use floe_kernel::namespace::own_fd_path;
use floe_kernel::shared_anonymous::SharedAnonymous;
use floe_plan::Handle;
use rustix::fs::{MemfdFlags, SealFlags};

use super::regular::NamedFile;
use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Segment, SharedMemoryDevice};
use crate::restore::{
    Attempt, ExecuteError, PlanError, Planner, TaskState, TreeImages, World, plan_owner, set_flags,
    set_offset,
};

/// See the module.
pub struct MemFd;

const PREFIX: &[u8] = b"/memfd:";
const DELETED: &[u8] = b" (deleted)";
const MFD_HUGETLB: u32 = 4;
const HUGETLBFS_MAGIC: i64 = 0x958458f6;
/// Where `MFD_HUGE_*` and `MAP_HUGE_*` keep the logarithm of the page size.
const HUGE_SHIFT: u32 = 26;

impl FdKind for MemFd {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        // Files of tmpfs have names of their own and links; these have neither.
        fd.file_type() == FileType::RegularFile
            && fd.stat().st_nlink == 0
            && is_memory_name(fd.target())
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        collect_memfd(id, NamedFile::of(fd)?, collector)
    }
}

/// Whether this is how `/proc` shows memory that was never in a directory.
pub fn is_memory_name(target: &[u8]) -> bool {
    let name = target.strip_suffix(DELETED).unwrap_or(target);
    name.starts_with(PREFIX)
        || name == b"/dev/zero"
        || name.starts_with(b"/SYSV")
        || name == b"/anon_hugepage"
}

/// Numbers of the files saved so far, by device and inode.
#[derive(Default)]
struct Inodes(HashMap<(u64, u64), u32>);

/// The entry of one description of a memory file.
pub fn collect_memfd(
    id: FileId,
    file: NamedFile<'_>,
    collector: &mut Collector<'_>,
) -> Result<FileEntry, CollectError> {
    if collector.shared_memory_device()? != SharedMemoryDevice(file.stat.st_dev)
        && huge_flag(file.pid, file.file)?.is_none()
    {
        return Err(file.obstacle(", deleted", "close it: deleted files are not supported yet"));
    }
    let inode_id = collect_inode(&file, collector)?;
    let entry = MemfdFileEntry {
        id: id.0,
        flags: file.flags,
        pos: file.pos,
        fown: file.owner,
        inode_id,
    };
    Ok(FileEntry {
        memfd: Some(entry),
        ..file_entry(FdTypes::Memfd, id)
    })
}

fn collect_inode(file: &NamedFile<'_>, collector: &mut Collector<'_>) -> Result<u32, CollectError> {
    let inodes = &mut collector.cache(Inodes::default).0;
    let next = inodes.len() as u32 + 1;
    let key = (file.stat.st_dev, file.stat.st_ino);
    let number = *inodes.entry(key).or_insert(next);
    if number != next {
        return Ok(number);
    }
    let failed = |action| {
        move |errno: rustix::io::Errno| CollectError::Task {
            pid: file.pid,
            action,
            source: errno.into(),
        }
    };
    // A mapping's file is opened with O_PATH, which knows no seals.
    let opened = reopen(file.file).map_err(failed("Opening a memfd for reading"))?;
    let name = file.target.strip_suffix(DELETED).unwrap_or(file.target);
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let seals =
        rustix::fs::fcntl_get_seals(&opened).map_err(failed("Asking for the seals of a memfd"))?;
    let shmid = segment_id(file.stat);
    let entry = MemfdInodeEntry {
        name: String::from_utf8(name.to_vec())
            .map_err(|_| file.obstacle("", "its name is not UTF-8"))?,
        uid: collector.owners().uid_inside(file.stat.st_uid),
        gid: collector.owners().gid_inside(file.stat.st_gid),
        size: file.stat.st_size.cast_unsigned(),
        shmid,
        seals: seals.bits(),
        inode_id: u64::from(number),
        hugetlb_flag: huge_flag(file.pid, file.file)?.map(|flag| flag | MFD_HUGETLB),
        mode: Some(file.stat.st_mode),
    };
    collector.append_side(ImageKind::MemfdInode, &entry)?;
    collector.add_segment(Segment {
        id: u64::from(shmid),
        file: opened,
        size: file.stat.st_size.cast_unsigned(),
    });
    Ok(number)
}

/// The number of a shared memory segment in the images.
pub fn segment_id(stat: &Stat) -> u32 {
    // Inodes of the kernel's own tmpfs are numbered with 32 bits.
    stat.st_ino as u32
}

/// A description of our own, readable, with an offset of its own.
pub fn reopen(file: BorrowedFd<'_>) -> Result<std::os::fd::OwnedFd, rustix::io::Errno> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The page size of a hugetlb file as `MAP_HUGE_*` has it; `None` for other files.
pub fn huge_flag(pid: HostPid, file: BorrowedFd<'_>) -> Result<Option<u32>, CollectError> {
    let stat = rustix::fs::fstatfs(file).map_err(|errno| CollectError::Task {
        pid,
        action: "Asking for the file system of a mapping",
        source: errno.into(),
    })?;
    let huge = stat.f_type == HUGETLBFS_MAGIC;
    Ok(huge.then(|| (stat.f_bsize as u64).trailing_zeros() << HUGE_SHIFT))
}

impl FdRestore for MemFd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Memfd
    }

    /// The first description of a file makes it, and brings the others along.
    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.memfd)?;
        let images = planner.images;
        let all = images.of_type(FdTypes::Memfd);
        let all = all.filter_map(|file| file.memfd.as_ref());
        let descriptions: Vec<Description> = all
            .filter(|other| other.inode_id == entry.inode_id)
            .map(|entry| Description::new(entry, planner))
            .collect();
        if descriptions[0].entry.id != entry.id {
            return Ok(());
        }
        let inodes: Vec<MemfdInodeEntry> = images.dir.read_all(ImageKind::MemfdInode, 0)?;
        let inode = inodes
            .into_iter()
            .find(|inode| inode.inode_id == u64::from(entry.inode_id));
        let inode = inode.ok_or_else(|| {
            PlanError::damaged("memfd.img", format!("inode {} is missing", entry.inode_id))
        })?;
        let ids: Vec<u32> = descriptions.iter().map(|other| other.entry.id).collect();
        let makes: Vec<Handle> = ids.iter().map(|id| Handle::File(*id)).collect();
        plan_seals(planner, &inode, ids[0]);
        for description in &descriptions {
            planner.consume("files.img", u64::from(description.entry.id));
            plan_owner(planner, description.entry.id, &description.entry.fown);
        }
        let name = format!("make memfd {} with {} descriptions", inode.name, ids.len());
        planner.step(name, (&[], &makes), move |world| {
            let file = make(world, &inode)?;
            open_descriptions(world, file, &descriptions)
        });
        Ok(())
    }
}

/// The name of a memory file, by its inode in the images.
pub(super) fn name_of(images: &TreeImages, inode: u32) -> Option<String> {
    let inodes = images.dir.read_all(ImageKind::MemfdInode, 0).ok()?;
    let mut inodes = inodes.into_iter();
    let found = inodes.find(|entry: &MemfdInodeEntry| entry.inode_id == u64::from(inode));
    found.map(|inode| inode.name)
}

/// One open file description of a memory file.
#[derive(Clone, Copy)]
struct Description<'i> {
    entry: &'i MemfdFileEntry,
    /// With how much right it is to be opened: its own, or what its mappings need.
    access: OFlags,
}

impl<'i> Description<'i> {
    fn new(entry: &'i MemfdFileEntry, planner: &Planner<'_>) -> Self {
        let access = if planner.images.is_written_through_mapping(entry.id) {
            OFlags::RDWR
        } else {
            OFlags::from_bits_retain(entry.flags) & OFlags::ACCMODE
        };
        Description { entry, access }
    }
}

/// What `fcntl(F_GET_SEALS)` says of a file that never could be sealed.
const UNSEALABLE: u32 = SealFlags::SEAL.bits();

/// Seals come when everything is mapped: some of them forbid to write or to map for writing.
fn plan_seals(planner: &mut Planner<'_>, inode: &MemfdInodeEntry, id: u32) {
    let seals = inode.seals;
    if seals == UNSEALABLE || seals == 0 {
        return;
    }
    let mut needs = vec![Handle::File(id)];
    let tasks = planner.images.tasks.iter();
    let living = tasks.filter(|task| task.state().is_ok_and(|state| state != TaskState::Dead));
    needs.extend(living.map(|task| Handle::Memory(task.pid())));
    let makes = [Handle::Object("seals", inode.inode_id)];
    let name = format!("seal memfd {}", inode.name);
    planner.step(name, (&needs, &makes), move |world| {
        rustix::fs::fcntl_add_seals(world.file(id)?, SealFlags::from_bits_retain(seals))
            .during("Sealing memfd", || format!("with {seals:#x}"))
    });
}

/// Memory that no `memfd_create` made: its name in `/proc/PID/maps` can only be had the way it came to be.
fn make_anonymous(inode: &MemfdInodeEntry) -> std::io::Result<OwnedFd> {
    let page_flags = match inode.hugetlb_flag {
        Some(flags) => libc::MAP_HUGETLB | (flags & !MFD_HUGETLB).cast_signed(),
        None => 0,
    };
    // A mapping has whole pages; what was cut off of the file is cut off again.
    let whole = inode.size.max(1).next_multiple_of(PAGE_SIZE);
    let file = SharedAnonymous::new(whole as usize, page_flags)?.into_fd();
    if inode.size != whole {
        rustix::fs::ftruncate(&file, inode.size)?;
    }
    Ok(file)
}

fn make_memfd(inode: &MemfdInodeEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || inode.name.clone();
    let mut flags = MemfdFlags::CLOEXEC;
    flags |= MemfdFlags::from_bits_retain(inode.hugetlb_flag.unwrap_or(0));
    if inode.seals != UNSEALABLE {
        flags |= MemfdFlags::ALLOW_SEALING;
    }
    let file = rustix::fs::memfd_create(inode.name.as_str(), flags).during("Making memfd", what)?;
    rustix::fs::ftruncate(&file, inode.size).during("Sizing memfd", what)?;
    Ok(file)
}

fn make(world: &World<'_>, inode: &MemfdInodeEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || inode.name.clone();
    let nameless = match inode.name.as_str() {
        "/dev/zero" => true,
        // One of no pages cannot be mapped.
        "/anon_hugepage" => inode.size > 0,
        _ => false,
    };
    let anonymous = (nameless && inode.seals == UNSEALABLE).then(|| make_anonymous(inode));
    let file = match anonymous {
        // Without the capability for map_files a memfd of that name is the same but for its name.
        None => make_memfd(inode)?,
        Some(Err(error)) if error.raw_os_error() == Some(libc::EPERM) => make_memfd(inode)?,
        Some(made) => made.during("Making shared memory", what)?,
    };
    let file = fill(world, inode, file)?;
    let owners = &world.images.owners;
    let uid = owners.uid(inode.uid);
    let gid = owners.gid(inode.gid);
    rustix::fs::fchown(&file, uid, gid).during("Setting the owner of memfd", what)?;
    if let Some(mode) = inode.mode {
        let mode = Mode::from_raw_mode(mode);
        rustix::fs::fchmod(&file, mode).during("Setting the mode of memfd", what)?;
    }
    Ok(file)
}

fn fill(
    world: &World<'_>,
    inode: &MemfdInodeEntry,
    file: OwnedFd,
) -> Result<OwnedFd, ExecuteError> {
    let what = || inode.name.clone();
    let (images, id) = (&world.images.dir, u64::from(inode.shmid));
    let failed = |source: floe_memory::CopyOutError| ExecuteError::Content {
        object: format!("Filling memfd {}", inode.name),
        source: Box::new(source),
    };
    if inode.hugetlb_flag.is_some() && inode.size > 0 {
        let mapped = SharedAnonymous::of_file(file, inode.size as usize);
        let mut mapped = mapped.during("Mapping memfd", what)?;
        floe_memory::copy_segment(images, id, |offset, bytes| {
            let inside = offset.checked_add(bytes.len() as u64);
            if inside.is_none_or(|end| end > inode.size) {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
            mapped.write_mapped(offset as usize, bytes);
            Ok(())
        })
        .map_err(failed)?;
        return Ok(mapped.into_fd());
    }
    let file = File::from(file);
    floe_memory::copy_segment(images, id, |offset, bytes| {
        // The last page may reach over the end.
        let left = inode.size.saturating_sub(offset).min(bytes.len() as u64);
        file.write_all_at(&bytes[..left as usize], offset)
    })
    .map_err(failed)?;
    Ok(file.into())
}

/// Only the descriptor that made a memfd can be executed, so one that may write gets it.
fn open_descriptions(
    world: &mut World<'_>,
    file: OwnedFd,
    descriptions: &[Description<'_>],
) -> Result<(), ExecuteError> {
    let path = own_fd_path(&file);
    let mut first = None;
    for Description { entry, access } in descriptions {
        if first.is_none() && *access == OFlags::RDWR {
            first = Some(*entry);
            continue;
        }
        let flags = (OFlags::from_bits_retain(entry.flags) - OFlags::ACCMODE) | *access;
        let opened = rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty())
            .during("Opening memfd", || format!("{:#x}", entry.id))?;
        set_offset(opened.as_fd(), entry.pos)?;
        world.keep_file(entry.id, opened)?;
    }
    match first {
        Some(entry) => {
            set_flags(file.as_fd(), entry.flags)?;
            set_offset(file.as_fd(), entry.pos)?;
            world.keep_file(entry.id, file)
        }
        None => Ok(()),
    }
}
