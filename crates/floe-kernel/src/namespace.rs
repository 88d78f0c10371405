//! Namespaces: which there are, which one a task is in, and going into one for a while.
//!
//! Contract relied on: `setns(2)` and `unshare(2)` take integers only and change the calling thread
//! alone, except for pid, time and user namespaces, which are not visited here. A mount namespace can
//! be entered only by a thread that shares its root and working directory with nobody
//! (`CLONE_FS`), and entering one moves both to the root of that namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{Mode, OFlags};

use crate::acting::Acting;
use crate::ids::HostPid;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NsKind {
    Pid,
    Net,
    Ipc,
    Uts,
    Mnt,
    User,
    Cgroup,
    Time,
}

impl NsKind {
    /// Every kind there is.
    pub const ALL: [NsKind; 8] = [
        NsKind::Pid,
        NsKind::Net,
        NsKind::Ipc,
        NsKind::Uts,
        NsKind::Mnt,
        NsKind::User,
        NsKind::Cgroup,
        NsKind::Time,
    ];

    /// Its link in `/proc/<pid>/ns`, which the kernel also shows as `name:[inode]`.
    pub fn name(self) -> &'static str {
        match self {
            NsKind::Pid => "pid",
            NsKind::Net => "net",
            NsKind::Ipc => "ipc",
            NsKind::Uts => "uts",
            NsKind::Mnt => "mnt",
            NsKind::User => "user",
            NsKind::Cgroup => "cgroup",
            NsKind::Time => "time",
        }
    }

    /// Its flag in `clone(2)`, `unshare(2)` and `setns(2)`.
    pub fn flag(self) -> u32 {
        let flag = match self {
            NsKind::Pid => libc::CLONE_NEWPID,
            NsKind::Net => libc::CLONE_NEWNET,
            NsKind::Ipc => libc::CLONE_NEWIPC,
            NsKind::Uts => libc::CLONE_NEWUTS,
            NsKind::Mnt => libc::CLONE_NEWNS,
            NsKind::User => libc::CLONE_NEWUSER,
            NsKind::Cgroup => libc::CLONE_NEWCGROUP,
            // CLONE_NEWTIME shares its bit with the exit signal: clone(2) cannot take it.
            NsKind::Time => 0x80,
        };
        flag.cast_unsigned()
    }

    /// The kind of the namespace behind a link such as `net:[4026531840]`.
    pub fn of_link(link: &[u8]) -> Option<NsKind> {
        NsKind::ALL.into_iter().find(|kind| {
            let rest = link.strip_prefix(kind.name().as_bytes());
            rest.is_some_and(|rest| rest.starts_with(b":["))
        })
    }

    /// The kind with this flag of `clone(2)`.
    pub fn of_flag(flag: u32) -> Option<NsKind> {
        NsKind::ALL.into_iter().find(|kind| kind.flag() == flag)
    }
}

impl std::fmt::Display for NsKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Which namespace it is: the same for every handle on it, as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NsIdentity {
    pub device: u64,
    pub inode: u64,
}

/// A handle on a namespace, which keeps it alive.
#[derive(Debug)]
pub struct Namespace {
    kind: NsKind,
    identity: NsIdentity,
    fd: OwnedFd,
    /// As whom its visitors make files, where not as what they are.
    files_of: Option<(u32, u32)>,
}

/// `ioctl(NS_GET_USERNS)` (ioctl_nsfs(2)).
const NS_GET_USERNS: libc::Ioctl = 0xb701;
/// `ioctl(NS_GET_PARENT)`.
const NS_GET_PARENT: libc::Ioctl = 0xb702;
/// `ioctl(NS_GET_OWNER_UID)`.
const NS_GET_OWNER_UID: libc::Ioctl = 0xb704;

impl Namespace {
    /// The namespace that a task is in.
    pub fn of_task(pid: HostPid, kind: NsKind) -> io::Result<Self> {
        Self::from_path(&own_proc_path(&format!("{pid}/ns/{kind}")), kind)
    }

    /// The namespace that children of a task will be in; only for pid and time namespaces. `ENOENT`
    /// while a pid namespace has no process yet.
    pub fn of_children(pid: HostPid, kind: NsKind) -> io::Result<Self> {
        Self::from_path(
            &own_proc_path(&format!("{pid}/ns/{kind}_for_children")),
            kind,
        )
    }

    /// The namespace that the calling thread is in.
    pub fn own(kind: NsKind) -> io::Result<Self> {
        Self::from_path(&own_proc_path(&format!("thread-self/ns/{kind}")), kind)
    }

