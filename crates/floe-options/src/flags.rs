//! The table of options: one line each drives the command line, configuration files and help.

use crate::settings::FinalState;
use crate::values;
use crate::{ExtMount, External, InheritFd, Settings, ValueError};

/// Which commands an option means something to; the help is arranged by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    Every,
    Dump,
    Restore,
    Both,
    Check,
    Server,
}

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
    pub used_by: For,
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
        help,
    }
}

impl Flag {
    const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
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

use For::{Both, Check, Dump, Every, Restore, Server};

/// Every option of CRIU 4.2, and a few of our own.
#[rustfmt::skip] // a table
pub const FLAGS: &[Flag] = &[
    value("tree", "PID", Dump, |s, v| { s.tree = Some(values::tree_pid(v)?); Ok(()) },
        "the root of the tree to checkpoint").short('t'),
    value("images-dir", "DIR", Every, store!(images_dir), "where the images are (default: here)").short('D'),
    value("work-dir", "DIR", Every, store!(work_dir),
        "where logs, pidfiles and statistics go (default: -D)").short('W'),
    plain("leave-running", Dump, |s| s.final_state = FinalState::Running,
        "let the tasks run on after the dump").short('R'),
    plain("leave-stopped", Both, |s| s.final_state = FinalState::Stopped, "leave the tasks stopped").short('s'),
    switch("restore-detached", Restore, |s| &mut s.detached, "leave once the tree runs").short('d'),
    switch("daemon", Server, |s| &mut s.detached, "run in the background"),
    switch("restore-sibling", Restore, |s| &mut s.sibling,
        "make the root task our parent's child (with -d)").short('S'),
    plain("exec-cmd", Restore, |s| s.exec_cmd = true, "after the restore become the command after `--`"),
    value("pidfile", "FILE", Both, store!(pidfile), "write the root's pid there"),
    switch("shell-job", Both, |s| &mut s.shell_job, "allow the caller's session and terminal").short('j'),
    switch("file-locks", Both, |s| &mut s.file_locks, "save and take file locks").short('l'),
    switch("link-remap", Both, |s| &mut s.link_remap, "link deleted files back where they have other names"),
    value("ghost-limit", "SIZE", Dump, read!(ghost_limit, values::byte_limit),
        "largest deleted file that is saved (default: 1M)"),
    switch("ghost-fiemap", Dump, |s| &mut s.ghost_fiemap, "find holes of deleted files by fiemap (default)"),
    switch("evasive-devices", Both, |s| &mut s.evasive_devices, "take any path to a device"),
    value("timeout", "SECONDS", Dump, |s, v| { s.timeout = std::time::Duration::from_secs(values::number(v, "a number of seconds")?); Ok(()) }, "longest time to stop all tasks (default: 10, 0: no limit)"),
    value("action-script", "FILE", Both, push!(action_scripts), "run at each stage (CRTOOLS_SCRIPT_ACTION)"),
    optional("cpu-cap", "CAP", Both, |s, v| { s.cpu_cap = values::cpu_cap(s.cpu_cap, v)?; Ok(()) },
        "CPU capabilities to record or compare: fpu, ins, cpu, all, none, ^CAP"),
    value("file-validation", "METHOD", Both, read!(file_validation, values::file_validation),
        "how open files are compared: filesize, buildid"),
    switch("skip-file-rwx-check", Restore, |s| &mut s.skip_file_rwx_check,
        "do not compare permissions of open files"),
    value("input", "FILE", Restore, push!(archives), "restore from an archive, `-` is standard input; \
        a base and its increments in any order (not in CRIU)").short('i'),
    plain("new-pidns", Restore, |s| s.new_pidns = true,
        "restore into a new pid namespace, where all pids are free (not in CRIU)"),
    plain("dry-run", Restore, |s| s.dry_run = true, "only check the images and show the plan (not in CRIU)"),
    switch("weak-sysctls", Restore, |s| &mut s.weak_sysctls, "leave out sysctls that are not here"),
    switch("allow-uprobes", Both, |s| &mut s.allow_uprobes, "allow mappings made by uprobes"),
    switch("unprivileged", Every, |s| &mut s.unprivileged, "accept the limits of running without root"),
    switch("force-irmap", Dump, |s| &mut s.force_irmap, "search names of watched files"),
    value("irmap-scan-path", "DIR", Dump, push!(irmap_scan_paths), "where to search for watched files"),
    value("root", "DIR", Both, store!(mounts.root), "root of the tree's mounts").short('r'),
    value("libdir", "DIR", Both, store!(libdir), "directory of plugins").short('L'),
    // Resources outside of the checkpoint
    value("external", "RES", Both, add!(external, External::parse), "a resource that is not saved: TYPE[ID]:VALUE"),
    value("inherit-fd", "fd[N]:RES", Restore, add!(inherit_fds, InheritFd::parse), "our descriptor N stands for RES"),
    value("join-ns", "NS:WHERE", Restore, add!(join_ns, values::join_ns),
        "enter a namespace: a pid or a file").short('J'),
    value("empty-ns", "NS", Both, |s, v| match v { "net" => { s.empty_net = true; Ok(()) } other => Err(ValueError::choice(other, &["net"])), }, "make a namespace but leave it empty: net"),
    value("veth-pair", "IN=OUT", Restore, add!(veth_pairs, values::veth_pair), "names of a veth pair"),
    // Sockets
    switch("tcp-established", Both, |s| &mut s.sockets.tcp_established,
        "save and restore established TCP connections"),
    switch("skip-in-flight", Dump, |s| &mut s.sockets.tcp_skip_in_flight, "leave out connections not accepted yet"),
    switch("tcp-skip-in-flight", Dump, |s| &mut s.sockets.tcp_skip_in_flight, ""),
    switch("tcp-close", Both, |s| &mut s.sockets.tcp_close, "restore connections as closed"),
    optional("ext-unix-sk", "INODES", Both, external_unix, "allow unix sockets connected to outside").short('x'),
    value("network-lock", "METHOD", Dump, read!(sockets.network_lock, values::network_lock),
        "how packets are held back: nftables (default), iptables, skip"),
    // Mounts
    value("ext-mount-map", "KEY:VALUE", Both, |s, v| { if v == "auto" { s.mounts.ext_mount_auto = true } else { s.mounts.ext_mount_map.push(ExtMount::parse(v)?) } Ok(()) }, "an external mount, or `auto`").short('M'),
    plain("enable-external-sharing", Dump, |s| s.mounts.external_sharing = true, "allow mounts shared with outside"),
    plain("enable-external-masters", Dump, |s| s.mounts.external_masters = true,
        "allow mounts that follow outside ones"),
    value("skip-mnt", "PATH", Dump, push!(mounts.skip), "leave out a mount point"),
    value("enable-fs", "NAMES", Both, |s, v| { s.mounts.enable_fs.extend(v.split(',').map(Into::into)); Ok(()) },
        "try these file systems although unknown"),
    switch("mntns-compat-mode", Restore, |s| &mut s.mounts.compat_mode, "older order of mounting"),
    // Control groups and labels
    optional("manage-cgroups", "MODE", Both, |s, v| { s.cgroups.manage = values::manage_cgroups(v)?; s.cgroups.asked = true; Ok(()) }, "none, props, soft (default), full, strict, ignore"),
    value("cgroup-root", "[CTL:]/PATH", Both, |s, v| { s.cgroups.roots.push(values::cgroup_root(v)); Ok(()) },
        "new root of the groups"),
    value("cgroup-props", "TEXT", Both, store!(cgroups.props), "properties to save, as YAML"),
    value("cgroup-props-file", "FILE", Both, store!(cgroups.props_file), "the same from a file"),
    value("cgroup-dump-controller", "NAME", Dump, push!(cgroups.dump_controllers), "save this controller only"),
    value("cgroup-yard", "DIR", Both, store!(cgroups.yard), "where hierarchies are mounted already"),
    value("freeze-cgroup", "DIR", Dump, store!(cgroups.freeze), "freeze the tree by this group"),
    value("lsm-profile", "TYPE:NAME", Restore, |s, v| { s.lsm_profile = Some(values::lsm_profile(v)?); Ok(()) },
        "label for tasks that had one: apparmor:NAME, selinux:LABEL, none"),
    value("lsm-mount-context", "CTX", Restore, store!(lsm_mount_context), "SELinux context for mounts that had one"),
    // Memory
    value("tracker", "NAME", Dump, read!(tracker, values::tracker),
        "how changes are found: auto, uffd, soft-dirty, content, none (not in CRIU)"),
    optional("iterate", "auto|N", Dump, |s, v| { s.rounds = values::rounds(s.rounds, v)?; s.iterate = true; Ok(()) },
        "copy in rounds while the program runs, then only what changed last (not in CRIU)"),
    value("max-freeze", "TIME", Dump, read!(rounds.max_freeze, values::duration),
        "with --iterate: stop for the rest when it takes no longer (default: 20ms; not in CRIU)"),
    value("max-rounds", "N", Dump, |s, v| { s.rounds.max_rounds = values::number(v, "a number of rounds")?; Ok(()) },
        "with --iterate: most rounds (default: 10; not in CRIU)"),
    value("max-time", "TIME", Dump, |s, v| { s.rounds.max_time = Some(values::duration(v)?); Ok(()) },
        "with --iterate: no round begins after this time (not in CRIU)"),
    value("max-rate", "SIZE", Dump, |s, v| { s.max_rate = Some(values::rate(v)?); Ok(()) },
        "rounds copy at most so much in a second: 100M (not in CRIU)"),
    value("compress", "CODEC", Dump, |s, v| { s.compress = Some(values::codec(v)?); Ok(()) },
        "compress the pages: lz4, zstd or zstd:LEVEL; only Floe reads them (not in CRIU)"),
    value("archive", "FILE", Dump, store!(archive),
        "write one archive, `-` is standard output; restore -i reads it (not in CRIU)"),
    switch("track-mem", Dump, |s| &mut s.track_mem, "track changes from now on"),
    value("prev-images-dir", "DIR", Dump, store!(prev_images_dir), "the generation before, relative to -D"),
    switch("auto-dedup", Both, |s| &mut s.auto_dedup, "punch out pages that are not needed any more"),
    value("pre-dump-mode", "MODE", Dump, read!(pre_dump_mode, values::pre_dump_mode),
        "splice, read: the same to Floe"),
    plain("lazy-pages", Both, |s| s.lazy_pages = true, "fill memory on demand"),
    switch("stream", Both, |s| &mut s.stream, "images through criu-image-streamer"),
    // Check
    switch("extra", Check, |s| &mut s.check.extra, "features that only some programs need, too"),
    switch("experimental", Check, |s| &mut s.check.experimental, "experimental ones, too"),
    plain("all", Check, |s| (s.check.extra, s.check.experimental) = (true, true), "every feature"),
    value("feature", "NAME", Check, store!(check.feature),
        "only this one, answered by the exit code; `list` lists them"),
    plain("ms", Check, |_| {}, ""),
    // Servers
    switch("page-server", Dump, |s| &mut s.server.use_page_server, "send pages to a page server"),
    value("address", "ADDR", Server, store!(server.address), "address of the server"),
    value("port", "PORT", Server, |s, v| { s.server.port = Some(values::number::<std::num::NonZeroU16>(v, "a port from 1 to 65535")?.get()); Ok(()) }, "port of the server"),
    value("ps-socket", "FD", Server, |s, v| { s.server.socket = Some(values::descriptor(v)?); Ok(()) },
        "an open socket to use"),
    switch("tls", Server, |s| &mut s.server.tls, "encrypt"),
    plain("tls-no-cn-verify", Server, |s| s.server.tls_no_cn_verify = true, "do not compare the server's name"),
    value("tls-cacert", "FILE", Server, store!(server.tls_cacert), "trusted authority"),
    value("tls-cacrl", "FILE", Server, store!(server.tls_cacrl), "revoked certificates"),
    value("tls-cert", "FILE", Server, store!(server.tls_cert), "our certificate"),
    value("tls-key", "FILE", Server, store!(server.tls_key), "our key"),
    // Logs and the rest
    value("log-file", "FILE", Every, store!(log.file), "log there instead of standard error").short('o'),
    optional("verbosity", "N", Every, |s, v| { s.log.level = values::verbosity(s.log.level, v)?; Ok(()) },
        "0 silent, 1 errors, 2 warnings (default), 3 information, 4 debug").short('v'),
    switch("log-pid", Every, |s| &mut s.log.per_task, "a log for each task"),
    switch("display-stats", Both, |s| &mut s.display_stats, "print statistics at the end"),
    value("status-fd", "FD", Every, |s, v| { s.status_fd = Some(values::descriptor(v)?); Ok(()) },
        "write a zero byte there when ready"),
    value("close", "FD", Every, add!(close_fds, values::descriptor), "close an inherited descriptor first"),
    value("config", "FILE", Every, store!(config), "read this configuration file, and not the default ones"),
    plain("no-default-config", Every, |s| s.no_default_config = true, "do not read the default configuration files"),
    switch("deprecated", Every, |s| &mut s.deprecated, ""),
    plain("help", Every, |s| s.help = true, "show this text").short('h'),
    plain("version", Every, |s| s.version = true, "show the version").short('V'),
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
