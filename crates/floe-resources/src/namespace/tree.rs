//! The namespaces of a tree that is dumped.

use std::collections::HashMap;
use std::rc::Rc;

use floe_image::messages::TaskKobjIdsEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Home, Namespace, NsIdentity, NsKind, Visit};
use floe_kernel::proc::ProcDir;

use super::ids::{self, FIRST_OF_TREE, host_number};
use super::users;
use crate::collect::CollectError;

/// A namespace that tasks of the tree are in, and the coordinator is not.
#[derive(Debug)]
pub struct TreeNamespace {
    /// Its number in the images.
    pub id: u32,
    /// A handle on it.
    pub namespace: Namespace,
    /// A task that is in it; of a user namespace that only others lie in, one of theirs.
    pub member: HostPid,
    /// Whether the root task is in it.
    pub of_root: bool,
}

impl TreeNamespace {
    /// What kind it is.
    pub fn kind(&self) -> NsKind {
        self.namespace.kind()
    }
}

/// The namespaces of a tree, and the way to them.
#[derive(Debug)]
pub struct TreeNamespaces {
    home: Rc<Home>,
    root: Option<HostPid>,
    root_is_in: HashMap<NsKind, NsIdentity>,
    own: HashMap<NsKind, NsIdentity>,
    known: Vec<Rc<TreeNamespace>>,
    /// What was found of each task: stopped, it stays there.
    members: HashMap<HostPid, HashMap<NsKind, NsIdentity>>,
}

impl TreeNamespaces {
    /// Begins with none; the calling thread is the one that visits.
    pub fn new() -> Result<Self, CollectError> {
        let home = Home::here().map_err(|source| CollectError::System {
            action: "Opening our own namespaces".to_string(),
            source,
        })?;
        let ourselves = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
        let mut own = HashMap::new();
        for kind in NsKind::ALL {
            own.extend(identity(&ourselves, kind)?.map(|identity| (kind, identity)));
        }
        Ok(TreeNamespaces {
            home: Rc::new(home),
            root: None,
            root_is_in: HashMap::new(),
            own,
            known: Vec::new(),
            members: HashMap::new(),
        })
    }

    /// Our own place.
    pub fn home(&self) -> &Rc<Home> {
        &self.home
    }

    /// All of them, in the order of their numbers.
    pub fn all(&self) -> &[Rc<TreeNamespace>] {
        &self.known
    }

    /// The root task's own namespace of a kind, where it is not ours.
    pub fn of_root(&self, kind: NsKind) -> Option<&Rc<TreeNamespace>> {
        self.known
            .iter()
            .find(|known| known.of_root && known.kind() == kind)
    }

    /// The one of these that has this identity.
    pub fn find(&self, kind: NsKind, identity: NsIdentity) -> Option<&Rc<TreeNamespace>> {
        self.known
            .iter()
            .find(|known| known.kind() == kind && known.namespace.identity() == identity)
    }

    /// The one with this number.
    pub fn with_id(&self, id: u32) -> Option<&Rc<TreeNamespace>> {
        self.known.iter().find(|known| known.id == id)
    }

    /// Which namespace of a kind the root task is in.
    pub(crate) fn root_identity(&self, kind: NsKind) -> Option<NsIdentity> {
        self.root_is_in.get(&kind).copied()
    }

    /// The number of a namespace in the images: one of the tree's, or our own; `None` for others.
    pub fn number(&self, kind: NsKind, identity: NsIdentity) -> Option<u32> {
        if self.own.get(&kind) == Some(&identity) {
            return Some(host_number(kind));
        }
        self.find(kind, identity).map(|known| known.id)
    }

    /// Notes the namespaces of a living task; the root comes first.
    pub fn learn(&mut self, task: &ProcDir) -> Result<(), CollectError> {
        let member = task.pid();
        let of_root = *self.root.get_or_insert(member) == member;
        for kind in NsKind::ALL {
            let Some(found) = identity(task, kind)? else {
                continue;
            };
            self.members.entry(member).or_default().insert(kind, found);
            if of_root {
                self.root_is_in.insert(kind, found);
            }
            self.learn_one(kind, found, (member, of_root))?;
        }
        Ok(())
    }

