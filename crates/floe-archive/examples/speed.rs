//! How fast packing, unpacking and checking are, beside zstd alone on the same bytes:
//! `speed DIR [LEVEL]`, where DIR is a checkpoint or the newest of a chain.

use std::fs::File;
use std::path::Path;
use std::time::Instant;

use floe_archive::merged::Merged;
use floe_archive::pack::{PackOptions, pack};
use floe_archive::unpack::{UnpackLimits, unpack};
use floe_archive::{check, squash::squash};
use floe_image::ImageDir;

const LIMITS: UnpackLimits = UnpackLimits { bytes: u64::MAX };

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = ImageDir::open(args.next().ok_or("a directory is needed")?)?;
    let level = args.next().map_or(Ok(3), |level| level.parse())?;
    let threads = std::thread::available_parallelism()?.get();
    let scratch = tempfile::tempdir_in("/dev/shm")?;
    let content = content(&dir)?;
    let rate = |what: &str, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{what:34} {seconds:6.2} s {:7.0} MiB/s",
            content.len() as f64 / seconds / f64::from(1 << 20)
        );
    };
    for _ in 0..2 {
        let start = Instant::now();
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level)?;
        std::io::Write::write_all(&mut encoder, &content)?;
        let alone = encoder.finish()?;
        rate("zstd, one thread, memory to memory", start);
        let start = Instant::now();
        zstd::stream::copy_decode(alone.as_slice(), std::io::sink())?;
        rate("zstd decoding, to nowhere", start);
        for threads in [1, threads] {
            let archive = scratch.path().join("archive");
            let start = Instant::now();
            pack(
                &dir,
                File::create(&archive)?,
                &PackOptions {
                    since: None,
                    level,
                    threads,
                },
            )?;
            rate(&format!("pack, {threads} threads"), start);
            println!(
                "    {} bytes, zstd alone {}",
                archive.metadata()?.len(),
                alone.len()
            );
        }
        let out = scratch.path().join("out");
        let start = Instant::now();
        unpack(File::open(scratch.path().join("archive"))?, &out, LIMITS)?;
        rate("unpack", start);
        let start = Instant::now();
        let (_, hashed) = check::full(&ImageDir::open(&out)?, threads);
        rate("verify", start);
        println!("    {} bytes hashed", hashed.bytes);
        std::fs::remove_dir_all(&out)?;
        let start = Instant::now();
        squash(&dir, Path::new(&out))?;
        rate("squash", start);
        std::fs::remove_dir_all(&out)?;
    }
    Ok(())
}

/// The pages, as an archive has them.
fn content(dir: &ImageDir) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let merged = Merged::read(dir, None)?;
    let mut content = Vec::new();
    for space in &merged.memory {
        for run in space.stored() {
            let start = content.len();
            content.resize(start + run.len as usize, 0);
            space
                .index
                .open(run.file)?
                .read_exact_at(&mut content[start..], run.offset)?;
        }
    }
    Ok(content)
}
