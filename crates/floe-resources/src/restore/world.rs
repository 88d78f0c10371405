//! What exists so far while a plan is carried out.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;

use floe_inject::{Arena, Arg, Outcome, Program, Stopped};
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::janitor::{Janitor, NameKind};
use floe_kernel::namespace::{Namespace, NsIdentity, NsKind};
use floe_kernel::pidfd::Pidfd;
use floe_options::RestoreOptions;

use super::courier::Courier;
use super::namespaces::Namespaces;
use super::{Attempt, ExecuteError, TreeImages};
use crate::namespace::has_own_pids;

/// A task that is being restored: stopped, in the executor.
#[derive(Debug)]
pub struct Puppet {
    /// Its executor; tasks that share memory have copies of the same arena.
    pub arena: Arena,
    /// Its leader.
    pub leader: Stopped,
    /// Its other threads by tid in the images.
    pub threads: BTreeMap<u32, Stopped>,
}

impl Puppet {
    /// Runs a program in the leader; an empty one is not run.
    pub fn run(&mut self, program: &Program) -> Result<Option<Outcome>, ExecuteError> {
        if program.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.arena.run(&mut self.leader, program)?))
    }

    /// The task's pid as the coordinator sees it.
    pub fn pid(&self) -> HostPid {
        self.leader.pid()
    }
}

/// Takes back something that was made outside of the tree, such as a file's name.
pub type Undo = Box<dyn FnOnce()>;

/// The state of a restore in progress.
pub struct World<'i> {
    /// What is being restored.
    pub images: &'i TreeImages,
    /// How.
    pub options: &'i RestoreOptions,
    /// What the kernel can do.
    pub features: &'i KernelFeatures,
    /// The tasks made so far, by pid in the images.
    pub puppets: BTreeMap<u32, Puppet>,
    files: HashMap<u32, OwnedFd>,
    segments: HashMap<u64, OwnedFd>,
    /// Files that tasks do not inherit: opened when the first task existed already.
    late: HashSet<u32>,
    born: bool,
    numbers: Range<RawFd>,
    state: HashMap<TypeId, Box<dyn Any>>,
    undo: Vec<Undo>,
    /// How tasks get what they cannot fetch by themselves.
    courier: Option<Courier>,
    /// One for each mount namespace: it removes names as the coordinator gave them there.
    janitors: HashMap<NsIdentity, Rc<Janitor>>,
    before_release: Vec<Undo>,
    tidy: Vec<Undo>,
    namespaces: Namespaces,
    /// What a task has still to do, with what it does next.
    deferred: Option<(u32, Program)>,
}

impl<'i> World<'i> {
    /// A world without tasks and files; files are kept at descriptors among `numbers`, none of
    /// which any task has.
    pub fn new(
        images: &'i TreeImages,
        options: &'i RestoreOptions,
        features: &'i KernelFeatures,
        numbers: Range<RawFd>,
    ) -> Self {
        World {
            images,
            options,
            features,
            puppets: BTreeMap::new(),
            files: HashMap::new(),
            segments: HashMap::new(),
            late: HashSet::new(),
            born: false,
            numbers,
            state: HashMap::new(),
            undo: Vec::new(),
            courier: None,
            janitors: HashMap::new(),
            before_release: Vec::new(),
            tidy: Vec::new(),
            namespaces: Namespaces::default(),
            deferred: None,
        }
    }

    /// The lowest number at which files are kept.
    pub(super) fn first_fd(&self) -> RawFd {
        self.numbers.start
    }

    /// Keeps an open file description of the images.
    pub fn keep_file(&mut self, id: u32, file: OwnedFd) -> Result<(), ExecuteError> {
        let high = self.lift(file)?;
        self.files.insert(id, high);
        if self.born {
            self.late.insert(id);
        }
        Ok(())
    }

    /// Moves a descriptor to a number that no task uses.
    pub fn lift(&self, file: OwnedFd) -> Result<OwnedFd, ExecuteError> {
        if self.numbers.contains(&file.as_raw_fd()) {
            return Ok(file);
        }
        let lifted = rustix::io::fcntl_dupfd_cloexec(&file, self.numbers.start);
        lifted
            .and_then(|lifted| {
                let free = self.numbers.contains(&lifted.as_raw_fd());
                free.then_some(lifted).ok_or(rustix::io::Errno::MFILE)
            })
            .during("Moving a descriptor between", || {
                format!("{:?}", self.numbers)
            })
    }

