//! Which kernel objects tasks share: `ids-PID.img`.

use std::cmp::Ordering;

use floe_image::messages::TaskKobjIdsEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::kcmp::{TaskResource, compare_tasks};
use floe_kernel::proc::ProcDir;
use floe_resources::fd::namespace::KINDS;
use floe_resources::{CollectError, Collector, Obstacle};

/// Those that only children will be in; once there are children they differ from ours as well.
const OF_CHILDREN: [&str; 2] = ["pid_for_children", "time_for_children"];

/// Where [`KINDS`] has the cgroup namespace.
const CGROUP: usize = 6;
/// The number of a cgroup namespace that the tree has for its own.
const TREE_CGROUPS: u32 = 9;

/// Numbers shared objects.
#[derive(Debug)]
pub struct Kinship {
    memory: Numbers,
    files: Numbers,
    fs: Numbers,
    signal_handlers: Numbers,
    /// Our own namespaces, which those of the tasks must be.
    own: Vec<Vec<u8>>,
    /// The cgroup namespace of the root, which may be the tree's own.
    tree_cgroups: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Numbers {
    resource: TaskResource,
    /// In the order of kcmp.
    known: Vec<(HostPid, u32)>,
}

impl Numbers {
    fn new(resource: TaskResource) -> Self {
        Numbers {
            resource,
            known: Vec::new(),
        }
    }

    /// The object's number, and the task that it was seen with first if there is one.
    fn of(&mut self, pid: HostPid) -> Result<(u32, Option<HostPid>), CollectError> {
        let (mut low, mut high) = (0, self.known.len());
        while low < high {
            let middle = low.midpoint(high);
            let (other, number) = self.known[middle];
            let order =
                compare_tasks(other, pid, self.resource).map_err(|source| CollectError::Task {
                    pid,
                    action: "Comparing kernel objects",
                    source,
                })?;
            match order {
                Ordering::Equal => return Ok((number, Some(other))),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        let number = self.known.len() as u32 + 1;
        self.known.insert(low, (pid, number));
        Ok((number, None))
    }
}

/// What a task shares.
#[derive(Debug)]
pub struct Identity {
    pub ids: TaskKobjIdsEntry,
    /// Whether no earlier task has the same table of descriptors.
    pub owns_files: bool,
}

impl Kinship {
    /// Begins with our own namespaces.
    pub fn new() -> Result<Self, CollectError> {
        let own = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
        Ok(Kinship {
            memory: Numbers::new(TaskResource::Memory),
            files: Numbers::new(TaskResource::Files),
            fs: Numbers::new(TaskResource::Fs),
            signal_handlers: Numbers::new(TaskResource::SignalHandlers),
            own: namespaces(&own)?,
            tree_cgroups: None,
        })
    }

    /// Whether the tree is in a cgroup namespace of its own.
    pub fn has_own_cgroups(&self) -> bool {
        let tree = self.tree_cgroups.as_ref();
        tree.is_some_and(|tree| *tree != self.own[CGROUP])
    }

    /// Numbers what a task shares. Sharing that restore cannot rebuild becomes an obstacle.
    pub fn identify(
        &mut self,
        proc: &ProcDir,
        collector: &mut Collector<'_>,
    ) -> Result<Identity, CollectError> {
        let pid = proc.pid();
        let mut refuse = |object: String, remedy: &str| {
            collector.obstacle(Obstacle {
                pid,
                object,
                remedy: remedy.to_string(),
            });
        };
        let (vm_id, vm_shared) = self.memory.of(pid)?;
        let (files_id, files_shared) = self.files.of(pid)?;
        let (fs_id, fs_shared) = self.fs.of(pid)?;
        let (sighand_id, handlers_shared) = self.signal_handlers.of(pid)?;
        for (what, shared) in [
            ("memory", vm_shared),
            ("working directory", fs_shared),
            ("signal handlers", handlers_shared),
        ] {
            if let Some(other) = shared {
                refuse(
                    format!("{what} shared with process {other}"),
                    "only threads of one process may share this",
                );
            }
        }
        let found = namespaces(proc)?;
        let cgroups = found[CGROUP].clone();
        let tree_cgroups = self.tree_cgroups.get_or_insert_with(|| cgroups.clone());
        if *tree_cgroups != cgroups {
            refuse(
                "a cgroup namespace that is not the root task's".to_string(),
                "only the whole tree may be in one of its own",
            );
        }
        let own_cgroups = self.own[CGROUP] == cgroups;
        let names = KINDS.iter().map(|kind| kind.name).chain(OF_CHILDREN);
        let differing = names
            .zip(found.iter().zip(&self.own))
            .filter(|(name, (found, own))| found != own && *name != KINDS[CGROUP].name);
        for (name, _) in differing {
            refuse(
                format!("a {name} namespace of its own"),
                "namespaces are not supported yet",
            );
        }
        let ids = TaskKobjIdsEntry {
            vm_id,
            files_id,
            fs_id,
            sighand_id,
            cgroup_ns_id: if own_cgroups {
                host_namespaces().cgroup_ns_id
            } else {
                Some(TREE_CGROUPS)
            },
            ..host_namespaces()
        };
        Ok(Identity {
            ids,
            owns_files: files_shared.is_none(),
        })
    }
}

/// The ids of the coordinator itself, for the inventory: restore sees by them that no namespace was left.
pub fn host_namespaces() -> TaskKobjIdsEntry {
    let number = |wanted: &str| {
        let kind = KINDS.iter().find(|kind| kind.name == wanted);
        kind.map(|kind| kind.number)
    };
    TaskKobjIdsEntry {
        vm_id: 0,
        files_id: 0,
        fs_id: 0,
        sighand_id: 0,
        pid_ns_id: number("pid"),
        net_ns_id: number("net"),
        ipc_ns_id: number("ipc"),
        uts_ns_id: number("uts"),
        mnt_ns_id: number("mnt"),
        user_ns_id: number("user"),
        cgroup_ns_id: number("cgroup"),
        time_ns_id: number("time"),
    }
}

/// The links of [`KINDS`], then those of [`OF_CHILDREN`].
fn namespaces(proc: &ProcDir) -> Result<Vec<Vec<u8>>, CollectError> {
    let names = KINDS.iter().map(|kind| kind.name).chain(OF_CHILDREN);
    let link = |name| match proc.read_link(&format!("ns/{name}")) {
        // A kernel without this namespace has one for all.
        Err(error) if error.is_gone() => Ok(Vec::new()),
        other => Ok(other?),
    };
    names.map(link).collect()
}
