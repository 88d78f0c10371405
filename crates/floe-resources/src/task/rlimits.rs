//! Resource limits (`setrlimit(2)`).
//!
//! Saved:    soft and hard value of all 16, read by the task itself: that needs no capability.
//! Rebuilt:  set at the end, before credentials, Needs: memory and files.
//! Not kept: a hard limit above ours where we may not raise it and the soft one fits below: a warning.

use floe_image::messages::{RlimitEntry, TaskRlimitsEntry};
use floe_inject::{Arg, BufferId, Outcome, Program};
use rustix::process::{Resource, getrlimit};

use super::credentials::CAP_SYS_RESOURCE;
use super::rebuild::TaskContext;
use super::word;
use crate::restore::PlanError;

const LIMITS: u64 = 16;

/// Remote calls that read the limits.
pub struct ResourceLimits(Vec<BufferId>);

impl ResourceLimits {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let ask_one = |limit| {
            let buffer = program.zeroed(16);
            let args = [
                Arg::from(0),
                Arg::from(limit),
                Arg::from(0),
                Arg::from(buffer),
            ];
            program.call("prlimit64", libc::SYS_prlimit64, &args);
            buffer
        };
        ResourceLimits((0..LIMITS).map(ask_one).collect())
    }

    /// The limits in the order of `RLIMIT_*`; all bits set for none.
    pub fn read(&self, outcome: &Outcome) -> TaskRlimitsEntry {
        let entry = |buffer: &BufferId| {
            let bytes = outcome.data(*buffer);
            RlimitEntry {
                cur: word(bytes, 0),
                max: word(bytes, 8),
            }
        };
        TaskRlimitsEntry {
            rlimits: self.0.iter().map(entry).collect(),
        }
    }
}

const RESOURCES: [(Resource, &str); 16] = [
    (Resource::Cpu, "RLIMIT_CPU"),
    (Resource::Fsize, "RLIMIT_FSIZE"),
    (Resource::Data, "RLIMIT_DATA"),
    (Resource::Stack, "RLIMIT_STACK"),
    (Resource::Core, "RLIMIT_CORE"),
    (Resource::Rss, "RLIMIT_RSS"),
    (Resource::Nproc, "RLIMIT_NPROC"),
    (Resource::Nofile, "RLIMIT_NOFILE"),
    (Resource::Memlock, "RLIMIT_MEMLOCK"),
    (Resource::As, "RLIMIT_AS"),
    (Resource::Locks, "RLIMIT_LOCKS"),
    (Resource::Sigpending, "RLIMIT_SIGPENDING"),
    (Resource::Msgqueue, "RLIMIT_MSGQUEUE"),
    (Resource::Nice, "RLIMIT_NICE"),
    (Resource::Rtprio, "RLIMIT_RTPRIO"),
    (Resource::Rttime, "RLIMIT_RTTIME"),
];

/// A resource limit; `u64::MAX` for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In force.
    pub soft: u64,
    /// How far the soft one can be raised.
    pub hard: u64,
}

/// The limits of this process in the order of `RLIMIT_*`.
pub fn own_limits() -> Vec<Limit> {
    let limit = |&(resource, _): &(Resource, _)| {
        let limit = getrlimit(resource);
        Limit {
            soft: limit.current.unwrap_or(u64::MAX),
            hard: limit.maximum.unwrap_or(u64::MAX),
        }
    };
    RESOURCES.iter().map(limit).collect()
}

/// Sets all limits: those of the puppet may have changed since they were read.
pub fn plan(
    wanted: &TaskRlimitsEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    if wanted.rlimits.len() > RESOURCES.len() {
        return Err(context.damaged(format!("it has {} limits", wanted.rlimits.len())));
    }
    let born = context.birth.limits.iter();
    let raisable = context.birth.credentials.has(CAP_SYS_RESOURCE);
    for (index, (entry, born)) in wanted.rlimits.iter().zip(born).enumerate() {
        let (_, name) = RESOURCES[index];
        if entry.cur > entry.max {
            return Err(context.damaged(format!("{name} has its soft above its hard limit")));
        }
        let limit = attainable(entry, (*born, raisable), (name, context))?;
        let words = [limit.soft, limit.hard].map(u64::to_le_bytes).concat();
        let value = program.buffer(&words);
        let args = [Arg::from(0), Arg::from(index), Arg::from(value)];
        program.call(format!("prlimit64({name})"), libc::SYS_prlimit64, &args);
    }
    Ok(())
}

/// The limit that can be given, which is the wanted one but for a hard limit out of reach.
fn attainable(
    wanted: &RlimitEntry,
    (born, raisable): (Limit, bool),
    (name, context): (&str, &TaskContext<'_>),
) -> Result<Limit, PlanError> {
    let mut limit = Limit {
        soft: wanted.cur,
        hard: wanted.max,
    };
    if limit.hard > born.hard && !raisable {
        let tid = context.tid;
        if limit.soft > born.hard {
            let (soft, hard) = (limit.soft, born.hard);
            return Err(PlanError::Unsupported {
                object: format!("{name} of {soft} in task {tid} (the hard limit here is {hard})"),
                remedy: "raise the hard limit of floe itself, or give it CAP_SYS_RESOURCE",
            });
        }
        tracing::warn!(
            pid = tid,
            limit = name,
            wanted = limit.hard,
            given = born.hard,
            "a hard limit is lower"
        );
        limit.hard = born.hard;
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_in_the_kernel_order() {
        for (index, (resource, name)) in RESOURCES.iter().enumerate() {
            assert_eq!(*resource as usize, index, "{name}");
        }
    }
}
