//! Reading of the values that are more than a path or a word.

use std::time::Duration;

use crate::{
    ByteLimit, CgroupRoot, CpuCapabilities, FileValidation, IterateOptions, JoinNamespace, LsmKind,
    LsmProfile, ManageCgroups, NetworkLock, PreDumpMode, TrackerChoice, TreePid, ValueError,
    VethPair,
};

pub(crate) fn number<T: std::str::FromStr>(
    text: &str,
    what: &'static str,
) -> Result<T, ValueError> {
    text.parse().map_err(|_| ValueError::Expected(what))
}

pub(crate) fn tree_pid(text: &str) -> Result<TreePid, ValueError> {
    TreePid::new(number(text, "a positive pid")?).ok_or(ValueError::Expected("a positive pid"))
}

pub(crate) fn descriptor(text: &str) -> Result<i32, ValueError> {
    const WHAT: &str = "the number of an open descriptor";
    number::<i32>(text, WHAT).and_then(|fd| {
        if fd < 0 {
            Err(ValueError::Expected(WHAT))
        } else {
            Ok(fd)
        }
    })
}

/// Bytes in a second: less than a page in each would never end.
pub(crate) fn rate(text: &str) -> Result<ByteLimit, ValueError> {
    const LEAST: u64 = 4096;
    match byte_limit(text)? {
        rate if rate.0 >= LEAST => Ok(rate),
        _ => Err(ValueError::Expected(
            "a size of 4K or more; leave it out for no limit",
        )),
    }
}

/// `N`, or `N` followed by K, M or G (1024, 1024^2, 1024^3).
pub(crate) fn byte_limit(text: &str) -> Result<ByteLimit, ValueError> {
    const WHAT: &str = "a size such as 1048576, 512K, 64M or 2G";
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..]
        .to_ascii_uppercase()
        .trim_end_matches("IB")
        .trim_end_matches('B')
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(ValueError::Expected(WHAT)),
    };
    let count: u64 = number(digits, WHAT)?;
    count
        .checked_mul(1 << shift)
        .map(ByteLimit)
        .ok_or(ValueError::Expected(WHAT))
}

/// CRIU's rules: a list adds to what is set, `^` takes away, `none` clears, `^none` sets all.
pub(crate) fn cpu_cap(
    now: CpuCapabilities,
    text: Option<&str>,
) -> Result<CpuCapabilities, ValueError> {
    let Some(text) = text else {
        return Ok(CpuCapabilities::ALL);
    };
    let mut caps = now;
    for word in text.split(',').filter(|word| !word.is_empty()) {
        let name = word.trim_start_matches('^');
        let on = (word.len() - name.len()) % 2 == 0;
        match name {
            "fpu" => caps.fpu = on,
            "ins" => caps.instructions = on,
            "cpu" => caps.exact = on,
            "all" => (caps.fpu, caps.instructions, caps.exact) = (on, on, on),
            "none" => {
                caps = if on {
                    CpuCapabilities::NONE
                } else {
                    CpuCapabilities::ALL
                }
            }
            other => {
                return Err(ValueError::choice(
                    other,
                    &["fpu", "ins", "cpu", "all", "none"],
                ));
            }
        }
    }
    caps.image = caps.fpu || caps.instructions || caps.exact;
    Ok(caps)
}

pub(crate) fn manage_cgroups(text: Option<&str>) -> Result<ManageCgroups, ValueError> {
    Ok(match text.unwrap_or("soft") {
        "none" | "cg-none" => ManageCgroups::None,
        "props" => ManageCgroups::Props,
        "soft" => ManageCgroups::Soft,
        "full" => ManageCgroups::Full,
        "strict" => ManageCgroups::Strict,
        "ignore" => ManageCgroups::Ignore,
        other => {
            return Err(ValueError::choice(
                other,
                &["none", "props", "soft", "full", "strict", "ignore"],
            ));
        }
    })
}

