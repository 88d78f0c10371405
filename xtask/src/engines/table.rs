//! The results as tables of docs/engines.md: one for each script, a column for each of its engines.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::Context;

use super::{ENGINES, Verdict};

/// Where the tables begin; they end with the document.
const HEADING: &str = "\n## Results\n";

/// What became of one scenario.
pub struct Ran {
    pub engine: &'static str,
    pub scenario: &'static str,
    pub verdict: Verdict,
}

/// Puts the tables into docs/engines.md.
pub fn write(results: &[Ran]) -> anyhow::Result<()> {
    let path = crate::root().join("docs/engines.md");
    let text = std::fs::read_to_string(&path).context("reading docs/engines.md")?;
    let (before, _) = text.split_once(HEADING).context("no results in there")?;
    std::fs::write(&path, format!("{before}{HEADING}\n{}", tables(results)))
        .context("writing docs/engines.md")
}

fn tables(results: &[Ran]) -> String {
    let passed = results
        .iter()
        .filter(|ran| matches!(ran.verdict, Verdict::Passed));
    let mut text = format!(
        "Written by `cargo xtask engines --write`: {} of {} pass.\n",
        passed.count(),
        results.len()
    );
    let mut notes = BTreeSet::new();
    let mut scripts: Vec<&str> = ENGINES.iter().map(|engine| engine.script).collect();
    scripts.dedup();
    for script in scripts {
        let of_script = |name: &str| {
            let mut engines = ENGINES.iter();
            engines.any(|engine| engine.name == name && engine.script == script)
        };
        let here: Vec<&Ran> = results.iter().filter(|ran| of_script(ran.engine)).collect();
        let mut columns: Vec<&str> = here.iter().map(|ran| ran.engine).collect();
        columns.dedup();
        if columns.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n| scenario | {} |", columns.join(" | "));
        let _ = writeln!(text, "| --- |{}", " --- |".repeat(columns.len()));
        for scenario in super::scenarios(script) {
            let cells = columns.iter().map(|column| {
                let mut of_row = here.iter();
                let ran = of_row.find(|ran| ran.engine == *column && ran.scenario == scenario);
                ran.map_or("", |ran| cell(ran, &mut notes))
            });
            let cells: Vec<&str> = cells.collect();
            let _ = writeln!(text, "| {scenario} | {} |", cells.join(" | "));
        }
    }
    if !notes.is_empty() {
        text.push('\n');
    }
    for note in notes {
        let _ = writeln!(text, "- {note}");
    }
    text
}

fn cell(ran: &Ran, notes: &mut BTreeSet<String>) -> &'static str {
    let (short, why) = match &ran.verdict {
        Verdict::Passed => return "ok",
        Verdict::Fault(why) => ("fault", why),
        Verdict::Skipped(why) => ("skipped", why),
        Verdict::Failed(why) => ("FAILS", why),
    };
    let first = why.lines().next().unwrap_or_default();
    let first = first.trim_start_matches("engine fault: ");
    notes.insert(format!("{short}: {} {}: {first}", ran.engine, ran.scenario));
    short
}
