//! One task: first what can be seen from outside, then what only the task itself can tell.

use floe_image::messages::CoreEntryMarch;
use floe_image::messages::{
    ApparmorEntry, CoreEntry, CredsEntry, FdinfoEntry, FsEntry, MmEntry, PstreeEntry,
    TaskCoreEntry, TaskKobjIdsEntry, TaskTimersEntry, ThreadCoreEntry,
};
use floe_inject::Stopped;
use floe_kernel::ids::HostPid;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::{ProcError, Status, parse_status};
use floe_kernel::ptrace::SignalQueue;
use floe_kernel::security::SecurityModule;
use floe_kernel::thread::robust_list;
use floe_resources::cgroup::CgroupSets;
use floe_resources::collect::{ask_ahead, collect_fd_table};
use floe_resources::namespace::{OwnerMap, PidView, TreeNamespaces, check_task, nested};
use floe_resources::task::attributes::encode_personality;
use floe_resources::task::credentials::credentials_entry;
use floe_resources::task::fs::collect_fs;
use floe_resources::task::label::Label;
use floe_resources::task::memory_map::collect_memory_map;
use floe_resources::task::pending::{GroupStop, collect_pending};
use floe_resources::task::registers::collect_registers;
use floe_resources::task::rseq::{Rseq, collect_rseq};
use floe_resources::task::scheduling::collect_scheduling;
use floe_resources::task::seccomp::SeccompFilters;
use floe_resources::task::syscall_dispatch::refuse_dispatch;
use floe_resources::vma::{AddressSpace, collect_address_space, find_socket_files};
use floe_resources::{CollectError, Collector, Obstacle};

use crate::apart;
use crate::freeze::{FrozenTask, TaskState};
use crate::kinship::Kinship;

/// What the tasks of one dump share.
pub struct Shared {
    pub kinship: Kinship,
    pub cgroups: CgroupSets,
    pub seccomp: SeccompFilters,
    /// Who labels tasks here.
    pub security: SecurityModule,
    /// What their labels need of AppArmor's policy.
    pub policy: Option<ApparmorEntry>,
}

impl Shared {
    /// Nothing collected yet.
    pub fn new() -> Self {
        Shared {
            kinship: Kinship::default(),
            cgroups: CgroupSets::default(),
            seccomp: SeccompFilters::default(),
            security: SecurityModule::active(),
            policy: None,
        }
    }
}

/// One thread's state so far.
pub struct ThreadDraft {
    pub tid: HostPid,
    /// Its tid in the images.
    pub number: u32,
    pub core: CoreEntry,
    pub status: Status,
    /// What a security module knows it by.
    pub label: Label,
    pub rseq: Rseq,
}

/// One living task's state so far.
pub struct TaskDraft {
    pub threads: Vec<ThreadDraft>,
    pub ids: TaskKobjIdsEntry,
    /// Its descriptors, unless an earlier task has the same table.
    pub fds: Option<Vec<FdinfoEntry>>,
    pub space: AddressSpace,
    pub mm: MmEntry,
    pub fs: FsEntry,
}

/// A task as it goes into the images.
pub enum Draft {
    Living(Box<TaskDraft>),
    Dead(Box<CoreEntry>),
}

impl Draft {
    /// The labels of its threads.
    pub fn labels(&self) -> impl Iterator<Item = (HostPid, &str)> {
        let threads = match self {
            Draft::Living(task) => task.threads.as_slice(),
            Draft::Dead(_) => &[],
        };
        threads
            .iter()
            .filter_map(|thread| Some((thread.tid, thread.label.current.as_deref()?)))
    }
}

/// `task_core_entry.task_state`.
fn state_number(state: TaskState) -> u32 {
    match state {
        TaskState::Alive => 1,
        TaskState::Dead => 2,
        TaskState::Stopped(_) => 3,
    }
}

