//! Pages of tasks and of shared memory.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use floe_image::messages::VmaEntry;
use floe_image::{ImageKind, ImageWriter};
use floe_inject::Watch;
use floe_kernel::ids::{HostPid, PAGE_SIZE};
use floe_kernel::pagemap::Pagemap;
use floe_memory::{
    Area, FilePages, ForcedTaskPages, PagePump, PageRun, PageScanner, PageSource, PageStore,
    PagemapBuilder, Selection, TaskPages, data_runs, difference, intersection,
};
use floe_options::DumpOptions;
use floe_resources::CollectError;
use floe_resources::collect::Segment;
use floe_resources::vma::{AddressSpace, MappingReader, Vma, guard_entry};
use floe_transfer::PageSender;
use floe_transfer::frame::Target;
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTask;
use crate::pace::Pace;
use crate::pagemap_out::{PagemapOut, connect};
use crate::reserve::Reserved;
use crate::track::Tracking;

/// Threads that copy pages: reading and writing overlap, and more would take the cores from others.
const WORKERS: usize = 2;

/// What was found and sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounts {
    pub pages_scanned: u64,
    pub pages_written: u64,
    /// Pages that the parent has.
    pub pages_in_parent: u64,
    pub shared_scanned: u64,
    pub shared_written: u64,
    pub shared_in_parent: u64,
}

/// Saves memory while the caller goes on with other things.
pub struct MemoryDump<'a> {
    writer: &'a ImageWriter,
    pump: PagePump,
    pages_id: u32,
    reserved: Reserved,
    /// Where pages go instead of to files: a page server, or an archive.
    pub server: Option<PageSender>,
    pub store: Option<Arc<dyn PageStore>>,
    /// Tells what the parent has; without it everything is copied.
    pub tracking: Option<Tracking>,
    /// Whether pages are hashed while they are copied, and not by reading them again: for a tree that is
    /// not released before the images are whole.
    pub hashes: bool,
    /// Holds back copies of running tasks.
    pub pace: Option<Pace>,
    /// Tells that nobody wants a copy that is held back any more.
    pub watch: Option<Watch>,
    /// How long shared memory was compared with the parent's.
    pub comparing: Duration,
    /// Reads the mappings of the stopped tree.
    pub mappings: MappingReader,
    pub counts: MemoryCounts,
}

impl<'a> MemoryDump<'a> {
    /// Makes room for the pages of the running tree under `root`. No thread is started before there is a
    /// page to copy.
    pub fn prepare(writer: &'a ImageWriter, root: HostPid) -> Result<Self, DumpError> {
        Ok(Self::with_room(writer, Reserved::make(writer, root)?))
    }

    /// A dump that copies what `tracking` does not leave to the parent.
    pub fn incremental(writer: &'a ImageWriter, tracking: Tracking) -> Self {
        MemoryDump {
            tracking: Some(tracking),
            ..Self::with_room(writer, Reserved::default())
        }
    }

    /// A dump of everything, without room for pages made here.
    pub fn new(writer: &'a ImageWriter) -> Self {
        Self::with_room(writer, Reserved::default())
    }

    /// Connects to the page server where the options name one.
    pub fn use_server(&mut self, options: &DumpOptions) -> Result<(), DumpError> {
        self.server = options.page_server.as_ref().map(connect).transpose()?;
        Ok(())
    }

    fn with_room(writer: &'a ImageWriter, reserved: Reserved) -> Self {
        MemoryDump {
            writer,
            pump: PagePump::new(WORKERS),
            pages_id: reserved.last_id(),
            reserved,
            server: None,
            store: None,
            tracking: None,
            hashes: false,
            pace: None,
            watch: None,
            comparing: Duration::ZERO,
            mappings: MappingReader::default(),
            counts: MemoryCounts::default(),
        }
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
            Some(file) => {
                let number = u64::from(task.number);
                let mut builder = PagemapBuilder::with_file(ImageKind::Pagemap, number, file);
                builder.hash_now(self.writer);
                PagemapOut::Files(builder)
            }
            None => self.begin(Target::Task(task.number.into()))?,
        };
        let mut sources = Sources::new(task);
        let (mut batch, mut runs, mut guards) = (Batch::default(), Vec::new(), Vec::new());
        // One question for neighbours: a program with many threads has thousands of small mappings.
        for vmas in space.vmas.chunk_by(are_neighbours) {
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
            if self.tracking.is_some() {
                runs = self.leave_to_parent((&mut builder, &mut sources), vmas, &runs)?;
            }
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
        self.finish_task(builder)?;
        Ok(guards
            .iter()
            .map(|run: &PageRun| guard_entry(run.start..run.end()))
            .collect())
    }

    fn finish_task(&mut self, builder: PagemapOut) -> Result<(), DumpError> {
        let stats = builder.finish(self.writer, &mut self.pump, self.server.as_mut())?;
        self.counts.pages_written += stats.pages;
        self.counts.pages_in_parent += stats.in_parent;
        Ok(())
    }

