//! Making the namespaces of a tree, before its first task.

use std::collections::BTreeSet;

use floe_kernel::namespace::{Namespace, NsKind, VISITED};
use floe_kernel::placeholder::Placeholder;
use floe_plan::Handle;

use super::given::plan_given;
use super::split::{SPLIT, plan_split};
use super::{filled, ids, made, time, users, uts};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};
use crate::{ipc, mount, net};

/// All namespaces of the root task have their content: from here on files are opened inside.
pub const READY: Handle = Handle::Object("namespaces", 0);

/// Kinds that the root is not born into but enters by itself, when it is in its control groups.
const ENTERED_LATER: NsKind = NsKind::Cgroup;

/// The number of the root's namespace of a kind, where it was not that of the dumping process.
pub fn own_of_root(images: &TreeImages, kind: NsKind) -> Option<u32> {
    let all = of_root(images);
    all.into_iter()
        .find_map(|(found, id)| (found == kind).then_some(id))
}

/// The root's namespaces that were not those of the dumping process, with their numbers.
pub fn of_root(images: &TreeImages) -> Vec<(NsKind, u32)> {
    let (Some(host), Some(root)) = (&images.inventory.root_ids, &images.root().ids) else {
        return Vec::new(); // Older than namespaces in images.
    };
    let own = NsKind::ALL.into_iter().filter_map(|kind| {
        let number = ids::get(root, kind)?;
        let host = ids::get(host, kind)?;
        (number != host).then_some((kind, number))
    });
    own.collect()
}

/// Whether the root is the first task of a pid namespace that is to be made.
pub fn has_own_pids(images: &TreeImages) -> bool {
    own_of_root(images, NsKind::Pid).is_some()
}

/// Adds the steps that make and fill all namespaces.
pub fn plan_namespaces(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    check_tasks(images)?;
    let mut own: Vec<(NsKind, u32)> = of_root(images)
        .into_iter()
        .filter(|(kind, _)| *kind != ENTERED_LATER)
        .collect();
    let given = plan_given(&mut own, planner)?;
    let mut split = plan_split(planner)?;
    split.extend(mount::plan(planner)?);
    let mut makes = users::all_made(images);
    let joined: Option<Handle> = images.users.joined().map(made);
    makes.retain(|handle| Some(*handle) != joined);
    if !makes.is_empty() {
        let needs = joined.as_slice();
        planner.step_at_home("make user namespaces", (needs, &makes), users::make_all);
    }
    if own.is_empty() && given.is_empty() && split.is_empty() {
        return Ok(());
    }
    check_root(images, (&own, &given))?;
    let visited = own.iter().filter(|(kind, _)| VISITED.contains(kind));
    let wanted = visited.filter(|own| !given.contains(own));
    let wanted: Vec<(NsKind, u32)> = wanted.copied().collect();
    let makes: Vec<Handle> = wanted.iter().map(|(_, id)| made(*id)).collect();
    let needs = users::all_made(images);
    // Others are not gone into: the root is born there.
    let mut visited = [&wanted[..], &given].concat();
    visited.retain(|(kind, _)| VISITED.contains(kind));
    planner.step_at_home("make namespaces", (&needs, &makes), move |world| {
        let owner = |(_, id): &(NsKind, u32)| world.images.users.owner_of(*id);
        let owners: BTreeSet<Option<u32>> = wanted.iter().map(owner).collect();
        for user in owners {
            let of_it = |own: &&(NsKind, u32)| owner(own) == user;
            let wanted: Vec<(NsKind, u32)> = wanted.iter().filter(of_it).copied().collect();
            match user {
                None => make(world, &wanted)?,
                Some(user) => make_owned(world, &wanted, user)?,
            }
        }
        Ok(())
    });
    for (kind, id) in &own {
        match kind {
            NsKind::Net => net::plan(*id, planner)?,
            NsKind::Ipc => ipc::plan(*id, planner)?,
            NsKind::Uts => uts::plan(*id, planner)?,
            NsKind::Mnt | NsKind::Pid | NsKind::Cgroup | NsKind::User => {}
            NsKind::Time => time::check(*id, images)?,
        }
    }
    let needs = visited.iter().map(|(_, id)| filled(*id));
    let needs: Vec<Handle> = needs.chain(split).collect();
    let inside: Vec<u32> = visited.iter().map(|(_, id)| *id).collect();
    planner.step_at_home(
        "the namespaces are ready",
        (&needs, &[READY]),
        move |world| {
            world.namespaces().set_root(inside);
            Ok(())
        },
    );
    planner.work_inside();
    Ok(())
}

