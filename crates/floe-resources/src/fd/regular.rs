//! Files that have a name: regular files, directories, symbolic links (`open(2)`).
//!
//! Saved:    path, offset, flags, owner, mode; size, so that restore notices another file.
//! Rebuilt:  opened by path, then offset, flags and owner. Needs: the file at its path.
//! Not kept: content; it stays in the file system. Deleted files are `remap`'s.

use std::os::fd::BorrowedFd;

use floe_image::messages::{FdTypes, FileEntry, FownEntry, RegFileEntry};
use floe_kernel::ids::HostPid;
use floe_options::{External, FileValidation, Need};
use rustix::fs::{AtFlags, FileType, OFlags, Stat, StatxFlags};

use super::{FdKind, build_id, file_entry, remap, unchanged};
use super::{FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::mount::{NoPlace, Place, Wanted};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner, set_offset};
use rustix::fs::Mode;
use rustix::mount::MountFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// See the module.
pub struct RegularFile;

impl FdKind for RegularFile {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        // Any file may be opened with O_PATH, which only names it.
        let named = matches!(
            fd.file_type(),
            FileType::RegularFile | FileType::Directory | FileType::Symlink
        );
        fd.target().starts_with(b"/") && (named || fd.is_path())
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        collect_named(id, NamedFile::of(fd)?, collector)
    }
}

/// A file with a name, however a task refers to it.
#[derive(Clone)]
pub struct NamedFile<'a> {
    pub pid: HostPid,
    /// What refers to it, for messages: `fd 5`, `the program`.
    pub role: String,
    /// Our own descriptor of it.
    pub file: BorrowedFd<'a>,
    pub stat: &'a Stat,
    /// Its name as `/proc` shows it, with ` (deleted)` where the kernel added that.
    pub target: &'a [u8],
    pub flags: u32,
    pub pos: u64,
    pub owner: FownEntry,
    /// Whether a task runs or maps it, rather than having it open.
    pub is_mapped: bool,
}

impl<'a> NamedFile<'a> {
    /// The file behind a descriptor.
    pub fn of(fd: &'a FdProbe<'_>) -> Result<Self, CollectError> {
        Ok(NamedFile {
            pid: fd.pid(),
            role: format!("fd {}", fd.fd()),
            file: fd.file(),
            stat: fd.stat(),
            target: fd.target(),
            flags: fd.flags(),
            pos: fd.info().pos.cast_unsigned(),
            owner: fd.owner()?,
            is_mapped: false,
        })
    }

    /// Where a name leads to it, and that name.
    fn place(&self, collector: &mut Collector<'_>) -> Result<(Place, Vec<u8>), CollectError> {
        let why = match Place::of(self.file, collector) {
            Ok(place) => return Ok((place, self.target.to_vec())),
            Err(why) => why,
        };
        if let (NoPlace::Outside(_), Some((place, name))) = (&why, self.same_file(collector)) {
            tracing::debug!(pid = self.pid.0, name = %name.display(), "{} is on a mount left behind", self.role);
            return Ok((place, name.into_os_string().into_vec()));
        }
        Err(match why {
            NoPlace::Outside(mount) => {
                let inode = self.stat.st_ino;
                let remedy = format!(
                    "close it, or use --external file[{mount:x}:{inode:x}] and supply it at the restore"
                );
                self.obstacle(", on a mount outside of the tree's", remedy)
            }
            NoPlace::Failed(errno) => CollectError::Task {
                pid: self.pid,
                action: "Asking for the mount of a file",
                source: errno.into(),
            },
        })
    }

    fn same_file(&self, collector: &mut Collector<'_>) -> Option<(Place, PathBuf)> {
        let kind = FileType::from_raw_mode(self.stat.st_mode);
        let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        let regular = kind == FileType::RegularFile;
        let is_written = regular
            && self.flags & OFlags::PATH.bits() == 0
            && self.flags & OFlags::ACCMODE.bits() != OFlags::RDONLY.bits();
        let barring = [
            (is_written, MountFlags::RDONLY),
            (is_device, MountFlags::NODEV),
            (regular && self.is_mapped, MountFlags::NOEXEC),
        ];
        let barring = barring.iter().filter(|(applies, _)| *applies);
        let wanted = Wanted {
            stat: self.stat,
            name: self.target,
            barring: barring.fold(0, |all, (_, flag)| all | flag.bits()),
        };
        Place::of_same_file((self.pid, wanted), collector)
    }

    /// An obstacle that is this file.
    pub fn obstacle(&self, what: &str, remedy: impl Into<String>) -> CollectError {
        let deleted = what.starts_with(", deleted");
        let name = self.target.strip_suffix(b" (deleted)").filter(|_| deleted);
        let name = String::from_utf8_lossy(name.unwrap_or(self.target));
        let object = format!("{} ({name}{what})", self.role);
        CollectError::Unsupported(Obstacle {
            pid: self.pid,
            object,
            remedy: remedy.into(),
        })
    }
}

/// The entry of a file with a name.
pub fn collect_named(
    id: FileId,
    file: NamedFile<'_>,
    collector: &mut Collector<'_>,
) -> Result<FileEntry, CollectError> {
    let external = external_name(&file, collector)?;
    let mut mount = None;
    let name = match &external {
        Some(name) => name.clone(),
        None => {
            let (place, target) = file.place(collector)?;
            mount = place.mount;
            let target = target.as_slice();
            let found = NamedFile {
                target,
                ..file.clone()
            };
            let name = remap::reachable_name(id, (&found, &place), collector)?;
            String::from_utf8(name)
                .map_err(|_| file.obstacle("", "rename it: its name is not UTF-8"))?
        }
    };
    let entry = RegFileEntry {
        id: id.0,
        flags: file.flags,
        pos: file.pos,
        size: size_to_check(&file),
        ext: external.is_some().then_some(true),
        mode: Some(file.stat.st_mode),
        build_id: build_id_to_check(&file, collector),
        mnt_id: mount.map(u32::cast_signed),
        fown: file.owner,
        name,
        ..RegFileEntry::default()
    };
    Ok(FileEntry {
        reg: Some(entry),
        ..file_entry(FdTypes::Reg, id)
    })
}

