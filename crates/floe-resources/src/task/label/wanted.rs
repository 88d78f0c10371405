//! Which label a thread gets here, and whether it can have it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use floe_image::messages::{CredsEntry, InventoryEntry, Lsmtype};
use floe_kernel::security::{SecurityModule, could_take_profile, selinux_allows};
use floe_options::{LsmKind, LsmProfile};

use super::Label;
use super::policy::Policy;
use crate::restore::PlanError;

/// What SELinux checks a context by, where it is mounted.
const SELINUX_CONTEXT: &str = "/sys/fs/selinux/context";
/// The kernel takes a page, of which AppArmor's command needs some bytes, and leaves out the rest.
const MAX_LENGTH: usize = 4000;
/// What AppArmor calls a task without a profile.
const UNCONFINED: &str = "unconfined";
/// Between the profiles of a stack.
const STACKED: &str = "//&";

/// How labels of the images become labels here.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    /// This machine's module.
    pub here: SecurityModule,
    /// What tasks are born with.
    born: Option<String>,
    /// The module of the dump's machine.
    saved: SecurityModule,
    instead: Option<LsmProfile>,
}

impl Labels {
    /// Looks at this machine; refuses a profile of a module that it does not have.
    pub fn new(
        inventory: &InventoryEntry,
        instead: Option<&LsmProfile>,
    ) -> Result<Self, PlanError> {
        let here = SecurityModule::active();
        let born = here.own_label();
        let born =
            born.map_err(|error| PlanError::damaged("/proc/thread-self/attr", error.to_string()))?;
        let saved = match inventory.lsmtype() {
            Lsmtype::NoLsm => SecurityModule::None,
            Lsmtype::Apparmor => SecurityModule::AppArmor,
            Lsmtype::Selinux => SecurityModule::SeLinux,
        };
        let labels = Labels {
            here,
            born,
            saved,
            instead: instead.cloned(),
        };
        labels.check_option()?;
        Ok(labels)
    }

    fn check_option(&self) -> Result<(), PlanError> {
        let Some(instead) = &self.instead else {
            return Ok(());
        };
        let LsmProfile::Label(kind, name) = instead else {
            return Ok(());
        };
        let wanted = match kind {
            LsmKind::AppArmor => SecurityModule::AppArmor,
            LsmKind::SeLinux => SecurityModule::SeLinux,
        };
        // LXC passes that everywhere.
        let is_free = wanted == SecurityModule::AppArmor && name == UNCONFINED;
        if wanted == self.here || is_free {
            return Ok(());
        }
        Err(PlanError::Unsupported {
            object: format!(
                "The {} label {name}, on a machine without it,",
                wanted.name()
            ),
            remedy: "leave it out; --lsm-profile none restores tasks without the labels that they had",
        })
    }

    /// What a thread is to be labelled with.
    pub fn wanted(&self, creds: &CredsEntry) -> Result<Label, PlanError> {
        let saved = Label::of_entry(creds);
        if saved.parts().any(|label| label.len() > MAX_LENGTH) {
            return Err(PlanError::damaged(
                "core-*.img",
                "a security label is too long",
            ));
        }
        // Who makes the next `exec` a confined one is confined.
        if saved == Label::default() {
            return Ok(self.without_label(saved));
        }
        let instead = match &self.instead {
            None => return self.as_saved(saved),
            Some(LsmProfile::Label(_, name)) if self.here != SecurityModule::None => name,
            Some(_) => return Ok(Label::default()),
        };
        let replaced = |old: Option<String>| old.map(|old| combined(instead, &old));
        Ok(Label {
            current: replaced(saved.current),
            sockcreate: replaced(saved.sockcreate),
            exec: replaced(saved.exec),
            keycreate: replaced(saved.keycreate),
            // A context of files, which has nothing in common with that of a task.
            fscreate: saved.fscreate.filter(|_| self.saved == self.here),
        })
    }

    /// A thread without a label stays so, unless its machine had none to give.
    fn without_label(&self, none: Label) -> Label {
        let told = self.saved != SecurityModule::None || self.here == SecurityModule::None;
        match &self.instead {
            Some(LsmProfile::Label(_, chosen)) if !told => Label {
                current: Some(chosen.clone()),
                ..none
            },
            _ => none,
        }
    }

    /// What a socket is to be labelled with under SELinux; `tasks` are the labels that tasks had.
    ///
    /// Where those are replaced, sockets that had the same are, too.
    pub(super) fn of_socket(&self, saved: &str, tasks: &BTreeSet<String>) -> Option<String> {
        match &self.instead {
            None if self.saved == self.here => Some(saved.to_string()),
            Some(LsmProfile::Label(_, name)) if tasks.contains(saved) => Some(name.clone()),
            Some(LsmProfile::Label(..)) if self.saved == self.here => Some(saved.to_string()),
            _ => None,
        }
    }

