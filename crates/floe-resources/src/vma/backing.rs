//! The file behind a mapping: a named file, memory without a name, huge pages.

use floe_kernel::proc::{Mapping, ProcDir, ProcError};
use rustix::fs::{FileType, OFlags};
use std::collections::HashMap;

use super::{refuse, status};
use crate::collect::{CollectError, Collector, Obstacle, PathFile};
use crate::fd::memfd::{huge_flag, is_memory_name};
use crate::ipc::shm::collect_attached;

/// What a mapping is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backing {
    kind: Kind,
    /// Number of the file, or of the shared segment.
    pub(super) id: u64,
    /// `O_RDONLY`, `O_WRONLY` or `O_RDWR`: how the mapped file was opened.
    pub(super) open_flags: Option<u32>,
    /// `MAP_HUGE_*` of the page size.
    pub(super) huge_size: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    /// Nothing: private anonymous memory.
    #[default]
    None,
    Named,
    /// Memory that may be shared: a memfd, or shared anonymous memory.
    Memfd,
    /// Private anonymous memory in huge pages, which the kernel backs by a file.
    HugePrivate,
    /// The ring of a context of asynchronous I/O, which only `io_setup` can map.
    AioRing,
    /// Rings of a packet socket.
    Socket,
    /// A System V segment, by its number.
    SystemV,
}

/// Device and inode; and whether it is a System V segment, which are numbered for themselves on the same
/// device as other memory.
type FileKey = (u32, u32, u64, bool);

/// What was found out about a mapped file.
#[derive(Default)]
struct Known(HashMap<FileKey, Backing>);

impl Backing {
    /// Looks at the file of a mapping, and saves it with the first one.
    pub(super) fn collect(
        proc: &ProcDir,
        mapping: &Mapping,
        collector: &mut Collector<'_>,
    ) -> Result<Self, CollectError> {
        let system_v = mapping.name.starts_with(b"/SYSV");
        let key = (
            mapping.dev_major,
            mapping.dev_minor,
            mapping.inode,
            system_v,
        );
        let open_flags = open_flags(proc, mapping)?;
        let known = collector.cache(Known::default).0.get(&key).copied();
        let backing = match known {
            // A private mapping of a file of huge pages shares nothing with another one.
            Some(backing) => backing,
            None => {
                let found = Self::open(proc, mapping, collector)?;
                collector.cache(Known::default).0.insert(key, found);
                found
            }
        };
        Ok(Backing {
            open_flags,
            ..backing
        })
    }

    fn open(
        proc: &ProcDir,
        mapping: &Mapping,
        collector: &mut Collector<'_>,
    ) -> Result<Self, CollectError> {
        let name = format!("map_files/{}", mapping.map_files_name());
        let file = match proc.open_file(&name, OFlags::PATH) {
            Err(ProcError::Read { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                let remedy = "run Floe as root, or with CAP_CHECKPOINT_RESTORE: without that the kernel \
                              does not show what is mapped";
                // The same of all of them.
                return Err(CollectError::Unsupported(Obstacle {
                    pid: proc.pid(),
                    object: "what it has mapped of files".to_string(),
                    remedy: remedy.to_string(),
                }));
            }
            other => other?,
        };
        let file = PathFile::new(proc.pid(), "a mapping", file)?;
        let kind = FileType::from_raw_mode(file.stat().st_mode);
        let rdev = file.stat().st_rdev;
        let is_dev_zero = kind == FileType::CharacterDevice
            && (rustix::fs::major(rdev), rustix::fs::minor(rdev)) == (1, 5);
        if kind != FileType::RegularFile && !is_dev_zero {
            return Err(refuse(
                proc.pid(),
                mapping,
                "only regular files can be mapped again; close the device or socket first",
            ));
        }
        let is_memory = !is_dev_zero && file.stat().st_nlink == 0 && is_memory_name(&mapping.name);
        let huge_size = if mapping.flags.hugetlb {
            huge_flag(proc.pid(), file.file())?
        } else {
            None
        };
        let mut backing = Backing {
            huge_size: huge_size.unwrap_or(0),
            ..Backing::default()
        };
        if !is_memory {
            backing.kind = Kind::Named;
            backing.id = u64::from(file.collect(collector)?.0);
        } else if mapping.name.starts_with(b"/SYSV") {
            backing.kind = Kind::SystemV;
            backing.id = collect_attached((proc.pid(), mapping.inode), &file, collector)?;
        } else if mapping.name.starts_with(b"/anon_hugepage") && !mapping.shared {
            backing.kind = Kind::HugePrivate;
        } else {
            // Also shared anonymous memory, which some task may have open as a file.
            backing.kind = Kind::Memfd;
            backing.id = u64::from(file.collect_memory(collector)?.0);
        }
        Ok(backing)
    }

    /// An AIO ring.
    pub(super) fn aio_ring() -> Self {
        Backing {
            kind: Kind::AioRing,
            ..Backing::default()
        }
    }

    /// A packet socket, by its inode at first.
    pub(super) fn socket(inode: u64) -> Self {
        Backing {
            kind: Kind::Socket,
            id: inode,
            open_flags: Some(libc::O_RDWR as u32),
            ..Backing::default()
        }
    }

    /// Whether it is mapped from a file, rather than with `MAP_ANONYMOUS`.
    pub(super) fn is_file(&self) -> bool {
        matches!(
            self.kind,
            Kind::Named | Kind::Memfd | Kind::AioRing | Kind::Socket
        )
    }

    /// The bits of `vma_entry.status` for a mapping of it.
    pub(super) fn status(&self, mapping: &Mapping) -> u32 {
        let of_file = if mapping.shared {
            status::FILE_SHARED
        } else {
            status::FILE_PRIVATE
        };
        status::REGULAR
            | match self.kind {
                Kind::None | Kind::HugePrivate => status::ANON_PRIVATE,
                Kind::Named => of_file,
                Kind::Memfd => of_file | status::MEMFD,
                Kind::AioRing => status::AIO_RING,
                Kind::Socket => status::SOCKET,
                Kind::SystemV => status::ANON_SHARED | status::SYSV_IPC,
            }
    }
}

/// The kernel shows in the mode of the link how the file was opened. For a private mapping that does not
/// matter: it never writes to the file.
fn open_flags(proc: &ProcDir, mapping: &Mapping) -> Result<Option<u32>, ProcError> {
    if !mapping.shared {
        return Ok(Some(OFlags::RDONLY.bits()));
    }
    let link = proc.link_stat(&format!("map_files/{}", mapping.map_files_name()))?;
    let flags = match link.st_mode & 0o600 {
        0o200 => OFlags::WRONLY,
        0o600 => OFlags::RDWR,
        _ => OFlags::RDONLY,
    };
    Ok(Some(flags.bits()))
}
