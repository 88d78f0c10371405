//! Settings of a network namespace and of its devices (`/proc/sys/net`).
//!
//! Saved:    those of `conf/all`, `conf/default` and each device, for IPv4 and IPv6; a few of the namespace.
//! Rebuilt:  all, default, then devices when they exist; only values that differ are written.
//! Not kept: nothing; what is not in the tables below is kept by `settings.rs`.
//!
//! The images name a setting by its place in a table, so the order here is part of the format.

use std::fs;
use std::io::ErrorKind;

use floe_image::messages::{SysctlEntry, SysctlType};
use floe_kernel::proc::read_setting;

use super::error::{Attempt, NetError};

const IPV4: [&str; 30] = [
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

const IPV6: [&str; 42] = [
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    "mtu",
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    STABLE_SECRET,
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

/// The one setting of a device that is no number; unreadable while it is unset.
const STABLE_SECRET: &str = "stable_secret";
/// Reset by the kernel when `forwarding` changes, so written last.
const AFTER_FORWARDING: &str = "accept_redirects";
/// The place of `accept_dad`.
const QUESTION: usize = 0;
/// Settings of the namespace's unix sockets.
const UNIX: [&str; 1] = ["max_dgram_qlen"];
/// Settings of the namespace's IPv4.
const IPV4_WHOLE: [&str; 1] = ["ping_group_range"];
/// No group: what a new namespace has.
const NO_GROUPS: [i64; 2] = [1, 0];

/// A protocol whose settings each device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Ipv4,
    Ipv6,
}

impl Protocol {
    fn directory(self) -> &'static str {
        match self {
            Protocol::Ipv4 => "ipv4",
            Protocol::Ipv6 => "ipv6",
        }
    }

    fn settings(self) -> &'static [&'static str] {
        match self {
            Protocol::Ipv4 => &IPV4,
            Protocol::Ipv6 => &IPV6,
        }
    }

    /// Names with dots are safe: these are paths, not dotted names.
    fn path(self, device: &str, setting: &str) -> String {
        format!("/proc/sys/net/{}/conf/{device}/{setting}", self.directory())
    }
}

/// What to do about a setting that this kernel does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    Refuse,
    /// `--weak-sysctls`.
    Pass,
}

/// Whether a file of `/proc/sys/net` is one of the tables'.
pub fn is_in_tables(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    match parts[..] {
        ["ipv4", "conf", _, setting] => IPV4.contains(&setting),
        ["ipv6", "conf", _, setting] => IPV6.contains(&setting),
        ["unix", setting] => UNIX.contains(&setting),
        // The same as `forwarding` of all devices.
        ["ipv4", setting] => IPV4_WHOLE.contains(&setting) || setting == "ip_forward",
        _ => false,
    }
}

/// Settings of a device of the namespace that the thread is in, or of `all` or `default`.
pub fn collect_device(protocol: Protocol, device: &str) -> Result<Vec<SysctlEntry>, NetError> {
    let settings = protocol.settings().iter();
    settings
        .map(|setting| {
            let text = read(&protocol.path(device, setting))?;
            Ok(if *setting == STABLE_SECRET {
                text_entry(text)
            } else {
                number_entry(text)
            })
        })
        .collect()
}

/// Settings of unix sockets; empty without any.
pub fn collect_unix() -> Result<Vec<SysctlEntry>, NetError> {
    let entries = UNIX.iter().map(|setting| {
        let text = read(&format!("/proc/sys/net/unix/{setting}"))?;
        Ok(number_entry(text))
    });
    let entries: Vec<SysctlEntry> = entries.collect::<Result<_, NetError>>()?;
    let known = entries.iter().any(|entry| entry.iarg.is_some());
    Ok(if known { entries } else { Vec::new() })
}

/// Settings of IPv4 as a whole.
pub fn collect_ipv4() -> Result<Vec<SysctlEntry>, NetError> {
    let entries = IPV4_WHOLE.iter().map(|setting| {
        let text = read(&format!("/proc/sys/net/ipv4/{setting}"))?;
        let groups: Option<Vec<i64>> = text.as_ref().map(|text| {
            text.split_whitespace()
                .filter_map(|one| one.parse().ok())
                .collect()
        });
        let unset = groups.is_some_and(|groups| groups == NO_GROUPS);
        Ok(text_entry(text.filter(|_| !unset)))
    });
    entries.collect()
}

