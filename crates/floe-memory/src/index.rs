//! The pagemap image: the index of a `pages` file.

use std::fs::File;
use std::sync::Arc;

use floe_image::dir::{PE_PARENT, PE_PRESENT};
use floe_image::messages::{PagemapEntry, PagemapHead};
use floe_image::{ImageKind, ImageWriter, WriteError};

use crate::pump::{CopyError, HashedFile, PagePump, PageSink};
use crate::select::PageRun;
use crate::source::PageSource;

/// Counts for `stats-dump`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapStats {
    /// Pages written.
    pub pages: u64,
    /// Pages that the parent has.
    pub in_parent: u64,
}

/// Runs of pages that are in a pages file, in file order.
pub type PresentPages = Vec<PageRun>;

/// Writes one pagemap image and its pages file.
#[derive(Debug)]
pub struct PagemapBuilder {
    kind: ImageKind,
    id: u64,
    pages_id: u32,
    sink: Arc<dyn PageSink>,
    /// None where the pages go elsewhere.
    file: Option<Arc<File>>,
    offset: u64,
    runs: PresentPages,
    in_parent: Vec<PageRun>,
}

impl PagemapBuilder {
    /// Begins `pagemap-ID` or `pagemap-shmem-ID`, whose pages go to `pages-PAGES_ID`.
    pub fn create(
        writer: &ImageWriter,
        kind: ImageKind,
        id: u64,
        pages_id: u32,
    ) -> Result<Self, WriteError> {
        let file = writer.create_raw(ImageKind::Pages, u64::from(pages_id))?;
        Ok(Self::with_file(kind, id, (pages_id, file)))
    }

    /// As [`PagemapBuilder::create`], with a pages file that was made before and may be too long.
    pub fn with_file(kind: ImageKind, id: u64, (pages_id, file): (u32, File)) -> Self {
        let file = Arc::new(file);
        PagemapBuilder {
            file: Some(file.clone()),
            ..Self::with_sink(kind, id, (pages_id, file))
        }
    }

    /// As [`PagemapBuilder::create`], with pages that go to no file of the directory.
    pub fn with_sink(kind: ImageKind, id: u64, (pages_id, sink): (u32, Arc<dyn PageSink>)) -> Self {
        PagemapBuilder {
            kind,
            id,
            pages_id,
            sink,
            file: None,
            offset: 0,
            runs: Vec::new(),
            in_parent: Vec::new(),
        }
    }

    /// Hashes pages while they are copied, instead of reading them again when all is written: that takes
    /// less time in all, but some of it while the tasks stand still.
    pub fn hash_now(&mut self, writer: &ImageWriter) {
        if let Some(file) = &self.file {
            self.sink = Arc::new(HashedFile {
                file: file.clone(),
                hashes: writer.hash_pieces(ImageKind::Pages, u64::from(self.pages_id)),
            });
        }
    }

    /// Queues pages, which must come in the order of their addresses.
    pub fn send(
        &mut self,
        pump: &mut PagePump,
        source: &Arc<dyn PageSource>,
        runs: &[PageRun],
    ) -> Result<(), CopyError> {
        self.offset = pump.send(source, &self.sink, runs, self.offset)?;
        self.runs.extend_from_slice(runs);
        Ok(())
    }

    /// Notes pages whose content the parent has.
    pub fn leave_in_parent(&mut self, runs: &[PageRun]) {
        self.in_parent.extend_from_slice(runs);
    }

    /// Writes the index; the content may still be on its way.
    pub fn finish(self, writer: &ImageWriter) -> Result<PagemapStats, WriteError> {
        self.cut_off(writer)?;
        let mut stream = writer.stream(self.kind, self.id)?;
        stream.append(&PagemapHead {
            pages_id: self.pages_id,
        })?;
        let mut stats = PagemapStats::default();
        let mut parent = self.in_parent.iter().peekable();
        for run in &self.runs {
            stats.pages += run.pages;
            while let Some(before) = parent.next_if(|before| before.start < run.start) {
                stats.in_parent += before.pages;
                stream.append(&entry(before, PE_PARENT))?;
            }
            stream.append(&entry(run, PE_PRESENT))?;
        }
        for rest in parent {
            stats.in_parent += rest.pages;
            stream.append(&entry(rest, PE_PARENT))?;
        }
        stream.finish()?;
        Ok(stats)
    }

    /// Gives back room that turned out to be too much.
    fn cut_off(&self, writer: &ImageWriter) -> Result<(), WriteError> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let path = || {
            writer
                .path()
                .join(ImageKind::Pages.file_name(u64::from(self.pages_id)))
        };
        let too_long = file.metadata().map(|found| found.len() > self.offset);
        too_long
            .and_then(|too_long| {
                if too_long {
                    file.set_len(self.offset)
                } else {
                    Ok(())
                }
            })
            .map_err(|source| WriteError::Write {
                path: path(),
                source,
            })
    }
}

fn entry(run: &PageRun, flags: u32) -> PagemapEntry {
    PagemapEntry {
        vaddr: run.start,
        // Only read when `nr_pages` is absent.
        compat_nr_pages: 0,
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(run.pages),
    }
}
