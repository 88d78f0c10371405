//! What puppets are born with: the state of the process that makes them.

use std::fs;
use std::io;

use floe_kernel::ids::HostPid;
use floe_kernel::namespace::own_proc_path;
use floe_kernel::proc::{Status, parse_status};
use floe_kernel::thread::{Scheduling, scheduling};

use super::credentials::{CAP_SYS_ADMIN, Credentials};
use super::rlimits::{Limit, own_limits};

/// State that a new task inherits, so that what is right already needs no call.
#[derive(Clone, Debug, Default)]
pub struct Birth {
    /// Credentials of a thread.
    pub credentials: Credentials,
    /// Resource limits in the order of `RLIMIT_*`.
    pub limits: Vec<Limit>,
    /// Policy and nice value.
    pub scheduling: Scheduling,
    /// The login uid, all bits set for none; `None` on a kernel without audit.
    pub loginuid: Option<u32>,
    /// Whether system call filters of a puppet can be suspended: its tracer has CAP_SYS_ADMIN and no filter.
    pub suspends_filters: bool,
}

impl Birth {
    /// What the calling thread would hand down. In a new user namespace the credentials are others:
    /// replace them.
    pub fn of_this_thread() -> io::Result<Self> {
        let status = own_status()?;
        let loginuid = fs::read_to_string(own_proc_path("thread-self/loginuid"));
        let credentials = Credentials::of_this_thread()?;
        Ok(Birth {
            suspends_filters: credentials.has(CAP_SYS_ADMIN) && status.seccomp == 0,
            loginuid: loginuid.ok().and_then(|text| text.trim().parse().ok()),
            credentials,
            limits: own_limits(),
            scheduling: scheduling(HostPid(0))?,
        })
    }
}

/// The status of the calling thread.
pub(super) fn own_status() -> io::Result<Status> {
    parse_status(&fs::read(own_proc_path("thread-self/status"))?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