    /// The coordinator's descriptor of a file that a step before has opened.
    pub fn file(&self, id: u32) -> Result<BorrowedFd<'_>, ExecuteError> {
        let file = self.files.get(&id).map(AsFd::as_fd);
        file.ok_or_else(|| ExecuteError::Failed {
            action: "Finding file",
            object: format!("{id:#x}"),
            source: std::io::Error::from_raw_os_error(libc::EBADF),
        })
    }

    /// Keeps a shared memory segment of the images.
    pub fn keep_segment(&mut self, id: u64, segment: OwnedFd) -> Result<(), ExecuteError> {
        let high = self.lift(segment)?;
        self.segments.insert(id, high);
        Ok(())
    }

    /// The descriptor of a segment, which every task inherits.
    pub fn segment(&self, id: u64) -> Option<RawFd> {
        self.segments.get(&id).map(AsRawFd::as_raw_fd)
    }

    /// Whether a file is open already.
    pub fn has_file(&self, id: u32) -> bool {
        self.files.contains_key(&id)
    }

    /// From now on files are not inherited any more: the first task exists soon.
    pub fn end_of_inheritance(&mut self) -> Result<(), ExecuteError> {
        self.born = true;
        // Tasks in a pid namespace of their own do not see the coordinator, those in a user namespace have no
        // rights over it.
        let images = self.images;
        if has_own_pids(images) || !images.nested.is_empty() || !images.users.is_empty() {
            self.courier = Some(Courier::new(self)?);
        }
        Ok(())
    }

    /// A descriptor of ours that tasks need until their release.
    pub fn kept_in_tasks(&self) -> Option<RawFd> {
        self.courier.as_ref().map(Courier::number_in_task)
    }

    /// The pid by which the coordinator knows a task or thread of the images.
    pub fn host_pid(&self, number: u32) -> Option<HostPid> {
        if !has_own_pids(self.images) {
            return Some(HostPid(number.cast_signed()));
        }
        if let Some(puppet) = self.puppets.get(&number) {
            return Some(puppet.pid());
        }
        let mut puppets = self.puppets.values();
        puppets.find_map(|puppet| puppet.threads.get(&number).map(Stopped::pid))
    }

    /// The number by which a task finds a file before its own descriptors are in place.
    pub fn number_in_task(&mut self, pid: u32, id: u32) -> Result<RawFd, ExecuteError> {
        let number = self.file(id)?.as_raw_fd();
        if self.late.contains(&id) {
            self.hand_over(pid, number)
        } else {
            Ok(number)
        }
    }

    /// Runs a program in the leader of a task, behind what was deferred.
    pub fn run(&mut self, pid: u32, program: &Program) -> Result<Option<Outcome>, ExecuteError> {
        if program.is_empty() {
            return Ok(None);
        }
        let first = self.take_deferred(pid, program.arena_bytes())?;
        let puppet = self.puppet(pid)?;
        if first.is_empty() {
            return puppet.run(program);
        }
        let mut both = first.clone();
        both.append(program);
        let outcome = puppet.run(&both)?;
        Ok(outcome.map(|outcome| outcome.behind(&first)))
    }

    /// Has the leader of a task run a program before, or with, whatever it does next: each program that
    /// runs for itself is a stop of the task. Nobody but the task may notice before the end of its steps.
    pub fn defer(&mut self, pid: u32, program: Program) -> Result<(), ExecuteError> {
        if program.is_empty() {
            return Ok(());
        }
        let mut all = self.take_deferred(pid, program.arena_bytes())?;
        all.append(&program);
        self.deferred = Some((pid, all));
        Ok(())
    }

    /// What a task has still to do, for whoever runs it with a program that takes `bytes` in the arena. It is
    /// run here where both do not fit, and where it is another task's.
    pub fn take_deferred(&mut self, pid: u32, bytes: usize) -> Result<Program, ExecuteError> {
        let fits = |puppet: &Puppet, program: &Program| {
            program.arena_bytes() + bytes <= puppet.arena.capacity()
        };
        match self.deferred.take() {
            None => Ok(Program::new()),
            Some((of, program))
                if of == pid && self.puppets.get(&pid).is_some_and(|it| fits(it, &program)) =>
            {
                Ok(program)
            }
            other => {
                self.deferred = other;
                self.run_deferred().map(|()| Program::new())
            }
        }
    }

    /// Runs what was deferred.
    pub fn run_deferred(&mut self) -> Result<(), ExecuteError> {
        match self.deferred.take() {
            Some((pid, program)) => self.puppet(pid)?.run(&program).map(drop),
            None => Ok(()),
        }
    }

    /// A task that a step before has made, with nothing deferred.
    pub fn puppet(&mut self, pid: u32) -> Result<&mut Puppet, ExecuteError> {
        self.run_deferred()?;
        self.puppets
            .get_mut(&pid)
            .ok_or_else(|| ExecuteError::Failed {
                action: "Finding task",
                object: pid.to_string(),
                source: std::io::Error::from_raw_os_error(libc::ESRCH),
            })
    }

    /// Hands a descriptor of the coordinator to a task; returns its number there.
    pub fn hand_over(&mut self, pid: u32, file: RawFd) -> Result<RawFd, ExecuteError> {
        if let Some(courier) = self.courier.take() {
            let handed = courier.hand_over(self, pid, file);
            self.courier = Some(courier);
            return handed;
        }
        let coordinator = rustix::process::getpid().as_raw_nonzero().get();
        let mut program = Program::new();
        let pidfd = program.call(
            "pidfd_open of the coordinator",
            libc::SYS_pidfd_open,
            &[Arg::from(coordinator), Arg::from(0)],
        );
        let args = [Arg::from(pidfd), Arg::from(file), Arg::from(0)];
        let copy = program.call(
            "pidfd_getfd from the coordinator",
            libc::SYS_pidfd_getfd,
            &args,
        );
        program.call("close of the pidfd", libc::SYS_close, &[Arg::from(pidfd)]);
        // Above everything that the task will have: its descriptors are not in place yet.
        let args = [
            Arg::from(copy),
            Arg::from(libc::F_DUPFD),
            Arg::from(self.numbers.start),
        ];
        let high = program.call("fcntl(F_DUPFD)", libc::SYS_fcntl, &args);
        program.call("close", libc::SYS_close, &[Arg::from(copy)]);
        let outcome = self.run(pid, &program)?.expect("the program has calls");
        Ok(outcome.result(high) as RawFd)
    }

    /// Our own descriptor of a file that a task has open.
    pub fn fetch(&mut self, pid: u32, fd: TaskFd) -> Result<OwnedFd, ExecuteError> {
        let host = self.puppet(pid)?.pid();
        let file = Pidfd::open(host).and_then(|pidfd| pidfd.duplicate_fd(fd));
        self.lift(file.during("Fetching from a task", || format!("descriptor {fd}"))?)
    }

    /// The namespaces made so far.
    pub fn namespaces(&mut self) -> &mut Namespaces {
        &mut self.namespaces
    }

    /// Takes the coordinator into the namespaces of the root task that can be visited.
    pub(crate) fn go_inside(&mut self) -> Result<(), ExecuteError> {
        self.namespaces.go_inside()
    }

    /// Brings the coordinator back to its own namespaces.
    pub fn go_home(&mut self) {
        self.namespaces.go_home();
    }

    /// Does something in the namespaces of the root task that can be visited.
    pub fn inside<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, ExecuteError>,
    ) -> Result<T, ExecuteError> {
        self.go_inside()?;
        let done = work(self);
        self.go_home();
        done
    }

    /// Does something while the coordinator is in a namespace of the tree.
    pub fn in_namespace<T>(
        &mut self,
        id: u32,
        work: impl FnOnce(&mut Self) -> Result<T, ExecuteError>,
    ) -> Result<T, ExecuteError> {
        self.in_namespaces(&[id], work)
    }

    /// As [`World::in_namespace`], in several of different kinds at once.
    pub fn in_namespaces<T>(
        &mut self,
        ids: &[u32],
        work: impl FnOnce(&mut Self) -> Result<T, ExecuteError>,
    ) -> Result<T, ExecuteError> {
        self.go_home();
        let (home, inside) = self.namespaces.way_to(ids)?;
        let _visit = home
            .visit(inside.iter().map(|namespace| &**namespace))
            .during("Entering namespaces", || format!("{ids:?}"))?;
        work(self)
    }

    /// A value that lives as long as the restore, made with the first call. Each kind uses a type of
    /// its own.
    pub fn state<T: Any + Default>(&mut self) -> &mut T {
        let value = self
            .state
            .entry(TypeId::of::<T>())
            .or_insert_with(|| Box::new(T::default()));
        value.downcast_mut().expect("the key is the type's own id")
    }

    /// Has work done later in the namespaces where the coordinator is now.
    fn at_this_place(&mut self, work: impl FnOnce() + 'static) -> Undo {
        match self.namespaces.road_back() {
            None => Box::new(work),
            Some((home, inside)) => {
                Box::new(
                    move || match home.visit(inside.iter().map(|namespace| &**namespace)) {
                        Ok(_visit) => work(),
                        Err(error) => {
                            tracing::warn!(%error, "the tree's namespaces cannot be entered")
                        }
                    },
                )
            }
        }
    }

    /// Remembers how to take back what a step has made outside of the tree, should a later one fail.
    pub fn on_failure(&mut self, undo: impl FnOnce() + 'static) {
        let undo = self.at_this_place(undo);
        self.undo.push(undo);
    }

    /// Notes a name that a step has made: it goes when a later step fails, or when we are killed.
    pub fn made_name(&mut self, kind: NameKind, path: PathBuf) {
        if let Some(janitor) = self.janitor()
            && let Err(error) = janitor.note(kind, &path)
        {
            tracing::warn!(%error, path = %path.display(), "the janitor does not know of a name");
        }
        self.on_failure(move || {
            if let Err(error) = kind.remove(&path) {
                tracing::warn!(%error, path = %path.display(), "a name of the failed restore stays");
            }
        });
    }

    /// The process that removes names should we be killed, in the mount namespace where the coordinator
    /// is now; started with the first call.
    pub fn janitor(&mut self) -> Option<Rc<Janitor>> {
        let started = Namespace::own(NsKind::Mnt).and_then(|place| {
            if let Some(janitor) = self.janitors.get(&place.identity()) {
                return Ok(Rc::clone(janitor));
            }
            let janitor = Rc::new(Janitor::start()?);
            self.janitors.insert(place.identity(), Rc::clone(&janitor));
            Ok(janitor)
        });
        match started {
            Ok(janitor) => Some(janitor),
            Err(error) => {
                tracing::warn!(%error, "names would stay if this process were killed");
                None
            }
        }
    }

    /// Remembers what is to be done when everything is in place, while no task runs yet.
    pub fn before_release(&mut self, work: impl FnOnce() + 'static) {
        let work = self.at_this_place(work);
        self.before_release.push(work);
    }

    /// Does what was to be done before the release.
    pub fn prepare_release(&mut self) {
        self.go_home();
        for work in self.before_release.drain(..) {
            work();
        }
    }

    /// Remembers what is to go once all tasks run: what a second attempt would need, should this one fail.
    pub fn on_success(&mut self, tidy: impl FnOnce() + 'static) {
        let tidy = self.at_this_place(tidy);
        self.tidy.push(tidy);
    }

    /// Clears away what only the restore needed.
    pub fn tidy_up(&mut self) {
        self.go_home();
        for tidy in self.tidy.drain(..) {
            tidy();
        }
    }

    /// Gives up what was for later: processes that were kept until then end.
    pub fn give_up(&mut self) {
        self.before_release.clear();
        self.tidy.clear();
    }

    /// Takes back everything outside of the tree, last made first.
    pub fn take_back(&mut self) {
        self.go_home();
        while let Some(undo) = self.undo.pop() {
            undo();
        }
    }
}
