//! `cargo xtask cross`: dump by each engine, restore by each, over all programs of testkit.

use std::path::PathBuf;

use anyhow::{Context, bail};
use testkit::cross::{Cell, Row, pairs};
use testkit::{Engine, cross};

/// The engines, and which programs.
#[derive(clap::Args)]
pub struct Arguments {
    /// A CRIU binary; without it the variable FLOE_PEER_CRIU names one.
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Only programs whose names contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only the peer with itself: what it can do here.
    #[arg(long)]
    peer_alone: bool,
    /// Only Floe with itself.
    #[arg(long)]
    floe_alone: bool,
}

/// Prints a row for each program and fails if a cell that the peer fills by itself does not pass.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut engines = Vec::new();
    if !arguments.peer_alone {
        let floe = match std::env::var_os("FLOE_BIN") {
            Some(path) => Engine::new("floe", path),
            None => Engine::new("floe", crate::build_release("floe", "floe")?),
        };
        engines.push(floe);
    }
    if !arguments.floe_alone {
        let peer = arguments
            .peer
            .as_ref()
            .map(|path| Engine::new("criu", path));
        engines.push(
            peer.or_else(Engine::peer)
                .context("no peer: give --peer or set FLOE_PEER_CRIU")?,
        );
    }
    let pairs = pairs(&engines);
    let heads: Vec<String> = pairs
        .iter()
        .map(|(dumper, restorer)| format!("{}->{}", dumper.name, restorer.name))
        .collect();
    println!("{:24} {}", "program", heads.join("  "));
    let rows = cross::run(&engines, &arguments.only, |row| print(row, &heads));
    summary(&rows, &heads)
}

fn print(row: &Row, heads: &[String]) {
    let words = row.cells.iter().zip(heads).map(|(cell, head)| {
        let word = match cell {
            Cell::Passed => "ok",
            Cell::Failed(_) => "FAIL",
            Cell::Skipped(_) => "skipped",
        };
        format!("{word:width$}", width = head.len())
    });
    println!(
        "{:24} {}",
        row.program,
        words.collect::<Vec<_>>().join("  ")
    );
    for (cell, head) in row.cells.iter().zip(heads) {
        match cell {
            Cell::Passed => {}
            Cell::Failed(why) | Cell::Skipped(why) => println!("    {head}: {why}"),
        }
    }
}

fn summary(rows: &[Row], heads: &[String]) -> anyhow::Result<()> {
    let mut bad = 0;
    for (column, head) in heads.iter().enumerate() {
        let cells = rows.iter().map(|row| &row.cells[column]);
        let passed = cells.clone().filter(|cell| **cell == Cell::Passed).count();
        let failed = cells.filter(|cell| matches!(cell, Cell::Failed(_))).count();
        println!(
            "{head}: {passed} passed, {failed} failed, of {}",
            rows.len()
        );
    }
    for row in rows {
        // What the peer cannot do with itself here is no measure for us.
        let beyond_peer = heads.last().is_some_and(|head| head == "criu->criu")
            && matches!(row.cells.last(), Some(Cell::Failed(_)));
        let failed = row
            .cells
            .iter()
            .filter(|cell| matches!(cell, Cell::Failed(_)));
        if !beyond_peer {
            bad += failed.count();
        }
    }
    if bad > 0 {
        bail!("{bad} cells failed");
    }
    Ok(())
}
