//! ICMP sockets that only some groups may make (`icmp(7)`, `ping_group_range`).

use std::io;
use std::os::fd::OwnedFd;

use floe_kernel::namespace::own_proc_path;
use floe_kernel::proc::read_setting;
use rustix::process::{Gid, getegid};

/// The groups that may make ICMP sockets in the network namespace where we are.
const GROUPS: &str = "sys/net/ipv4/ping_group_range";

/// Makes a socket as a member of the first group that may: in a user namespace ours is none of them.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let denied = || io::Error::from_raw_os_error(libc::EACCES);
    let groups = read_setting(own_proc_path(GROUPS))?;
    let first = groups.split_whitespace().next();
    let first = first.and_then(|gid| gid.parse().ok()).ok_or_else(denied)?;
    let own = getegid();
    become_member(Gid::from_raw(first))?;
    let made = floe_kernel::socket::socket(family, kind, protocol);
    become_member(own)?;
    made
}

/// Changes the effective group of this thread.
fn become_member(group: Gid) -> io::Result<()> {
    Ok(rustix::thread::set_thread_res_gid(None, Some(group), None)?)
}
