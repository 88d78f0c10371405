//! What a dump tells about itself: the result of [`crate::dump`], and `stats-dump`.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use floe_image::ImageKind;
use floe_image::catalogue::{SERVICE_MAGIC, STATS_DUMP};
use floe_image::messages::{DumpStatsEntry, StatsEntry};
use floe_options::Place;
use prost::Message;

use crate::memory::MemoryCounts;

/// Times, counts and sizes of one dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DumpReport {
    /// From the first stop to the last.
    pub freezing: Duration,
    /// From the first stop until the tasks could go on (or were killed).
    pub frozen: Duration,
    /// Reading memory, summed over threads.
    pub memory_reading: Duration,
    /// Writing memory, summed over threads.
    pub memory_writing: Duration,
    /// Finding out which pages of shared memory a round has to copy.
    pub shared_comparing: Duration,
    /// All of it.
    pub total: Duration,
    pub tasks: usize,
    pub threads: usize,
    pub files: usize,
    pub memory: MemoryCounts,
    /// Size of all images.
    pub image_bytes: u64,
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

impl DumpReport {
    /// The content of `stats-dump`.
    fn entry(&self) -> StatsEntry {
        let dump = DumpStatsEntry {
            freezing_time: micros(self.freezing),
            frozen_time: micros(self.frozen),
            memdump_time: micros(self.memory_reading),
            memwrite_time: micros(self.memory_writing),
            pages_scanned: self.memory.pages_scanned,
            pages_skipped_parent: self.memory.pages_in_parent,
            pages_written: self.memory.pages_written,
            irmap_resolve: Some(0),
            pages_lazy: 0,
            page_pipes: Some(0),
            page_pipe_bufs: Some(0),
            shpages_scanned: Some(self.memory.shared_scanned),
            shpages_skipped_parent: Some(self.memory.shared_in_parent),
            shpages_written: Some(self.memory.shared_written),
        };
        StatsEntry {
            dump: Some(dump),
            restore: None,
        }
    }

    /// Writes `stats-dump` into the work directory. The dump is whole by now, with or without.
    pub fn write_statistics(&self, place: &Place) {
        let path = place.work_file(ImageKind::Stats.file_name(STATS_DUMP));
        let entry = self.entry();
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&SERVICE_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&ImageKind::Stats.magic().to_le_bytes());
        bytes.extend_from_slice(&(entry.encoded_len() as u32).to_le_bytes());
        entry.encode_raw(&mut bytes);
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&bytes));
        if let Err(error) = written {
            tracing::warn!(%error, "the statistics cannot be written to {}", path.display());
        }
    }
}
