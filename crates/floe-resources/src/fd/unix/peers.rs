//! Who is connected to whom: pure.

use std::collections::HashMap;

use floe_image::messages::UnixSkEntry;

use super::{CALLBACK, ESTABLISHED, EXTERNAL, LISTEN, SERVICE};
use crate::restore::PlanError;

/// How a socket comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Made together with this peer, whose entry has the higher number.
    PairWith(u32),
    /// Made by its peer, this one.
    PairOf(u32),
    /// Connects to this socket once that one can be reached.
    ConnectTo(u32),
    /// A connection whose other end is gone.
    Orphan,
    /// Not connected.
    Alone,
    /// Outside of the tree.
    External,
}

/// Every unix socket's entry and role, in the order of their numbers.
#[derive(Debug)]
pub(super) struct Peers<'i> {
    pub sockets: Vec<(&'i UnixSkEntry, Role)>,
}

impl<'i> Peers<'i> {
    /// Finds the roles; names the peer that is missing.
    pub fn new(entries: &[&'i UnixSkEntry]) -> Result<Self, PlanError> {
        let by_inode: HashMap<u32, &UnixSkEntry> =
            entries.iter().map(|entry| (entry.ino, *entry)).collect();
        let mut sockets = Vec::with_capacity(entries.len());
        for entry in entries {
            sockets.push((*entry, role(entry, &by_inode)?));
        }
        Ok(Peers { sockets })
    }

    /// Connections that must be made before a socket takes its abstract name to listen: theirs is the same.
    pub fn before_listening(&self, entry: &UnixSkEntry) -> Vec<u32> {
        let is_abstract = entry.name.first() == Some(&0);
        let connected = |role| !matches!(role, Role::ConnectTo(_) | Role::External);
        let of_listener = |(other, role): &&(&UnixSkEntry, Role)| {
            connected(*role) && other.state == ESTABLISHED && have_one_name(other, entry)
        };
        if entry.state != LISTEN || !is_abstract {
            return Vec::new();
        }
        let found = self.sockets.iter().filter(of_listener);
        found.map(|(other, _)| other.id).collect()
    }

    /// Which end of a connection a listener has accepted; the other one may be nobody's. `None` where no end has
    /// a name.
    pub fn accepted<'e>(
        &self,
        (one, other): (&'e UnixSkEntry, Option<&'e UnixSkEntry>),
    ) -> Option<&'e UnixSkEntry> {
        let named = || [Some(one), other].into_iter().flatten();
        let named = || named().filter(|end| !end.name.is_empty());
        let has_listener = |end: &&UnixSkEntry| {
            let mut all = self.sockets.iter().map(|(entry, _)| *entry);
            all.any(|entry| entry.state == LISTEN && have_one_name(entry, end))
        };
        // A client that is bound to an abstract name would keep it from others.
        let is_abstract = |end: &&UnixSkEntry| end.name[0] == 0;
        let found = named().find(has_listener);
        found
            .or_else(|| named().find(is_abstract))
            .or_else(|| named().next())
    }

    /// The entry with this number.
    pub fn entry(&self, id: u32) -> Option<&'i UnixSkEntry> {
        let found = self.sockets.iter().find(|(entry, _)| entry.id == id);
        found.map(|(entry, _)| *entry)
    }
}

fn have_one_name(one: &UnixSkEntry, other: &UnixSkEntry) -> bool {
    (one.r#type, one.ns_id, &one.name, &one.name_dir)
        == (other.r#type, other.ns_id, &other.name, &other.name_dir)
}

fn role(entry: &UnixSkEntry, by_inode: &HashMap<u32, &UnixSkEntry>) -> Result<Role, PlanError> {
    if entry.uflags & EXTERNAL != 0 {
        return Ok(Role::External);
    }
    if entry.uflags & (SERVICE | CALLBACK) != 0 {
        return Err(PlanError::Unsupported {
            object: format!("Unix socket {} (flags {:#x})", entry.ino, entry.uflags),
            remedy: "it was made by a plug-in or connected to a CRIU service; close it before the dump",
        });
    }
    if entry.peer == 0 {
        let stream = entry.r#type != libc::SOCK_DGRAM.cast_unsigned();
        let orphan = stream && entry.state == ESTABLISHED;
        return Ok(if orphan { Role::Orphan } else { Role::Alone });
    }
    let Some(peer) = by_inode.get(&entry.peer) else {
        let what = format!(
            "unix socket {} has peer {}, which is missing",
            entry.ino, entry.peer
        );
        return Err(PlanError::damaged("files.img", what));
    };
    let mutual = peer.peer == entry.ino && peer.id != entry.id;
    if mutual && peer.uflags & EXTERNAL == 0 {
        return Ok(if entry.id < peer.id {
            Role::PairWith(peer.id)
        } else {
            Role::PairOf(peer.id)
        });
    }
    let stream = entry.r#type != libc::SOCK_DGRAM.cast_unsigned();
    if stream && peer.state != LISTEN {
        let what = format!(
            "unix socket {} is connected to {}, which is not connected to it",
            entry.ino, peer.ino
        );
        return Err(PlanError::damaged("files.img", what));
    }
    Ok(Role::ConnectTo(peer.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(id: u32, kind: i32, state: u32, peer: u32) -> UnixSkEntry {
        UnixSkEntry {
            id,
            ino: 100 + id,
            r#type: kind.cast_unsigned(),
            state,
            peer,
            ..UnixSkEntry::default()
        }
    }

    #[test]
    fn roles_follow_from_who_names_whom() {
        const CLOSE: u32 = 7;
        let entries = [
            socket(1, libc::SOCK_STREAM, ESTABLISHED, 102),
            socket(2, libc::SOCK_STREAM, ESTABLISHED, 101),
            socket(3, libc::SOCK_STREAM, LISTEN, 0),
            socket(4, libc::SOCK_STREAM, ESTABLISHED, 103),
            socket(5, libc::SOCK_STREAM, ESTABLISHED, 0),
            socket(6, libc::SOCK_DGRAM, CLOSE, 106),
            socket(7, libc::SOCK_DGRAM, CLOSE, 0),
        ];
        let entries: Vec<&UnixSkEntry> = entries.iter().collect();
        let roles: Vec<Role> = Peers::new(&entries)
            .expect("sound")
            .sockets
            .into_iter()
            .map(|(_, role)| role)
            .collect();
        let expected = [
            Role::PairWith(2),
            Role::PairOf(1),
            Role::Alone,
            Role::ConnectTo(3),
            Role::Orphan,
            Role::ConnectTo(6),
            Role::Alone,
        ];
        assert_eq!(roles, expected);
        assert!(Peers::new(&entries[..1]).is_err());
    }
}
