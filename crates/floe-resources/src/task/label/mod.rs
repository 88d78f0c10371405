//! Labels of security modules: AppArmor's profiles, SELinux's contexts.
//!
//! Saved:    that of each thread, and SELinux's for what it makes or starts next (`/proc/<tid>/attr/`); the
//!           policy of AppArmor's namespaces that a label names ([`policy`]).
//! Rebuilt:  written by each thread as the very last thing ([`change`]): a profile may forbid all that comes
//!           before. SELinux lets only a process without threads change. Needs: all the rest.
//! Not kept: under AppArmor the way back out of a hat and what is to be the profile after the next `exec`:
//!           refused.

mod ask;
pub mod change;
pub mod policy;
pub mod sockets;
mod wanted;

use std::collections::BTreeMap;

use floe_image::messages::{CredsEntry, Lsmtype};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError};
use floe_kernel::security::{SecurityModule, selinux_allows};

use crate::collect::Obstacle;

pub use ask::LabelQuestions;
pub use wanted::Labels;

/// What a security module knows a thread by. For AppArmor there is the first only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// What the thread is; `None` where nothing confines it.
    pub current: Option<String>,
    /// For sockets that it makes.
    pub sockcreate: Option<String>,
    /// What it is to be after its next `exec`.
    pub exec: Option<String>,
    /// For files that it makes.
    pub fscreate: Option<String>,
    /// For keys that it makes.
    pub keycreate: Option<String>,
}

/// How the inventory names a security module.
pub fn lsm_type(module: SecurityModule) -> Lsmtype {
    match module {
        SecurityModule::None => Lsmtype::NoLsm,
        SecurityModule::AppArmor => Lsmtype::Apparmor,
        SecurityModule::SeLinux => Lsmtype::Selinux,
    }
}

/// Contexts of SELinux in which no code of ours can run: the executor lies in memory of its own.
pub fn without_executable_memory<'l>(
    labels: impl Iterator<Item = (HostPid, &'l str)>,
) -> Vec<Obstacle> {
    let first: BTreeMap<&str, HostPid> = labels.map(|(pid, label)| (label, pid)).collect();
    let forbids = |label: &str| selinux_allows(label, label, "execmem") == Some(false);
    let refused = first.into_iter().filter(|(label, _)| forbids(label));
    let obstacle = |(label, pid): (&str, HostPid)| {
        Obstacle {
        pid,
        object: format!("its SELinux context {label}, which forbids executable memory (execmem)"),
        remedy: "allow it (a boolean such as httpd_execmem, or a module: allow TYPE self:process execmem), or \
                 setenforce 0 for the time of the dump"
            .to_string(),
    }
    };
    refused.map(obstacle).collect()
}

impl Label {
    /// What `/proc/<pid>/task/<tid>/attr` says of a thread.
    pub fn read(module: SecurityModule, proc: &ProcDir, tid: HostPid) -> Result<Self, ProcError> {
        let mut label = Label::default();
        let directory = module.directory();
        let file = |name: &str| {
            let text = proc.read_record(&format!("task/{tid}/{directory}/{name}"))?;
            Ok(module.label(&text))
        };
        if module != SecurityModule::None {
            label.current = file("current")?;
        }
        if module == SecurityModule::SeLinux {
            label.exec = file("exec")?;
            label.sockcreate = file("sockcreate")?;
            label.fscreate = file("fscreate")?;
            label.keycreate = file("keycreate")?;
        }
        Ok(label)
    }

    /// Puts it into the credentials of the images.
    pub fn enter(&self, creds: &mut CredsEntry) {
        creds.lsm_profile.clone_from(&self.current);
        creds.lsm_sockcreate.clone_from(&self.sockcreate);
        creds.floe_lsm_exec.clone_from(&self.exec);
        creds.floe_lsm_fscreate.clone_from(&self.fscreate);
        creds.floe_lsm_keycreate.clone_from(&self.keycreate);
    }

    /// What holds for new objects and the next `exec`.
    pub fn for_later(&self) -> impl Iterator<Item = &str> {
        let all = [
            &self.sockcreate,
            &self.exec,
            &self.fscreate,
            &self.keycreate,
        ];
        all.into_iter().filter_map(|label| label.as_deref())
    }

    /// All labels in it.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.for_later().chain(self.current.as_deref())
    }

    /// What the credentials of the images say.
    pub fn of_entry(creds: &CredsEntry) -> Self {
        let some = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Label {
            current: some(&creds.lsm_profile),
            sockcreate: some(&creds.lsm_sockcreate),
            exec: some(&creds.floe_lsm_exec),
            fscreate: some(&creds.floe_lsm_fscreate),
            keycreate: some(&creds.floe_lsm_keycreate),
        }
    }
}