    /// Notes the pid namespace of a zombie; of others it has left all but its user namespace, which is not kept.
    pub fn learn_zombie(&mut self, zombie: &ProcDir) -> Result<(), CollectError> {
        match identity(zombie, NsKind::Pid)? {
            Some(found) => self.learn_one(NsKind::Pid, found, (zombie.pid(), false)),
            None => Ok(()),
        }
    }

    fn learn_one(
        &mut self,
        kind: NsKind,
        found: NsIdentity,
        (member, of_root): (HostPid, bool),
    ) -> Result<(), CollectError> {
        if self.number(kind, found).is_some() {
            return Ok(());
        }
        let namespace = Namespace::of_task(member, kind);
        let namespace = namespace.map_err(|source| CollectError::Task {
            pid: member,
            action: "Opening a namespace",
            source,
        })?;
        let mut around = self.add(namespace, (member, of_root));
        // User namespaces that nobody is in any more may still own others, or lie between them and us.
        while let Some(namespace) =
            around.filter(|around| self.number(NsKind::User, around.identity()).is_none())
        {
            around = self.add(namespace, (member, false));
        }
        Ok(())
    }

    /// Returns the user namespace that owns it, or that is around it.
    fn add(
        &mut self,
        namespace: Namespace,
        (member, of_root): (HostPid, bool),
    ) -> Option<Namespace> {
        let around = users::around(&namespace);
        self.known.push(Rc::new(TreeNamespace {
            id: FIRST_OF_TREE + self.known.len() as u32,
            namespace,
            member,
            of_root,
        }));
        around
    }

    /// Which namespace a stopped task is in, asked once.
    pub(crate) fn identity(
        &self,
        task: &ProcDir,
        kind: NsKind,
    ) -> Result<Option<NsIdentity>, CollectError> {
        match self.members.get(&task.pid()) {
            Some(found) => Ok(found.get(&kind).copied()),
            None => identity(task, kind),
        }
    }

    /// The number of the pid namespace that a process is in.
    pub fn pid_namespace(&self, process: &ProcDir) -> Result<Option<u32>, CollectError> {
        let found = self.identity(process, NsKind::Pid)?;
        Ok(found.and_then(|found| self.number(NsKind::Pid, found)))
    }

    /// The number of the pid namespace that new children of a process will be in, where that is not its own:
    /// [`ids::UNBEGUN`] for one that has no process yet.
    pub fn pid_namespace_of_children(
        &self,
        process: &ProcDir,
    ) -> Result<Option<u32>, CollectError> {
        let of_children = identity_of(process, "pid_for_children")?;
        if of_children == self.identity(process, NsKind::Pid)? {
            return Ok(None);
        }
        Ok(match of_children {
            None => Some(ids::UNBEGUN),
            Some(found) => self.number(NsKind::Pid, found),
        })
    }

    /// Which namespaces a task is in; what does not concern namespaces is zero.
    pub fn ids(&self, task: &ProcDir) -> Result<TaskKobjIdsEntry, CollectError> {
        let mut entry = ids::of_host();
        for kind in NsKind::ALL {
            if let Some(found) = self.identity(task, kind)? {
                ids::set(&mut entry, kind, self.number(kind, found));
            }
        }
        Ok(entry)
    }

    /// Goes into some of them until the visit is dropped.
    pub fn visit(&self, namespaces: &[&TreeNamespace]) -> Result<Visit, CollectError> {
        let inside = namespaces.iter().map(|visited| &visited.namespace);
        self.home.visit(inside).map_err(|source| {
            let names: Vec<String> = namespaces.iter().map(|ns| ns.kind().to_string()).collect();
            CollectError::System {
                action: format!("Entering the {} namespace", names.join(" and ")),
                source,
            }
        })
    }
}

/// Which namespace a task is in; `None` on a kernel that has no such kind.
pub(super) fn identity(task: &ProcDir, kind: NsKind) -> Result<Option<NsIdentity>, CollectError> {
    identity_of(task, kind.name())
}

/// As [`identity`], for any name in `ns/`.
pub(super) fn identity_of(task: &ProcDir, name: &str) -> Result<Option<NsIdentity>, CollectError> {
    identity_at(task, &format!("ns/{name}"))
}

/// As [`identity`], of a link anywhere below `/proc/<pid>`.
pub(super) fn identity_at(task: &ProcDir, path: &str) -> Result<Option<NsIdentity>, CollectError> {
    match task.stat(path) {
        Ok(stat) => Ok(Some(NsIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
        })),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
