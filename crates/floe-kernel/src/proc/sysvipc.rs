//! System V objects of an IPC namespace: `/proc/sysvipc/{shm,sem,msg}`.

use super::text::{ParseError, decimal, lines, octal, signed, words};

/// What all three kinds have: who may use an object, and by which key and number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IpcOwner {
    /// The key given to `shmget` and the like; 0 is `IPC_PRIVATE`.
    pub key: u32,
    pub id: i32,
    /// Permissions, for segments with the flags of their own (`SHM_DEST`, `SHM_LOCKED`).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The creator's, who has the owner's rights for ever.
    pub cuid: u32,
    pub cgid: u32,
}

/// A segment of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmSegment {
    pub owner: IpcOwner,
    /// Bytes, as asked for.
    pub size: u64,
    /// Pid of the creator in the reader's pid namespace.
    pub creator: i32,
    /// Mappings of it.
    pub attached: u64,
}

/// Reads `/proc/sysvipc/shm`.
pub fn parse_sysvipc_shm(text: &[u8]) -> Result<Vec<ShmSegment>, ParseError> {
    let parse = |line: &[u8]| {
        let mut parts = words(line);
        let (key, id, mode) = beginning(&mut parts)?;
        let size = decimal(parts.next()?)?;
        let creator = i32::try_from(signed(parts.next()?)?).ok()?;
        let attached = decimal(parts.nth(1)?)?;
        Some(ShmSegment {
            owner: owner((key, id, mode), &mut parts)?,
            size,
            creator,
            attached,
        })
    };
    table(text, "sysvipc/shm", parse)
}

/// A set of semaphores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SemSet {
    pub owner: IpcOwner,
    /// Semaphores in it.
    pub count: u32,
}

/// Reads `/proc/sysvipc/sem`.
pub fn parse_sysvipc_sem(text: &[u8]) -> Result<Vec<SemSet>, ParseError> {
    let parse = |line: &[u8]| {
        let mut parts = words(line);
        let beginning = beginning(&mut parts)?;
        let count = u32::try_from(decimal(parts.next()?)?).ok()?;
        let owner = owner(beginning, &mut parts)?;
        Some(SemSet { owner, count })
    };
    table(text, "sysvipc/sem", parse)
}

/// A message queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsgQueue {
    pub owner: IpcOwner,
    /// Messages in it.
    pub messages: u32,
}

/// Reads `/proc/sysvipc/msg`.
pub fn parse_sysvipc_msg(text: &[u8]) -> Result<Vec<MsgQueue>, ParseError> {
    let parse = |line: &[u8]| {
        let mut parts = words(line);
        let beginning = beginning(&mut parts)?;
        let messages = u32::try_from(decimal(parts.nth(1)?)?).ok()?;
        // Past the pids of the last sender and receiver.
        parts.nth(1)?;
        let owner = owner(beginning, &mut parts)?;
        Some(MsgQueue { owner, messages })
    };
    table(text, "sysvipc/msg", parse)
}

type Beginning = (u32, i32, u32);

/// Key, number and mode, with which every line begins.
fn beginning<'a>(parts: &mut impl Iterator<Item = &'a [u8]>) -> Option<Beginning> {
    // The kernel prints keys as signed numbers.
    let key = i32::try_from(signed(parts.next()?)?).ok()?;
    let id = i32::try_from(signed(parts.next()?)?).ok()?;
    let mode = u32::try_from(octal(parts.next()?)?).ok()?;
    Some((key.cast_unsigned(), id, mode))
}

fn owner<'a>(
    (key, id, mode): Beginning,
    parts: &mut impl Iterator<Item = &'a [u8]>,
) -> Option<IpcOwner> {
    let mut number = || u32::try_from(decimal(parts.next()?)?).ok();
    Some(IpcOwner {
        key,
        id,
        mode,
        uid: number()?,
        gid: number()?,
        cuid: number()?,
        cgid: number()?,
    })
}

fn table<T>(
    text: &[u8],
    file: &'static str,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Result<Vec<T>, ParseError> {
    lines(text)
        .skip(1)
        .map(|line| parse(line).ok_or_else(|| ParseError::new(file, "object", line)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_with_its_flags() {
        let text = b"       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n        -2      32768  1600                    56  5527  5534      3   101   104   102   105 1795456433 1795456433 1795456433                  4096                     0\n";
        let found = parse_sysvipc_shm(text).expect("well formed");
        let owner = IpcOwner {
            key: 0xffff_fffe,
            id: 32768,
            mode: 0o1600,
            uid: 101,
            gid: 104,
            cuid: 102,
            cgid: 105,
        };
        let segment = ShmSegment {
            owner,
            size: 56,
            creator: 5527,
            attached: 3,
        };
        assert_eq!(found, [segment]);
        assert!(parse_sysvipc_shm(b"head\n 1 2 3\n").is_err());
    }

    #[test]
    fn sets_and_queues_are_read() {
        let text = b"       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n         9          1   666          3     1     2     3     4          0          0\n";
        let found = parse_sysvipc_sem(text).expect("well formed");
        let owner = IpcOwner {
            key: 9,
            id: 1,
            mode: 0o666,
            uid: 1,
            gid: 2,
            cuid: 3,
            cgid: 4,
        };
        assert_eq!(found, [SemSet { owner, count: 3 }]);
        let text = b"       key      msqid perms      cbytes       qnum lspid lrpid   uid   gid  cuid  cgid      stime      rtime      ctime\n         9          1   666           5          2    71    72     1     2     3     4          0          0          0\n";
        let found = parse_sysvipc_msg(text).expect("well formed");
        assert_eq!(found, [MsgQueue { owner, messages: 2 }]);
    }
}
