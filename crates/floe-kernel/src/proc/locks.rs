//! Locks on files: `/proc/locks` and the `lock:` lines of fdinfo.

use super::text::{ParseError, decimal, hex, lines, signed, words};

/// Which call made a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockKind {
    Flock,
    Posix,
    Ofd,
    Lease,
}

/// What a lock grants; a breaking lease says what it is broken down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockMode {
    Read,
    Write,
    /// Of a lease that is being given up.
    Unlock,
}

/// One lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLock {
    pub kind: LockKind,
    pub mode: LockMode,
    /// A lease that a conflicting open is waiting for.
    pub breaking: bool,
    /// Owner's pid in the reader's pid namespace; -1 for OFD locks.
    pub pid: i32,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// Last byte, `None` to the end of the file.
    pub end: Option<u64>,
}

/// Reads granted locks, one a line: `ID: KIND [MANDATORY] MODE PID MAJ:MIN:INO START END`. Lines of
/// waiting requests (`->`) are passed over: they restart with their task.
pub fn parse_locks(text: &[u8]) -> Result<Vec<FileLock>, ParseError> {
    lines(text)
        .filter(|line| !line.windows(2).any(|pair| pair == b"->"))
        .map(|line| parse_line(line).ok_or_else(|| ParseError::new("locks", "lock", line)))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<FileLock> {
    let line = line.strip_prefix(b"lock:").unwrap_or(line);
    let mut parts = words(line).skip(1);
    let kind = match parts.next()? {
        b"FLOCK" => LockKind::Flock,
        b"POSIX" => LockKind::Posix,
        b"OFDLCK" => LockKind::Ofd,
        b"LEASE" | b"DELEG" => LockKind::Lease,
        _ => return None,
    };
    let breaking = parts.next()? == b"BREAKING";
    let mode = match parts.next()? {
        b"READ" => LockMode::Read,
        b"WRITE" => LockMode::Write,
        b"UNLCK" => LockMode::Unlock,
        _ => return None,
    };
    let pid = i32::try_from(signed(parts.next()?)?).ok()?;
    let mut object = parts.next()?.split(|&b| b == b':');
    let number = |part: Option<&[u8]>| u32::try_from(hex(part?)?).ok();
    let (dev_major, dev_minor) = (number(object.next())?, number(object.next())?);
    let inode = decimal(object.next()?)?;
    let start = decimal(parts.next()?)?;
    let end = match parts.next()? {
        b"EOF" => None,
        last => Some(decimal(last)?),
    };
    Some(FileLock {
        kind,
        mode,
        breaking,
        pid,
        dev_major,
        dev_minor,
        inode,
        start,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_read_and_waiters_passed_over() {
        let text = b"1: POSIX  ADVISORY  WRITE 11 fe:00:5 0 EOF\n1: -> POSIX  ADVISORY  WRITE 12 fe:00:5 0 EOF\n\
            2: FLOCK  ADVISORY  READ  13 00:1f:6 0 EOF\n3: OFDLCK ADVISORY  READ  -1 fe:00:7 10 19\n\
            4: LEASE  BREAKING  UNLCK 14 fe:00:8 0 EOF\n";
        let locks = parse_locks(text).expect("well formed");
        assert_eq!(locks.len(), 4);
        assert_eq!(
            (locks[0].kind, locks[0].pid, locks[0].dev_major),
            (LockKind::Posix, 11, 0xfe)
        );
        assert_eq!(
            (locks[2].start, locks[2].end, locks[2].pid),
            (10, Some(19), -1)
        );
        assert!(locks[3].breaking && locks[3].mode == LockMode::Unlock);
    }

    #[test]
    fn fdinfo_lines_read_the_same() {
        let locks = parse_locks(b"lock:\t1: FLOCK  ADVISORY  WRITE 9 fe:00:5 0 EOF\n")
            .expect("well formed");
        assert_eq!(
            (locks[0].kind, locks[0].mode),
            (LockKind::Flock, LockMode::Write)
        );
        assert!(parse_locks(b"1: WHAT ADVISORY READ 1 1:1:1 0 EOF").is_err());
    }
}
