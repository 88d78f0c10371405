//! Options of `dump` and `pre-dump`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::{
    ByteLimit, CgroupOptions, CpuCapabilities, External, FileValidation, Hooks, MountOptions,
    NoHooks, Place, SocketOptions, TreePid,
};

/// What becomes of the tasks after a good dump. After a failed one they always run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfterDump {
    /// They are killed, as CRIU does without an option.
    #[default]
    Kill,
    /// `--leave-running`.
    LeaveRunning,
    /// `--leave-stopped`: stopped as by SIGSTOP.
    LeaveStopped,
}

/// How a pre-dump reads memory (`--pre-dump-mode`). Accepted; Floe's own way is the same for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreDumpMode {
    #[default]
    Splice,
    Read,
}

/// How changed pages are found (`--tracker`); ours only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrackerChoice {
    /// The best that the kernel has.
    #[default]
    Auto,
    /// Write protection by userfaultfd.
    Uffd,
    /// Soft-dirty bits.
    SoftDirty,
    /// Comparing with the parent.
    Content,
    /// Not at all: everything is copied.
    None,
}

/// Where a dump sends its pages (`--page-server`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageServer {
    /// A server that listens (`--address`, `--port`).
    At {
        /// An address or host name.
        address: String,
        /// The port.
        port: u16,
    },
    /// A connected socket among our caller's descriptors (`--ps-socket`).
    Socket(i32),
}

/// When a dump in rounds (`--iterate`) stops copying and takes the rest; ours only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IterateOptions {
    /// The freeze that the final dump shall stay under (`--max-freeze`).
    pub max_freeze: Duration,
    /// The most rounds before it (`--max-rounds`, or `--iterate=N`).
    pub max_rounds: u32,
    /// The longest time for all rounds (`--max-time`); no round begins after it.
    pub max_time: Option<Duration>,
    /// Exactly `max_rounds`, whatever they bring (`--iterate=N`).
    pub fixed: bool,
}

impl Default for IterateOptions {
    fn default() -> Self {
        IterateOptions {
            max_freeze: Duration::from_millis(20),
            max_rounds: 10,
            max_time: None,
            fixed: false,
        }
    }
}

/// Everything that one dump is asked to do.
#[derive(Clone)]
pub struct DumpOptions {
    /// The root of the tree (`-t`).
    pub tree: TreePid,
    /// Directories.
    pub place: Place,
    /// What becomes of the tasks.
    pub after: AfterDump,
    /// The longest time for stopping all tasks (`--timeout`); 10 s by default.
    pub freeze_timeout: Duration,
    /// The session, group and terminal may be the caller's (`--shell-job`).
    pub shell_job: bool,
    /// File locks may be saved (`--file-locks`).
    pub file_locks: bool,
    /// Deleted files with other names may be linked back under a temporary name (`--link-remap`).
    pub link_remap: bool,
    /// The biggest deleted file whose content is saved (`--ghost-limit`).
    pub ghost_limit: ByteLimit,
    /// Holes of a ghost file are found by FIEMAP first (`--ghost-fiemap`).
    pub ghost_fiemap: bool,
    /// A device may be saved under any path that names it (`--evasive-devices`).
    pub evasive_devices: bool,
    /// Names of inotify marks are searched even where a handle works (`--force-irmap`).
    pub force_irmap: bool,
    /// Where to search for them first (`--irmap-scan-path`).
    pub irmap_scan_paths: Vec<PathBuf>,
    /// How restore shall compare open files.
    pub file_validation: FileValidation,
    /// CPU capabilities to record.
    pub cpu_cap: CpuCapabilities,
    /// Sockets.
    pub sockets: SocketOptions,
    /// Mounts.
    pub mounts: MountOptions,
    /// Control groups.
    pub cgroups: CgroupOptions,
    /// Resources that are not saved.
    pub external: Vec<External>,
    /// Changes are tracked from now on (`--track-mem`).
    pub track_mem: bool,
    /// How changed pages are found (`--tracker`).
    pub tracker: TrackerChoice,
    /// Pages that this generation replaces are punched out of the parent (`--auto-dedup`).
    pub auto_dedup: bool,
    /// How a pre-dump reads.
    pub pre_dump_mode: PreDumpMode,
    /// The most bytes that a round copies in a second (`--max-rate`); a final dump is not held back.
    pub max_rate: Option<ByteLimit>,
    /// Where pages go instead of to files (`--page-server`).
    pub page_server: Option<PageServer>,
    /// Pages stay in the tasks and are served on request (`--lazy-pages`).
    pub lazy_pages: bool,
    /// Mappings made by uprobes are allowed (`--allow-uprobes`).
    pub allow_uprobes: bool,
    /// Run with fewer capabilities than root has (`--unprivileged`).
    pub unprivileged: bool,
    /// Networks that restore creates empty (`--empty-ns net`).
    pub empty_net: bool,
    /// A master of a pty outside of the tree is handed to the caller at restore (RPC only).
    pub orphan_pts_master: bool,
    /// Action scripts and notifications.
    pub hooks: Arc<dyn Hooks>,
}

impl DumpOptions {
    /// A dump of `tree` into `place` with CRIU's defaults for all the rest.
    pub fn new(tree: TreePid, place: Place) -> Self {
        Self {
            tree,
            place,
            after: AfterDump::default(),
            freeze_timeout: Duration::from_secs(10),
            shell_job: false,
            file_locks: false,
            link_remap: false,
            ghost_limit: ByteLimit::GHOST_DEFAULT,
            ghost_fiemap: true,
            evasive_devices: false,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            file_validation: FileValidation::default(),
            cpu_cap: CpuCapabilities::DEFAULT,
            sockets: SocketOptions::default(),
            mounts: MountOptions::default(),
            cgroups: CgroupOptions::default(),
            external: Vec::new(),
            track_mem: false,
            tracker: TrackerChoice::default(),
            auto_dedup: false,
            pre_dump_mode: PreDumpMode::default(),
            max_rate: None,
            page_server: None,
            lazy_pages: false,
            allow_uprobes: false,
            unprivileged: false,
            empty_net: false,
            orphan_pts_master: false,
            hooks: Arc::new(NoHooks),
        }
    }

    /// True if a unix socket with this inode may lose its peer (`--external unix[INODE]`, `--ext-unix-sk`).
    pub fn is_external_unix(&self, inode: u64) -> bool {
        self.sockets.external_unix || self.external.contains(&External::UnixSocket { inode })
    }
}
