//! The content of an IPC namespace: System V objects, POSIX queues, settings.
//!
//! Saved:    the settings of the namespace, all segments, sets of semaphores and message queues with
//!           their content; of the host's namespace only the segments that the tree has attached.
//! Rebuilt:  made with the keys and numbers that they had. Needs: the namespace.
//! Not kept: times and pids of last users; adjustments of semaphores at the end of a task (`SEM_UNDO`),
//!           which the kernel does not tell.

mod msg;
pub mod posix;
mod sem;
mod settings;
pub mod shm;

use std::io;

use floe_image::ImageKind;
use floe_image::messages::IpcDescEntry;
use floe_kernel::proc::{IpcOwner, ParseError};
use floe_kernel::sysv;
use floe_plan::Handle;

use crate::collect::{CollectError, Collector};
use crate::namespace::{OwnerMap, TreeNamespace};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

/// Writes the images of a namespace; see [`crate::namespace`].
pub fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let owners = collector.owners().clone();
    let visit = collector.namespaces().visit(&[namespace])?;
    let settings = settings::collect()?;
    let (segments, sets, queues) = (shm::collect()?, sem::collect()?, msg::collect(&owners)?);
    drop(visit);
    posix::begin(collector);
    let image = u64::from(namespace.id);
    collector
        .side(ImageKind::IpcVar, image)?
        .append(&settings)?;
    sem::encode(sets, &owners, collector.side(ImageKind::IpcnsSem, image)?)?;
    msg::encode(queues, collector.side(ImageKind::IpcnsMsg, image)?)?;
    shm::encode(segments, namespace, collector)
}

/// Adds the steps that fill a namespace; see [`crate::namespace`].
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let mut objects = shm::plan_namespace(id, planner)?;
    objects.push(sem::plan(id, planner)?);
    objects.push(msg::plan(id, planner)?);
    objects.push(posix::plan(id, planner)?);
    settings::plan(id, planner, &objects)
}

/// The settings of a namespace are in force.
fn limited(id: u32) -> Handle {
    Handle::Object("settings of namespace", u64::from(id))
}

/// All objects of a kind in the IPC namespace that we are in.
fn list<T>(
    name: &str,
    parse: impl Fn(&[u8]) -> Result<Vec<T>, ParseError>,
) -> Result<Vec<T>, io::Error> {
    let text = std::fs::read(format!("/proc/sysvipc/{name}"))?;
    parse(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The entry of an object; users as the tree sees them.
fn describe(owner: &IpcOwner, owners: &OwnerMap) -> IpcDescEntry {
    IpcDescEntry {
        key: owner.key,
        uid: owners.uid_inside(owner.uid),
        gid: owners.gid_inside(owner.gid),
        cuid: owners.uid_inside(owner.cuid),
        cgid: owners.gid_inside(owner.cgid),
        mode: owner.mode,
        id: owner.id.cast_unsigned(),
    }
}

/// A failed system call about an object.
fn failed(action: &str, id: i32) -> impl FnOnce(io::Error) -> CollectError {
    let action = format!("{action} {id}");
    move |source| CollectError::System { action, source }
}

/// The same, of one that has a name.
fn failed_on<E: Into<io::Error>>(action: &str, name: &str) -> impl FnOnce(E) -> CollectError {
    let action = format!("{action} /{name}");
    move |source| CollectError::System {
        action,
        source: source.into(),
    }
}

/// Bytes that follow an entry, with zeros up to a multiple of `unit`.
fn padded(mut bytes: Vec<u8>, unit: usize) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(unit), 0);
    bytes
}

/// How the objects of one kind are made with a number.
struct Numbered {
    /// For messages.
    noun: &'static str,
    /// Writing a number here gives it to the next object made.
    next: &'static str,
    remove: fn(i32) -> io::Result<()>,
}

impl Numbered {
    /// Makes an object with the number and the creator that it had.
    fn make(
        &self,
        desc: &IpcDescEntry,
        create: &dyn Fn() -> io::Result<i32>,
    ) -> Result<i32, ExecuteError> {
        /// Somebody else may make an object between our two calls.
        const ATTEMPTS: usize = 3;
        let wanted = desc.id.cast_signed();
        let what = || format!("{} {wanted}", self.noun);
        for _ in 0..ATTEMPTS {
            std::fs::write(self.next, wanted.to_string())
                .during("Asking for the next number in", || self.next.to_string())?;
            let made = match sysv::as_creator((desc.cuid, desc.cgid), create) {
                // Users without a number here, and huge pages, which not everybody gets.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
                    create()
                }
                made => made,
            };
            let made = made.during("Making System V", what)?;
            if made == wanted {
                return Ok(made);
            }
            (self.remove)(made).during("Removing System V", || made.to_string())?;
        }
        Err(ExecuteError::from_plan(PlanError::Unsupported {
            object: format!(
                "System V {}, whose number the kernel does not give,",
                what()
            ),
            remedy: "remove the other object in its place, see `ipcs`",
        }))
    }
}

/// The description of an object with users as we see them.
fn outside(desc: &IpcDescEntry, owners: &OwnerMap) -> IpcDescEntry {
    IpcDescEntry {
        uid: owners.uid_outside(desc.uid),
        gid: owners.gid_outside(desc.gid),
        cuid: owners.uid_outside(desc.cuid),
        cgid: owners.gid_outside(desc.cgid),
        ..desc.clone()
    }
}

/// A number of the images that the kernel could have given.
fn check_number(desc: &IpcDescEntry, image: String) -> Result<(), PlanError> {
    match i32::try_from(desc.id) {
        Ok(_) => Ok(()),
        Err(_) => {
            let what = format!("the number {:#x} is impossible", desc.id);
            Err(PlanError::damaged(image, what))
        }
    }
}
