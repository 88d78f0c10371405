//! `--display-stats`: what the engine wrote to `stats-dump` or `stats-restore`, in CRIU's words.

use std::path::Path;

use floe_image::catalogue::{STATS_DUMP, STATS_RESTORE};
use floe_image::messages::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};
use floe_image::{ImageDir, ImageError, ImageKind};

/// Reads the statistics of a dump.
pub fn of_dump(work_dir: &Path) -> Result<Option<DumpStatsEntry>, ImageError> {
    let stats: Option<StatsEntry> =
        ImageDir::open(work_dir)?.read_optional(ImageKind::Stats, STATS_DUMP)?;
    Ok(stats.and_then(|stats| stats.dump))
}

/// Reads the statistics of a restore.
pub fn of_restore(work_dir: &Path) -> Result<Option<RestoreStatsEntry>, ImageError> {
    let stats: Option<StatsEntry> =
        ImageDir::open(work_dir)?.read_optional(ImageKind::Stats, STATS_RESTORE)?;
    Ok(stats.and_then(|stats| stats.restore))
}

/// The lines that CRIU prints after a dump.
pub fn dump_text(stats: &DumpStatsEntry) -> String {
    let mut text = String::from("Displaying dump stats:\n");
    text.push_str(&time("Freezing time", stats.freezing_time));
    text.push_str(&time("Frozen time", stats.frozen_time));
    text.push_str(&time("Memory dump time", stats.memdump_time));
    text.push_str(&time("Memory write time", stats.memwrite_time));
    if let Some(resolve) = stats.irmap_resolve {
        text.push_str(&time("IRMAP resolve time", resolve));
    }
    text.push_str(&pages("Memory pages scanned", stats.pages_scanned));
    text.push_str(&pages(
        "Memory pages skipped from parent",
        stats.pages_skipped_parent,
    ));
    text.push_str(&pages("Memory pages written", stats.pages_written));
    text.push_str(&pages("Lazy memory pages", stats.pages_lazy));
    text
}

/// The lines that CRIU prints after a restore.
pub fn restore_text(stats: &RestoreStatsEntry) -> String {
    let mut text = String::from("Displaying restore stats:\n");
    text.push_str(&pages("Pages compared", stats.pages_compared));
    text.push_str(&pages("Pages skipped COW", stats.pages_skipped_cow));
    if let Some(restored) = stats.pages_restored {
        text.push_str(&pages("Pages restored", restored));
    }
    text.push_str(&time("Restore time", stats.restore_time));
    text.push_str(&time("Forking time", stats.forking_time));
    text
}

fn time(name: &str, microseconds: u32) -> String {
    format!("{name}: {microseconds} us\n")
}

fn pages(name: &str, count: u64) -> String {
    format!("{name}: {count} (0x{count:x})\n")
}
