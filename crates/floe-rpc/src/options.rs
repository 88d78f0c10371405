//! From `criu_opts` to settings: one mapping for every request.
//!
//! What names descriptors of the caller (directories, `status_fd`) is not here: see
//! [`crate::directories`]. `pidfd_store_sk` needs nothing: what stands for a task between two rounds knows it by
//! its start, so that nobody with the same pid is taken for it.

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use floe_image::messages::{
    CriuCgMode, CriuNetworkLockMethod, CriuOpts, CriuPageServerInfo, CriuPreDumpMode,
};
use floe_options::settings::FinalState;
use floe_options::{
    ByteLimit, CpuCapabilities, ExtMount, External, InheritFd, ManageCgroups, NetworkLock,
    PreDumpMode, Settings, TreePid, UsageError, VethPair, set_option,
};

/// The bit of the network namespace in `empty_ns`: the only one that CRIU takes (clone(2)).
const CLONE_NEWNET: u32 = 0x4000_0000;

/// Bits of `cpu_cap` in CRIU.
mod cpu_cap {
    pub const FPU: u32 = 1;
    pub const EXACT: u32 = 1 << 1;
    pub const INSTRUCTIONS: u32 = 1 << 2;
}

/// What is wrong with the options of a request.
#[derive(Debug, thiserror::Error)]
pub enum OptionError {
    /// A value that the option cannot have.
    #[error("{option} cannot be {value}: {expected}")]
    Value {
        option: &'static str,
        value: String,
        expected: &'static str,
    },
    /// A value in text that is wrong in itself.
    #[error(transparent)]
    Text(#[from] UsageError),
    /// Descriptors cannot be inherited from a caller who is not our parent.
    #[error("{0} needs `swrk`: the service is not started by the caller")]
    NeedsSwrk(&'static str),
}

fn bad(option: &'static str, value: impl ToString, expected: &'static str) -> OptionError {
    OptionError::Value {
        option,
        value: value.to_string(),
        expected,
    }
}

/// Whether the caller started us, so that we have its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// `swrk`: we are the caller's child.
    ByCaller,
    /// `service`.
    AsService,
}

/// Writes what a request says over `settings`; what it does not say stays.
pub fn apply(
    opts: &CriuOpts,
    started: Started,
    settings: &mut Settings,
) -> Result<(), OptionError> {
    tasks(opts, started, settings)?;
    sockets(opts, settings)?;
    mounts(opts, settings);
    cgroups(opts, settings)?;
    memory(opts, settings)?;
    outside(opts, started, settings)?;
    log(opts, settings)
}

/// Overwrites `field` where the request has a value.
fn set<T: Clone>(field: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        field.clone_from(value);
    }
}

fn set_path(field: &mut Option<PathBuf>, value: &Option<String>) {
    if let Some(path) = value {
        *field = Some(path.into());
    }
}

fn tasks(opts: &CriuOpts, started: Started, settings: &mut Settings) -> Result<(), OptionError> {
    if let Some(pid) = opts.pid {
        let tree = TreePid::new(pid);
        settings.tree = Some(tree.ok_or_else(|| bad("pid", pid, "it must be positive"))?);
    }
    if opts.leave_running == Some(true) {
        settings.final_state = FinalState::Running;
    }
    if opts.leave_stopped == Some(true) {
        settings.final_state = FinalState::Stopped;
    }
    // Nobody could wait for the end of the tree with us.
    settings.detached = true;
    if let Some(sibling) = opts.rst_sibling {
        if sibling && started == Started::AsService {
            return Err(OptionError::NeedsSwrk("rst_sibling"));
        }
        settings.sibling = sibling;
    }
    set(&mut settings.shell_job, &opts.shell_job);
    set(&mut settings.file_locks, &opts.file_locks);
    set(&mut settings.link_remap, &opts.link_remap);
    set(&mut settings.evasive_devices, &opts.evasive_devices);
    set(&mut settings.force_irmap, &opts.force_irmap);
    let scanned = opts.irmap_scan_paths.iter().map(PathBuf::from);
    settings.irmap_scan_paths.extend(scanned);
    set(&mut settings.weak_sysctls, &opts.weak_sysctls);
    set(&mut settings.skip_file_rwx_check, &opts.skip_file_rwx_check);
    set(&mut settings.unprivileged, &opts.unprivileged);
    set(&mut settings.orphan_pts_master, &opts.orphan_pts_master);
    set(&mut settings.display_stats, &opts.display_stats);
    if let Some(limit) = opts.ghost_limit {
        settings.ghost_limit = ByteLimit(limit.into());
    }
    if let Some(seconds) = opts.timeout {
        settings.timeout = Duration::from_secs(seconds.into());
    }
    if let Some(bits) = opts.cpu_cap {
        settings.cpu_cap = cpu_capabilities(bits);
    }
    if let Some(profile) = &opts.lsm_profile {
        set_option("lsm-profile", profile, settings)?;
    }
    if opts.lsm_mount_context.is_some() {
        settings
            .lsm_mount_context
            .clone_from(&opts.lsm_mount_context);
    }
    Ok(())
}

