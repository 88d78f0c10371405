//! Pages of tasks and of shared memory.

use std::sync::Arc;

use floe_image::messages::VmaEntry;
use floe_image::{ImageKind, ImageWriter};
use floe_kernel::ids::{HostPid, PAGE_SIZE};
use floe_kernel::pagemap::Pagemap;
use floe_memory::{
    FilePages, ForcedTaskPages, PagePump, PageRun, PageScanner, PageSource, PagemapBuilder,
    Selection, TaskPages, data_runs,
};
use floe_resources::CollectError;
use floe_resources::collect::Segment;
use floe_resources::vma::{AddressSpace, Vma, guard_entry};
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTask;
use crate::reserve::Reserved;

/// Threads that copy pages: reading and writing overlap, and more would take the cores from others.
const WORKERS: usize = 2;

/// What was found and sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounts {
    pub pages_scanned: u64,
    pub pages_written: u64,
    pub shared_scanned: u64,
    pub shared_written: u64,
}

/// Saves memory while the caller goes on with other things.
pub struct MemoryDump<'a> {
    writer: &'a ImageWriter,
    pump: PagePump,
    pages_id: u32,
    reserved: Reserved,
    pub counts: MemoryCounts,
}

impl<'a> MemoryDump<'a> {
    /// Makes room for the pages of the running tree under `root`. No thread is started before there is a
    /// page to copy.
    pub fn prepare(writer: &'a ImageWriter, root: HostPid) -> Result<Self, DumpError> {
        let reserved = Reserved::make(writer, root)?;
        Ok(MemoryDump {
            writer,
            pump: PagePump::new(WORKERS),
            pages_id: reserved.last_id(),
            reserved,
            counts: MemoryCounts::default(),
        })
    }

    /// Where images go.
    pub fn writer(&self) -> &'a ImageWriter {
        self.writer
    }

    /// Finds a task's own pages and begins to copy them; returns its guard regions.
    pub fn send_task(
        &mut self,
        task: &FrozenTask,
        space: &AddressSpace,
    ) -> Result<Vec<VmaEntry>, DumpError> {
        let pagemap = Pagemap::new(task.proc.open_file("pagemap", OFlags::RDONLY)?);
        let mut scanner = PageScanner::new(task.pid, pagemap);
        let mut builder = match self.reserved.take(task.pid) {
            Some(file) => PagemapBuilder::with_file(ImageKind::Pagemap, task.pid.0 as u64, file),
            None => self.begin(ImageKind::Pagemap, task.pid.0 as u64)?,
        };
        let mut sources = Sources::new(task);
        let (mut batch, mut runs, mut guards) = (Batch::default(), Vec::new(), Vec::new());
        // One question for neighbours: a program with many threads has thousands of small mappings.
        // Where everything is taken, nobody would see the gaps between them.
        let alike = |one: &Vma, next: &Vma| {
            one.pages == next.pages && one.pages != Some(Selection::Everything)
        };
        for vmas in space.vmas.chunk_by(alike) {
            let (Some(first), Some(last)) = (vmas.first(), vmas.last()) else {
                continue;
            };
            let Some(selection) = first.pages else {
                continue;
            };
            runs.clear();
            scanner.select(
                first.range().start..last.range().end,
                selection,
                &mut runs,
                &mut guards,
            )?;
            for part in by_mapping(&runs, vmas) {
                if part.readable != batch.readable {
                    self.send(&mut builder, &mut sources, &mut batch)?;
                    batch.readable = part.readable;
                }
                batch.runs.push(part.run);
            }
        }
        self.send(&mut builder, &mut sources, &mut batch)?;
        self.counts.pages_scanned += scanner.pages_scanned();
        self.counts.pages_written += builder.finish(self.writer)?.pages;
        Ok(guards
            .iter()
            .map(|run: &PageRun| guard_entry(run.start..run.end()))
            .collect())
    }

    fn send(
        &mut self,
        builder: &mut PagemapBuilder,
        sources: &mut Sources<'_>,
        batch: &mut Batch,
    ) -> Result<(), DumpError> {
        if !batch.runs.is_empty() {
            let source = sources.of(batch.readable)?;
            builder.send(&mut self.pump, &source, &batch.runs)?;
            batch.runs.clear();
        }
        Ok(())
    }

    /// Begins to copy the pages of a shared memory segment.
    pub fn send_segment(&mut self, segment: Segment) -> Result<(), DumpError> {
        let failed = |source| CollectError::System {
            action: format!("Finding the pages of shared memory {}", segment.id),
            source,
        };
        let runs = data_runs(&segment.file, segment.size).map_err(failed)?;
        let mut builder = self.begin(ImageKind::ShmemPagemap, segment.id)?;
        let source: Arc<dyn PageSource> = Arc::new(FilePages(segment.file));
        builder.send(&mut self.pump, &source, &runs)?;
        self.counts.shared_scanned += segment.size.div_ceil(PAGE_SIZE);
        self.counts.shared_written += builder.finish(self.writer)?.pages;
        Ok(())
    }

    fn begin(&mut self, kind: ImageKind, id: u64) -> Result<PagemapBuilder, DumpError> {
        self.pages_id += 1;
        Ok(PagemapBuilder::create(
            self.writer,
            kind,
            id,
            self.pages_id,
        )?)
    }

    /// Waits until every page is in its file.
    pub fn drain(&mut self) -> Result<floe_memory::Copied, DumpError> {
        Ok(self.pump.drain()?)
    }
}

