//! The cross matrix: dump by each engine, restore by each.

use crate::Engine;
use crate::fixture::Fixture;
use crate::program::{self, Missing};

/// What one cell of the matrix says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cell {
    /// The program went on as it was.
    Passed,
    /// It did not, and why.
    Failed(String),
    /// This machine lacks what the program needs.
    Skipped(String),
}

/// One program, over all pairs of engines.
#[derive(Debug)]
pub struct Row {
    /// The program's name.
    pub program: &'static str,
    /// The cells in the order of [`pairs`].
    pub cells: Vec<Cell>,
}

/// Pairs of dumper and restorer.
pub fn pairs(engines: &[Engine]) -> Vec<(Engine, Engine)> {
    engines
        .iter()
        .flat_map(|dumper| {
            engines
                .iter()
                .map(move |restorer| (dumper.clone(), restorer.clone()))
        })
        .collect()
}

/// Runs the programs whose names contain `filter` over all pairs, telling each row as it is done.
pub fn run(engines: &[Engine], filter: &str, mut tell: impl FnMut(&Row)) -> Vec<Row> {
    let pairs = pairs(engines);
    let mut rows = Vec::new();
    for program in program::programs() {
        if !program.name.contains(filter) {
            continue;
        }
        let cells = pairs
            .iter()
            .map(|(dumper, restorer)| cell(program.name, dumper, restorer))
            .collect();
        let row = Row {
            program: program.name,
            cells,
        };
        tell(&row);
        rows.push(row);
    }
    rows
}

fn cell(name: &str, dumper: &Engine, restorer: &Engine) -> Cell {
    match Fixture::cycle(name, dumper, restorer) {
        Ok(()) => Cell::Passed,
        Err(error) => match error.downcast_ref::<Missing>() {
            Some(missing) => Cell::Skipped(missing.0.clone()),
            None => Cell::Failed(format!("{error:#}")),
        },
    }
}
