//! Where the newest content of every page of a chain of images lies.
//!
//! A dump that builds on a parent holds only what changed. The chain is folded once, newest wins, so
//! that reading a page later does not walk it.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use floe_image::dir::{PE_PARENT, PE_PRESENT};
use floe_image::messages::PagemapEntry;
use floe_image::{ImageDir, ImageError, ImageKind, PagesReader};
use floe_kernel::ids::PAGE_SIZE;

/// Consecutive pages whose content is consecutive in one pages file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRun {
    /// Address of the first page (or its offset in a segment).
    pub start: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
    /// Number of the pages file in the index.
    pub file: u32,
    /// Offset of the first page in that file, in bytes.
    pub offset: u64,
}

impl StoredRun {
    /// The byte after the last one.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The part of the run that lies in `range`.
    fn clipped(&self, range: &Range<u64>) -> Option<StoredRun> {
        let start = self.start.max(range.start);
        let end = self.end().min(range.end);
        (start < end).then(|| StoredRun {
            start,
            len: end - start,
            file: self.file,
            offset: self.offset + (start - self.start),
        })
    }
}

/// The pages of one address space or segment, over all generations.
#[derive(Clone, Debug, Default)]
pub struct PageIndex {
    runs: Vec<StoredRun>,
    files: Vec<PagesFile>,
}

/// A pages file, opened when it is read.
#[derive(Clone, Debug)]
struct PagesFile {
    images: ImageDir,
    id: u64,
    /// A compressed one, whose table is read once; plain ones would only hold descriptors.
    framed: OnceLock<Arc<PagesReader>>,
}

/// Why the pages of a task cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{name} in {}: {problem} at {at:#x}", dir.display())]
    Damaged {
        name: String,
        dir: PathBuf,
        problem: &'static str,
        at: u64,
    },
    #[error("{name} in {} says that the page at {at:#x} is in the parent snapshot, but it is not there: \
             the parent is another dump's, or was removed or damaged", dir.display())]
    NotInParent { name: String, dir: PathBuf, at: u64 },
    #[error("pages-{id}.img in {} is {found} bytes long, its index needs {wanted}: copied only in part?", dir.display())]
    PagesTruncated {
        id: u64,
        dir: PathBuf,
        found: u64,
        wanted: u64,
    },
    #[error("Reading the size of pages-{id}.img in {}", dir.display())]
    Stat {
        id: u64,
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// One generation's pagemap, read but not yet folded.
struct Generation {
    images: ImageDir,
    pages_id: u64,
    entries: Vec<PagemapEntry>,
}

impl PageIndex {
    /// Reads `pagemap-ID` or `pagemap-shmem-ID` and, as far as it refers to them, those of its parents.
    /// Checks that every pages file is as long as it must be.
    pub fn read(images: &ImageDir, kind: ImageKind, id: u64) -> Result<PageIndex, IndexError> {
        let mut chain = vec![Generation::read(images, kind, id)?];
        while let Some(newest) = chain.last().filter(|last| last.refers_to_parent()) {
            let parent = newest
                .images
                .parent()?
                .filter(|parent| parent.has(kind, id))
                .ok_or_else(|| newest.not_in_parent(kind, id, newest.first_in_parent()))?;
            chain.push(Generation::read(&parent, kind, id)?);
        }
        let mut index = PageIndex::default();
        for generation in chain.iter().rev() {
            index = index.overlaid(generation, kind, id)?;
        }
        Ok(index)
    }

    /// The index of the next newer generation.
    fn overlaid(
        self,
        newer: &Generation,
        kind: ImageKind,
        id: u64,
    ) -> Result<PageIndex, IndexError> {
        let own_file = self.files.len() as u32;
        let damaged = |problem, at| IndexError::Damaged {
            name: kind.file_name(id),
            dir: newer.images.path().to_path_buf(),
            problem,
            at,
        };
        let mut runs = Vec::with_capacity(newer.entries.len());
        let (mut reached, mut offset) = (0u64, 0u64);
        for entry in &newer.entries {
            let len = entry.nr_pages().checked_mul(PAGE_SIZE);
            let end = len.and_then(|len| entry.vaddr.checked_add(len));
            let (Some(len), Some(end)) = (len, end) else {
                return Err(damaged(
                    "an entry is longer than the address space",
                    entry.vaddr,
                ));
            };
            if entry.vaddr % PAGE_SIZE != 0 || entry.vaddr < reached {
                return Err(damaged("entries overlap or are out of order", entry.vaddr));
            }
            reached = end;
            if entry.flags() & PE_PRESENT != 0 {
                push(
                    &mut runs,
                    StoredRun {
                        start: entry.vaddr,
                        len,
                        file: own_file,
                        offset,
                    },
                );
                offset += len;
            } else if entry.flags() & PE_PARENT != 0 {
                let mut covered = entry.vaddr;
                for run in self.runs_in(entry.vaddr..end) {
                    if run.start != covered {
                        break;
                    }
                    covered = run.end();
                    push(&mut runs, run);
                }
                if covered != end {
                    return Err(newer.not_in_parent(kind, id, covered));
                }
            } else if entry.flags() != 0 {
                return Err(damaged(
                    "pages were left at a lazy-pages server, and are in no image",
                    entry.vaddr,
                ));
            }
        }
        let mut files = self.files;
        files.push(PagesFile::checked(&newer.images, newer.pages_id, offset)?);
        Ok(PageIndex { runs, files })
    }

    /// All runs in the order of their addresses.
    pub fn runs(&self) -> &[StoredRun] {
        &self.runs
    }

    /// What lies in `range`, cut to it.
    pub fn runs_in(&self, range: Range<u64>) -> impl Iterator<Item = StoredRun> + '_ {
        let first = self.runs.partition_point(|run| run.end() <= range.start);
        let end = range.end;
        self.runs[first..]
            .iter()
            .take_while(move |run| run.start < end)
            .filter_map(move |run| run.clipped(&range))
    }

    /// The path of the pages file that runs name by its number.
    pub fn path(&self, file: u32) -> PathBuf {
        let file = &self.files[file as usize];
        file.images.path().join(ImageKind::Pages.file_name(file.id))
    }

    /// Opens the pages file that runs name by its number.
    pub fn open(&self, file: u32) -> Result<Arc<PagesReader>, ImageError> {
        let file = &self.files[file as usize];
        if let Some(framed) = file.framed.get() {
            return Ok(framed.clone());
        }
        let opened = Arc::new(file.images.open_pages(file.id)?);
        Ok(match opened.as_plain() {
            Some(_) => opened,
            None => file.framed.get_or_init(|| opened).clone(),
        })
    }

    /// The directory in which the pages file of this number lies.
    pub fn images(&self, file: u32) -> &ImageDir {
        &self.files[file as usize].images
    }

    /// Number of pages files that runs may name.
    pub fn file_count(&self) -> u32 {
        self.files.len() as u32
    }
}

