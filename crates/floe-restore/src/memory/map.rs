//! Mapping: the program that turns a puppet's address space into the planned one.

use std::ops::Range;

use floe_inject::{Arena, Arg, Program, Stopped, TASK_SIZE};
use floe_kernel::ids::{HostPid, TaskFd};

use super::error::MemoryError;
use super::plan::MemoryPlan;
use super::region::{Backing, Origin, Region, Source};
use super::vdso::OldVdso;

/// `arch_prctl` code that maps the vDSO at an address (`asm/prctl.h`).
const ARCH_MAP_VDSO_64: u64 = 0x2003;
/// Most words that the kernel keeps of the auxiliary vector (`AT_VECTOR_SIZE`, 6.x).
const AUXV_WORDS: usize = 52;
/// Advice that is state of a mapping, in the order in which the kernel takes it.
const ADVICE: [(i32, &str); 8] = [
    (libc::MADV_RANDOM, "MADV_RANDOM"),
    (libc::MADV_SEQUENTIAL, "MADV_SEQUENTIAL"),
    (libc::MADV_DONTFORK, "MADV_DONTFORK"),
    (libc::MADV_MERGEABLE, "MADV_MERGEABLE"),
    (libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
    (libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE"),
    (libc::MADV_DONTDUMP, "MADV_DONTDUMP"),
    (libc::MADV_WIPEONFORK, "MADV_WIPEONFORK"),
];

/// A task under construction: stopped, with the executor in its memory.
#[derive(Debug)]
pub struct Puppet<'a> {
    /// Its executor.
    pub arena: &'a Arena,
    /// Its first thread.
    pub thread: &'a mut Stopped,
    /// What it does before anything else.
    pub first: Program,
}

/// Programs of one task, cut where the arena is full.
pub(super) struct Steps<'p, 'a> {
    puppet: &'p mut Puppet<'a>,
    program: Program,
}

impl<'p, 'a> Steps<'p, 'a> {
    pub fn new(puppet: &'p mut Puppet<'a>) -> Self {
        Steps {
            program: std::mem::take(&mut puppet.first),
            puppet,
        }
    }

    /// The program to add calls to; `bytes` are what its buffers will take.
    pub fn program(&mut self, bytes: usize) -> Result<&mut Program, MemoryError> {
        const CALLS: usize = 4096;
        if self.program.arena_bytes() + bytes + CALLS > self.puppet.arena.capacity() {
            self.run()?;
        }
        Ok(&mut self.program)
    }

    /// Runs what is pending, if anything is.
    pub fn run(&mut self) -> Result<(), MemoryError> {
        let program = std::mem::take(&mut self.program);
        if !program.is_empty() {
            self.puppet.arena.run(self.puppet.thread, &program)?;
        }
        Ok(())
    }
}

/// Unmaps all that is not kept and maps every region at its final address with its final protection.
///
/// `opened` gives the descriptor in the task of what [`MemoryPlan::sources`] named, `exe` that of the
/// program file. The new memory is empty; descriptors stay open.
pub fn map(
    plan: &MemoryPlan,
    puppet: &mut Puppet<'_>,
    opened: &dyn Fn(Source) -> Option<TaskFd>,
    exe: TaskFd,
) -> Result<(), MemoryError> {
    let pid = puppet.thread.pid();
    let mut steps = Steps::new(puppet);
    leave_old_rseq(pid, &mut steps)?;
    unmap_rest(&plan.kept(), &mut steps)?;
    set_numbers(plan, exe, &mut steps)?;
    for attachment in &plan.attachments {
        attachment.map(steps.program(0)?);
    }
    if !plan.keeps_vdso {
        map_vdso(plan, &mut steps)?;
    }
    for region in &plan.regions {
        let fd = match region.source() {
            None => None,
            Some(needed) => Some(opened(needed).ok_or(MemoryError::NotOpened {
                pid,
                start: region.range.start,
                needed,
            })?),
        };
        map_region(plan, region, fd, steps.program(0)?);
    }
    steps.run()
}

/// Unmaps all that a task was born with but its executor: what it forks then is made fast.
pub fn clear(puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    let (pid, arena) = (puppet.thread.pid(), puppet.arena.range());
    let mut steps = Steps::new(puppet);
    leave_old_rseq(pid, &mut steps)?;
    unmap_rest(&[arena], &mut steps)?;
    steps.run()
}

/// Unregisters the area of the process that was forked: the kernel would write there, where nothing will be
/// mapped.
fn leave_old_rseq(pid: HostPid, steps: &mut Steps<'_, '_>) -> Result<(), MemoryError> {
    let rseq =
        floe_kernel::ptrace::rseq_configuration(pid).map_err(|source| MemoryError::Task {
            pid,
            what: "asking for its rseq registration",
            source,
        })?;
    if rseq.rseq_abi_pointer != 0 {
        let args = [
            rseq.rseq_abi_pointer,
            u64::from(rseq.rseq_abi_size),
            1,
            u64::from(rseq.signature),
        ];
        let program = steps.program(0)?;
        program.call("rseq (unregister)", libc::SYS_rseq, &args.map(Arg::from));
    }
    Ok(())
}

fn unmap_rest(kept: &[Range<u64>], steps: &mut Steps<'_, '_>) -> Result<(), MemoryError> {
    let mut free_from = 0;
    let ends = kept
        .iter()
        .cloned()
        .chain(std::iter::once(TASK_SIZE..TASK_SIZE));
    for range in ends {
        if range.start > free_from {
            let args = [free_from, range.start - free_from].map(Arg::from);
            let program = steps.program(0)?;
            program.call("munmap of inherited memory", libc::SYS_munmap, &args);
        }
        free_from = range.end;
    }
    Ok(())
}

/// `PR_SET_MM_MAP`, which needs no capability but for the program file.
///
/// It comes when nothing of the old program is mapped and nothing of the new one: the kernel refuses to
/// change `/proc/PID/exe` while the old file is mapped.
fn set_numbers(
    plan: &MemoryPlan,
    exe: TaskFd,
    steps: &mut Steps<'_, '_>,
) -> Result<(), MemoryError> {
    let words = trimmed(&plan.numbers.auxv);
    let auxv: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let program = steps.program(1024)?;
    let vector = program.buffer(&auxv);
    let exe_fd = if plan.parent_exe == Some(plan.exe_file) {
        u32::MAX
    } else {
        exe.0.cast_unsigned()
    };
    let tail = u64::from(exe_fd) << 32 | auxv.len() as u64;
    // struct prctl_mm_map: the addresses, the vector's address, its u32 size, the u32 descriptor.
    let mut bytes: Vec<u8> = plan
        .numbers
        .addresses
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    bytes.extend([0; 8]);
    bytes.extend(tail.to_le_bytes());
    let size = bytes.len();
    let map = program.buffer(&bytes);
    program.point(map, 11 * 8, vector);
    let args = [
        Arg::from(libc::PR_SET_MM),
        Arg::from(libc::PR_SET_MM_MAP),
        Arg::from(map),
        Arg::from(size),
        Arg::from(0),
    ];
    program.call("prctl(PR_SET_MM_MAP)", libc::SYS_prctl, &args);
    let disabled = u64::from(plan.thp_disabled);
    let args = [libc::PR_SET_THP_DISABLE as u64, disabled, 0, 0, 0].map(Arg::from);
    program.call("prctl(PR_SET_THP_DISABLE)", libc::SYS_prctl, &args);
    Ok(())
}

/// The auxiliary vector up to its end. Images may have more words after it than this kernel keeps.
fn trimmed(auxv: &[u64]) -> &[u64] {
    const AT_NULL: u64 = 0;
    let entries = auxv.chunks_exact(2);
    let len = entries
        .clone()
        .position(|entry| entry[0] == AT_NULL)
        .map_or(entries.len(), |last| last + 1);
    &auxv[..(2 * len).min(AUXV_WORDS)]
}

fn map_vdso(plan: &MemoryPlan, steps: &mut Steps<'_, '_>) -> Result<(), MemoryError> {
    let Some(vdso) = &plan.vdso else {
        return Ok(());
    };
    let Range { start, end } = vdso.range;
    let program = steps.program(0)?;
    if let Some(old) = &vdso.old {
        map_old_vdso(old, program);
    }
    program.call(
        format!("mapping of the vDSO at {start:#x}"),
        libc::SYS_arch_prctl,
        &[ARCH_MAP_VDSO_64, start].map(Arg::from),
    );
    // The kernel takes the address as a hint: ENOMEM here means that it chose another.
    program.call(
        format!("finding the vDSO at {start:#x}"),
        libc::SYS_msync,
        &[start, end - start, libc::MS_ASYNC as u64].map(Arg::from),
    );
    let mut wanted = vdso.wanted.clone();
    wanted.sort_by_key(|piece| piece.start);
    let mut free_from = start;
    for piece in wanted.iter().cloned().chain(std::iter::once(end..end)) {
        if piece.start > free_from {
            let args = [free_from, piece.start - free_from].map(Arg::from);
            let label = "munmap of a part of the vDSO that the program had unmapped";
            program.call(label, libc::SYS_munmap, &args);
        }
        free_from = piece.end;
    }
    Ok(())
}

/// The code and data mappings of another kernel's vDSO, as ordinary memory.
fn map_old_vdso(old: &OldVdso, program: &mut Program) {
    let data = old.data.iter().map(|range| (range, libc::PROT_READ));
    let code = (&old.code, libc::PROT_READ | libc::PROT_EXEC);
    for (range, prot) in data.chain([code]) {
        let args = [
            Arg::from(range.start),
            Arg::from(range.end - range.start),
            Arg::from(prot),
            Arg::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED),
            Arg::from(-1),
            Arg::from(0),
        ];
        let label = format!("mmap of the dump's vDSO at {:#x}", range.start);
        program.call(label, libc::SYS_mmap, &args);
    }
}

