//! A chain seen as one checkpoint: each page where it is newest.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use floe_image::catalogue::ImageKind;
use floe_image::dir::{PARENT_LINK, PE_LAZY, PE_PARENT, PE_PRESENT};
use floe_image::manifest::{DumpKind, MANIFEST_NAME, Manifest, ManifestInfo, RoundFacts};
use floe_image::messages::{PagemapEntry, PagemapHead, PstreeEntry};
use floe_image::schema::ImageMessage;
use floe_image::{ImageDir, ImageError};
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{IndexError, PageIndex, StoredRun};

use crate::chain::kind_of;
use crate::{Chain, ChainError};

/// Consecutive pages of the merged checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergedRun {
    /// In a pages file of the chain.
    Stored(StoredRun),
    /// Older than what was asked for: the base has them.
    InBase { start: u64, len: u64 },
}

/// One address space or segment.
#[derive(Debug)]
pub struct MergedPages {
    /// Kind of its pagemap.
    pub kind: ImageKind,
    /// Number of its pagemap.
    pub id: u64,
    /// Number of its pages file.
    pub pages_id: u32,
    /// The pages in the order of their addresses.
    pub runs: Vec<MergedRun>,
    /// Opens the files that the runs name.
    pub index: PageIndex,
    /// By file: addresses whose pages may be restored later.
    lazy: Vec<Vec<Range<u64>>>,
}

/// A chain, or its newer part.
#[derive(Debug)]
pub struct Merged {
    /// The chain.
    pub chain: Chain,
    /// Number of the oldest generation in it.
    pub first: u32,
    /// Number of the newest.
    pub last: u32,
    /// How each generation in it was made.
    pub rounds: Vec<RoundFacts>,
    /// All memory.
    pub memory: Vec<MergedPages>,
    /// Names of the files that are taken as they are.
    pub files: Vec<String>,
}

/// A chain cannot be seen as one.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The chain cannot be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A page is not where it should be.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The generation is none of the chain, or the newest.
    #[error(
        "There is nothing after generation {since}: the chain has generations {first} to {last}"
    )]
    NoSuchGeneration { since: u32, first: u32, last: u32 },
}

impl Merged {
    /// Reads the chain of `newest`; with `since`, only what is newer than that generation.
    pub fn read(newest: &ImageDir, since: Option<u32>) -> Result<Merged, MergeError> {
        let chain = Chain::open(newest)?;
        let (oldest, last) = (chain.number(0), chain.newest_number());
        if let Some(since) = since.filter(|since| *since < oldest || *since >= last) {
            return Err(MergeError::NoSuchGeneration {
                since,
                first: oldest,
                last,
            });
        }
        let mut images = newest.images()?;
        let births = births(newest)?;
        // In the order of a restore: segments, then tasks, parents first.
        images.sort_by_key(|(kind, id)| {
            let birth = births.iter().position(|pid| Some(*pid) == *id);
            (*kind == ImageKind::Pagemap, birth, *id)
        });
        let mut memory = Vec::new();
        for (kind, id) in images {
            if matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
                memory.push(merged_pages(&chain, (kind, id.unwrap_or(0)), since)?);
            }
        }
        let mut files = newest.file_names()?;
        files.retain(|name| is_taken(newest, name));
        files.sort();
        let mut rounds = crate::rounds::of_chain(&chain)?;
        rounds.retain(|round| since.is_none_or(|since| round.number > since));
        Ok(Merged {
            rounds,
            first: since.map_or(oldest, |since| since + 1),
            chain,
            last,
            memory,
            files,
        })
    }
}

impl Merged {
    /// Whether the newest generation can be restored.
    pub fn kind(&self) -> DumpKind {
        match self.chain.newest().is_pre_dump() {
            true => DumpKind::PreDump,
            false => DumpKind::Full,
        }
    }

    /// The id of the generation before the oldest in it.
    fn base_id(&self) -> Option<String> {
        let before = self.first.checked_sub(self.chain.number(0) + 1)?;
        let base = self.chain.generations().get(before as usize)?;
        base.manifest.as_ref()?.id.clone()
    }

