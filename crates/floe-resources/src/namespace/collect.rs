//! What is in the namespaces of the tree, and which of them cannot be saved.

use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::PidnsEntry;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::ProcDir;
use floe_options::External;

use super::split::SPLIT;
use super::tree::identity_of;
use super::{TreeNamespace, nested, time, users, uts};
use crate::collect::{CollectError, Collector, Obstacle};
use crate::{ipc, mount, net};

/// Writes the images of all namespaces that the collector knows of.
pub fn collect_namespaces(
    root: &ProcDir,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    for namespace in collector.namespaces().all().to_vec() {
        let collected = collect_one(root, &namespace, collector);
        collector.note(collected)?;
    }
    Ok(())
}

fn collect_one(
    root: &ProcDir,
    namespace: &Rc<TreeNamespace>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    // A task may leave the network of the others, their mounts, and the like.
    let may_differ = matches!(namespace.kind(), NsKind::Mnt | NsKind::Pid | NsKind::User)
        || SPLIT.contains(&namespace.kind());
    if !namespace.of_root && !may_differ {
        return Err(refused(
            namespace,
            "only the whole tree may be in one of its own",
        ));
    }
    match namespace.kind() {
        NsKind::Pid if !namespace.of_root => nested::check(namespace, collector),
        NsKind::Pid => collect_pids(root, namespace, collector),
        // Groups are saved with their hierarchy.
        NsKind::Cgroup => Ok(()),
        NsKind::Net => net::collect(namespace, collector),
        NsKind::Ipc => ipc::collect(namespace, collector),
        NsKind::Uts => uts::collect(namespace, collector),
        NsKind::Mnt => mount::collect(namespace, collector),
        NsKind::User => users::collect(namespace, collector),
        NsKind::Time => time::collect(namespace, collector),
    }
}

/// Nothing is in a pid namespace but the tree, unless it is somebody else's (`--external pid[INODE]:NAME`).
fn collect_pids(
    root: &ProcDir,
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let inode = namespace.namespace.identity().inode;
    let mut external = collector.options.external.iter();
    let name = external.find_map(|external| match external {
        External::PidNamespace { inode: of, name } if *of == inode => Some(name.clone()),
        _ => None,
    });
    match name {
        Some(name) => {
            let entry = PidnsEntry {
                ext_key: Some(name),
            };
            let image = collector.side(ImageKind::Pidns, u64::from(namespace.id))?;
            Ok(image.append(&entry)?)
        }
        None if collector.pids().number(root.pid()) == 1 => Ok(()),
        None => {
            let remedy = format!(
                "dump the tree of its first process, enter that namespace to dump, or name it by --external pid[{inode}]:NAME"
            );
            Err(refused(namespace, &remedy))
        }
    }
}

pub(super) fn refused(namespace: &TreeNamespace, remedy: &str) -> CollectError {
    CollectError::Unsupported(Obstacle {
        pid: namespace.member,
        object: format!("a {} namespace of its own", namespace.kind()),
        remedy: remedy.to_string(),
    })
}

/// Refuses a task that has left the namespaces of the root, or whose children would.
pub fn check_task(task: &ProcDir, collector: &mut Collector<'_>) -> Result<(), CollectError> {
    let mut foreign = Vec::new();
    let namespaces = collector.namespaces();
    // Whoever is in the user namespace of the caller may stay there.
    for kind in NsKind::ALL.into_iter().filter(|kind| *kind != NsKind::User) {
        let Some(found) = namespaces.identity(task, kind)? else {
            continue;
        };
        // One that nobody had before is refused by itself.
        let is_own = namespaces
            .find(kind, found)
            .is_some_and(|known| !known.of_root);
        if namespaces.root_identity(kind) != Some(found) && !is_own {
            foreign.push(format!("the {kind} namespace of its caller"));
        }
    }
    if identity_of(task, "time_for_children")? != namespaces.identity(task, NsKind::Time)? {
        foreign.push("a time namespace for its children".to_string());
    }
    if !nested::children_can_follow(task, collector)? {
        foreign.push("a pid namespace for its children".to_string());
    }
    if let Some((object, remedy)) = users::obstacle(task, collector)? {
        collector.obstacle(Obstacle {
            pid: task.pid(),
            object: object.to_string(),
            remedy: remedy.to_string(),
        });
    }
    for object in foreign {
        collector.obstacle(Obstacle {
            pid: task.pid(),
            object,
            remedy: "all tasks must be in the namespaces of the root task".to_string(),
        });
    }
    Ok(())
}
