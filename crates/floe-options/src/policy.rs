//! Option values that dump and restore share.

use std::fmt;
use std::path::{Path, PathBuf};

/// The pid of a tree's root, as the caller sees it; always positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TreePid(i32);

impl TreePid {
    /// Returns `None` for zero and negative numbers, which never name a task.
    pub fn new(pid: i32) -> Option<Self> {
        (pid > 0).then_some(Self(pid))
    }

    /// The number, for a system call.
    pub fn get(self) -> i32 {
        self.0
    }
}

impl fmt::Display for TreePid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The directories of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where the image files are (`-D`); relative to the current directory of the caller.
    pub images_dir: PathBuf,
    /// Where logs, pidfiles and `stats-*` go (`-W`); equal to `images_dir` when not given.
    pub work_dir: PathBuf,
    /// The parent generation's directory (`--prev-images-dir`), relative to `images_dir`.
    pub prev_images_dir: Option<PathBuf>,
}

impl Place {
    /// Images, logs and statistics all in `images_dir`, with no parent.
    pub fn new(images_dir: impl Into<PathBuf>) -> Self {
        let images_dir = images_dir.into();
        Self {
            work_dir: images_dir.clone(),
            images_dir,
            prev_images_dir: None,
        }
    }

    /// The path of an image file.
    pub fn image(&self, name: impl AsRef<Path>) -> PathBuf {
        self.images_dir.join(name)
    }

    /// The path of a file that belongs to this run: a log, a pidfile, statistics.
    pub fn work_file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.work_dir.join(name)
    }
}

/// A limit in bytes (`--ghost-limit`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteLimit(pub u64);

impl ByteLimit {
    /// The default of `--ghost-limit`: 1 MiB, as in CRIU.
    pub const GHOST_DEFAULT: Self = Self(1 << 20);
}

/// Which CPU capabilities are recorded and compared (`--cpu-cap`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCapabilities {
    /// The FPU state must fit the restoring CPU's xsave area.
    pub fpu: bool,
    /// Every instruction set that the image names must be there.
    pub instructions: bool,
    /// The capabilities must be exactly equal.
    pub exact: bool,
    /// `cpuinfo.img` is written at dump and read at restore.
    pub image: bool,
}

impl CpuCapabilities {
    /// What holds without the option: FPU and instructions. Unlike CRIU, the image is written and
    /// read without being asked for, so that a CPU without a used feature is noticed.
    pub const DEFAULT: Self = Self {
        fpu: true,
        instructions: true,
        exact: false,
        image: true,
    };
    /// No check at all (`--cpu-cap=none`).
    pub const NONE: Self = Self {
        fpu: false,
        instructions: false,
        exact: false,
        image: false,
    };
    /// Every check (`--cpu-cap` without a value, or `all`).
    pub const ALL: Self = Self {
        fpu: true,
        instructions: true,
        exact: true,
        image: true,
    };
}

impl Default for CpuCapabilities {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How packets of a dumped connection are held back (`--network-lock`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkLock {
    /// Rules by `iptables-restore`.
    Iptables,
    /// A table of our own in nftables. The default: it needs no program of the host's.
    #[default]
    Nftables,
    /// Nothing is locked; the caller has done so.
    Skip,
}

/// How the content of open files is compared at restore (`--file-validation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileValidation {
    /// By size only.
    FileSize,
    /// By ELF build-id where there is one, by size else.
    #[default]
    BuildId,
}

/// What happens to control groups (`--manage-cgroups`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ManageCgroups {
    /// As if there were none.
    Ignore,
    /// Tasks are placed; the groups must exist, properties are left alone.
    None,
    /// As `None`, and properties are written.
    Props,
    /// Missing groups are made and their properties written; existing ones are left alone.
    #[default]
    Soft,
    /// Groups are made and all properties written.
    Full,
    /// As `Full`, and no group may exist before.
    Strict,
}

/// A new root for a controller's groups (`--cgroup-root [CONTROLLER:]/PATH`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupRoot {
    /// `None` stands for every controller without a root of its own.
    pub controller: Option<String>,
    /// The new root.
    pub path: String,
}

/// Everything about control groups.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupOptions {
    /// Membership and properties.
    pub manage: ManageCgroups,
    /// True when the user wrote `--manage-cgroups`, so that a refusal may matter to them.
    pub asked: bool,
    /// New roots, in the order given.
    pub roots: Vec<CgroupRoot>,
    /// Extra controller properties in CRIU's small YAML (`--cgroup-props`).
    pub props: Option<String>,
    /// The same from a file (`--cgroup-props-file`).
    pub props_file: Option<PathBuf>,
    /// Only these controllers are dumped (`--cgroup-dump-controller`); empty means all.
    pub dump_controllers: Vec<String>,
    /// A directory with mounted hierarchies (`--cgroup-yard`).
    pub yard: Option<PathBuf>,
    /// The group by which the tree is frozen (`--freeze-cgroup`).
    pub freeze: Option<PathBuf>,
}

/// Everything about sockets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SocketOptions {
    /// Established TCP connections are saved and rebuilt (`--tcp-established`).
    pub tcp_established: bool,
    /// Established TCP connections are restored closed (`--tcp-close`).
    pub tcp_close: bool,
    /// Connections that are not accepted yet are left out (`--skip-in-flight`).
    pub tcp_skip_in_flight: bool,
    /// A unix socket's peer may be outside of the tree (`--ext-unix-sk`).
    pub external_unix: bool,
    /// How packets are held back.
    pub network_lock: NetworkLock,
}

/// Everything about mounts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MountOptions {
    /// The root of the tree's mount namespace (`--root`).
    pub root: Option<PathBuf>,
    /// `--ext-mount-map KEY:VALUE`, in the order given.
    pub ext_mount_map: Vec<crate::ExtMount>,
    /// `--ext-mount-map auto`.
    pub ext_mount_auto: bool,
    /// `--enable-external-sharing`.
    pub external_sharing: bool,
    /// `--enable-external-masters`.
    pub external_masters: bool,
    /// Mount points left out (`--skip-mnt`).
    pub skip: Vec<PathBuf>,
    /// File systems to be tried although unknown (`--enable-fs`); `all` stands for every one.
    pub enable_fs: Vec<String>,
    /// The older mount engine's order (`--mntns-compat-mode`).
    pub compat_mode: bool,
}
