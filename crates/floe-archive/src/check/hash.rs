//! Comparing files with their checksums.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use floe_image::manifest::{Manifest, ManifestFile};
use floe_image::{ImageKind, PagesReader};

use super::{COPY_AGAIN, Row, sentence};
use crate::Generation;
use crate::chain::kind_of;

/// Largest file that a restore compares before it begins, in bytes: about a millisecond.
const SMALL: u64 = 4 << 20;
/// Files for which no second thread is started.
const FOR_ONE_THREAD: usize = 2;
const CHANGED: &str = "copy the checkpoint again into an empty directory, or dump again; \
     if it was edited on purpose, remove floe.json, without which nothing is compared";

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
    let (good, bytes, bad) = compare(generation, threads, |_, _| true);
    if bad.is_empty() {
        let number = manifest.generation;
        let text = format!("generation {number}: {good} files are as they were made");
        rows.push(Row::good("checksums", text));
    }
    rows.extend(without_checksum(manifest));
    rows.extend(bad);
    report.bytes += bytes;
    report.time += started.elapsed();
}

/// Compares the small files of a generation, which take no time to read, with their checksums.
pub(super) fn small(generation: &Generation, threads: usize) -> Vec<Row> {
    let is_small = |name: &str, file: &ManifestFile| {
        file.size <= SMALL && !matches!(kind_of(name), Some((ImageKind::Pages, _)))
    };
    let (good, _, bad) = compare(generation, threads, is_small);
    match bad.is_empty() && good > 0 {
        true => vec![Row::good(
            "checksums",
            format!(
                "generation {}: {good} files are as they were made, pages were not read",
                generation
                    .manifest
                    .as_ref()
                    .map_or(0, |manifest| manifest.generation)
            ),
        )],
        false => bad,
    }
}

/// Compares the files that are wanted: how many are as they were, their bytes, and what is wrong.
fn compare(
    generation: &Generation,
    threads: usize,
    is_wanted: impl Fn(&str, &ManifestFile) -> bool,
) -> (usize, u64, Vec<Row>) {
    let listed = generation
        .manifest
        .iter()
        .flat_map(|manifest| &manifest.files);
    let listed = listed.filter(|(name, file)| is_wanted(name, file));
    let hashed: Vec<_> = listed
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
                        CHANGED,
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
        for _ in 1..threads.min(hashed.len() / FOR_ONE_THREAD) {
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
    (good.into_inner(), bytes.into_inner(), bad)
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
