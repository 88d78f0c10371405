//! Choosing the pages that a dump saves.

use std::io;
use std::os::fd::AsFd;

use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr};
use floe_kernel::pagemap::{PageRegion, Pagemap, Query, category, entry, zero_page_frame};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Consecutive pages, by address in a task or by offset in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First byte, a multiple of the page size.
    pub start: u64,
    /// Number of pages.
    pub pages: u64,
}

impl PageRun {
    /// The byte after the last one.
    pub fn end(&self) -> u64 {
        self.start + self.pages * PAGE_SIZE
    }
}

/// Which pages of a mapping hold content of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Every page that is there and is not the shared zero page: private anonymous memory.
    Anonymous,
    /// Only pages that were copied on write: private mappings of files.
    CopiedOnWrite,
    /// All of the range.
    Everything,
}

/// Finding pages failed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The kernel refused to tell.
    #[error("Finding the pages of task {pid} in {start}-{end}")]
    Pagemap {
        pid: HostPid,
        start: TaskAddr,
        end: TaskAddr,
        #[source]
        source: io::Error,
    },
}

/// How the kernel is asked; probed with the first scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanMethod {
    /// `PAGEMAP_SCAN` that knows guard regions (Linux 6.15+).
    IoctlWithGuards,
    /// `PAGEMAP_SCAN` (Linux 6.7+).
    Ioctl,
    /// One entry a page.
    Entries,
}

/// Regions that one ioctl may return.
const REGIONS: usize = 4096;
/// Pagemap entries that are read at once.
const ENTRIES: usize = 32 * 1024;

/// Finds pages of one task.
#[derive(Debug)]
pub struct PageScanner {
    pid: HostPid,
    pagemap: Pagemap,
    method: ScanMethod,
    regions: Vec<PageRegion>,
    scanned: u64,
}

impl PageScanner {
    /// A scanner of the task behind an open `/proc/<pid>/pagemap`.
    pub fn new(pid: HostPid, pagemap: Pagemap) -> Self {
        Self::with_method(pid, pagemap, ScanMethod::IoctlWithGuards)
    }

    /// As [`PageScanner::new`], starting with this method; the fallbacks after it still apply.
    pub fn with_method(pid: HostPid, pagemap: Pagemap, method: ScanMethod) -> Self {
        PageScanner {
            pid,
            pagemap,
            method,
            regions: Vec::new(),
            scanned: 0,
        }
    }

    /// Pages looked at so far.
    pub fn pages_scanned(&self) -> u64 {
        self.scanned
    }

    /// Appends the pages of `start..end` that `selection` names, in address order.
    pub fn select(
        &mut self,
        start: TaskAddr,
        end: TaskAddr,
        selection: Selection,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), ScanError> {
        self.scanned += (end.0 - start.0) / PAGE_SIZE;
        if selection == Selection::Everything {
            push(runs, start.0, end.0);
            return Ok(());
        }
        let skipped = match selection {
            Selection::CopiedOnWrite => category::ZERO | category::FILE,
            _ => category::ZERO,
        };
        let found = self.walk(
            start,
            end,
            |method| {
                let skipped = if method == ScanMethod::Ioctl {
                    skipped
                } else {
                    skipped | category::GUARD
                };
                Query {
                    inverted: skipped,
                    required: skipped,
                    any_of: category::PRESENT | category::SWAPPED,
                    returned: 0,
                }
            },
            runs,
        );
        match found {
            Ok(true) => Ok(()),
            Ok(false) => self.select_by_entries(start, end, selection, runs),
            Err(source) => Err(ScanError::Pagemap {
                pid: self.pid,
                start,
                end,
                source,
            }),
        }
    }

    /// Appends the guard regions (`MADV_GUARD_INSTALL`) of `start..end`; none on kernels without them.
    pub fn guards(
        &mut self,
        start: TaskAddr,
        end: TaskAddr,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), ScanError> {
        if self.method != ScanMethod::IoctlWithGuards {
            return Ok(());
        }
        let query = Query {
            required: category::GUARD,
            ..Query::default()
        };
        let at = runs.len();
        let found = self.walk(start, end, |_| query, runs);
        match found {
            Ok(_) if self.method == ScanMethod::IoctlWithGuards => Ok(()),
            // The first scan of all just showed that this kernel has no guard regions.
            Ok(_) => {
                runs.truncate(at);
                Ok(())
            }
            Err(source) => Err(ScanError::Pagemap {
                pid: self.pid,
                start,
                end,
                source,
            }),
        }
    }

    /// Runs the ioctl over a range; `Ok(false)` when this kernel does not have it.
    fn walk(
        &mut self,
        start: TaskAddr,
        end: TaskAddr,
        query: impl Fn(ScanMethod) -> Query,
        runs: &mut Vec<PageRun>,
    ) -> io::Result<bool> {
        self.regions.resize(REGIONS, PageRegion::default());
        let mut at = start;
        while at < end {
            if self.method == ScanMethod::Entries {
                return Ok(false);
            }
            let asked = query(self.method);
            if self.method == ScanMethod::Ioctl && asked.required == category::GUARD {
                return Ok(true);
            }
            match self.pagemap.scan(at, end, &asked, &mut self.regions) {
                Ok(found) => {
                    for region in &self.regions[..found.regions] {
                        push(runs, region.start, region.end);
                    }
                    at = found.walked_to.max(TaskAddr(at.0 + PAGE_SIZE));
                }
                Err(error) => self.method = fall_back(self.method, error)?,
            }
        }
        Ok(true)
    }

