//! Asking the tasks: one executor a process, one program a thread.

use floe_inject::{Arena, InjectError, Outcome, Program, QuietSignal, Saved, Stopped, find_gate};
use floe_kernel::proc::ProcDir;
use floe_kernel::security::SecurityModule;
use floe_resources::CollectError;
use floe_resources::ipc::posix::Telling;
use floe_resources::namespace::{OwnerMap, PidView};
use floe_resources::task::alt_stack::AltStack;
use floe_resources::task::attributes::{TaskAttributes, ThreadAttributes};
use floe_resources::task::itimers::IntervalTimers;
use floe_resources::task::label::LabelQuestions;
use floe_resources::task::memory_map;
use floe_resources::task::posix_timers::PosixTimers;
use floe_resources::task::rlimits::ResourceLimits;
use floe_resources::task::sigactions::SignalActions;

use crate::freeze::FrozenTask;
use crate::task::{self, TaskDraft, ThreadDraft};

/// What is asked of a thread.
struct ThreadQuestions {
    stack: AltStack,
    attributes: ThreadAttributes,
    label: LabelQuestions,
}

/// What is asked of a process, through its leader.
struct TaskQuestions {
    actions: SignalActions,
    intervals: IntervalTimers,
    timers: PosixTimers,
    limits: ResourceLimits,
    attributes: TaskAttributes,
}

/// Fills in what only the task itself can tell. The executor is gone from the task afterwards, whatever
/// the result.
pub fn ask(
    task: &mut FrozenTask,
    draft: &mut TaskDraft,
    (pids, security, telling): (&PidView, SecurityModule, &mut [Telling]),
) -> Result<(), CollectError> {
    redirect_out_of_sequences(task, draft)?;
    let pid = task.pid;
    let mut gates = draft
        .space
        .executable
        .iter()
        .map(|code| find_gate(pid, code.clone()));
    let gate = gates
        .find(Result::is_ok)
        .unwrap_or(Err(InjectError::NoGate { pid }))?;
    let signal = quiet_signal(draft);
    let (leader, others) = task
        .threads
        .split_first_mut()
        .ok_or(InjectError::NoGate { pid })?;
    let arena = Arena::inject(leader, gate, signal)?;
    let mut answered = ask_leader((&task.proc, pids, security), &arena, leader, draft);
    for queue in telling.iter_mut().filter(|queue| queue.pid == pid) {
        answered = answered.and_then(|()| queue.ask(|program| arena.run(leader, program)));
    }
    if let Some((_, drafts)) = draft.threads.split_first_mut() {
        answered =
            answered.and_then(|()| ask_threads(&arena, others, drafts, (pids.owners(), security)));
    }
    for thread in others {
        thread.put_back()?;
    }
    let removed = arena.remove(leader);
    answered?;
    Ok(removed?)
}

/// A signal that no thread catches or has pending.
fn quiet_signal(draft: &TaskDraft) -> QuietSignal {
    let pending =
        |thread: &ThreadDraft| thread.status.private_pending | thread.status.shared_pending;
    let caught = draft
        .threads
        .first()
        .map_or(0, |leader| leader.status.caught);
    QuietSignal::choose(
        caught,
        draft
            .threads
            .iter()
            .map(pending)
            .fold(0, |all, set| all | set),
    )
}

/// On the way back to the task the kernel would find our instruction pointer outside of its sequence and
/// forget about it, so a thread that is inside one goes on at its abort handler in any case.
fn redirect_out_of_sequences(task: &mut FrozenTask, draft: &TaskDraft) -> Result<(), InjectError> {
    for (thread, thread_draft) in task.threads.iter_mut().zip(&draft.threads) {
        if let Some(ip) = thread_draft.rseq.abort_ip {
            let mut regs = thread.regs()?;
            regs.rip = ip;
            let sigmask = thread.sigmask()?;
            thread.replace(Saved { regs, sigmask });
        }
    }
    Ok(())
}

