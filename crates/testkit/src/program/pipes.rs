//! Pipes and fifos, with what waits in them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use anyhow::ensure;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;

use super::files::descriptor;
use super::{Check, Place, Program, unchanged};

pub const PROGRAMS: &[Program] = &[
    Program::new("pipes", pipes),
    Program::new("pipes-packets", packets),
    Program::new("pipes-one-end", one_end),
    Program::new("fifos", fifos),
];

/// Reads all that waits, compares, and writes it again.
fn recycle(read: &mut File, write: &mut File, expected: &[u8]) -> anyhow::Result<()> {
    let mut found = vec![0; expected.len()];
    read.read_exact(&mut found)?;
    ensure!(found == expected, "other bytes than were written");
    let end = rustix::io::ioctl_fionread(&*read)?;
    ensure!(end == 0, "{end} more bytes than were written");
    write.write_all(expected)?;
    Ok(())
}

/// Both ends here: data, a size of its own, non-blocking mode.
fn pipes(_: &Place) -> anyhow::Result<Check> {
    let large: Vec<u8> = (0..200_000_u32).map(|byte| byte as u8).collect();
    let (read, write) = rustix::pipe::pipe()?;
    rustix::pipe::fcntl_setpipe_size(&write, 1 << 18)?;
    let (mut read, mut write): (File, File) = (read.into(), write.into());
    write.write_all(&large)?;
    let (empty_out, empty_in) = rustix::pipe::pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
    let copies: Vec<OwnedFd> = vec![
        read.try_clone()?.into(),
        write.try_clone()?.into(),
        empty_in.try_clone()?,
    ];
    let mut flags = unchanged(move || {
        copies
            .iter()
            .map(descriptor)
            // The number of a pipe is the kernel's to choose.
            .map(|fact| fact.map(|(name, text)| (name, text.split(']').skip(1).collect())))
            .collect()
    })?;
    Ok(Box::new(move || {
        flags()?;
        let size = rustix::pipe::fcntl_getpipe_size(&write)?;
        ensure!(size == 1 << 18, "the pipe's size is {size}");
        recycle(&mut read, &mut write, &large)?;
        rustix::io::write(&empty_in, b"x")?;
        rustix::io::read(&empty_out, &mut [0; 8])?;
        Ok(())
    }))
}

/// Each write is a packet of its own.
fn packets(_: &Place) -> anyhow::Result<Check> {
    let (out, into) = rustix::pipe::pipe_with(PipeFlags::DIRECT | PipeFlags::NONBLOCK)?;
    let (mut out, mut into): (File, File) = (out.into(), into.into());
    into.write_all(b"one packet")?;
    into.write_all(b"two")?;
    Ok(Box::new(move || {
        let mut packet = [0; 64];
        for expected in [&b"one packet"[..], b"two"] {
            let got = out.read(&mut packet)?;
            ensure!(&packet[..got] == expected, "the packet is {got} bytes");
        }
        into.write_all(b"one packet")?;
        into.write_all(b"two")?;
        Ok(())
    }))
}

/// The other end is closed: an end of file behind the data, and a broken pipe.
fn one_end(_: &Place) -> anyhow::Result<Check> {
    let (read, write) = rustix::pipe::pipe()?;
    drop(write);
    let (left, broken) = rustix::pipe::pipe()?;
    drop(left);
    crate::sys::signal::ignore(libc::SIGPIPE);
    Ok(Box::new(move || {
        let mut bytes = [0; 8];
        ensure!(rustix::io::read(&read, &mut bytes)? == 0, "no end of file");
        let written = rustix::io::write(&broken, b"x");
        ensure!(
            written == Err(rustix::io::Errno::PIPE),
            "writing gave {written:?}"
        );
        Ok(())
    }))
}

/// A named one with data, opened twice, and one opened for both directions.
fn fifos(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("fifo");
    let make = |path| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
    };
    make(&path)?;
    let read = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
    let write = rustix::fs::open(&path, OFlags::WRONLY, Mode::empty())?;
    let (mut read, mut write): (File, File) = (read.into(), write.into());
    write.write_all(b"through a name")?;
    let both_path = place.path("both");
    make(&both_path)?;
    let mut both = File::options().read(true).write(true).open(&both_path)?;
    both.write_all(b"to myself")?;
    let mut again = both.try_clone()?;
    Ok(Box::new(move || {
        recycle(&mut read, &mut write, b"through a name")?;
        recycle(&mut both, &mut again, b"to myself")
    }))
}
