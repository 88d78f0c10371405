//! How the program ends: exit codes, and the message that goes with them.

use std::process::ExitCode;

use floe_options::UsageError;

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
  2  wrong usage: an option, a value, a configuration file
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
