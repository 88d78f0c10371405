//! Pids as the images have them: those of the root task's pid namespace; and owners likewise.

use std::collections::HashMap;

use floe_image::messages::FloeNestedId;
use floe_kernel::ids::{HostPid, NsPid};
use floe_kernel::namespace::{NsIdentity, NsKind};
use floe_kernel::proc::{ProcDir, ProcError, Status, parse_status};

use super::OwnerMap;

/// Translates the coordinator's pids into those of the images.
#[derive(Debug, Default)]
pub struct PidView {
    /// How many pid namespaces lie between ours and the root's.
    depth: usize,
    known: HashMap<HostPid, u32>,
    /// Which pid namespace the root is in.
    namespace: Option<NsIdentity>,
    /// The numbers in namespaces below the root's, outermost first, of ids that have any.
    nested: HashMap<HostPid, Vec<u32>>,
    owners: OwnerMap,
}

impl PidView {
    /// The view of the pid namespace that the task `root` is in.
    pub fn of(root: &ProcDir) -> Result<Self, ProcError> {
        let own = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
        let same = |kind: NsKind| -> Result<bool, ProcError> {
            let name = format!("ns/{kind}");
            Ok(own.read_link(&name)? == root.read_link(&name)?)
        };
        Ok(PidView {
            depth: match same(NsKind::Pid)? {
                true => 0,
                false => status(root, "status")?.ns_pids.len().saturating_sub(1),
            },
            known: HashMap::new(),
            namespace: Some(identity(root)?),
            nested: HashMap::new(),
            owners: match same(NsKind::User)? {
                true => OwnerMap::default(),
                false => OwnerMap::of_task(root)?,
            },
        })
    }

    /// How the images have owners.
    pub fn owners(&self) -> &OwnerMap {
        &self.owners
    }

    /// Whether the pids are not those that the coordinator sees.
    pub fn is_foreign(&self) -> bool {
        self.depth > 0
    }

    /// Notes the ids of a process: its threads', its group's and its session's.
    pub fn learn(
        &mut self,
        process: &ProcDir,
        threads: impl IntoIterator<Item = HostPid>,
    ) -> Result<(), ProcError> {
        if !self.is_foreign() && self.namespace == identity(process).ok() {
            return Ok(());
        }
        let leader = status(process, "status")?;
        for ids in [&leader.ns_pids, &leader.ns_sids, &leader.ns_pgids] {
            self.note(ids);
        }
        for thread in threads {
            self.note(&status(process, &format!("task/{thread}/status"))?.ns_pids);
        }
        Ok(())
    }

    /// Notes an id as `/proc` shows it: ours first, then those of inner namespaces.
    fn note(&mut self, ids: &[NsPid]) {
        let (Some(host), Some(inner)) = (ids.first(), ids.get(self.depth)) else {
            return;
        };
        self.known.insert(HostPid(host.0), inner.0.cast_unsigned());
        // A session that began outside has no number inside.
        let below = ids[self.depth + 1..].iter();
        let nested: Vec<u32> = below
            .map(|id| id.0.cast_unsigned())
            .take_while(|id| *id != 0)
            .collect();
        if !nested.is_empty() {
            self.nested.insert(HostPid(host.0), nested);
        }
    }

    /// The numbers of an id in pid namespaces below the root's, outermost first; none for most.
    pub fn nested(&self, host: HostPid) -> &[u32] {
        self.nested.get(&host).map_or(&[], Vec::as_slice)
    }

    /// The inner numbers that a task's line of `pstree.img` needs, with `others` as the images number them.
    pub fn nested_ids(
        &self,
        process: HostPid,
        threads: &[HostPid],
        (pgid, sid): (u32, u32),
    ) -> Vec<FloeNestedId> {
        let own = std::iter::once(process).chain(threads.iter().copied());
        let others = [pgid, sid];
        let others = self
            .nested
            .keys()
            .copied()
            .filter(|id| others.contains(&self.number(*id)));
        let mut ids: Vec<HostPid> = own.chain(others).collect();
        ids.sort();
        ids.dedup();
        let ids = ids.into_iter().map(|id| FloeNestedId {
            id: self.number(id),
            inner: self.nested(id).to_vec(),
        });
        ids.filter(|id| !id.inner.is_empty()).collect()
    }

    /// The number in the images; zero for what is not in the tree's pid namespace, or not known there.
    pub fn number(&self, host: HostPid) -> u32 {
        match self.depth {
            0 => host.0.cast_unsigned(),
            _ => self.known.get(&host).copied().unwrap_or(0),
        }
    }

    /// As [`PidView::number`], of an id that may be negative for a process group.
    pub fn owner(&self, pid: u32) -> u32 {
        match pid {
            0 => 0,
            _ => self.number(HostPid(pid.cast_signed())),
        }
    }
}

fn identity(process: &ProcDir) -> Result<NsIdentity, ProcError> {
    let stat = process.stat("ns/pid")?;
    Ok(NsIdentity {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

fn status(proc: &ProcDir, name: &str) -> Result<Status, ProcError> {
    parse_status(&proc.read_record(name)?).map_err(|error| proc.bad(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_pids_are_those_of_the_roots_namespace() {
        let mut view = PidView {
            depth: 1,
            ..PidView::default()
        };
        view.note(&[NsPid(900), NsPid(3), NsPid(1)]);
        view.note(&[NsPid(50)]);
        assert_eq!(view.number(HostPid(900)), 3);
        assert_eq!(view.number(HostPid(50)), 0);
        assert!(view.nested(HostPid(50)).is_empty());
        assert_eq!(view.nested(HostPid(900)), [1]);
        view.note(&[NsPid(80), NsPid(8), NsPid(0)]);
        assert!(view.nested(HostPid(80)).is_empty());
        assert_eq!(PidView::default().number(HostPid(50)), 50);
    }
}