    /// Notes the pages that the parent has, and returns the others.
    fn leave_to_parent(
        &mut self,
        (builder, sources): (&mut PagemapOut, &mut Sources<'_>),
        vmas: &[Vma],
        runs: &[PageRun],
    ) -> Result<Vec<PageRun>, DumpError> {
        let Some(tracking) = &mut self.tracking else {
            return Ok(runs.to_vec());
        };
        let mut unchanged = Vec::new();
        for vma in vmas {
            let Some(selection @ (Selection::Anonymous | Selection::CopiedOnWrite)) = vma.pages
            else {
                continue;
            };
            let area = Area {
                range: vma.range(),
                selection,
            };
            let source = sources.of(vma.readable)?;
            let present = pages_inside(runs, vma.entry.start..vma.entry.end);
            unchanged.extend(tracking.unchanged(sources.task.pid, &area, &present, &source)?);
        }
        builder.leave_in_parent(&unchanged);
        Ok(difference(runs, &unchanged))
    }

    /// Copies a task's memory while it runs: what cannot be read any more is noted in `unsure`.
    pub fn send_live(&mut self, live: &LiveTask) -> Result<(), DumpError> {
        let mut sent = 0;
        let done = self.send_areas(live, &mut sent);
        if done.is_err() && self.server.is_none() {
            // The pages of a task that ended stay in its file, though no index leads to them.
            self.counts.pages_written += sent;
        }
        done
    }

    fn send_areas(&mut self, live: &LiveTask, sent: &mut u64) -> Result<(), DumpError> {
        let pagemap = Pagemap::new(live.pagemap.try_clone().map_err(DumpError::Uffd)?);
        let mut scanner = PageScanner::new(live.pid, pagemap);
        let mut builder = self.begin(Target::Task(live.number.into()))?;
        let mut runs = Vec::new();
        for area in &live.areas {
            runs.clear();
            let range = area.range.clone();
            scanner.select(range, area.selection, &mut runs, &mut Vec::new())?;
            if let Some(tracking) = &mut self.tracking {
                let unchanged = tracking.unchanged(live.pid, area, &runs, &live.source)?;
                builder.leave_in_parent(&unchanged);
                runs = difference(&runs, &unchanged);
            }
            *sent += runs.iter().map(|run| run.pages).sum::<u64>();
            self.send_paced(&mut builder, &live.source, &runs)?;
        }
        self.counts.pages_scanned += scanner.pages_scanned();
        self.finish_task(builder)
    }

    fn send(
        &mut self,
        builder: &mut PagemapOut,
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
        let mut builder = self.begin(Target::Segment(segment.id))?;
        let file = segment.file.try_clone().map_err(failed)?;
        let source: Arc<dyn PageSource> = Arc::new(FilePages(file));
        let mut changed = runs;
        if let Some(tracking) = &self.tracking {
            let comparing = Instant::now();
            let unchanged = tracking.unchanged_of_segment(&segment, &changed, &source)?;
            builder.leave_in_parent(&unchanged);
            changed = difference(&changed, &unchanged);
            self.comparing += comparing.elapsed();
        }
        self.send_paced(&mut builder, &source, &changed)?;
        self.counts.shared_scanned += segment.size.div_ceil(PAGE_SIZE);
        let stats = builder.finish(self.writer, &mut self.pump, self.server.as_mut())?;
        self.counts.shared_written += stats.pages;
        self.counts.shared_in_parent += stats.in_parent;
        Ok(())
    }

    fn send_paced(
        &mut self,
        builder: &mut PagemapOut,
        source: &Arc<dyn PageSource>,
        runs: &[PageRun],
    ) -> Result<(), DumpError> {
        let (pump, watch) = (&mut self.pump, &self.watch);
        let mut send = |runs: &[PageRun]| match watch.as_ref().is_some_and(Watch::is_cancelled) {
            true => Err(DumpError::Cancelled),
            false => builder.send(pump, source, runs),
        };
        match &mut self.pace {
            Some(pace) => pace.send(runs, send),
            None => send(runs),
        }
    }

    fn begin(&mut self, target: Target) -> Result<PagemapOut, DumpError> {
        if self.server.is_some() {
            return Ok(PagemapOut::to_server(target));
        }
        self.pages_id += 1;
        if let Some(store) = &self.store {
            return Ok(PagemapOut::to_store(target, self.pages_id, store.clone()));
        }
        let (kind, id) = target.image();
        let mut builder = PagemapBuilder::create(self.writer, kind, id, self.pages_id)?;
        if self.hashes {
            builder.hash_now(self.writer);
        }
        Ok(PagemapOut::Files(builder))
    }

    /// Waits until every page is in its file, or at the page server.
    pub fn drain(&mut self) -> Result<floe_memory::Copied, DumpError> {
        if let Some(mut server) = self.server.take() {
            return Ok(server.finish()?);
        }
        Ok(self.pump.drain()?)
    }
}

/// What is needed to copy a task's memory while it runs.
#[derive(Debug)]
pub struct LiveTask {
    pub pid: HostPid,
    /// Its pid in the images.
    pub number: u32,
    pub pagemap: OwnedFd,
    pub source: Arc<dyn PageSource>,
    pub areas: Vec<Area>,
}

/// The part of a set that lies in `range`.
fn pages_inside(runs: &[PageRun], range: Range<u64>) -> Vec<PageRun> {
    let all = PageRun {
        start: range.start,
        pages: (range.end - range.start) / PAGE_SIZE,
    };
    let first = runs.partition_point(|run| run.end() <= range.start);
    intersection(&runs[first..], &[all])
}

/// Whether two mappings are scanned as one. A gap between them could be terabytes wide, which is slow
/// where the kernel tells page by page.
fn are_neighbours(one: &Vma, next: &Vma) -> bool {
    one.pages == next.pages && one.entry.end == next.entry.start
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
