//! Namespaces that the caller gives instead of those of the images.
//!
//! `--join-ns KIND:PID|FILE` names one for the root's of a kind, with whatever is in it. One that was somebody
//! else's at the dump (`--external net[INODE]:NAME`, `pid[INODE]:NAME`) comes back as `--inherit-fd fd[N]:NAME`.

use std::io;

use floe_image::ImageKind;
use floe_image::messages::{NetnsEntry, PidnsEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind};
use floe_options::{InheritFd, JoinNamespace, Need};
use rustix::fs::{Mode, OFlags};

use super::{filled, host_number, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

/// Kinds that can be joined.
const JOINED: [NsKind; 6] = [
    NsKind::User,
    NsKind::Net,
    NsKind::Ipc,
    NsKind::Uts,
    NsKind::Pid,
    NsKind::Time,
];

/// What the caller gives.
#[derive(Clone, Copy, Debug)]
enum Given<'i> {
    Joined(&'i JoinNamespace),
    Inherited(&'i InheritFd),
}

/// Adds the steps that take over what the caller gives for these namespaces; those that are left are to be made.
/// A kind that is joined though the tree had none of its own is added to both.
pub(super) fn plan_given(
    own: &mut Vec<(NsKind, u32)>,
    planner: &mut Planner<'_>,
) -> Result<Vec<(NsKind, u32)>, PlanError> {
    let mut given = Vec::new();
    for join in &planner.options.join_ns {
        let kind = JOINED.into_iter().find(|kind| kind.name() == join.kind);
        let kind = kind.ok_or_else(|| PlanError::Unsupported {
            object: format!("Joining a {} namespace", join.kind),
            remedy: "only net, ipc, uts, pid, time and user namespaces can be joined; run Floe inside of it (nsenter)",
        })?;
        if kind == NsKind::User {
            // None where it is our own.
            let joined = planner.images.users.joined();
            own.retain(|(known, _)| *known != NsKind::User);
            given.extend(joined.map(|id| (kind, id, Given::Joined(join))));
            continue;
        }
        let id = own.iter().find(|(known, _)| *known == kind);
        if kind == NsKind::Pid && id.is_none() {
            return Err(PlanError::Unsupported {
                object: "Joining a pid namespace with a tree that had none of its own".to_string(),
                remedy: "run Floe inside of it: nsenter -t PID -p -m floe restore",
            });
        }
        let id = id.map_or_else(|| host_number(kind), |(_, id)| *id);
        own.retain(|known| *known != (kind, id));
        given.push((kind, id, Given::Joined(join)));
    }
    for (kind, id) in own.clone() {
        if let Some(fd) = inherited(kind, id, planner)? {
            given.push((kind, id, Given::Inherited(fd)));
        }
    }
    let mut all = Vec::new();
    for (kind, id, how) in given {
        all.push((kind, id));
        let mut makes = vec![made(id)];
        // What is inside is not ours; a namespace that was somebody else's has a plan that knows it.
        if let Given::Joined(_) = how {
            makes.push(filled(id));
        }
        let name = format!("take over {kind} namespace {id}");
        planner.step_at_home(name, (&[], &makes), move |world| {
            world.namespaces().keep(id, open(kind, how)?);
            Ok(())
        });
    }
    Ok(all)
}

/// The descriptor for a namespace that was somebody else's.
fn inherited<'i>(
    kind: NsKind,
    id: u32,
    planner: &Planner<'i>,
) -> Result<Option<&'i InheritFd>, PlanError> {
    let (dir, id) = (&planner.images.dir, u64::from(id));
    let key = match kind {
        NsKind::Net => {
            let entry: Option<NetnsEntry> = dir.read_optional(ImageKind::Netns, id)?;
            entry.and_then(|entry| entry.ext_key)
        }
        NsKind::Pid => {
            let entry: Option<PidnsEntry> = dir.read_optional(ImageKind::Pidns, id)?;
            entry.and_then(|entry| entry.ext_key)
        }
        _ => None,
    };
    let Some(key) = key else {
        return Ok(None);
    };
    let given = &planner.options.inherit_fds;
    match given.iter().find(|given| given.resource == key) {
        Some(given) => Ok(Some(given)),
        None => Err(PlanError::NeedsOption {
            object: format!("The {kind} namespace `{key}`, which is somebody else's,"),
            need: Need::Descriptor(key),
        }),
    }
}

/// Opens what `--join-ns` names: of a task by its pid, or a file.
pub(super) fn open_joined(kind: NsKind, target: &str) -> io::Result<Namespace> {
    match target.parse() {
        Ok(pid) => Namespace::of_task(HostPid(pid), kind),
        Err(_) => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let file = rustix::fs::open(target, flags, Mode::empty())?;
            Namespace::from_fd(file, kind)
        }
    }
}

fn open(kind: NsKind, given: Given<'_>) -> Result<Namespace, ExecuteError> {
    match given {
        Given::Joined(join) => open_joined(kind, &join.target)
            .during("Opening the namespace of", || join.target.clone()),
        Given::Inherited(given) => floe_kernel::inherited::duplicate(given.fd)
            .and_then(|file| Namespace::from_fd(file, kind))
            .during("Taking over fd", || given.fd.to_string()),
    }
}
