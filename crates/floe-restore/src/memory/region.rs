//! One mapping of an image, as the kernel is to be asked for it.

use std::ops::Range;

use floe_image::messages::VmaEntry;
use floe_kernel::ids::PAGE_SIZE;

use super::error::PlanError;

/// Bits of `vma_entry.status`.
pub(super) mod status {
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const FILE_SHARED: u32 = 1 << 7;
    pub const ANON_SHARED: u32 = 1 << 8;
    pub const ANON_PRIVATE: u32 = 1 << 9;
    pub const SYSV_IPC: u32 = 1 << 10;
    pub const PACKET_SOCKET: u32 = 1 << 11;
    pub const VVAR: u32 = 1 << 12;
    pub const AIO_RING: u32 = 1 << 13;
    pub const MEMFD: u32 = 1 << 14;
    pub const SHADOW_STACK: u32 = 1 << 15;
    pub const GUARD: u32 = 1 << 16;
    pub const UPROBES: u32 = 1 << 17;
}

/// Flags of mmap(2) that a mapping keeps; type, placement and population are decided here.
const KEPT_FLAGS: i32 = libc::MAP_GROWSDOWN
    | libc::MAP_NORESERVE
    | libc::MAP_STACK
    | libc::MAP_HUGETLB
    | (libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT);
/// `MAP_DROPPABLE` of Linux 6.11, in place of `MAP_PRIVATE`.
const MAP_DROPPABLE: i32 = 0x08;
const MAP_TYPE: i32 = 0x0f;

/// What a mapping needs that must be open in the task when it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// A file (or memfd) of the images by its id, opened with these `O_*` flags.
    File { id: u32, flags: u32 },
    /// A segment of shared anonymous memory, see [`super::make_segment`].
    Segment { id: u64 },
}

/// What lies behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Anonymous,
    PrivateFile {
        source: Source,
        offset: u64,
    },
    Shared {
        source: Source,
        offset: u64,
    },
    /// The ring of an `io_setup(2)` context.
    AioRing,
    /// A part of a System V segment, which `shmat(2)` maps as a whole.
    SystemV {
        id: u64,
        offset: u64,
        writable: bool,
    },
}

/// How a mapping comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Mapped.
    New,
    /// Forked from the parent, which had `covers` of it with protection `prot`; the rest at its end
    /// is grown.
    Inherited { covers: Range<u64>, prot: u32 },
}

/// A mapping to be.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub range: Range<u64>,
    pub prot: u32,
    pub backing: Backing,
    /// `MAP_*` beside type and placement.
    pub flags: i32,
    /// Bit n for advice n of madvise(2).
    pub advice: u64,
    pub locked: bool,
    pub droppable: bool,
    pub origin: Origin,
}

