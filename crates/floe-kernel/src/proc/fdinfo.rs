//! `/proc/<pid>/fdinfo/<fd>`: the state of one descriptor.

use super::text::{ParseError, decimal, lines, octal, signed};

/// The lines that every kind of file has, and the whole text for the kinds that have more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// Offset in bytes.
    pub pos: i64,
    /// Flags of the open file description, and `O_CLOEXEC` when the descriptor has it.
    pub flags: u32,
    pub mnt_id: i32,
    /// The inode number of the underlying object (Linux 5.14+).
    pub ino: Option<u64>,
    /// Whether a `lock:` line is there.
    pub locked: bool,
    /// The raw text.
    pub text: Vec<u8>,
}

impl FdInfo {
    /// Values of all lines `key: value`, in order, without surrounding blanks.
    pub fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a [u8]> {
        lines(&self.text)
            .filter_map(move |line| line.strip_prefix(key.as_bytes())?.strip_prefix(b":"))
            .map(<[u8]>::trim_ascii)
    }

    /// The value of the first line `key: value`.
    pub fn value<'a>(&'a self, key: &'a str) -> Option<&'a [u8]> {
        self.values(key).next()
    }
}

/// Reads the common lines.
pub fn parse_fdinfo(text: Vec<u8>) -> Result<FdInfo, ParseError> {
    let mut info = FdInfo::default();
    for line in lines(&text) {
        let bad = || ParseError::new("fdinfo", "value", line);
        let Some(colon) = line.iter().position(|&b| b == b':') else {
            continue;
        };
        let value = line[colon + 1..].trim_ascii();
        match &line[..colon] {
            b"pos" => info.pos = signed(value).ok_or_else(bad)?,
            b"flags" => {
                info.flags = octal(value)
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or_else(bad)?
            }
            b"mnt_id" => {
                info.mnt_id = signed(value)
                    .and_then(|n| i32::try_from(n).ok())
                    .ok_or_else(bad)?
            }
            b"ino" => info.ino = Some(decimal(value).ok_or_else(bad)?),
            b"lock" => info.locked = true,
            _ => {}
        }
    }
    info.text = text;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_lines_and_repeated_keys_are_found() {
        let text = b"pos:\t12\nflags:\t02100001\nmnt_id:\t-1\nino:\t7\neventfd-count:   2a\ntfd: 1\ntfd: 2\n".to_vec();
        let info = parse_fdinfo(text).expect("well formed");
        assert_eq!(
            (info.pos, info.flags, info.mnt_id, info.ino),
            (12, 0o2100001, -1, Some(7))
        );
        assert_eq!(info.value("eventfd-count"), Some(&b"2a"[..]));
        assert_eq!(info.values("tfd").collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!(info.value("event"), None);
    }

    #[test]
    fn a_bad_number_is_an_error() {
        assert!(parse_fdinfo(b"flags:\t9\n".to_vec()).is_err());
        assert!(parse_fdinfo(b"pos:\t\n".to_vec()).is_err());
    }
}