    fn from_path(path: &str, kind: NsKind) -> io::Result<Self> {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Self::from_fd(fd, kind)
    }

    /// A handle that somebody opened: a file of `/proc/<pid>/ns`, or one bound elsewhere.
    pub fn from_fd(fd: OwnedFd, kind: NsKind) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        Ok(Namespace {
            kind,
            identity: NsIdentity {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            fd,
            files_of: None,
        })
    }

    /// Has its visitors make files as this user and group: in a mount namespace whose file systems have no name
    /// for anybody else.
    pub fn with_files_of(self, owner: Option<(u32, u32)>) -> Self {
        Namespace {
            files_of: owner,
            ..self
        }
    }

    /// What kind it is.
    pub fn kind(&self) -> NsKind {
        self.kind
    }

    /// Which one it is.
    pub fn identity(&self) -> NsIdentity {
        self.identity
    }

    /// Another handle on it.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Namespace {
            fd: self.fd.try_clone()?,
            ..*self
        })
    }

    /// The user namespace that owns it: whose root may change it. `EPERM` when it is an ancestor of
    /// ours.
    pub fn owner(&self) -> io::Result<Namespace> {
        Self::from_fd(self.related(NS_GET_USERNS)?, NsKind::User)
    }

    /// The namespace around it; only pid and user namespaces have one. `EPERM` when it is out of our
    /// sight.
    pub fn parent(&self) -> io::Result<Namespace> {
        Self::from_fd(self.related(NS_GET_PARENT)?, self.kind)
    }

    /// The user who made a user namespace, and has all rights over it where he is in the one around it.
    pub fn owner_uid(&self) -> io::Result<u32> {
        let mut uid: libc::uid_t = 0;
        // SAFETY: the request writes one `uid_t`, to a live one of ours.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), NS_GET_OWNER_UID, &raw mut uid) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(uid)
    }

    fn related(&self, request: libc::Ioctl) -> io::Result<OwnedFd> {
        // SAFETY: both requests take no argument and answer with a new descriptor.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), request) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Goes into a namespace for good: the calling thread, or for pid and time namespaces its children.
pub fn enter(namespace: &Namespace) -> io::Result<()> {
    set(namespace.as_fd(), namespace.kind)
}

fn set(fd: BorrowedFd<'_>, kind: NsKind) -> io::Result<()> {
    // SAFETY: integers only.
    if unsafe { libc::setns(fd.as_raw_fd(), kind.flag().cast_signed()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves the calling thread, or for pid and time namespaces its children, into new namespaces.
pub fn unshare(flags: u32) -> io::Result<()> {
    // SAFETY: integers only.
    if unsafe { libc::unshare(flags.cast_signed()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Kinds that a thread can go into and come back from.
pub const VISITED: [NsKind; 5] = [
    NsKind::Mnt,
    NsKind::Net,
    NsKind::Ipc,
    NsKind::Uts,
    NsKind::Cgroup,
];

/// Where a thread comes back to from its visits to other namespaces.
///
/// Files that are named by their path while away are those of the visited namespace: keep a
/// descriptor of every directory of our own that is needed there ([`Home::proc`] is one).
#[derive(Debug)]
pub struct Home {
    namespaces: Vec<Namespace>,
    root: OwnedFd,
    directory: OwnedFd,
    proc: OwnedFd,
}

impl Home {
    /// Notes where the calling thread stands.
    pub fn here() -> io::Result<Self> {
        let mut namespaces = Vec::new();
        for kind in VISITED {
            match Namespace::own(kind) {
                Ok(namespace) => namespaces.push(namespace),
                // A kernel without this kind.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let directory = |path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
        };
        Ok(Home {
            namespaces,
            root: directory("/")?,
            directory: directory(".")?,
            proc: directory("/proc")?,
        })
    }

    /// Our own `/proc`, which shows the tasks by the numbers that we know them by.
    pub fn proc(&self) -> BorrowedFd<'_> {
        self.proc.as_fd()
    }

    /// Our own namespace of a kind that can be visited.
    pub fn namespace(&self, kind: NsKind) -> Option<&Namespace> {
        self.namespaces.iter().find(|home| home.kind == kind)
    }

    /// Takes the calling thread into these namespaces until the visit is dropped. A mount namespace
    /// is entered first; the thread has its root then, and stands in our own `/proc`.
    ///
    /// The thread must be the one that `self` was made in, and at home.
    pub fn visit<'n>(
        self: &Rc<Self>,
        namespaces: impl IntoIterator<Item = &'n Namespace>,
    ) -> io::Result<Visit> {
        let mut visit = Visit {
            home: Rc::clone(self),
            away: Vec::new(),
            files: None,
        };
        for namespace in namespaces {
            visit.enter(namespace)?;
        }
        Ok(visit)
    }

    /// Takes the calling thread into new namespaces of these kinds until the visit is dropped;
    /// [`Namespace::own`] gives handles that outlive it.
    ///
    /// A new mount namespace is a copy of ours whose mounts still propagate to ours.
    pub fn visit_new(self: &Rc<Self>, kinds: &[NsKind]) -> io::Result<Visit> {
        let flags = kinds.iter().fold(0, |all, kind| all | kind.flag());
        unshare(flags)?;
        Ok(Visit {
            home: Rc::clone(self),
            away: kinds.to_vec(),
            files: None,
        })
    }
}

/// A thread's stay in other namespaces; it comes home when this is dropped.
#[derive(Debug)]
pub struct Visit {
    home: Rc<Home>,
    away: Vec<NsKind>,
    files: Option<Acting>,
}

impl Visit {
    /// Goes into one more namespace.
    pub fn enter(&mut self, namespace: &Namespace) -> io::Result<()> {
        if namespace.kind == NsKind::Mnt {
            unshare(libc::CLONE_FS.cast_unsigned())?;
        }
        // Noted first: coming home from where one is already is harmless.
        self.away.push(namespace.kind);
        enter(namespace)?;
        if namespace.kind == NsKind::Mnt {
            rustix::process::fchdir(&self.home.proc)?;
        }
        if let Some((uid, gid)) = namespace.files_of {
            // What was taken before is given up first: values of this kind end in the order that they began in.
            self.files = None;
            self.files = Some(Acting::as_owner(uid, gid)?);
        }
        Ok(())
    }

    fn return_home(&self) -> io::Result<()> {
        for kind in &self.away {
            let home = self.home.namespace(*kind);
            let home = home.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            if *kind == NsKind::Mnt {
                // Somebody may have started a thread meanwhile, which shares root and directory.
                unshare(libc::CLONE_FS.cast_unsigned())?;
            }
            enter(home)?;
            if *kind == NsKind::Mnt {
                rustix::process::fchdir(&self.home.root)?;
                rustix::process::chroot(".")?;
                rustix::process::fchdir(&self.home.directory)?;
            }
        }
        Ok(())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.files = None;
        // A thread that is lost in a foreign namespace would do everything else in the wrong place.
        if let Err(error) = self.return_home() {
            panic!("coming home from other namespaces: {error}");
        }
    }
}

/// A path to a descriptor of ours, also while the calling thread visits a mount namespace.
pub fn own_fd_path(fd: impl AsFd) -> String {
    own_proc_path(&format!("self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// A path to `name` in our own `/proc`, also while the calling thread visits a mount namespace, which may
/// have another one or none: there it stands in ours.
pub fn own_proc_path(name: &str) -> String {
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    let here = rustix::fs::statfs(".").is_ok_and(|stat| stat.f_type == PROC_SUPER_MAGIC);
    // The user may have started us in a directory of some task there.
    if here && rustix::fs::access(name, rustix::fs::Access::EXISTS).is_ok() {
        return name.to_string();
    }
    format!("/proc/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_tell_the_kind() {
        let name = |link: &[u8]| NsKind::of_link(link).map(NsKind::name);
        assert_eq!(name(b"net:[4026531840]"), Some("net"));
        assert_eq!(name(b"network:[1]"), None);
        assert_eq!(name(b"/proc/1/ns/net"), None);
    }

    #[test]
    fn a_visit_ends_where_it_began() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: entering namespaces needs root");
            return;
        }
        // A thread of its own: the others of the test program stay where they are.
        std::thread::spawn(|| {
            let home = Rc::new(Home::here().expect("/proc is there"));
            let directory = std::env::current_dir().expect("a directory");
            let kinds = [NsKind::Uts, NsKind::Net];
            let away = |home: &Rc<Home>| {
                let _visit = home.visit_new(&kinds).expect("root may unshare");
                kinds.map(|kind| Namespace::own(kind).expect("it exists"))
            };
            let made = away(&home);
            for kind in kinds {
                let own = Namespace::own(kind).expect("it exists").identity();
                assert_eq!(own, home.namespace(kind).expect("a kind").identity());
            }
            {
                let _visit = home.visit(&made).expect("root may enter");
                let own = Namespace::own(NsKind::Net).expect("it exists").identity();
                assert_eq!(own, made[1].identity());
            }
            assert_eq!(directory, std::env::current_dir().expect("a directory"));
        })
        .join()
        .expect("no panic");
    }
}
