//! A mount namespace of one's own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use super::check;

/// Moves the process into a copy of its mount namespace, from which nothing reaches the old one, and takes
/// away the memory file system of all programs there: a dump would save what others have in it.
pub fn leave() -> io::Result<()> {
    // SAFETY: integers only.
    check(i64::from(unsafe { libc::unshare(libc::CLONE_NEWNS) }))?;
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    loop {
        match unmount("/dev/shm", UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Begins this program again in a mount namespace of its own, with files of that only; returns where that
/// fails. `mark` is set in its environment.
pub fn start_again_inside(output: &Path, mark: &str) -> io::Error {
    let start = || -> io::Result<Command> {
        leave()?;
        let output = File::options().append(true).open(output)?;
        let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
        // SAFETY: integers only; nothing is closed before the program is replaced.
        check(i64::from(unsafe { libc::close_range(3, u32::MAX, flags) }))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).env(mark, "1");
        let nothing = File::options().read(true).open("/dev/null")?;
        command.stdin(Stdio::from(nothing));
        command.stdout(output.try_clone()?).stderr(output);
        command.current_dir(std::env::current_dir()?);
        Ok(command)
    };
    match start() {
        Ok(mut command) => command.exec(),
        Err(error) => error,
    }
}

/// Mounts a copy of `from` at `point`, with the ids of its files mapped as in the user namespace `users`.
pub fn map_ids(from: &Path, users: &File, point: &Path) -> io::Result<()> {
    use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(rustix::fs::CWD, from, flags)?;
    /// `MOUNT_ATTR_IDMAP`.
    const IDMAP: u64 = 0x10_0000;
    // `struct mount_attr`: set, clear, propagation, descriptor of a user namespace.
    let attr = [IDMAP, 0, 0, users.as_raw_fd() as u64];
    // SAFETY: the path is a string with its end, `attr` is live and has the size that is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            copy.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attr.as_ptr(),
            size_of_val(&attr),
        )
    })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(copy.as_fd(), "", rustix::fs::CWD, point, flags)?)
}
