//! A task's table of descriptors.

use floe_image::messages::FdinfoEntry;
use floe_kernel::ids::TaskFd;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::ProcDir;

use super::ahead::ask_ahead;
use super::file_ids::{DescriptionKey, Identity};
use super::probe::Source;
use super::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::fd::FD_KINDS;
use crate::file_lock::collect_locks;
use crate::task::label::sockets;

/// Collects every descriptor of a stopped task. Descriptors that cannot be saved become obstacles.
pub fn collect_fd_table(
    proc: &ProcDir,
    pidfd: &Pidfd,
    collector: &mut Collector<'_>,
) -> Result<Vec<FdinfoEntry>, CollectError> {
    let numbers = proc.list("fd")?;
    let source = Source { proc, pidfd };
    let mut table = Vec::new();
    let open = |fd: i32| source.open(TaskFd(fd));
    ask_ahead(&numbers, open, |_, opened| {
        let probe = FdProbe::of(proc, opened?, collector.pids());
        let entry = collect_fd(&probe, collector);
        table.extend(collector.note(entry)?);
        Ok(())
    })?;
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
        xattr_security_selinux: sockets::collect(probe, collector)?,
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
            "close it, or start the program without io_uring (node: UV_USE_IO_URING=0, MariaDB: --innodb-use-native-aio=0)"
        }
        "anon_inode:[userfaultfd]" => "close it: a userfaultfd cannot be moved",
        "anon_inode:[perf_event]" => "stop profiling the program first",
        _ => "close it before the checkpoint; this kind of file is not supported",
    };
    CollectError::Unsupported(Obstacle::fd(probe.pid(), probe.fd(), what, remedy))
}
