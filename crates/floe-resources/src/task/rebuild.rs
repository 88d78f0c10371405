//! The state of a puppet, as programs that it runs upon itself.
//!
//! Everything here is pure: image entries in, calls appended to a [`Program`]. A few programs make a
//! task; each may be empty, and then nothing needs to run.
//!
//! 1. [`plan_task`], once a process, as soon as it exists: before its threads, because they inherit
//!    the personality, and registering for membarrier waits for every CPU once a process has more than
//!    one; before its memory, because the THP setting decides what pages it gets.
//!
//!    [`plan_shared`], the leader of a process with threads: after its children, which do not share it,
//!    and before its threads, which inherit it.
//! 2. [`plan_thread`], every thread with the leader, once memory is filled: the kernel writes to the
//!    rseq area when it is registered, and `READ_IMPLIES_EXEC` in a personality changes mappings.
//! 3. [`plan_last`], all other threads first and the leader after them, when descriptors and children
//!    are complete and those that are to be zombies are dead. Its order:
//!    - scheduling, while there are the capabilities and limits for it;
//!    - the leader's signal actions: an ignored SIGCHLD would have reaped the zombies;
//!    - pending signals, into queues emptied of what the restore itself caused;
//!    - the leader's timers: they tick from here on, and need privilege for some clocks;
//!    - seccomp filters, which need CAP_SYS_ADMIN or no_new_privs (they do not stop our own calls:
//!      puppets are traced with `PTRACE_O_SUSPEND_SECCOMP`);
//!    - the leader's resource limits, below what the restore has used: threads queue signals, and
//!      `RLIMIT_SIGPENDING` counts them, so the leader comes last;
//!    - credentials: nothing after them needs privilege;
//!    - the parent-death signal and the leader's dumpable flag, which changing credentials clears.
//!
//! Then come the labels of security modules ([`label`](super::label)), which may forbid all of that.
//!
//! Masks, registers and the group stop are set by ptrace afterwards ([`registers`], [`fpu`], [`rseq`]),
//! what lies in `/proc` by the coordinator ([`attributes::write_proc`]).

use floe_image::messages::{CoreEntry, MmEntry, SeccompFilter, ThreadCoreEntry};
use floe_inject::Program;
use floe_kernel::features::KernelFeatures;

use super::{
    alt_stack, credentials, itimers, pending, posix_timers, rlimits, scheduling, seccomp,
    sigactions,
};
use crate::namespace::OwnerMap;
use crate::namespace::nested::Nested;
use crate::restore::PlanError;

pub use super::birth::Birth;
pub use super::{attributes, fpu, registers, rseq};

/// What the state of a thread depends on besides its own image.
#[derive(Clone, Copy, Debug)]
pub struct TaskContext<'a> {
    /// The thread, as the images number it.
    pub tid: u32,
    /// What the kernel can do.
    pub features: &'a KernelFeatures,
    /// What puppets are born with.
    pub birth: &'a Birth,
    /// The process's address space: it keeps two flags.
    pub mm: Option<&'a MmEntry>,
    /// All filters of `seccomp.img`.
    pub seccomp: &'a [SeccompFilter],
    /// Whether its parent is this program, which ends once the tree runs.
    pub loses_parent: bool,
    /// By which numbers tasks know each other.
    pub nested: &'a Nested,
    /// Who the owners that images name are for the coordinator.
    pub owners: &'a OwnerMap,
    /// The same of those that the task itself knows.
    pub own_owners: &'a OwnerMap,
}

impl TaskContext<'_> {
    pub(super) fn damaged(&self, what: impl Into<String>) -> PlanError {
        PlanError::damaged(format!("core-{}.img", self.tid), what)
    }

    pub(super) fn unsupported(&self, what: &str, remedy: &'static str) -> PlanError {
        PlanError::Unsupported {
            object: format!("{what} of thread {}", self.tid),
            remedy,
        }
    }
}

