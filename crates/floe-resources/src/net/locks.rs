//! Locks of the namespaces that a restore fills, from before they have devices until the tree runs.

use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::NetnsEntry;

use super::firewall::{self, Rules};
use super::place::SocketPlace;
use crate::fd::inet::is_connection;
use crate::netlock::{Away, Copies, Left, Lock, Scope};
use crate::restore::{ExecuteError, Planner, World};

/// The locks of a restore, by the number of the namespace.
#[derive(Default)]
struct Locks(Vec<(u32, Lock)>);

/// Packet rules of namespaces with connections, which wait until those are rebuilt.
#[derive(Default)]
struct LateRules(Vec<(u32, Rules)>);

/// Leaves the rules of a namespace to [`unlock_networks`].
pub fn rules_come_last(id: u32, rules: Rules, world: &mut World<'_>) {
    world.state::<LateRules>().0.push((id, rules));
}

/// Whether a connection of the images is in the namespace: then its peer is not to reach it too early.
pub fn has_connections(id: u32, planner: &Planner<'_>) -> bool {
    let files = planner.images.files.values();
    let mut connections = files
        .filter_map(|file| file.isk.as_ref())
        .filter(|entry| is_connection(entry));
    connections.any(|entry| SocketPlace::new(planner, entry.ns_id).number() == Some(id))
}

/// Locks a namespace as a whole; once more does no harm.
pub fn lock_network(id: u32, world: &mut World<'_>) -> Result<(), ExecuteError> {
    let method = world.options.sockets.network_lock;
    let locks = &mut world.state::<Locks>().0;
    if locks.iter().any(|(locked, _)| *locked == id) {
        return Ok(());
    }
    let away = Away::new(world.namespaces().home()?, world.namespaces().get(id)?);
    let lock = Lock::new((method, Copies::One), Scope::Everything, Some(away))?;
    world.state::<Locks>().0.push((id, lock));
    Ok(())
}

/// Gives namespaces the rules that came last, and unlocks all of the tree: what this restore locked, and what the dump left in those that were
/// joined or came back with the lock among their rules.
pub fn unlock_networks(world: &mut World<'_>, left: Left<'_>) -> Result<(), ExecuteError> {
    for (id, rules) in std::mem::take(&mut world.state::<LateRules>().0) {
        world.in_namespace(id, |_| Ok(firewall::execute(&rules)?))?;
    }
    drop(std::mem::take(world.state::<Locks>()));
    let dir = &world.images.dir;
    for id in dir.ids(ImageKind::Netns)? {
        let entry: Option<NetnsEntry> = dir.read_optional(ImageKind::Netns, id)?;
        let external = entry.is_some_and(|entry| entry.ext_key.is_some());
        let id = u32::try_from(id).unwrap_or(0);
        let (false, Ok(namespace)) = (external, world.namespaces().get(id)) else {
            continue;
        };
        let away = Away::new(world.namespaces().home()?, Rc::clone(&namespace));
        left.unlock(&Scope::Everything, Some(&away))?;
    }
    Ok(())
}
