//! The options of one command, from everything that was set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::command::Command;
use crate::settings::FinalState;
use crate::{
    AfterDump, AfterRestore, CgroupOptions, DetachMode, DumpOptions, Hooks, Place, RestoreOptions,
    Settings, UsageError,
};

/// An option that this version takes but cannot follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotYet {
    /// The option, with its dashes.
    pub option: &'static str,
    /// What it would need, and what to do instead.
    pub instead: &'static str,
}

impl Settings {
    /// The directories; relative ones stay relative to the caller's current directory.
    pub fn place(&self) -> Place {
        let images_dir = self
            .images_dir
            .clone()
            .unwrap_or_else(|| PathBuf::from("."));
        let work_dir = self.work_dir.clone().unwrap_or_else(|| images_dir.clone());
        Place {
            images_dir,
            work_dir,
            prev_images_dir: self.prev_images_dir.clone(),
        }
    }

    /// The log's path, or `None` for standard error (also asked for by `-`).
    pub fn log_path(&self) -> Option<PathBuf> {
        let file = self
            .log
            .file
            .as_deref()
            .filter(|file| *file != Path::new("-"))?;
        Some(self.place().work_file(file))
    }

    /// Finds options that exclude each other, or that mean nothing to `command`.
    pub fn check(&self, command: Command, rest: &[String]) -> Result<(), UsageError> {
        let restore = command == Command::Restore;
        if self.exec_cmd && !restore {
            return Err(UsageError::Conflict("--exec-cmd is for restore only"));
        }
        if self.exec_cmd && rest.is_empty() {
            return Err(UsageError::Conflict(
                "--exec-cmd needs a command after `--`",
            ));
        }
        if self.exec_cmd && self.detached {
            return Err(UsageError::Conflict(
                "--restore-detached and --exec-cmd exclude each other",
            ));
        }
        if command == Command::Swrk {
            return match rest {
                [fd] if fd.parse::<u32>().is_ok() => Ok(()),
                _ => Err(UsageError::Needs {
                    command: "swrk",
                    what: "the number of one descriptor",
                }),
            };
        }
        if let (Some(given), false) = (rest.first(), self.exec_cmd) {
            return Err(UsageError::Excess {
                command: command.name(),
                given: given.clone(),
                meant: match self.iterate && self.tree.is_some() {
                    true => Some(format!("--iterate={given}")),
                    false => option_for(command, given).map(|option| format!("{option} {given}")),
                },
            });
        }
        if restore && self.sibling && !self.detached {
            return Err(UsageError::Conflict(
                "--restore-sibling needs --restore-detached",
            ));
        }
        if self.new_pidns && self.sibling {
            return Err(UsageError::Conflict(
                "--new-pidns and --restore-sibling exclude each other: the root's parent is in its pid namespace",
            ));
        }
        if self.new_pidns && self.archives.iter().any(|file| file.as_os_str() == "-") {
            return Err(UsageError::Conflict(
                "--new-pidns reads the images twice: give the archive as a file",
            ));
        }
        if !restore && !self.inherit_fds.is_empty() {
            return Err(UsageError::Conflict("--inherit-fd is for restore only"));
        }
        if !restore && self.mounts.compat_mode {
            return Err(UsageError::Conflict(
                "--mntns-compat-mode is for restore only",
            ));
        }
        if self.archive.is_some() && command == Command::PreDump {
            return Err(UsageError::Conflict(
                "--archive is for dump: the next round builds on the directory of a pre-dump, which `floe pack` packs",
            ));
        }
        if self.archive.is_some() && self.compress.as_deref() == Some("lz4") {
            return Err(UsageError::Conflict(
                "archives are compressed by zstd: --compress zstd:LEVEL sets the level",
            ));
        }
        if self.server.use_page_server && (self.iterate || self.archive.is_some()) {
            return Err(UsageError::Conflict(
                "--page-server goes with neither --iterate nor --archive",
            ));
        }
        if matches!(command, Command::Dump | Command::PreDump) && self.tree.is_none() {
            return Err(UsageError::Needs {
                command: command.name(),
                what: "the tree's root: -t PID",
            });
        }
        Ok(())
    }

    /// What `command` was asked for that this version cannot do. An option that would change
    /// nothing here is not in the list.
    pub fn not_yet(&self, command: Command) -> Vec<NotYet> {
        let dump = matches!(command, Command::Dump | Command::PreDump);
        let restore = command == Command::Restore;
        let rows = [
            (
                self.lazy_pages && (dump || restore),
                "--lazy-pages",
                "leave it out: memory is filled before the start",
            ),
            (
                self.server.tls && (dump || command == Command::PageServer),
                "--tls",
                "tunnel the connection, for example by ssh -L",
            ),
            (
                self.stream && (dump || restore),
                "--stream",
                "use a directory",
            ),
        ];
        rows.into_iter()
            .filter(|row| row.0)
            .map(|(_, option, instead)| NotYet { option, instead })
            .collect()
    }

