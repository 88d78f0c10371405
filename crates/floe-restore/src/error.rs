//! Why a restore failed.

use std::path::PathBuf;

use floe_image::ImageError;
use floe_resources::cpu::CpuMismatch;
use floe_resources::restore::{ExecuteError, PlanError};

/// Why a tree was not restored. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something of the images is missing or cut.
    #[error("{}", .0.iter().map(|row| match &row.remedy {
        Some(remedy) => format!("{}: {remedy}", row.text),
        None => row.text.clone(),
    }).collect::<Vec<_>>().join("\n"))]
    NotWhole(Vec<floe_archive::check::Row>),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Cpu(Vec<CpuMismatch>),
    #[error("Step `{step}` failed")]
    Step {
        step: String,
        #[source]
        source: ExecuteError,
    },
    #[error(transparent)]
    WriteImage(#[from] floe_image::WriteError),
    #[error("Writing {}", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Hook(#[from] floe_options::HookError),
}
