//! Contexts of asynchronous I/O (`io_setup(2)`).
//!
//! Saved:    place and content of each ring, which events nobody has taken yet.
//! Rebuilt:  made with as many events, moved to its place; requests that do nothing bring the kernel's
//!           own position to that of the ring, then the events get their content. Needs: all else mapped.
//! Not kept: requests under way; a dump waits for them or refuses.

use std::ops::Range;

use floe_image::messages::MmEntry;
use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskAddr;
use floe_kernel::vm;
use floe_memory::PageIndex;

use super::error::{MemoryError, PlanError};
use super::map::Puppet;
use super::plan::MemoryPlan;
use super::region::status;

/// `struct aio_ring` before its events, in bytes; an event has the same size.
const HEADER: usize = 32;
const EVENT: usize = 32;
/// `struct iocb`, and the places of its fields.
const IOCB: usize = 64;
const IOCB_OPCODE: usize = 16;
const IOCB_FD: usize = 20;
const IOCB_BUFFER: usize = 24;
const IOCB_LENGTH: usize = 32;
const IOCB_CMD_PWRITE: u16 = 1;
/// Requests in one call at most. The kernel hands out room in parts per CPU, so a call for much of a
/// ring may get less than it asked for.
const BURST: u32 = 64;
/// Rings of more bytes are damage.
const MAX_RING: u64 = 64 << 20;

/// A context to be.
#[derive(Clone, Debug)]
pub(super) struct RingPlan {
    range: Range<u64>,
    /// The number of events to ask for, which gives a ring of this size.
    requests: u32,
    header: Header,
}

/// The head of a ring: its size in events, and where the oldest and the next one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    events: u32,
    head: u32,
    tail: u32,
}

impl Header {
    fn of(bytes: &[u8; HEADER]) -> Header {
        let word = |at: usize| {
            u32::from_le_bytes(
                bytes[at..at + 4]
                    .try_into()
                    .expect("four bytes of a header"),
            )
        };
        Header {
            events: word(4),
            head: word(8),
            tail: word(12),
        }
    }

    /// Events to complete and events to take, to get from an empty ring to this one.
    fn turns(&self) -> (u32, u32) {
        let wrapped = self.tail < self.head;
        let completed = self.tail + if wrapped { self.events } else { 0 };
        (completed, self.head)
    }
}

/// The contexts of an address space.
pub(super) fn plan(mm: &MmEntry, pages: &PageIndex) -> Result<Vec<RingPlan>, PlanError> {
    let rings = mm.vmas.iter();
    rings
        .filter(|vma| vma.status & status::AIO_RING != 0)
        .map(|vma| {
            let damaged = |problem: &str| PlanError::AioRing {
                start: vma.start,
                problem: problem.into(),
            };
            let context = mm.aios.iter().find(|context| context.id == vma.start);
            let context =
                context.ok_or_else(|| damaged("the image does not tell its number of events"))?;
            if vma.end - vma.start > MAX_RING {
                return Err(damaged("it is larger than any ring can be"));
            }
            let header = read_header(vma.start, pages)
                .ok_or_else(|| damaged("the image does not have its head"))?;
            let room = (vma.end - vma.start) / EVENT as u64 - 1;
            if u64::from(header.events) > room {
                return Err(damaged("it has more events than room for them"));
            }
            if header.head >= header.events || header.tail >= header.events {
                return Err(damaged("its positions lie outside of it"));
            }
            Ok(RingPlan {
                range: vma.start..vma.end,
                requests: context.nr_req,
                header,
            })
        })
        .collect()
}

fn read_header(start: u64, pages: &PageIndex) -> Option<Header> {
    let run = pages.runs_in(start..start + HEADER as u64).next()?;
    let mut bytes = [0; HEADER];
    let file = pages.open(run.file).ok()?;
    file.read_exact_at(&mut bytes, run.offset).ok()?;
    Some(Header::of(&bytes))
}

/// Makes the contexts of a task whose memory is in place.
pub(super) fn restore(plan: &MemoryPlan, puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    for ring in &plan.rings {
        let null = make(ring, puppet)?;
        advance(ring, null, puppet)?;
        fill(ring, plan, puppet)?;
        check(ring, puppet)?;
    }
    Ok(())
}

