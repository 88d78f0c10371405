//! How the program ends: exit codes, and the message that goes with them.

use std::process::ExitCode;
use std::slice;

use floe_dump::DumpError;
use floe_options::UsageError;

use crate::explain;

/// How each of several obstacles begins.
const LISTED: &str = "  - ";

/// The exit codes; part of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed for none of the reasons below.
    Failed = 1,
    /// The command line or a configuration file is wrong.
    Usage = 2,
    /// Something cannot be saved, or not be restored as this machine is.
    Unsupported = 3,
    /// The kernel refused something, or lacks a feature that is needed.
    Kernel = 4,
    /// An image is missing, damaged, not readable or of another kind than it says.
    BadImage = 5,
}

impl Exit {
    /// The text of `--help`.
    pub const HELP: &'static str = "\
Exit codes:
  0  done
  1  failed for another reason than these:
  2  wrong usage: an option, a value, a configuration file, a pid that nobody has
  3  something cannot be saved, or not be restored as this machine is
  4  the kernel refused, or lacks a feature
  5  an image is missing, damaged or not readable
";
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that the user sees, with the code it ends the program with.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub error: anyhow::Error,
}

impl Failure {
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self {
            exit,
            error: error.into(),
        }
    }

    /// Whether the words of the command line are wrong, and not what they name.
    pub fn is_mistyped(&self) -> bool {
        self.exit == Exit::Usage && self.error.downcast_ref::<DumpError>().is_none()
    }

    /// [`Failure::lines`], with what is known about them: of a list of obstacles, about each.
    pub fn explained(&self) -> Vec<String> {
        let mut lines = self.lines();
        if self.is_mistyped() {
            return lines;
        }
        let is_listed = |line: &&String| line.starts_with(LISTED);
        let listed: Vec<_> = lines
            .iter()
            .filter(is_listed)
            .map(slice::from_ref)
            .collect();
        let mut known: Vec<Vec<String>> = Vec::new();
        for about in if listed.is_empty() {
            vec![&lines[..]]
        } else {
            listed
        } {
            let explanation = explain::of_failure(about);
            if !known.contains(&explanation) {
                known.push(explanation);
            }
        }
        lines.extend(known.into_iter().flatten());
        lines
    }

    /// The error and its causes in one line each, as in `dump: reading ...: permission denied`.
    pub fn lines(&self) -> Vec<String> {
        format!("{:#}", self.error)
            .lines()
            .map(Into::into)
            .collect()
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self {
            exit: Exit::Failed,
            error,
        }
    }
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Self {
            exit: Exit::Usage,
            error: error.into(),
        }
    }
}
