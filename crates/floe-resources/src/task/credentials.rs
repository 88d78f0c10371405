//! Credentials of a thread (`credentials(7)`, `capabilities(7)`).
//!
//! Saved:    uids, gids, groups, the five capability sets, securebits, no_new_privs.
//! Rebuilt:  set by each thread, as the last thing that needs privilege; only what differs from what it
//!           was born with. Needs: all the rest.
//! Not kept: nothing; the labels of security modules are [`label`](super::label)'s.

use floe_image::messages::{CredsEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};
use floe_kernel::proc::Status;

use super::birth::own_status;
use super::label::Label;
use super::rebuild::TaskContext;
use super::user_entry::{Ids, outside_of};
use crate::namespace::OwnerMap;
use crate::restore::PlanError;

/// The entry of a thread from its `/proc/<tid>/status` and its securebits.
pub fn credentials_entry(
    (status, label): (&Status, &Label),
    securebits: u32,
    owners: &OwnerMap,
) -> CredsEntry {
    let uids = status.uids.map(|uid| owners.uid_inside(uid));
    let gids = status.gids.map(|gid| owners.gid_inside(gid));
    let mut entry = CredsEntry {
        uid: uids[0],
        euid: uids[1],
        suid: uids[2],
        fsuid: uids[3],
        gid: gids[0],
        egid: gids[1],
        sgid: gids[2],
        fsgid: gids[3],
        groups: status
            .groups
            .iter()
            .map(|gid| owners.gid_inside(*gid))
            .collect(),
        cap_inh: halves(status.cap_inheritable),
        cap_prm: halves(status.cap_permitted),
        cap_eff: halves(status.cap_effective),
        cap_bnd: halves(status.cap_bounding),
        cap_amb: halves(status.cap_ambient),
        secbits: securebits,
        no_new_privs: status.no_new_privs.then_some(1),
        floe_outside: outside_of(status, owners),
        ..CredsEntry::default()
    };
    label.enter(&mut entry);
    entry
}

/// A capability set as two words, low one first.
fn halves(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

/// Lets a thread install seccomp filters without no_new_privs.
pub const CAP_SYS_ADMIN: u32 = 21;
/// Lets a process raise its hard limits.
pub const CAP_SYS_RESOURCE: u32 = 24;

/// Securebit: changing uids leaves the capability sets alone.
const NO_SETUID_FIXUP: u32 = 1 << 2;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a thread is and may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    /// Real, effective, saved, file system.
    pub gids: [u32; 4],
    /// Supplementary groups, ascending.
    pub groups: Vec<u32>,
    /// Capability sets, bit 0 for CAP_CHOWN.
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    /// `SECBIT_*`.
    pub securebits: u32,
    pub no_new_privs: bool,
}

impl Credentials {
    /// From `/proc/<tid>/status` and `prctl(PR_GET_SECUREBITS)`.
    pub fn from_status(status: &Status, securebits: u32) -> Self {
        Credentials {
            uids: status.uids,
            gids: status.gids,
            groups: sorted(&status.groups),
            inheritable: status.cap_inheritable,
            permitted: status.cap_permitted,
            effective: status.cap_effective,
            bounding: status.cap_bounding,
            ambient: status.cap_ambient,
            securebits,
            no_new_privs: status.no_new_privs,
        }
    }

    /// Those of the calling thread.
    pub fn of_this_thread() -> std::io::Result<Self> {
        let securebits = rustix::thread::capabilities_secure_bits()?.bits();
        Ok(Credentials::from_status(&own_status()?, securebits))
    }

    /// From an image; `None` when a capability set is longer than any kernel's.
    pub fn from_entry(entry: &CredsEntry) -> Option<Self> {
        Some(Credentials {
            uids: [entry.uid, entry.euid, entry.suid, entry.fsuid],
            gids: [entry.gid, entry.egid, entry.sgid, entry.fsgid],
            groups: sorted(&entry.groups),
            inheritable: set(&entry.cap_inh)?,
            permitted: set(&entry.cap_prm)?,
            effective: set(&entry.cap_eff)?,
            bounding: set(&entry.cap_bnd)?,
            ambient: set(&entry.cap_amb)?,
            securebits: entry.secbits,
            no_new_privs: entry.no_new_privs.is_some_and(|flag| flag != 0),
        })
    }

