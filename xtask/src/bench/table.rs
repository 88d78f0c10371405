//! The table of medians, ratios and marks.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use anyhow::Context;

use super::{Row, Series};
use crate::bench::measure::Measurement;

/// The largest ratios to the peer that were set as a mark: freeze, dump, restore.
fn marks(workload: &str) -> [f64; 3] {
    match workload {
        "bench-small" => [0.25; 3],
        "bench-pages" | "bench-huge" => [0.6, 0.7, 0.5],
        _ => [0.3; 3],
    }
}

/// The most memory that the engine may hold, in MiB.
const MEMORY_MARK: u64 = 64;

fn median<T: Ord + Copy>(series: &Series, value: impl Fn(&Measurement) -> T) -> Option<T> {
    let mut values: Vec<T> = series.rounds.iter().map(value).collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}

/// One measured time: its name and how to get it.
type Time = (&'static str, fn(&Measurement) -> Duration);

const TIMES: [Time; 3] = [
    ("freeze", |measured| measured.freeze),
    ("dump", |measured| measured.dump),
    ("restore", |measured| measured.restore),
];

/// The table in Markdown.
pub fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    let Some(first) = rows.first() else {
        return text;
    };
    let engines: Vec<&str> = first
        .series
        .iter()
        .map(|series| series.engine.as_str())
        .collect();
    let mut heads = vec!["workload".to_owned(), "".to_owned()];
    heads.extend(engines.iter().map(|engine| format!("{engine}, ms")));
    if engines.len() == 2 {
        heads.extend(["ratio".into(), "mark".into(), String::new()]);
    }
    line(&mut text, &heads);
    line(&mut text, &vec!["---".to_owned(); heads.len()]);
    for row in rows {
        for (index, (name, value)) in TIMES.iter().enumerate() {
            let workload = row.workload.trim_start_matches("bench-");
            let mut cells = vec![workload.to_owned(), (*name).to_owned()];
            let times: Vec<Duration> = row
                .series
                .iter()
                .filter_map(|series| median(series, value))
                .collect();
            cells.extend(times.iter().copied().map(milliseconds));
            if let [ours, theirs] = times.as_slice() {
                let ratio = ours.as_secs_f64() / theirs.as_secs_f64().max(f64::EPSILON);
                let mark = marks(row.workload)[index];
                let word = if ratio <= mark { "holds" } else { "misses" };
                cells.extend([format!("{ratio:.2}"), format!("{mark}"), word.into()]);
            }
            line(&mut text, &cells);
        }
    }
    text.push('\n');
    sizes(&mut text, rows, &engines);
    text
}

fn sizes(text: &mut String, rows: &[Row], engines: &[&str]) {
    let mut heads = vec!["workload".to_owned()];
    for engine in engines {
        heads.push(format!("{engine}: images, MiB"));
        heads.push(format!("{engine}: engine's memory, MiB"));
    }
    line(text, &heads);
    line(text, &vec!["---".to_owned(); heads.len()]);
    for row in rows {
        let mut cells = vec![row.workload.trim_start_matches("bench-").to_owned()];
        for series in &row.series {
            let size = median(series, |measured| measured.size).unwrap_or(0);
            let memory = median(series, |measured| measured.memory).unwrap_or(0) >> 20;
            cells.push(format!("{:.1}", size as f64 / f64::from(1 << 20)));
            let over = series.engine == "floe" && memory > MEMORY_MARK;
            cells.push(format!("{memory}{}", if over { " (mark 64)" } else { "" }));
        }
        line(text, &cells);
    }
}

fn line(text: &mut String, cells: &[String]) {
    text.push_str(&format!("| {} |\n", cells.join(" | ")));
}

/// The whole of docs/bench.md: how it was measured, and the table.
pub fn document(table: &str, rounds: usize) -> anyhow::Result<String> {
    let version = fs::read_to_string("/proc/version").context("reading /proc/version")?;
    let kernel = version.split_whitespace().nth(2).unwrap_or("?");
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("?", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let mut text = String::new();
    writeln!(
        text,
        "# Speed\n\n\
         Written by `cargo xtask bench --peer criu=PATH --write`. Medians of {rounds} rounds after one\n\
         that warms up; the engines alternate; images on tmpfs; Linux {kernel}, {cores} cores of {model}.\n\n\
         - *freeze*: the longest time that the workload did not run, by its own clock, while it was\n  \
         dumped with `--leave-running`;\n\
         - *dump*, *restore*: from the start of the command to its end (`--restore-detached`);\n\
         - *mark*: the largest ratio to the peer that we set ourselves.\n"
    )?;
    text.push_str(table);
    Ok(text)
}
