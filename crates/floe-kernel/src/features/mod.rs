//! What this kernel can do, each thing found out by trying it.
//!
//! One table drives `floe check`, its `--feature`, the documents and [`KernelFeatures`]. A probe
//! never looks at a version: distributions backport, and a sandbox takes away.
//!
//! The kernel contract of the probes is the one of each system call's man page; none of them
//! changes anything that outlives it.

mod files;
mod memory;
mod network;
mod process;
mod table;
mod tracee;

pub use table::{FEATURES, KernelFeatures};
use tracee::Tracee;

/// How badly a feature is needed; the categories of `criu check`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Nothing works without it.
    Always,
    /// Only programs that use something particular need it.
    Sometimes,
    /// Makes something faster or serves what Floe only begins to do.
    Experimental,
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Feature {
    /// Floe's name, also that of the field of [`KernelFeatures`] where there is one.
    pub name: &'static str,
    /// The names under which `criu check --feature` knows it.
    pub criu_names: &'static [&'static str],
    /// How badly it is needed.
    pub need: Need,
    /// What it is for.
    pub purpose: &'static str,
    /// What happens without it.
    pub without: &'static str,
    probe: fn(&ProbeContext) -> bool,
}

impl Feature {
    /// Tries the feature.
    pub fn present(&self, context: &ProbeContext) -> bool {
        (self.probe)(context)
    }

    /// True if `name` is one of its names.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.criu_names.contains(&name)
    }
}

/// The line that answers to `name`, in Floe's or CRIU's words.
pub fn find(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|feature| feature.is_called(name))
}

/// Every name that [`find`] knows, CRIU's first.
pub fn names() -> Vec<&'static str> {
    let criu = FEATURES
        .iter()
        .flat_map(|feature| feature.criu_names.iter().copied());
    let mut names: Vec<_> = criu.collect();
    for feature in FEATURES {
        if !names.contains(&feature.name) {
            names.push(feature.name);
        }
    }
    names
}

/// What several probes share: a stopped child to try ptrace requests on, made at first use.
#[derive(Default)]
pub struct ProbeContext {
    tracee: std::cell::OnceCell<Option<Tracee>>,
}

impl ProbeContext {
    fn tracee(&self) -> Option<&Tracee> {
        self.tracee.get_or_init(|| Tracee::start().ok()).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_found_and_means_one_feature() {
        for name in names() {
            assert_eq!(
                FEATURES
                    .iter()
                    .filter(|feature| feature.is_called(name))
                    .count(),
                1,
                "{name}"
            );
        }
        assert!(find("no_such_feature").is_none());
    }

    #[test]
    fn names_of_criu_4_2_are_all_known() {
        let criu = "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock seccomp_suspend \
            seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd uffd-noncoop can_map_vdso sk_ns \
            sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens external_net_ns clone3_set_tid newifindex \
            nftables has_ipt_legacy pidfd_store ns_pid apparmor_stacking network_lock_nftables sockopt_buf_lock \
            memfd_hugetlb move_mount_set_group openat2 get_rseq_conf ipv6_freebind pagemap_scan timer_cr_ids \
            overlayfs_maps breakpoints pagemap_scan_guard_pages";
        for name in criu.split_whitespace() {
            assert!(find(name).is_some(), "{name}");
        }
    }
}