    fn select_by_entries(
        &mut self,
        start: TaskAddr,
        end: TaskAddr,
        selection: Selection,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), ScanError> {
        let failed = |source| ScanError::Pagemap {
            pid: self.pid,
            start,
            end,
            source,
        };
        let zero = zero_page_frame().map_err(failed)?;
        let mut entries = vec![0u64; ENTRIES];
        let mut at = start.0;
        while at < end.0 {
            let wanted = ENTRIES.min(((end.0 - at) / PAGE_SIZE) as usize);
            let read = self
                .pagemap
                .entries(TaskAddr(at), &mut entries[..wanted])
                .map_err(failed)?;
            if read == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            for (index, &bits) in entries[..read].iter().enumerate() {
                if is_selected(bits, selection, zero) {
                    let page = at + index as u64 * PAGE_SIZE;
                    push(runs, page, page + PAGE_SIZE);
                }
            }
            at += read as u64 * PAGE_SIZE;
        }
        Ok(())
    }
}

fn fall_back(method: ScanMethod, error: io::Error) -> io::Result<ScanMethod> {
    match (method, error.raw_os_error().map(Errno::from_raw_os_error)) {
        (ScanMethod::IoctlWithGuards, Some(Errno::INVAL)) => Ok(ScanMethod::Ioctl),
        (_, Some(Errno::NOTTY | Errno::INVAL)) => Ok(ScanMethod::Entries),
        _ => Err(error),
    }
}

fn is_selected(bits: u64, selection: Selection, zero: Option<u64>) -> bool {
    let there = bits & (entry::PRESENT | entry::SWAPPED) != 0 && bits & entry::GUARD == 0;
    let is_zero = bits & entry::PRESENT != 0 && zero == Some(bits & entry::PFN);
    let of_file = selection == Selection::CopiedOnWrite && bits & entry::FILE != 0;
    there && !is_zero && !of_file
}

fn push(runs: &mut Vec<PageRun>, start: u64, end: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == start => last.pages += (end - start) / PAGE_SIZE,
        _ => runs.push(PageRun {
            start,
            pages: (end - start) / PAGE_SIZE,
        }),
    }
}

/// The pages of a file that are not holes, up to `size` bytes.
///
/// # Errors
/// Those of `lseek`.
pub fn data_runs(file: impl AsFd, size: u64) -> io::Result<Vec<PageRun>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(data))?;
        let end = hole.min(size).next_multiple_of(PAGE_SIZE);
        let start = data / PAGE_SIZE * PAGE_SIZE;
        if start >= end {
            break;
        }
        push(&mut runs, start, end);
        at = end;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_scanner(method: ScanMethod) -> PageScanner {
        let file = std::fs::File::open("/proc/self/pagemap").expect("readable");
        let pid = HostPid(std::process::id().cast_signed());
        PageScanner::with_method(pid, Pagemap::new(file.into()), method)
    }

    #[test]
    fn every_method_finds_the_same_pages() {
        let thp = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
            .unwrap_or_default();
        if thp.contains("[always]") {
            println!("skipped: huge pages are made behind the test's back");
            return;
        }
        // So large that the allocator maps it, and nothing has touched it.
        let mut memory = vec![0u8; 64 << 20];
        let base = (memory.as_ptr() as u64).next_multiple_of(4096) + (1 << 20);
        let skew = (base - memory.as_ptr() as u64) as usize;
        for page in [3, 4, 9] {
            memory[skew + page * 4096] = 1;
        }
        // Reading maps the zero page, which must not be saved.
        std::hint::black_box(memory[skew + 20 * 4096]);
        let expected = [
            PageRun {
                start: base + 3 * 4096,
                pages: 2,
            },
            PageRun {
                start: base + 9 * 4096,
                pages: 1,
            },
        ];
        for method in [
            ScanMethod::IoctlWithGuards,
            ScanMethod::Ioctl,
            ScanMethod::Entries,
        ] {
            let mut runs = Vec::new();
            own_scanner(method)
                .select(
                    TaskAddr(base),
                    TaskAddr(base + 40 * 4096),
                    Selection::Anonymous,
                    &mut runs,
                )
                .expect("own memory");
            assert_eq!(runs, expected, "{method:?}");
        }
        std::hint::black_box(&memory);
    }

    #[test]
    fn holes_of_a_file_are_left_out() {
        let file = tempfile::tempfile_in("/dev/shm")
            .or_else(|_| tempfile::tempfile())
            .expect("a file");
        rustix::io::pwrite(&file, &[1; 100], 3 * 4096).expect("room");
        rustix::fs::ftruncate(&file, 10 * 4096).expect("room");
        let runs = data_runs(&file, 10 * 4096).expect("seekable");
        assert_eq!(
            runs,
            [PageRun {
                start: 3 * 4096,
                pages: 1
            }]
        );
    }
}