impl Region {
    /// The region of a vma; `None` for what the kernel makes by itself.
    pub fn of(vma: &VmaEntry) -> Result<Option<Region>, PlanError> {
        refuse_unsupported(vma)?;
        if vma.status & (status::VSYSCALL | status::UPROBES) != 0 {
            return Ok(None);
        }
        let range = checked_range(vma)?;
        if vma.status & (status::VDSO | status::VVAR) != 0 {
            return Ok(None);
        }
        let map_flags = vma.flags.cast_signed();
        Ok(Some(Region {
            range,
            prot: vma.prot,
            backing: backing(vma)?,
            flags: map_flags & KEPT_FLAGS,
            advice: vma.madv.unwrap_or(0),
            locked: map_flags & libc::MAP_LOCKED != 0,
            droppable: map_flags & MAP_TYPE == MAP_DROPPABLE,
            origin: Origin::New,
        }))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether its pages belong to the address space, so that a fork copies them on write.
    pub fn is_private(&self) -> bool {
        matches!(
            self.backing,
            Backing::Anonymous | Backing::PrivateFile { .. }
        )
    }

    /// Whether it is private memory without a file.
    pub fn is_anonymous(&self) -> bool {
        self.backing == Backing::Anonymous
    }

    /// Whether it consists of preallocated huge pages.
    pub fn is_hugetlb(&self) -> bool {
        self.flags & libc::MAP_HUGETLB != 0
    }

    /// Whether an advice of madvise(2) is set.
    pub fn advised(&self, advice: i32) -> bool {
        self.advice & (1 << advice) != 0
    }

    /// What must be open in the task to map it.
    pub fn source(&self) -> Option<Source> {
        match self.backing {
            Backing::PrivateFile { source, .. } | Backing::Shared { source, .. } => Some(source),
            Backing::Anonymous | Backing::AioRing | Backing::SystemV { .. } => None,
        }
    }

    /// The `flags` of mmap(2).
    pub fn mmap_flags(&self) -> i32 {
        let kind = match self.backing {
            Backing::Anonymous if self.droppable => MAP_DROPPABLE | libc::MAP_ANONYMOUS,
            Backing::Anonymous | Backing::AioRing => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            Backing::PrivateFile { .. } => libc::MAP_PRIVATE,
            Backing::Shared { .. } | Backing::SystemV { .. } => libc::MAP_SHARED,
        };
        let huge = libc::MAP_HUGETLB | (libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT);
        // The descriptor of a file says by itself that its pages are huge.
        let kept = if self.source().is_some() {
            self.flags & !huge
        } else {
            self.flags
        };
        kind | kept | libc::MAP_FIXED
    }

    /// Whether the same memory, forked, could be this region of a child.
    pub fn continues(&self, parent: &Region) -> bool {
        let lost = parent.advised(libc::MADV_DONTFORK) || parent.advised(libc::MADV_WIPEONFORK);
        let same_backing = match (self.backing, parent.backing) {
            (Backing::Anonymous, Backing::Anonymous) => true,
            (
                Backing::PrivateFile { source, offset },
                Backing::PrivateFile {
                    source: parent_source,
                    offset: parent_offset,
                },
            ) => {
                let distance = self.range.start.wrapping_sub(parent.range.start);
                source == parent_source && offset == parent_offset.wrapping_add(distance)
            }
            _ => false,
        };
        same_backing
            && !lost
            && !self.is_hugetlb()
            && self.flags == parent.flags
            && self.droppable == parent.droppable
            && self.advice == parent.advice
            && parent.range.contains(&self.range.start)
            && (self.range.end <= parent.range.end || self.flags & libc::MAP_GROWSDOWN == 0)
    }
}

fn backing(vma: &VmaEntry) -> Result<Backing, PlanError> {
    let file = || {
        let id = u32::try_from(vma.shmid).map_err(|_| PlanError::FileId {
            start: vma.start,
            id: vma.shmid,
        })?;
        let flags = vma.fdflags.unwrap_or_else(|| implied_open_flags(vma));
        Ok::<_, PlanError>(Source::File { id, flags })
    };
    let offset = vma.pgoff;
    if vma.status & status::AIO_RING != 0 {
        Ok(Backing::AioRing)
    } else if vma.status & status::SYSV_IPC != 0 {
        // CRIU notes no flags of the descriptor: it attaches read-only what is not writable.
        let read_only = vma.prot & libc::PROT_WRITE as u32 == 0;
        let open = vma.fdflags.map(|flags| flags & libc::O_ACCMODE as u32);
        Ok(Backing::SystemV {
            id: vma.shmid,
            offset,
            writable: open.map_or(!read_only, |mode| mode != libc::O_RDONLY as u32),
        })
    } else if vma.status & status::FILE_PRIVATE != 0 {
        Ok(Backing::PrivateFile {
            source: file()?,
            offset,
        })
    } else if vma.status & (status::FILE_SHARED | status::MEMFD | status::PACKET_SOCKET) != 0 {
        let shared = vma.flags.cast_signed() & libc::MAP_SHARED != 0;
        let source = file()?;
        Ok(match shared {
            true => Backing::Shared { source, offset },
            false => Backing::PrivateFile { source, offset },
        })
    } else if vma.status & status::ANON_SHARED != 0 {
        Ok(Backing::Shared {
            source: Source::Segment { id: vma.shmid },
            offset,
        })
    } else if vma.status & status::ANON_PRIVATE != 0 {
        Ok(Backing::Anonymous)
    } else {
        Err(PlanError::Unknown {
            start: vma.start,
            status: vma.status,
        })
    }
}

/// Images of before `fdflags`: what a mapping at least needs.
fn implied_open_flags(vma: &VmaEntry) -> u32 {
    let shared = vma.status & status::FILE_SHARED != 0;
    let written = vma.prot & libc::PROT_WRITE as u32 != 0;
    match shared && written {
        true => libc::O_RDWR as u32,
        false => libc::O_RDONLY as u32,
    }
}

/// The range of a vma, if it can be one.
pub(super) fn checked_range(vma: &VmaEntry) -> Result<Range<u64>, PlanError> {
    let aligned = vma.start.is_multiple_of(PAGE_SIZE) && vma.end.is_multiple_of(PAGE_SIZE);
    if !aligned || vma.start >= vma.end || vma.end > floe_inject::TASK_SIZE {
        return Err(PlanError::BadRange {
            start: vma.start,
            end: vma.end,
        });
    }
    Ok(vma.start..vma.end)
}

fn refuse_unsupported(vma: &VmaEntry) -> Result<(), PlanError> {
    let unsupported = |what, remedy| {
        Err(PlanError::Unsupported {
            start: vma.start,
            what,
            remedy,
        })
    };
    if vma.status & status::SHADOW_STACK != 0 {
        return unsupported(
            "a shadow stack",
            "start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        );
    }
    Ok(())
}
