//! The value that the notification of a queue hands over, which the kernel tells with the signal only: it is
//! set off while the task is stopped, the signal taken back, and the notification asked for again.

use std::os::fd::{AsFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::messages::{PosixNotifyEntry, PosixQueueEntry};
use floe_inject::{Arg, InjectError, Outcome, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::mqueue;
use floe_kernel::proc::ProcDir;
use floe_kernel::ptrace::{SignalQueue, peek_siginfo};

use super::super::failed_on;
use crate::collect::{CollectError, Collector};

/// `SIGEV_SIGNAL`.
const BY_SIGNAL: u32 = 0;
/// `SI_MESGQ`.
const OF_QUEUE: i32 = -3;
/// Where `siginfo_t` has the signal, the code, and the value.
const SIGNAL: usize = 0;
const CODE: usize = 8;
const VALUE: usize = 24;

/// A queue that tells a task of the tree by a signal.
#[derive(Debug)]
pub struct Telling {
    entry: PosixQueueEntry,
    notify: PosixNotifyEntry,
    file: OwnedFd,
    /// The task, and its number for the queue.
    pub pid: HostPid,
    number: i32,
}

/// Those whose value is not known yet.
#[derive(Default)]
pub(super) struct AllTelling(pub Vec<Telling>);

impl Telling {
    /// The queue again where it tells nobody by a signal.
    pub(super) fn of(
        entry: PosixQueueEntry,
        file: Option<OwnedFd>,
        collector: &Collector<'_>,
    ) -> Result<Result<Telling, PosixQueueEntry>, CollectError> {
        let notify = entry.notify.clone();
        let notify = notify.filter(|notify| notify.kind == BY_SIGNAL);
        let owner = |notify: &PosixNotifyEntry| {
            let mut all = collector.processes();
            all.find(|pid| collector.pids().number(*pid) == notify.pid)
        };
        let owner = notify.as_ref().and_then(owner);
        let (Some(notify), Some(file), Some(pid)) = (notify, file, owner) else {
            return Ok(Err(entry));
        };
        let stat = rustix::fs::fstat(&file).map_err(failed_on("Looking at queue", &entry.name))?;
        let proc = ProcDir::open(pid)?;
        let mut numbers = proc.list("fd")?.into_iter();
        let number = numbers.find(|number| {
            let other = proc.stat(&format!("fd/{number}"));
            other.is_ok_and(|other| (other.st_dev, other.st_ino) == (stat.st_dev, stat.st_ino))
        });
        Ok(match number {
            None => Err(entry),
            Some(number) => Ok(Telling {
                entry,
                notify,
                file,
                pid,
                number,
            }),
        })
    }

    /// Finds the value, with programs that the stopped task runs by `run`. A queue that has messages tells
    /// nobody of another one, and one whose signal is pending already cannot be told apart: zero is kept.
    pub fn ask(
        &mut self,
        mut run: impl FnMut(&Program) -> Result<Outcome, InjectError>,
    ) -> Result<(), CollectError> {
        let name = self.entry.name.clone();
        let failed = |error| failed_on("Finding the notification of queue", &name)(error);
        let messages = mqueue::attributes(self.file.as_fd())
            .map_err(failed)?
            .messages;
        let pending = self.pending().map_err(failed)?;
        if messages > 0 || pending.is_some() {
            tracing::warn!(pid = %self.pid, "the value of the notification of queue /{name} is lost");
            return Ok(());
        }
        mqueue::send(self.file.as_fd(), 0, b"").map_err(failed)?;
        let told = self.pending();
        let mut buffer = vec![0; self.entry.max_size as usize];
        let taken = mqueue::receive(self.file.as_fd(), &mut buffer);
        self.notify.value = told.map_err(failed)?;
        run(&self.program())?;
        taken.map(drop).map_err(failed)
    }

    /// The value with the signal, if it is pending for the whole process.
    fn pending(&self) -> std::io::Result<Option<u64>> {
        let all = peek_siginfo(self.pid, SignalQueue::Shared)?;
        let word =
            |info: &[u8], at: usize| info[at..at + 4].try_into().map_or(0, i32::from_ne_bytes);
        let it = all.iter().find(|info| {
            word(&info[..], SIGNAL).cast_unsigned() == self.notify.signal
                && word(&info[..], CODE) == OF_QUEUE
        });
        Ok(it.map(|info| {
            let value = info[VALUE..VALUE + 8].try_into();
            value.map_or(0, u64::from_ne_bytes)
        }))
    }

    /// Takes the signal back, and asks to be notified again.
    fn program(&self) -> Program {
        let mut program = Program::new();
        let set = 1_u64 << (self.notify.signal.clamp(1, 64) - 1);
        let set = program.buffer(&set.to_ne_bytes());
        let at_once = program.buffer(&[0; 16]);
        let args = [
            Arg::from(set),
            Arg::from(0),
            Arg::from(at_once),
            Arg::from(8),
        ];
        program.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &args);
        let event = program.buffer(&event_of(&self.notify));
        let args = [Arg::from(self.number), Arg::from(event)];
        program.call("mq_notify", libc::SYS_mq_notify, &args);
        program
    }
}

/// `struct sigevent`: value, signal, way of notifying.
pub fn event_of(notify: &PosixNotifyEntry) -> [u8; 64] {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&notify.value.unwrap_or(0).to_ne_bytes());
    event[8..12].copy_from_slice(&notify.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&notify.kind.to_ne_bytes());
    event
}

/// The queues whose value is to be found, as soon as tasks can be asked.
pub fn take_telling(collector: &mut Collector<'_>) -> Vec<Telling> {
    std::mem::take(&mut collector.cache(AllTelling::default).0)
}

/// Writes them.
pub fn write_telling(
    telling: Vec<Telling>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    for Telling { entry, notify, .. } in telling {
        let entry = PosixQueueEntry {
            notify: Some(notify),
            ..entry
        };
        collector.append_side(ImageKind::PosixQueues, &entry)?;
    }
    Ok(())
}
