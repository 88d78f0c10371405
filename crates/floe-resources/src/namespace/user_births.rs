//! Which rights and ids tasks have in user namespaces while they are made: by their birth there, or by entering
//! them later. See [`super::users`].

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arg, Program};
use floe_plan::Handle;

use super::OwnerMap;
use super::users::UserNamespace;
use crate::restore::{ExecuteError, PlanError, TaskImages, TreeImages, World};
use crate::task::credentials::Credentials;
use crate::task::rebuild::Birth;
use crate::task::user_entry::{self, From, Ids};

/// The task is in its user namespace; `None` for one that is born there.
pub fn entered(images: &TreeImages, pid: u32) -> Option<Handle> {
    let there = images.users.of_task(pid)?;
    (images.users.birth_of(pid) != Some(there))
        .then_some(Handle::Object("user namespace of task", u64::from(pid)))
}

/// As whom a task is born in a user namespace that its parent is not in.
#[derive(Clone, Debug)]
pub enum BornAs {
    /// It takes the namespace's root, or its first user, when it is there.
    First(u32, u32),
    /// It brings these ids, which it could not take there.
    With(Ids),
}

impl BornAs {
    /// For this task and all that are born below it.
    pub fn of(images: &TreeImages, task: &TaskImages, user: &UserNamespace) -> Self {
        let (uid, gid) = user.map.first();
        match ids_of(images, task) {
            Some(ids) if user.denies_groups || !ids.are_named(&user.map) => BornAs::With(ids),
            _ => BornAs::First(uid, gid),
        }
    }

    fn credentials(&self, map: &OwnerMap) -> Credentials {
        match self {
            BornAs::First(uid, gid) => Credentials {
                uids: [*uid; 4],
                gids: [*gid; 4],
                ..Credentials::default()
            }
            .with_all_rights(),
            BornAs::With(ids) => ids.inside(map),
        }
    }
}

/// The ids of a leader; the oldest images have none.
fn ids_of(images: &TreeImages, task: &TaskImages) -> Option<Ids> {
    let thread = task.core.thread_core.as_ref()?;
    Some(Ids::of(thread.creds.as_ref()?, &images.owners))
}

/// What tasks are born with, where that is not what the coordinator has.
fn at_birth(images: &TreeImages, ours: &Credentials) -> BTreeMap<u32, Credentials> {
    let users = &images.users;
    let mut all: BTreeMap<u32, Credentials> = BTreeMap::new();
    for task in &images.tasks {
        let pid = task.pid();
        let Some(user) = users.birth_of(pid) else {
            continue;
        };
        let parent = task.entry.ppid;
        let inherited = all.get(&parent).cloned();
        let inherited = inherited.filter(|_| users.birth_of(parent) == Some(user));
        let comes = || {
            let user = users.get(user)?;
            Some(Credentials {
                no_new_privs: ours.no_new_privs,
                ..BornAs::of(images, task, user).credentials(&user.map)
            })
        };
        all.extend(inherited.or_else(comes).map(|born| (pid, born)));
    }
    all
}

/// The way of a midwife to where a task is born.
#[derive(Debug)]
pub struct Arrival {
    pid: u32,
    user: u32,
    born_as: BornAs,
    around: OwnerMap,
    denies_groups: bool,
    born: Credentials,
}

impl Arrival {
    /// Of this task, by somebody who is born in `from`, and has `ours` where that is the coordinator's.
    pub fn of(
        images: &TreeImages,
        task: &TaskImages,
        (from, ours): (Option<u32>, &Credentials),
    ) -> Result<Self, PlanError> {
        let (pid, users) = (task.pid(), &images.users);
        let user = users
            .birth_of(pid)
            .and_then(|id| Some((id, users.get(id)?)));
        let Some((id, user)) = user.filter(|(id, _)| users.reaches(from, Some(*id))) else {
            return Err(PlanError::Unsupported {
                object: format!("Task {pid}, in another user namespace than its parent,"),
                remedy: "no order of births leads there; end that task before the dump",
            });
        };
        let around = from.and_then(|from| users.get(from));
        // All that are born there have what the first of them came with.
        let first = images
            .tasks
            .iter()
            .find(|task| users.birth_of(task.pid()) == from);
        let came = around.zip(first);
        let arrival = Arrival {
            pid,
            user: id,
            born_as: BornAs::of(images, task, user),
            around: users.map(from),
            denies_groups: around.is_some_and(|around| around.denies_groups),
            born: came.map_or_else(
                || ours.clone(),
                |(around, first)| BornAs::of(images, first, around).credentials(&around.map),
            ),
        };
        arrival.plan(0, &mut Program::new())?;
        Ok(arrival)
    }

