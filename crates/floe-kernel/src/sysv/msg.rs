//! Message queues (`msgget(2)`).
//!
//! Contract relied on: a message is a type of eight bytes and its text; `msgrcv` writes no more than
//! the size that it is given.

use std::io;

use super::checked;

/// `MSG_COPY`: the message with that index is copied, and stays.
const MSG_COPY: i32 = 0o40000;
/// Bytes of the type before the text.
const TYPE: usize = 8;

/// Makes a queue that must not exist yet; `flags` are permissions.
pub fn create(key: u32, flags: i32) -> io::Result<i32> {
    let flags = flags | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: integers only.
    checked(unsafe { libc::msgget(key.cast_signed(), flags) })
}

/// Removes a queue.
pub fn remove(id: i32) -> io::Result<()> {
    // SAFETY: the command takes no structure.
    checked(unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// The most bytes that a queue takes (`msg_qbytes`).
pub fn capacity(id: i32) -> io::Result<u64> {
    // SAFETY: all-zero bytes are a valid `msqid_ds` of integers.
    let mut state: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is live and has room for what IPC_STAT writes.
    checked(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut state) })?;
    Ok(state.msg_qbytes)
}

/// Changes owner, permissions and capacity of a queue; its creator stays.
pub fn set_owner(id: i32, (uid, gid): (u32, u32), mode: u32, capacity: u64) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `msqid_ds` of integers.
    let mut state: libc::msqid_ds = unsafe { std::mem::zeroed() };
    state.msg_perm.uid = uid;
    state.msg_perm.gid = gid;
    state.msg_perm.mode = mode as _;
    state.msg_qbytes = capacity;
    // SAFETY: `state` is a live `msqid_ds`, from which IPC_SET only reads.
    checked(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut state) }).map(drop)
}

/// Copies the message at `index`: its type and text. `buffer` has room for the type and the text.
/// `ENOMSG` after the last, `E2BIG` where the room is too small.
pub fn copy(id: i32, index: u32, buffer: &mut [u8]) -> io::Result<(u64, Vec<u8>)> {
    let flags = MSG_COPY | libc::IPC_NOWAIT;
    let limit = buffer
        .len()
        .checked_sub(TYPE)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: `buffer` has room for the type and `limit` bytes.
    let len = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), limit, index.into(), flags) };
    let Ok(len) = usize::try_from(len) else {
        return Err(io::Error::last_os_error());
    };
    let text = buffer[TYPE..TYPE + len].to_vec();
    let kind: [u8; TYPE] = buffer[..TYPE].try_into().expect("eight bytes");
    Ok((u64::from_ne_bytes(kind), text))
}

/// Appends a message; fails rather than wait for room.
pub fn send(id: i32, kind: u64, text: &[u8]) -> io::Result<()> {
    let mut buffer = kind.to_ne_bytes().to_vec();
    buffer.extend_from_slice(text);
    // SAFETY: `buffer` is live and has the type and as many bytes of text.
    let sent = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    checked(sent).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_copied_and_stay() {
        let id = create(0, 0o600).expect("a queue");
        send(id, 7, b"first").expect("room");
        send(id, 8, b"").expect("room");
        let mut buffer = [0; 100];
        let copies = [0, 0, 1, 2].map(|index| copy(id, index, &mut buffer));
        remove(id).expect("our own queue");
        let [first, again, second, end] = copies;
        assert_eq!(first.expect("there"), (7, b"first".to_vec()));
        assert_eq!(again.expect("still there"), (7, b"first".to_vec()));
        assert_eq!(second.expect("there"), (8, Vec::new()));
        assert_eq!(end.expect_err("no more").raw_os_error(), Some(libc::ENOMSG));
    }
}
