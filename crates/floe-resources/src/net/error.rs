//! What can go wrong with the content of a network namespace.

use std::io;

/// Reading or rebuilding the content of a network namespace failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused.
    #[error("{action} {object}")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        #[source]
        source: io::Error,
    },
    /// A program that reads or writes packet rules could not be run.
    #[error("Running {program}: there are packet rules that only it can {task}; install it")]
    Program {
        program: String,
        task: &'static str,
        #[source]
        source: io::Error,
    },
    /// The program refused.
    #[error("`{program}` failed: {output}")]
    Refused { program: String, output: String },
    /// The images do not fit together, or are damaged.
    #[error("{0}")]
    Damaged(String),
    /// There is no way to keep or rebuild it.
    #[error("{object}: {remedy}")]
    Unsupported { object: String, remedy: String },
}

/// Names the object to a failed call.
pub trait Attempt<T> {
    /// What was tried, on which object.
    fn during(self, action: &'static str, object: impl FnOnce() -> String) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn during(self, action: &'static str, object: impl FnOnce() -> String) -> Result<T, NetError> {
        self.map_err(|source| NetError::Failed {
            action,
            object: object(),
            source: source.into(),
        })
    }
}
