//! The table of options: one line each drives the command line, configuration files and help.

use crate::command::Command;
use crate::settings::FinalState;
use crate::values;
use crate::{ExtMount, External, InheritFd, Settings, ValueError};

/// The commands that an option means something to; the help is arranged by it.
pub type For = &'static [Command];

const DUMP: For = &[Command::Dump];
const PRE_DUMP: For = &[Command::PreDump];
const DUMPS: For = &[Command::Dump, Command::PreDump];
const RESTORE: For = &[Command::Restore];
const BOTH: For = &[Command::Dump, Command::Restore];
const TREES: For = &[Command::Dump, Command::PreDump, Command::Restore];
const CHECK: For = &[Command::Check];
const CPU: For = &[Command::Dump, Command::Restore, Command::CpuinfoCheck];
/// Who sends or receives pages.
const PAGES: For = &[Command::Dump, Command::PreDump, Command::PageServer];
const SERVERS: For = &[Command::PageServer, Command::Service];
const ADDRESSES: For = &[
    Command::Dump,
    Command::PreDump,
    Command::PageServer,
    Command::Service,
];
/// Who starts a process that stays.
const STARTERS: For = &[Command::Restore, Command::PageServer, Command::Service];
const READY: For = &[
    Command::Dump,
    Command::PreDump,
    Command::Restore,
    Command::PageServer,
    Command::Service,
];
const DIRECTORIES: For = &[
    Command::Dump,
    Command::PreDump,
    Command::Restore,
    Command::CpuinfoDump,
    Command::CpuinfoCheck,
    Command::Dedup,
    Command::PageServer,
    Command::Service,
];
/// Every command.
pub const EVERY: For = &[];

/// What an option takes, and where it goes.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Nothing; `--no-NAME` turns it off.
    Switch(fn(&mut Settings) -> &mut bool),
    /// Nothing, and it cannot be negated.
    Plain(fn(&mut Settings)),
    /// A value, named for the help.
    Value(
        &'static str,
        fn(&mut Settings, &str) -> Result<(), ValueError>,
    ),
    /// A value only if attached: `--name=value`, `-nvalue`.
    Optional(
        &'static str,
        fn(&mut Settings, Option<&str>) -> Result<(), ValueError>,
    ),
}

/// One option.
#[derive(Clone, Copy)]
pub struct Flag {
    /// Without the dashes.
    pub long: &'static str,
    /// Without the dash.
    pub short: Option<char>,
    /// What it takes.
    pub kind: Kind,
    /// Who uses it.
    used_by: For,
    /// CRIU does not have it.
    pub own: bool,
    /// One line for the help; empty for what is only accepted.
    pub help: &'static str,
}

const fn switch(
    long: &'static str,
    used_by: For,
    field: fn(&mut Settings) -> &mut bool,
    help: &'static str,
) -> Flag {
    Flag {
        long,
        short: None,
        kind: Kind::Switch(field),
        used_by,
        own: false,
        help,
    }
}

const fn plain(
    long: &'static str,
    used_by: For,
    set: fn(&mut Settings),
    help: &'static str,
) -> Flag {
    Flag {
        long,
        short: None,
        kind: Kind::Plain(set),
        used_by,
        own: false,
        help,
    }
}

type Set = fn(&mut Settings, &str) -> Result<(), ValueError>;
type SetOptional = fn(&mut Settings, Option<&str>) -> Result<(), ValueError>;

const fn value(
    long: &'static str,
    name: &'static str,
    used_by: For,
    set: Set,
    help: &'static str,
) -> Flag {
    Flag {
        long,
        short: None,
        kind: Kind::Value(name, set),
        used_by,
        own: false,
        help,
    }
}

const fn optional(
    long: &'static str,
    name: &'static str,
    used_by: For,
    set: SetOptional,
    help: &'static str,
) -> Flag {
    Flag {
        long,
        short: None,
        kind: Kind::Optional(name, set),
        used_by,
        own: false,
        help,
    }
}

impl Flag {
    const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }

    const fn own(mut self) -> Self {
        self.own = true;
        self
    }

    /// Whether it means something to every command.
    pub fn is_for_every(&self) -> bool {
        self.used_by.is_empty()
    }

    /// Whether it means something to `command`.
    pub fn is_for(&self, command: Command) -> bool {
        self.is_for_every() || self.used_by.contains(&command)
    }

    /// The commands that it is for, in words.
    pub fn commands(&self) -> String {
        let names = self
            .used_by
            .iter()
            .map(|command| format!("`{}`", command.name()));
        names.collect::<Vec<_>>().join(" and ")
    }

    /// True if `--no-NAME` exists.
    pub fn is_negatable(&self) -> bool {
        matches!(self.kind, Kind::Switch(_))
    }
}

