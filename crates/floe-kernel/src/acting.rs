//! Acting on files as somebody else for a while.
//!
//! Contract relied on: `setfsuid(2)` and `setfsgid(2)` take integers, change the calling thread alone,
//! and answer the id that was there before whether or not they changed it; leaving user 0 takes the
//! capabilities of file systems out of the effective set, and not out of the permitted one.

use std::io;

use rustix::thread::{CapabilitySets, capabilities, set_capabilities};

/// A file system of another user namespace has no files of users that are not mapped there, root of ours
/// among them. As long as this lives, the calling thread makes files as a user and group that are.
#[derive(Debug)]
pub struct Acting {
    before: (u32, u32),
    capabilities: CapabilitySets,
}

impl Acting {
    /// Begins; the thread keeps its capabilities. `EPERM` when it may not.
    pub fn as_owner(uid: u32, gid: u32) -> io::Result<Self> {
        let capabilities = capabilities(None)?;
        let acting = Acting {
            before: (set(libc::SYS_setfsuid, uid), set(libc::SYS_setfsgid, gid)),
            capabilities,
        };
        set_capabilities(None, capabilities)?;
        // Asking for nobody changes nothing and tells who it is.
        let now = (
            set(libc::SYS_setfsuid, u32::MAX),
            set(libc::SYS_setfsgid, u32::MAX),
        );
        match now == (uid, gid) {
            true => Ok(acting),
            false => Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
    }

    /// Begins to act as what the process is, whomever its thread acts as now.
    pub fn as_ourselves() -> io::Result<Self> {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Acting::as_owner(uid.as_raw(), gid.as_raw())
    }
}

/// Does something with another effective user, in a thread of its own, which has the namespaces of this one: some
/// settings are asked for by that id alone, and capabilities do not count.
///
/// # Errors
///
/// `EPERM` where that user may not be taken; `EAGAIN` without a thread.
pub fn with_effective_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let dumpable = rustix::process::dumpable_behavior()?;
    let outcome = std::thread::scope(|scope| {
        let inner = || {
            // SAFETY: integers only; the bare call changes this thread alone, and -1 leaves an id as it is.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
            match result {
                0 => Ok(work()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, inner)?;
        thread.join().expect("the work does not panic")
    });
    // The kernel takes it from the whole process where a thread gives up privilege.
    rustix::process::set_dumpable_behavior(dumpable)?;
    outcome
}

fn set(call: libc::c_long, id: u32) -> u32 {
    // SAFETY: integers only, and only of this thread.
    unsafe { libc::syscall(call, id) as u32 }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let (uid, gid) = self.before;
        set(libc::SYS_setfsuid, uid);
        set(libc::SYS_setfsgid, gid);
        // Capabilities that were there can always be had again.
        let _ = set_capabilities(None, self.capabilities);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn files_are_made_as_somebody_else_for_a_while() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: acting as others needs root");
            return;
        }
        let directory = std::env::temp_dir().join(format!("acting-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("a new name");
        let owner = |name: &str| {
            let file = directory.join(name);
            std::fs::write(&file, "").expect("root may, whoever it acts as");
            let found = std::fs::metadata(&file).expect("it was made");
            (found.uid(), found.gid())
        };
        let acting = Acting::as_owner(1234, 5678).expect("root may");
        assert_eq!(owner("one"), (1234, 5678));
        let ourselves = Acting::as_ourselves().expect("root may");
        assert_eq!(owner("own"), (0, 0));
        drop(ourselves);
        assert_eq!(owner("three"), (1234, 5678));
        drop(acting);
        assert_eq!(owner("two"), (0, 0));
        std::fs::remove_dir_all(&directory).expect("ours");
    }
}
