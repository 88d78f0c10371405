//! File systems that are mounted in a program's own mount namespace, beyond what mount(8) can ask for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use rustix::fs::inotify::{self, WatchFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount, move_mount,
};
use rustix::pty;

use super::tasks::Child;
use super::watches::{memory, told};
use super::{Check, Missing, Place, Program};
use crate::sys::memory::{Map, PAGE};
use crate::sys::mounts;

pub const PROGRAMS: &[Program] = &[
    Program::new("overlay-many-layers", many_layers).in_own_mounts(),
    Program::new("overlay-data-layers", data_layers).in_own_mounts(),
    Program::new("devpts-instance", terminals).in_own_mounts(),
    Program::new("opened-before-the-mounts", opened_before).in_own_mounts(),
    Program::new("mounts-of-a-child", of_a_child),
];

/// Programs that cannot be dumped.
pub const REFUSED: &[Program] = &[Program::new("mount-of-mapped-ids", mapped_ids).in_own_mounts()];

/// A mount whose owners are mapped.
fn mapped_ids(place: &Place) -> anyhow::Result<Check> {
    let from = place.path("from");
    memory(&from)?;
    let mut helper = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "sleep", "60"])
        .spawn()?;
    let map = format!("/proc/{}/uid_map", helper.id());
    let ours = fs::read_to_string("/proc/self/uid_map")?;
    let is_made = |map: &str| !map.trim().is_empty() && map != ours;
    while !is_made(&fs::read_to_string(&map)?) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let users = fs::File::open(format!("/proc/{}/ns/user", helper.id()))?;
    let point = place.path("mapped");
    fs::create_dir(&point)?;
    let mapped = mounts::map_ids(&from, &users, &point);
    helper.kill()?;
    helper.wait()?;
    match mapped {
        // Linux 6.3 began to map the ids of a tmpfs.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return Err(Missing("no mapped ids on a tmpfs".into()).into());
        }
        mapped => mapped?,
    }
    fs::write(from.join("file"), "x")?;
    Ok(Box::new(move || {
        fs::read(point.join("file"))?;
        Ok(())
    }))
}

/// Mounts an overlay with layers that are given one by one.
fn overlay(options: &[(&str, &str)], point: &std::path::Path) -> anyhow::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let mut made = Ok(());
    for (key, value) in options {
        made = made.and_then(|()| fsconfig_set_string(context.as_fd(), *key, *value));
    }
    match made.and_then(|()| fsconfig_create(context.as_fd())) {
        Err(Errno::INVAL) => {
            let old = "no overlay with layers one by one, which Linux 6.8 has";
            return Err(Missing(old.to_string()).into());
        }
        made => made.context("making the overlay")?,
    }
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let made = fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
    fs::create_dir(point)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(made.as_fd(), "", CWD, point, flags)?)
}

/// Forty layers, whose names are longer than all options of mount(2) together may be, with commas and colons.
fn many_layers(place: &Place) -> anyhow::Result<Check> {
    let layers = place.path("layers");
    memory(&layers)?;
    let mut names = Vec::new();
    for number in 0..40 {
        let layer = layers.join(format!("{number},:{}", "n".repeat(180)));
        fs::create_dir(&layer)?;
        fs::write(layer.join(number.to_string()), number.to_string())?;
        names.push(layer.to_str().context("UTF-8")?.to_string());
    }
    let mut options: Vec<(&str, &str)> = Vec::new();
    options.extend(names.iter().map(|name| ("lowerdir+", name.as_str())));
    let point = place.path("merged");
    overlay(&options, &point)?;
    Ok(Box::new(move || {
        for number in 0..40 {
            let text = fs::read_to_string(point.join(number.to_string()))?;
            ensure!(text == number.to_string(), "layer {number} has {text:?}");
        }
        Ok(())
    }))
}

/// Files whose data are in a layer that shows no names.
fn data_layers(place: &Place) -> anyhow::Result<Check> {
    let layers = place.path("layers");
    memory(&layers)?;
    for name in ["lower", "data"] {
        fs::create_dir(layers.join(name))?;
    }
    fs::write(layers.join("data/0123"), "the data")?;
    let file = layers.join("lower/file");
    fs::write(&file, "")?;
    fs::File::options().write(true).open(&file)?.set_len(8)?;
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&file, "trusted.overlay.metacopy", b"", flags)?;
    rustix::fs::setxattr(&file, "trusted.overlay.redirect", b"/0123", flags)?;
    let path = |name: &str| Ok(layers.join(name).to_str().context("UTF-8")?.to_string());
    let (lower, data): (anyhow::Result<String>, _) = (path("lower"), path("data"));
    let (lower, data) = (lower?, data?);
    let point = place.path("merged");
    let options = [
        ("metacopy", "on"),
        ("lowerdir+", lower.as_str()),
        ("datadir+", data.as_str()),
    ];
    overlay(&options, &point)?;
    Ok(Box::new(move || {
        let text = fs::read_to_string(point.join("file"))?;
        ensure!(text == "the data", "{text:?}");
        ensure!(!point.join("0123").exists(), "the layer of data is seen");
        Ok(())
    }))
}

/// Files that were opened in the namespace that its own is a copy of, as by `unshare --mount` with redirected
/// output: their mounts are in no namespace of the tree.
fn opened_before(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("log");
    let (mut log, null) = (File::create_new(&path)?, File::open("/dev/null")?);
    mounts::leave()?;
    let mut written = String::new();
    Ok(Box::new(move || {
        log.write_all(b"line\n")?;
        written.push_str("line\n");
        let found = fs::read_to_string(&path)?;
        ensure!(found == written, "{found:?} for {written:?}");
        let kind = null.metadata()?.file_type();
        ensure!(kind.is_char_device(), "/dev/null is {kind:?}");
        Ok(())
    }))
}

