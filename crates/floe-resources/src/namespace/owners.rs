//! Which users and groups a user namespace has, and who they are outside (`user_namespaces(7)`): pure.

use floe_image::messages::{UidGidExtent, UsernsEntry};
use floe_kernel::proc::{ProcDir, ProcError};
use rustix::process::{Gid, Uid};

/// What the kernel shows in place of an owner that a namespace does not have.
pub const NOBODY: u32 = 65534;

/// Maps of owners between the tree's user namespace and the coordinator's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnerMap {
    /// `None` where both are the same.
    maps: Option<UsernsEntry>,
}

impl OwnerMap {
    /// The maps of the user namespace that a task is in, where it is not ours.
    pub fn of_task(task: &ProcDir) -> Result<Self, ProcError> {
        let map = |name: &str| -> Result<Vec<UidGidExtent>, ProcError> {
            let text = task.read(name)?;
            Ok(String::from_utf8_lossy(&text)
                .lines()
                .filter_map(extent)
                .collect())
        };
        Ok(OwnerMap::from_image(Some(UsernsEntry {
            uid_map: map("uid_map")?,
            gid_map: map("gid_map")?,
            ..UsernsEntry::default()
        })))
    }

    /// The maps of an image; without one, owners are the same inside and outside.
    pub fn from_image(maps: Option<UsernsEntry>) -> Self {
        OwnerMap { maps }
    }

    /// A user of ours as tasks inside see it.
    pub fn uid_inside(&self, uid: u32) -> u32 {
        self.maps
            .as_ref()
            .map_or(uid, |maps| inside(&maps.uid_map, uid))
    }

    /// A group of ours as tasks inside see it.
    pub fn gid_inside(&self, gid: u32) -> u32 {
        self.maps
            .as_ref()
            .map_or(gid, |maps| inside(&maps.gid_map, gid))
    }

    /// A user of the images as we see it.
    pub fn uid_outside(&self, uid: u32) -> u32 {
        self.maps
            .as_ref()
            .map_or(uid, |maps| outside(&maps.uid_map, uid))
    }

    /// A group of the images as we see it.
    pub fn gid_outside(&self, gid: u32) -> u32 {
        self.maps
            .as_ref()
            .map_or(gid, |maps| outside(&maps.gid_map, gid))
    }

    /// A user of the images as the owner of a file; `None` for -1, which is nobody: such a file stays ours.
    pub fn uid(&self, uid: u32) -> Option<Uid> {
        let uid = self.uid_outside(uid);
        (uid != u32::MAX).then(|| Uid::from_raw(uid))
    }

    /// A group of the images as that of a file; `None` for -1.
    pub fn gid(&self, gid: u32) -> Option<Gid> {
        let gid = self.gid_outside(gid);
        (gid != u32::MAX).then(|| Gid::from_raw(gid))
    }

    /// The user and group that tasks of a new namespace begin with: its root, or else its first ones.
    pub fn first(&self) -> (u32, u32) {
        let lowest =
            |map: &[UidGidExtent]| map.iter().map(|extent| extent.first).min().unwrap_or(0);
        let maps = self.maps.as_ref();
        maps.map_or((0, 0), |maps| {
            (lowest(&maps.uid_map), lowest(&maps.gid_map))
        })
    }

    /// The maps, where both sides differ.
    pub fn entry(&self) -> Option<&UsernsEntry> {
        self.maps.as_ref()
    }

    /// A user of ours as tasks inside see it, if they can name it.
    pub fn has_uid(&self, uid: u32) -> Option<u32> {
        self.maps
            .as_ref()
            .map_or(Some(uid), |maps| find(&maps.uid_map, uid))
    }

    /// A group of ours as tasks inside see it, if they can name it.
    pub fn has_gid(&self, gid: u32) -> Option<u32> {
        self.maps
            .as_ref()
            .map_or(Some(gid), |maps| find(&maps.gid_map, gid))
    }

    /// The same names inside for whoever has in `to` the names that its owners have in `from`; `None` where `to`
    /// lacks one. As the kernel wants it, each line must lie in a single one of those around.
    pub fn moved(&self, from: &OwnerMap, to: &OwnerMap) -> Option<OwnerMap> {
        let Some(maps) = &self.maps else {
            return Some(OwnerMap::default());
        };
        let lines = |own: &[UidGidExtent], of: fn(&UsernsEntry) -> &Vec<UidGidExtent>| {
            let move_line = |line: &UidGidExtent| {
                let within = |around: &OwnerMap, first: u32, way: Way| match &around.maps {
                    None => Some(first),
                    Some(around) => of(around)
                        .iter()
                        .find_map(|outer| way.through(outer, first, line.count)),
                };
                let name = within(from, line.lower_first, Way::Inside)?;
                Some(UidGidExtent {
                    lower_first: within(to, name, Way::Outside)?,
                    ..line.clone()
                })
            };
            own.iter().map(move_line).collect::<Option<Vec<_>>>()
        };
        Some(OwnerMap::from_image(Some(UsernsEntry {
            uid_map: lines(&maps.uid_map, |maps| &maps.uid_map)?,
            gid_map: lines(&maps.gid_map, |maps| &maps.gid_map)?,
            ..UsernsEntry::default()
        })))
    }