fn cpu_capabilities(bits: u32) -> CpuCapabilities {
    let fields = CpuCapabilities {
        fpu: bits & cpu_cap::FPU != 0,
        instructions: bits & cpu_cap::INSTRUCTIONS != 0,
        exact: bits & cpu_cap::EXACT != 0,
        image: false,
    };
    // Whoever names capabilities, if only that none matter, wants them in the images.
    CpuCapabilities {
        image: true,
        ..fields
    }
}

fn sockets(opts: &CriuOpts, settings: &mut Settings) -> Result<(), OptionError> {
    let sockets = &mut settings.sockets;
    set(&mut sockets.tcp_established, &opts.tcp_established);
    set(&mut sockets.tcp_close, &opts.tcp_close);
    set(&mut sockets.tcp_skip_in_flight, &opts.tcp_skip_in_flight);
    set(&mut sockets.external_unix, &opts.ext_unix_sk);
    if let Some(method) = opts.network_lock {
        sockets.network_lock = match CriuNetworkLockMethod::try_from(method) {
            Ok(CriuNetworkLockMethod::Iptables) => NetworkLock::Iptables,
            Ok(CriuNetworkLockMethod::Nftables) => NetworkLock::Nftables,
            Ok(CriuNetworkLockMethod::Skip) => NetworkLock::Skip,
            Err(_) => return Err(bad("network_lock", method, "1 to 3 are known")),
        };
    }
    let named = opts.unix_sk_ino.iter().map(|socket| External::UnixSocket {
        inode: socket.inode.into(),
    });
    settings.external.extend(named);
    Ok(())
}

fn mounts(opts: &CriuOpts, settings: &mut Settings) {
    let mounts = &mut settings.mounts;
    set_path(&mut mounts.root, &opts.root);
    let mapped = opts.ext_mnt.iter().map(|mount| ExtMount {
        key: mount.key.clone(),
        value: mount.val.clone(),
    });
    mounts.ext_mount_map.extend(mapped);
    set(&mut mounts.ext_mount_auto, &opts.auto_ext_mnt);
    set(&mut mounts.external_sharing, &opts.ext_sharing);
    set(&mut mounts.external_masters, &opts.ext_masters);
    mounts.skip.extend(opts.skip_mnt.iter().map(PathBuf::from));
    mounts.enable_fs.extend(opts.enable_fs.iter().cloned());
    set(&mut mounts.compat_mode, &opts.mntns_compat_mode);
}

fn cgroups(opts: &CriuOpts, settings: &mut Settings) -> Result<(), OptionError> {
    let cgroups = &mut settings.cgroups;
    if let Some(manage) = opts.manage_cgroups {
        cgroups.manage = match manage {
            true => ManageCgroups::Soft,
            false => ManageCgroups::Ignore,
        };
    }
    if let Some(mode) = opts.manage_cgroups_mode {
        cgroups.asked = true;
        cgroups.manage = match CriuCgMode::try_from(mode) {
            Ok(CriuCgMode::Ignore) => ManageCgroups::Ignore,
            Ok(CriuCgMode::CgNone) => ManageCgroups::None,
            Ok(CriuCgMode::Props) => ManageCgroups::Props,
            Ok(CriuCgMode::Soft | CriuCgMode::Default) => ManageCgroups::Soft,
            Ok(CriuCgMode::Full) => ManageCgroups::Full,
            Ok(CriuCgMode::Strict) => ManageCgroups::Strict,
            Err(_) => return Err(bad("manage_cgroups_mode", mode, "0 to 6 are known")),
        };
    }
    let roots = opts.cg_root.iter().map(|root| floe_options::CgroupRoot {
        controller: root.ctrl.clone(),
        path: root.path.clone(),
    });
    cgroups.roots.extend(roots);
    if opts.cgroup_props.is_some() {
        cgroups.props.clone_from(&opts.cgroup_props);
    }
    set_path(&mut cgroups.props_file, &opts.cgroup_props_file);
    let controllers = opts.cgroup_dump_controller.iter().cloned();
    cgroups.dump_controllers.extend(controllers);
    set_path(&mut cgroups.yard, &opts.cgroup_yard);
    set_path(&mut cgroups.freeze, &opts.freeze_cgroup);
    Ok(())
}

