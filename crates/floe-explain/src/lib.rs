//! What a message of a checkpoint engine means, and what to do about it.
//!
//! Input is text: a log of Floe, CRIU, runc, crun, Podman or Docker, or one pasted message. The first
//! cause in it is found and looked up in [`rules`]. Nothing here reads files or prints.
#![forbid(unsafe_code)]

mod lines;
pub mod rules;

use std::sync::OnceLock;

use regex::{Regex, RegexSet};

use lines::{Line, Weight};
pub use rules::{Role, Rule};

/// The cause that was found in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The line with the cause, as it stands in the text.
    pub line: String,
    /// Number of that line, from 1.
    pub number: usize,
    /// What happened, in two or three sentences.
    pub what: String,
    /// What to do.
    pub remedy: String,
    /// The exact option, setting or command.
    pub command: String,
    /// Threads of issue trackers where people met it.
    pub threads: &'static [&'static str],
    /// Whether the line only says that something else has failed.
    pub symptom: bool,
}

/// What a text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A known cause.
    Known(Box<Explanation>),
    /// No rule fits; this is the first line that reports an error, and its number from 1.
    Unknown { line: String, number: usize },
    /// No line reports an error.
    Nothing,
}

/// Finds the first cause in a log or a message.
pub fn explain(text: &str) -> Finding {
    let lines: Vec<Line<'_>> = lines::split(text)
        .filter(|line| !lines::is_answer(line.text))
        .collect();
    let failed = lines.iter().any(|line| line.weight == Weight::Error);
    let told = |line: &&Line<'_>| !(failed && line.weight == Weight::Told);
    let candidates = lines.iter().filter(told).filter_map(|line| {
        let (index, rule) = first_rule(line.text)?;
        Some((rank(line.weight, rule.role), line, index, rule))
    });
    // `min_by_key` takes the first of equals: the earliest line.
    if let Some((_, line, index, rule)) = candidates.min_by_key(|(rank, ..)| *rank) {
        return Finding::Known(Box::new(explanation(line, index, rule)));
    }
    let first = lines
        .iter()
        .find(|line| line.weight == Weight::Error)
        .or_else(|| lines.iter().find(|line| lines::sounds_bad(line.text)));
    match first {
        Some(line) => Finding::Unknown {
            line: line.text.to_owned(),
            number: line.number,
        },
        None => Finding::Nothing,
    }
}

/// A cause in an error beats one in a warning, and both beat a line that only passes the news on.
fn rank(weight: Weight, role: Role) -> u8 {
    match (role, weight) {
        (Role::Cause, Weight::Error) => 0,
        (Role::Cause, Weight::Plain) => 1,
        (Role::Cause, Weight::Warning) => 2,
        (Role::Consequence, _) => 3,
        (Role::Symptom, _) => 4,
        (Role::Cause, Weight::Told) => 5,
    }
}

fn patterns() -> &'static (RegexSet, Vec<Regex>) {
    static PATTERNS: OnceLock<(RegexSet, Vec<Regex>)> = OnceLock::new();
    PATTERNS.get_or_init(|| {
        let texts = rules::all().map(|rule| rule.pattern);
        let set = RegexSet::new(texts.clone()).expect("the patterns are tested");
        let each = texts.map(|text| Regex::new(text).expect("the patterns are tested"));
        (set, each.collect())
    })
}

fn first_rule(text: &str) -> Option<(usize, &'static Rule)> {
    let index = patterns().0.matches(text).iter().next()?;
    rules::all().nth(index).map(|rule| (index, rule))
}

fn explanation(line: &Line<'_>, index: usize, rule: &'static Rule) -> Explanation {
    let captures = patterns().1[index].captures(line.text);
    let fill = |template: &str| {
        let mut text = String::new();
        match &captures {
            Some(captures) => captures.expand(template, &mut text),
            None => text.push_str(template),
        }
        text
    };
    Explanation {
        line: line.text.to_owned(),
        number: line.number,
        what: fill(rule.what),
        remedy: fill(rule.remedy),
        command: fill(rule.command),
        threads: rule.threads,
        symptom: rule.role == Role::Symptom,
    }
}