    /// Whether tasks inside can name these users and groups.
    pub fn names(&self, uids: &[u32], gids: &[u32]) -> bool {
        let Some(maps) = &self.maps else {
            return true;
        };
        let has = |map: &[UidGidExtent], ids: &[u32]| {
            let named = |id: &u32| {
                map.iter()
                    .any(|line| Way::Outside.through(line, *id, 1).is_some())
            };
            ids.iter().all(named)
        };
        has(&maps.uid_map, uids) && has(&maps.gid_map, gids)
    }

    /// The text of `uid_map` and of `gid_map`, for somebody in the namespace that `around` is the map of.
    pub fn texts(&self, around: &OwnerMap) -> Option<(String, String)> {
        let text = |map: &[UidGidExtent], outer: &dyn Fn(u32) -> u32| {
            let line = |it: &UidGidExtent| {
                format!("{} {} {}\n", it.first, outer(it.lower_first), it.count)
            };
            map.iter().map(line).collect::<String>()
        };
        let maps = self.maps.as_ref()?;
        Some((
            text(&maps.uid_map, &|uid| around.uid_inside(uid)),
            text(&maps.gid_map, &|gid| around.gid_inside(gid)),
        ))
    }
}

/// A line of `uid_map`: the first id inside, the first outside, how many.
fn extent(line: &str) -> Option<UidGidExtent> {
    let mut numbers = line.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(UidGidExtent {
        first: next()?,
        lower_first: next()?,
        count: next()?,
    })
}

/// The two directions of a map.
#[derive(Clone, Copy, Debug)]
enum Way {
    Inside,
    Outside,
}

impl Way {
    /// What the first of `count` ids becomes, where one line has all of them.
    fn through(self, line: &UidGidExtent, first: u32, count: u32) -> Option<u32> {
        let (from, to) = match self {
            Way::Inside => (line.lower_first, line.first),
            Way::Outside => (line.first, line.lower_first),
        };
        let last = first.checked_add(count.checked_sub(1)?)?;
        translate(last, from, to, line.count)?;
        translate(first, from, to, line.count)
    }
}

fn translate(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    let offset = id.checked_sub(from).filter(|offset| *offset < count)?;
    to.checked_add(offset)
}

fn find(map: &[UidGidExtent], id: u32) -> Option<u32> {
    map.iter()
        .find_map(|it| translate(id, it.lower_first, it.first, it.count))
}

fn inside(map: &[UidGidExtent], id: u32) -> u32 {
    find(map, id).unwrap_or(NOBODY)
}

fn outside(map: &[UidGidExtent], id: u32) -> u32 {
    map.iter()
        .find_map(|it| translate(id, it.first, it.lower_first, it.count))
        .unwrap_or(NOBODY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_translated_both_ways() {
        let extents =
            ["0 100000 1000", "5000 7 1"].map(|line| extent(line).expect("three numbers"));
        let map = OwnerMap::from_image(Some(UsernsEntry {
            uid_map: extents.to_vec(),
            gid_map: extents[..1].to_vec(),
            ..UsernsEntry::default()
        }));
        assert_eq!((map.uid_inside(100_003), map.uid_outside(3)), (3, 100_003));
        assert_eq!((map.uid_inside(7), map.gid_inside(7)), (5000, NOBODY));
        assert_eq!(OwnerMap::default().uid_inside(7), 7);
        assert_eq!((map.has_uid(7), map.has_gid(7)), (Some(5000), None));
        let texts = |around: &OwnerMap| map.texts(around).expect("maps");
        assert_eq!(texts(&OwnerMap::default()).1, "0 100000 1000\n");
        let around = UsernsEntry {
            gid_map: vec![extent("10 99990 2000").expect("three numbers")],
            ..UsernsEntry::default()
        };
        let around = OwnerMap::from_image(Some(around));
        assert_eq!(texts(&around).1, "0 20 1000\n");
    }

    #[test]
    fn a_map_moves_to_another_namespace_around_it() {
        let map = |lines: &[&str]| {
            let lines: Vec<UidGidExtent> = lines.iter().filter_map(|line| extent(line)).collect();
            OwnerMap::from_image(Some(UsernsEntry {
                uid_map: lines.clone(),
                gid_map: lines,
                ..UsernsEntry::default()
            }))
        };
        let from = map(&["0 1000 100"]);
        let inner = map(&["0 1010 5", "5 1050 1"]);
        let moved = inner.moved(&from, &map(&["0 7000 100"]));
        assert_eq!(moved, Some(map(&["0 7010 5", "5 7050 1"])));
        assert_eq!(
            inner.moved(&from, &OwnerMap::default()),
            Some(map(&["0 10 5", "5 50 1"]))
        );
        // The kernel takes no line across two of those around.
        assert_eq!(inner.moved(&from, &map(&["0 7000 12", "12 9000 90"])), None);
        assert!(from.names(&[0, 99], &[5]) && !from.names(&[0], &[100]));
    }
}