    /// The options of control groups; a relative yard is seen from the work directory, as in CRIU.
    fn cgroups_in(&self, place: &Place) -> CgroupOptions {
        let yard = self.cgroups.yard.as_deref();
        CgroupOptions {
            yard: yard.map(|yard| place.work_file(yard)),
            ..self.cgroups.clone()
        }
    }

    /// The options of a dump; an error where no tree was named.
    pub fn dump_options(&self, hooks: Arc<dyn Hooks>) -> Result<DumpOptions, UsageError> {
        let tree = self.tree.ok_or(UsageError::Needs {
            command: "dump",
            what: "the tree's root: -t PID",
        })?;
        let to_server = self.server.use_page_server;
        Ok(DumpOptions {
            page_server: to_server.then(|| self.server.place()).transpose()?,
            after: match self.final_state {
                FinalState::Usual => AfterDump::Kill,
                FinalState::Stopped => AfterDump::LeaveStopped,
                FinalState::Running => AfterDump::LeaveRunning,
            },
            freeze_timeout: self.timeout,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            link_remap: self.link_remap,
            ghost_limit: self.ghost_limit,
            ghost_fiemap: self.ghost_fiemap,
            evasive_devices: self.evasive_devices,
            force_irmap: self.force_irmap,
            irmap_scan_paths: self.irmap_scan_paths.clone(),
            file_validation: self.file_validation,
            cpu_cap: self.cpu_cap,
            sockets: self.sockets.clone(),
            mounts: self.mounts.clone(),
            cgroups: self.cgroups_in(&self.place()),
            external: self.external.clone(),
            track_mem: self.track_mem,
            tracker: self.tracker,
            auto_dedup: self.auto_dedup,
            pre_dump_mode: self.pre_dump_mode,
            max_rate: self.max_rate,
            lazy_pages: self.lazy_pages,
            allow_uprobes: self.allow_uprobes,
            unprivileged: self.unprivileged,
            empty_net: self.empty_net,
            orphan_pts_master: self.orphan_pts_master,
            hooks,
            ..DumpOptions::new(tree, self.place())
        })
    }

    /// The options of a restore.
    pub fn restore_options(&self, hooks: Arc<dyn Hooks>) -> RestoreOptions {
        let place = self.place();
        RestoreOptions {
            after: match self.final_state {
                FinalState::Stopped => AfterRestore::LeaveStopped,
                FinalState::Usual | FinalState::Running => AfterRestore::Run,
            },
            detach: match (self.detached, self.sibling) {
                (true, true) => DetachMode::Sibling,
                (true, false) => DetachMode::Detached,
                (false, _) => DetachMode::Wait,
            },
            pidfile: self.pidfile.as_deref().map(|file| place.work_file(file)),
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            link_remap: self.link_remap,
            skip_file_rwx_check: self.skip_file_rwx_check,
            file_validation: self.file_validation,
            evasive_devices: self.evasive_devices,
            cpu_cap: self.cpu_cap,
            weak_sysctls: self.weak_sysctls,
            sockets: self.sockets.clone(),
            mounts: self.mounts.clone(),
            cgroups: self.cgroups_in(&place),
            external: self.external.clone(),
            inherit_fds: self.inherit_fds.clone(),
            join_ns: self.join_ns.clone(),
            archives: self.archives.clone(),
            empty_net: self.empty_net,
            veth_pairs: self.veth_pairs.clone(),
            lsm_profile: self.lsm_profile.clone(),
            lsm_mount_context: self.lsm_mount_context.clone(),
            auto_dedup: self.auto_dedup,
            lazy_pages: self.lazy_pages,
            allow_uprobes: self.allow_uprobes,
            unprivileged: self.unprivileged,
            orphan_pts_master: self.orphan_pts_master,
            hooks,
            ..RestoreOptions::new(place)
        }
    }
}

/// The option that a word without one was probably meant for.
fn option_for(command: Command, given: &str) -> Option<&'static str> {
    let is_pid = given.parse::<u32>().is_ok();
    let place = std::path::Path::new(given);
    match command {
        Command::Dump | Command::PreDump if is_pid => Some("-t"),
        Command::Restore if place.is_file() => Some("-i"),
        Command::Dump | Command::PreDump | Command::Dedup => Some("-D"),
        Command::Restore if place.is_dir() => Some("-D"),
        _ => None,
    }
}
