//! The steps that make the mounts of a tree.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{MntEntry, RegFileEntry};
use floe_kernel::namespace::NsKind;
use floe_plan::Handle;

use super::execute::{Places, Plan, Workshop, content_image, has_files};
use super::groups::plan_groups;
use super::model::upgrade_flags;
use super::remote::mount_in_task;
use super::tree::{MountTree, Origin, Request, plan_tree};
use crate::cgroup::{entered, groups_made};
use crate::namespace::{filled, ids, made, of_root};
use crate::restore::{ExecuteError, PlanError, Planner, TreeImages, World};

/// Made when every mount of the tree is in its place.
const COMPLETE: Handle = Handle::Object("mounts complete", 0);

/// The mounts in the making, until the last of them is attached.
#[derive(Default)]
struct Making(Option<Workshop>);

/// Adds the steps that fill a namespace; see [`crate::namespace`].
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let own = of_root(images);
    let root = own.iter().find(|(kind, _)| *kind == NsKind::Mnt);
    if root != Some(&(NsKind::Mnt, id)) {
        return Ok(()); // All are made together with that of the root.
    }
    let all = namespaces(images);
    let plan = Rc::new(Plan {
        tree: tree(images, id, planner)?,
        groups: Vec::new(),
        images: images.dir.clone(),
    });
    let groups = plan_groups(&plan.tree)?;
    let plan = Rc::new(Plan {
        groups,
        ..Rc::unwrap_or_clone(plan)
    });
    check_content(images, &plan.tree)?;
    let shown: Vec<u32> = own
        .iter()
        .filter(|(kind, _)| matches!(kind, NsKind::Net | NsKind::Ipc))
        .map(|(_, id)| *id)
        .collect();
    let mut needs: Vec<Handle> = all.iter().chain(&shown).map(|id| made(*id)).collect();
    // Parts of their hierarchies may be mounted.
    needs.extend(groups_made(planner)?);
    let makes: Vec<Handle> = all.iter().map(|id| filled(*id)).collect();
    let late = plan.tree.mounts.iter().any(|mount| mount.late);
    let name = format!("make {} mounts", plan.tree.mounts.len());
    let places = (all.clone(), shown.clone());
    planner.step_at_home(name, (&needs, &makes), move |world| {
        let places = find(world, &places)?;
        let mut workshop = Workshop::open(plan, world.namespaces().home()?)?;
        workshop.make_early(&places)?;
        workshop.take_masters().keep(world)?;
        if !late {
            return workshop.join_groups();
        }
        world.state::<Making>().0 = Some(workshop);
        Ok(())
    });
    if late {
        plan_late(planner, (all, shown))?;
    }
    Ok(())
}

/// Adds the step that mounts what only a task of the tree can mount.
fn plan_late(planner: &mut Planner<'_>, places: (Vec<u32>, Vec<u32>)) -> Result<(), PlanError> {
    let pid = planner.images.root().pid();
    // The root task begins the cgroup namespace when it enters its groups.
    let own_cgroups = of_root(planner.images)
        .iter()
        .any(|(kind, _)| *kind == NsKind::Cgroup);
    let enters = groups_made(planner)?.is_some();
    let needs = if own_cgroups && enters {
        vec![entered(pid)]
    } else {
        Vec::new()
    };
    planner.task_step(pid, "mount proc", (&needs, &[COMPLETE]), move |world| {
        let places = find(world, &places)?;
        let Some(mut workshop) = world.state::<Making>().0.take() else {
            return Ok(());
        };
        let mut mounted = BTreeMap::new();
        for (index, fs) in workshop.late_sources() {
            let mount = mount_in_task(world, pid, &fs)?;
            mounted.insert(index, mount);
        }
        workshop.make_late(&places, mounted)?;
        workshop.join_groups()
    });
    Ok(())
}

fn find(
    world: &mut World<'_>,
    (mount, shown): &(Vec<u32>, Vec<u32>),
) -> Result<Places, ExecuteError> {
    let namespaces = world.namespaces();
    let with_id = |id: &u32| Ok::<_, ExecuteError>((*id, namespaces.get(*id)?));
    let mount = mount.iter().map(with_id).collect::<Result<_, _>>()?;
    let shown = shown
        .iter()
        .map(|id| namespaces.get(*id))
        .collect::<Result<_, _>>()?;
    Ok(Places { mount, shown })
}

/// The mount namespaces that tasks of the tree are in.
fn namespaces(images: &TreeImages) -> Vec<u32> {
    let host = images.inventory.root_ids.as_ref();
    let host = host.and_then(|host| ids::get(host, NsKind::Mnt));
    let of_tasks = images.tasks.iter().filter_map(|task| task.ids.as_ref());
    let found: BTreeSet<u32> = of_tasks
        .filter_map(|own| ids::get(own, NsKind::Mnt))
        .filter(|id| Some(*id) != host)
        .collect();
    found.into_iter().collect()
}

fn tree(images: &TreeImages, root: u32, planner: &Planner<'_>) -> Result<MountTree, PlanError> {
    let mut mounts = BTreeMap::new();
    for id in namespaces(images) {
        let mut entries: Vec<MntEntry> = images.dir.read_all(ImageKind::Mnts, u64::from(id))?;
        entries.iter_mut().for_each(upgrade_flags);
        mounts.insert(id, entries);
    }
    let has = |wanted| of_root(images).iter().any(|(kind, _)| *kind == wanted);
    plan_tree(&Request {
        namespaces: &mounts,
        root_namespace: root,
        own_pids: has(NsKind::Pid),
        own_cgroups: has(NsKind::Cgroup),
        options: &planner.options.mounts,
        external: &planner.options.external,
    })
}

/// The content of every file system in memory must be there.
fn check_content(images: &TreeImages, tree: &MountTree) -> Result<(), PlanError> {
    for source in &tree.sources {
        let Origin::New(fs) = &source.origin else {
            continue;
        };
        if has_files(fs) {
            let (kind, id) = content_image(&images.dir, fs.entry.root_dev, fs.entry.mnt_id);
            if !images.dir.has(kind, id) {
                return Err(PlanError::damaged(
                    format!("tmpfs-dev-{id}.tar.gz.img"),
                    format!("the files of {} are missing", fs.entry.mountpoint),
                ));
            }
        }
    }
    Ok(())
}

/// What must be mounted before a file can be opened by its name.
pub fn needs_of_file(images: &TreeImages, file: &RegFileEntry) -> Vec<Handle> {
    let own_pids = of_root(images).iter().any(|(kind, _)| *kind == NsKind::Pid);
    let own_mounts = of_root(images).iter().any(|(kind, _)| *kind == NsKind::Mnt);
    let late = own_pids && own_mounts && (file.name == "/proc" || file.name.starts_with("/proc/"));
    if late { vec![COMPLETE] } else { Vec::new() }
}
