#![forbid(unsafe_code)]
//! What a user may ask of an operation, as plain typed values.
//!
//! The engine crates take these structs as arguments; the command line and the RPC service make them.
//! Nothing here prints, reads the environment or touches a kernel object.

pub mod dump;
pub mod external;
pub mod hooks;
pub mod policy;
pub mod restore;

pub use dump::{AfterDump, DumpOptions, PreDumpMode};
pub use external::{ExtMount, External, ExternalError, InheritFd};
pub use hooks::{Action, HookError, HookEvent, Hooks, NoHooks};
pub use policy::{
    ByteLimit, CgroupOptions, CgroupRoot, CpuCapabilities, FileValidation, ManageCgroups,
    MountOptions, NetworkLock, Place, SocketOptions, TreePid,
};
pub use restore::{AfterRestore, DetachMode, JoinNamespace, LsmProfile, RestoreOptions, VethPair};
