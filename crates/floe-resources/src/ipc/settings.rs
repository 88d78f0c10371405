//! Settings of an IPC namespace (`/proc/sys/kernel`, `/proc/sys/fs/mqueue`).
//!
//! Saved:    the limits of System V objects and of POSIX message queues; the next numbers, where set.
//! Rebuilt:  written where they differ. Needs: the namespace.
//! Not kept: nothing.

use std::io;
use std::os::unix::fs::MetadataExt;

use floe_image::ImageKind;
use floe_image::messages::IpcVarEntry;
use floe_kernel::acting::with_effective_user;
use floe_kernel::proc::read_setting;
use floe_plan::Handle;

use super::limited;
use crate::collect::CollectError;
use crate::namespace::{filled, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

/// Reads the settings; we are inside.
pub fn collect() -> Result<IpcVarEntry, CollectError> {
    let first = |name| -> Result<Option<i128>, CollectError> { Ok(read(name)?.first().copied()) };
    let small = |name| -> Result<u32, CollectError> { Ok(first(name)?.unwrap_or(0) as u32) };
    let large = |name| -> Result<u64, CollectError> { Ok(first(name)?.unwrap_or(0) as u64) };
    // -1 where nobody asked for a number.
    let next = |name| -> Result<Option<u32>, CollectError> {
        Ok(first(name)?.and_then(|value| u32::try_from(value).ok()))
    };
    Ok(IpcVarEntry {
        sem_ctls: read("kernel/sem")?.iter().map(|n| *n as u32).collect(),
        msg_ctlmax: small("kernel/msgmax")?,
        msg_ctlmnb: small("kernel/msgmnb")?,
        msg_ctlmni: small("kernel/msgmni")?,
        auto_msgmni: small("kernel/auto_msgmni")?,
        shm_ctlmax: large("kernel/shmmax")?,
        shm_ctlall: large("kernel/shmall")?,
        shm_ctlmni: small("kernel/shmmni")?,
        shm_rmid_forced: small("kernel/shm_rmid_forced")?,
        mq_queues_max: small("fs/mqueue/queues_max")?,
        mq_msg_max: small("fs/mqueue/msg_max")?,
        mq_msgsize_max: small("fs/mqueue/msgsize_max")?,
        mq_msg_default: Some(small("fs/mqueue/msg_default")?),
        mq_msgsize_default: Some(small("fs/mqueue/msgsize_default")?),
        msg_next_id: next("kernel/msg_next_id")?,
        sem_next_id: next("kernel/sem_next_id")?,
        shm_next_id: next("kernel/shm_next_id")?,
    })
}

/// The numbers in a file; none where this kernel has no such setting.
fn read(name: &str) -> Result<Vec<i128>, CollectError> {
    let path = format!("/proc/sys/{name}");
    match read_setting(&path) {
        Ok(text) => Ok(numbers(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(CollectError::System {
            action: format!("Reading {path}"),
            source,
        }),
    }
}

fn numbers(text: &str) -> Vec<i128> {
    let words = text.split_whitespace();
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Adds the step that sets the limits, and the one that sets what making `objects` changes.
pub fn plan(id: u32, planner: &mut Planner<'_>, objects: &[Handle]) -> Result<(), PlanError> {
    let dir = &planner.images.dir;
    let entry: Option<IpcVarEntry> = dir.read_optional(ImageKind::IpcVar, u64::from(id))?;
    let (limits, numbers) = match &entry {
        Some(entry) => (limits(entry), next_numbers(entry)),
        None => Default::default(),
    };
    let name = format!("settings of IPC namespace {id}");
    let makes = [limited(id)];
    planner.step_at_home(name, (&[made(id)], &makes), move |world| {
        world.in_namespace(id, |_| limits.iter().try_for_each(write))
    });
    let name = format!("next numbers of IPC namespace {id}");
    planner.step_at_home(name, (objects, &[filled(id)]), move |world| {
        world.in_namespace(id, |_| numbers.iter().try_for_each(write))
    });
    Ok(())
}

/// Every setting that can be had by writing, as the file shows it. Numbers to come are not among them:
/// making objects uses them up, so they come last (see [`next_numbers`]).
fn limits(entry: &IpcVarEntry) -> Vec<(&'static str, Vec<i128>)> {
    let one = |value: u32| vec![i128::from(value)];
    let semaphores = entry.sem_ctls.iter().map(|value| i128::from(*value));
    let mut all = vec![
        ("kernel/sem", semaphores.collect()),
        ("kernel/msgmax", one(entry.msg_ctlmax)),
        ("kernel/msgmnb", one(entry.msg_ctlmnb)),
        ("kernel/msgmni", one(entry.msg_ctlmni)),
        ("kernel/auto_msgmni", one(entry.auto_msgmni)),
        ("kernel/shmmax", vec![i128::from(entry.shm_ctlmax)]),
        ("kernel/shmall", vec![i128::from(entry.shm_ctlall)]),
        ("kernel/shmmni", one(entry.shm_ctlmni)),
        ("kernel/shm_rmid_forced", one(entry.shm_rmid_forced)),
        ("fs/mqueue/queues_max", one(entry.mq_queues_max)),
        ("fs/mqueue/msg_max", one(entry.mq_msg_max)),
        ("fs/mqueue/msgsize_max", one(entry.mq_msgsize_max)),
    ];
    let defaults = [
        ("fs/mqueue/msg_default", entry.mq_msg_default),
        ("fs/mqueue/msgsize_default", entry.mq_msgsize_default),
    ];
    all.extend(
        defaults
            .into_iter()
            .filter_map(|(name, value)| Some((name, one(value?)))),
    );
    all
}

/// Numbers for the next objects, where the program had asked for them.
fn next_numbers(entry: &IpcVarEntry) -> Vec<(&'static str, Vec<i128>)> {
    let asked = [
        ("kernel/msg_next_id", entry.msg_next_id),
        ("kernel/sem_next_id", entry.sem_next_id),
        ("kernel/shm_next_id", entry.shm_next_id),
    ];
    let asked = asked.into_iter();
    asked
        .filter_map(|(name, value)| Some((name, vec![i128::from(value?)])))
        .collect()
}

/// Writes a setting that is not so already.
fn write((name, values): &(&'static str, Vec<i128>)) -> Result<(), ExecuteError> {
    let path = format!("/proc/sys/{name}");
    let now = match read_setting(&path) {
        // A kernel without this setting.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        now => numbers(&now.during("Reading", || path.clone())?),
    };
    if now == *values || values.is_empty() {
        return Ok(());
    }
    let words: Vec<String> = values.iter().map(ToString::to_string).collect();
    let set = || std::fs::write(&path, words.join(" "));
    let outcome = match set() {
        // It is for the effective user that root of the namespace's user namespace is.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let owner = std::fs::metadata(&path).map(|file| file.uid());
            owner.and_then(|owner| with_effective_user(owner, set)?)
        }
        other => other,
    };
    outcome.during("Setting", || format!("{path} to {words:?}"))
}
