//! What is in a checkpoint, as data: for `floe inspect` and `floe report`.

mod segments;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use floe_image::catalogue::ImageKind;
use floe_image::explore;
use floe_image::manifest::RoundFacts;
use floe_image::messages::{
    CoreEntry, FdTypes, FdinfoEntry, FileEntry, InetSkEntry, UnixSkEntry, VmaEntry,
};
use floe_image::{ImageDir, ImageError};
use floe_memory::{IndexError, PageIndex};
pub use segments::SegmentSummary;
use segments::Segments;
use serde::Serialize;

use crate::rounds::kind_word;
use crate::{Chain, ChainError};

/// A checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub path: String,
    /// `full` or `pre-dump`.
    pub kind: &'static str,
    /// Version of Floe; `None` for another engine's images.
    pub floe: Option<String>,
    pub kernel: Option<String>,
    pub machine: Option<String>,
    /// Seconds since 1970 UTC.
    pub created: Option<u64>,
    /// How each was made, oldest first; also those that were merged into one.
    pub generations: Vec<GenerationSummary>,
    /// How many of the newest are there by themselves, not merged.
    pub directories: usize,
    pub tasks: Vec<TaskSummary>,
    pub mappings: Vec<MappingSummary>,
    pub segments: Vec<SegmentSummary>,
    pub files: Vec<FileSummary>,
    pub sockets: Vec<FileSummary>,
    /// Bytes of pages in all address spaces and segments, each page once; of a pre-dump nothing else tells.
    #[serde(skip)]
    pages: u64,
}

/// How one generation was made.
#[derive(Clone, Debug, Serialize)]
pub struct GenerationSummary {
    #[serde(flatten)]
    pub facts: RoundFacts,
    /// Bytes of pages that the program changed in a second before it; `None` where it is not known.
    pub dirty_rate: Option<u64>,
}

fn generation_summaries(rounds: Vec<RoundFacts>) -> Vec<GenerationSummary> {
    let mut before: Option<u64> = None;
    let summary = |facts: RoundFacts| {
        let since = std::mem::replace(&mut before, facts.began_us);
        let micros = facts
            .began_us
            .zip(since)
            .and_then(|(now, then)| now.checked_sub(then));
        // A generation that found nothing unchanged copied all, changed or not.
        let rate = micros.filter(|micros| *micros > 0 && facts.unchanged > 0);
        let rate = rate.map(|micros| u128::from(facts.copied) * 1_000_000 / u128::from(micros));
        GenerationSummary {
            dirty_rate: rate.map(|rate| rate as u64),
            facts,
        }
    };
    rounds.into_iter().map(summary).collect()
}

/// One task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskSummary {
    pub pid: u32,
    pub pgid: u32,
    pub sid: u32,
    /// Ancestors above it.
    pub depth: usize,
    pub comm: String,
    /// The security label: a profile of AppArmor's, a context of SELinux's.
    pub label: Option<String>,
    pub state: &'static str,
    pub threads: usize,
    pub descriptors: usize,
    /// Bytes of address space.
    pub mapped: u64,
    /// Bytes of pages in the checkpoint.
    pub stored: u64,
}

/// One mapping.
#[derive(Clone, Debug, Serialize)]
pub struct MappingSummary {
    pub pid: u32,
    pub start: u64,
    pub end: u64,
    pub protection: String,
    pub object: String,
    /// Bytes of pages by the generation in which they are newest, for each of the [`Summary::directories`], oldest first.
    pub stored: Vec<u64>,
}

/// One open file or socket.
#[derive(Clone, Debug, Serialize)]
pub struct FileSummary {
    pub kind: String,
    pub text: String,
    /// `PID:FD` of each descriptor.
    pub holders: Vec<String>,
}

