//! `/proc/<pid>/mountinfo`: the mounts of a namespace.

use super::text::{ParseError, decimal, lines, unescape, words};

/// One mount (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: i32,
    pub parent: i32,
    pub dev_major: u32,
    pub dev_minor: u32,
    /// Path of the mounted directory in its file system.
    pub root: Vec<u8>,
    /// Path of the mount point from the reader's root.
    pub point: Vec<u8>,
    pub fs_type: Vec<u8>,
    pub source: Vec<u8>,
    pub options: Vec<u8>,
    pub super_options: Vec<u8>,
    /// Peer group of a shared mount.
    pub shared: Option<u32>,
    /// Peer group that a slave mount receives from.
    pub master: Option<u32>,
    /// Whether it cannot be bound elsewhere.
    pub unbindable: bool,
}

/// Reads a whole `mountinfo` file; lines may be of any length.
pub fn parse_mountinfo(text: &[u8]) -> Result<Vec<Mount>, ParseError> {
    lines(text)
        .map(|line| parse_line(line).ok_or_else(|| ParseError::new("mountinfo", "mount", line)))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut parts = words(line);
    let id = small(parts.next()?)?;
    let parent = small(parts.next()?)?;
    let dev = parts.next()?;
    let colon = dev.iter().position(|&b| b == b':')?;
    let root = unescape(parts.next()?);
    let point = unescape(parts.next()?);
    let options = parts.next()?.to_vec();
    let (mut shared, mut master, mut unbindable) = (None, None, false);
    for word in parts.by_ref().take_while(|word| *word != b"-") {
        if let Some(group) = word.strip_prefix(b"shared:") {
            shared = Some(small(group)?.cast_unsigned());
        } else if let Some(group) = word.strip_prefix(b"master:") {
            master = Some(small(group)?.cast_unsigned());
        } else if word == b"unbindable" {
            unbindable = true;
        }
    }
    let fs_type = unescape(parts.next()?);
    // An empty source prints as nothing, so only two words may follow the dash.
    let rest: Vec<&[u8]> = parts.collect();
    let (source, super_options) = match rest[..] {
        [super_options] => (Vec::new(), super_options.to_vec()),
        [source, super_options, ..] => (unescape(source), super_options.to_vec()),
        [] => return None,
    };
    Some(Mount {
        id,
        parent,
        dev_major: small(&dev[..colon])?.cast_unsigned(),
        dev_minor: small(&dev[colon + 1..])?.cast_unsigned(),
        root,
        point,
        fs_type,
        source,
        options,
        super_options,
        shared,
        master,
        unbindable,
    })
}

fn small(text: &[u8]) -> Option<i32> {
    decimal(text).and_then(|n| i32::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_fields_and_escapes_are_read() {
        let text = br"36 35 98:0 /mnt1 /a\040b rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue
22 1 0:21 / /proc rw - proc  rw
";
        let mounts = parse_mountinfo(text).expect("well formed");
        assert_eq!(
            (
                mounts[0].point.as_slice(),
                mounts[0].shared,
                mounts[0].master
            ),
            (&b"/a b"[..], Some(7), Some(1))
        );
        assert_eq!(
            (mounts[0].dev_major, mounts[0].fs_type.as_slice()),
            (98, &b"ext3"[..])
        );
        assert_eq!(
            (
                mounts[1].source.as_slice(),
                mounts[1].super_options.as_slice()
            ),
            (&b""[..], &b"rw"[..])
        );
    }

    #[test]
    fn a_line_without_its_dash_is_an_error() {
        assert!(parse_mountinfo(b"36 35 98:0 / / rw shared:7\n").is_err());
        assert!(parse_mountinfo(b"36 35 98 / / rw - a b c\n").is_err());
    }
}
