//! What rustix lacks: ptrace, pidfds, `PAGEMAP_SCAN`, userfaultfd, kcmp, `/proc`.
//!
//! Wrappers take and return owned types and hold no policy: no retry, no fallback, no log.

pub mod acting;
pub mod anonymous;
mod arch;
pub mod bpf;
pub mod child;
pub mod cpu;
pub mod fault;
pub mod features;
pub mod file_owner;
pub mod ids;
pub mod inherited;
pub mod janitor;
pub mod kcmp;
pub mod mapped_file;
pub mod mount;
pub mod mqueue;
pub mod namespace;
pub mod netlink;
pub mod nftables;
#[cfg(test)]
mod noise;
pub mod pagemap;
pub mod peer;
pub mod pidfd;
pub mod placeholder;
pub mod proc;
pub mod ptrace;
pub mod rtnetlink;
pub mod security;
pub mod shared_anonymous;
pub mod sock_diag;
pub mod socket;
pub mod sockopt;
pub mod sysv;
pub mod tcp_packet;
pub mod tcp_repair;
pub mod thread;
pub mod tty;
pub mod tun;
pub mod uffd;
pub mod vm;
pub mod vma_flags;
pub mod watch;
pub mod xsave;
