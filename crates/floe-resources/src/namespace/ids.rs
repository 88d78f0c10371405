//! Numbers of namespaces in the images.

use floe_image::messages::TaskKobjIdsEntry;
use floe_kernel::namespace::NsKind;

/// The number of the tree's first own namespace; the coordinator's have the numbers before it.
pub const FIRST_OF_TREE: u32 = 9;

/// `pstree_entry.floe_child_pid_ns` of a pid namespace that has no process yet.
pub const UNBEGUN: u32 = u32::MAX;

/// The number of the coordinator's own namespace of a kind.
pub fn host_number(kind: NsKind) -> u32 {
    let place = NsKind::ALL.iter().position(|known| *known == kind);
    place.expect("ALL has every kind") as u32 + 1
}

/// The number of a task's namespace of a kind; `None` where the image does not say.
pub fn get(ids: &TaskKobjIdsEntry, kind: NsKind) -> Option<u32> {
    let number = match kind {
        NsKind::Pid => ids.pid_ns_id,
        NsKind::Net => ids.net_ns_id,
        NsKind::Ipc => ids.ipc_ns_id,
        NsKind::Uts => ids.uts_ns_id,
        NsKind::Mnt => ids.mnt_ns_id,
        NsKind::User => ids.user_ns_id,
        NsKind::Cgroup => ids.cgroup_ns_id,
        NsKind::Time => ids.time_ns_id,
    };
    number.filter(|number| *number != 0)
}

/// Sets the number of a task's namespace of a kind.
pub fn set(ids: &mut TaskKobjIdsEntry, kind: NsKind, number: Option<u32>) {
    let place = match kind {
        NsKind::Pid => &mut ids.pid_ns_id,
        NsKind::Net => &mut ids.net_ns_id,
        NsKind::Ipc => &mut ids.ipc_ns_id,
        NsKind::Uts => &mut ids.uts_ns_id,
        NsKind::Mnt => &mut ids.mnt_ns_id,
        NsKind::User => &mut ids.user_ns_id,
        NsKind::Cgroup => &mut ids.cgroup_ns_id,
        NsKind::Time => &mut ids.time_ns_id,
    };
    *place = number;
}

/// The ids of the coordinator itself, for the inventory: restore sees by them which namespaces are the
/// tree's own.
pub fn of_host() -> TaskKobjIdsEntry {
    let mut entry = TaskKobjIdsEntry::default();
    for kind in NsKind::ALL {
        set(&mut entry, kind, Some(host_number(kind)));
    }
    entry
}
