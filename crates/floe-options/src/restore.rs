//! Options of `restore`.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{
    CgroupOptions, CpuCapabilities, External, FileValidation, Hooks, InheritFd, MountOptions,
    NoHooks, Place, SocketOptions,
};

/// What the tasks do after a good restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfterRestore {
    /// They run (those that were stopped at dump stay so).
    #[default]
    Run,
    /// `--leave-stopped`.
    LeaveStopped,
}

/// Whose child the root task becomes, and whether the caller waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetachMode {
    /// A child of ours; we wait for its end and leave with its status.
    #[default]
    Wait,
    /// `--restore-detached`: we leave at once, init (or a subreaper) inherits it.
    Detached,
    /// `--restore-detached --restore-sibling`: a child of our own parent (CLONE_PARENT).
    Sibling,
}

/// One `--join-ns KIND:PID|FILE[,UID,GID]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinNamespace {
    /// `ipc`, `net`, `time`, `user` or `uts`.
    pub kind: String,
    /// A pid or the path of a namespace file.
    pub target: String,
    /// Uid and gid to take in a user namespace.
    pub ids: Option<(u32, u32)>,
}

/// `--lsm-profile`: in place of the security labels that tasks had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LsmProfile {
    /// `none`: tasks have what Floe has itself.
    None,
    /// `TYPE:NAME`.
    Label(LsmKind, String),
}

/// A security module that labels tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LsmKind {
    /// Its labels are names of profiles.
    AppArmor,
    /// Its labels are contexts.
    SeLinux,
}

/// `--veth-pair IN=OUT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPair {
    /// The name inside.
    pub inner: String,
    /// The name outside.
    pub outer: String,
}

/// Everything that one restore is asked to do.
#[derive(Clone)]
pub struct RestoreOptions {
    /// Directories.
    pub place: Place,
    /// What the tasks do afterwards.
    pub after: AfterRestore,
    /// Whose child the root becomes.
    pub detach: DetachMode,
    /// Where the root's pid is written (`--pidfile`); already joined to the work directory.
    pub pidfile: Option<PathBuf>,
    /// Session, group and terminal are taken from the caller (`--shell-job`).
    pub shell_job: bool,
    /// File locks are taken again (`--file-locks`).
    pub file_locks: bool,
    /// Link-remapped names may be used (`--link-remap`).
    pub link_remap: bool,
    /// Permissions of open files are not compared (`--skip-file-rwx-check`).
    pub skip_file_rwx_check: bool,
    /// How open files are compared.
    pub file_validation: FileValidation,
    /// A device may be opened by any path that names it.
    pub evasive_devices: bool,
    /// CPU capabilities to compare.
    pub cpu_cap: CpuCapabilities,
    /// Sysctls that this kernel lacks are left out (`--weak-sysctls`).
    pub weak_sysctls: bool,
    /// Sockets.
    pub sockets: SocketOptions,
    /// Mounts.
    pub mounts: MountOptions,
    /// Control groups.
    pub cgroups: CgroupOptions,
    /// Resources that were not saved.
    pub external: Vec<External>,
    /// Descriptors of the caller that stand for saved ones.
    pub inherit_fds: Vec<InheritFd>,
    /// Namespaces to join.
    pub join_ns: Vec<JoinNamespace>,
    /// Archives that hold the images, instead of the directory (`-i`).
    pub archives: Vec<PathBuf>,
    /// The network namespace is left empty (`--empty-ns net`).
    pub empty_net: bool,
    /// Names of veth pairs.
    pub veth_pairs: Vec<VethPair>,
    /// An LSM label to be used instead of the saved one.
    pub lsm_profile: Option<LsmProfile>,
    /// A mount context to be used instead of the saved one.
    pub lsm_mount_context: Option<String>,
    /// Pages are punched out of the images as they are used (`--auto-dedup`).
    pub auto_dedup: bool,
    /// Memory is filled on demand (`--lazy-pages`).
    pub lazy_pages: bool,
    /// Mappings made by uprobes are allowed.
    pub allow_uprobes: bool,
    /// Run with fewer capabilities than root has.
    pub unprivileged: bool,
    /// A pty's master outside of the tree is handed to the caller (RPC only).
    pub orphan_pts_master: bool,
    /// Action scripts and notifications.
    pub hooks: Arc<dyn Hooks>,
}

impl RestoreOptions {
    /// A restore from `place` with CRIU's defaults for all the rest.
    pub fn new(place: Place) -> Self {
        Self {
            place,
            after: AfterRestore::default(),
            detach: DetachMode::default(),
            pidfile: None,
            shell_job: false,
            file_locks: false,
            link_remap: false,
            skip_file_rwx_check: false,
            file_validation: FileValidation::default(),
            evasive_devices: false,
            cpu_cap: CpuCapabilities::DEFAULT,
            weak_sysctls: false,
            sockets: SocketOptions::default(),
            mounts: MountOptions::default(),
            cgroups: CgroupOptions::default(),
            external: Vec::new(),
            inherit_fds: Vec::new(),
            join_ns: Vec::new(),
            archives: Vec::new(),
            empty_net: false,
            veth_pairs: Vec::new(),
            lsm_profile: None,
            lsm_mount_context: None,
            auto_dedup: false,
            lazy_pages: false,
            allow_uprobes: false,
            unprivileged: false,
            orphan_pts_master: false,
            hooks: Arc::new(NoHooks),
        }
    }
}
