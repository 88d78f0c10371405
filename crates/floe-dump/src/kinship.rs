//! Which kernel objects tasks share: `ids-PID.img`.

use std::cmp::Ordering;

use floe_image::messages::TaskKobjIdsEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::kcmp::{TaskResource, compare_tasks};
use floe_kernel::proc::ProcDir;
use floe_resources::{CollectError, Collector, Obstacle};

/// Numbers shared objects.
#[derive(Debug)]
pub struct Kinship {
    memory: Numbers,
    files: Numbers,
    fs: Numbers,
    signal_handlers: Numbers,
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

impl Default for Kinship {
    fn default() -> Self {
        Kinship {
            memory: Numbers::new(TaskResource::Memory),
            files: Numbers::new(TaskResource::Files),
            fs: Numbers::new(TaskResource::Fs),
            signal_handlers: Numbers::new(TaskResource::SignalHandlers),
        }
    }
}

impl Kinship {
    /// Numbers what a task shares. Sharing that restore cannot rebuild becomes an obstacle.
    pub fn identify(
        &mut self,
        proc: &ProcDir,
        collector: &mut Collector<'_>,
    ) -> Result<Identity, CollectError> {
        let pid = proc.pid();
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
                collector.obstacle(Obstacle {
                    pid,
                    object: format!("{what} shared with process {other}"),
                    remedy: "only threads of one process may share this".to_string(),
                });
            }
        }
        let ids = TaskKobjIdsEntry {
            vm_id,
            files_id,
            fs_id,
            sighand_id,
            ..collector.namespaces().ids(proc)?
        };
        Ok(Identity {
            ids,
            owns_files: files_shared.is_none(),
        })
    }
}
