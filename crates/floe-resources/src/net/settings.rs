//! Settings of a network namespace that CRIU's tables do not have (`/proc/sys/net`).
//!
//! Saved:    every file there that can be read and written and belongs to the namespace, as `path=text`.
//! Rebuilt:  what differs is written: first what needs no device, then the rest. Needs: the devices.
//! Not kept: settings of the whole machine; one that this kernel lacks or refuses is a warning.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use floe_kernel::proc::read_setting;

use super::error::{Attempt, NetError};
use super::sysctl::{Missing, is_in_tables};

const ROOT: &str = "/proc/sys/net";
/// Shown in every namespace though there is one for the whole machine, or nothing that is kept: the switch of
/// hooks cannot be set back, the seed is drawn at boot, and a table of routes is emptied by a write.
const SKIPPED: [&str; 5] = [
    "netfilter/nf_hooks_lwtunnel",
    "ipv4/fib_multipath_hash_seed",
    "ipv4/route/flush",
    "ipv6/route/flush",
    "netfilter/nf_conntrack_count",
];
/// The longest text that is kept.
const LONGEST: usize = 4096;

/// Reads the settings of the namespace that the calling thread is in.
pub fn collect() -> Result<Vec<String>, NetError> {
    let mut found = Vec::new();
    walk(Path::new(ROOT), &mut found)?;
    found.sort();
    Ok(found)
}

fn walk(directory: &Path, found: &mut Vec<String>) -> Result<(), NetError> {
    let what = || directory.display().to_string();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.during("Listing", what)?,
    };
    for entry in entries {
        let entry = entry.during("Listing", what)?;
        let path = entry.path();
        // The listing tells it: the program is stopped, and there are hundreds of files.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, found)?;
            continue;
        }
        let name = path.strip_prefix(ROOT).ok().and_then(Path::to_str);
        let Some(name) = name.filter(|name| is_kept(name)) else {
            continue;
        };
        if !entry
            .metadata()
            .is_ok_and(|about| about.mode() & 0o600 == 0o600)
        {
            continue;
        }
        // Some cannot be read until they are set.
        if let Ok(text) = read_setting(path.to_str().unwrap_or_default()) {
            let text = text.trim();
            if text.len() <= LONGEST {
                found.push(format!("{name}={text}"));
            }
        }
    }
    Ok(())
}

/// Whether a setting is one of ours to keep, and not kept by another name.
fn is_kept(name: &str) -> bool {
    // Milliseconds say the same more exactly.
    let in_other_units = name.starts_with("ipv") && name.contains("/neigh/") && {
        let setting = name.rsplit('/').next().unwrap_or_default();
        ["retrans_time", "base_reachable_time"].contains(&setting)
    };
    // A link has it as an attribute, which can be set without consequences.
    let mode = name.ends_with("/addr_gen_mode");
    !SKIPPED.contains(&name) && !in_other_units && !mode && !is_in_tables(name)
}

/// Which settings are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Those that need no device.
    Namespace,
    /// Those of devices.
    Devices,
}

/// Writes what differs, in the namespace that the calling thread is in.
pub fn execute(saved: &[String], stage: Stage, missing: Missing) {
    let pairs = saved.iter().filter_map(|one| one.split_once('='));
    let wanted = pairs.filter(|(name, _)| stage_of(name) == stage && is_inside(name));
    let mut wanted: Vec<(&str, &str)> = wanted.collect();
    // Defaults reach devices that nobody has set.
    wanted.sort_by_key(|(name, _)| !name.contains("/default/"));
    // Limits of one another are written in the order that works.
    let refused: Vec<_> = wanted
        .into_iter()
        .filter(|one| write(*one).is_err())
        .collect();
    for (name, text) in refused {
        match write((name, text)) {
            Err(error) if error.kind() == ErrorKind::NotFound && missing == Missing::Pass => {}
            Err(error) => {
                tracing::warn!("the setting net/{name} is not {text:?} as it was: {error}")
            }
            Ok(()) => {}
        }
    }
}

/// Images are not to reach other files.
fn is_inside(name: &str) -> bool {
    is_kept(name) && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn stage_of(name: &str) -> Stage {
    let mut parts = name.split('/').skip(1);
    let of_devices = matches!(parts.next(), Some("conf" | "neigh"));
    if of_devices && !matches!(parts.next(), Some("all" | "default")) {
        Stage::Devices
    } else {
        Stage::Namespace
    }
}

fn write((name, text): (&str, &str)) -> std::io::Result<()> {
    let path = format!("{ROOT}/{name}");
    let now = read_setting(&path)?;
    if now.split_whitespace().eq(text.split_whitespace()) {
        return Ok(());
    }
    // An empty text is no write at all.
    fs::write(path, format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_machine_and_of_other_tables_are_left_out() {
        assert!(is_kept("core/somaxconn"));
        assert!(is_kept("ipv4/neigh/eth0/retrans_time_ms"));
        assert!(!is_kept("ipv4/neigh/eth0/retrans_time"));
        assert!(!is_kept("netfilter/nf_hooks_lwtunnel"));
        assert!(!is_kept("ipv4/conf/eth0/rp_filter"));
        assert!(is_kept("ipv4/conf/eth0/bc_forwarding"));
    }

    #[test]
    fn devices_come_after_the_namespace() {
        assert_eq!(
            stage_of("ipv4/neigh/default/gc_stale_time"),
            Stage::Namespace
        );
        assert_eq!(stage_of("ipv6/neigh/eth0/gc_stale_time"), Stage::Devices);
        assert_eq!(stage_of("core/somaxconn"), Stage::Namespace);
    }

    #[test]
    fn no_name_leads_out() {
        assert!(!is_inside("../kernel/core_pattern"));
        assert!(!is_inside("/etc/passwd"));
        assert!(is_inside("mptcp/enabled"));
    }
}
