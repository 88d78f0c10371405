//! As whom a thread makes files (`setfsuid(2)`).
//!
//! Contract relied on: `setfsuid(2)` and `setfsgid(2)` take integers only and change the calling thread alone; who
//! becomes somebody other than root that way loses the effective capabilities for files, and may take them again.

use std::io;

use rustix::thread::{capabilities, set_capabilities};

/// A thread that makes files as somebody else, until this is dropped: it keeps all its capabilities.
///
/// In a file system of a user namespace nobody can make files whom it has no name for, not even root outside.
#[derive(Debug)]
pub struct FsIds {
    before: (u32, u32),
}

impl FsIds {
    /// Has the calling thread make files as this user and group.
    pub fn take(uid: u32, gid: u32) -> io::Result<Self> {
        let held = capabilities(None)?;
        let before = set((uid, gid));
        let taken = FsIds { before };
        let mut now = capabilities(None)?;
        if now.effective != held.effective {
            now.effective = held.effective;
            set_capabilities(None, now)?;
        }
        Ok(taken)
    }

    /// Has it make files as what it is, whatever it takes now.
    pub fn own() -> io::Result<Self> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        FsIds::take(uid.as_raw(), gid.as_raw())
    }
}

impl Drop for FsIds {
    fn drop(&mut self) {
        // Capabilities for files come back with root; for others nothing was lost.
        set(self.before);
    }
}

/// Sets both; what they were before.
fn set((uid, gid): (u32, u32)) -> (u32, u32) {
    // SAFETY: integers only. The calls answer with what was before, and cannot fail for who has the right to.
    unsafe {
        let gid = libc::syscall(libc::SYS_setfsgid, gid);
        let uid = libc::syscall(libc::SYS_setfsuid, uid);
        (uid as u32, gid as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_somebody_elses_for_a_while() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: becoming others needs root");
            return;
        }
        use std::os::unix::fs::MetadataExt;
        let directory = std::env::temp_dir().join(format!("floe-fs-ids-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("a new name");
        let owner = |name: &str| {
            let path = directory.join(name);
            std::fs::write(&path, "").expect("the directory is root's");
            std::fs::metadata(path).expect("it is there").uid()
        };
        let held = capabilities(None).expect("our own").effective;
        let taken = FsIds::take(1234, 1234).expect("root may");
        assert_eq!(owner("theirs"), 1234);
        let own = FsIds::own().expect("root may");
        assert_eq!(owner("own"), 0);
        drop(own);
        assert_eq!(capabilities(None).expect("our own").effective, held);
        drop(taken);
        assert_eq!(owner("ours"), 0);
        assert_eq!(capabilities(None).expect("our own").effective, held);
        std::fs::remove_dir_all(directory).expect("it is ours");
    }
}
