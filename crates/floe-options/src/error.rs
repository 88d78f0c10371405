//! What is wrong with a command line or a configuration file.

use std::path::PathBuf;

use crate::ExternalError;

/// Why a value does not fit its option.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("expected {0}")]
    Expected(&'static str),
    #[error("expected one of {}{}", .choices.join(", "), did_you_mean(.nearest.as_deref()))]
    Choice {
        choices: Vec<&'static str>,
        nearest: Option<String>,
    },
    #[error(transparent)]
    External(#[from] ExternalError),
}

impl ValueError {
    /// `given` is none of `choices`.
    pub(crate) fn choice(given: &str, choices: &[&'static str]) -> Self {
        Self::Choice {
            choices: choices.to_vec(),
            nearest: nearest(given, choices.iter().copied()).map(Into::into),
        }
    }
}

/// A usage error; every variant names what was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    #[error("unknown option `{given}`{}", did_you_mean(.nearest.as_deref()))]
    UnknownOption {
        given: String,
        nearest: Option<String>,
    },
    #[error("option `{given}` is ambiguous: {}", .candidates.join(", "))]
    Ambiguous {
        given: String,
        candidates: Vec<String>,
    },
    #[error("option `{option}` needs a value ({value})")]
    MissingValue { option: String, value: &'static str },
    #[error("option `{option}` takes no value, got `{value}`")]
    UnexpectedValue { option: String, value: String },
    // The reason is in the text and no source: it would be said twice.
    #[error("bad value `{value}` for `{option}`: {reason}")]
    BadValue {
        option: String,
        value: String,
        reason: ValueError,
    },
    #[error("a command is required: dump, restore, check, ... (see --help)")]
    NoCommand,
    #[error("unknown command `{given}`{}", did_you_mean(.nearest.as_deref()))]
    UnknownCommand {
        given: String,
        nearest: Option<String>,
    },
    #[error("`{command}` takes no further arguments, got `{given}`{}", did_you_mean(.meant.as_deref()))]
    Excess {
        command: &'static str,
        given: String,
        meant: Option<String>,
    },
    #[error(
        "one checkpoint at a time, got `{given}` too; for archives that make one chain: -i BASE -i INCREMENT"
    )]
    Several { given: String },
    #[error("`{command}` needs {what}")]
    Needs {
        command: &'static str,
        what: &'static str,
    },
    #[error("`{option}` is for {commands}, not for `{given}`")]
    NotFor {
        option: String,
        commands: String,
        given: &'static str,
    },
    #[error("`{option}` has no effect here: {why}")]
    Idle { option: String, why: &'static str },
    #[error("{0}")]
    Conflict(&'static str),
    #[error("argument `{0}` is not UTF-8")]
    NotUtf8(String),
    #[error("reading configuration file {}: {reason}", .file.display())]
    ReadConfig { file: PathBuf, reason: String },
    #[error("{}, line {line}: {reason}", .file.display())]
    Config {
        file: PathBuf,
        line: usize,
        reason: String,
    },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest
        .map(|name| format!("; did you mean `{name}`?"))
        .unwrap_or_default()
}

/// The candidate most like `given`, if any is alike enough to be meant.
pub fn nearest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const ALIKE: f64 = 0.75;
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(given, candidate), candidate))
        .filter(|(likeness, _)| *likeness > ALIKE)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate)
}
