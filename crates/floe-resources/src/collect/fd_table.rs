//! A task's table of descriptors.

use std::sync::mpsc::{SyncSender, sync_channel};

use floe_image::messages::FdinfoEntry;
use floe_kernel::ids::TaskFd;
use floe_kernel::namespace::unshare;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::ProcDir;

use super::file_ids::{DescriptionKey, Identity};
use super::probe::{Opened, Source, own_proc};
use super::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::fd::FD_KINDS;
use crate::file_lock::collect_locks;

/// Collects every descriptor of a stopped task. Descriptors that cannot be saved become obstacles.
pub fn collect_fd_table(
    proc: &ProcDir,
    pidfd: &Pidfd,
    collector: &mut Collector<'_>,
) -> Result<Vec<FdinfoEntry>, CollectError> {
    let numbers = proc.list("fd")?;
    let own = own_proc(collector)?;
    let source = Source {
        proc,
        pidfd,
        own: &own,
    };
    if numbers.len() < WORTH_A_THREAD {
        let opened = numbers.iter().map(|fd| source.open(TaskFd(*fd)));
        return collect_opened(proc, opened, collector);
    }
    std::thread::scope(|scope| {
        let (sender, batches) = sync_channel(BATCHES);
        let ask = move || ask_ahead(&source, &numbers, &sender);
        let asking = std::thread::Builder::new().name("floe-ask".into());
        asking
            .spawn_scoped(scope, ask)
            .map_err(|source| CollectError::System {
                action: "Starting a thread".to_string(),
                source,
            })?;
        collect_opened(proc, batches.into_iter().flatten(), collector)
    })
}

/// So many descriptors take longer than to start a thread.
const WORTH_A_THREAD: usize = 64;
/// Descriptors that are handed over at a time, and how many such batches may wait: each holds a
/// descriptor of ours open.
const BATCH: usize = 32;
const BATCHES: usize = 2;

type Batch = Vec<Result<Opened, CollectError>>;

/// Asks about descriptors while the caller works on those before.
fn ask_ahead(source: &Source<'_>, numbers: &[i32], sender: &SyncSender<Batch>) {
    // The other thread may visit mount namespaces, which it can only if it shares no directory with us.
    let mut alone =
        unshare(libc::CLONE_FS.cast_unsigned())
            .err()
            .map(|source| CollectError::System {
                action: "Leaving the shared working directory".to_string(),
                source,
            });
    for chunk in numbers.chunks(BATCH) {
        let open = |fd: &i32| match alone.take() {
            Some(error) => Err(error),
            None => source.open(TaskFd(*fd)),
        };
        let batch = chunk.iter().map(open).collect();
        // Nobody listens any more after a failure.
        if sender.send(batch).is_err() {
            return;
        }
    }
}

fn collect_opened(
    proc: &ProcDir,
    opened: impl Iterator<Item = Result<Opened, CollectError>>,
    collector: &mut Collector<'_>,
) -> Result<Vec<FdinfoEntry>, CollectError> {
    let mut table = Vec::new();
    for opened in opened {
        let probe = FdProbe::of(proc, opened?, collector.pids());
        let entry = collect_fd(&probe, collector);
        table.extend(collector.note(entry)?);
    }
    Ok(table)
}

fn collect_fd(
    probe: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<FdinfoEntry, CollectError> {
    let (id, kind) = collect_description(probe, collector)?;
    let locks = collect_locks(id, probe, collector);
    collector.note(locks)?;
    Ok(FdinfoEntry {
        id: id.0,
        flags: probe.fd_flags(),
        r#type: kind,
        fd: probe.fd().0.cast_unsigned(),
        xattr_security_selinux: None,
    })
}

/// Collects the open file description behind a descriptor, unless it is known already; returns its number
/// and type.
pub(crate) fn collect_description(
    probe: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(FileId, i32), CollectError> {
    let key = DescriptionKey {
        dev: probe.stat().st_dev,
        ino: probe.stat().st_ino,
        flags: probe.flags(),
        counter: probe.counter(),
    };
    let identity = collector
        .ids()
        .identify(key, &probe.seen())
        .map_err(|source| probe.failed("Comparing", source))?;
    match identity {
        Identity::Shared(id, kind) => Ok((id, kind)),
        Identity::New(id) => {
            let kind = FD_KINDS
                .iter()
                .find(|kind| kind.recognises(probe))
                .ok_or_else(|| unsupported(probe))?;
            let entry = kind.collect(id, probe, collector)?;
            let kind = entry.r#type;
            collector.ids().set_kind(key, id, kind);
            collector.add_file(entry);
            Ok((id, kind))
        }
    }
}

fn unsupported(probe: &FdProbe<'_>) -> CollectError {
    let what = String::from_utf8_lossy(probe.target()).into_owned();
    let remedy = match what.as_str() {
        "anon_inode:[io_uring]" => {
            "close it, or start the program without io_uring (UV_USE_IO_URING=0 for node)"
        }
        "anon_inode:[userfaultfd]" => "close it: a userfaultfd cannot be moved",
        "anon_inode:[perf_event]" => "stop profiling the program first",
        _ => "close it before the checkpoint; this kind of file is not supported",
    };
    CollectError::Unsupported(Obstacle::fd(probe.pid(), probe.fd(), what, remedy))
}