pub(super) fn thread_core<'a>(
    core: &'a CoreEntry,
    context: &TaskContext<'_>,
) -> Result<&'a ThreadCoreEntry, PlanError> {
    let missing = || context.damaged("thread_core is missing");
    core.thread_core.as_ref().ok_or_else(missing)
}

/// What a process does before it has memory and threads.
pub fn plan_task(core: &CoreEntry, context: &TaskContext<'_>) -> Result<Program, PlanError> {
    let mut program = Program::new();
    let task = core
        .tc
        .as_ref()
        .ok_or_else(|| context.damaged("tc is missing"))?;
    attributes::plan_personality(task, &mut program);
    attributes::plan_early(task, context.mm, &mut program);
    Ok(program)
}

/// What a leader does on behalf of all threads of its process, and what those are then born with: to be
/// the `birth` in the context of all later programs of the process, the leader's too.
pub fn plan_shared<'a>(
    threads: impl IntoIterator<Item = &'a CoreEntry>,
    context: &TaskContext<'_>,
) -> Result<(Program, Birth), PlanError> {
    let mut program = Program::new();
    let wanted = threads.into_iter().map(|core| {
        let thread = thread_core(core, context)?;
        credentials::wanted(thread, context)
    });
    let wanted: Vec<_> = wanted.collect::<Result<_, _>>()?;
    let born = &context.birth.credentials;
    let birth = Birth {
        credentials: credentials::plan_shared_bounding(&wanted, born, &mut program),
        ..context.birth.clone()
    };
    Ok((program, birth))
}

/// What a thread does once its process has its memory.
pub fn plan_thread(core: &CoreEntry, context: &TaskContext<'_>) -> Result<Program, PlanError> {
    let mut program = Program::new();
    let thread = thread_core(core, context)?;
    if let Some(task) = &core.tc {
        attributes::plan_late_personality(task, &mut program);
        attributes::plan_comm(&task.comm, &mut program);
    } else if let Some(comm) = &thread.comm {
        attributes::plan_comm(comm, &mut program);
    }
    attributes::plan_addresses(core, &mut program);
    alt_stack::plan(thread, core.tc.is_some(), &mut program);
    rseq::plan(thread, &mut program);
    Ok(program)
}

/// What a thread does as the last thing; all other threads before the leader.
pub fn plan_last(core: &CoreEntry, context: &TaskContext<'_>) -> Result<Program, PlanError> {
    let mut program = Program::new();
    let thread = thread_core(core, context)?;
    let leader = core.tc.as_ref();
    scheduling::plan(thread, context, &mut program)?;
    if let Some(task) = leader {
        attributes::plan_subreaper(task, &mut program);
        sigactions::plan(task, context, &mut program)?;
        pending::plan_shared(task, context, &mut program)?;
    }
    pending::plan_private(thread, context, &mut program)?;
    if let Some(timers) = leader.and_then(|task| task.timers.as_ref()) {
        itimers::plan(timers, context, &mut program)?;
        posix_timers::plan(timers, context, &mut program)?;
    }
    let credentials = credentials::wanted(thread, context)?;
    seccomp::plan(core, (&credentials, context), &mut program)?;
    if let Some(limits) = leader.and_then(|task| task.rlimits.as_ref()) {
        rlimits::plan(limits, context, &mut program)?;
    }
    credentials::plan(
        &credentials,
        &context.birth.credentials,
        context,
        &mut program,
    )?;
    if leader.is_some() || thread.pdeath_sig.is_some_and(|signal| signal != 0) {
        attributes::plan_death_signal(thread, context, &mut program);
    }
    if leader.is_some() {
        credentials::warn_of_losses(&credentials, context);
        attributes::plan_dumpable(context.mm, &mut program);
    }
    Ok(program)
}

/// The signals that a thread blocks, bit 0 for signal 1.
pub fn signal_mask(core: &CoreEntry) -> u64 {
    let own = core.thread_core.as_ref().and_then(|own| own.blk_sigset);
    let leader = core.tc.as_ref().map(|task| task.blk_sigset);
    leader.or(own).unwrap_or(0)
}
