//! `/proc/<pid>/status`: credentials, masks and what has no other home.

use super::text::{ParseError, decimal, hex, lines, octal, signed, words};
use crate::ids::{ByteCount, HostPid, NsPid};

/// What a dump needs of `/proc/<pid>/status` (proc_pid_status(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The name of the thread, at most 15 bytes, any bytes.
    pub name: Vec<u8>,
    pub state: u8,
    pub tgid: Option<HostPid>,
    pub ppid: Option<HostPid>,
    pub tracer: Option<HostPid>,
    /// Absent for zombies and kernel threads.
    pub umask: Option<u32>,
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    /// Resident anonymous memory (`RssAnon`); absent for zombies.
    pub anonymous: Option<ByteCount>,
    /// Real, effective, saved, file system.
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// The id in each pid namespace, outermost first.
    pub ns_pids: Vec<NsPid>,
    pub ns_sids: Vec<NsPid>,
    pub ns_pgids: Vec<NsPid>,
    pub cap_inheritable: u64,
    pub cap_permitted: u64,
    pub cap_effective: u64,
    pub cap_bounding: u64,
    pub cap_ambient: u64,
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    pub seccomp_filters: u32,
    /// `SigBlk`, bit 0 for signal 1.
    pub blocked: u64,
    /// `SigCgt`.
    pub caught: u64,
    pub private_pending: u64,
    pub shared_pending: u64,
}

/// Reads a whole `status` file; lines that are not needed are passed over.
pub fn parse_status(text: &[u8]) -> Result<Status, ParseError> {
    let mut status = Status::default();
    for line in lines(text) {
        // The kernel escapes line feeds in `Name`, so a line never starts inside a name.
        let Some(colon) = line.iter().position(|&b| b == b':') else {
            continue;
        };
        // A name may begin and end with blanks.
        let value = match &line[..colon] {
            b"Name" => line[colon + 1..].strip_prefix(b"\t").unwrap_or(b""),
            _ => line[colon + 1..].trim_ascii(),
        };
        read_line(&mut status, &line[..colon], value)
            .ok_or_else(|| ParseError::new("status", "value", line))?;
    }
    Ok(status)
}

fn read_line(status: &mut Status, key: &[u8], value: &[u8]) -> Option<()> {
    match key {
        b"Name" => status.name = unescape_name(value),
        b"State" => status.state = *value.first()?,
        b"Tgid" => status.tgid = Some(pid(value)?),
        b"PPid" => status.ppid = Some(pid(value)?),
        b"TracerPid" => status.tracer = Some(pid(value)?).filter(|tracer| tracer.0 != 0),
        b"RssAnon" => {
            let kibibytes = words(value).next().and_then(decimal)?;
            status.anonymous = Some(ByteCount(kibibytes.checked_mul(1024)?));
        }
        b"Umask" => status.umask = Some(u32::try_from(octal(value)?).ok()?),
        b"Uid" => status.uids = four(value)?,
        b"Gid" => status.gids = four(value)?,
        b"Groups" => status.groups = words(value).map(short).collect::<Option<_>>()?,
        b"NSpid" => status.ns_pids = ns_pids(value)?,
        b"NSsid" => status.ns_sids = ns_pids(value)?,
        b"NSpgid" => status.ns_pgids = ns_pids(value)?,
        b"CapInh" => status.cap_inheritable = hex(value)?,
        b"CapPrm" => status.cap_permitted = hex(value)?,
        b"CapEff" => status.cap_effective = hex(value)?,
        b"CapBnd" => status.cap_bounding = hex(value)?,
        b"CapAmb" => status.cap_ambient = hex(value)?,
        b"NoNewPrivs" => status.no_new_privs = decimal(value)? != 0,
        b"Seccomp" => status.seccomp = short(value)?,
        b"Seccomp_filters" => status.seccomp_filters = short(value)?,
        b"SigCgt" => status.caught = hex(value)?,
        b"SigBlk" => status.blocked = hex(value)?,
        b"SigPnd" => status.private_pending = hex(value)?,
        b"ShdPnd" => status.shared_pending = hex(value)?,
        _ => {}
    }
    Some(())
}

/// Undoes the kernel's escapes, which are of line feed and backslash only.
fn unescape_name(value: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(value.len());
    let mut rest = value.iter();
    while let Some(&byte) = rest.next() {
        name.push(match byte {
            b'\\' => match rest.next() {
                Some(b'n') => b'\n',
                Some(&other) => other,
                None => byte,
            },
            other => other,
        });
    }
    name
}

fn short(text: &[u8]) -> Option<u32> {
    decimal(text).and_then(|n| u32::try_from(n).ok())
}

fn pid(text: &[u8]) -> Option<HostPid> {
    signed(text)
        .and_then(|n| i32::try_from(n).ok())
        .map(HostPid)
}

fn ns_pids(text: &[u8]) -> Option<Vec<NsPid>> {
    words(text)
        .map(|word| signed(word).and_then(|n| i32::try_from(n).ok()).map(NsPid))
        .collect()
}

fn four(text: &[u8]) -> Option<[u32; 4]> {
    let all = words(text).map(short).collect::<Option<Vec<u32>>>()?;
    all.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"Name:\tcat\\nUid:\t1\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\nPid:\t7\nPPid:\t3\n\
        TracerPid:\t0\nUid:\t0\t1\t2\t3\nGid:\t4\t5\t6\t7\nGroups:\t10 20 \nNSpid:\t7\t1\n\
        ShdPnd:\t0000000000000400\nCapEff:\t000001ffffffffff\nNoNewPrivs:\t1\nSeccomp:\t2\nNew_in_7.0:\twhat\n";

    #[test]
    fn known_lines_are_read_and_new_ones_passed_over() {
        let status = parse_status(TEXT).expect("well formed");
        assert_eq!(status.name, b"cat\nUid:\t1");
        assert_eq!(
            (status.umask, status.uids, status.gids),
            (Some(0o22), [0, 1, 2, 3], [4, 5, 6, 7])
        );
        assert_eq!(
            (status.groups.as_slice(), status.ns_pids.as_slice()),
            (&[10, 20][..], &[NsPid(7), NsPid(1)][..])
        );
        assert_eq!(
            (status.shared_pending, status.cap_effective),
            (0x400, 0x1ff_ffff_ffff)
        );
        assert!(status.no_new_privs && status.tracer.is_none() && status.seccomp == 2);
    }

    #[test]
    fn a_bad_number_names_its_line() {
        let error = parse_status(b"Uid:\t0\t1\t2\n").expect_err("three uids");
        assert!(error.to_string().contains("Uid"), "{error}");
        assert!(parse_status(b"CapEff:\tzz\n").is_err());
        assert!(parse_status(b"State:\t\n").is_err());
    }
}
