//! The page: sections of plots and tables.

use std::fmt::Write as _;

use floe_archive::summary::{FileSummary, GenerationSummary, MappingSummary, Summary};
use floe_image::manifest::RoundFacts;

use super::plot::{Bar, bars, escape, shade};
use crate::own::{size, utc};

/// Most mappings that are drawn.
const MAPPINGS: usize = 24;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--paper:#fff;--card:#f5f7fa;--line:#dde3ea;\
--a:#0b6e99;--b:#c9d4de;--g0:#c2410c;--g1:#d97706;--g2:#a3a300;--g3:#4d8f3a;--g4:#2b7a9b;--g5:#8795a6}\
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf1;--soft:#9aa7b6;--paper:#11161d;--card:#1a212b;--line:#2c3643;\
--a:#4fb3d9;--b:#3a4656;--g0:#fb7a45;--g1:#f0a63c;--g2:#cfcf4a;--g3:#7cc06a;--g4:#5fb2d6;--g5:#66758a}}\
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
main{max-width:60rem;margin:0 auto;padding:1rem}h1{font-size:1.5rem;margin:.5rem 0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}\
p{margin:.3rem 0;color:var(--soft)}.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:1rem 0}\
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}.facts b{display:block;font-size:1.15rem;overflow-wrap:anywhere}\
.facts span{color:var(--soft);font-size:.85rem}svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}\
svg .value{fill:var(--soft)}.plot{max-width:34rem}.a{fill:var(--a)}.b{fill:var(--b)}\
.g0{fill:var(--g0)}.g1{fill:var(--g1)}.g2{fill:var(--g2)}.g3{fill:var(--g3)}.g4{fill:var(--g4)}.g5{fill:var(--g5)}\
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;color:var(--soft);font-size:.9rem}.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.35rem}\
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem}table{border-collapse:collapse;width:100%;font-size:.9rem}\
th,td{text-align:left;padding:.35rem .7rem;border-bottom:1px solid var(--line);white-space:nowrap}th{color:var(--soft);font-weight:600}\
tr:last-child td{border-bottom:0}td.n{text-align:right;font-variant-numeric:tabular-nums}";

/// The whole page.
pub fn html(summary: &Summary) -> String {
    let mut out = String::new();
    let title = format!("Checkpoint {}", summary.path);
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style><main><h1>{0}</h1>",
        escape(&title)
    );
    facts(&mut out, summary);
    rounds(&mut out, summary);
    memory(&mut out, summary);
    tasks(&mut out, summary);
    files(&mut out, "Files", &summary.files);
    files(&mut out, "Sockets", &summary.sockets);
    out.push_str("</main></html>\n");
    out
}

fn facts(out: &mut String, summary: &Summary) {
    let unknown = || "unknown".to_owned();
    let engine = summary.floe.as_ref().map_or_else(
        || "another engine".to_owned(),
        |version| format!("Floe {version}"),
    );
    let frozen = summary
        .generations
        .last()
        .and_then(|newest| newest.facts.frozen_us);
    let size_on_disk = summary
        .generations
        .iter()
        .map(|generation| generation.facts.size)
        .sum();
    let facts = [
        ("kind", summary.kind.to_owned()),
        ("generations", summary.generations.len().to_string()),
        ("tasks", summary.tasks.len().to_string()),
        ("memory in it", size(summary.stored())),
        ("all files", size(size_on_disk)),
        ("last freeze", frozen.map_or_else(unknown, milliseconds)),
        ("kernel", summary.kernel.clone().unwrap_or_else(unknown)),
        ("made by", engine),
        ("made at", summary.created.map_or_else(unknown, utc)),
    ];
    out.push_str("<div class=\"facts\">");
    for (name, value) in facts {
        let _ = write!(
            out,
            "<div><span>{name}</span><b>{}</b></div>",
            escape(&value)
        );
    }
    out.push_str("</div>");
}

fn milliseconds(us: u32) -> String {
    format!("{:.1} ms", f64::from(us) / 1000.0)
}

