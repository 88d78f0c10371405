//! The freezer of a control group (`--freeze-cgroup`): all members stop at once, before they are listed.
//!
//! Version 2: `cgroup.freeze`, and `frozen` in `cgroup.events`. Version 1: `freezer.state`. Both freeze the
//! groups below as well. A frozen task takes a tracer's interrupt, but reports it (version 1) and runs
//! remote calls (both) only once it is thawed: so it is seized while frozen and thawed before it is asked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use floe_kernel::proc::CgroupMembership;

/// How often a group is asked whether it is frozen.
const POLL: Duration = Duration::from_millis(1);

/// What a freezer could not do.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// The directory has no freezer's files.
    #[error("{} is no control group with a freezer", .0.display())]
    NoFreezer(PathBuf),
    /// The kernel refused.
    #[error("{action} the control group {}", .path.display())]
    Refused {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where hierarchies with a freezer are mounted on most systems.
const MOUNTED: [&str; 3] = [
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
    "/sys/fs/cgroup/freezer",
];

/// The group by which a member of these is frozen, if it is: its path in its hierarchy. What cannot be looked at is
/// not; a mount for it would take longer than all else that a stopped tree is asked.
pub fn frozen_group(memberships: &[CgroupMembership]) -> Option<String> {
    let has_freezer = |member: &&CgroupMembership| {
        let mut names = member.controllers.split(',');
        member.controllers.is_empty() || names.any(|name| name == "freezer")
    };
    let mut members = memberships.iter().filter(has_freezer);
    members.find_map(|member| {
        let is_frozen = |group: &&str| {
            MOUNTED.iter().any(|mounted| {
                let freezer =
                    Freezer::open(&Path::new(mounted).join(group.trim_start_matches('/')));
                freezer.is_ok_and(|freezer| freezer.was_frozen)
            })
        };
        let ancestors = Path::new(&member.path).ancestors();
        let mut groups = ancestors.filter_map(|group| group.to_str());
        groups.find(is_frozen).map(str::to_string)
    })
}

/// A group whose members can be stopped; dropping it gives it the state that it had.
#[derive(Debug)]
pub struct Freezer {
    path: PathBuf,
    version: Version,
    was_frozen: bool,
    is_frozen: bool,
}

impl Freezer {
    /// Opens the freezer of the group at `path`.
    pub fn open(path: &Path) -> Result<Self, FreezerError> {
        let has = |name: &str| path.join(name).exists();
        let version = if has("cgroup.freeze") {
            Version::Two
        } else if has("freezer.state") {
            Version::One
        } else {
            return Err(FreezerError::NoFreezer(path.into()));
        };
        let mut freezer = Self {
            path: path.into(),
            version,
            was_frozen: false,
            is_frozen: false,
        };
        freezer.was_frozen = freezer.wants_frozen()?;
        freezer.is_frozen = freezer.was_frozen;
        Ok(freezer)
    }

    /// Freezes the members; `false` when some are not frozen by `deadline`, and then all are thawed.
    pub fn freeze(&mut self, deadline: Instant) -> Result<bool, FreezerError> {
        self.is_frozen = true;
        self.set(true)?;
        while !self.all_frozen()? {
            if Instant::now() > deadline {
                self.thaw()?;
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Lets the members run, or stay where their tracer has them.
    pub fn thaw(&mut self) -> Result<(), FreezerError> {
        self.set(false)?;
        self.is_frozen = false;
        Ok(())
    }

    /// Leaves the group thawed, whatever it was before.
    pub fn leave_thawed(mut self) {
        self.was_frozen = self.is_frozen;
    }

    fn set(&self, frozen: bool) -> Result<(), FreezerError> {
        let (name, value) = match (self.version, frozen) {
            (Version::Two, true) => ("cgroup.freeze", "1"),
            (Version::Two, false) => ("cgroup.freeze", "0"),
            (Version::One, true) => ("freezer.state", "FROZEN"),
            (Version::One, false) => ("freezer.state", "THAWED"),
        };
        fs::write(self.path.join(name), value).map_err(self.refused(match frozen {
            true => "Freezing",
            false => "Thawing",
        }))
    }

    fn read(&self, name: &str) -> Result<String, FreezerError> {
        fs::read_to_string(self.path.join(name)).map_err(self.refused("Reading the state of"))
    }

    /// Whether somebody asked for it to be frozen.
    fn wants_frozen(&self) -> Result<bool, FreezerError> {
        match self.version {
            Version::Two => Ok(self.read("cgroup.freeze")?.trim() == "1"),
            Version::One => Ok(self.read("freezer.state")?.trim() != "THAWED"),
        }
    }

    fn all_frozen(&self) -> Result<bool, FreezerError> {
        match self.version {
            Version::Two => Ok(self
                .read("cgroup.events")?
                .lines()
                .any(|line| line == "frozen 1")),
            // Reading it makes the kernel look again; writing helps it to catch a task that it missed.
            Version::One if self.read("freezer.state")?.trim() == "FROZEN" => Ok(true),
            Version::One => self.set(true).map(|()| false),
        }
    }

    fn refused(&self, action: &'static str) -> impl FnOnce(io::Error) -> FreezerError {
        let path = self.path.clone();
        move |source| FreezerError::Refused {
            action,
            path,
            source,
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if self.is_frozen == self.was_frozen {
            return;
        }
        match self.set(self.was_frozen) {
            Ok(()) => {}
            // The group may have gone with its tasks.
            Err(error) if !self.path.exists() => tracing::debug!(%error, "the group is gone"),
            Err(error) => tracing::warn!(%error, "the control group is not as it was"),
        }
    }
}