/// Pages that are read in one way.
struct Batch {
    runs: Vec<PageRun>,
    readable: bool,
}

impl Default for Batch {
    fn default() -> Self {
        Batch {
            runs: Vec::new(),
            readable: true,
        }
    }
}

/// The ways to read a task's memory.
struct Sources<'a> {
    task: &'a FrozenTask,
    plain: Arc<dyn PageSource>,
    forced: Option<Arc<dyn PageSource>>,
}

impl<'a> Sources<'a> {
    fn new(task: &'a FrozenTask) -> Self {
        Sources {
            task,
            plain: Arc::new(TaskPages(task.pid)),
            forced: None,
        }
    }

    fn of(&mut self, readable: bool) -> Result<Arc<dyn PageSource>, DumpError> {
        if readable {
            return Ok(self.plain.clone());
        }
        if let Some(source) = &self.forced {
            return Ok(source.clone());
        }
        let memory = self.task.proc.open_file("mem", OFlags::RDONLY)?;
        let source: Arc<dyn PageSource> = Arc::new(ForcedTaskPages(memory));
        self.forced = Some(source.clone());
        Ok(source)
    }
}

/// A piece of a run that lies in one mapping, or in several that are all read in the same way.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    run: PageRun,
    readable: bool,
}

/// Cuts runs where the way to read them changes.
fn by_mapping(runs: &[PageRun], vmas: &[Vma]) -> Vec<Part> {
    if vmas.iter().all(|vma| vma.readable) {
        return runs
            .iter()
            .map(|&run| Part {
                run,
                readable: true,
            })
            .collect();
    }
    let mut parts = Vec::new();
    let mut vmas = vmas.iter().peekable();
    for run in runs {
        let mut start = run.start;
        while start < run.end() {
            let Some(vma) = vmas.peek() else { break };
            if vma.entry.end <= start {
                vmas.next();
                continue;
            }
            let end = run.end().min(vma.entry.end);
            let run = PageRun {
                start,
                pages: (end - start) / PAGE_SIZE,
            };
            parts.push(Part {
                run,
                readable: vma.readable,
            });
            start = end;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, readable: bool) -> Vma {
        let entry = VmaEntry {
            start,
            end,
            ..VmaEntry::default()
        };
        Vma {
            entry,
            pages: None,
            readable,
        }
    }

    #[test]
    fn runs_are_cut_between_readable_and_hidden_mappings() {
        let vmas = [
            vma(0x1000, 0x3000, true),
            vma(0x3000, 0x4000, false),
            vma(0x8000, 0x9000, true),
        ];
        let runs = [
            PageRun {
                start: 0x2000,
                pages: 2,
            },
            PageRun {
                start: 0x8000,
                pages: 1,
            },
        ];
        let part = |start, pages, readable| Part {
            run: PageRun { start, pages },
            readable,
        };
        let expected = [
            part(0x2000, 1, true),
            part(0x3000, 1, false),
            part(0x8000, 1, true),
        ];
        assert_eq!(by_mapping(&runs, &vmas), expected);
    }
}