/// What each generation copied, how fast memory changed, and how long the program stood still for it.
fn rounds(out: &mut String, summary: &Summary) {
    out.push_str(
        "<h2>Rounds</h2><p>Memory that each generation copied, and what it found unchanged.</p>",
    );
    out.push_str("<div class=\"key\"><span><i style=\"background:var(--a)\"></i>copied</span><span><i style=\"background:var(--b)\"></i>unchanged</span></div>");
    let rows = summary
        .generations
        .iter()
        .map(|GenerationSummary { facts, .. }| {
            let (copied, unchanged) = (size(facts.copied), size(facts.unchanged));
            Bar {
                label: label(facts),
                hint: format!(
                    "generation {}: {copied} copied, {unchanged} unchanged",
                    facts.number
                ),
                value: copied,
                parts: vec![
                    (facts.copied as f64, "a".into()),
                    (facts.unchanged as f64, "b".into()),
                ],
            }
        });
    plot(out, "memory copied by each generation", rows.collect());
    let rates = summary.generations.iter().filter_map(|row| {
        let rate = row.dirty_rate?;
        let value = format!("{}/s", size(rate));
        Some(Bar {
            label: label(&row.facts),
            hint: format!(
                "before generation {} the program changed {value}",
                row.facts.number
            ),
            value,
            parts: vec![(rate as f64, "g1".into())],
        })
    });
    let rates: Vec<Bar> = rates.collect();
    if !rates.is_empty() {
        out.push_str("<h2>Changes</h2><p>Memory that the program changed in a second before each generation.</p>");
        plot(out, "memory changed in a second", rates);
    }
    let freezes = summary.generations.iter().filter_map(|row| {
        let frozen = row.facts.frozen_us?;
        let value = milliseconds(frozen);
        Some(Bar {
            label: label(&row.facts),
            hint: format!(
                "generation {} stopped the program for {value}",
                row.facts.number
            ),
            value,
            parts: vec![(f64::from(frozen), "g0".into())],
        })
    });
    let freezes: Vec<Bar> = freezes.collect();
    if !freezes.is_empty() {
        out.push_str("<h2>Freeze</h2><p>How long the program stood still.</p>");
        plot(out, "freeze of each generation", freezes);
    }
}

fn label(facts: &RoundFacts) -> String {
    format!("{} ({})", facts.number, facts.kind)
}

fn plot(out: &mut String, title: &str, rows: Vec<Bar>) {
    let _ = write!(out, "<div class=\"plot\">{}</div>", bars(title, &rows));
}

/// The largest mappings and segments, each by the generations in which its pages are newest: what is hot
/// changed last.
fn memory(out: &mut String, summary: &Summary) {
    let own = summary.mappings.iter().map(|mapping| {
        let MappingSummary { pid, object, .. } = mapping;
        let (start, end, protection) = (mapping.start, mapping.end, &mapping.protection);
        let hint = format!("task {pid}: {start:#x}-{end:#x} {protection} {object}");
        (format!("{pid} {object}"), hint, &mapping.stored)
    });
    let shared = summary.segments.iter().map(|segment| {
        let pids = segment.pids.iter().map(u32::to_string);
        let pids = pids.collect::<Vec<_>>().join(", ");
        let hint = format!("{} of tasks {pids}", segment.object);
        (segment.object.clone(), hint, &segment.stored)
    });
    let rows = own
        .chain(shared)
        .map(|row| (row.2.iter().sum::<u64>(), row));
    let mut rows: Vec<_> = rows.filter(|(stored, _)| *stored > 0).collect();
    if rows.is_empty() {
        return;
    }
    rows.sort_by_key(|(stored, _)| std::cmp::Reverse(*stored));
    rows.truncate(MAPPINGS);
    out.push_str("<h2>Memory map</h2><p>Mappings and shared segments by the generation in which their pages changed last: the newest are hot.</p><div class=\"key\">");
    let count = summary.directories;
    let newest = summary.generations.last().map_or(0, |row| row.facts.number);
    for from_newest in 0..count.min(6) {
        let number = newest.saturating_sub(from_newest as u32);
        let older = if from_newest == 5 && count > 6 {
            " and older"
        } else {
            ""
        };
        let _ = write!(
            out,
            "<span><i style=\"background:var(--{})\"></i>generation {number}{older}</span>",
            shade(from_newest)
        );
    }
    out.push_str("</div>");
    let bar = |(stored, (label, hint, parts)): (u64, (String, String, &Vec<u64>))| {
        let parts = parts.iter().enumerate().rev();
        Bar {
            label,
            value: size(stored),
            hint,
            parts: parts
                .map(|(index, bytes)| (*bytes as f64, shade(count - 1 - index)))
                .collect(),
        }
    };
    let rows: Vec<Bar> = rows.into_iter().map(bar).collect();
    plot(out, "memory by mapping and generation", rows);
}

fn tasks(out: &mut String, summary: &Summary) {
    if summary.tasks.is_empty() {
        return;
    }
    out.push_str("<h2>Tasks</h2><div class=\"wide\"><table><tr><th>pid</th><th>name</th><th>state</th><th>threads</th><th>fds</th><th>mapped</th><th>in the checkpoint</th></tr>");
    for task in &summary.tasks {
        let _ = write!(
            out,
            "<tr><td class=\"n\">{}</td><td style=\"padding-left:{}rem\">{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            task.pid,
            0.7 + 1.2 * task.depth as f64,
            escape(&task.comm),
            task.state,
            task.threads,
            task.descriptors,
            size(task.mapped),
            size(task.stored)
        );
    }
    out.push_str("</table></div>");
}

fn files(out: &mut String, title: &str, files: &[FileSummary]) {
    if files.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>{title}</h2><div class=\"wide\"><table><tr><th>kind</th><th>pid:fd</th><th>what</th></tr>"
    );
    for file in files {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&file.kind),
            escape(&file.holders.join(" ")),
            escape(&file.text)
        );
    }
    out.push_str("</table></div>");
}
