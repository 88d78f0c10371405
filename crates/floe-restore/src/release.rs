//! The last act: registers in, executor out, everybody runs.

use floe_image::messages::{CoreEntry, RseqEntry};
use floe_inject::{Arena, Saved, Stopped};
use floe_kernel::ptrace;
use floe_kernel::vm;
use floe_options::AfterRestore;
use floe_resources::restore::{
    Attempt, ExecuteError, PlanError, Puppet, TaskImages, TaskState, World,
};
use floe_resources::task::rebuild::{TaskContext, fpu, registers, rseq, signal_mask};

use crate::state::Background;

/// Lets the whole tree run; consumes every puppet.
pub fn release(world: &mut World<'_>, background: &Background<'_>) -> Result<(), ExecuteError> {
    let images = world.images;
    let mut area = Vec::new();
    for (pid, puppet) in &mut world.puppets {
        let task = images
            .task(*pid)
            .expect("helpers and zombies are gone by now");
        let context = background.of(task, *pid);
        set_final_state(&mut puppet.leader, &task.core, &context, &mut area)?;
        for (tid, thread) in &mut puppet.threads {
            let context = background.of(task, *tid);
            set_final_state(thread, &task.threads[tid], &context, &mut area)?;
            thread.put_back()?;
        }
    }
    tracing::debug!("registers are set");
    remove_executors(world)?;
    for (pid, puppet) in &mut world.puppets {
        let task = images
            .task(*pid)
            .expect("helpers and zombies are gone by now");
        puppet.leader.put_back()?;
        write_rseq_pointer(&puppet.leader, &task.core)?;
        for (tid, thread) in &puppet.threads {
            write_rseq_pointer(thread, &task.threads[tid])?;
        }
    }
    tracing::debug!("executors are gone");
    // From here on the tree is whole: should we die now, it runs on instead of dying with us.
    for puppet in world.puppets.values() {
        for thread in std::iter::once(&puppet.leader).chain(puppet.threads.values()) {
            let pid = thread.pid();
            ptrace::set_options(pid, 0).during("Making independent", || pid.to_string())?;
        }
    }
    let all_stopped = world.options.after == AfterRestore::LeaveStopped;
    for (
        pid,
        Puppet {
            leader, threads, ..
        },
    ) in std::mem::take(&mut world.puppets)
    {
        let saved = images.task(pid).and_then(|task| task.state().ok());
        if all_stopped || saved == Some(TaskState::Stopped) {
            let signal = images.task(pid).map_or(libc::SIGSTOP, stop_signal);
            floe_kernel::pidfd::tgkill(leader.pid(), signal)
                .during("Stopping task", || pid.to_string())?;
        }
        for (_, thread) in threads {
            thread.release()?;
        }
        leader.release()?;
    }
    Ok(())
}

/// The signal that stopped the task, which its parent can ask for. Another one than SIGSTOP stops only
/// where it has its default action and is not blocked.
fn stop_signal(task: &TaskImages) -> i32 {
    let core = task.core.tc.as_ref();
    let signal = core
        .and_then(|core| core.stop_signo)
        .map_or(libc::SIGSTOP, u32::cast_signed);
    let usual = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal);
    let action = core.and_then(|core| core.sigactions.get((signal - 3).max(0) as usize));
    let blocked = signal_mask(&task.core) & 1 << (signal - 1).clamp(0, 63) != 0;
    let stops = usual && !blocked && action.is_none_or(|action| action.sigaction == 0);
    if stops { signal } else { libc::SIGSTOP }
}

/// Sets FPU state, and decides registers and mask. All threads share `area`: it is filled from the
/// first one, for what this machine wants of such an area, and is written over for each.
fn set_final_state(
    thread: &mut Stopped,
    core: &CoreEntry,
    context: &TaskContext<'_>,
    area: &mut Vec<u8>,
) -> Result<(), ExecuteError> {
    let pid = thread.pid();
    let what = || format!("of thread {pid}");
    let info = registers::checked(core, context).map_err(late)?;
    if area.is_empty() {
        *area = ptrace::xstate(pid).during("Reading the FPU state", what)?;
    }
    fpu::from_image(&info.fpregs, area, context).map_err(late)?;
    ptrace::set_xstate(pid, area).during("Setting the FPU state", what)?;
    let mut regs = registers::from_image(&info.gpregs);
    if let Some(registration) = rseq_of(core) {
        let read =
            |at: floe_kernel::ids::TaskAddr, buffer: &mut [u8]| vm::read_exact(pid, at, buffer);
        regs.rip = rseq::fix_ip(registration, regs.rip, read)
            .during("Reading the restartable sequence", what)?;
    }
    thread.replace(Saved {
        regs,
        sigmask: signal_mask(core),
    });
    Ok(())
}

fn rseq_of(core: &CoreEntry) -> Option<&RseqEntry> {
    core.thread_core.as_ref()?.rseq_entry.as_ref()
}

/// Writes the pointer to the sequence that a thread goes on in; our calls in it would clear it.
fn write_rseq_pointer(thread: &Stopped, core: &CoreEntry) -> Result<(), ExecuteError> {
    let Some((at, pointer)) = rseq_of(core).and_then(rseq::pointer_to_write) else {
        return Ok(());
    };
    let pid = thread.pid();
    vm::write_exact(pid, at, &pointer.to_le_bytes())
        .during("Writing the restartable sequence", || {
            format!("of thread {pid}")
        })
}

/// A fault of the images that only shows beside the machine's own state.
fn late(error: PlanError) -> ExecuteError {
    ExecuteError::Plan(Box::new(error))
}

/// Unmaps the executor from every address space: once for tasks that share one.
fn remove_executors(world: &mut World<'_>) -> Result<(), ExecuteError> {
    let images = world.images;
    let mut done = std::collections::BTreeSet::new();
    let first_of_space = world.puppets.iter_mut().filter(|(pid, _)| {
        let task = images.task(**pid);
        let space = task.and_then(|task| task.ids.as_ref());
        done.insert(space.map_or(**pid, |ids| ids.vm_id))
    });
    let executors = first_of_space.map(|(_, puppet)| (puppet.arena.clone(), &mut puppet.leader));
    Ok(Arena::remove_all(executors)?)
}