    /// When the newest generation was made; now, where nothing says so.
    pub fn created(&self) -> SystemTime {
        let manifest = self.chain.newest().manifest.as_ref();
        manifest.map_or_else(SystemTime::now, |manifest| {
            UNIX_EPOCH + Duration::from_secs(manifest.created)
        })
    }

    /// The facts of the merged checkpoint, which builds on `parent`.
    pub fn manifest_info(&self, parent: Option<String>) -> ManifestInfo {
        let manifest = self.chain.newest().manifest.as_ref();
        let text = |of: fn(&Manifest) -> &String| {
            manifest.map_or_else(String::new, |manifest| of(manifest).clone())
        };
        ManifestInfo {
            kind: self.kind(),
            generation: self.last,
            id: manifest.and_then(|manifest| manifest.id.clone()),
            parent_id: parent.is_some().then(|| self.base_id()).flatten(),
            parent,
            tracker: manifest.and_then(|manifest| manifest.tracker.clone()),
            floe: text(|manifest| &manifest.floe),
            kernel: text(|manifest| &manifest.kernel),
            machine: text(|manifest| &manifest.machine),
            cpu: manifest.and_then(|manifest| manifest.cpu.clone()),
            created: self.created(),
            rounds: self.rounds.clone(),
        }
    }
}

/// Pids in the order in which a restore makes the tasks; none for a pre-dump.
fn births(dir: &ImageDir) -> Result<Vec<u64>, ImageError> {
    let tree: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree, 0)?;
    Ok(tree.iter().map(|task| u64::from(task.pid)).collect())
}

/// Images and statistics are taken; memory is merged, links and other directories are left.
pub(crate) fn is_taken(dir: &ImageDir, name: &str) -> bool {
    if [PARENT_LINK, MANIFEST_NAME].contains(&name) {
        return false;
    }
    let memory = [
        ImageKind::Pagemap,
        ImageKind::ShmemPagemap,
        ImageKind::Pages,
    ];
    let is_image = match kind_of(name) {
        Some((kind, _)) => !memory.contains(&kind),
        None => name.ends_with(".img") || name.ends_with(".tar.gz"),
    };
    let is_file = || {
        dir.open_file(name)
            .ok()
            .flatten()
            .and_then(|file| file.metadata().ok())
            .is_some_and(|found| found.is_file())
    };
    is_image && is_file()
}

fn merged_pages(
    chain: &Chain,
    (kind, id): (ImageKind, u64),
    since: Option<u32>,
) -> Result<MergedPages, MergeError> {
    let newest = &chain.newest().dir;
    let (head, _) = newest.read_pagemap(kind, id)?;
    let index = PageIndex::read(newest, kind, id)?;
    let number_of = |file: u32| {
        let path = index.images(file).path();
        let found = chain
            .generations()
            .iter()
            .position(|generation| generation.dir.path() == path);
        found.map_or(chain.newest_number(), |found| chain.number(found))
    };
    let in_base: Vec<bool> = (0..index.file_count())
        .map(|file| since.is_some_and(|since| number_of(file) <= since))
        .collect();
    let mut runs: Vec<MergedRun> = Vec::new();
    for run in index.runs() {
        if !in_base[run.file as usize] {
            runs.push(MergedRun::Stored(*run));
            continue;
        }
        match runs.last_mut() {
            Some(MergedRun::InBase { start, len }) if *start + *len == run.start => *len += run.len,
            _ => runs.push(MergedRun::InBase {
                start: run.start,
                len: run.len,
            }),
        }
    }
    let lazy = (0..index.file_count()).map(|file| lazy_ranges(index.images(file), kind, id));
    Ok(MergedPages {
        kind,
        id,
        pages_id: head.pages_id,
        runs,
        lazy: lazy.collect::<Result<_, _>>()?,
        index,
    })
}