    fn as_saved(&self, saved: Label) -> Result<Label, PlanError> {
        let wrong = self.saved != SecurityModule::None && self.saved != self.here;
        if !wrong && self.here != SecurityModule::None {
            return Ok(saved);
        }
        let label = saved.current.unwrap_or_default();
        let name = match self.saved {
            SecurityModule::None => "security",
            module => module.name(),
        };
        Err(PlanError::Unsupported {
            object: format!(
                "The {name} label {label} on a machine with {}",
                match self.here {
                    SecurityModule::None => "no security module for labels",
                    other => other.name(),
                }
            ),
            remedy: "restore where that module is active, or without what it confines the tasks by: --lsm-profile none",
        })
    }

    /// The label that a thread has to be given, which has `born` now: `None` where that is right.
    ///
    /// A task that nothing confined must not stay under a profile of ours.
    pub fn change(&self, wanted: &Label, born: Option<&str>) -> Option<String> {
        let stays = || self.saved == self.here && self.instead.is_none();
        match (wanted.current.as_deref(), born) {
            (Some(wanted), born) if Some(wanted) != born => {
                let is_there = wanted == UNCONFINED && born.is_none();
                (!is_there || self.here != SecurityModule::AppArmor).then(|| wanted.to_string())
            }
            (None, Some(_)) if self.here == SecurityModule::AppArmor && stays() => {
                Some(UNCONFINED.to_string())
            }
            _ => None,
        }
    }

    /// What tasks are born with.
    pub fn born(&self) -> Option<&str> {
        self.born.as_deref()
    }

    /// Whether all of these labels can be had here; `policy` is what will be loaded first.
    pub fn check(&self, wanted: &[Label], policy: &Policy) -> Result<(), PlanError> {
        let (mut labels, mut changes) = (BTreeSet::new(), BTreeSet::new());
        for one in wanted {
            changes.extend(self.change(one, self.born()));
            labels.extend(one.for_later().map(str::to_string));
        }
        labels.extend(changes.iter().cloned());
        for label in labels.iter().filter_map(|label| policy.rest(label)) {
            match self.here {
                SecurityModule::None => {}
                SecurityModule::AppArmor => check_profile(&label)?,
                SecurityModule::SeLinux => check_context(&label)?,
            }
        }
        match (self.here, self.born()) {
            (SecurityModule::SeLinux, Some(born)) => changes
                .iter()
                .try_for_each(|label| check_change(born, label)),
            _ => Ok(()),
        }
    }

    /// Says once which labels were replaced by others.
    pub fn report(&self, saved: &[Label], wanted: &[Label]) {
        let mut changes: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for (saved, wanted) in saved.iter().zip(wanted) {
            let pair = [saved, wanted].map(|one| one.current.as_deref().unwrap_or("none"));
            if pair[0] != pair[1] {
                *changes.entry((pair[0], pair[1])).or_default() += 1;
            }
        }
        for ((saved, wanted), threads) in changes {
            tracing::warn!(
                saved,
                wanted,
                threads,
                "the security label is replaced, as asked"
            );
        }
    }
}

/// The label that stands for `old` where `new` was asked for. In place of a stack or of a profile in a
/// namespace, `new` replaces as many of the first parts as it has itself; a namespace without a profile
/// takes over the old one's.
fn combined(new: &str, old: &str) -> String {
    let parts: Vec<&str> = new.split(STACKED).collect();
    if parts.len() == 1 && !new.starts_with(':') {
        return new.to_string();
    }
    let mut replaced = Vec::new();
    let mut rest = old.split(STACKED);
    for part in parts {
        let before = rest.next();
        let whole = match before {
            Some(before) if part.starts_with(':') && part.ends_with(':') => {
                format!("{part}{}", profile_of(before))
            }
            _ => part.to_string(),
        };
        replaced.push(whole);
    }
    replaced.extend(rest.map(str::to_string));
    replaced.join(STACKED)
}

/// The profile without its namespace: `:NAMESPACE:PROFILE` or `:NAMESPACE://PROFILE`.
pub(super) fn profile_of(part: &str) -> &str {
    match part.strip_prefix(':').and_then(|rest| rest.split_once(':')) {
        Some((_, profile)) => profile.strip_prefix("//").unwrap_or(profile),
        None => part,
    }
}

fn check_profile(label: &str) -> Result<(), PlanError> {
    let Err(error) = could_take_profile(label) else {
        return Ok(());
    };
    Err(match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => PlanError::Unsupported {
            object: format!(
                "The AppArmor profile {label}, which Floe's own profile may not change to,"
            ),
            remedy: "run Floe unconfined",
        },
        _ => PlanError::Unsupported {
            object: format!("The AppArmor profile {label}, which is not loaded here ({error}),"),
            remedy: "load it (apparmor_parser -r FILE; podman and docker load theirs with the first container), or \
                     restore under another: --lsm-profile apparmor:NAME, or apparmor:unconfined for none",
        },
    })
}

/// Where SELinux's file system is not mounted, the kernel checks when the label is set.
pub(super) fn check_context(label: &str) -> Result<(), PlanError> {
    match fs::write(SELINUX_CONTEXT, label) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(PlanError::Unsupported {
            object: format!("The SELinux context {label}, which the policy here does not know,"),
            remedy: "load a policy that has it (semodule -i), or restore under another: --lsm-profile selinux:CONTEXT",
        }),
        _ => Ok(()),
    }
}

