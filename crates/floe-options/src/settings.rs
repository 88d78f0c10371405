//! Everything that can be set by a flag, a configuration file or a request, in one flat value.
//!
//! Later sources overwrite earlier ones field by field; [`crate::build`] makes the options of
//! one command from the result.

use std::path::PathBuf;
use std::time::Duration;

use crate::{
    ByteLimit, CgroupOptions, CpuCapabilities, External, FileValidation, InheritFd, IterateOptions,
    JoinNamespace, LsmProfile, MountOptions, PageServer, PreDumpMode, SocketOptions, TrackerChoice,
    TreePid, UsageError, VethPair,
};

/// What `-s` and `-R` ask for; the last one wins, as in CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FinalState {
    /// Neither: killed after a dump, running after a restore.
    #[default]
    Usual,
    /// `--leave-stopped`.
    Stopped,
    /// `--leave-running`.
    Running,
}

/// Which features `check` looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckSettings {
    /// `--extra`.
    pub extra: bool,
    /// `--experimental`.
    pub experimental: bool,
    /// `--feature NAME`; the last one wins, as in CRIU.
    pub feature: Option<String>,
}

/// Where pages go or come from over a network.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerSettings {
    /// `--page-server`: send pages there.
    pub use_page_server: bool,
    /// `--address`.
    pub address: Option<String>,
    /// `--port`.
    pub port: Option<u16>,
    /// `--ps-socket`.
    pub socket: Option<i32>,
    /// `--tls`.
    pub tls: bool,
    /// `--tls-no-cn-verify`.
    pub tls_no_cn_verify: bool,
    /// `--tls-cacert`.
    pub tls_cacert: Option<PathBuf>,
    /// `--tls-cacrl`.
    pub tls_cacrl: Option<PathBuf>,
    /// `--tls-cert`.
    pub tls_cert: Option<PathBuf>,
    /// `--tls-key`.
    pub tls_key: Option<PathBuf>,
}

impl ServerSettings {
    /// The server that a dump sends to; an error where its port is not named.
    pub fn place(&self) -> Result<PageServer, UsageError> {
        if let Some(fd) = self.socket {
            return Ok(PageServer::Socket(fd));
        }
        let port = self.port.ok_or(UsageError::Needs {
            command: "--page-server",
            what: "the server's port: --port PORT",
        })?;
        let address = self.address.clone();
        Ok(PageServer::At {
            address: address.unwrap_or_else(|| "127.0.0.1".to_string()),
            port,
        })
    }
}

/// The log of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// `--log-file`, relative to the work directory; standard error when not given.
    pub file: Option<PathBuf>,
    /// 0 silent, 1 errors, 2 warnings, 3 information, 4 debug; more counts as 4.
    pub level: u32,
    /// `--log-pid`.
    pub per_task: bool,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            file: None,
            level: 2,
            per_task: false,
        }
    }
}

/// All values, with CRIU's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub help: bool,
    pub version: bool,
    pub config: Option<PathBuf>,
    pub no_default_config: bool,
    pub log: LogSettings,
    pub tree: Option<TreePid>,
    pub images_dir: Option<PathBuf>,
    pub work_dir: Option<PathBuf>,
    pub prev_images_dir: Option<PathBuf>,
    pub pidfile: Option<PathBuf>,
    pub final_state: FinalState,
    pub detached: bool,
    pub sibling: bool,
    pub exec_cmd: bool,
    pub dry_run: bool,
    /// `--new-pidns`: the tree gets a pid namespace, in which its pids are free.
    pub new_pidns: bool,
    pub archives: Vec<PathBuf>,
    /// `--archive`: where a dump puts one file instead of a directory.
    pub archive: Option<PathBuf>,
    pub compress: Option<String>,
    pub close_fds: Vec<i32>,
    pub status_fd: Option<i32>,
    pub display_stats: bool,
    pub action_scripts: Vec<String>,
    pub libdir: Option<PathBuf>,
    pub timeout: Duration,
    pub shell_job: bool,
    pub file_locks: bool,
    pub link_remap: bool,
    pub ghost_limit: ByteLimit,
    pub ghost_fiemap: bool,
    pub evasive_devices: bool,
    pub force_irmap: bool,
    pub irmap_scan_paths: Vec<PathBuf>,
    pub file_validation: FileValidation,
    pub skip_file_rwx_check: bool,
    pub weak_sysctls: bool,
    pub cpu_cap: CpuCapabilities,
    pub sockets: SocketOptions,
    pub mounts: MountOptions,
    pub cgroups: CgroupOptions,
    pub external: Vec<External>,
    pub inherit_fds: Vec<InheritFd>,
    pub join_ns: Vec<JoinNamespace>,
    pub veth_pairs: Vec<VethPair>,
    pub empty_net: bool,
    pub lsm_profile: Option<LsmProfile>,
    pub lsm_mount_context: Option<String>,
    pub track_mem: bool,
    pub tracker: TrackerChoice,
    /// `--iterate`: copy in rounds first.
    pub iterate: bool,
    pub rounds: IterateOptions,
    /// `--max-rate`: bytes that rounds copy in a second.
    pub max_rate: Option<ByteLimit>,
    pub auto_dedup: bool,
    pub pre_dump_mode: PreDumpMode,
    pub lazy_pages: bool,
    pub stream: bool,
    pub allow_uprobes: bool,
    pub unprivileged: bool,
    pub deprecated: bool,
    /// Only a request can ask for it.
    pub orphan_pts_master: bool,
    pub check: CheckSettings,
    pub server: ServerSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            help: false,
            version: false,
            config: None,
            no_default_config: false,
            log: LogSettings::default(),
            tree: None,
            images_dir: None,
            work_dir: None,
            prev_images_dir: None,
            pidfile: None,
            final_state: FinalState::default(),
            detached: false,
            sibling: false,
            exec_cmd: false,
            dry_run: false,
            new_pidns: false,
            archives: Vec::new(),
            archive: None,
            compress: None,
            close_fds: Vec::new(),
            status_fd: None,
            display_stats: false,
            action_scripts: Vec::new(),
            libdir: None,
            timeout: Duration::from_secs(10),
            shell_job: false,
            file_locks: false,
            link_remap: false,
            ghost_limit: ByteLimit::GHOST_DEFAULT,
            ghost_fiemap: true,
            evasive_devices: false,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            file_validation: FileValidation::default(),
            skip_file_rwx_check: false,
            weak_sysctls: false,
            cpu_cap: CpuCapabilities::DEFAULT,
            sockets: SocketOptions::default(),
            mounts: MountOptions::default(),
            cgroups: CgroupOptions::default(),
            external: Vec::new(),
            inherit_fds: Vec::new(),
            join_ns: Vec::new(),
            veth_pairs: Vec::new(),
            empty_net: false,
            lsm_profile: None,
            lsm_mount_context: None,
            track_mem: false,
            tracker: TrackerChoice::default(),
            iterate: false,
            rounds: IterateOptions::default(),
            max_rate: None,
            auto_dedup: false,
            pre_dump_mode: PreDumpMode::default(),
            lazy_pages: false,
            stream: false,
            allow_uprobes: false,
            unprivileged: false,
            deprecated: false,
            orphan_pts_master: false,
            check: CheckSettings::default(),
            server: ServerSettings::default(),
        }
    }
}
