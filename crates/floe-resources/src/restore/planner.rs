//! Building the plan of a restore.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::collections::HashMap;
use std::os::fd::OwnedFd;

use floe_kernel::features::KernelFeatures;
use floe_options::RestoreOptions;
use floe_plan::{Actor, Coverage, EntryKey, Handle, Plan, PlanBuilder, Step};

use super::{ExecuteError, PlanError, TreeImages, World};
use crate::namespace::READY;
use crate::task::label::sockets::labelled;

/// What a step does when its turn comes.
pub type Op<'i> = Box<dyn FnOnce(&mut World<'i>) -> Result<(), ExecuteError> + 'i>;

/// Collects the steps of one restore.
pub struct Planner<'i> {
    /// What is to be restored.
    pub images: &'i TreeImages,
    /// How.
    pub options: &'i RestoreOptions,
    /// What the kernel can do.
    pub features: &'i KernelFeatures,
    builder: PlanBuilder<Op<'i>>,
    caches: HashMap<TypeId, Box<dyn Any>>,
    coverage: Coverage,
    /// Whether files are opened in namespaces that are made first.
    inside: bool,
    /// The label of sockets that the next steps make.
    socket_label: Option<String>,
}

impl<'i> Planner<'i> {
    /// A plan without steps.
    pub fn new(
        images: &'i TreeImages,
        options: &'i RestoreOptions,
        features: &'i KernelFeatures,
    ) -> Self {
        let mut coverage = Coverage::default();
        for id in images.files.keys() {
            coverage.expect(EntryKey {
                image: "files.img",
                id: u64::from(*id),
            });
        }
        Planner {
            images,
            options,
            features,
            builder: PlanBuilder::default(),
            caches: HashMap::new(),
            coverage,
            inside: false,
            socket_label: None,
        }
    }

    /// A value that lives as long as the planning, made with the first call: an image that many entries
    /// look into. Each kind uses a type of its own.
    pub fn try_cache<T: Any>(
        &mut self,
        make: impl FnOnce(&'i TreeImages) -> Result<T, PlanError>,
    ) -> Result<&mut T, PlanError> {
        use std::collections::hash_map::Entry;
        let value = match self.caches.entry(TypeId::of::<T>()) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(empty) => empty.insert(Box::new(make(self.images)?)),
        };
        Ok(value.downcast_mut().expect("the key is the type's own id"))
    }

    /// Notes that the plan takes care of an entry of an image.
    pub fn consume(&mut self, image: &'static str, id: u64) {
        self.coverage.consume(EntryKey { image, id });
    }

    /// From now on steps of the coordinator wait for the namespaces of the root task.
    pub fn work_inside(&mut self) {
        self.inside = true;
    }

    /// Adds a step of the coordinator. It is done in the mount, network, IPC and UTS namespaces of the
    /// root task: paths are the tree's ([`World::own_proc`] has our own `/proc`).
    pub fn step(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        (needs, makes): (&[Handle], &[Handle]),
        op: impl FnOnce(&mut World<'i>) -> Result<(), ExecuteError> + 'i,
    ) {
        if !self.inside {
            return self.step_at_home(name, (needs, makes), op);
        }
        let needs = [needs, &[READY]].concat();
        let inside: Op<'i> = Box::new(move |world| {
            world.go_inside()?;
            op(world)
        });
        self.add(Actor::Coordinator, name.into(), (&needs, makes), inside);
    }

    /// As [`Planner::step`], done where the coordinator comes from: it goes into namespaces by itself.
    pub fn step_at_home(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        handles: (&[Handle], &[Handle]),
        op: impl FnOnce(&mut World<'i>) -> Result<(), ExecuteError> + 'i,
    ) {
        let at_home: Op<'i> = Box::new(move |world| {
            world.go_home();
            op(world)
        });
        self.add(Actor::Coordinator, name.into(), handles, at_home);
    }

    /// Adds a step in which a task acts: its puppet exists, and what else `needs` lists.
    pub fn task_step(
        &mut self,
        pid: u32,
        name: impl Into<Cow<'static, str>>,
        (needs, makes): (&[Handle], &[Handle]),
        op: impl FnOnce(&mut World<'i>) -> Result<(), ExecuteError> + 'i,
    ) {
        let mut all = vec![Handle::Born(pid)];
        all.extend_from_slice(needs);
        let at_home: Op<'i> = Box::new(move |world| {
            world.go_home();
            op(world)
        });
        self.add(Actor::Task(pid), name.into(), (&all, makes), at_home);
    }

    fn add(
        &mut self,
        actor: Actor,
        name: Cow<'static, str>,
        (needs, makes): (&[Handle], &[Handle]),
        op: Op<'i>,
    ) {
        let op = match self.socket_label.clone() {
            Some(label) => labelled(label, op),
            None => op,
        };
        self.builder.add(Step {
            name,
            actor,
            needs: needs.to_vec(),
            makes: makes.to_vec(),
            op,
        });
    }

    /// Has the steps to come make sockets with this label.
    pub fn label_sockets(&mut self, label: Option<&str>) {
        self.socket_label = label.map(str::to_string);
    }

    /// Adds the step that opens file `id`. When `needs` names nothing that a task makes, tasks inherit
    /// the description; otherwise it is handed over to those that hold it.
    pub fn open(
        &mut self,
        id: u32,
        name: impl Into<Cow<'static, str>>,
        needs: &[Handle],
        op: impl FnOnce(&mut World<'i>) -> Result<OwnedFd, ExecuteError> + 'i,
    ) {
        self.consume("files.img", u64::from(id));
        self.step(name, (needs, &[Handle::File(id)]), move |world| {
            let file = op(world)?;
            world.keep_file(id, file)
        });
    }

    /// Files and segments that are open before the first task, so that all tasks inherit them.
    ///
    /// To be asked when all files have been planned.
    pub fn inherited(&self) -> Vec<Handle> {
        let wanted = |handle: &Handle| matches!(handle, Handle::File(_) | Handle::Segment(_));
        let late = self.builder.made_after(is_of_a_task);
        self.builder
            .made(|handle| wanted(handle) && !late.contains(handle))
    }

    /// Every handle of this shape that the steps so far make.
    pub fn made(&self, wanted: impl Fn(&Handle) -> bool) -> Vec<Handle> {
        self.builder.made(wanted)
    }

    /// Orders and verifies the plan.
    pub fn finish(self) -> Result<Plan<Op<'i>>, PlanError> {
        let mut faults: Vec<String> = Vec::new();
        for (entry, times) in self.coverage.faults() {
            faults.push(format!("{entry} is used {times} times instead of once"));
        }
        match self.builder.finish() {
            Ok(plan) if faults.is_empty() => Ok(plan),
            Ok(_) => Err(PlanError::Incoherent(faults)),
            Err(more) => {
                faults.extend(more.iter().map(ToString::to_string));
                Err(PlanError::Incoherent(faults))
            }
        }
    }
}

fn is_of_a_task(handle: &Handle) -> bool {
    matches!(
        handle,
        Handle::Born(_)
            | Handle::Memory(_)
            | Handle::Session(_)
            | Handle::Descriptors(_)
            | Handle::Threads(_)
            | Handle::Files
            | Handle::Tree
    )
}
