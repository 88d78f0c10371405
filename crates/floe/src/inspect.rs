//! `floe inspect`: what is in a checkpoint.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Parser;
use floe_archive::summary::{FileSummary, GenerationSummary, Summary, TaskSummary};

use crate::exit::{Exit, Failure};
use crate::own;

/// Largest mappings shown without `--all`.
const MAPPINGS: usize = 20;
/// Open files shown without `--all`.
const FILES: usize = 40;

/// Shows what is in a checkpoint: tasks, memory, files, sockets, generations.
#[derive(Parser)]
#[command(name = "floe inspect", after_help = Exit::HELP, disable_version_flag = true)]
struct Inspect {
    /// A directory of images (the newest of a chain), or an archive.
    path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Show every mapping and file.
    #[arg(long)]
    all: bool,
}

/// Runs `floe inspect`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let line: Inspect = match own::parse("floe inspect", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let summary = own::summary(&line.path)?;
    let text = match line.json {
        true => {
            let value = serde_json::to_value(&summary).map_err(anyhow::Error::from)?;
            format!("{value:#}\n")
        }
        false => text(&summary, line.all),
    };
    own::print(&text)?;
    Ok(Exit::Done)
}

fn text(summary: &Summary, all: bool) -> String {
    let mut out = String::new();
    let unknown = || "unknown".to_owned();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {}, {} tasks, {} of pages, {} generations",
        summary.path,
        summary.kind,
        summary.tasks.len(),
        size(summary.stored()),
        summary.generations.len()
    );
    let engine = summary.floe.as_ref().map_or_else(
        || "another engine (no floe.json)".to_owned(),
        |version| format!("Floe {version}"),
    );
    let _ = writeln!(
        out,
        "made by {engine}, kernel {} {}, {}",
        summary.kernel.clone().unwrap_or_else(unknown),
        summary.machine.clone().unwrap_or_default(),
        summary.created.map_or_else(unknown, own::utc)
    );
    if summary.generations.len() > 1 {
        table(
            &mut out,
            "Generations",
            &[
                "number",
                "kind",
                "tracker",
                "copied",
                "unchanged",
                "changes",
                "size",
                "frozen",
                "made",
            ],
            summary.generations.iter().map(generation),
        );
    } else if let Some(only) = summary.generations.first() {
        let frozen = only.facts.frozen_us.map_or_else(unknown, milliseconds);
        let _ = writeln!(out, "size {}, frozen for {frozen}", size(only.facts.size));
    }
    tasks(&mut out, &summary.tasks);
    memory(&mut out, summary, all);
    files(&mut out, "Files", &summary.files, all);
    files(&mut out, "Sockets", &summary.sockets, all);
    out
}

fn generation(row: &GenerationSummary) -> Vec<String> {
    let dash = || "-".to_owned();
    let facts = &row.facts;
    vec![
        facts.number.to_string(),
        facts.kind.clone(),
        facts.tracker.clone().unwrap_or_else(dash),
        size(facts.copied),
        size(facts.unchanged),
        row.dirty_rate
            .map_or_else(dash, |rate| format!("{}/s", size(rate))),
        size(facts.size),
        facts.frozen_us.map_or_else(dash, milliseconds),
        facts.created.map_or_else(dash, own::utc),
    ]
}

/// Security labels are shown where there are any.
fn tasks(out: &mut String, tasks: &[TaskSummary]) {
    let labelled = tasks.iter().any(|task| task.label.is_some());
    let mut heads = vec![
        "pid", "pgid", "sid", "state", "threads", "fds", "mapped", "stored",
    ];
    heads.extend(labelled.then_some("label"));
    heads.push("name");
    let row = |task: &TaskSummary| {
        let mut cells = numbers(task);
        cells.extend(labelled.then(|| task.label.clone().unwrap_or("-".into())));
        cells.push(format!(
            "{:indent$}{}",
            "",
            task.comm,
            indent = 2 * task.depth
        ));
        cells
    };
    table(out, "Tasks", &heads, tasks.iter().map(row));
}

fn numbers(row: &TaskSummary) -> Vec<String> {
    vec![
        row.pid.to_string(),
        row.pgid.to_string(),
        row.sid.to_string(),
        row.state.into(),
        row.threads.to_string(),
        row.descriptors.to_string(),
        size(row.mapped),
        size(row.stored),
    ]
}

/// Mappings and shared segments, largest first.
fn memory(out: &mut String, summary: &Summary, all: bool) {
    let own = summary.mappings.iter().map(|mapping| {
        let range = format!("{:012x}-{:012x}", mapping.start, mapping.end);
        let stored: u64 = mapping.stored.iter().sum();
        let columns = [mapping.pid.to_string(), range, mapping.protection.clone()];
        (
            columns,
            mapping.end - mapping.start,
            stored,
            &mapping.object,
        )
    });
    let shared = summary.segments.iter().map(|segment| {
        let tasks = match segment.pids.first() {
            Some(pid) if segment.pids.len() == 1 => pid.to_string(),
            _ => format!("{} tasks", segment.pids.len()),
        };
        let stored: u64 = segment.stored.iter().sum();
        let columns = [tasks, "a segment".into(), "-".into()];
        (columns, segment.size, stored, &segment.object)
    });
    let mut rows: Vec<_> = own.chain(shared).collect();
    let mut title = "Memory".to_owned();
    if !all {
        let count = rows.len();
        rows.retain(|(_, _, stored, _)| *stored > 0);
        rows.sort_by_key(|(_, _, stored, _)| std::cmp::Reverse(*stored));
        if rows.len() > MAPPINGS {
            title = format!("Memory: the largest {MAPPINGS} of {count} (--all shows all)");
            rows.truncate(MAPPINGS);
        }
    }
    table(
        out,
        &title,
        &["pid", "range", "prot", "size", "stored", "object"],
        rows.into_iter().map(|(columns, len, stored, object)| {
            let rest = [size(len), size(stored), object.clone()];
            [&columns[..], &rest].concat()
        }),
    );
}

fn files(out: &mut String, title: &str, files: &[FileSummary], all: bool) {
    let shown = if all {
        files.len()
    } else {
        files.len().min(FILES)
    };
    let title = match shown < files.len() {
        true => format!("{title}: {shown} of {} (--all shows all)", files.len()),
        false => title.to_owned(),
    };
    let row = |file: &FileSummary| vec![file.kind.clone(), holders(file), file.text.clone()];
    table(
        out,
        &title,
        &["kind", "pid:fd", "what"],
        files[..shown].iter().map(row),
    );
}

fn holders(file: &FileSummary) -> String {
    match file.holders.is_empty() {
        true => "(no fd)".into(),
        false => file.holders.join(" "),
    }
}

/// A table with its title; the last column takes what is left.
fn table(out: &mut String, title: &str, heads: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() {
        return;
    }
    let heads: Vec<String> = heads.iter().map(ToString::to_string).collect();
    let width = |column: usize| {
        let cells = rows
            .iter()
            .chain([&heads])
            .map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).min(60)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    out.push_str(&format!("\n{title}\n"));
    for row in [&heads].into_iter().chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("  {cell:width$}"));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

fn milliseconds(us: u32) -> String {
    format!("{:.1} ms", f64::from(us) / 1000.0)
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    own::size(bytes)
}
