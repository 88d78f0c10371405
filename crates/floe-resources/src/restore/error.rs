//! Why a restore could not be planned, or not be carried out.

use std::io;

use floe_image::ImageError;
use floe_inject::InjectError;
use floe_options::Need;

use crate::cgroup::GroupFault;
use crate::fd::inet::AddressFault;
use crate::fd::unchanged::FileFault;

/// Why images cannot be turned into a plan. Nothing has been touched yet.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Image(Box<ImageError>),
    #[error("{image}: {what}")]
    Damaged { image: String, what: String },
    #[error("{object} cannot be restored: {remedy}")]
    Unsupported {
        object: String,
        remedy: &'static str,
    },
    /// A mount that only the caller can supply, and that the dump was not told of.
    #[error(
        "{object} cannot be restored: dump again with --external 'mnt[{point}]:NAME'{otherwise}"
    )]
    NotExternal {
        object: String,
        point: String,
        otherwise: &'static str,
    },
    /// The options lack something that the images call for.
    #[error("{object} cannot be restored: {}", .need.remedy())]
    NeedsOption { object: String, need: Need },
    #[error("{object} needs {feature}, which this machine lacks")]
    Missing { object: String, feature: String },
    #[error(
        "Pid {id} is taken by {owner}; end it, or restore in a new pid namespace (--new-pidns)"
    )]
    IdTaken { id: u32, owner: String },
    #[error("The plan does not hold together: {}", .0.join("; "))]
    Incoherent(Vec<String>),
}

impl PlanError {
    /// An entry that contradicts another one.
    pub fn damaged(image: impl Into<String>, what: impl Into<String>) -> Self {
        PlanError::Damaged {
            image: image.into(),
            what: what.into(),
        }
    }
}

/// Why a step failed. Everything made so far is taken down again.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    #[error("{action} {object}")]
    Failed {
        action: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    /// A file of this machine is not as it was.
    #[error("{}; {}", .0, .0.remedy())]
    File(FileFault),
    /// A socket cannot have its address on this machine.
    #[error("{}; {}", .0, .0.remedy())]
    Address(AddressFault),
    /// A control group of this machine is missing or in the way.
    #[error("{}; {}", .0, .0.remedy())]
    Group(GroupFault),
    #[error(transparent)]
    Inject(#[from] InjectError),
    #[error(transparent)]
    Image(Box<ImageError>),
    #[error(transparent)]
    Plan(Box<PlanError>),
    #[error("The memory of task {pid}")]
    Memory {
        pid: u32,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{object}")]
    Content {
        object: String,
        #[source]
        source: Box<floe_memory::CopyOutError>,
    },
    #[error(transparent)]
    Lock(#[from] crate::netlock::LockError),
    #[error(transparent)]
    Net(#[from] crate::net::NetError),
    #[error(transparent)]
    Hook(#[from] floe_options::HookError),
}

impl ExecuteError {
    /// A fault of the images that a step found.
    pub fn from_plan(error: PlanError) -> Self {
        ExecuteError::Plan(Box::new(error))
    }
}

/// Gives an `io::Error` the operation and the object that it belongs to.
pub trait Attempt<T> {
    /// Names what was attempted, and on what.
    fn during(
        self,
        action: &'static str,
        object: impl FnOnce() -> String,
    ) -> Result<T, ExecuteError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn during(
        self,
        action: &'static str,
        object: impl FnOnce() -> String,
    ) -> Result<T, ExecuteError> {
        self.map_err(|error| ExecuteError::Failed {
            action,
            object: object(),
            source: error.into(),
        })
    }
}

impl From<ImageError> for PlanError {
    fn from(error: ImageError) -> Self {
        PlanError::Image(Box::new(error))
    }
}

impl From<FileFault> for ExecuteError {
    fn from(fault: FileFault) -> Self {
        ExecuteError::File(fault)
    }
}

impl From<ImageError> for ExecuteError {
    fn from(error: ImageError) -> Self {
        ExecuteError::Image(Box::new(error))
    }
}