/// Collects what can be seen from outside; nothing of the task is changed.
pub fn collect(
    task: &FrozenTask,
    shared: &mut Shared,
    collector: &mut Collector<'_>,
) -> Result<Draft, CollectError> {
    if task.is_dead() {
        return Ok(Draft::Dead(Box::new(dead_core(task))));
    }
    let pid = task.pid;
    check_task(&task.proc, collector)?;
    let identity = shared.kinship.identify(&task.proc, collector)?;
    let fds = if identity.owns_files {
        let pidfd = Pidfd::open(pid).map_err(|source| CollectError::Task {
            pid,
            action: "Opening a pidfd",
            source,
        })?;
        Some(collect_fd_table(&task.proc, &pidfd, collector)?)
    } else {
        None
    };
    let mut threads = collect_threads(task, shared, collector)?;
    let mut views: Vec<(HostPid, &Status, &mut ThreadCoreEntry)> = threads
        .iter_mut()
        .map(|draft| {
            (
                draft.tid,
                &draft.status,
                draft.core.thread_core.get_or_insert_default(),
            )
        })
        .collect();
    shared.seccomp.collect(&mut views)?;
    let Some(leader) = threads.first_mut() else {
        let object = "the task".to_string();
        return Err(CollectError::Unsupported(Obstacle {
            pid,
            object,
            remedy: "see its threads".to_string(),
        }));
    };
    leader.core.tc = Some(task_core(task, leader, collector.pids().owners())?);
    let fs = collect_fs(&task.proc, &leader.status, collector);
    // Late: a thread may still be reading it.
    let mut space = collect_address_space(&task.proc, collector)?;
    let found = find_socket_files(&mut space, &task.proc, fds.as_deref());
    collector.note(found)?;
    let mm = collect_memory_map(&task.proc, &task.stat, collector);
    let (fs, mm) = (collector.note(fs)?, collector.note(mm)?);
    Ok(Draft::Living(Box::new(TaskDraft {
        threads,
        ids: identity.ids,
        fds,
        space,
        // Defaults stand for obstacles, with which nothing is written.
        mm: mm.unwrap_or_default(),
        fs: fs.unwrap_or_default(),
    })))
}

fn collect_threads(
    task: &FrozenTask,
    shared: &mut Shared,
    collector: &mut Collector<'_>,
) -> Result<Vec<ThreadDraft>, CollectError> {
    let tids: Vec<HostPid> = task.threads.iter().map(Stopped::pid).collect();
    let (proc, security) = (&task.proc, shared.security);
    let read = |tid: HostPid| -> Result<Texts, ProcError> {
        Ok(Texts {
            status: proc.read_record(&format!("task/{tid}/status"))?,
            cgroup: proc.read_record(&format!("task/{tid}/cgroup"))?,
            label: Label::read(security, proc, tid)?,
            namespaces: apart::namespaces(proc, tid)?,
        })
    };
    let mut first = None;
    let mut drafts = Vec::with_capacity(tids.len());
    ask_ahead(&tids, read, |index, texts| {
        let thread = &task.threads[index];
        let texts = texts?;
        let namespaces = texts.namespaces;
        let draft = collect_thread(
            (task, thread),
            texts,
            (&mut shared.cgroups, collector.pids()),
        )?;
        let draft = collector.note(draft)?;
        let umask = draft.as_ref().and_then(|draft| draft.status.umask);
        let own = (thread.pid(), namespaces, umask);
        let (leader, others, of_leader) = *first.get_or_insert(own);
        if leader != thread.pid() {
            let both = [(leader, &others, of_leader), (own.0, &own.1, own.2)];
            apart::refuse(proc, both, collector)?;
        }
        drafts.extend(draft);
        Ok(())
    })?;
    Ok(drafts)
}

/// What `/proc` says about a thread.
struct Texts {
    status: Vec<u8>,
    cgroup: Vec<u8>,
    label: Label,
    namespaces: apart::Namespaces,
}

/// The outer result is a failure, the inner one may be an obstacle.
fn collect_thread(
    (task, thread): (&FrozenTask, &Stopped),
    texts: Texts,
    (cgroups, pids): (&mut CgroupSets, &PidView),
) -> Result<Result<ThreadDraft, CollectError>, CollectError> {
    let proc = &task.proc;
    let tid = thread.pid();
    let regs = thread.regs()?;
    let status = parse_status(&texts.status).map_err(|error| proc.bad(error))?;
    let cg_set = cgroups.of_text(proc, texts.cgroup)?;
    let (futex_rla, futex_rla_len) = robust_list(tid).map_err(|source| CollectError::Task {
        pid: tid,
        action: "Asking for the robust futexes",
        source,
    })?;
    let collected = (|| {
        let rseq = collect_rseq(tid, regs.rip)?;
        refuse_dispatch(tid)?;
        let mut core = collect_registers(tid, &regs)?;
        let mut thread_core = ThreadCoreEntry {
            futex_rla: futex_rla.0,
            futex_rla_len,
            blk_sigset: Some(thread.sigmask()?),
            signals_p: Some(collect_pending(
                tid,
                SignalQueue::Private,
                group_stop(task),
            )?),
            comm: Some(String::from_utf8_lossy(&status.name).into_owned()),
            rseq_entry: Some(rseq.entry.clone()),
            cg_set: Some(cg_set),
            ..ThreadCoreEntry::default()
        };
        collect_scheduling(tid, &mut thread_core)?;
        if let (Some(ip), Some(info)) = (rseq.abort_ip, core.thread_info.as_mut()) {
            info.gpregs.ip = ip;
        }
        core.thread_core = Some(thread_core);
        Ok(ThreadDraft {
            tid,
            number: pids.number(tid),
            core,
            status,
            label: texts.label,
            rseq,
        })
    })();
    Ok(collected)
}