fn memory(opts: &CriuOpts, settings: &mut Settings) -> Result<(), OptionError> {
    set_path(&mut settings.prev_images_dir, &opts.parent_img);
    set(&mut settings.track_mem, &opts.track_mem);
    set(&mut settings.auto_dedup, &opts.auto_dedup);
    set(&mut settings.lazy_pages, &opts.lazy_pages);
    if let Some(mode) = opts.pre_dump_mode {
        settings.pre_dump_mode = match CriuPreDumpMode::try_from(mode) {
            Ok(CriuPreDumpMode::Splice) => PreDumpMode::Splice,
            Ok(CriuPreDumpMode::VmRead) => PreDumpMode::Read,
            Err(_) => return Err(bad("pre_dump_mode", mode, "1 and 2 are known")),
        };
    }
    if let Some(server) = &opts.ps {
        page_server(server, settings)?;
    }
    let server = &mut settings.server;
    set(&mut server.tls, &opts.tls);
    set(&mut server.tls_no_cn_verify, &opts.tls_no_cn_verify);
    set_path(&mut server.tls_cacert, &opts.tls_cacert);
    set_path(&mut server.tls_cacrl, &opts.tls_cacrl);
    set_path(&mut server.tls_cert, &opts.tls_cert);
    set_path(&mut server.tls_key, &opts.tls_key);
    Ok(())
}

fn page_server(info: &CriuPageServerInfo, settings: &mut Settings) -> Result<(), OptionError> {
    if let Some(port) = info.port {
        let port_in_range = u16::try_from(port);
        let port_in_range = port_in_range.map_err(|_| bad("ps.port", port, "0 to 65535"))?;
        settings.server.port = Some(port_in_range);
    }
    // With lazy pages the server is on our side.
    settings.server.use_page_server = !settings.lazy_pages;
    settings.server.address.clone_from(&info.address);
    settings.server.socket = info.fd;
    Ok(())
}

/// Resources that are outside of the checkpoint.
fn outside(opts: &CriuOpts, started: Started, settings: &mut Settings) -> Result<(), OptionError> {
    for text in &opts.external {
        set_option("external", text, settings)?;
    }
    if !opts.inherit_fd.is_empty() && started == Started::AsService {
        return Err(OptionError::NeedsSwrk("inherit_fd"));
    }
    for inherited in &opts.inherit_fd {
        if inherited.fd < 0 || inherited.key.is_empty() {
            let expected = "a descriptor and the resource that it stands for";
            return Err(bad("inherit_fd", inherited.fd, expected));
        }
        settings.inherit_fds.push(InheritFd {
            fd: inherited.fd,
            resource: inherited.key.clone(),
        });
    }
    for join in &opts.join_ns {
        let extra = join.extra_opt.as_deref().filter(|extra| !extra.is_empty());
        let extra = extra.map(|extra| format!(",{extra}")).unwrap_or_default();
        let text = format!("{}:{}{extra}", join.ns, join.ns_file);
        set_option("join-ns", &text, settings)?;
    }
    let pairs = opts.veths.iter().map(|pair| VethPair {
        inner: pair.if_in.clone(),
        outer: pair.if_out.clone(),
    });
    settings.veth_pairs.extend(pairs);
    if let Some(mask) = opts.empty_ns {
        if mask & !CLONE_NEWNET != 0 {
            return Err(bad("empty_ns", format!("{mask:#x}"), "only CLONE_NEWNET"));
        }
        settings.empty_net = mask != 0;
    }
    Ok(())
}

fn log(opts: &CriuOpts, settings: &mut Settings) -> Result<(), OptionError> {
    if let Some(level) = opts.log_level {
        settings.log.level = u32::try_from(level).unwrap_or(0);
    }
    match &opts.log_file {
        Some(name) if name.contains('/') || name.is_empty() => {
            return Err(bad("log_file", name, "a name without a directory"));
        }
        Some(name) => settings.log.file = Some(name.into()),
        None if opts.log_to_stderr == Some(true) => settings.log.file = Some("-".into()),
        None => {}
    }
    Ok(())
}
