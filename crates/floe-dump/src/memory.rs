//! Pages of tasks and of shared memory.

use std::sync::Arc;

use floe_image::{ImageKind, ImageWriter};
use floe_kernel::pagemap::Pagemap;
use floe_memory::{
    FilePages, ForcedTaskPages, PagePump, PageRun, PageScanner, PageSource, PagemapBuilder,
    TaskPages, data_runs,
};
use floe_resources::CollectError;
use floe_resources::collect::Segment;
use floe_resources::vma::{AddressSpace, guard_entry};
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTask;

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
    pub counts: MemoryCounts,
}

impl<'a> MemoryDump<'a> {
    /// Nothing is started before there is a page to copy.
    pub fn new(writer: &'a ImageWriter) -> Self {
        MemoryDump {
            writer,
            pump: PagePump::new(WORKERS),
            pages_id: 0,
            counts: MemoryCounts::default(),
        }
    }

    /// Finds a task's own pages and begins to copy them. Guard regions are added to its mappings.
    pub fn send_task(
        &mut self,
        task: &FrozenTask,
        space: &mut AddressSpace,
        guards: &mut Vec<floe_image::messages::VmaEntry>,
    ) -> Result<(), DumpError> {
        let pagemap = Pagemap::new(task.proc.open_file("pagemap", OFlags::RDONLY)?);
        let mut scanner = PageScanner::new(task.pid, pagemap);
        let mut builder = self.begin(ImageKind::Pagemap, task.pid.0 as u64)?;
        let plain: Arc<dyn PageSource> = Arc::new(TaskPages(task.pid));
        let mut forced: Option<Arc<dyn PageSource>> = None;
        let (mut runs, mut guard_runs) = (Vec::new(), Vec::new());
        let mut runs_readable = true;
        for vma in &space.vmas {
            let Some(selection) = vma.pages else { continue };
            if vma.readable != runs_readable {
                let source = pick(task, runs_readable, &plain, &mut forced)?;
                builder.send(&mut self.pump, &source, &runs)?;
                runs.clear();
                runs_readable = vma.readable;
            }
            scanner.select(vma.range(), selection, &mut runs, &mut guard_runs)?;
        }
        let source = pick(task, runs_readable, &plain, &mut forced)?;
        builder.send(&mut self.pump, &source, &runs)?;
        self.counts.pages_scanned += scanner.pages_scanned();
        self.counts.pages_written += builder.finish(self.writer)?.pages;
        guards.extend(
            guard_runs
                .iter()
                .map(|run: &PageRun| guard_entry(run.start..run.end())),
        );
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
        self.counts.shared_scanned += segment.size.div_ceil(floe_kernel::ids::PAGE_SIZE);
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

fn pick(
    task: &FrozenTask,
    readable: bool,
    plain: &Arc<dyn PageSource>,
    forced: &mut Option<Arc<dyn PageSource>>,
) -> Result<Arc<dyn PageSource>, DumpError> {
    if readable {
        return Ok(plain.clone());
    }
    if let Some(source) = forced {
        return Ok(source.clone());
    }
    let source: Arc<dyn PageSource> =
        Arc::new(ForcedTaskPages(task.proc.open_file("mem", OFlags::RDONLY)?));
    *forced = Some(source.clone());
    Ok(source)
}
