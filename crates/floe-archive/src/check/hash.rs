//! Comparing files with their checksums.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use floe_image::PagesReader;
use floe_image::manifest::Manifest;

use super::{COPY_AGAIN, Row, sentence};
use crate::Generation;

/// What was hashed.
#[derive(Clone, Copy, Debug, Default)]
pub struct HashReport {
    /// Bytes hashed.
    pub bytes: u64,
    /// Time that it took.
    pub time: Duration,
}

/// Compares each file of a generation that has a checksum with it.
pub(super) fn check(
    generation: &Generation,
    threads: usize,
    rows: &mut Vec<Row>,
    report: &mut HashReport,
) {
    let Some(manifest) = &generation.manifest else {
        return;
    };
    let started = Instant::now();
    let hashed: Vec<_> = manifest
        .files
        .iter()
        .filter_map(|(name, file)| Some((name, file.blake3.as_deref()?)))
        .collect();
    let (next, good, bytes, bad) = (
        AtomicUsize::new(0),
        AtomicUsize::new(0),
        AtomicU64::new(0),
        Mutex::new(Vec::new()),
    );
    let work = || {
        while let Some((name, wanted)) = hashed.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = generation.dir.path().join(name.as_str());
            let row = match generation.dir.open_content(name) {
                Ok(Some(content)) => match hash(&content, &bytes) {
                    Ok(found) if found.to_hex().as_str() == *wanted => {
                        good.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    Ok(_) => Row::bad(
                        "checksums",
                        format!("{} is not as it was when it was made", path.display()),
                        COPY_AGAIN,
                    ),
                    Err(error) => Row::bad(
                        "checksums",
                        format!("{} cannot be read: {error}", path.display()),
                        COPY_AGAIN,
                    ),
                },
                // Its absence has its own row.
                Ok(None) => continue,
                Err(error) => Row::bad("checksums", sentence(&error), COPY_AGAIN),
            };
            bad.lock()
                .expect("nobody panics while holding the rows")
                .push(row);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(hashed.len()) {
            // Without a thread the others do its part.
            let _ = std::thread::Builder::new()
                .name("floe-hash".into())
                .spawn_scoped(scope, work);
        }
        work();
    });
    let bad = bad
        .into_inner()
        .expect("nobody panics while holding the rows");
    if bad.is_empty() {
        rows.push(Row::good(
            "checksums",
            format!(
                "generation {}: {} files are as they were made",
                manifest.generation,
                good.into_inner()
            ),
        ));
    }
    rows.extend(without_checksum(manifest));
    rows.extend(bad);
    report.bytes += bytes.into_inner();
    report.time += started.elapsed();
}

fn hash(content: &PagesReader, bytes: &AtomicU64) -> io::Result<blake3::Hash> {
    bytes.fetch_add(content.size()?, Ordering::Relaxed);
    content.hash()
}

/// The files of which only the size is known, as a note.
fn without_checksum(manifest: &Manifest) -> Option<Row> {
    let without: Vec<_> = manifest
        .files
        .iter()
        .filter(|(_, file)| file.blake3.is_none())
        .map(|(name, _)| name.as_str())
        .collect();
    let shown = without
        .iter()
        .take(3)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    let more = if without.len() > 3 { ", ..." } else { "" };
    let what = format!(
        "generation {}: {} files have no checksum, their sizes were compared ({shown}{more})",
        manifest.generation,
        without.len()
    );
    (!without.is_empty()).then(|| Row::note("checksums", what))
}
