//! The lines of a log, without what engines put around a message.

/// Longest line that is looked at, in bytes: a log may hold binary data.
const MAX_LINE: usize = 4096;

/// How much a line claims to matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Marked as an error.
    Error,
    /// Not marked.
    Plain,
    /// Marked as a warning.
    Warning,
    /// Only told on the way.
    Told,
}

/// One line.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Number from 1.
    pub number: usize,
    /// Its text, trimmed.
    pub text: &'a str,
    /// What it claims to be.
    pub weight: Weight,
}

/// The lines of a text that are not empty.
pub fn split(text: &str) -> impl Iterator<Item = Line<'_>> {
    let logged = text.lines().any(is_stamped);
    text.lines().enumerate().filter_map(move |(index, line)| {
        let text = cut(line.trim());
        let weight = weigh(text, logged);
        (!text.is_empty()).then_some(Line {
            number: index + 1,
            text,
            weight,
        })
    })
}

fn cut(line: &str) -> &str {
    let mut end = line.len().min(MAX_LINE);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    &line[..end]
}

/// `(00.012345) ...`: a log of CRIU or Floe.
fn is_stamped(line: &str) -> bool {
    let Some((stamp, _)) = line
        .trim_start()
        .strip_prefix('(')
        .and_then(|rest| rest.split_once(')'))
    else {
        return false;
    };
    stamp.contains('.')
        && stamp
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
}

/// `logged`: the text has lines of a log, in which what is no error is only told.
fn weigh(line: &str, logged: bool) -> Weight {
    let marked = |marks: &[&str]| marks.iter().any(|mark| line.contains(mark));
    if marked(&[
        "Error (",
        "level=error",
        "level=fatal",
        "ERROR",
        "Error:",
        "error:",
    ]) {
        Weight::Error
    } else if marked(&["Warn  (", "level=warn"]) {
        Weight::Warning
    } else if marked(&["level=info", "level=debug"]) || (logged && is_stamped(line)) {
        Weight::Told
    } else {
        Weight::Plain
    }
}

/// Whether a line that carries no mark still sounds like a failure.
pub fn sounds_bad(line: &str) -> bool {
    let lower = line.to_ascii_lowercase();
    [
        "fail", "error", "cannot", "can't", "unable", "denied", "invalid",
    ]
    .iter()
    .any(|word| lower.contains(word))
}

/// Whether the line is an answer of ours that was pasted with the message that it is about.
pub fn is_answer(line: &str) -> bool {
    const ANSWERS: [&str; 3] = ["what happened: ", "what to do: ", "try: "];
    // Behind the name of the program.
    let text = line.split_once(": ").map_or(line, |(_, rest)| rest);
    ANSWERS
        .iter()
        .any(|answer| line.starts_with(answer) || text.starts_with(answer))
}