impl PagesFile {
    fn checked(images: &ImageDir, id: u64, wanted: u64) -> Result<PagesFile, IndexError> {
        if wanted > 0 {
            let dir = || images.path().to_path_buf();
            let found = images.open_pages(id)?.size();
            let found = found.map_err(|source| IndexError::Stat {
                id,
                dir: dir(),
                source,
            })?;
            if found < wanted {
                return Err(IndexError::PagesTruncated {
                    id,
                    dir: dir(),
                    found,
                    wanted,
                });
            }
        }
        Ok(PagesFile {
            images: images.clone(),
            id,
            framed: OnceLock::new(),
        })
    }
}

impl Generation {
    fn read(images: &ImageDir, kind: ImageKind, id: u64) -> Result<Generation, ImageError> {
        let (head, entries) = images.read_pagemap(kind, id)?;
        Ok(Generation {
            images: images.clone(),
            pages_id: head.pages_id.into(),
            entries,
        })
    }

    fn in_parent(entry: &PagemapEntry) -> bool {
        entry.flags() & PE_PRESENT == 0 && entry.flags() & PE_PARENT != 0
    }

    fn refers_to_parent(&self) -> bool {
        self.entries.iter().any(Self::in_parent)
    }

    fn first_in_parent(&self) -> u64 {
        let found = self.entries.iter().find(|entry| Self::in_parent(entry));
        found.map_or(0, |entry| entry.vaddr)
    }

    fn not_in_parent(&self, kind: ImageKind, id: u64, at: u64) -> IndexError {
        IndexError::NotInParent {
            name: kind.file_name(id),
            dir: self.images.path().to_path_buf(),
            at,
        }
    }
}

