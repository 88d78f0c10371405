//! The pagemap image: the index of a `pages` file.

use std::fs::File;
use std::sync::Arc;

use floe_image::messages::{PagemapEntry, PagemapHead};
use floe_image::{ImageKind, ImageWriter, WriteError};

use crate::pump::{CopyError, PagePump, PageSink};
use crate::select::PageRun;
use crate::source::PageSource;

/// `PE_PRESENT`: the page's content is in the pages file.
const PRESENT: u32 = 4;

/// Counts for `stats-dump`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagemapStats {
    /// Pages written.
    pub pages: u64,
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
    file: Arc<File>,
    offset: u64,
    runs: PresentPages,
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
            kind,
            id,
            pages_id,
            sink: file.clone(),
            file,
            offset: 0,
            runs: Vec::new(),
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

    /// Writes the index; the content may still be on its way.
    pub fn finish(self, writer: &ImageWriter) -> Result<PagemapStats, WriteError> {
        self.cut_off(writer)?;
        let mut stream = writer.stream(self.kind, self.id)?;
        stream.append(&PagemapHead {
            pages_id: self.pages_id,
        })?;
        let mut stats = PagemapStats::default();
        for run in &self.runs {
            stats.pages += run.pages;
            stream.append(&PagemapEntry {
                vaddr: run.start,
                // Only read when `nr_pages` is absent.
                compat_nr_pages: 0,
                in_parent: None,
                flags: Some(PRESENT),
                nr_pages: Some(run.pages),
            })?;
        }
        stream.finish()?;
        Ok(stats)
    }

    /// Gives back room that turned out to be too much.
    fn cut_off(&self, writer: &ImageWriter) -> Result<(), WriteError> {
        let path = || {
            writer
                .path()
                .join(ImageKind::Pages.file_name(u64::from(self.pages_id)))
        };
        let too_long = self.file.metadata().map(|found| found.len() > self.offset);
        too_long
            .and_then(|too_long| {
                if too_long {
                    self.file.set_len(self.offset)
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
