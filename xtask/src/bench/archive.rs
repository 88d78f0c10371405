//! `cargo xtask bench --group archive`: packing, unpacking and checking, beside `zstd` alone on the same
//! bytes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use testkit::{Engine, Fixture};

/// A GiB of pages.
const WORKLOAD: &str = "bench-pages";
/// The level that `floe pack` has by default.
const LEVEL: &str = "-3";

/// One measured operation.
struct Row {
    name: &'static str,
    /// What we set ourselves.
    mark: Mark,
    floe: Vec<Duration>,
    zstd: Vec<Duration>,
}

/// What an operation must reach.
enum Mark {
    /// This part of the speed of zstd.
    OfZstd(f64),
    /// This many GiB in a second.
    GibPerSecond(f64),
    /// It is shown only.
    None,
}

/// Measures all, and gives the section of the document.
pub fn measure(engine: &Engine, place: &Path, rounds: usize) -> anyhow::Result<String> {
    let mut fixture = Fixture::start_in(WORKLOAD, place)?;
    fixture.dump(engine, &[])?;
    let images = fixture.images().to_path_buf();
    let scratch = images.with_extension("scratch");
    fs::create_dir_all(&scratch)?;
    let pages = images.join("pages-1.img");
    let bytes = fs::metadata(&pages).context("the pages")?.len();
    let threads = std::thread::available_parallelism()?.get();
    let (archive, alone, out) = (scratch.join("a"), scratch.join("z"), scratch.join("out"));
    let row = |name, mark| Row {
        name,
        mark,
        floe: Vec::new(),
        zstd: Vec::new(),
    };
    let mut rows = [
        row("pack", Mark::OfZstd(0.6)),
        row("unpack", Mark::OfZstd(0.6)),
        row("verify a directory", Mark::GibPerSecond(2.0)),
        row("verify an archive", Mark::None),
        row("restore, a directory", Mark::None),
        row("restore, an archive", Mark::None),
        row("restore, a pipe", Mark::None),
    ];
    for round in 0..=rounds {
        let parallel = format!("-T{threads}");
        let [images, archive, alone, out, pages] =
            [&images, &archive, &alone, &out, &pages].map(|path| path.as_os_str());
        let floe = |words: &[&std::ffi::OsStr]| run(Command::new(&engine.path).args(words));
        let zstd = |words: &[&std::ffi::OsStr]| run(Command::new("zstd").args(words));
        let _ = fs::remove_dir_all(out);
        let packed = floe(&["pack".as_ref(), images, "-o".as_ref(), archive])?;
        let packed_alone = zstd(&[
            LEVEL.as_ref(),
            "-qf".as_ref(),
            parallel.as_ref(),
            pages,
            "-o".as_ref(),
            alone,
        ])?;
        let unpacked = floe(&["unpack".as_ref(), archive, "-C".as_ref(), out])?;
        fs::remove_dir_all(out)?;
        let unpacked_alone = zstd(&["-dqf".as_ref(), alone, "-o".as_ref(), out])?;
        fs::remove_file(out)?;
        let check = |path| floe(&["verify".as_ref(), "--no-machine".as_ref(), path]);
        let mut measured = vec![
            (packed, Some(packed_alone)),
            (unpacked, Some(unpacked_alone)),
            (check(images)?, None),
            (check(archive)?, None),
        ];
        for from in ["", "-i FILE", "-i PIPE"] {
            measured.push((
                restore(engine, &mut fixture, Path::new(archive), from)?,
                None,
            ));
        }
        for (row, (floe, zstd)) in rows.iter_mut().zip(measured) {
            eprintln!("{} {round}: {floe:.2?}", row.name);
            if round > 0 {
                row.floe.push(floe);
                row.zstd.extend(zstd);
            }
        }
    }
    fs::remove_dir_all(&scratch)?;
    Ok(table(&mut rows, bytes))
}

fn restore(
    engine: &Engine,
    fixture: &mut Fixture,
    archive: &Path,
    from: &str,
) -> anyhow::Result<Duration> {
    let images = fixture.images();
    let mut command = Command::new(&engine.path);
    command
        .args(["restore", "--no-default-config", "--restore-detached", "-D"])
        .arg(images);
    let took = match from {
        "" => run(&mut command)?,
        "-i FILE" => run(command.arg("-i").arg(archive))?,
        _ => {
            let mut cat = Command::new("cat");
            let mut cat = cat.arg(archive).stdout(Stdio::piped()).spawn()?;
            let pipe = cat.stdout.take().context("it is piped")?;
            let started = Instant::now();
            let status = command.args(["-i", "-"]).stdin(pipe).status()?;
            cat.wait()?;
            if !status.success() {
                bail!("restore from a pipe: {status}");
            }
            started.elapsed()
        }
    };
    fixture.check().context("after the restore")?;
    fixture.kill()?;
    Ok(took)
}

fn run(command: &mut Command) -> anyhow::Result<Duration> {
    let program = command.get_program().to_string_lossy().into_owned();
    let started = Instant::now();
    let output = command
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(started.elapsed())
}

fn table(rows: &mut [Row], bytes: u64) -> String {
    let mut text = String::from(
        "| operation, 1 GiB | floe, ms | zstd, ms | floe, GiB/s | mark |  |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        let floe = median(&mut row.floe);
        let zstd = median(&mut row.zstd);
        let rate = bytes as f64 / f64::from(1 << 30) / floe.max(1e-9);
        let (mark, holds) = match row.mark {
            Mark::OfZstd(part) => (format!("{part} of zstd"), zstd / floe >= part),
            Mark::GibPerSecond(least) => (format!("{least} GiB/s"), rate >= least),
            Mark::None => (String::new(), true),
        };
        let verdict = match (mark.is_empty(), holds) {
            (true, _) => "",
            (_, true) => "holds",
            (_, false) => "misses",
        };
        let zstd = match row.zstd.is_empty() {
            true => String::new(),
            false => format!("{:.0}", zstd * 1e3),
        };
        text.push_str(&format!(
            "| {} | {:.0} | {zstd} | {rate:.2} | {mark} | {verdict} |\n",
            row.name,
            floe * 1e3
        ));
    }
    text
}

/// In seconds.
fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .map_or(0.0, Duration::as_secs_f64)
}
