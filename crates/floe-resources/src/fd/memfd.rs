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
use floe_kernel::ids::HostPid;
use rustix::fs::{FileType, Mode, OFlags, Stat};

use super::regular::NamedFile;
use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Segment, SharedMemoryDevice};

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
        uid: file.stat.st_uid,
        gid: file.stat.st_gid,
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