    /// The user namespace.
    pub fn user(&self) -> u32 {
        self.user
    }

    /// Takes whoever runs the program there; `file` is its descriptor of the user namespace.
    pub fn plan(&self, file: i32, program: &mut Program) -> Result<(), PlanError> {
        match &self.born_as {
            BornAs::First(uid, gid) => {
                user_entry::enter(file, program);
                let none = [Arg::from(0), Arg::from(0)];
                program.call("setgroups", libc::SYS_setgroups, &none);
                program.call("setresgid", libc::SYS_setresgid, &[Arg::from(*gid); 3]);
                program.call("setresuid", libc::SYS_setresuid, &[Arg::from(*uid); 3]);
                Ok(())
            }
            BornAs::With(ids) => {
                let from = From {
                    map: &self.around,
                    denies_groups: self.denies_groups,
                    born: &self.born,
                };
                user_entry::plan_entry((self.pid, ids), from, file, program)
            }
        }
    }
}

/// What tasks have when they are in their user namespaces, where that is not what the coordinator has.
pub fn inside(images: &TreeImages, ours: &Birth) -> BTreeMap<u32, Birth> {
    let born = at_birth(images, &ours.credentials);
    let mut all = BTreeMap::new();
    for task in &images.tasks {
        let pid = task.pid();
        let at_birth = born.get(&pid);
        let credentials = match entered(images, pid) {
            None => at_birth.cloned(),
            Some(_) => {
                let map = images.users.map(images.users.of_task(pid));
                let ids = ids_of(images, task);
                let inside = ids.map(|ids| ids.inside(&map));
                let no_new_privs = ours.credentials.no_new_privs;
                inside.map(|inside| Credentials {
                    no_new_privs,
                    ..inside
                })
            }
        };
        if let Some(credentials) = credentials {
            let birth = Birth {
                credentials,
                ..ours.clone()
            };
            all.insert(pid, birth);
        }
    }
    all
}

/// The entry of a task into its user namespace.
#[derive(Debug)]
pub struct Entry {
    pid: u32,
    user: u32,
    ids: Ids,
    around: OwnerMap,
    denies_groups: bool,
    born: Credentials,
}

impl Entry {
    /// Plans it; `None` for a task that is born there, or in none.
    pub fn of(
        images: &TreeImages,
        task: &TaskImages,
        ours: &Birth,
    ) -> Result<Option<Self>, PlanError> {
        let (pid, users) = (task.pid(), &images.users);
        let (Some(user), Some(_)) = (users.of_task(pid), entered(images, pid)) else {
            return Ok(None);
        };
        let from = users.birth_of(pid);
        if !users.reaches(from, Some(user)) {
            return Err(PlanError::Unsupported {
                object: format!("Task {pid}, out of the user namespace of its pid namespace,"),
                remedy: "no order of births leads there; end that task before the dump",
            });
        }
        let directories = |task: &TaskImages| task.ids.as_ref().map(|ids| ids.fs_id);
        let is_partner = |other: &&TaskImages| {
            other.pid() != pid && other.fs.is_some() && directories(other) == directories(task)
        };
        if task.ids.is_some()
            && let Some(other) = images.tasks.iter().find(is_partner)
        {
            return Err(PlanError::Unsupported {
                object: format!(
                    "Task {pid}, which shares its directories with {},",
                    other.pid()
                ),
                remedy: "whoever enters a user namespace must have them alone; end one of the two before the dump",
            });
        }
        let missing = || PlanError::damaged(format!("core-{pid}.img"), "it has no credentials");
        let born = at_birth(images, &ours.credentials).remove(&pid);
        let entry = Entry {
            pid,
            user,
            ids: ids_of(images, task).ok_or_else(missing)?,
            around: users.map(from),
            denies_groups: from
                .and_then(|from| users.get(from))
                .is_some_and(|from| from.denies_groups),
            born: born.unwrap_or_else(|| ours.credentials.clone()),
        };
        entry.plan(0, &mut Program::new())?;
        Ok(Some(entry))
    }

    fn plan(&self, file: i32, program: &mut Program) -> Result<(), PlanError> {
        let from = From {
            map: &self.around,
            denies_groups: self.denies_groups,
            born: &self.born,
        };
        user_entry::plan_entry((self.pid, &self.ids), from, file, program)
    }

    /// Has the task enter.
    pub fn go(&self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        let namespace = world.namespaces().get(self.user)?;
        let file = world.hand_over(self.pid, namespace.as_fd().as_raw_fd())?;
        let mut program = Program::new();
        self.plan(file, &mut program)
            .map_err(ExecuteError::from_plan)?;
        program.call("close", libc::SYS_close, &[Arg::from(file)]);
        world.run(self.pid, &program).map(drop)
    }
}
