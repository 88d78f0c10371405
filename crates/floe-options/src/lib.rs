#![forbid(unsafe_code)]
//! What a user may ask of an operation, as plain typed values.
//!
//! The engine crates take these structs as arguments; the command line and the RPC service make them.
//! Nothing here prints, reads the environment or touches a kernel object.
//!
//! The way of a value: [`parse`] takes words apart by the table in [`flags`], [`config`] does so
//! with files, both write into [`Settings`], and [`build`] makes the options of one command.

pub mod build;
pub mod command;
pub mod config;
pub mod dump;
pub mod error;
pub mod external;
pub mod flags;
pub mod hooks;
pub mod need;
pub mod parse;
pub mod policy;
pub mod restore;
pub mod settings;
mod values;

pub use build::NotYet;
pub use command::Command;
pub use config::ConfigSources;
pub use dump::{AfterDump, DumpOptions, IterateOptions, PageServer, PreDumpMode, TrackerChoice};
pub use error::{UsageError, ValueError};
pub use external::{ExtMount, External, ExternalError, InheritFd};
pub use hooks::{Action, HookError, HookEvent, Hooks, NoHooks};
pub use need::Need;
pub use parse::{CommandLine, set_option};
pub use policy::{
    ByteLimit, CgroupOptions, CgroupRoot, CpuCapabilities, FileValidation, ManageCgroups,
    MountOptions, NetworkLock, Place, SocketOptions, TreePid,
};
pub use restore::{
    AfterRestore, DetachMode, JoinNamespace, LsmKind, LsmProfile, RestoreOptions, VethPair,
};
pub use settings::Settings;