fn group_stop(task: &FrozenTask) -> GroupStop {
    match task.state {
        TaskState::Stopped(_) => GroupStop::Yes,
        _ => GroupStop::No,
    }
}

/// The part of the leader's core that is about the whole process, as far as it can be seen.
fn task_core(
    task: &FrozenTask,
    leader: &ThreadDraft,
    owners: &OwnerMap,
) -> Result<TaskCoreEntry, CollectError> {
    let proc = &task.proc;
    let optional = |name| match proc.number(name) {
        Err(error) if error.is_gone() => Ok(None),
        other => other.map(Some),
    };
    let thread_core = leader.core.thread_core.as_ref();
    Ok(TaskCoreEntry {
        task_state: state_number(task.state),
        exit_code: 0,
        personality: encode_personality(proc.hex_number("personality")?),
        flags: task.stat.flags,
        blk_sigset: thread_core.and_then(|core| core.blk_sigset).unwrap_or(0),
        comm: String::from_utf8_lossy(&task.stat.comm).into_owned(),
        signals_s: Some(collect_pending(
            task.pid,
            SignalQueue::Shared,
            group_stop(task),
        )?),
        // Unset is all bits set.
        loginuid: optional("loginuid")?.map(|uid| match uid as u32 {
            u32::MAX => u32::MAX,
            uid => owners.uid_inside(uid),
        }),
        oom_score_adj: optional("oom_score_adj")?.map(|score| score as i32),
        stop_signo: match task.state {
            TaskState::Stopped(signal) => Some(signal.cast_unsigned()),
            _ => None,
        },
        ..TaskCoreEntry::default()
    })
}

fn dead_core(task: &FrozenTask) -> CoreEntry {
    let tc = TaskCoreEntry {
        task_state: state_number(TaskState::Dead),
        exit_code: task.stat.exit_code,
        comm: String::from_utf8_lossy(&task.stat.comm).into_owned(),
        ..TaskCoreEntry::default()
    };
    CoreEntry {
        mtype: CoreEntryMarch::X8664 as i32,
        tc: Some(tc),
        ..CoreEntry::default()
    }
}

/// The task's line in `pstree.img`.
pub fn tree_entry(
    task: &FrozenTask,
    (pids, namespaces): (&PidView, &TreeNamespaces),
) -> Result<PstreeEntry, CollectError> {
    let number = |pid: HostPid| pids.number(pid);
    let tids: Vec<HostPid> = task.threads.iter().map(Stopped::pid).collect();
    let threads: Vec<u32> = tids.iter().copied().map(number).collect();
    let mut entry = PstreeEntry {
        pid: number(task.pid),
        ppid: task.parent.map_or(0, number),
        pgid: number(task.stat.pgid),
        sid: number(task.stat.sid),
        // A zombie has its main thread still.
        threads: if threads.is_empty() {
            vec![number(task.pid)]
        } else {
            threads
        },
        ..PstreeEntry::default()
    };
    nested::describe((&task.proc, &tids), (pids, namespaces), &mut entry)?;
    Ok(entry)
}

/// Credentials of a thread, once its securebits are known.
pub fn credentials(draft: &ThreadDraft, securebits: u32, owners: &OwnerMap) -> CredsEntry {
    credentials_entry((&draft.status, &draft.label), securebits, owners)
}

/// Timers of a task.
pub fn timers(
    [real, virt, prof]: [floe_image::messages::ItimerEntry; 3],
    posix: Vec<floe_image::messages::PosixTimerEntry>,
) -> TaskTimersEntry {
    TaskTimersEntry {
        real,
        virt,
        prof,
        posix,
    }
}
