//! Mappings of our own, one for each thing that can be set for a mapping: what a code of `smaps` means in
//! the kernel's bits is learned from them.
//!
//! Kernel contract: all calls concern one page that is mapped here and unmapped again.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::ids::TaskAddr;
use crate::uffd::{TRACKING_FEATURES, USER_MODE_ONLY, Uffd};

/// Holds for all sizes of pages that programs map one of.
const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;
const MAP_DROPPABLE: i32 = 8;
/// Linux 6.13+.
const MADV_GUARD_INSTALL: i32 = 102;

/// Mappings that are unmapped when dropped.
#[derive(Default)]
pub(super) struct Samples {
    mapped: Vec<(*mut libc::c_void, usize)>,
    _uffds: Vec<Uffd>,
}

impl Samples {
    /// Makes all that this kernel allows.
    pub(super) fn make() -> Samples {
        let mut samples = Samples::default();
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let write = libc::PROT_READ | libc::PROT_WRITE;
        samples.map(libc::PROT_NONE, private, PAGE);
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        samples.map(write, shared, PAGE);
        for flags in [libc::MAP_NORESERVE, libc::MAP_GROWSDOWN, libc::MAP_LOCKED] {
            samples.map(write, private | flags, PAGE);
        }
        samples.map(write, MAP_DROPPABLE | libc::MAP_ANONYMOUS, PAGE);
        let huge = libc::MAP_HUGETLB | libc::MAP_NORESERVE;
        samples.map(write, private | huge, HUGE);
        for advice in [
            libc::MADV_SEQUENTIAL,
            libc::MADV_RANDOM,
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_MERGEABLE,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_WIPEONFORK,
            MADV_GUARD_INSTALL,
        ] {
            if let Some(page) = samples.map(write, private, PAGE) {
                // SAFETY: the page was mapped just now and nothing refers to its content.
                unsafe { libc::madvise(page, PAGE, advice) };
            }
        }
        if let (Some(page), Some(uffd)) = (samples.map(write, private, PAGE), uffd()) {
            let _ = uffd.register_write_protect(TaskAddr(page as u64), PAGE as u64);
            samples._uffds.push(uffd);
        }
        samples
    }

    fn map(&mut self, prot: i32, flags: i32, len: usize) -> Option<*mut libc::c_void> {
        // SAFETY: the kernel chooses the address, so nothing of ours is replaced.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return None;
        }
        self.mapped.push((page, len));
        Some(page)
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        for &(page, len) in &self.mapped {
            // SAFETY: `map` made this mapping and nobody else refers to it.
            unsafe { libc::munmap(page, len) };
        }
    }
}

fn uffd() -> Option<Uffd> {
    let flags = libc::O_CLOEXEC | USER_MODE_ONLY;
    // SAFETY: the call takes no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the descriptor is new and nobody else knows it.
    Uffd::new(unsafe { OwnedFd::from_raw_fd(fd) }, TRACKING_FEATURES).ok()
}
