//! The cross matrix: dump by each engine, restore by each.

use crate::Engine;
use crate::fixture::Fixture;
use crate::program::{self, Missing};
use crate::real;

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
    let mut row = |name: &'static str, cycle: &dyn Fn(&Engine, &Engine) -> anyhow::Result<()>| {
        if !name.contains(filter) {
            return;
        }
        let cells = pairs
            .iter()
            .map(|(dumper, restorer)| cell(cycle(dumper, restorer)))
            .collect();
        let row = Row {
            program: name,
            cells,
        };
        tell(&row);
        rows.push(row);
    };
    for program in program::programs() {
        row(program.name, &|dumper, restorer| {
            Fixture::cycle(program.name, dumper, restorer)
        });
    }
    for program in real::PROGRAMS {
        row(program.name, &|dumper, restorer| {
            program.cycle(dumper, restorer)
        });
    }
    rows
}

fn cell(result: anyhow::Result<()>) -> Cell {
    match result {
        Ok(()) => Cell::Passed,
        Err(error) => match error.downcast_ref::<Missing>() {
            Some(missing) => Cell::Skipped(missing.0.clone()),
            None => Cell::Failed(format!("{error:#}")),
        },
    }
}