/// Log files grow between dump and restore, and that is fine.
fn size_to_check(file: &NamedFile<'_>) -> Option<u64> {
    let mode = file.flags & OFlags::ACCMODE.bits();
    let is_log = mode == OFlags::WRONLY.bits() && file.flags & OFlags::APPEND.bits() != 0;
    let regular = FileType::from_raw_mode(file.stat.st_mode) == FileType::RegularFile;
    (regular && !is_log).then(|| file.stat.st_size.cast_unsigned())
}

/// The build id of programs and libraries: of files that are referred to without a descriptor. A file
/// that cannot be read, or has none, is compared by its size only.
fn build_id_to_check(file: &NamedFile<'_>, collector: &Collector<'_>) -> Vec<u32> {
    let regular = FileType::from_raw_mode(file.stat.st_mode) == FileType::RegularFile;
    let wanted = collector.options.file_validation == FileValidation::BuildId;
    if !regular || !wanted || !file.is_mapped {
        return Vec::new();
    }
    let opened = super::memfd::reopen(file.file).map_err(std::io::Error::from);
    let id = opened
        .and_then(build_id::read)
        .ok()
        .flatten()
        .unwrap_or_default();
    build_id::to_words(&id)
}

/// The name of a file that the caller supplies at restore (`--external file[MNT:INODE]`).
fn external_name(
    file: &NamedFile<'_>,
    collector: &Collector<'_>,
) -> Result<Option<String>, CollectError> {
    let inode = file.stat.st_ino;
    let candidates: Vec<u64> = collector
        .options
        .external
        .iter()
        .filter_map(|external| match external {
            External::File {
                mnt_id,
                inode: wanted,
            } if *wanted == inode => Some(*mnt_id),
            _ => None,
        })
        .collect();
    if candidates.is_empty() {
        return Ok(None);
    }
    let stat = rustix::fs::statx(file.file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map_err(
        |errno| CollectError::Task {
            pid: file.pid,
            action: "Asking for the mount of a file",
            source: errno.into(),
        },
    )?;
    let mount = stat.stx_mnt_id;
    Ok(candidates
        .contains(&mount)
        .then(|| format!("file[{mount:x}:{inode:x}]")))
}

impl FdRestore for RegularFile {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Reg
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.reg)?;
        if remap::is_link(planner.images, entry.id) {
            return Ok(()); // The file that it is a link to takes care of it.
        }
        if !planner.images.named_by(entry.id).is_empty() {
            planner.consume("files.img", u64::from(entry.id));
            return Ok(());
        }
        if entry.ext == Some(true) {
            return Err(PlanError::NeedsOption {
                object: format!("External file {}", entry.name),
                need: Need::Descriptor(entry.name.clone()),
            });
        }
        let flags = open_flags(entry, planner);
        let needs = remap::needs_of_name(planner.images, entry);
        planner.open(
            entry.id,
            format!("open {}", entry.name),
            &needs,
            move |world| open(world, entry, flags),
        );
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

/// Flags of `open` that act on the file once, when it is opened first.
const ONCE: OFlags = OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC);

/// How to open the file that has this name. The name of a fifo is opened for both, so as not to block.
pub(crate) fn flags_by_name(entry: &RegFileEntry, planner: &Planner<'_>) -> OFlags {
    if planner.images.named_by(entry.id).is_empty() {
        open_flags(entry, planner)
    } else {
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC
    }
}

/// How to open a file: as the descriptor was, or as its mappings need it.
fn open_flags(entry: &RegFileEntry, planner: &Planner<'_>) -> OFlags {
    let saved = OFlags::from_bits_retain(entry.flags);
    // O_TMPFILE has O_DIRECTORY in it, which must stay for directories.
    let saved = if saved.contains(OFlags::TMPFILE) {
        saved - OFlags::TMPFILE
    } else {
        saved
    };
    let access = if planner.images.is_written_through_mapping(entry.id) {
        OFlags::RDWR
    } else {
        saved & OFlags::ACCMODE
    };
    (saved - ONCE - OFlags::ACCMODE) | access | OFlags::NOCTTY | OFlags::CLOEXEC
}

/// Opens a file by its name and checks that it still is the one that was dumped.
pub(crate) fn open(
    world: &mut World<'_>,
    entry: &RegFileEntry,
    flags: OFlags,
) -> Result<OwnedFd, ExecuteError> {
    // What is there now may be a fifo, for whose other end an open would wait.
    let waits = !flags.intersects(OFlags::PATH | OFlags::NONBLOCK);
    let file = remap::open_by_name(world, entry, |path| {
        rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty())
    })?;
    check(world, entry, &file)?;
    if waits {
        rustix::fs::fcntl_setfl(&file, flags)
            .during("Setting the flags of", || entry.name.clone())?;
    }
    if !flags.contains(OFlags::PATH) {
        set_offset(file.as_fd(), entry.pos)?;
    }
    Ok(file)
}

fn check(world: &World<'_>, entry: &RegFileEntry, file: &OwnedFd) -> Result<(), ExecuteError> {
    let stat = rustix::fs::fstat(file).during("Looking at", || entry.name.clone())?;
    Ok(unchanged::compare(entry, (file, &stat), world.options)?)
}
