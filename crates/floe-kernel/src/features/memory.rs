//! Probes of memory: pagemap, userfaultfd, memfd.
//!
//! Kernel contract: all work happens on a page that the probe maps and unmaps itself.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::ProbeContext;

const PAGE: usize = 4096;

/// One anonymous page of ours, unmapped when dropped.
struct Page(*mut libc::c_void);

impl Page {
    fn map() -> Option<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses the address, so nothing of ours is replaced.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, flags, -1, 0) };
        (address != libc::MAP_FAILED).then_some(Self(address))
    }

    fn touch(&self) {
        // SAFETY: the page is mapped writable and only we know of it.
        unsafe { self.0.cast::<u8>().write_volatile(1) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `map` made this page and nobody else refers to it.
        unsafe { libc::munmap(self.0, PAGE) };
    }
}

/// Opens the file behind the first file mapping of ours (the program itself).
pub(super) fn map_files(_: &ProbeContext) -> bool {
    let Ok(mut entries) = fs::read_dir("/proc/self/map_files") else {
        return false;
    };
    entries
        .next()
        .is_some_and(|entry| entry.is_ok_and(|entry| File::open(entry.path()).is_ok()))
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Scans one present page for `category` and says whether the kernel took the request.
fn scan(category: u64) -> bool {
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610; // _IOWR('f', 16, struct pm_scan_arg)
    let (Some(page), Ok(pagemap)) = (Page::map(), File::open("/proc/self/pagemap")) else {
        return false;
    };
    page.touch();
    let mut regions = [0u64; 3];
    let mut arg = ScanArg {
        size: mem::size_of::<ScanArg>() as u64,
        start: page.0 as u64,
        end: page.0 as u64 + PAGE as u64,
        vec: regions.as_mut_ptr() as u64,
        vec_len: 1,
        category_mask: category,
        return_mask: category,
        ..ScanArg::default()
    };
    // SAFETY: `arg` is a live pm_scan_arg whose `vec` has room for the one region it announces.
    unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) >= 0 }
}

pub(super) fn pagemap_scan(_: &ProbeContext) -> bool {
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    scan(PAGE_IS_PRESENT)
}

pub(super) fn pagemap_scan_guard(_: &ProbeContext) -> bool {
    const PAGE_IS_GUARD: u64 = 1 << 8;
    scan(PAGE_IS_GUARD)
}

pub(super) fn madv_guard(_: &ProbeContext) -> bool {
    const MADV_GUARD_INSTALL: i32 = 102;
    // SAFETY: the page is ours and not touched again before it is unmapped.
    Page::map().is_some_and(|page| unsafe { libc::madvise(page.0, PAGE, MADV_GUARD_INSTALL) == 0 })
}

/// The features that a new userfaultfd offers; `None` where there is none for us.
fn uffd_features() -> Option<u64> {
    const UFFD_USER_MODE_ONLY: libc::c_long = 1;
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    // SAFETY: no pointers; a good result is a new descriptor.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            UFFD_USER_MODE_ONLY | libc::c_long::from(libc::O_CLOEXEC),
        )
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: checked to be a new descriptor that nobody else owns.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [UFFD_API, 0, 0];
    // SAFETY: `api` is laid out as struct uffdio_api: three u64.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    (result == 0).then_some(api[1])
}

pub(super) fn userfaultfd(_: &ProbeContext) -> bool {
    uffd_features().is_some()
}

pub(super) fn uffd_wp_async(_: &ProbeContext) -> bool {
    const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
    uffd_features().is_some_and(|features| features & UFFD_FEATURE_WP_ASYNC != 0)
}

pub(super) fn uffd_move(_: &ProbeContext) -> bool {
    const UFFD_FEATURE_MOVE: u64 = 1 << 16;
    uffd_features().is_some_and(|features| features & UFFD_FEATURE_MOVE != 0)
}

pub(super) fn uffd_noncoop(_: &ProbeContext) -> bool {
    // EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP.
    const EVENTS: u64 = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 6);
    uffd_features().is_some_and(|features| features & EVENTS == EVENTS)
}

/// A fresh page is soft-dirty from its first write on, if the kernel has the bit (55) at all.
pub(super) fn soft_dirty(_: &ProbeContext) -> bool {
    let (Some(page), Ok(pagemap)) = (Page::map(), File::open("/proc/self/pagemap")) else {
        return false;
    };
    page.touch();
    let mut entry = [0u8; 8];
    let offset = (page.0 as u64 / PAGE as u64) * 8;
    pagemap.read_exact_at(&mut entry, offset).is_ok() && u64::from_le_bytes(entry) & (1 << 55) != 0
}

/// What `mem_dirty_track` asks: whether incremental dumps are right here. They are on any kernel: where
/// nothing tracks writes, content is compared with the parent's.
pub(super) fn incremental_dumps(_: &ProbeContext) -> bool {
    true
}

fn memfd_with(flags: u32) -> bool {
    // SAFETY: the name is a literal with its terminating zero.
    let fd = unsafe { libc::memfd_create(c"floe-probe".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd >= 0 {
        // SAFETY: checked to be a new descriptor; taken over to be closed.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    fd >= 0
}

pub(super) fn memfd(_: &ProbeContext) -> bool {
    memfd_with(libc::MFD_ALLOW_SEALING)
}

pub(super) fn memfd_hugetlb(_: &ProbeContext) -> bool {
    memfd_with(libc::MFD_HUGETLB)
}

/// Moves the ring of a context and asks for events by its new address.
pub(super) fn aio_remap(_: &ProbeContext) -> bool {
    let mut context: libc::c_ulong = 0;
    // SAFETY: `context` is zero, as io_setup wants it, and live.
    if unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) } < 0 {
        return false;
    }
    let Some(length) = mapping_length(context) else {
        // SAFETY: the context was made above and is not used again.
        unsafe { libc::syscall(libc::SYS_io_destroy, context) };
        return false;
    };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the reservation is ours, and the ring is moved over it; the kernel follows with the
    // context's id (mremap of an aio ring), which is what is tried.
    let moved = unsafe {
        let prot = libc::PROT_NONE;
        let target = libc::mmap(
            std::ptr::null_mut(),
            length,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        libc::mremap(context as *mut libc::c_void, length, length, flags, target)
    };
    if moved == libc::MAP_FAILED {
        // SAFETY: the context is where it was.
        unsafe { libc::syscall(libc::SYS_io_destroy, context) };
        return false;
    }
    // SAFETY: no events are asked for, so no buffer is written; destroying unmaps the ring.
    unsafe {
        let known = libc::syscall(libc::SYS_io_getevents, moved, 0, 0, 0, 0) == 0;
        libc::syscall(libc::SYS_io_destroy, moved);
        known
    }
}

/// The length of the mapping that starts at `start`.
fn mapping_length(start: libc::c_ulong) -> Option<usize> {
    let maps: io::Result<String> = fs::read_to_string("/proc/self/maps");
    let prefix = format!("{start:x}-");
    let maps = maps.ok()?;
    let line = maps.lines().find(|line| line.starts_with(&prefix))?;
    let end = line[prefix.len()..].split(' ').next()?;
    Some(usize::from_str_radix(end, 16).ok()? - start as usize)
}