/// A checkpoint cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum SummaryError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl Summary {
    /// Reads all of it but the pages.
    pub fn read(dir: &ImageDir) -> Result<Summary, SummaryError> {
        let chain = Chain::open(dir)?;
        let manifest = chain.newest().manifest.as_ref();
        let generations = generation_summaries(crate::rounds::of_chain(&chain)?);
        let files = dir.read_files()?;
        let by_id: BTreeMap<u32, &FileEntry> =
            files.iter().map(|file| (file.id, &**file)).collect();
        let mut reader = TaskReader {
            dir,
            chain: &chain,
            files: &by_id,
            holders: BTreeMap::new(),
            mappings: Vec::new(),
            segments: Segments::read(dir)?,
        };
        let mut tasks = Vec::new();
        if dir.has(ImageKind::Pstree, 0) {
            for line in explore::tasks(dir)? {
                tasks.push(reader.task(line)?);
            }
        }
        let (mappings, mut holders) = (reader.mappings, reader.holders);
        let segments = reader.segments.finish(dir, &chain)?;
        let (mut plain, mut sockets) = (Vec::new(), Vec::new());
        for file in &files {
            let summary = FileSummary {
                kind: kind_of(file),
                text: describe(file, &by_id),
                holders: holders.remove(&file.id).unwrap_or_default(),
            };
            let is_socket = file.usk.is_some()
                || file.isk.is_some()
                || file.nlsk.is_some()
                || file.psk.is_some();
            if is_socket {
                sockets.push(summary)
            } else {
                plain.push(summary)
            }
        }
        // What is open comes before what is only mapped.
        plain.sort_by_key(|file| file.holders.is_empty());
        Ok(Summary {
            path: dir.path().display().to_string(),
            kind: kind_word(chain.newest().is_pre_dump()),
            floe: manifest.map(|manifest| manifest.floe.clone()),
            kernel: manifest.map(|manifest| manifest.kernel.clone()),
            machine: manifest.map(|manifest| manifest.machine.clone()),
            created: manifest.map(|manifest| manifest.created),
            generations,
            directories: chain.generations().len(),
            tasks,
            mappings,
            segments,
            pages: pages(dir)?,
            files: plain,
            sockets,
        })
    }

    /// Bytes of pages in the checkpoint, each page once.
    pub fn stored(&self) -> u64 {
        self.pages
    }
}

fn pages(dir: &ImageDir) -> Result<u64, SummaryError> {
    let mut bytes = 0;
    for (kind, id) in dir.images()? {
        if matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            let index = PageIndex::read(dir, kind, id.unwrap_or(0))?;
            bytes += index.runs().iter().map(|run| run.len).sum::<u64>();
        }
    }
    Ok(bytes)
}

/// Bytes of pages in a range by the generation in which they are newest, oldest first.
fn by_generation(chain: &Chain, pages: &PageIndex, range: Range<u64>) -> Vec<u64> {
    let generations = chain.generations();
    let mut stored = vec![0; generations.len()];
    for run in pages.runs_in(range) {
        let path = pages.images(run.file).path();
        let found = generations
            .iter()
            .position(|generation| generation.dir.path() == path);
        stored[found.unwrap_or(generations.len() - 1)] += run.len;
    }
    stored
}

struct TaskReader<'a> {
    dir: &'a ImageDir,
    chain: &'a Chain,
    files: &'a BTreeMap<u32, &'a FileEntry>,
    holders: BTreeMap<u32, Vec<String>>,
    mappings: Vec<MappingSummary>,
    segments: Segments,
}

