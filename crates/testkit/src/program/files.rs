//! Files: offsets, flags, kinds, names that are gone.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::ensure;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Check, Place, Program, all, fact, unchanged};

pub const PROGRAMS: &[Program] = &[
    Program::new("files", files),
    Program::new("files-special", special),
    Program::new("files-deleted", deleted),
    Program::new("files-linked", linked).with(&["--link-remap"]),
    Program::new("files-many", many),
    Program::new("files-at-the-limit", at_the_limit),
];

/// What the kernel knows of a descriptor, without what a restore must change.
pub fn descriptor(fd: impl AsFd) -> anyhow::Result<(String, String)> {
    let number = fd.as_fd().as_raw_fd();
    let link = fs::read_link(format!("/proc/self/fd/{number}"))?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let info: Vec<&str> = info
        .lines()
        .filter(|line| line.starts_with("pos") || line.starts_with("flags"))
        .collect();
    Ok(fact(
        format!("fd {number}"),
        format!("{} {}", link.display(), info.join(" ")),
    ))
}

/// Ordinary files: offset, append, access, close-on-exec, directory, `O_PATH`, duplicates.
fn files(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("data");
    fs::write(&path, "0123456789")?;
    let mut reader = File::open(&path)?;
    reader.seek(std::io::SeekFrom::Start(4))?;
    let duplicate = reader.try_clone()?;
    let mut appender = File::options().append(true).open(&path)?;
    let directory = File::open(&place.directory)?;
    let named = rustix::fs::open(&path, OFlags::PATH, Mode::empty())?;
    let inherited = rustix::fs::open(&path, OFlags::RDWR | OFlags::NOATIME, Mode::empty())?;
    let high = rustix::io::fcntl_dupfd_cloexec(&reader, 200)?;
    let fds = [
        reader.as_fd().try_clone_to_owned()?,
        appender.as_fd().try_clone_to_owned()?,
        directory.as_fd().try_clone_to_owned()?,
        named,
        inherited,
        high,
    ];
    let mut same = unchanged(move || fds.iter().map(descriptor).collect())?;
    Ok(Box::new(move || {
        same()?;
        let mut text = [0; 2];
        (&duplicate).read_exact(&mut text)?;
        ensure!(&text == b"45", "read {text:?} at offset 4");
        let at = reader.stream_position()?;
        ensure!(at == 6, "the duplicate's offset is {at}");
        reader.seek(std::io::SeekFrom::Start(4))?;
        let length = path.metadata()?.len();
        appender.write_all(b"x")?;
        ensure!(path.metadata()?.len() == length + 1, "nothing was appended");
        appender.set_len(length)?;
        appender.rewind()?;
        Ok(())
    }))
}

/// Devices and files of /proc.
fn special(_: &Place) -> anyhow::Result<Check> {
    let mut zero = File::open("/dev/zero")?;
    let mut null = File::options().write(true).open("/dev/null")?;
    let mut random = File::open("/dev/urandom")?;
    let mut status = File::open("/proc/self/status")?;
    let facts = [&zero, &null, &random, &status].map(|file| file.as_fd().try_clone_to_owned());
    let facts: Vec<_> = facts.into_iter().collect::<Result<_, _>>()?;
    let mut same = unchanged(move || facts.iter().map(descriptor).collect())?;
    let pid = std::process::id();
    Ok(Box::new(move || {
        same()?;
        let mut bytes = [1; 16];
        zero.read_exact(&mut bytes)?;
        ensure!(bytes == [0; 16], "/dev/zero gave {bytes:?}");
        null.write_all(&bytes)?;
        random.read_exact(&mut bytes)?;
        let mut text = String::new();
        status.read_to_string(&mut text)?;
        status.rewind()?;
        ensure!(
            text.contains(&format!("Pid:\t{pid}\n")),
            "another task's status"
        );
        Ok(())
    }))
}

/// Open files without a name: with content, with holes, and an empty directory.
fn deleted(place: &Place) -> anyhow::Result<Check> {
    let open = |name: &str| {
        let path = place.path(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        file.map(|file| (file, path))
    };
    let (mut small, small_path) = open("small")?;
    small.write_all(b"without a name")?;
    small.seek(std::io::SeekFrom::Start(8))?;
    let (sparse, sparse_path) = open("sparse")?;
    sparse.write_all_at(b"begin", 0)?;
    sparse.write_all_at(b"end", 512 << 10)?;
    let directory_path = place.path("directory");
    fs::create_dir(&directory_path)?;
    let directory = File::open(&directory_path)?;
    fs::remove_file(&small_path)?;
    fs::remove_file(&sparse_path)?;
    fs::remove_dir(&directory_path)?;
    Ok(Box::new(move || {
        let mut text = String::new();
        small.read_to_string(&mut text)?;
        ensure!(text == "a name", "from offset 8: {text:?}");
        small.seek(std::io::SeekFrom::Start(8))?;
        let meta = sparse.metadata()?;
        ensure!(meta.len() == (512 << 10) + 3, "{} bytes", meta.len());
        ensure!(
            meta.blocks() < 64,
            "{} blocks: the hole is filled",
            meta.blocks()
        );
        let mut end = [0; 3];
        sparse.read_exact_at(&mut end, 512 << 10)?;
        ensure!(&end == b"end", "the end is {end:?}");
        for (what, links) in [
            ("small", small.metadata()?.nlink()),
            ("sparse", meta.nlink()),
            ("directory", directory.metadata()?.nlink()),
        ] {
            ensure!(links == 0, "{what} has {links} names");
        }
        Ok(())
    }))
}

/// An open file whose name is gone while another name is left.
fn linked(place: &Place) -> anyhow::Result<Check> {
    let (gone, other) = (place.path("one-name"), place.path("other-name"));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&gone)?;
    file.write_all(b"two names")?;
    file.seek(std::io::SeekFrom::Start(4))?;
    fs::hard_link(&gone, &other)?;
    fs::remove_file(&gone)?;
    let inode = other.metadata()?.ino();
    Ok(Box::new(move || {
        let meta = file.metadata()?;
        ensure!(meta.ino() == inode, "another file than {}", other.display());
        ensure!(meta.nlink() == 1, "{} names", meta.nlink());
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        ensure!(text == "names", "from offset 4: {text:?}");
        file.seek(std::io::SeekFrom::Start(4))?;
        Ok(())
    }))
}

/// Three hundred descriptors, with gaps.
fn many(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("data");
    fs::write(&path, [b'a'; 1000])?;
    let mut fds = Vec::new();
    for index in 0..400_u64 {
        let mut file = File::open(&path)?;
        file.seek(std::io::SeekFrom::Start(index))?;
        fds.push(file);
    }
    let fds: Vec<File> = fds
        .into_iter()
        .enumerate()
        .filter_map(|(index, file)| (index % 4 != 0).then_some(file))
        .collect();
    Ok(all(vec![unchanged(move || {
        fds.iter().map(descriptor).collect()
    })?]))
}

/// A descriptor right below the hard limit, where valgrind keeps its own.
fn at_the_limit(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("data");
    fs::write(&path, "0123456789")?;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = maximum.unwrap_or(1 << 16).min(1 << 16);
    let raised = Rlimit {
        current: Some(limit),
        maximum,
    };
    setrlimit(Resource::Nofile, raised)?;
    let file = File::open(&path)?;
    let last = rustix::io::fcntl_dupfd_cloexec(&file, limit as i32 - 1)?;
    unchanged(move || {
        [file.as_fd(), last.as_fd()]
            .map(descriptor)
            .into_iter()
            .collect()
    })
}
