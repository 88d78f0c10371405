//! What SELinux knows of a program. The contexts are those of the policy of `cargo xtask boot`.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket, socketpair};

use super::{Check, Missing, Place, Program, fact, unchanged};

pub const PROGRAMS: &[Program] = &[
    Program::new("selinux-sockets", sockets),
    Program::new("selinux-mount", mount).in_own_mounts(),
];

/// Sockets and what is to become of further ones have this.
const CHOSEN: &str = "system_u:system_r:other_t:s0";
/// With a comma, which also separates options of a mount.
const OF_FILES: &str = "system_u:object_r:file_t:s0:c1,c2";

fn needs_policy() -> anyhow::Result<()> {
    let is_ours = Path::new("/policy/selinux").exists();
    let is_active = Path::new("/sys/fs/selinux/enforce").exists();
    if is_ours && is_active {
        return Ok(());
    }
    Err(Missing("no SELinux with the policy of `cargo xtask boot`".into()).into())
}

fn label_of(file: impl AsFd) -> anyhow::Result<String> {
    let mut text = [0; 256];
    let length = rustix::fs::fgetxattr(file, "security.selinux", &mut text[..])?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

/// Sockets with another label than the program, before and after they could be changed.
fn sockets(_: &Place) -> anyhow::Result<Check> {
    needs_policy()?;
    let flags = SocketFlags::empty();
    let usual = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    fs::write("/proc/self/attr/sockcreate", CHOSEN)?;
    let tcp = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let netlink = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    let (one, two) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    unchanged(move || {
        let made_now = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        Ok(vec![
            fact("usual", label_of(&usual)?),
            fact("tcp", label_of(&tcp)?),
            fact("netlink", label_of(&netlink)?),
            fact("one", label_of(&one)?),
            fact("two", label_of(&two)?),
            fact("made now", label_of(&made_now)?),
        ])
    })
}

/// A file system in memory whose files all have one context.
fn mount(place: &Place) -> anyhow::Result<Check> {
    needs_policy()?;
    let point = place.path("labelled");
    fs::create_dir(&point)?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "context", OF_FILES)?;
    fsconfig_create(context.as_fd())?;
    let made = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(made.as_fd(), "", rustix::fs::CWD, &point, flags)?;
    fs::write(point.join("file"), "x")?;
    unchanged(move || {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let own = mounts.lines().find(|line| line.contains("/labelled "));
        Ok(vec![
            fact("file", label_of(fs::File::open(point.join("file"))?)?),
            fact("mount", own.unwrap_or_default()),
        ])
    })
}