fn map_region(plan: &MemoryPlan, region: &Region, fd: Option<TaskFd>, program: &mut Program) {
    let Range { start, end } = region.range;
    match &region.origin {
        Origin::New if region.backing == Backing::AioRing => {}
        Origin::New if matches!(region.backing, Backing::SystemV { .. }) => {
            advise(region, program);
        }
        Origin::New => {
            let offset = match region.backing {
                Backing::PrivateFile { offset, .. } | Backing::Shared { offset, .. } => offset,
                Backing::Anonymous | Backing::AioRing | Backing::SystemV { .. } => 0,
            };
            let prot = plan.first_protection(region);
            let written_once = plan.was_writable(region);
            let args = [
                Arg::from(start),
                Arg::from(end - start),
                Arg::from(match written_once {
                    true => prot | libc::PROT_WRITE as u32,
                    false => prot,
                }),
                Arg::from(region.mmap_flags()),
                Arg::from(fd.map_or(-1, |fd| fd.0)),
                Arg::from(offset),
            ];
            program.call(
                format!("mmap of {start:#x}-{end:#x}"),
                libc::SYS_mmap,
                &args,
            );
            if written_once {
                program.call(
                    format!("mprotect of {start:#x}-{end:#x}"),
                    libc::SYS_mprotect,
                    &[start, end - start, u64::from(prot)].map(Arg::from),
                );
            }
            advise(region, program);
        }
        Origin::Inherited { covers, prot } => {
            if covers.end < end {
                program.call(
                    format!("mremap of {start:#x}-{end:#x} (growing inherited memory)"),
                    libc::SYS_mremap,
                    &[start, covers.end - start, end - start, 0].map(Arg::from),
                );
            }
            if *prot != region.prot {
                program.call(
                    format!("mprotect of {start:#x}-{end:#x} (inherited memory)"),
                    libc::SYS_mprotect,
                    &[start, end - start, u64::from(region.prot)].map(Arg::from),
                );
            }
        }
    }
}

fn advise(region: &Region, program: &mut Program) {
    let Range { start, end } = region.range;
    for (advice, name) in ADVICE {
        if region.advised(advice) {
            program.call(
                format!("madvise({name}) of {start:#x}-{end:#x}"),
                libc::SYS_madvise,
                &[start, end - start, advice as u64].map(Arg::from),
            );
        }
    }
}
