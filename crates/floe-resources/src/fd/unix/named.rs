//! Connections whose ends have names: that of the listener which accepted one end, or one's own.
//!
//! A name stays with whoever has it now, so it is taken where nobody looks: below a root of our own, that of a
//! file system in memory which is mounted nowhere. An abstract name is taken before its listener is made.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use floe_image::messages::UnixSkEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::mount::new_mount;
use floe_kernel::socket::{bind, connect, listen, socket, unix_pair};
use floe_kernel::{peer, thread};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SocketFlags, accept_with};

use super::name::{address, is_path, path_of, reach, shown};
use crate::restore::{Attempt, ExecuteError, World};

/// The root of our own, and who listens there: by type and path.
#[derive(Default)]
struct Elsewhere {
    root: Option<OwnedFd>,
    listeners: HashMap<(u32, PathBuf), OwnedFd>,
}

/// Makes both ends of a connection, one of which was `accepted` by a listener with its name; the second one may be
/// nobody's. They lose names that cannot be taken.
pub(super) fn connection(
    world: &mut World<'_>,
    (one, other): (&UnixSkEntry, Option<&UnixSkEntry>),
    accepted: Option<&UnixSkEntry>,
) -> Result<(OwnedFd, OwnedFd), ExecuteError> {
    let is_stream = one.r#type != libc::SOCK_DGRAM.cast_unsigned();
    let Some(accepted) = accepted.filter(|_| is_stream) else {
        return pair(one);
    };
    let made = match accepted.id == one.id {
        true => accept(world, (one, other)),
        false => accept(world, (accepted, Some(one))).map(|(accepted, one)| (one, accepted)),
    };
    match made {
        Ok(made) => Ok(made),
        Err(error) => {
            let name = shown(&accepted.name);
            tracing::warn!(%error, "a connection does not have its name {name} any more");
            pair(one)
        }
    }
}

fn pair(one: &UnixSkEntry) -> Result<(OwnedFd, OwnedFd), ExecuteError> {
    unix_pair(one.r#type.cast_signed()).during("Making unix socket", || one.ino.to_string())
}

/// Has an end accepted that has its listener's name, and the other one connected.
fn accept(
    world: &mut World<'_>,
    (accepted, connected): (&UnixSkEntry, Option<&UnixSkEntry>),
) -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = accepted.r#type.cast_signed();
    let client = socket(libc::AF_UNIX, kind, 0)?;
    if let Some(connected) = connected.filter(|end| !end.name.is_empty()) {
        take_name(world, client.as_fd(), connected)?;
    }
    let place = (accepted.r#type, path_of(accepted));
    let kept = world.state::<Elsewhere>().listeners.get(&place);
    let listener = match kept {
        Some(kept) => kept.try_clone()?,
        None => {
            let listener = socket(libc::AF_UNIX, kind, 0)?;
            take_name(world, listener.as_fd(), accepted)?;
            listen(listener.as_fd(), 1)?;
            listener
        }
    };
    let (target, _file) = reach(listener.as_fd(), accepted)?;
    connect(client.as_fd(), &target)?;
    let server = accept_with(&listener, SocketFlags::CLOEXEC)?;
    // Anybody can connect to an abstract name.
    let own = HostPid(std::process::id().cast_signed());
    if peer::credentials(&server)?.pid != Some(own) {
        return Err(io::Error::from_raw_os_error(libc::ECONNABORTED));
    }
    if is_path(accepted) {
        let elsewhere = world.state::<Elsewhere>();
        elsewhere.listeners.entry(place).or_insert(listener);
    }
    Ok((server, client))
}

/// Binds a socket to its saved name, a path below the root of our own.
fn take_name(world: &mut World<'_>, socket: BorrowedFd<'_>, entry: &UnixSkEntry) -> io::Result<()> {
    let name = address(&entry.name);
    if !is_path(entry) {
        return bind(socket, &name);
    }
    let elsewhere = world.state::<Elsewhere>();
    if elsewhere.root.is_none() {
        let root = new_mount("tmpfs", &[]).map_err(|_| io::ErrorKind::PermissionDenied)?;
        elsewhere.root = Some(root);
    }
    let root = elsewhere.root.as_ref().expect("made above").as_fd();
    let path = path_of(entry);
    let path = path.strip_prefix("/").unwrap_or(&path);
    let directory = path.parent().unwrap_or(Path::new(""));
    make_directories(root, directory)?;
    thread::in_root(root, directory, || bind(socket, &name))
}

fn make_directories(root: BorrowedFd<'_>, directory: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::openat(root, ".", flags, Mode::empty())?;
    for name in directory.iter() {
        if name == ".." {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match rustix::fs::mkdirat(&at, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        at = rustix::fs::openat(&at, name, flags, Mode::empty())?;
    }
    Ok(())
}