/// A child that has left the mounts of its parent, which are the caller's: it has a file system in memory with a
/// socket, a file without a name, a mapped one and a watch there, a part of its parent's directory at another
/// place, and both have their namespaces open.
fn of_a_child(place: &Place) -> anyhow::Result<Check> {
    let outside = place.path("outside");
    fs::create_dir(&outside)?;
    let mut early = File::create_new(outside.join("early"))?;
    let ours = File::open("/proc/self/ns/mnt")?;
    let below = outside.clone();
    let mut child = Child::start(place, move |place| {
        mounts::leave()?;
        let point = place.path("inside");
        memory(&point)?;
        fs::create_dir(point.join("bound"))?;
        rustix::mount::mount_bind(&below, point.join("bound"))?;
        let theirs = File::open("/proc/self/ns/mnt")?;
        let numbers = [ours.metadata()?.ino(), theirs.metadata()?.ino()];
        ensure!(numbers[0] != numbers[1], "the namespace is not its own");
        let listener = UnixListener::bind(point.join("socket"))?;
        let gone = File::create_new(point.join("gone"))?;
        gone.write_all_at(b"gone", 0)?;
        fs::remove_file(point.join("gone"))?;
        let mapped = File::create_new(point.join("mapped"))?;
        mapped.set_len(PAGE as u64)?;
        let map = Map {
            file: Some((mapped.as_fd(), 0)),
            ..Map::shared(PAGE)
        };
        let map = map.make()?;
        map.write(0, 41);
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK)?;
        let watch = inotify::add_watch(&inotify, &point, WatchFlags::CREATE)?;
        let seen = shown()?;
        Ok(Box::new(move || {
            let now = shown()?;
            ensure!(now == seen, "{seen:?} became {now:?}");
            let now = fs::metadata("/proc/self/ns/mnt")?.ino();
            ensure!(theirs.metadata()?.ino() == now, "its namespace is another");
            ensure!(ours.metadata()?.ino() != now, "it is in its parent's");
            let peer = UnixStream::connect(point.join("socket"))?;
            listener.accept()?;
            drop(peer);
            let mut text = [0; 4];
            gone.read_exact_at(&mut text, 0)?;
            ensure!(&text == b"gone", "{text:?}");
            let number = map.read(0) + 1;
            map.write(0, number);
            let mut word = [0; 8];
            mapped.read_exact_at(&mut word, 0)?;
            ensure!(word == number.to_ne_bytes(), "{word:?} for {number}");
            fs::write(point.join("new"), "")?;
            let found = told(&inotify);
            ensure!(found == [watch], "{found:?}");
            fs::remove_file(point.join("new"))?;
            let names = fs::read_dir(point.join("bound"))?.count();
            ensure!(names == 1, "{names} names in the parent's directory");
            Ok(())
        }))
    })?;
    let inotify = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    let watch = inotify::add_watch(&inotify, &outside, WatchFlags::MODIFY)?;
    let inside = place.path("inside");
    Ok(Box::new(move || {
        child.check()?;
        early.write_all(b"more")?;
        let found = told(&inotify);
        ensure!(found == [watch], "{found:?}");
        ensure!(fs::read_dir(&inside)?.next().is_none(), "we see its mount");
        Ok(())
    }))
}

/// What is mounted where: point, flags, and what stands behind the optional fields.
fn shown() -> anyhow::Result<BTreeSet<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let lines = text.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let words: Vec<&str> = mount.split(' ').skip(3).collect();
        Some(format!("{} {file_system}", words.join(" ")))
    });
    Ok(lines.collect())
}

/// Two terminals of an instance of devpts, one with its slave open and input that waits.
fn terminals(place: &Place) -> anyhow::Result<Check> {
    let point = place.path("pts");
    fs::create_dir(&point)?;
    let options = c"newinstance,ptmxmode=0666,mode=0620,gid=5";
    mount("floe", &point, "devpts", MountFlags::empty(), options)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let master = || -> anyhow::Result<OwnedFd> {
        let master = rustix::fs::open(point.join("ptmx"), flags, Mode::empty())?;
        pty::unlockpt(&master)?;
        Ok(master)
    };
    let (alone, pair) = (master()?, master()?);
    let slave_path: PathBuf = point.join("1");
    let slave = rustix::fs::open(&slave_path, flags, Mode::empty())?;
    let mut settings = rustix::termios::tcgetattr(&slave)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &settings)?;
    Ok(Box::new(move || {
        for (index, master) in [&alone, &pair].into_iter().enumerate() {
            let name = pty::ptsname(master, Vec::new())?;
            let expected = format!("/dev/pts/{index}");
            ensure!(
                name.to_str() == Ok(&*expected),
                "{name:?} is not {expected}"
            );
        }
        rustix::io::write(&pair, b"in")?;
        let mut text = [0; 8];
        let length = fs::File::from(slave.try_clone()?).read(&mut text)?;
        ensure!(&text[..length] == b"in", "{:?}", &text[..length]);
        let shown = fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&slave)
        ))?;
        ensure!(shown == slave_path, "{} is open", shown.display());
        let mut names: Vec<_> = fs::read_dir(&point)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        ensure!(names == ["0", "1", "ptmx"], "{names:?}");
        Ok(())
    }))
}