fn ask_leader(
    (proc, pids, security): (&ProcDir, &PidView, SecurityModule),
    arena: &Arena,
    leader: &mut Stopped,
    draft: &mut TaskDraft,
) -> Result<(), CollectError> {
    let mut program = Program::new();
    let of_thread = ThreadQuestions::ask(security, &mut program);
    let of_task = TaskQuestions::ask(proc, &mut program)?;
    let outcome = arena.run(leader, &program)?;
    if let Some(thread) = draft.threads.first_mut() {
        of_thread.read(&outcome, thread, pids.owners())?;
    }
    of_task.read(&outcome, draft, pids);
    Ok(())
}

/// Asks many threads at once, as far as their programs fit the arena beside each other.
fn ask_threads(
    arena: &Arena,
    threads: &mut [Stopped],
    drafts: &mut [ThreadDraft],
    (owners, security): (&OwnerMap, SecurityModule),
) -> Result<(), CollectError> {
    let mut program = Program::new();
    let questions = ThreadQuestions::ask(security, &mut program);
    let bytes = program.arena_bytes();
    let at_once = (arena.capacity() / bytes).max(1);
    for (threads, drafts) in threads.chunks_mut(at_once).zip(drafts.chunks_mut(at_once)) {
        let mut result: Result<(), CollectError> = Ok(());
        let mut started = 0;
        while let (Some(thread), Ok(())) = (threads.get_mut(started), &result) {
            let begun = arena.start(thread, &program, started * bytes);
            result = begun.map_err(CollectError::from);
            started += usize::from(result.is_ok());
        }
        // What was started has to be waited for, also after a failure.
        for (index, (thread, draft)) in threads.iter_mut().zip(drafts).take(started).enumerate() {
            match arena.finish(thread, &program, index * bytes) {
                Ok(outcome) => {
                    result = result.and(questions.read(&outcome, draft, owners));
                }
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        result?;
    }
    Ok(())
}

impl ThreadQuestions {
    fn ask(security: SecurityModule, program: &mut Program) -> Self {
        ThreadQuestions {
            stack: AltStack::ask(program),
            attributes: ThreadAttributes::ask(program),
            label: LabelQuestions::ask(security, program),
        }
    }

    fn read(
        &self,
        outcome: &Outcome,
        draft: &mut ThreadDraft,
        owners: &OwnerMap,
    ) -> Result<(), CollectError> {
        self.label.read(outcome, draft.tid, &draft.label)?;
        let attributes = self.attributes.read(outcome);
        let credentials = task::credentials(draft, attributes.securebits, owners);
        if let Some(info) = &mut draft.core.thread_info {
            info.clear_tid_addr = attributes.tid_address;
        }
        if let Some(core) = &mut draft.core.thread_core {
            core.sas = Some(self.stack.read(outcome));
            core.pdeath_sig = Some(attributes.death_signal).filter(|&signal| signal != 0);
            core.creds = Some(credentials);
        }
        Ok(())
    }
}

impl TaskQuestions {
    fn ask(proc: &ProcDir, program: &mut Program) -> Result<Self, CollectError> {
        Ok(TaskQuestions {
            actions: SignalActions::ask(program),
            intervals: IntervalTimers::ask(program),
            timers: PosixTimers::ask(proc, program)?,
            limits: ResourceLimits::ask(program),
            attributes: TaskAttributes::ask(program),
        })
    }

    fn read(&self, outcome: &Outcome, draft: &mut TaskDraft, pids: &PidView) {
        let attributes = self.attributes.read(outcome);
        memory_map::complete(&mut draft.mm, &attributes);
        let task_core = draft
            .threads
            .first_mut()
            .and_then(|leader| leader.core.tc.as_mut());
        if let Some(core) = task_core {
            core.sigactions = self.actions.read(outcome);
            core.timers = Some(task::timers(
                self.intervals.read(outcome),
                self.timers.read(outcome, pids),
            ));
            core.rlimits = Some(self.limits.read(outcome));
            core.child_subreaper = Some(attributes.child_subreaper);
            core.membarrier_registration_mask =
                Some(attributes.membarrier).filter(|&mask| mask != 0);
        }
    }
}
