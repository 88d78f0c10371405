//! `/proc/<pid>/pagemap`: which pages a task has, by `PAGEMAP_SCAN` (Linux 6.7+) or entry by entry.
//!
//! Contract relied on: the ioctl writes at most `vec_len` regions to `vec` and only the named fields of
//! its argument (Documentation/admin-guide/mm/pagemap.rst).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::ids::{PAGE_SIZE, TaskAddr};

/// Page categories of `PAGEMAP_SCAN`.
pub mod category {
    /// Write-protection tracking is armed.
    pub const WP_ALLOWED: u64 = 1 << 0;
    /// Written since it was write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// A page of a file or of shared memory.
    pub const FILE: u64 = 1 << 2;
    pub const PRESENT: u64 = 1 << 3;
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared zero page.
    pub const ZERO: u64 = 1 << 5;
    pub const HUGE: u64 = 1 << 6;
    pub const SOFT_DIRTY: u64 = 1 << 7;
    /// A guard region of `MADV_GUARD_INSTALL` (Linux 6.15+).
    pub const GUARD: u64 = 1 << 8;
}

/// Bits of one pagemap entry (`u64` a page).
pub mod entry {
    pub const PRESENT: u64 = 1 << 63;
    pub const SWAPPED: u64 = 1 << 62;
    /// A page of a file or of shared memory.
    pub const FILE: u64 = 1 << 61;
    /// A guard region (Linux 6.15+).
    pub const GUARD: u64 = 1 << 58;
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// The page frame number; zero without CAP_SYS_ADMIN.
    pub const PFN: u64 = (1 << 55) - 1;
}

/// A run of pages with the same categories, as far as they were asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// What to look for. A page matches when, after flipping `inverted`, it has all of `required` and any of
/// `any_of` (if not zero).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub inverted: u64,
    pub required: u64,
    pub any_of: u64,
    /// Categories to report, which also split runs.
    pub returned: u64,
}

/// How far one [`Pagemap::scan`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Regions written.
    pub regions: usize,
    /// Where to go on; the end of the range when all of it was walked.
    pub walked_to: TaskAddr,
}

#[repr(C)]
#[derive(Default)]
struct ScanArgument {
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

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// An open `/proc/<pid>/pagemap`.
#[derive(Debug)]
pub struct Pagemap(OwnedFd);

impl Pagemap {
    /// Takes the open file.
    pub fn new(file: OwnedFd) -> Self {
        Pagemap(file)
    }

    /// Fills `regions` with runs of matching pages of `start..end`. `ENOTTY` on kernels without the
    /// ioctl, `EINVAL` for a category that this kernel does not know.
    pub fn scan(
        &self,
        start: TaskAddr,
        end: TaskAddr,
        query: &Query,
        regions: &mut [PageRegion],
    ) -> io::Result<Scanned> {
        self.walk(start..end, query, 0, regions)
    }

    /// As [`Pagemap::scan`], and write-protects what it returns in the same step, so that the next
    /// write to such a page makes it [`category::WRITTEN`]. `EPERM` where the range is not registered
    /// with a userfaultfd for asynchronous write protection.
    pub fn scan_and_protect(
        &self,
        start: TaskAddr,
        end: TaskAddr,
        query: &Query,
        regions: &mut [PageRegion],
    ) -> io::Result<Scanned> {
        const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
        const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
        let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
        self.walk(start..end, query, flags, regions)
    }

    fn walk(
        &self,
        range: Range<TaskAddr>,
        query: &Query,
        flags: u64,
        regions: &mut [PageRegion],
    ) -> io::Result<Scanned> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags,
            start: range.start.0,
            end: range.end.0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: query.inverted,
            category_mask: query.required,
            category_anyof_mask: query.any_of,
            return_mask: query.returned,
            ..ScanArgument::default()
        };
        // SAFETY: `argument` is live and of the size that it states; `vec` and `vec_len` span exactly
        // the caller's exclusive slice of plain integers.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                PAGEMAP_SCAN as libc::c_ulong,
                &raw mut argument,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = result as usize;
        // The kernel's own `walk_end` is that of the last time its buffer of 512 regions was full when
        // the walk then comes to its end, so it may lie before regions that were given already.
        let walked_to = match regions.get(found.wrapping_sub(1)) {
            Some(last) if found == regions.len() => TaskAddr(last.end),
            _ => range.end,
        };
        Ok(Scanned {
            regions: found,
            walked_to,
        })
    }

    /// Reads one entry a page from `start` on; returns how many were filled (fewer at the end of the
    /// address space).
    pub fn entries(&self, start: TaskAddr, entries: &mut [u64]) -> io::Result<usize> {
        let mut bytes = vec![0u8; entries.len() * 8];
        let read = rustix::io::pread(&self.0, &mut bytes, start.0 / PAGE_SIZE * 8)?;
        for (entry, raw) in entries.iter_mut().zip(bytes[..read].chunks_exact(8)) {
            *entry = u64::from_ne_bytes(raw.try_into().expect("chunks of eight"));
        }
        Ok(read / 8)
    }
}

/// The frame of the shared zero page: what an anonymous page that was only read maps to. `None` when the
/// kernel hides frame numbers.
pub fn zero_page_frame() -> io::Result<Option<u64>> {
    let len = PAGE_SIZE as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at an address of the kernel's choice; one page is too small to become huge.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping above is readable; a volatile read is not optimised away.
    unsafe { page.cast::<u8>().read_volatile() };
    let mut bits = [0u64];
    let read = std::fs::File::open("/proc/self/pagemap")
        .and_then(|file| Pagemap::new(file.into()).entries(TaskAddr(page as u64), &mut bits));
    // SAFETY: unmaps exactly the mapping made above; no reference into it is left.
    unsafe { libc::munmap(page, len) };
    read?;
    let frame = bits[0] & entry::PFN;
    Ok((bits[0] & entry::PRESENT != 0 && frame != 0).then_some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_found_and_untouched_ones_are_not() {
        let pages = 8usize;
        let len = pages * PAGE_SIZE as usize;
        // SAFETY: a fresh anonymous mapping that nothing else refers to.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED);
        for page in [1usize, 2, 5] {
            // SAFETY: inside the mapping made above.
            unsafe { addr.cast::<u8>().add(page * PAGE_SIZE as usize).write(1) };
        }
        let pagemap = Pagemap::new(
            std::fs::File::open("/proc/self/pagemap")
                .expect("readable")
                .into(),
        );
        let start = addr as u64;
        let mut entries = [0u64; 8];
        assert_eq!(
            pagemap
                .entries(TaskAddr(start), &mut entries)
                .expect("readable"),
            8
        );
        let present: Vec<usize> = (0..8)
            .filter(|&i| entries[i] & entry::PRESENT != 0)
            .collect();
        assert_eq!(present, [1, 2, 5]);
        let query = Query {
            any_of: category::PRESENT | category::SWAPPED,
            ..Query::default()
        };
        let mut regions = [PageRegion::default(); 4];
        match pagemap.scan(
            TaskAddr(start),
            TaskAddr(start + len as u64),
            &query,
            &mut regions,
        ) {
            Ok(found) => {
                assert_eq!(
                    (found.regions, found.walked_to),
                    (2, TaskAddr(start + len as u64))
                );
                assert_eq!(
                    (regions[0].start, regions[0].end),
                    (start + 4096, start + 3 * 4096)
                );
            }
            Err(error) => println!("skipped: no PAGEMAP_SCAN: {error}"),
        }
        // SAFETY: unmaps exactly the mapping made above; no reference into it is left.
        unsafe { libc::munmap(addr, len) };
    }
}
