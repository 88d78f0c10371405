//! Credentials of a thread (`credentials(7)`, `capabilities(7)`).
//!
//! Saved:    uids, gids, groups, the five capability sets, securebits, no_new_privs.
//! Rebuilt:  set by each thread, as the last thing that needs privilege. Needs: all the rest.
//! Not kept: profiles of security modules, so far.

use floe_image::messages::CredsEntry;
use floe_kernel::proc::Status;

/// The entry of a thread from its `/proc/<tid>/status` and its securebits.
pub fn credentials_entry(status: &Status, securebits: u32) -> CredsEntry {
    CredsEntry {
        uid: status.uids[0],
        euid: status.uids[1],
        suid: status.uids[2],
        fsuid: status.uids[3],
        gid: status.gids[0],
        egid: status.gids[1],
        sgid: status.gids[2],
        fsgid: status.gids[3],
        groups: status.groups.clone(),
        cap_inh: halves(status.cap_inheritable),
        cap_prm: halves(status.cap_permitted),
        cap_eff: halves(status.cap_effective),
        cap_bnd: halves(status.cap_bounding),
        cap_amb: halves(status.cap_ambient),
        secbits: securebits,
        no_new_privs: status.no_new_privs.then_some(1),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
    }
}

/// A capability set as two words, low one first.
fn halves(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}
