//! Parsers of `/proc/<pid>` files, and the directory handle that reads them.
//!
//! Each parser is a function of bytes, so it can be tested on hostile text: a task chooses its own
//! name, the names of its files, and (through the file system) much of what the kernel prints.

mod cgroup;
mod dir;
mod fdinfo;
mod locks;
mod maps;
mod meminfo;
mod mountinfo;
mod setting;
mod stat;
mod status;
mod sysvipc;
mod text;
mod timers;

pub use cgroup::{CgroupMembership, parse_cgroup};
pub use dir::{ProcDir, ProcError};
pub use fdinfo::{FdInfo, parse_fdinfo};
pub use locks::{FileLock, LockKind, LockMode, parse_locks};
pub(crate) use maps::parse_vm_flags;
pub use maps::{Mapping, VmFlags, parse_maps};
pub use meminfo::available_memory;
pub use mountinfo::{Mount, parse_mountinfo};
pub use setting::read_setting;
pub use stat::{Stat, parse_stat};
pub use status::{Status, parse_status};
pub use sysvipc::{
    IpcOwner, MsgQueue, SemSet, ShmSegment, parse_sysvipc_msg, parse_sysvipc_sem, parse_sysvipc_shm,
};
pub use text::ParseError;
pub use timers::{PosixTimer, parse_timers};