/// Whether a task of ours may become this.
fn check_change(born: &str, label: &str) -> Result<(), PlanError> {
    let rights = [
        (born, "setcurrent"),
        (label, "dyntransition"),
        // Its tracer is one of ours then.
        (label, "ptrace"),
    ];
    if rights
        .iter()
        .all(|(target, right)| selinux_allows(born, target, right) != Some(false))
    {
        return Ok(());
    }
    Err(PlanError::Unsupported {
        object: format!(
            "The SELinux context {label}, into which Floe may not change from its own, {born},"
        ),
        remedy: "run Floe in a context that may (unconfined_t with the boolean unconfined_dyntrans_all, or runcon), or \
                 allow it: process setcurrent, dyntransition and ptrace",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(
        here: SecurityModule,
        saved: SecurityModule,
        instead: Option<(LsmKind, &str)>,
    ) -> Labels {
        Labels {
            here,
            saved,
            born: None,
            instead: instead.map(|(kind, name)| LsmProfile::Label(kind, name.to_string())),
        }
    }

    fn creds(label: Option<&str>) -> CredsEntry {
        CredsEntry {
            lsm_profile: label.map(str::to_string),
            ..CredsEntry::default()
        }
    }

    fn current(labels: &Labels, saved: Option<&str>) -> Option<String> {
        labels.wanted(&creds(saved)).expect("it can be had").current
    }

    use SecurityModule::{AppArmor, None as Nothing, SeLinux};

    #[test]
    fn a_label_is_given_back_where_its_module_is() {
        let same = labels(AppArmor, AppArmor, None);
        assert_eq!(current(&same, Some("web")).as_deref(), Some("web"));
        assert_eq!(current(&same, None), None);
    }

    #[test]
    fn a_label_of_another_module_is_refused_by_name() {
        for (here, saved) in [
            (Nothing, AppArmor),
            (SeLinux, AppArmor),
            (AppArmor, SeLinux),
        ] {
            let labels = labels(here, saved, None);
            let error = labels
                .wanted(&creds(Some("web")))
                .expect_err("another module");
            assert!(error.to_string().contains("label web"), "{error}");
            assert_eq!(current(&labels, None), None);
        }
    }

    #[test]
    fn a_chosen_profile_replaces_every_label_and_confines_nobody_else() {
        let chosen = labels(AppArmor, AppArmor, Some((LsmKind::AppArmor, "other")));
        assert_eq!(current(&chosen, Some("web")).as_deref(), Some("other"));
        assert_eq!(current(&chosen, None), None);
        let foreign = labels(SeLinux, AppArmor, Some((LsmKind::SeLinux, "u:r:t:s0")));
        assert_eq!(current(&foreign, Some("web")).as_deref(), Some("u:r:t:s0"));
    }

    #[test]
    fn a_chosen_profile_confines_all_from_a_machine_without_labels() {
        let chosen = labels(AppArmor, Nothing, Some((LsmKind::AppArmor, "web")));
        assert_eq!(current(&chosen, None).as_deref(), Some("web"));
    }

    #[test]
    fn labels_are_given_up_only_where_that_was_asked_for() {
        let free = LsmProfile::Label(LsmKind::AppArmor, UNCONFINED.to_string());
        for instead in [LsmProfile::None, free] {
            let mut given_up = labels(Nothing, AppArmor, None);
            given_up.instead = Some(instead);
            assert!(given_up.check_option().is_ok());
            assert_eq!(current(&given_up, Some("web")), None);
        }
        assert!(
            labels(Nothing, AppArmor, Some((LsmKind::AppArmor, "web")))
                .check_option()
                .is_err()
        );
    }

    #[test]
    fn a_task_leaves_a_profile_of_floe_that_it_did_not_have() {
        let free = labels(AppArmor, AppArmor, None);
        let change = |wanted: Option<&str>, born| {
            let wanted = Label {
                current: wanted.map(str::to_string),
                ..Label::default()
            };
            free.change(&wanted, born)
        };
        assert_eq!(change(None, Some("crun")).as_deref(), Some("unconfined"));
        assert_eq!(change(None, None), None);
        assert_eq!(change(Some("web"), None).as_deref(), Some("web"));
        assert_eq!(change(Some("web"), Some("web")), None);
        assert_eq!(change(Some("unconfined"), None), None);
    }

    #[test]
    fn a_label_that_the_kernel_would_cut_off_is_damage() {
        let same = labels(AppArmor, AppArmor, None);
        let long = "x".repeat(5000);
        assert!(same.wanted(&creds(Some(&long))).is_err());
    }

    #[test]
    fn a_chosen_stack_replaces_its_part_of_a_stack() {
        assert_eq!(combined("b", "a//&:ns:x"), "b");
        assert_eq!(combined("b//&:new:", "a//&:old:x"), "b//&:new:x");
        assert_eq!(combined("b//&:new:", "a//&:old://x//&c"), "b//&:new:x//&c");
        assert_eq!(combined(":new:y", ":old:x"), ":new:y");
    }
}
