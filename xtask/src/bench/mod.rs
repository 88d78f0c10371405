//! `cargo xtask bench`: how long dumps and restores take, beside a peer on the same machine.

mod archive;
mod containers;
mod measure;
pub mod poll;
mod rounds;
mod table;

use std::path::PathBuf;

use anyhow::{Context, bail};
use testkit::Engine;

use measure::Measurement;

/// Engines, workloads, rounds.
#[derive(clap::Args)]
pub struct Arguments {
    /// Another engine with CRIU's command line, as NAME=PATH.
    #[arg(long, value_name = "NAME=PATH", value_parser = peer)]
    peer: Option<Engine>,
    /// What is measured.
    #[arg(long, value_enum, default_value_t = Group::Engines)]
    group: Group,
    /// Only workloads whose names contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Measured rounds; one more warms up.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where images go; memory by default.
    #[arg(long, default_value = "/dev/shm")]
    place: PathBuf,
    /// Write the table to docs/bench.md.
    #[arg(long)]
    write: bool,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Group {
    /// Dumps and restores.
    Engines,
    /// Packing, unpacking and checking, beside zstd.
    Archive,
    /// Checkpoint and restore by podman, with CRIU of the same tree beside.
    Containers,
    /// Checkpoints in rounds, beside a full dump of the peer.
    Rounds,
}

/// Where the rows of archives begin in docs/bench.md.
const ARCHIVES: &str = "\n## Archives\n";
/// Where those of containers begin.
const CONTAINERS: &str = "\n## Containers\n";
/// Where those of rounds begin.
const ROUNDS: &str = "\n## Rounds\n";

fn peer(text: &str) -> Result<Engine, String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    Ok(Engine::new(name, path))
}

/// All measurements of one engine with one workload, without the warm-up.
struct Series {
    engine: String,
    rounds: Vec<Measurement>,
}

/// One workload.
struct Row {
    workload: &'static str,
    series: Vec<Series>,
}

/// Measures, prints the table, and writes it if asked.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.rounds == 0 {
        bail!("--rounds must be at least 1");
    }
    let floe = match std::env::var_os("FLOE_BIN") {
        Some(path) => Engine::new("floe", path),
        None => Engine::new("floe", crate::build_release("floe", "floe")?),
    };
    match arguments.group {
        Group::Archive => return archives(&floe, arguments),
        Group::Rounds => return in_rounds(&floe, arguments),
        Group::Containers => return in_containers(&floe, arguments),
        Group::Engines => {}
    }
    let engines: Vec<Engine> = std::iter::once(floe)
        .chain(arguments.peer.clone())
        .collect();
    let mut rows = Vec::new();
    for program in testkit::program::workloads() {
        if !program.name.contains(&arguments.only) {
            continue;
        }
        let mut row = Row {
            workload: program.name,
            series: Vec::new(),
        };
        for engine in &engines {
            row.series.push(Series {
                engine: engine.name.clone(),
                rounds: Vec::new(),
            });
        }
        for round in 0..=arguments.rounds {
            for (engine, series) in engines.iter().zip(&mut row.series) {
                let measured = measure::once(program.name, engine, &arguments.place);
                let measured =
                    measured.with_context(|| format!("{} of {}", program.name, engine.name))?;
                eprintln!("{} {} {round}: {measured}", program.name, engine.name);
                if round > 0 {
                    series.rounds.push(measured);
                }
            }
        }
        rows.push(row);
    }
    let text = table::text(&rows);
    print!("{text}");
    if arguments.write {
        let (_, kept) = document()?;
        let whole = table::document(&text, arguments.rounds)?;
        write(&format!("{whole}{kept}"))?;
    }
    Ok(())
}

/// docs/bench.md, in front of the rows of archives and from them on.
fn document() -> anyhow::Result<(String, String)> {
    let text = std::fs::read_to_string(path()).context("reading docs/bench.md")?;
    let end = text.find(ARCHIVES).unwrap_or(text.len());
    Ok((text[..end].to_owned(), text[end..].to_owned()))
}

fn path() -> PathBuf {
    crate::root().join("docs/bench.md")
}

fn write(text: &str) -> anyhow::Result<()> {
    let path = path();
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}

fn archives(floe: &Engine, arguments: &Arguments) -> anyhow::Result<()> {
    let text = archive::measure(floe, &arguments.place, arguments.rounds)?;
    print!("{text}");
    if arguments.write {
        let how = format!(
            "From `cargo xtask bench --group archive`: medians of {} rounds after one that warms up. Both have all\n\
             processors and level 3; `pack` also hashes, `unpack` and `verify` compare every checksum.\n",
            arguments.rounds
        );
        write_section(ARCHIVES, &format!("{how}\n{text}"))?;
    }
    Ok(())
}

fn in_rounds(floe: &Engine, arguments: &Arguments) -> anyhow::Result<()> {
    let peer = arguments.peer.as_ref();
    let text = rounds::measure(floe, peer, &arguments.place, arguments.rounds)?;
    print!("{text}");
    if arguments.write {
        let how = format!(
            "From `cargo xtask bench --group rounds --peer criu=PATH`: {} runs after one that warms up. A GiB in pages\n\
             of 4 KiB, of which 1 % is written between two rounds; images on tmpfs. *Freeze* is the longest time that\n\
             the workload did not run, by its own clock, at normal priority; the peer's is that of its full dump in\n\
             the same run.\n",
            arguments.rounds
        );
        write_section(ROUNDS, &format!("{how}\n{text}"))?;
    }
    Ok(())
}

fn in_containers(floe: &Engine, arguments: &Arguments) -> anyhow::Result<()> {
    let text = containers::measure(floe, &arguments.place, arguments.rounds)?;
    print!("{text}");
    if arguments.write {
        let how = format!(
            "From `cargo xtask bench --group containers`: `podman container checkpoint` and `restore`, medians of {}\n\
             rounds after one that warms up, the engines in turn, storage on tmpfs. *No answer* is the longest time\n\
             between two answers of redis to a client outside.\n",
            arguments.rounds
        );
        write_section(CONTAINERS, &format!("{how}\n{text}"))?;
    }
    Ok(())
}

/// Puts `content` under a heading of docs/bench.md, in place of what stood there.
fn write_section(heading: &str, content: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path()).context("reading docs/bench.md")?;
    let (before, after) = match text.split_once(heading) {
        Some((before, rest)) => {
            let next = rest.find("\n## ").unwrap_or(rest.len());
            (before.to_owned(), rest[next..].to_owned())
        }
        None => (text, String::new()),
    };
    write(&format!("{before}{heading}\n{content}{after}"))
}