fn push(runs: &mut Vec<StoredRun>, run: StoredRun) {
    if run.len == 0 {
        return;
    }
    match runs.last_mut() {
        Some(last)
            if last.end() == run.start
                && last.file == run.file
                && last.offset + last.len == run.offset =>
        {
            last.len += run.len;
        }
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::messages::PagemapHead;
    use floe_image::{ImageWriter, Sync};
    use std::path::Path;

    const ID: u64 = 7;

    /// One generation: entries of first page, number of pages, flags.
    fn generation(dir: &Path, parent: Option<&str>, entries: &[(u64, u64, u32)]) {
        let writer = ImageWriter::create(dir, Sync::None).expect("a directory");
        if let Some(parent) = parent {
            writer.link_parent(Path::new(parent)).expect("a link");
        }
        let mut stream = writer.stream(ImageKind::Pagemap, ID).expect("an image");
        stream
            .append(&PagemapHead { pages_id: 1 })
            .expect("written");
        let mut stored = 0;
        for &(page, pages, flags) in entries {
            let entry = PagemapEntry {
                vaddr: page * PAGE_SIZE,
                compat_nr_pages: 0,
                in_parent: None,
                flags: Some(flags),
                nr_pages: Some(pages),
            };
            stream.append(&entry).expect("written");
            stored += if flags & PE_PRESENT != 0 { pages } else { 0 };
        }
        stream.finish().expect("written");
        let pages = writer.create_raw(ImageKind::Pages, 1).expect("a file");
        pages.set_len(stored * PAGE_SIZE).expect("room");
    }

    fn index_of(dir: &Path) -> Result<PageIndex, IndexError> {
        PageIndex::read(
            &ImageDir::open(dir).expect("opened"),
            ImageKind::Pagemap,
            ID,
        )
    }

    /// First page, pages, file, first page in it.
    fn shape(index: &PageIndex) -> Vec<(u64, u64, u32, u64)> {
        let in_pages = |run: &StoredRun| {
            (
                run.start / PAGE_SIZE,
                run.len / PAGE_SIZE,
                run.file,
                run.offset / PAGE_SIZE,
            )
        };
        index.runs().iter().map(in_pages).collect()
    }

    #[test]
    fn the_newest_content_of_a_chain_wins() {
        let dir = tempfile::tempdir().expect("a directory");
        let (first, second, third) = (
            dir.path().join("1"),
            dir.path().join("2"),
            dir.path().join("3"),
        );
        generation(&first, None, &[(10, 10, PE_PRESENT), (30, 2, PE_PRESENT)]);
        generation(
            &second,
            Some("../1"),
            &[(10, 4, PE_PARENT), (14, 1, PE_PRESENT), (15, 5, PE_PARENT)],
        );
        generation(
            &third,
            Some("../2"),
            &[(8, 3, PE_PRESENT | 2), (11, 6, PE_PARENT)],
        );
        let index = index_of(&third).expect("a good chain");
        let wanted = [(8, 3, 2, 0), (11, 3, 0, 1), (14, 1, 1, 0), (15, 2, 0, 5)];
        assert_eq!(shape(&index), wanted);
        let clipped: Vec<_> = index
            .runs_in(12 * PAGE_SIZE..15 * PAGE_SIZE)
            .map(|run| (run.start / PAGE_SIZE, run.len / PAGE_SIZE))
            .collect();
        assert_eq!(clipped, [(12, 2), (14, 1)]);
    }

    #[test]
    fn a_page_missing_in_the_parent_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        generation(&first, None, &[(10, 2, PE_PRESENT)]);
        generation(&second, Some("../1"), &[(10, 4, PE_PARENT)]);
        let error = index_of(&second).expect_err("page 12 is nowhere");
        assert!(matches!(error, IndexError::NotInParent { at: 0xc000, .. }));
        std::fs::remove_file(second.join("parent")).expect("removed");
        let error = index_of(&second).expect_err("no parent at all");
        assert!(matches!(error, IndexError::NotInParent { at: 0xa000, .. }));
    }

    #[test]
    fn damage_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, entries) in [
            ("overlap", &[(10, 2, PE_PRESENT), (11, 1, PE_PRESENT)][..]),
            ("length", &[(10, u64::MAX, PE_PRESENT)]),
            ("end", &[(u64::MAX / PAGE_SIZE, 2, 0)]),
        ] {
            let dir = dir.path().join(name);
            std::panic::catch_unwind(|| generation(&dir, None, entries)).ok();
            assert!(index_of(&dir).is_err(), "{name}");
        }
        let short = dir.path().join("short");
        generation(&short, None, &[(10, 2, PE_PRESENT)]);
        std::fs::write(short.join("pages-1.img"), [0; 4096]).expect("written");
        let error = index_of(&short).expect_err("half of it is missing");
        assert!(matches!(error, IndexError::PagesTruncated { .. }));
    }
}
