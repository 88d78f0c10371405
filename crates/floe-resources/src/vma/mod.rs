//! Mappings of an address space (`mmap(2)`).
//!
//! Saved:    range, protection, flags and `madvise` settings of each, the file behind it; guard regions.
//!           Which pages hold content of their own is decided here, `floe-memory` copies them.
//! Rebuilt:  mapped at the same addresses, then filled, then protected. Needs: the files.
//! Not kept: what the kernel may drop (`MAP_DROPPABLE`), merged pages of KSM, the vvar's content.

mod backing;
mod flags;
mod reader;
mod socket;

pub use reader::MappingReader;
pub use socket::find_socket_files;

use std::collections::HashSet;
use std::ops::Range;

use floe_image::messages::{AioRingEntry, VmaEntry};
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::proc::{Mapping, ProcDir};
use floe_memory::Selection;

use crate::collect::{CollectError, Collector, Obstacle};
use backing::Backing;

/// Bits of `vma_entry.status`.
pub mod status {
    pub const REGULAR: u32 = 1;
    pub const STACK: u32 = 2;
    pub const VSYSCALL: u32 = 4;
    pub const VDSO: u32 = 8;
    pub const HEAP: u32 = 32;
    pub const FILE_PRIVATE: u32 = 64;
    pub const FILE_SHARED: u32 = 128;
    pub const ANON_SHARED: u32 = 256;
    pub const ANON_PRIVATE: u32 = 512;
    pub const SYSV_IPC: u32 = 1024;
    pub const SOCKET: u32 = 2048;
    pub const VVAR: u32 = 4096;
    pub const AIO_RING: u32 = 8192;
    pub const MEMFD: u32 = 16384;
    pub const SHADOW_STACK: u32 = 32768;
    pub const GUARD: u32 = 65536;
    pub const UPROBES: u32 = 131_072;
}

/// One saved mapping, with what is needed to save its pages.
#[derive(Clone, Debug, PartialEq)]
pub struct Vma {
    pub entry: VmaEntry,
    /// Which of its pages are saved with the task; `None` when they are elsewhere or nowhere.
    pub pages: Option<Selection>,
    /// Whether the task itself may read it; else its pages need `/proc/<pid>/mem`.
    pub readable: bool,
}

impl Vma {
    /// Its addresses.
    pub fn range(&self) -> Range<TaskAddr> {
        TaskAddr(self.entry.start)..TaskAddr(self.entry.end)
    }
}

/// The mappings of one task.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AddressSpace {
    pub vmas: Vec<Vma>,
    /// Code in which a system call instruction for the first remote call may be found.
    pub executable: Vec<Range<u64>>,
}

/// Tasks whose memory a userfaultfd of our own tracks, put into the collector's cache by the dump.
#[derive(Clone, Debug, Default)]
pub struct TrackedTasks(pub HashSet<HostPid>);

/// Collects the mappings of a stopped task; those that cannot be saved become obstacles.
pub fn collect_address_space(
    proc: &ProcDir,
    collector: &mut Collector<'_>,
) -> Result<AddressSpace, CollectError> {
    let mappings = collector.cache(MappingReader::default).read(proc)?;
    let mut space = AddressSpace {
        vmas: Vec::with_capacity(mappings.len()),
        executable: executable(&mappings),
    };
    for mapping in &mappings {
        let vma = collect_mapping(proc, mapping, collector);
        let Some(Some(vma)) = collector.note(vma)? else {
            continue;
        };
        merge_or_push(&mut space.vmas, vma);
    }
    Ok(space)
}

/// The kernel shows the vvar as several mappings since Linux 6.13; the format has one.
fn merge_or_push(vmas: &mut Vec<Vma>, vma: Vma) {
    match vmas.last_mut() {
        Some(last)
            if last.entry.status & vma.entry.status & status::VVAR != 0
                && last.entry.end == vma.entry.start =>
        {
            last.entry.end = vma.entry.end;
        }
        _ => vmas.push(vma),
    }
}

/// Mappings whose code may be looked at, the vDSO first: it is small and has what is looked for.
fn executable(mappings: &[Mapping]) -> Vec<Range<u64>> {
    let usable = |mapping: &&Mapping| mapping.exec && mapping.read && mapping.name != b"[vsyscall]";
    let mut found: Vec<&Mapping> = mappings.iter().filter(usable).collect();
    found.sort_by_key(|mapping| mapping.name != b"[vdso]");
    found
        .iter()
        .map(|mapping| mapping.start.0..mapping.end.0)
        .collect()
}

