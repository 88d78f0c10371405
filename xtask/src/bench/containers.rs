//! `cargo xtask bench --group containers`: podman with our binary as its `criu`, beside CRIU's of the same tree.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use testkit::Engine;

use crate::engines::{sid, stage_files};

const SCRIPT: &str = include_str!("containers.sh");
/// Where the directory of the scenario is in the tree.
const INNER: &str = "/run/floe-engines";
const PACKAGES: &[&str] = &[
    "podman",
    "runc",
    "conmon",
    "criu",
    "redis-server",
    "libc-bin",
];
const MARK: f64 = 0.7;
const MEASURED: [&str; 4] = ["checkpoint", "restore", "both", "no answer"];

/// Times of one cycle, in the order of [`MEASURED`].
type Cycle = [Duration; 4];

/// Measures both engines in turn, and gives the section of the document.
pub fn measure(floe: &Engine, place: &Path, rounds: usize) -> anyhow::Result<String> {
    let root = sid::tree(PACKAGES)?;
    let directory = tempfile::Builder::new()
        .prefix("floe-engines-")
        .tempdir_in(place)?;
    stage_files(directory.path(), &[("containers.sh", SCRIPT)])?;
    let (ours, theirs) = (directory.path().join("floe"), directory.path().join("criu"));
    for place in [&ours, &theirs] {
        fs::create_dir(place)?;
    }
    fs::copy(&floe.path, ours.join("criu")).context("copying the binary")?;
    fs::copy(root.join("usr/sbin/criu"), theirs.join("criu")).context("copying CRIU's")?;
    let mut measured = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for (name, cycles) in ["floe", "criu"].into_iter().zip(&mut measured) {
            let cycle = once(&root, directory.path(), name)?;
            eprintln!("{name} {round}: {cycle:?}");
            if round > 0 {
                cycles.push(cycle);
            }
        }
    }
    Ok(table(&measured))
}

fn once(root: &Path, directory: &Path, engine: &str) -> anyhow::Result<Cycle> {
    let inner = PathBuf::from(INNER);
    let line = format!(
        "cd {INNER} && rm -rf work && mkdir work && cd work && sh ../containers.sh; end=$?; \
         cd .. && rm -rf work; exit $end"
    );
    let mut command = sid::enter(root, directory, &inner);
    command
        .args(["-c", &line])
        .env(
            "PATH",
            format!("{INNER}/{engine}:/usr/sbin:/usr/bin:/sbin:/bin"),
        )
        .env("XTASK", inner.join("xtask"))
        .env("BUSYBOX", inner.join("busybox"))
        .stdin(Stdio::null());
    let output = command.output().context("starting podman")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{engine}: {printed}{errors}");
    }
    let last = printed.lines().last().unwrap_or_default();
    let numbers = last.split(' ').map(str::parse);
    let numbers: Vec<u64> = numbers
        .collect::<Result<_, _>>()
        .with_context(|| printed.clone().into_owned())?;
    ensure!(numbers.len() == 3, "unexpected: {printed}");
    let [checkpoint, restore, gap] = [0, 1, 2].map(|index| Duration::from_micros(numbers[index]));
    Ok([checkpoint, restore, checkpoint + restore, gap])
}

fn table(measured: &[Vec<Cycle>; 2]) -> String {
    let mut text = String::from(
        "| redis with 256 MiB, podman and runc | floe, ms | criu, ms | ratio | mark |  |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for (index, name) in MEASURED.iter().enumerate() {
        let [floe, criu] = [&measured[0], &measured[1]].map(|cycles| {
            let mut times: Vec<f64> = cycles
                .iter()
                .map(|cycle| cycle[index].as_secs_f64() * 1000.0)
                .collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let ratio = floe / criu;
        // Of the four, the whole time and the time without an answer have a mark.
        let (mark, verdict) = match (index, ratio <= MARK) {
            (0 | 1, _) => ("", ""),
            (_, true) => ("0.7", "holds"),
            (_, false) => ("0.7", "misses"),
        };
        let _ = writeln!(
            text,
            "| {name} | {floe:.0} | {criu:.0} | {ratio:.2} | {mark} | {verdict} |"
        );
    }
    text
}