/// Gives a device, or `all` or `default`, its settings.
pub fn execute_device(
    protocol: Protocol,
    device: &str,
    entries: &[SysctlEntry],
    missing: Missing,
) -> Result<(), NetError> {
    let pairs = protocol.settings().iter().zip(entries);
    let (last, first): (Vec<_>, Vec<_>) =
        pairs.partition(|(setting, _)| **setting == AFTER_FORWARDING);
    for (setting, entry) in first.into_iter().chain(last) {
        write(&protocol.path(device, setting), entry, missing)?;
    }
    Ok(())
}

/// The settings of a device of IPv6 while it gets its addresses: they were its own before, so nobody is asked
/// whether somebody else has them, which would take a second.
pub fn without_question(entries: &[SysctlEntry]) -> Vec<SysctlEntry> {
    let mut entries = entries.to_vec();
    if let Some(number) = entries.get_mut(QUESTION).and_then(|one| one.iarg.as_mut()) {
        *number = (*number).min(0);
    }
    entries
}

/// Older images have plain numbers for IPv4, -1 for a setting that was not there.
pub fn from_numbers(numbers: &[i32]) -> Vec<SysctlEntry> {
    let entries = numbers.iter().map(|number| SysctlEntry {
        r#type: SysctlType::Ctl32 as i32,
        iarg: Some(*number).filter(|number| *number != -1),
        sarg: None,
    });
    entries.collect()
}

/// Gives the namespace the settings of unix sockets and of IPv4.
pub fn execute_whole(
    unix: &[SysctlEntry],
    ipv4: &[SysctlEntry],
    missing: Missing,
) -> Result<(), NetError> {
    for (setting, entry) in UNIX.iter().zip(unix) {
        write(&format!("/proc/sys/net/unix/{setting}"), entry, missing)?;
    }
    for (setting, entry) in IPV4_WHOLE.iter().zip(ipv4) {
        write(&format!("/proc/sys/net/ipv4/{setting}"), entry, missing)?;
    }
    Ok(())
}

/// The text of a setting; `None` where this kernel lacks it, or it has no value.
fn read(path: &str) -> Result<Option<String>, NetError> {
    match read_setting(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(None),
        // Files that can only be written are no settings.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(None),
        Err(error) => Err(error).during("Reading", || path.to_string()),
    }
}

/// Some settings are unsigned in the kernel.
fn number(text: &str) -> Option<i32> {
    let text = text.trim();
    let unsigned = || text.parse::<u32>().ok().map(u32::cast_signed);
    text.parse::<i32>().ok().or_else(unsigned)
}

fn number_entry(text: Option<String>) -> SysctlEntry {
    SysctlEntry {
        r#type: SysctlType::Ctl32 as i32,
        iarg: text.as_deref().and_then(number),
        sarg: None,
    }
}

fn text_entry(text: Option<String>) -> SysctlEntry {
    SysctlEntry {
        r#type: SysctlType::CtlStr as i32,
        iarg: None,
        sarg: text,
    }
}

fn write(path: &str, entry: &SysctlEntry, missing: Missing) -> Result<(), NetError> {
    let wanted = match (&entry.sarg, entry.iarg) {
        (Some(text), _) => text.trim().to_string(),
        (None, Some(number)) => number.to_string(),
        (None, None) => return Ok(()),
    };
    let now = match read(path)? {
        Some(now) => now,
        // The secret, which cannot be read before it is set, is there all the same.
        None if fs::exists(path).unwrap_or(false) => String::new(),
        None if missing == Missing::Pass => {
            tracing::warn!(path, "a setting that this kernel does not have");
            return Ok(());
        }
        None => String::new(),
    };
    let same_number = entry.iarg.is_some() && number(&now) == entry.iarg;
    if same_number || now.split_whitespace().eq(wanted.split_whitespace()) {
        return Ok(());
    }
    fs::write(path, &wanted).during("Setting", || format!("{path} to {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_the_signed_range_are_kept() {
        assert_eq!(number("4294967295\n"), Some(-1));
        assert_eq!(number("-3\n"), Some(-3));
        assert_eq!(number("many"), None);
    }

    #[test]
    fn a_setting_that_has_its_value_is_not_written() {
        let path = "/proc/sys/net/ipv4/conf/lo/forwarding";
        let Ok(Some(text)) = read(path) else {
            return eprintln!("skipped: no /proc/sys/net");
        };
        write(path, &number_entry(Some(text)), Missing::Refuse).expect("nothing to do");
    }

    #[test]
    fn a_setting_that_no_kernel_has_passes_only_when_asked() {
        let entry = number_entry(Some("1".into()));
        let path = "/proc/sys/net/ipv4/conf/lo/no_such_setting";
        write(path, &entry, Missing::Pass).expect("passed");
        write(path, &entry, Missing::Refuse).expect_err("named");
    }
}