    /// What a thread with these ids has once it has entered a user namespace.
    pub fn with_all_rights(self) -> Self {
        let all = (1 << NAMES.len()) - 1;
        Credentials {
            permitted: all,
            effective: all,
            bounding: all,
            inheritable: 0,
            ambient: 0,
            securebits: 0,
            groups: sorted(&self.groups),
            ..self
        }
    }

    /// Whether a capability is in effect.
    pub fn has(&self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }
}

/// The kernel sorts groups, and their order means nothing.
fn sorted(groups: &[u32]) -> Vec<u32> {
    let mut groups = groups.to_vec();
    groups.sort_unstable();
    groups
}

/// A capability set of words, low one first.
fn set(words: &[u32]) -> Option<u64> {
    match *words {
        [] => Some(0),
        [low] => Some(u64::from(low)),
        [low, high] => Some(u64::from(low) | u64::from(high) << 32),
        _ => None,
    }
}

fn bits(set: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |bit| set & (1 << bit) != 0)
}

fn names(set: u64) -> String {
    let name = |bit| match NAMES.get(bit as usize) {
        Some(name) => format!("CAP_{name}"),
        None => format!("capability {bit}"),
    };
    bits(set).map(name).collect::<Vec<_>>().join(", ")
}

/// What the image asks for. Old images have no credentials for threads: those inherit.
pub fn wanted(
    thread: &ThreadCoreEntry,
    context: &TaskContext<'_>,
) -> Result<Credentials, PlanError> {
    let Some(entry) = &thread.creds else {
        return Ok(context.birth.credentials.clone());
    };
    let too_long = || context.damaged("a capability set is too long");
    let credentials = Credentials::from_entry(entry).ok_or_else(too_long)?;
    if entry.floe_outside.is_empty() && context.owners == context.own_owners {
        return Ok(credentials);
    }
    let seen = Ids::of(entry, context.owners).inside(context.own_owners);
    Ok(Credentials {
        uids: seen.uids,
        gids: seen.gids,
        groups: seen.groups,
        ..credentials
    })
}

/// Says, once a process, what it will not get back and can do without.
pub fn warn_of_losses(want: &Credentials, context: &TaskContext<'_>) {
    let (born, pid) = (&context.birth.credentials, context.tid);
    let lost = want.bounding & !born.bounding;
    if lost != 0 {
        let lost = names(lost);
        tracing::warn!(pid, lost, "capabilities are missing from the bounding set");
    }
    if born.no_new_privs && !want.no_new_privs {
        tracing::warn!(pid, "no_new_privs is set: floe itself runs with it");
    }
}

/// Drops from the bounding set what no thread of a process wants, for its threads to inherit: one by
/// one for each of some hundred threads it would take longer than all the rest of a restore. Effective
/// capabilities stay. Answers what the threads are then born with.
pub fn plan_shared_bounding(
    threads: &[Credentials],
    born: &Credentials,
    program: &mut Program,
) -> Credentials {
    // What is to become inheritable must still be there.
    let wanted = threads
        .iter()
        .fold(0, |all, it| all | it.bounding | it.inheritable);
    plan_bounding(born.bounding & !wanted, program);
    Credentials {
        bounding: born.bounding & wanted,
        ..born.clone()
    }
}

fn plan_bounding(losses: u64, program: &mut Program) {
    for bit in bits(losses) {
        let label = format!("prctl(PR_CAPBSET_DROP, {})", names(1 << bit));
        prctl(program, label, &[libc::PR_CAPBSET_DROP as u32, bit]);
    }
}

/// Turns a thread that was `born` with these credentials into what it was.
pub fn plan(
    want: &Credentials,
    born: &Credentials,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let missing = (want.permitted | want.effective) & !born.permitted;
    if missing != 0 {
        return Err(PlanError::Unsupported {
            object: format!("thread {} with {}", context.tid, names(missing)),
            remedy: "floe lacks these capabilities itself: run it with them",
        });
    }
    if want.groups != born.groups {
        plan_groups(&want.groups, program);
    }
    let securebits = plan_ids(want, born, program);
    plan_capabilities(want, born, securebits, program);
    if want.no_new_privs && !born.no_new_privs {
        plan_no_new_privs(program);
    }
    Ok(())
}

/// Changes ids only; the effective capabilities stay until the thread enters another user namespace.
pub fn keep_capabilities(want: &Credentials, born: &Credentials, program: &mut Program) {
    if want.groups != born.groups {
        plan_groups(&want.groups, program);
    }
    plan_ids(want, born, program);
}

