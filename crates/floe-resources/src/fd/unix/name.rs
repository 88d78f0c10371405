//! Names of unix sockets: abstract ones, files, files that are deleted.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use floe_image::messages::UnixSkEntry;
use floe_kernel::janitor::NameKind;
use floe_kernel::namespace::own_fd_path;
use floe_kernel::socket::{bind, bound_file};
use rustix::fs::{AtFlags, CWD, FileType, Mode};

use crate::namespace::OwnerMap;
use crate::restore::{Attempt, ExecuteError, World};

/// The longest name (`sun_path`).
pub(super) const LONGEST: usize = 108;

/// How a name reads in a message.
pub(super) fn shown(name: &[u8]) -> String {
    match name {
        [] => "no name".to_string(),
        [0, rest @ ..] => format!("@{}", String::from_utf8_lossy(rest)),
        path => String::from_utf8_lossy(without_zero(path)).into_owned(),
    }
}

/// A path without the zero byte that some programs count in.
pub(super) fn without_zero(path: &[u8]) -> &[u8] {
    path.iter()
        .position(|byte| *byte == 0)
        .map_or(path, |end| &path[..end])
}

/// `struct sockaddr_un` with this name.
pub(super) fn address(name: &[u8]) -> Vec<u8> {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(name);
    address
}

/// Whether the name is a file's.
pub(super) fn is_path(entry: &UnixSkEntry) -> bool {
    entry.name.first().is_some_and(|first| *first != 0)
}

/// Where the file of a socket is.
pub(super) fn path_of(entry: &UnixSkEntry) -> PathBuf {
    let name = Path::new(std::ffi::OsStr::from_bytes(without_zero(&entry.name)));
    match &entry.name_dir {
        Some(dir) if name.is_relative() => Path::new(dir).join(name),
        _ => name.to_path_buf(),
    }
}

/// Binds a socket to its saved name, and gives its file the saved permissions.
pub(super) fn bind_socket(
    world: &mut World<'_>,
    socket: BorrowedFd<'_>,
    entry: &UnixSkEntry,
) -> Result<(), ExecuteError> {
    if entry.name.is_empty() {
        return Ok(());
    }
    let what = || format!("to {}", shown(&entry.name));
    if !is_path(entry) {
        return bind(socket, &address(&entry.name)).during("Binding a unix socket", what);
    }
    let path = path_of(entry);
    if entry.deleted == Some(true) {
        return bind_deleted(socket, entry, (&path, &world.images.owners));
    }
    // The tree's own file is still there; any other kind of file is in the way.
    let existed = is_socket(&path);
    if existed {
        std::fs::remove_file(&path).during("Removing", || path.display().to_string())?;
    }
    bind_in_directory(socket, entry).during("Binding a unix socket", what)?;
    if !existed {
        world.made_name(NameKind::File, path.clone());
    }
    set_permissions(socket, entry, &world.images.owners)
}

fn is_socket(path: &Path) -> bool {
    rustix::fs::lstat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket)
}

fn bind_in_directory(socket: BorrowedFd<'_>, entry: &UnixSkEntry) -> io::Result<()> {
    let address = address(&entry.name);
    match &entry.name_dir {
        Some(dir) if entry.name[0] != b'/' => {
            floe_kernel::thread::in_directory(Path::new(dir), || bind(socket, &address))
        }
        _ => bind(socket, &address),
    }
}

/// The permissions of the file that a socket is bound to, by whatever name.
fn set_permissions(
    socket: BorrowedFd<'_>,
    entry: &UnixSkEntry,
    owners: &OwnerMap,
) -> Result<(), ExecuteError> {
    let Some(permissions) = &entry.file_perms else {
        return Ok(());
    };
    let what = || format!("of {}", shown(&entry.name));
    let file = bound_file(socket).during("Opening the file", what)?;
    let owner = (owners.uid(permissions.uid), owners.gid(permissions.gid));
    rustix::fs::chownat(&file, "", owner.0, owner.1, AtFlags::EMPTY_PATH)
        .during("Setting the owner", what)?;
    let mode = Mode::from_raw_mode(permissions.mode & 0o7777);
    rustix::fs::chmodat(CWD, own_path(file.as_fd()), mode, AtFlags::empty())
        .during("Setting the permissions", what)
}

/// A path to a file that we have open, whether it has a name or not.
fn own_path(file: BorrowedFd<'_>) -> String {
    own_fd_path(file)
}

/// Binds to a name that is deleted, or another file's by now: that one is moved aside for a moment.
fn bind_deleted(
    socket: BorrowedFd<'_>,
    entry: &UnixSkEntry,
    (path, owners): (&Path, &OwnerMap),
) -> Result<(), ExecuteError> {
    let shown = || path.display().to_string();
    let made = make_directories(path).during("Making directories for", shown)?;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".floe-aside");
    let moved = path.symlink_metadata().is_ok();
    if moved {
        std::fs::rename(path, &aside).during("Moving aside", shown)?;
    }
    let bound = bind_in_directory(socket, entry);
    let result = bound
        .during("Binding a unix socket to", shown)
        .and_then(|()| set_permissions(socket, entry, owners))
        .and_then(|()| std::fs::remove_file(path).during("Removing", shown));
    if moved {
        std::fs::rename(&aside, path).during("Moving back", shown)?;
    }
    for dir in made.iter().rev() {
        std::fs::remove_dir(dir).during("Removing", || dir.display().to_string())?;
    }
    result
}

/// Makes the directories that lead to a file; returns those that were not there, outermost first.
fn make_directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let missing = path
        .ancestors()
        .skip(1)
        .take_while(|dir| !dir.as_os_str().is_empty() && matches!(dir.try_exists(), Ok(false)));
    let mut missing: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
    missing.reverse();
    for dir in &missing {
        std::fs::create_dir(dir)?;
    }
    Ok(missing)
}

/// The address by which a socket that exists can be connected to: by its file if it has one, which works for
/// deleted and relative names too. The descriptor keeps the address alive.
pub(super) fn reach(
    socket: BorrowedFd<'_>,
    entry: &UnixSkEntry,
) -> io::Result<(Vec<u8>, Option<std::os::fd::OwnedFd>)> {
    if is_path(entry) {
        let file = bound_file(socket)?;
        Ok((address(own_path(file.as_fd()).as_bytes()), Some(file)))
    } else {
        Ok((address(&entry.name), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_as_tools_show_them() {
        assert_eq!(shown(b"\0abc"), "@abc");
        assert_eq!(shown(b"/run/x\0"), "/run/x");
        assert_eq!(shown(b""), "no name");
    }

    #[test]
    fn relative_names_are_joined_to_their_directory() {
        let entry = UnixSkEntry {
            name: b"sock\0".to_vec(),
            name_dir: Some("/tmp/dir".into()),
            ..UnixSkEntry::default()
        };
        assert_eq!(path_of(&entry), Path::new("/tmp/dir/sock"));
    }
}