/// Shortens the setters that only store.
macro_rules! store {
    ($($field:ident).+) => { |s, v| { s.$($field).+ = Some(v.into()); Ok(()) } };
}
macro_rules! push {
    ($($field:ident).+) => { |s, v| { s.$($field).+.push(v.into()); Ok(()) } };
}
macro_rules! read {
    ($($field:ident).+, $with:expr) => { |s, v| { s.$($field).+ = $with(v)?; Ok(()) } };
}
macro_rules! add {
    ($($field:ident).+, $with:expr) => { |s, v| { s.$($field).+.push($with(v)?); Ok(()) } };
}

/// Every option of CRIU 4.2, and a few of our own.
#[rustfmt::skip] // a table
pub const FLAGS: &[Flag] = &[
    value("tree", "PID", DUMPS, |s, v| { s.tree = Some(values::tree_pid(v)?); Ok(()) },
        "the root of the tree to checkpoint").short('t'),
    value("images-dir", "DIR", DIRECTORIES, store!(images_dir), "where the images are (default: here)").short('D'),
    value("work-dir", "DIR", DIRECTORIES, store!(work_dir),
        "where logs, pidfiles and statistics go (default: -D)").short('W'),
    plain("leave-running", DUMP, |s| s.final_state = FinalState::Running,
        "let the tasks run on after the dump").short('R'),
    plain("leave-stopped", BOTH, |s| s.final_state = FinalState::Stopped, "leave the tasks stopped").short('s'),
    switch("restore-detached", RESTORE, |s| &mut s.detached, "leave once the tree runs").short('d'),
    switch("daemon", SERVERS, |s| &mut s.detached, "run in the background"),
    switch("restore-sibling", RESTORE, |s| &mut s.sibling,
        "make the root task our parent's child (with -d)").short('S'),
    plain("exec-cmd", RESTORE, |s| s.exec_cmd = true, "after the restore become the command after `--`"),
    value("pidfile", "FILE", STARTERS, store!(pidfile), "write the root's pid there"),
    switch("shell-job", BOTH, |s| &mut s.shell_job, "allow the caller's session and terminal").short('j'),
    switch("file-locks", BOTH, |s| &mut s.file_locks, "save and take file locks").short('l'),
    switch("link-remap", BOTH, |s| &mut s.link_remap, "link deleted files back where they have other names"),
    value("ghost-limit", "SIZE", DUMP, read!(ghost_limit, values::byte_limit),
        "largest deleted file that is saved (default: 1M)"),
    switch("ghost-fiemap", DUMP, |s| &mut s.ghost_fiemap, ""),
    switch("evasive-devices", DUMP, |s| &mut s.evasive_devices, "take any path to a device"),
    value("timeout", "SECONDS", DUMPS, |s, v| { s.timeout = std::time::Duration::from_secs(values::number(v, "a number of seconds")?); Ok(()) }, "longest time to stop all tasks (default: 10, 0: no limit)"),
    value("action-script", "FILE", TREES, push!(action_scripts), "run at each stage (CRTOOLS_SCRIPT_ACTION)"),
    optional("cpu-cap", "CAP", CPU, |s, v| { s.cpu_cap = values::cpu_cap(s.cpu_cap, v)?; Ok(()) },
        "CPU capabilities to record or compare: fpu, ins, cpu, all, none, ^CAP"),
    value("file-validation", "METHOD", BOTH, read!(file_validation, values::file_validation),
        "how open files are compared: filesize, buildid"),
    switch("skip-file-rwx-check", RESTORE, |s| &mut s.skip_file_rwx_check,
        "do not compare permissions of open files"),
    value("input", "FILE", RESTORE, push!(archives), "restore from an archive, `-` is standard input; \
        a base and its increments in any order").own().short('i'),
    plain("new-pidns", RESTORE, |s| s.new_pidns = true,
        "restore into a new pid namespace, where all pids are free").own(),
    plain("dry-run", RESTORE, |s| s.dry_run = true, "only check the images and show the plan").own(),
    switch("weak-sysctls", RESTORE, |s| &mut s.weak_sysctls, "leave out sysctls that are not here"),
    switch("allow-uprobes", BOTH, |s| &mut s.allow_uprobes, "allow mappings made by uprobes"),
    switch("unprivileged", EVERY, |s| &mut s.unprivileged, ""),
    switch("force-irmap", DUMP, |s| &mut s.force_irmap, "search names of watched files"),
    value("irmap-scan-path", "DIR", DUMP, push!(irmap_scan_paths), "where to search for watched files"),
    value("root", "DIR", BOTH, store!(mounts.root), "root of the tree's mounts").short('r'),
    value("libdir", "DIR", BOTH, store!(libdir), "").short('L'),
    // Resources outside of the checkpoint
    value("external", "RES", BOTH, add!(external, External::parse), "a resource that is not saved: TYPE[ID]:VALUE"),
    value("inherit-fd", "fd[N]:RES", RESTORE, add!(inherit_fds, InheritFd::parse), "our descriptor N stands for RES"),
    value("join-ns", "NS:WHERE", RESTORE, add!(join_ns, values::join_ns),
        "enter a namespace: a pid or a file").short('J'),
    value("empty-ns", "NS", BOTH, |s, v| match v { "net" => { s.empty_net = true; Ok(()) } other => Err(ValueError::choice(other, &["net"])), }, "make a namespace but leave it empty: net"),
    value("veth-pair", "IN=OUT", RESTORE, add!(veth_pairs, values::veth_pair), "names of a veth pair"),
    // Sockets
    switch("tcp-established", BOTH, |s| &mut s.sockets.tcp_established,
        "save and restore established TCP connections"),
    switch("skip-in-flight", DUMP, |s| &mut s.sockets.tcp_skip_in_flight, "leave out connections not accepted yet"),
    switch("tcp-skip-in-flight", DUMP, |s| &mut s.sockets.tcp_skip_in_flight, ""),
    switch("tcp-close", BOTH, |s| &mut s.sockets.tcp_close, "restore connections as closed"),
    optional("ext-unix-sk", "INODES", BOTH, external_unix, "allow unix sockets connected to outside").short('x'),
    value("network-lock", "METHOD", DUMP, read!(sockets.network_lock, values::network_lock),
        "how packets are held back: nftables (default), iptables, skip"),
    // Mounts
    value("ext-mount-map", "KEY:VALUE", BOTH, |s, v| { if v == "auto" { s.mounts.ext_mount_auto = true } else { s.mounts.ext_mount_map.push(ExtMount::parse(v)?) } Ok(()) }, "an external mount, or `auto`").short('M'),
    plain("enable-external-sharing", DUMP, |s| s.mounts.external_sharing = true, "allow mounts shared with outside"),
    plain("enable-external-masters", DUMP, |s| s.mounts.external_masters = true,
        "allow mounts that follow outside ones"),
    value("skip-mnt", "PATH", DUMP, push!(mounts.skip), "leave out a mount point"),
    value("enable-fs", "NAMES", BOTH, |s, v| { s.mounts.enable_fs.extend(v.split(',').map(Into::into)); Ok(()) },
        "try these file systems although unknown"),
    switch("mntns-compat-mode", RESTORE, |s| &mut s.mounts.compat_mode, ""),
    // Control groups and labels
    optional("manage-cgroups", "MODE", BOTH, |s, v| { s.cgroups.manage = values::manage_cgroups(v)?; s.cgroups.asked = true; Ok(()) }, "none, props, soft (default), full, strict, ignore"),
    value("cgroup-root", "[CTL:]/PATH", BOTH, |s, v| { s.cgroups.roots.push(values::cgroup_root(v)); Ok(()) },
        "new root of the groups"),
    value("cgroup-props", "TEXT", BOTH, store!(cgroups.props), "properties to save, as YAML"),
    value("cgroup-props-file", "FILE", BOTH, store!(cgroups.props_file), "the same from a file"),
    value("cgroup-dump-controller", "NAME", DUMP, push!(cgroups.dump_controllers), "save this controller only"),
    value("cgroup-yard", "DIR", BOTH, store!(cgroups.yard), "where hierarchies are mounted already"),
    value("freeze-cgroup", "DIR", DUMPS, store!(cgroups.freeze), "freeze the tree by this group"),
    value("lsm-profile", "TYPE:NAME", RESTORE, |s, v| { s.lsm_profile = Some(values::lsm_profile(v)?); Ok(()) },
        "label for tasks that had one: apparmor:NAME, selinux:LABEL, none"),
    value("lsm-mount-context", "CTX", RESTORE, store!(lsm_mount_context), "SELinux context for mounts that had one"),
    // Memory
    value("tracker", "NAME", DUMPS, read!(tracker, values::tracker),
        "how changes are found: auto, uffd, soft-dirty, content, none").own(),
    optional("iterate", "auto|N", DUMP, |s, v| { s.rounds = values::rounds(s.rounds, v)?; s.iterate = true; Ok(()) },
        "copy in rounds while the program runs, then only what changed last").own(),
    value("max-freeze", "TIME", DUMP, read!(rounds.max_freeze, values::duration),
        "with --iterate: stop for the rest when it takes no longer (default: 20ms)").own(),
    value("max-rounds", "N", DUMP, |s, v| { s.rounds.max_rounds = values::number(v, "a number of rounds")?; Ok(()) },
        "with --iterate: most rounds (default: 10)").own(),
    value("max-time", "TIME", DUMP, |s, v| { s.rounds.max_time = Some(values::duration(v)?); Ok(()) },
        "with --iterate: no round begins after this time").own(),
    value("max-rate", "SIZE", DUMPS, |s, v| { s.max_rate = Some(values::rate(v)?); Ok(()) },
        "rounds copy at most so much in a second: 100M").own(),
    value("compress", "CODEC", DUMPS, |s, v| { s.compress = Some(values::codec(v)?); Ok(()) },
        "compress the pages: lz4, zstd or zstd:LEVEL; only Floe reads them").own(),
    value("archive", "FILE", DUMP, store!(archive),
        "write one archive, `-` is standard output; restore -i reads it").own(),
    switch("track-mem", DUMPS, |s| &mut s.track_mem, "track changes from now on"),
    value("prev-images-dir", "DIR", PAGES, store!(prev_images_dir), "the generation before, relative to -D"),
    switch("auto-dedup", PAGES, |s| &mut s.auto_dedup, "punch out pages that are not needed any more"),
    value("pre-dump-mode", "MODE", PRE_DUMP, read!(pre_dump_mode, values::pre_dump_mode),
        "splice, read: the same to Floe"),
    plain("lazy-pages", BOTH, |s| s.lazy_pages = true, ""),
    switch("stream", BOTH, |s| &mut s.stream, ""),
    // Check
    switch("extra", CHECK, |s| &mut s.check.extra, "features that only some programs need, too"),
    switch("experimental", CHECK, |s| &mut s.check.experimental, "experimental ones, too"),
    plain("all", CHECK, |s| (s.check.extra, s.check.experimental) = (true, true), "every feature"),
    value("feature", "NAME", CHECK, store!(check.feature),
        "only this one, answered by the exit code; `list` lists them"),
    plain("ms", CHECK, |_| {}, ""),
    // Servers
    switch("page-server", DUMPS, |s| &mut s.server.use_page_server, "send pages to a page server"),
    value("address", "ADDR", ADDRESSES, store!(server.address), "address of the server"),
    value("port", "PORT", PAGES, |s, v| { s.server.port = Some(values::number::<std::num::NonZeroU16>(v, "a port from 1 to 65535")?.get()); Ok(()) }, "port of the server"),
    value("ps-socket", "FD", PAGES, |s, v| { s.server.socket = Some(values::descriptor(v)?); Ok(()) },
        "an open socket to use"),
    switch("tls", SERVERS, |s| &mut s.server.tls, ""),
    plain("tls-no-cn-verify", SERVERS, |s| s.server.tls_no_cn_verify = true, ""),
    value("tls-cacert", "FILE", SERVERS, store!(server.tls_cacert), ""),
    value("tls-cacrl", "FILE", SERVERS, store!(server.tls_cacrl), ""),
    value("tls-cert", "FILE", SERVERS, store!(server.tls_cert), ""),
    value("tls-key", "FILE", SERVERS, store!(server.tls_key), ""),
    // Logs and the rest
    value("log-file", "FILE", EVERY, store!(log.file), "log there instead of standard error").short('o'),
    optional("verbosity", "N", EVERY, |s, v| { s.log.level = values::verbosity(s.log.level, v)?; Ok(()) },
        "0 silent, 1 errors, 2 warnings (default), 3 information, 4 debug").short('v'),
    switch("log-pid", EVERY, |s| &mut s.log.per_task, ""),
    switch("display-stats", TREES, |s| &mut s.display_stats, "print statistics at the end"),
    value("status-fd", "FD", READY, |s, v| { s.status_fd = Some(values::descriptor(v)?); Ok(()) },
        "write a zero byte there when ready"),
    value("close", "FD", EVERY, add!(close_fds, values::descriptor), "close an inherited descriptor first"),
    value("config", "FILE", EVERY, store!(config), "read this configuration file, and not the default ones"),
    plain("no-default-config", EVERY, |s| s.no_default_config = true, "do not read the default configuration files"),
    switch("deprecated", EVERY, |s| &mut s.deprecated, ""),
    plain("help", EVERY, |s| s.help = true, "show this text").short('h'),
    plain("version", EVERY, |s| s.version = true, "show the version").short('V'),
];

/// `-x` allows all; `-x123,456` names the inodes.
fn external_unix(settings: &mut Settings, inodes: Option<&str>) -> Result<(), ValueError> {
    settings.sockets.external_unix = true;
    for inode in inodes
        .unwrap_or("")
        .split(',')
        .filter(|inode| !inode.is_empty())
    {
        let inode = values::number(inode, "inode numbers, separated by commas")?;
        settings.external.push(External::UnixSocket { inode });
    }
    Ok(())
}
