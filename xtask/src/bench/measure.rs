//! One dump and one restore of one workload.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use testkit::{Engine, Fixture};

/// What one round gave.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// The longest time that the workload did not run, by its own clock.
    pub freeze: Duration,
    /// From the start of the dumping command to its end.
    pub dump: Duration,
    /// The same of the restoring command.
    pub restore: Duration,
    /// Bytes that the images take on disk.
    pub size: u64,
    /// The most memory that the engine held, dumping or restoring, in bytes.
    pub memory: u64,
}

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "freeze {:.2?}, dump {:.2?}, restore {:.2?}, {} KiB, engine {} KiB",
            self.freeze,
            self.dump,
            self.restore,
            self.size >> 10,
            self.memory >> 10
        )
    }
}

/// Starts the workload, dumps it while it runs on, kills it, restores and checks it.
pub fn once(workload: &str, engine: &Engine, place: &Path) -> anyhow::Result<Measurement> {
    let mut fixture = Fixture::start_in(workload, place)?;
    let clock = File::options()
        .read(true)
        .write(true)
        .open(fixture.home().join("clock"))
        .context("the workload's clock")?;
    clock.write_all_at(&[0; 8], 0)?;
    let dump = fixture.dump(engine, &["--leave-running"])?;
    // The gap is whole when the clock has looked again after the dump.
    let looks = word(&clock, 8)?;
    while word(&clock, 8)? < looks + 2 {
        fixture.check().context("after the dump")?;
    }
    let gap = word(&clock, 0)?;
    fixture.kill()?;
    let size = size(fixture.images())?;
    let restore = fixture.restore(engine, &[])?;
    fixture.check().context("after the restore")?;
    fixture.kill()?;
    Ok(Measurement {
        freeze: Duration::from_nanos(gap),
        dump: dump.took,
        restore: restore.took,
        size,
        memory: dump.memory.max(restore.memory),
    })
}

fn word(clock: &File, at: u64) -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    clock.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn size(images: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(images)? {
        let meta = entry?.metadata()?;
        if meta.is_file() {
            bytes += meta.blocks() * 512;
        }
    }
    Ok(bytes)
}
