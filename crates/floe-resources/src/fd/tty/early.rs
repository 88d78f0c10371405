//! Masters that are made while mounts are: a slave that is mounted on a file (`/dev/console` of a container)
//! must exist before any terminal is opened, and must still be the same one then.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_kernel::tty::{self, Switch};
use rustix::fs::{Mode, OFlags};

use crate::restore::{Attempt, ExecuteError, World};

/// Masters that are opened before one has its number at the latest.
const MOST_MASTERS: usize = 4096;

/// Masters by their number, until their terminals are made.
#[derive(Debug, Default)]
pub struct EarlyMasters(BTreeMap<u32, OwnedFd>);

impl EarlyMasters {
    /// Makes pty `index` of a new devpts, if nobody has yet.
    pub fn make(&mut self, devpts: BorrowedFd<'_>, index: u32) -> Result<(), ExecuteError> {
        if self.0.contains_key(&index) {
            return Ok(());
        }
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(devpts, "ptmx", flags, Mode::empty());
        let master = numbered_master(index, || open().map_err(io::Error::from))?;
        tty::set_switch(master.as_fd(), Switch::PtyLock, false)
            .during("Unlocking", || format!("pty {index}"))?;
        self.0.insert(index, master);
        Ok(())
    }

    /// Gives the masters to the restore.
    pub fn keep(self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        for (index, master) in self.0 {
            let master = world.lift(master)?;
            world.state::<EarlyMasters>().0.insert(index, master);
        }
        Ok(())
    }

    /// The master of pty `index`, if it was made.
    pub(super) fn take(world: &mut World<'_>, index: u32) -> Option<OwnedFd> {
        world.state::<EarlyMasters>().0.remove(&index)
    }
}

/// The number is the lowest free one, so masters are opened until it is the turn of ours.
pub(super) fn numbered_master(
    index: u32,
    open: impl Fn() -> io::Result<OwnedFd>,
) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("the master of pty {index}");
    let mut others = Vec::new();
    while others.len() < MOST_MASTERS {
        let master = open().during("Opening", what)?;
        let found = tty::pty_index(master.as_fd()).during("Asking for the number of", what)?;
        if found == index {
            return Ok(master);
        }
        if found > index {
            break;
        }
        others.push(master);
    }
    let taken = io::Error::new(
        io::ErrorKind::AddrInUse,
        "its number is taken on this machine; free it, or restore in a container of its own",
    );
    Err(taken).during("Making", || format!("pty {index}"))
}