pub(crate) fn cgroup_root(text: &str) -> CgroupRoot {
    match text.split_once(':') {
        Some((controller, path)) => CgroupRoot {
            controller: Some(controller.into()),
            path: path.into(),
        },
        None => CgroupRoot {
            controller: None,
            path: text.into(),
        },
    }
}

pub(crate) fn network_lock(text: &str) -> Result<NetworkLock, ValueError> {
    Ok(match text {
        "nftables" => NetworkLock::Nftables,
        "iptables" => NetworkLock::Iptables,
        "skip" | "none" => NetworkLock::Skip,
        other => return Err(ValueError::choice(other, &["nftables", "iptables", "skip"])),
    })
}

pub(crate) fn file_validation(text: &str) -> Result<FileValidation, ValueError> {
    Ok(match text {
        "filesize" => FileValidation::FileSize,
        "buildid" => FileValidation::BuildId,
        other => return Err(ValueError::choice(other, &["filesize", "buildid"])),
    })
}

pub(crate) fn pre_dump_mode(text: &str) -> Result<PreDumpMode, ValueError> {
    Ok(match text {
        "splice" => PreDumpMode::Splice,
        "read" => PreDumpMode::Read,
        other => return Err(ValueError::choice(other, &["splice", "read"])),
    })
}

/// `auto`, or exactly so many rounds.
pub(crate) fn rounds(
    before: IterateOptions,
    text: Option<&str>,
) -> Result<IterateOptions, ValueError> {
    Ok(match text {
        None | Some("auto") => before,
        Some(text) => IterateOptions {
            max_rounds: number(text, "auto, or a number of rounds")?,
            fixed: true,
            ..before
        },
    })
}

/// A time with its unit: `20ms`, `5s`, `2m`; without one, seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, ValueError> {
    const WHAT: &str = "a time such as 20ms, 5s or 2m";
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: u64 = number(digits, WHAT)?;
    let micros = match &text[digits.len()..] {
        "us" => 1,
        "ms" => 1000,
        "" | "s" => 1_000_000,
        "m" | "min" => 60_000_000,
        _ => return Err(ValueError::Expected(WHAT)),
    };
    let micros = count
        .checked_mul(micros)
        .ok_or(ValueError::Expected(WHAT))?;
    Ok(Duration::from_micros(micros))
}

pub(crate) fn tracker(text: &str) -> Result<TrackerChoice, ValueError> {
    Ok(match text {
        "auto" => TrackerChoice::Auto,
        "uffd" => TrackerChoice::Uffd,
        "soft-dirty" => TrackerChoice::SoftDirty,
        "content" => TrackerChoice::Content,
        "none" => TrackerChoice::None,
        other => {
            let names = &["auto", "uffd", "soft-dirty", "content", "none"];
            return Err(ValueError::choice(other, names));
        }
    })
}

/// How pages are compressed: `lz4`, `zstd` or `zstd:LEVEL`.
pub(crate) fn codec(text: &str) -> Result<String, ValueError> {
    const WHAT: &str = "lz4, zstd or zstd:LEVEL (LEVEL from -7 to 22)";
    let known = match text.split_once(':') {
        None => ["lz4", "zstd"].contains(&text),
        Some(("zstd", level)) => level
            .parse()
            .is_ok_and(|level: i32| (-7..=22).contains(&level)),
        Some(_) => false,
    };
    known
        .then(|| text.to_owned())
        .ok_or(ValueError::Expected(WHAT))
}

pub(crate) fn join_ns(text: &str) -> Result<JoinNamespace, ValueError> {
    const WHAT: &str = "NS:PID or NS:FILE, with ,UID,GID for a user namespace";
    const KINDS: [&str; 7] = ["ipc", "net", "time", "user", "uts", "cgroup", "pid"];
    let (kind, rest) = text.split_once(':').ok_or(ValueError::Expected(WHAT))?;
    if !KINDS.contains(&kind) {
        return Err(ValueError::choice(kind, &KINDS));
    }
    let mut parts = rest.splitn(2, ',');
    let target = parts
        .next()
        .filter(|target| !target.is_empty())
        .ok_or(ValueError::Expected(WHAT))?;
    let ids = match parts.next() {
        Some(ids) if kind == "user" => {
            let (uid, gid) = ids.split_once(',').ok_or(ValueError::Expected(WHAT))?;
            Some((number(uid, WHAT)?, number(gid, WHAT)?))
        }
        Some(_) => return Err(ValueError::Expected(WHAT)),
        None => None,
    };
    Ok(JoinNamespace {
        kind: kind.into(),
        target: target.into(),
        ids,
    })
}