/// Makes a context at its place; returns the task's descriptor of `/dev/null`.
fn make(ring: &RingPlan, puppet: &mut Puppet<'_>) -> Result<i32, MemoryError> {
    let Range { start, end } = ring.range;
    let mut program = Program::new();
    let path = program.buffer(b"/dev/null\0");
    let args = [Arg::from(path), Arg::from(libc::O_WRONLY | libc::O_CLOEXEC)];
    let null = program.call("open of /dev/null", libc::SYS_open, &args);
    let context = program.zeroed(8);
    program.call(
        format!("io_setup for the ring at {start:#x}"),
        libc::SYS_io_setup,
        &[Arg::from(ring.requests), Arg::from(context)],
    );
    let args = [
        Arg::Load(context, 0),
        Arg::from(end - start),
        Arg::from(end - start),
        Arg::from(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED),
        Arg::from(start),
    ];
    let label = format!("mremap of the ring of asynchronous I/O to {start:#x}");
    program.call(label, libc::SYS_mremap, &args);
    let outcome = puppet.arena.run(puppet.thread, &program)?;
    Ok(outcome.result(null) as i32)
}

/// Completes and takes events until the kernel's positions are those of the image.
fn advance(ring: &RingPlan, null: i32, puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    let context = ring.range.start;
    let (mut to_complete, mut to_take) = ring.header.turns();
    let burst = (ring.header.events / 8).clamp(1, BURST);
    let mut program = Program::new();
    let request = program.buffer(&iocb(null));
    program.point(request, IOCB_BUFFER, request);
    let list = program.zeroed(burst as usize * 8);
    for index in 0..burst as usize {
        program.point(list, index * 8, request);
    }
    let taken = program.zeroed(burst as usize * EVENT);
    let mut calls = Vec::new();
    while to_complete > 0 {
        let count = to_complete.min(burst);
        let args = [Arg::from(context), Arg::from(count), Arg::from(list)];
        calls.push((program.call("io_submit", libc::SYS_io_submit, &args), count));
        to_complete -= count;
        let count = to_take.min(count);
        if count > 0 {
            let args = [
                Arg::from(context),
                Arg::from(count),
                Arg::from(count),
                Arg::from(taken),
                Arg::from(0),
            ];
            let take = program.call("io_getevents", libc::SYS_io_getevents, &args);
            calls.push((take, count));
            to_take -= count;
        }
    }
    program.call("close of /dev/null", libc::SYS_close, &[Arg::from(null)]);
    let outcome = puppet.arena.run(puppet.thread, &program)?;
    let short = |(call, wanted): &(_, u32)| outcome.result(*call) != i64::from(*wanted);
    if calls.iter().any(short) {
        return Err(ring.failed("the kernel completed fewer requests than it was given"));
    }
    Ok(())
}

/// A request that writes nothing that matters to `null`.
fn iocb(null: i32) -> [u8; IOCB] {
    let mut bytes = [0; IOCB];
    bytes[IOCB_OPCODE..IOCB_OPCODE + 2].copy_from_slice(&IOCB_CMD_PWRITE.to_le_bytes());
    bytes[IOCB_FD..IOCB_FD + 4].copy_from_slice(&null.to_le_bytes());
    bytes[IOCB_LENGTH..IOCB_LENGTH + 8].copy_from_slice(&1u64.to_le_bytes());
    bytes
}

/// Gives the events their content; the head of the ring is the kernel's.
fn fill(ring: &RingPlan, plan: &MemoryPlan, puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    let pid = puppet.thread.pid();
    let events = ring.range.start + HEADER as u64..ring.range.end;
    for run in plan.pages.runs_in(events) {
        let mut bytes = vec![0; run.len as usize];
        let read = plan
            .pages
            .open(run.file)?
            .read_exact_at(&mut bytes, run.offset);
        read.map_err(|source| MemoryError::ReadPages {
            offset: run.offset,
            bytes: run.len as usize,
            source,
        })?;
        vm::write_exact(pid, TaskAddr(run.start), &bytes).map_err(|source| MemoryError::Fill {
            pid,
            how: "process_vm_writev",
            start: run.start,
            bytes: bytes.len(),
            source,
        })?;
    }
    Ok(())
}

/// Another number of CPUs can give another size of ring.
fn check(ring: &RingPlan, puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    let pid = puppet.thread.pid();
    let mut bytes = [0; HEADER];
    vm::read_exact(pid, TaskAddr(ring.range.start), &mut bytes).map_err(|source| {
        MemoryError::Task {
            pid,
            what: "reading its ring of asynchronous I/O",
            source,
        }
    })?;
    let found = Header::of(&bytes);
    if found.events != ring.header.events {
        return Err(ring.failed("this kernel makes it of another size"));
    }
    if found != ring.header {
        return Err(ring.failed("the kernel did not come to its positions"));
    }
    Ok(())
}

impl RingPlan {
    fn failed(&self, problem: &str) -> MemoryError {
        MemoryError::Plan(PlanError::AioRing {
            start: self.range.start,
            problem: problem.into(),
        })
    }
}