/// Saves one mapping; `Ok(None)` for those that the kernel makes by itself.
fn collect_mapping(
    proc: &ProcDir,
    mapping: &Mapping,
    collector: &mut Collector<'_>,
) -> Result<Option<Vma>, CollectError> {
    let Some((bits, backing)) = classify(proc, mapping, collector)? else {
        return Ok(None);
    };
    let is_vvar = bits & status::VVAR != 0;
    let is_device = mapping.flags.io || mapping.flags.pfn_map;
    if is_device && !is_vvar && bits & status::FILE_SHARED == 0 {
        return Err(refuse(
            proc.pid(),
            mapping,
            "it maps device memory; close the device first",
        ));
    }
    let tracked = mapping.flags.uffd_wp && is_tracked(proc.pid(), collector);
    if mapping.flags.uffd_missing || (mapping.flags.uffd_wp && !tracked) || mapping.flags.uffd_minor
    {
        return Err(refuse(
            proc.pid(),
            mapping,
            "it is registered with a userfaultfd, which cannot be moved",
        ));
    }
    if mapping.flags.shadow_stack {
        let remedy = "shadow stacks are not supported; start the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off";
        return Err(refuse(proc.pid(), mapping, remedy));
    }
    let entry = VmaEntry {
        start: mapping.start.0,
        end: mapping.end.0,
        pgoff: mapping.offset,
        shmid: backing.id,
        prot: flags::protection(mapping),
        flags: flags::map_flags(mapping, &backing),
        status: bits,
        fd: -1,
        madv: flags::advice(&mapping.flags),
        fdflags: backing.open_flags,
    };
    Ok(Some(Vma {
        pages: selection(&entry, mapping),
        readable: mapping.read,
        entry,
    }))
}

/// The bits of `status`, and the file behind.
fn classify(
    proc: &ProcDir,
    mapping: &Mapping,
    collector: &mut Collector<'_>,
) -> Result<Option<(u32, Backing)>, CollectError> {
    let anonymous = |bits| {
        Ok(Some((
            bits | status::REGULAR | status::ANON_PRIVATE,
            Backing::default(),
        )))
    };
    match mapping.name.as_slice() {
        b"[vsyscall]" => Ok(Some((
            status::VSYSCALL | status::ANON_PRIVATE,
            Backing::default(),
        ))),
        b"[vdso]" => anonymous(status::VDSO),
        b"[vvar]" | b"[vvar_vclock]" => anonymous(status::VVAR),
        b"[heap]" => anonymous(status::HEAP),
        b"[uprobes]" if collector.options.allow_uprobes => Ok(None),
        b"[uprobes]" => Err(refuse(
            proc.pid(),
            mapping,
            "remove the probes, or use --allow-uprobes",
        )),
        name if name.starts_with(b"/[aio]") => Ok(Some((status::AIO_RING, Backing::aio_ring()))),
        name if name.starts_with(b"/") => {
            let backing = Backing::collect(proc, mapping, collector)?;
            Ok(Some((backing.status(mapping), backing)))
        }
        name if socket::inode(name).is_some() => {
            let backing = Backing::socket(socket::inode(name).unwrap_or(0));
            Ok(Some((backing.status(mapping), backing)))
        }
        // Names given by PR_SET_VMA_ANON_NAME, `[stack]`, and plain memory.
        name if name.is_empty() || name.starts_with(b"[") => anonymous(0),
        _ => Err(refuse(
            proc.pid(),
            mapping,
            "files without a path cannot be mapped again",
        )),
    }
}

fn selection(entry: &VmaEntry, mapping: &Mapping) -> Option<Selection> {
    const NEVER: u32 = status::VVAR | status::VSYSCALL;
    if entry.status & NEVER != 0 || mapping.flags.droppable {
        return None;
    }
    if entry.status & status::AIO_RING != 0 {
        return Some(Selection::Everything);
    }
    if entry.status & status::VDSO != 0 {
        // A restore on another kernel may have to jump into this one's code.
        return Some(Selection::Everything);
    }
    match entry.status & (status::ANON_PRIVATE | status::FILE_PRIVATE) {
        0 => None,
        status::ANON_PRIVATE => Some(Selection::Anonymous),
        _ => Some(Selection::CopiedOnWrite),
    }
}

/// A task that has a userfaultfd itself is refused for its descriptor.
fn is_tracked(pid: HostPid, collector: &mut Collector<'_>) -> bool {
    collector.cache(TrackedTasks::default).0.contains(&pid)
}

fn refuse(pid: HostPid, mapping: &Mapping, remedy: &str) -> CollectError {
    let name = String::from_utf8_lossy(&mapping.name);
    let object = format!("mapping {}-{} ({name})", mapping.start, mapping.end);
    CollectError::Unsupported(Obstacle {
        pid,
        object,
        remedy: remedy.to_string(),
    })
}

impl AddressSpace {
    /// The contexts of asynchronous I/O (`io_setup(2)`), whose rings are mappings.
    pub fn aio_rings(&self) -> Vec<AioRingEntry> {
        /// Size of the ring's head, and of each event in it.
        const EVENT: u64 = 32;
        let rings = self
            .vmas
            .iter()
            .filter(|vma| vma.entry.status & status::AIO_RING != 0);
        let entry = |vma: &Vma| {
            let ring_len = vma.entry.end - vma.entry.start;
            // The kernel doubles what was asked for, adds two, and fills the last page.
            let events = (ring_len - EVENT) / EVENT;
            AioRingEntry {
                id: vma.entry.start,
                nr_req: ((events - 2) / 2) as u32,
                ring_len: ring_len as u32,
            }
        };
        rings.map(entry).collect()
    }
}

/// The entry of a guard region: not a mapping of its own, so it comes after all of them.
pub fn guard_entry(range: Range<u64>) -> VmaEntry {
    VmaEntry {
        start: range.start,
        end: range.end,
        status: status::GUARD,
        fd: -1,
        ..VmaEntry::default()
    }
}