/// Addresses that an engine marked as such whose pages may be restored later.
fn lazy_ranges(dir: &ImageDir, kind: ImageKind, id: u64) -> Result<Vec<Range<u64>>, ImageError> {
    let (_, entries) = dir.read_pagemap(kind, id)?;
    let lazy = entries.iter().filter(|entry| entry.flags() & PE_LAZY != 0);
    let range = |entry: &PagemapEntry| {
        entry.vaddr
            ..entry
                .vaddr
                .saturating_add(entry.nr_pages().saturating_mul(PAGE_SIZE))
    };
    Ok(lazy.map(range).collect())
}

impl MergedPages {
    /// Bytes in the pages file.
    pub fn stored_bytes(&self) -> u64 {
        self.stored().map(|run| run.len).sum()
    }

    /// What the pages file consists of, in its order.
    pub fn stored(&self) -> impl Iterator<Item = StoredRun> + '_ {
        self.runs.iter().filter_map(|run| match run {
            MergedRun::Stored(run) => Some(*run),
            MergedRun::InBase { .. } => None,
        })
    }

    /// The pagemap image.
    pub fn pagemap(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for magic in self
            .kind
            .first_magic()
            .into_iter()
            .chain([self.kind.magic()])
        {
            bytes.extend_from_slice(&magic.to_le_bytes());
        }
        append(
            &mut bytes,
            &PagemapHead {
                pages_id: self.pages_id,
            },
        );
        // Neighbours that lie in different files are neighbours in the merged one.
        let mut joined: Vec<(u64, u64, u32)> = Vec::new();
        let mut join = |start: u64, len: u64, flags: u32| match joined.last_mut() {
            Some(last) if last.0 + last.1 == start && last.2 == flags => last.1 += len,
            _ => joined.push((start, len, flags)),
        };
        for run in &self.runs {
            match run {
                MergedRun::InBase { start, len } => join(*start, *len, PE_PARENT),
                MergedRun::Stored(run) => {
                    for (part, is_lazy) in split(run, &self.lazy[run.file as usize]) {
                        let lazy = if is_lazy { PE_LAZY } else { 0 };
                        join(part.start, part.end - part.start, PE_PRESENT | lazy);
                    }
                }
            }
        }
        for (vaddr, len, flags) in joined {
            let entry = PagemapEntry {
                vaddr,
                flags: Some(flags),
                nr_pages: Some(len / PAGE_SIZE),
                ..PagemapEntry::default()
            };
            append(&mut bytes, &entry);
        }
        bytes
    }
}

/// Cuts a run where laziness begins and ends; the ranges are in the order of their addresses.
fn split(run: &StoredRun, lazy: &[Range<u64>]) -> Vec<(Range<u64>, bool)> {
    let mut parts = Vec::new();
    let mut at = run.start;
    let first = lazy.partition_point(|range| range.end <= run.start);
    for range in lazy[first..]
        .iter()
        .take_while(|range| range.start < run.end())
    {
        if range.start > at {
            parts.push((at..range.start, false));
        }
        let (from, to) = (range.start.max(at), range.end.min(run.end()));
        parts.push((from..to, true));
        at = to;
    }
    if at < run.end() {
        parts.push((at..run.end(), false));
    }
    parts
}

fn append<M: ImageMessage>(bytes: &mut Vec<u8>, message: &M) {
    bytes.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
    message.encode_raw(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_laziness_begins_and_ends() {
        let run = StoredRun {
            start: 10,
            len: 10,
            file: 0,
            offset: 0,
        };
        let parts = |lazy: &[Range<u64>]| {
            let parts = split(&run, lazy);
            let shown = parts
                .iter()
                .map(|(part, lazy)| (part.start, part.end, *lazy));
            shown.collect::<Vec<_>>()
        };
        assert_eq!(parts(&[]), [(10, 20, false)]);
        assert_eq!(parts(&[0..5, 0..30]), [(10, 20, true)]);
        assert_eq!(
            parts(&[5..12, 14..16, 18..40]),
            [
                (10, 12, true),
                (12, 14, false),
                (14, 16, true),
                (16, 18, false),
                (18, 20, true)
            ]
        );
    }
}