pub(crate) fn veth_pair(text: &str) -> Result<VethPair, ValueError> {
    let (inner, outer) = text.split_once('=').ok_or(ValueError::Expected("IN=OUT"))?;
    Ok(VethPair {
        inner: inner.into(),
        outer: outer.into(),
    })
}

pub(crate) fn lsm_profile(text: &str) -> Result<LsmProfile, ValueError> {
    let (kind, name) = text.split_once(':').unwrap_or((text, ""));
    let kind = match kind {
        "apparmor" => LsmKind::AppArmor,
        "selinux" => LsmKind::SeLinux,
        "none" if name.is_empty() => return Ok(LsmProfile::None),
        _ => return Err(ValueError::choice(kind, &["apparmor", "selinux", "none"])),
    };
    if name.is_empty() || name.contains(['\0', '\n']) {
        return Err(ValueError::Expected("apparmor:NAME, selinux:LABEL or none"));
    }
    Ok(LsmProfile::Label(kind, name.into()))
}

/// `-v` adds one, `-vvv` its length, `-v4` sets; `-verbosity=N` with one dash, which CRIU's test
/// suite writes, means `--verbosity=N`.
pub(crate) fn verbosity(now: u32, text: Option<&str>) -> Result<u32, ValueError> {
    match text {
        None => Ok(now + 1),
        Some(text) if text.starts_with('v') && text.bytes().all(|byte| byte == b'v') => {
            Ok(now + text.len() as u32 + 1)
        }
        Some(text) => number(
            text.strip_prefix("erbosity=").unwrap_or(text),
            "a number from 0 to 4",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("100", 100),
            ("4K", 4096),
            ("64M", 64 << 20),
            ("2G", 2 << 30),
            ("1k", 1024),
        ] {
            assert_eq!(byte_limit(text), Ok(ByteLimit(bytes)), "{text}");
        }
        for bad in ["", "M", "12X", "-1", "99999999999G"] {
            assert!(byte_limit(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rate_of_less_than_a_page_is_refused() {
        assert_eq!(rate("4K"), Ok(ByteLimit(4096)));
        for bad in ["0", "1", "4095"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cpu_capabilities_add_up_as_in_criu() {
        let default = CpuCapabilities::DEFAULT;
        assert_eq!(cpu_cap(default, None), Ok(CpuCapabilities::ALL));
        assert_eq!(cpu_cap(default, Some("none")), Ok(CpuCapabilities::NONE));
        assert_eq!(cpu_cap(default, Some("cpu")), Ok(CpuCapabilities::ALL));
        let no_ins = cpu_cap(default, Some("^ins")).expect("a known word");
        assert!(no_ins.fpu && !no_ins.instructions && !no_ins.exact);
        assert!(
            cpu_cap(default, Some("fqu"))
                .is_err_and(|error| error.to_string().contains("did you mean `fpu`"))
        );
    }

    #[test]
    fn namespaces_to_join_have_a_kind_and_a_target() {
        let user = JoinNamespace {
            kind: "user".into(),
            target: "12".into(),
            ids: Some((0, 5)),
        };
        assert_eq!(join_ns("user:12,0,5"), Ok(user));
        assert!(join_ns("net:/run/netns/a").is_ok());
        for bad in ["net", "mnt:1", "net:", "net:1,2", "user:1,2"] {
            assert!(join_ns(bad).is_err(), "{bad}");
        }
    }
}
