//! When the tasks of a tree get their security labels.
//!
//! A profile of AppArmor's comes as the very last thing, call by call: it may forbid all that a restore does, and
//! even that a task signals itself, which is how the executor reports its end. SELinux changes a process with
//! threads only within narrow bounds, so there the leader changes before its threads are made, which inherit it.

use std::collections::BTreeMap;

use floe_image::ImageKind;
use floe_image::messages::{ApparmorEntry, CoreEntry};
use floe_inject::{Arg, Program, Stopped};
use floe_kernel::security::SecurityModule;
use floe_options::RestoreOptions;
use floe_plan::Handle;
use floe_resources::restore::{ExecuteError, PlanError, Planner, TreeImages, World};
use floe_resources::task::label::change::{hand_over_proc, our_proc, program};
use floe_resources::task::label::policy::Policy;
use floe_resources::task::label::{Label, Labels};

use crate::tree::is_zombie;

/// The labels that a tree is to have.
#[derive(Debug)]
pub struct TreeLabels {
    labels: Labels,
    policy: Policy,
    /// By task and thread; only where something is to be written.
    wanted: BTreeMap<u32, BTreeMap<u32, Label>>,
}

impl TreeLabels {
    /// Decides, and refuses what cannot be had here.
    pub fn new(images: &TreeImages, options: &RestoreOptions) -> Result<Self, PlanError> {
        let labels = Labels::new(&images.inventory, options.lsm_profile.as_ref())?;
        if options.lsm_mount_context.is_some() && labels.here != SecurityModule::SeLinux {
            return Err(PlanError::Unsupported {
                object: "A context for mounts (--lsm-mount-context), on a machine without SELinux,"
                    .into(),
                remedy: "leave it out: no mount has a context there",
            });
        }
        let (mut saved, mut all) = (Vec::new(), Vec::new());
        let mut wanted: BTreeMap<u32, BTreeMap<u32, Label>> = BTreeMap::new();
        for task in images
            .tasks
            .iter()
            .filter(|task| !is_zombie(images, task.pid()))
        {
            let others = task.threads.iter().map(|(tid, core)| (*tid, core));
            for (tid, core) in others.chain([(task.pid(), &task.core)]) {
                let Some(creds) = credentials(core) else {
                    continue;
                };
                let label = labels.wanted(creds)?;
                saved.push(Label::of_entry(creds));
                all.push(label.clone());
                if !program((&labels, &label, labels.born()), (0, tid)).is_empty() {
                    wanted.entry(task.pid()).or_default().insert(tid, label);
                }
            }
        }
        let image: Option<ApparmorEntry> = images.dir.read_optional(ImageKind::Apparmor, 0)?;
        let names = all.iter().filter_map(|label| label.current.as_deref());
        let policy = Policy::plan(image.unwrap_or_default(), names)?;
        labels.check(&all, &policy)?;
        labels.report(&saved, &all);
        Ok(TreeLabels {
            labels,
            policy,
            wanted,
        })
    }

    /// Adds the steps that come before the last one.
    pub fn plan(&self, planner: &mut Planner<'_>) {
        if !self.policy.is_empty() {
            let policy = self.policy.clone();
            let made = [Handle::Object("AppArmor policy", 0)];
            planner.step_at_home("load AppArmor policy", (&[], &made), move |world| {
                policy.execute(world)
            });
        }
        for (pid, early) in self.early() {
            let (labels, wanted) = (self.labels.clone(), early.clone());
            let needs = [
                Handle::Memory(pid),
                Handle::Descriptors(pid),
                crate::state::shared(pid),
            ];
            let name = "security label, before threads";
            planner.task_step(pid, name, (&needs, &[early_label(pid)]), move |world| {
                hand_over_proc(world, pid)?;
                let proc = our_proc(world, pid);
                let current = Label {
                    current: wanted.current,
                    ..Label::default()
                };
                let program = program((&labels, &current, labels.born()), (proc, pid));
                let puppet = world.puppet(pid)?;
                Ok(puppet.arena.step(&mut puppet.leader, &program)?)
            });
        }
    }

    /// What the making of threads waits for.
    pub fn before_threads(&self, pid: u32) -> Option<Handle> {
        let is_early = self.early().any(|(early, _)| early == pid);
        is_early.then(|| early_label(pid))
    }

    /// The leaders that change before they have threads.
    fn early(&self) -> impl Iterator<Item = (u32, &Label)> {
        let all = self.wanted.iter();
        let threaded = all.filter(|(_, threads)| {
            self.labels.here == SecurityModule::SeLinux && threads.len() > 1
        });
        threaded.filter_map(|(pid, threads)| Some((*pid, threads.get(pid)?)))
    }

    /// Gives tasks what they need for [`TreeLabels::execute`], while they still have all rights.
    pub fn prepare(&self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        let mut tasks = self.wanted.keys();
        tasks.try_for_each(|pid| hand_over_proc(world, *pid))
    }

    /// Gives all threads their labels.
    pub fn execute(&self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        for (pid, threads) in &self.wanted {
            let proc = our_proc(world, *pid);
            let early = self.early().find(|(early, _)| early == pid);
            let born = early.and_then(|(_, label)| label.current.as_deref());
            let born = born.or(self.labels.born());
            let puppet = world.puppet(*pid)?;
            for (tid, label) in threads {
                let program = program((&self.labels, label, born), (proc, *tid));
                if let Some(thread) = puppet.threads.get_mut(tid) {
                    puppet.arena.step(thread, &program)?;
                }
            }
            let mut last = match threads.get(pid) {
                Some(label) => program((&self.labels, label, born), (proc, *pid)),
                None => Program::new(),
            };
            last.call("close of our /proc", libc::SYS_close, &[Arg::from(proc)]);
            let leader: &mut Stopped = &mut puppet.leader;
            puppet.arena.step(leader, &last)?;
        }
        Ok(())
    }
}

fn early_label(pid: u32) -> Handle {
    Handle::Object("security label", u64::from(pid))
}

fn credentials(core: &CoreEntry) -> Option<&floe_image::messages::CredsEntry> {
    core.thread_core.as_ref()?.creds.as_ref()
}