/// Sets no_new_privs, which cannot be taken back.
pub fn plan_no_new_privs(program: &mut Program) {
    let label = "prctl(PR_SET_NO_NEW_PRIVS)";
    prctl(program, label, &[libc::PR_SET_NO_NEW_PRIVS as u32, 1]);
}

fn prctl(program: &mut Program, label: impl Into<std::borrow::Cow<'static, str>>, args: &[u32]) {
    let args: Vec<Arg> = args.iter().copied().map(Arg::from).collect();
    program.call(label, libc::SYS_prctl, &args);
}

fn plan_groups(groups: &[u32], program: &mut Program) {
    let bytes: Vec<u8> = groups.iter().flat_map(|gid| gid.to_le_bytes()).collect();
    let list = program.buffer(&bytes);
    let args = [Arg::from(groups.len()), Arg::from(list)];
    program.call("setgroups", libc::SYS_setgroups, &args);
}

/// Changes uids and gids and keeps all capabilities; answers the securebits then in force.
fn plan_ids(want: &Credentials, born: &Credentials, program: &mut Program) -> u32 {
    let mut securebits = born.securebits;
    if want.gids != born.gids {
        let [real, effective, saved, fs] = want.gids;
        let args = [real, effective, saved].map(Arg::from);
        program.call("setresgid", libc::SYS_setresgid, &args);
        if fs != effective {
            program.call("setfsgid", libc::SYS_setfsgid, &[Arg::from(fs)]);
        }
    }
    if want.uids != born.uids {
        if securebits & NO_SETUID_FIXUP == 0 {
            securebits |= NO_SETUID_FIXUP;
            plan_securebits(securebits, program);
        }
        let [real, effective, saved, fs] = want.uids;
        let args = [real, effective, saved].map(Arg::from);
        program.call("setresuid", libc::SYS_setresuid, &args);
        if fs != effective {
            program.call("setfsuid", libc::SYS_setfsuid, &[Arg::from(fs)]);
        }
    }
    securebits
}

fn plan_securebits(securebits: u32, program: &mut Program) {
    let label = format!("prctl(PR_SET_SECUREBITS, {securebits:#x})");
    prctl(
        program,
        label,
        &[libc::PR_SET_SECUREBITS as u32, securebits],
    );
}

/// Changes the capability sets.
///
/// Each set limits what can still be done: the bounding set limits what can become inheritable, the
/// ambient set needs inheritable capabilities and a securebit not yet set, securebits and the bounding
/// set need CAP_SETPCAP. So inheritable and ambient grow first, and the rest shrinks in that order.
fn plan_capabilities(
    want: &Credentials,
    born: &Credentials,
    securebits: u32,
    program: &mut Program,
) {
    const RAISE: u32 = libc::PR_CAP_AMBIENT_RAISE as u32;
    const LOWER: u32 = libc::PR_CAP_AMBIENT_LOWER as u32;
    let mut sets = [born.effective, born.permitted, born.inheritable];
    if want.inheritable & !born.inheritable != 0 {
        sets[2] |= want.inheritable;
        plan_capset(sets, program);
    }
    let changes = bits(want.ambient & !born.ambient).map(|bit| (RAISE, bit));
    let losses = bits(born.ambient & !want.ambient).map(|bit| (LOWER, bit));
    for (operation, bit) in changes.chain(losses) {
        let label = format!("prctl(PR_CAP_AMBIENT, {})", names(1 << bit));
        prctl(
            program,
            label,
            &[libc::PR_CAP_AMBIENT as u32, operation, bit],
        );
    }
    plan_bounding(born.bounding & !want.bounding, program);
    if securebits != want.securebits {
        plan_securebits(want.securebits, program);
    }
    let wanted = [want.effective, want.permitted, want.inheritable];
    if sets != wanted {
        plan_capset(wanted, program);
    }
}

/// Sets the effective, permitted and inheritable set.
fn plan_capset(sets: [u64; 3], program: &mut Program) {
    let header = [CAPABILITY_VERSION, 0].map(u32::to_le_bytes).concat();
    let low = sets.map(|set| set as u32);
    let high = sets.map(|set| (set >> 32) as u32);
    let data: Vec<u8> = low
        .iter()
        .chain(&high)
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let (header, data) = (program.buffer(&header), program.buffer(&data));
    let args = [Arg::from(header), Arg::from(data)];
    program.call("capset", libc::SYS_capset, &args);
}