/// Makes empty namespaces for the tree.
fn make(world: &mut World<'_>, wanted: &[(NsKind, u32)]) -> Result<(), ExecuteError> {
    let kinds: Vec<NsKind> = wanted.iter().map(|(kind, _)| *kind).collect();
    let home = world.namespaces().home()?;
    let _visit = home
        .visit_new(&kinds)
        .during("Making namespaces", || format!("{kinds:?}"))?;
    for (kind, id) in wanted {
        let namespace =
            Namespace::own(*kind).during("Opening the new namespace", || kind.to_string())?;
        world.namespaces().keep(*id, namespace);
    }
    Ok(())
}

/// Makes empty namespaces that belong to a user namespace.
fn make_owned(
    world: &mut World<'_>,
    wanted: &[(NsKind, u32)],
    user: u32,
) -> Result<(), ExecuteError> {
    let kinds: Vec<NsKind> = wanted.iter().map(|(kind, _)| *kind).collect();
    let files = world.images.users.files_of(user);
    let user = world.namespaces().get(user)?;
    let maker = Placeholder::start_inside(&user, &kinds);
    let maker = maker.during("Making namespaces", || format!("{kinds:?}"))?;
    for (kind, id) in wanted {
        let namespace = Namespace::of_task(maker.pid(), *kind)
            .during("Opening the new namespace", || kind.to_string())?;
        let files = files.filter(|_| *kind == NsKind::Mnt);
        world.namespaces().keep(*id, namespace.with_files_of(files));
    }
    Ok(())
}

/// Kinds, with the number of a namespace of each.
type Numbered = [(NsKind, u32)];

fn check_root(images: &TreeImages, (own, given): (&Numbered, &Numbered)) -> Result<(), PlanError> {
    let has_pids = |all: &Numbered| all.iter().any(|(kind, _)| *kind == NsKind::Pid);
    let (own_pids, given_pids) = (has_pids(own) || has_pids(given), has_pids(given));
    let root = images.root().pid();
    if own_pids && !given_pids && root != 1 {
        return Err(PlanError::Unsupported {
            object: format!("Root task {root} of a pid namespace that it is not the first task of"),
            remedy: "dump the whole pid namespace",
        });
    }
    Ok(())
}

/// Refuses trees whose tasks are not all in the same namespaces.
fn check_tasks(images: &TreeImages) -> Result<(), PlanError> {
    let Some(root) = &images.root().ids else {
        return Ok(());
    };
    for task in &images.tasks {
        let Some(own) = &task.ids else {
            continue;
        };
        for kind in NsKind::ALL {
            let number = ids::get(own, kind);
            let split = match kind {
                kind if SPLIT.contains(&kind) => true,
                NsKind::Mnt | NsKind::User => true,
                NsKind::Pid => images.nested.namespace_of(task.pid()) == number,
                _ => false,
            };
            if number.is_some() && number != ids::get(root, kind) && !split {
                return Err(PlanError::Unsupported {
                    object: format!("The {kind} namespace of task {}", task.pid()),
                    remedy: "only the whole tree may be in one of its own; restore it with CRIU",
                });
            }
        }
    }
    Ok(())
}
