//! Watched files where they are hard to find: on overlays, deleted, in other mount namespaces. Each program
//! has a mount namespace of its own.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::ensure;
use rustix::fs::inotify::{self, WatchFlags};
use rustix::io::read;
use rustix::mount::{MountFlags, mount};

use super::tasks::Child;
use super::{Check, Place, Program};
use crate::sys::{mounts, notify};

pub const PROGRAMS: &[Program] = &[
    Program::new("watches-overlay", on_overlay).in_own_mounts(),
    Program::new("watches-overlay-one-layer", on_overlay_of_one).in_own_mounts(),
    Program::new("watches-elsewhere", in_another_namespace).in_own_mounts(),
    Program::new("fanotify-overlay", fanotify_on_overlay).in_own_mounts(),
    Program::new("fanotify-file-system", fanotify_on_file_system).in_own_mounts(),
    Program::new("names-apart", names_apart)
        .in_own_mounts()
        .with(&["--link-remap"]),
];

/// Mounts an empty file system in memory on a new directory.
pub(super) fn memory(path: &Path) -> anyhow::Result<()> {
    fs::create_dir(path)?;
    Ok(mount(
        "floe",
        path,
        "tmpfs",
        MountFlags::empty(),
        c"mode=777",
    )?)
}

/// An overlay at `merged`, whose layers are in file systems of their own, or in one.
fn overlay(place: &Place, apart: bool) -> anyhow::Result<std::path::PathBuf> {
    let layers = place.path("layers");
    memory(&layers)?;
    let (lower, changes) = (layers.join("lower"), layers.join("changes"));
    fs::create_dir(&lower)?;
    fs::create_dir(lower.join("directory"))?;
    for name in ["file", "copied", "removed"] {
        fs::write(lower.join(name), name)?;
    }
    match apart {
        true => memory(&changes)?,
        false => fs::create_dir(&changes)?,
    }
    let (upper, work) = (changes.join("upper"), changes.join("work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let merged = place.path("merged");
    fs::create_dir(&merged)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let options = std::ffi::CString::new(options)?;
    mount("floe", &merged, "overlay", MountFlags::empty(), &*options)?;
    Ok(merged)
}

/// The watches that have events, each once, in their order.
pub(super) fn told(inotify: &OwnedFd) -> Vec<i32> {
    let mut told = Vec::new();
    let mut events = [0; 4096];
    while let Ok(length) = read(inotify, &mut events) {
        let mut at = 0;
        while at < length {
            let word = |at: usize| events[at..at + 4].try_into().map_or(0, i32::from_ne_bytes);
            told.push(word(at));
            at += 16 + word(at + 12) as usize;
        }
    }
    told.sort_unstable();
    told.dedup();
    told
}

fn on_overlay(place: &Place) -> anyhow::Result<Check> {
    watch_overlay(&overlay(place, true)?)
}

fn on_overlay_of_one(place: &Place) -> anyhow::Result<Check> {
    watch_overlay(&overlay(place, false)?)
}

/// A directory and a file of a lower layer, a file that was copied up while it was watched, a new one, and
/// two that are open and deleted, one of them of the lower layer.
fn watch_overlay(merged: &Path) -> anyhow::Result<Check> {
    let inotify = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    let path = |name: &str| merged.join(name);
    let add = |name: &str, flags| inotify::add_watch(&inotify, path(name), flags);
    fs::write(path("new"), "new")?;
    let mut gone = File::create(path("gone"))?;
    let removed = File::open(path("removed"))?;
    let of_directory = add("directory", WatchFlags::CREATE)?;
    let of_file = add("file", WatchFlags::OPEN)?;
    let of_copied = add("copied", WatchFlags::MODIFY)?;
    let of_new = add("new", WatchFlags::MODIFY)?;
    let of_gone = add("gone", WatchFlags::MODIFY)?;
    let of_removed = add("removed", WatchFlags::ACCESS)?;
    fs::write(path("copied"), "changed")?;
    fs::remove_file(path("gone"))?;
    fs::remove_file(path("removed"))?;
    let expected = [
        of_directory,
        of_file,
        of_copied,
        of_new,
        of_gone,
        of_removed,
    ];
    told(&inotify);
    let merged = merged.to_path_buf();
    Ok(Box::new(move || {
        let path = |name: &str| merged.join(name);
        let before = told(&inotify);
        ensure!(before.is_empty(), "events of {before:?}");
        fs::write(path("directory/x"), "x")?;
        fs::read(path("file"))?;
        fs::write(path("copied"), "again")?;
        fs::write(path("new"), "again")?;
        gone.write_all(b"more")?;
        rustix::io::pread(&removed, &mut [0; 4], 0)?;
        let found = told(&inotify);
        ensure!(found == expected, "{found:?} instead of {expected:?}");
        fs::remove_file(path("directory/x"))?;
        told(&inotify);
        Ok(())
    }))
}

/// A mark on a directory, on a file, and on the whole mount.
fn fanotify_on_overlay(place: &Place) -> anyhow::Result<Check> {
    let merged = overlay(place, true)?;
    let inodes = notify::fanotify()?;
    let close = libc::FAN_CLOSE_NOWRITE;
    notify::mark(&inodes, 0, close, &merged.join("file"))?;
    notify::mark(
        &inodes,
        0,
        close | libc::FAN_EVENT_ON_CHILD,
        &merged.join("directory"),
    )?;
    let all = notify::fanotify()?;
    notify::mark(&all, libc::FAN_MARK_MOUNT, libc::FAN_CLOSE_NOWRITE, &merged)?;
    fs::write(merged.join("directory/x"), "x")?;
    Ok(Box::new(move || {
        let before = (notify::events(&inodes)?, notify::events(&all)?);
        ensure!(before == (0, 0), "{before:?} events");
        for name in ["file", "directory/x", "copied"] {
            fs::read(merged.join(name))?;
        }
        let found = (notify::events(&inodes)?, notify::events(&all)?);
        ensure!(found == (2, 3), "{found:?} events");
        Ok(())
    }))
}

/// Marks on a whole file system, one of which ignores a file, and a group that tells names.
fn fanotify_on_file_system(place: &Place) -> anyhow::Result<Check> {
    let point = place.path("memory");
    memory(&point)?;
    for name in ["one", "two"] {
        fs::write(point.join(name), name)?;
    }
    let opens = libc::FAN_OPEN;
    let all = notify::fanotify()?;
    notify::mark(&all, libc::FAN_MARK_FILESYSTEM, opens, &point)?;
    let some = notify::fanotify()?;
    notify::mark(&some, libc::FAN_MARK_FILESYSTEM, opens, &point)?;
    let ignoring = libc::FAN_MARK_IGNORE | libc::FAN_MARK_IGNORED_SURV_MODIFY;
    let ignored = notify::mark(&some, ignoring, opens, &point.join("one"));
    // Linux 6.0.
    ignored.map_err(|error| super::Missing(format!("no marks that ignore: {error}")))?;
    let names = notify::fanotify_of_names()?;
    let mask = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_ONDIR;
    notify::mark(&names, 0, mask, &point)?;
    Ok(Box::new(move || {
        for group in [&all, &some, &names] {
            let before = notify::events(group)?;
            ensure!(before == 0, "{before} events");
        }
        for name in ["one", "two"] {
            fs::read(point.join(name))?;
        }
        let found = (notify::events(&all)?, notify::events(&some)?);
        ensure!(found == (2, 1), "{found:?} events");
        fs::create_dir(point.join("new"))?;
        fs::remove_dir(point.join("new"))?;
        let told = notify::words(&names)?;
        ensure!(told.contains("new"), "{told:?}");
        notify::events(&all)?;
        notify::events(&some)?;
        Ok(())
    }))
}

/// A directory and a file that only a child's mount namespace shows.
fn in_another_namespace(place: &Place) -> anyhow::Result<Check> {
    let point = place.path("elsewhere");
    let seen = point.clone();
    let mut child = Child::start(place, move |_| {
        mounts::leave()?;
        memory(&seen)?;
        fs::write(seen.join("file"), "x")?;
        Ok(Box::new(|| Ok(())))
    })?;
    let root = format!("/proc/{}/root{}", child.pid, point.display());
    let directory = rustix::fs::open(
        &root,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )?;
    let inotify = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    let first = inotify::add_watch(&inotify, &root, WatchFlags::CREATE)?;
    let file = format!("{root}/file");
    let second = inotify::add_watch(&inotify, &file, WatchFlags::MODIFY)?;
    Ok(Box::new(move || {
        child.check()?;
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        let mode = rustix::fs::Mode::RWXU;
        for name in ["file", "new"] {
            let file = rustix::fs::openat(&directory, name, flags, mode)?;
            rustix::io::write(&file, b"y")?;
        }
        let found = told(&inotify);
        ensure!(found == [first, second], "{found:?}");
        rustix::fs::unlinkat(&directory, "new", rustix::fs::AtFlags::empty())?;
        told(&inotify);
        Ok(())
    }))
}

/// A file without a name, and one that has a name left which nobody looked for, each open under two names in
/// mounts that do not see each other.
fn names_apart(place: &Place) -> anyhow::Result<Check> {
    let all = place.path("all");
    memory(&all)?;
    let mut open = Vec::new();
    let points = ["one", "two"].map(|name| place.path(name));
    for (name, point) in ["one", "two"].iter().zip(&points) {
        fs::create_dir(all.join(name))?;
        fs::create_dir(point)?;
        rustix::mount::mount_bind(all.join(name), point)?;
    }
    for name in ["gone", "kept"] {
        let [first, second] = points.clone().map(|point| point.join(name));
        fs::write(&first, name)?;
        fs::hard_link(all.join("one").join(name), all.join("two").join(name))?;
        if name == "kept" {
            fs::hard_link(all.join("one").join(name), all.join("elsewhere"))?;
        }
        for path in [first, second] {
            open.push(File::options().read(true).append(true).open(&path)?);
            fs::remove_file(&path)?;
        }
    }
    let facts = move || -> anyhow::Result<Vec<String>> {
        use std::os::unix::fs::MetadataExt;
        let numbers = |file: &File| Ok(file.metadata()?.ino());
        let inodes: Vec<u64> = open.iter().map(numbers).collect::<anyhow::Result<_>>()?;
        let mut facts = vec![format!(
            "{} {}",
            inodes[0] == inodes[1],
            inodes[2] == inodes[3]
        )];
        for file in &open {
            let link = std::os::fd::AsRawFd::as_raw_fd(file);
            let link = fs::read_link(format!("/proc/self/fd/{link}"))?;
            facts.push(format!("{} {}", link.display(), file.metadata()?.nlink()));
        }
        facts.push(fs::read_dir(&all)?.count().to_string());
        Ok(facts)
    };
    let before = facts()?;
    Ok(Box::new(move || {
        let after = facts()?;
        ensure!(before == after, "{before:?} became {after:?}");
        Ok(())
    }))
}