impl TaskReader<'_> {
    fn task(&mut self, line: explore::TaskLine) -> Result<TaskSummary, SummaryError> {
        let (dir, pid) = (self.dir, line.pid);
        let core: CoreEntry = dir.read_core(pid.into())?;
        let state = match core.tc.as_ref().map(|task| task.task_state) {
            Some(2 | 6) => "zombie",
            Some(3) => "stopped",
            _ => "running",
        };
        let table = dir.read_ids(pid.into())?.map_or(pid, |ids| ids.files_id);
        let descriptors: Vec<FdinfoEntry> = dir.read_all(ImageKind::Fdinfo, table.into())?;
        for fd in &descriptors {
            self.holders
                .entry(fd.id)
                .or_default()
                .push(format!("{pid}:{}", fd.fd));
        }
        let before = self.mappings.len();
        if dir.has(ImageKind::Mm, pid.into()) {
            let pages = match dir.has(ImageKind::Pagemap, pid.into()) {
                true => PageIndex::read(dir, ImageKind::Pagemap, pid.into())?,
                false => PageIndex::default(),
            };
            for vma in dir.read_mm(pid.into())?.vmas {
                self.segments.note(pid, &vma, self.files);
                self.mappings.push(self.mapping(pid, &vma, &pages));
            }
        }
        let threads = dir
            .read_all::<floe_image::messages::PstreeEntry>(ImageKind::Pstree, 0)?
            .into_iter()
            .find(|task| task.pid == pid)
            .map_or(1, |task| task.threads.len());
        let own = &self.mappings[before..];
        Ok(TaskSummary {
            pid,
            pgid: line.pgid,
            sid: line.sid,
            depth: line.depth,
            comm: line.comm,
            label: line.label,
            state,
            threads,
            descriptors: descriptors.len(),
            mapped: own.iter().map(|mapping| mapping.end - mapping.start).sum(),
            stored: own.iter().flat_map(|mapping| &mapping.stored).sum(),
        })
    }

    fn mapping(&self, pid: u32, vma: &VmaEntry, pages: &PageIndex) -> MappingSummary {
        let letters = [(1, 'r'), (2, 'w'), (4, 'x')];
        MappingSummary {
            pid,
            start: vma.start,
            end: vma.end.max(vma.start),
            protection: letters
                .iter()
                .map(|(bit, letter)| if vma.prot & bit != 0 { *letter } else { '-' })
                .collect(),
            object: self.object(vma),
            stored: by_generation(self.chain, pages, vma.start..vma.end),
        }
    }

    /// What a mapping is of, by `vma_entry.status`.
    fn object(&self, vma: &VmaEntry) -> String {
        let words = [
            (2, "[stack]"),
            (4, "[vsyscall]"),
            (8, "[vdso]"),
            (32, "[heap]"),
            (256, "[shared]"),
            (1024, "[sysv]"),
            (2048, "[packet ring]"),
            (4096, "[vvar]"),
            (8192, "[aio]"),
            (16384, "[memfd]"),
        ];
        if let Some((_, word)) = words.iter().find(|(bit, _)| vma.status & bit != 0) {
            return (*word).to_owned();
        }
        let file = u32::try_from(vma.shmid)
            .ok()
            .and_then(|id| self.files.get(&id));
        match file.filter(|_| vma.status & (64 | 128) != 0) {
            Some(file) => describe(file, self.files),
            None => "[anonymous]".to_owned(),
        }
    }
}

fn kind_of(file: &FileEntry) -> String {
    if let Some(socket) = &file.isk {
        return if socket.proto == 6 { "tcp" } else { "udp" }.to_owned();
    }
    match FdTypes::try_from(file.r#type) {
        Ok(FdTypes::Reg) => "file".into(),
        Ok(FdTypes::Unixsk) => "unix".into(),
        Ok(kind) => format!("{kind:?}").to_lowercase(),
        Err(_) => format!("kind {}", file.r#type),
    }
}

fn describe(file: &FileEntry, files: &BTreeMap<u32, &FileEntry>) -> String {
    let named = |id: Option<u32>| {
        let named = id
            .and_then(|id| files.get(&id))
            .and_then(|file| file.reg.as_ref());
        named.map(|file| file.name.clone())
    };
    if let Some(file) = &file.reg {
        return file.name.clone();
    }
    if let Some(pipe) = &file.pipe {
        return format!("pipe {}", pipe.pipe_id);
    }
    if let Some(fifo) = &file.fifo {
        return named(fifo.regf_id).unwrap_or_else(|| format!("fifo {}", fifo.pipe_id));
    }
    if let Some(tty) = &file.tty {
        return named(tty.regf_id).unwrap_or_else(|| "terminal".into());
    }
    if let Some(socket) = &file.usk {
        return unix(socket);
    }
    if let Some(socket) = &file.isk {
        return inet(socket);
    }
    if let Some(event) = &file.efd {
        return format!("eventfd with {}", event.counter);
    }
    format!("id {:#x}", file.id)
}

fn unix(socket: &UnixSkEntry) -> String {
    let name = String::from_utf8_lossy(&socket.name).replace('\0', "@");
    let peer = match socket.peer {
        0 => String::new(),
        peer => format!(" <-> {peer}"),
    };
    format!("{} {name}{peer}", socket.ino).trim_end().to_owned()
}

fn inet(socket: &InetSkEntry) -> String {
    let state = match socket.state {
        1 => "established",
        7 => "closed",
        8 => "close-wait",
        10 => "listening",
        _ => "",
    };
    let from = format!("{}:{}", address(&socket.src_addr), socket.src_port);
    let to = match socket.dst_port {
        0 => String::new(),
        port => format!(" -> {}:{port}", address(&socket.dst_addr)),
    };
    format!("{from}{to} {state}").trim_end().to_owned()
}

/// Words as they lie in memory, in network order.
fn address(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Ipv4Addr::from(bytes).to_string();
    }
    match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(bytes) => format!("[{}]", Ipv6Addr::from(bytes)),
        Err(_) => "?".into(),
    }
}
