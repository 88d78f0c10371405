//! Every message of Floe's own that a user can meet has an explanation.
//!
//! The messages are taken from the sources: the `#[error("...")]` of each variant, and what the command puts
//! together by `anyhow!`, `context` and `UsageError::Conflict`. What has none is listed with its reason.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use floe_explain::{Finding, explain};
use regex::Regex;

/// Crates whose messages no user of the command sees.
const NOT_SEEN: &[&str] = &["testkit", "floe-explain"];

/// Messages without an explanation of their own, and why.
const EXEMPT: &[(&str, &str)] = &[
    ("expected {0}", "a part of `bad value`"),
    ("expected one of {}{}", "a part of `bad value`"),
    ("Task {pid}", "the cause follows, and has its own"),
    ("Task {pid}: {what}", "the cause follows, and has its own"),
];

/// Files whose messages are of a program of their own, which is no engine: `floe demo`.
const OTHER_PROGRAMS: &[&str] = &["floe/src/demo/"];

/// A message as the sources have it, and where.
struct Message {
    template: String,
    file: String,
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(directory).expect("the sources are there");
    for path in entries.map(|entry| entry.expect("readable").path()) {
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

fn messages() -> Vec<Message> {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = r#""((?:[^"\\]|\\.)*)""#;
    let attribute = Regex::new(&format!(r"#\[error\(\s*{text}")).expect("tested here");
    let call = Regex::new(&format!(
        r"(?:anyhow!|\.context|context\(\|\| format!|UsageError::Conflict)\(\s*{text}"
    ));
    let call = call.expect("tested here");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&crates).expect("the sources are there") {
        let entry = entry.expect("readable");
        let name = entry.file_name().to_string_lossy().into_owned();
        if NOT_SEEN.contains(&&*name) {
            continue;
        }
        let mut files = Vec::new();
        sources(&entry.path().join("src"), &mut files);
        for file in files {
            let source = std::fs::read_to_string(&file).expect("readable");
            let shown = file.strip_prefix(&crates).unwrap_or(&file);
            if OTHER_PROGRAMS.iter().any(|other| shown.starts_with(other)) {
                continue;
            }
            for pattern in [&attribute, &call] {
                let found = pattern.captures_iter(&source);
                all.extend(found.map(|found| Message {
                    template: unescape(&found[1]),
                    file: shown.display().to_string(),
                }));
            }
        }
    }
    all
}

/// The text of a literal: lines are joined as the compiler does.
fn unescape(literal: &str) -> String {
    let joined = Regex::new(r"\\\n\s*").expect("tested here");
    joined
        .replace_all(literal, "")
        .replace("\\\"", "\"")
        .replace("\\n", "\n")
}

/// The message with something plausible in each of its gaps; `None` where it is nothing but gaps.
fn filled(template: &str) -> Option<String> {
    let gap = Regex::new(r"\{([^{}]*)\}").expect("tested here");
    let words = gap.replace_all(template, "");
    if !words.contains(|letter: char| letter.is_ascii_alphabetic()) {
        return None;
    }
    let sample = |found: &regex::Captures<'_>| {
        let name = found[1].split(':').next().unwrap_or_default();
        match name {
            "" => "/checkpoints/7/core-7.img".into(),
            "name" => "core-7.img".into(),
            "what" => "size".into(),
            "protocol" => "tcp".into(),
            "option" => "--images-dir".into(),
            "pid" | "tid" | "id" | "root" | "tracer" | "fd" | "offset" | "bytes" | "size"
            | "limit" | "found" | "listed" | "wanted" | "count" | "format" | "generation"
            | "since" | "first" | "value" | "number" | "last" | "port" | "pages" | "line"
            | "seconds" | "index" | "0" => "42".to_string(),
            name if name
                .chars()
                .all(|letter| letter.is_ascii_uppercase() || letter == '_') =>
            {
                match name {
                    "MANIFEST_NAME" => "floe.json".to_string(),
                    _ => "42".to_string(),
                }
            }
            name => name.to_string(),
        }
    };
    Some(gap.replace_all(template, sample).into_owned())
}

#[test]
fn every_message_of_our_own_has_an_explanation() {
    let all = messages();
    assert!(all.len() > 250, "only {} messages were found", all.len());
    let mut used = BTreeSet::new();
    let mut unknown = Vec::new();
    for message in all {
        let Some(text) = filled(&message.template) else {
            continue;
        };
        let exempt = EXEMPT.iter().find(|(text, _)| message.template == *text);
        if let Some((part, _)) = exempt {
            used.insert(*part);
            continue;
        }
        match explain(&format!("floe: {text}")) {
            Finding::Known(known) if !known.symptom => {}
            _ => unknown.push(format!("{}: {}", message.file, message.template)),
        }
    }
    assert!(unknown.is_empty(), "not explained:\n{}", unknown.join("\n"));
    let stale: Vec<_> = EXEMPT
        .iter()
        .filter(|(part, _)| !used.contains(part))
        .collect();
    assert!(stale.is_empty(), "no such messages any more: {stale:?}");
}
