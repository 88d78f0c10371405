//! Choosing the pages that a dump saves.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use crate::runs::push_run;
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

    /// Appends the pages of `start..end` that `selection` names to `runs`, and the guard regions
    /// (`MADV_GUARD_INSTALL`) in it to `guards`, both in address order.
    pub fn select(
        &mut self,
        range: Range<TaskAddr>,
        selection: Selection,
        runs: &mut Vec<PageRun>,
        guards: &mut Vec<PageRun>,
    ) -> Result<(), ScanError> {
        let (start, end) = (range.start, range.end);
        self.scanned += (end.0 - start.0) / PAGE_SIZE;
        if selection == Selection::Everything {
            push_run(runs, start.0, end.0);
            return Ok(());
        }
        match self.walk(range, selection, runs, guards) {
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

    /// Runs the ioctl over a range; `Ok(false)` when this kernel does not have it.
    fn walk(
        &mut self,
        range: Range<TaskAddr>,
        selection: Selection,
        runs: &mut Vec<PageRun>,
        guards: &mut Vec<PageRun>,
    ) -> io::Result<bool> {
        self.regions.resize(REGIONS, PageRegion::default());
        let mut at = range.start;
        while at < range.end {
            let Some(query) = query(self.method, selection) else {
                return Ok(false);
            };
            match self.pagemap.scan(at, range.end, &query, &mut self.regions) {
                Ok(found) => {
                    for region in &self.regions[..found.regions] {
                        let guard = region.categories & category::GUARD != 0;
                        push_run(
                            if guard { &mut *guards } else { &mut *runs },
                            region.start,
                            region.end,
                        );
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
                // The file of a task that gave up its memory, by its end or by execve, reads as empty.
                return Err(failed(Errno::SRCH.into()));
            }
            for (index, &bits) in entries[..read].iter().enumerate() {
                if is_selected(bits, selection, zero) {
                    let page = at + index as u64 * PAGE_SIZE;
                    push_run(runs, page, page + PAGE_SIZE);
                }
            }
            at += read as u64 * PAGE_SIZE;
        }
        Ok(())
    }
}

fn query(method: ScanMethod, selection: Selection) -> Option<Query> {
    let guard = match method {
        ScanMethod::IoctlWithGuards => category::GUARD,
        ScanMethod::Ioctl => 0,
        ScanMethod::Entries => return None,
    };
    let unwanted = match selection {
        Selection::CopiedOnWrite => category::ZERO | category::FILE,
        Selection::Anonymous | Selection::Everything => category::ZERO,
    };
    Some(Query {
        inverted: unwanted,
        required: unwanted,
        any_of: category::PRESENT | category::SWAPPED | guard,
        returned: guard,
    })
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
        push_run(&mut runs, start, end);
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
                    TaskAddr(base)..TaskAddr(base + 40 * 4096),
                    Selection::Anonymous,
                    &mut runs,
                    &mut Vec::new(),
                )
                .expect("own memory");
            assert_eq!(runs, expected, "{method:?}");
        }
        std::hint::black_box(&memory);
    }

    #[test]
    fn many_runs_are_found_once_each() {
        const RUNS: u64 = 10_000;
        let mut memory = vec![0u8; (2 * RUNS as usize + 1) * 4096];
        // Huge pages would join the runs.
        let base = (memory.as_ptr() as u64).next_multiple_of(4096);
        let skew = (base - memory.as_ptr() as u64) as usize;
        for run in 0..RUNS as usize {
            memory[skew + 2 * run * 4096] = 1;
        }
        // Below and above the numbers that one call, and one collection in the kernel, can hold.
        for runs in [100, 511, 512, 513, 4095, 4096, 4097, RUNS - 1] {
            let mut found = Vec::new();
            let range = TaskAddr(base)..TaskAddr(base + runs * 2 * 4096);
            own_scanner(ScanMethod::IoctlWithGuards)
                .select(range, Selection::Anonymous, &mut found, &mut Vec::new())
                .expect("own memory");
            let wanted: Vec<PageRun> = (0..runs)
                .map(|run| PageRun {
                    start: base + run * 2 * 4096,
                    pages: 1,
                })
                .collect();
            if found.iter().any(|run| run.pages > 1) {
                println!("skipped: huge pages are made behind the test's back");
                return;
            }
            assert_eq!(found, wanted, "{runs} runs");
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
