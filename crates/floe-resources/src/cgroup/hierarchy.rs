//! Getting at a hierarchy's directories, wherever it is mounted or not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

/// A hierarchy that is kept open.
#[derive(Debug)]
pub struct Hierarchy {
    root: OwnedFd,
}

impl Hierarchy {
    /// Opens the hierarchy that `/proc/<pid>/cgroup` names `name`: controllers joined with commas,
    /// `name=NAME`, or nothing for version 2. A `yard` has it mounted already.
    pub fn open(name: &str, yard: Option<&Path>) -> io::Result<Self> {
        let root = match yard {
            Some(yard) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(yard.join(yard_name(name)), flags, Mode::empty())?
            }
            None => mount(name)?,
        };
        Ok(Hierarchy { root })
    }

    /// The path of a group, for as long as the hierarchy is open.
    pub fn path(&self, group: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_fd().as_raw_fd()));
        root.join(group.trim_start_matches('/'))
    }
}

/// The directory of a hierarchy in a yard, as CRIU names it.
fn yard_name(name: &str) -> String {
    let word = |word: &str| word.strip_prefix("name=").unwrap_or(word).to_string();
    match name {
        "" => "unified".to_string(),
        _ => name.split(',').map(word).collect::<Vec<_>>().join(","),
    }
}

/// A mount of our own that no directory shows; it goes with its descriptor.
fn mount(name: &str) -> io::Result<OwnedFd> {
    let kind = if name.is_empty() { "cgroup2" } else { "cgroup" };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in name.split(',').filter(|option| !option.is_empty()) {
        match option.strip_prefix("name=") {
            Some(name) => {
                // Without `none` a hierarchy that does not exist yet cannot be made.
                fsconfig_set_flag(context.as_fd(), "none")?;
                fsconfig_set_string(context.as_fd(), "name", name)?;
            }
            None => fsconfig_set_flag(context.as_fd(), option)?,
        }
    }
    fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(fsmount(context.as_fd(), flags, MountAttrFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::yard_name;

    #[test]
    fn yards_name_hierarchies_as_criu_does() {
        assert_eq!(yard_name(""), "unified");
        assert_eq!(yard_name("name=systemd"), "systemd");
        assert_eq!(yard_name("cpu,cpuacct"), "cpu,cpuacct");
    }
}
