//! The commands that CRIU has, by name.

use crate::UsageError;
use crate::error::nearest;

/// A command of CRIU's; Floe's own are the binary's business.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    Dump,
    PreDump,
    Restore,
    Check,
    CpuinfoDump,
    CpuinfoCheck,
    Dedup,
    LazyPages,
    PageServer,
    Service,
    Swrk,
    Exec,
    Show,
}

impl Command {
    /// All of them with their names, in the order of the help.
    pub const ALL: [(Self, &'static str, &'static str); 13] = [
        (Self::Dump, "dump", "checkpoint the tree of a process"),
        (
            Self::PreDump,
            "pre-dump",
            "copy memory while the program runs",
        ),
        (Self::Restore, "restore", "bring a checkpoint back to life"),
        (Self::Check, "check", "show what this kernel offers"),
        (
            Self::CpuinfoDump,
            "cpuinfo dump",
            "write this CPU's capabilities to an image",
        ),
        (
            Self::CpuinfoCheck,
            "cpuinfo check",
            "compare this CPU with an image",
        ),
        (
            Self::Dedup,
            "dedup",
            "drop pages that a later generation replaces",
        ),
        (Self::LazyPages, "lazy-pages", "serve pages on demand"),
        (
            Self::PageServer,
            "page-server",
            "receive pages over a network",
        ),
        (Self::Service, "service", "answer requests on a socket"),
        (
            Self::Swrk,
            "swrk",
            "answer one request on an inherited descriptor",
        ),
        (Self::Exec, "exec", "gone from CRIU as well"),
        (Self::Show, "show", "gone; use `floe image show`"),
    ];

    /// The name as typed.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(command, ..)| *command == self)
            .map_or("", |(_, name, _)| name)
    }

    /// Takes the command's words off the front of `words`. `extra` are names that only the error
    /// may propose.
    pub(crate) fn take(words: &[String], extra: &[&str]) -> Result<(Self, usize), UsageError> {
        let first = words.first().ok_or(UsageError::NoCommand)?;
        if first == "cpuinfo" {
            return match words.get(1).map(String::as_str) {
                Some("dump") => Ok((Self::CpuinfoDump, 2)),
                Some("check") => Ok((Self::CpuinfoCheck, 2)),
                Some(other) => Err(UsageError::UnknownCommand {
                    given: format!("cpuinfo {other}"),
                    nearest: nearest(other, ["dump", "check"])
                        .map(|name| format!("cpuinfo {name}")),
                }),
                None => Err(UsageError::Needs {
                    command: "cpuinfo",
                    what: "an action: dump or check",
                }),
            };
        }
        let found = Self::ALL.iter().find(|(_, name, _)| name == first);
        found
            .map(|(command, ..)| (*command, 1))
            .ok_or_else(|| UsageError::UnknownCommand {
                given: first.clone(),
                nearest: nearest(
                    first,
                    Self::ALL
                        .iter()
                        .map(|(_, name, _)| *name)
                        .chain(extra.iter().copied()),
                )
                .map(Into::into),
            })
    }
}
