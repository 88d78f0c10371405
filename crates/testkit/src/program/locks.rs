//! Locks on files and leases.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::ensure;
use libc::{F_OFD_SETLK, F_RDLCK, F_SETLK, F_WRLCK};
use rustix::fs::{FlockOperation, flock};

use super::{Check, Place, Program};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("locks", locks).with(&["--file-locks"]),
    Program::new("leases", leases).with(&["--file-locks"]),
];

/// The locks that the kernel has on a file, without who holds them.
fn held(file: &File) -> anyhow::Result<Vec<String>> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{} ", file.metadata()?.ino());
    let locks = std::fs::read_to_string("/proc/locks")?;
    let mut found: Vec<String> = locks
        .lines()
        .filter(|line| line.contains(&inode))
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            format!(
                "{} {} {} {:?}",
                words[0],
                words[1],
                words[2],
                words.get(5..)
            )
        })
        .collect();
    found.sort();
    Ok(found)
}

fn locks(place: &Place) -> anyhow::Result<Check> {
    let open = |name: &str| {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(place.path(name))
    };
    let (whole, ranges, owned) = (open("flock")?, open("posix")?, open("ofd")?);
    flock(&whole, FlockOperation::NonBlockingLockExclusive)?;
    task::lock_range(ranges.as_fd(), F_SETLK, F_WRLCK, (0, 100))?;
    task::lock_range(ranges.as_fd(), F_SETLK, F_RDLCK, (200, 50))?;
    task::lock_range(owned.as_fd(), F_OFD_SETLK, F_WRLCK, (10, 20))?;
    let files = [whole, ranges, owned];
    let before: Vec<_> = files.iter().map(held).collect::<Result<_, _>>()?;
    let (flock_path, ofd_path) = (place.path("flock"), place.path("ofd"));
    Ok(Box::new(move || {
        let now: Vec<_> = files.iter().map(held).collect::<Result<_, _>>()?;
        ensure!(now == before, "locks {now:?} were {before:?}");
        let other = File::open(&flock_path)?;
        ensure!(
            flock(&other, FlockOperation::NonBlockingLockShared).is_err(),
            "the locked file can be locked"
        );
        let other = File::options().write(true).open(&ofd_path)?;
        let again = task::lock_range(other.as_fd(), F_OFD_SETLK, F_WRLCK, (15, 1));
        ensure!(again.is_err(), "the locked range can be locked");
        Ok(())
    }))
}

fn leases(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("leased");
    std::fs::write(&path, "x")?;
    let file = File::open(&path)?;
    task::lease(file.as_fd(), F_RDLCK)?;
    let before = held(&file)?;
    ensure!(before.len() == 1, "leases {before:?}");
    Ok(Box::new(move || {
        let now = held(&file)?;
        ensure!(now == before, "leases {now:?} were {before:?}");
        Ok(())
    }))
}
