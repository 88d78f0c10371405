//! Every field of `criu_opts` reaches what it stands for, and none is forgotten.

use std::collections::BTreeSet;

use floe_image::messages::{
    CgroupRoot, CriuVethPair, ExtMountMap, InheritFd as InheritFdEntry, JoinNamespace, UnixSk,
};

use floe_options::{LsmKind, LsmProfile};

use super::*;

/// The table that messages are made of.
const SCHEMA: &str = include_str!("../../../floe-image/schema/messages.tsv");

/// A field, a value of it, and what the settings are then and are not before.
type Row = (&'static str, Fill, fn(&Settings) -> bool);
type Fill = fn(&mut CriuOpts);

/// Fields that are read where they matter, and what has tests for them.
const ELSEWHERE: [&str; 8] = [
    "images_dir_fd",  // directories.rs: tests/rpc.rs
    "images_dir",     // the same
    "work_dir_fd",    // the same
    "notify_scripts", // session.rs: tests/rpc.rs
    "exec_cmd",       // session.rs
    "config_file",    // session.rs: tests/rpc.rs
    "status_fd",      // session.rs: tests/rpc.rs
    "pidfd_store_sk", // see the head of options.rs
];

const ROWS: &[Row] = &[
    ("pid", |o| o.pid = Some(7), |s| s.tree == TreePid::new(7)),
    (
        "leave_running",
        |o| o.leave_running = Some(true),
        |s| s.final_state == FinalState::Running,
    ),
    (
        "leave_stopped",
        |o| o.leave_stopped = Some(true),
        |s| s.final_state == FinalState::Stopped,
    ),
    (
        "ext_unix_sk",
        |o| o.ext_unix_sk = Some(true),
        |s| s.sockets.external_unix,
    ),
    (
        "tcp_established",
        |o| o.tcp_established = Some(true),
        |s| s.sockets.tcp_established,
    ),
    (
        "tcp_close",
        |o| o.tcp_close = Some(true),
        |s| s.sockets.tcp_close,
    ),
    (
        "tcp_skip_in_flight",
        |o| o.tcp_skip_in_flight = Some(true),
        |s| s.sockets.tcp_skip_in_flight,
    ),
    (
        "network_lock",
        |o| o.network_lock = Some(CriuNetworkLockMethod::Skip.into()),
        |s| s.sockets.network_lock == NetworkLock::Skip,
    ),
    (
        "unix_sk_ino",
        |o| o.unix_sk_ino = vec![UnixSk { inode: 5 }],
        |s| s.external == [External::UnixSocket { inode: 5 }],
    ),
    (
        "evasive_devices",
        |o| o.evasive_devices = Some(true),
        |s| s.evasive_devices,
    ),
    ("shell_job", |o| o.shell_job = Some(true), |s| s.shell_job),
    (
        "file_locks",
        |o| o.file_locks = Some(true),
        |s| s.file_locks,
    ),
    (
        "link_remap",
        |o| o.link_remap = Some(true),
        |s| s.link_remap,
    ),
    (
        "force_irmap",
        |o| o.force_irmap = Some(true),
        |s| s.force_irmap,
    ),
    (
        "irmap_scan_paths",
        |o| o.irmap_scan_paths = vec!["/a".into()],
        |s| s.irmap_scan_paths == [PathBuf::from("/a")],
    ),
    (
        "weak_sysctls",
        |o| o.weak_sysctls = Some(true),
        |s| s.weak_sysctls,
    ),
    (
        "skip_file_rwx_check",
        |o| o.skip_file_rwx_check = Some(true),
        |s| s.skip_file_rwx_check,
    ),
    (
        "unprivileged",
        |o| o.unprivileged = Some(true),
        |s| s.unprivileged,
    ),
    (
        "orphan_pts_master",
        |o| o.orphan_pts_master = Some(true),
        |s| s.orphan_pts_master,
    ),
    (
        "ghost_limit",
        |o| o.ghost_limit = Some(9),
        |s| s.ghost_limit == ByteLimit(9),
    ),
    (
        "timeout",
        |o| o.timeout = Some(3),
        |s| s.timeout == Duration::from_secs(3),
    ),
    (
        "cpu_cap",
        |o| o.cpu_cap = Some(cpu_cap::EXACT),
        |s| s.cpu_cap.exact && s.cpu_cap.image && !s.cpu_cap.fpu,
    ),
    (
        "lsm_profile",
        |o| o.lsm_profile = Some("apparmor:one".into()),
        |s| matches!(&s.lsm_profile, Some(LsmProfile::Label(LsmKind::AppArmor, name)) if name == "one"),
    ),
    (
        "lsm_mount_context",
        |o| o.lsm_mount_context = Some("x".into()),
        |s| s.lsm_mount_context.as_deref() == Some("x"),
    ),
    ("rst_sibling", |o| o.rst_sibling = Some(true), |s| s.sibling),
    (
        "display_stats",
        |o| o.display_stats = Some(true),
        |s| s.display_stats,
    ),
    (
        "root",
        |o| o.root = Some("/r".into()),
        |s| s.mounts.root == Some("/r".into()),
    ),
    (
        "ext_mnt",
        |o| {
            o.ext_mnt = vec![ExtMountMap {
                key: "k".into(),
                val: "v".into(),
            }];
        },
        |s| {
            s.mounts
                .ext_mount_map
                .iter()
                .any(|map| (&*map.key, &*map.value) == ("k", "v"))
        },
    ),
    (
        "auto_ext_mnt",
        |o| o.auto_ext_mnt = Some(true),
        |s| s.mounts.ext_mount_auto,
    ),
    (
        "ext_sharing",
        |o| o.ext_sharing = Some(true),
        |s| s.mounts.external_sharing,
    ),
    (
        "ext_masters",
        |o| o.ext_masters = Some(true),
        |s| s.mounts.external_masters,
    ),
    (
        "skip_mnt",
        |o| o.skip_mnt = vec!["/s".into()],
        |s| s.mounts.skip == [PathBuf::from("/s")],
    ),
    (
        "enable_fs",
        |o| o.enable_fs = vec!["xfs".into()],
        |s| s.mounts.enable_fs == ["xfs"],
    ),
    (
        "mntns_compat_mode",
        |o| o.mntns_compat_mode = Some(true),
        |s| s.mounts.compat_mode,
    ),
    (
        "manage_cgroups",
        |o| o.manage_cgroups = Some(false),
        |s| s.cgroups.manage == ManageCgroups::Ignore,
    ),
    (
        "manage_cgroups_mode",
        |o| o.manage_cgroups_mode = Some(CriuCgMode::Strict.into()),
        |s| s.cgroups.manage == ManageCgroups::Strict && s.cgroups.asked,
    ),
    (
        "cg_root",
        |o| {
            o.cg_root = vec![CgroupRoot {
                ctrl: Some("cpu".into()),
                path: "/g".into(),
            }];
        },
        |s| {
            let of_cpu =
                |root: &floe_options::CgroupRoot| root.controller.as_deref() == Some("cpu");
            s.cgroups
                .roots
                .iter()
                .any(|root| of_cpu(root) && root.path == "/g")
        },
    ),
    (
        "cgroup_props",
        |o| o.cgroup_props = Some("p".into()),
        |s| s.cgroups.props.as_deref() == Some("p"),
    ),
    (
        "cgroup_props_file",
        |o| o.cgroup_props_file = Some("/p".into()),
        |s| s.cgroups.props_file == Some("/p".into()),
    ),
    (
        "cgroup_dump_controller",
        |o| o.cgroup_dump_controller = vec!["cpu".into()],
        |s| s.cgroups.dump_controllers == ["cpu"],
    ),
    (
        "cgroup_yard",
        |o| o.cgroup_yard = Some("/y".into()),
        |s| s.cgroups.yard == Some("/y".into()),
    ),
    (
        "freeze_cgroup",
        |o| o.freeze_cgroup = Some("/f".into()),
        |s| s.cgroups.freeze == Some("/f".into()),
    ),
    (
        "parent_img",
        |o| o.parent_img = Some("../one".into()),
        |s| s.prev_images_dir == Some("../one".into()),
    ),
    ("track_mem", |o| o.track_mem = Some(true), |s| s.track_mem),
    (
        "auto_dedup",
        |o| o.auto_dedup = Some(true),
        |s| s.auto_dedup,
    ),
    (
        "lazy_pages",
        |o| o.lazy_pages = Some(true),
        |s| s.lazy_pages,
    ),
    (
        "pre_dump_mode",
        |o| o.pre_dump_mode = Some(CriuPreDumpMode::VmRead.into()),
        |s| s.pre_dump_mode == PreDumpMode::Read,
    ),
    (
        "ps",
        |o| {
            o.ps = Some(CriuPageServerInfo {
                address: Some("192.0.2.1".into()),
                port: Some(7),
                fd: Some(9),
                ..CriuPageServerInfo::default()
            });
        },
        |s| {
            let server = &s.server;
            let place = (server.address.as_deref(), server.port, server.socket);
            server.use_page_server && place == (Some("192.0.2.1"), Some(7), Some(9))
        },
    ),
    ("tls", |o| o.tls = Some(true), |s| s.server.tls),
    (
        "tls_no_cn_verify",
        |o| o.tls_no_cn_verify = Some(true),
        |s| s.server.tls_no_cn_verify,
    ),
    (
        "tls_cacert",
        |o| o.tls_cacert = Some("a".into()),
        |s| s.server.tls_cacert == Some("a".into()),
    ),
    (
        "tls_cacrl",
        |o| o.tls_cacrl = Some("r".into()),
        |s| s.server.tls_cacrl == Some("r".into()),
    ),
    (
        "tls_cert",
        |o| o.tls_cert = Some("c".into()),
        |s| s.server.tls_cert == Some("c".into()),
    ),
    (
        "tls_key",
        |o| o.tls_key = Some("k".into()),
        |s| s.server.tls_key == Some("k".into()),
    ),
    (
        "external",
        |o| o.external = vec!["mnt[/a]:b".into()],
        |s| matches!(&s.external[..], [External::Mount { key, value }] if key == "/a" && value == "b"),
    ),
    (
        "inherit_fd",
        |o| {
            o.inherit_fd = vec![InheritFdEntry {
                key: "pipe:[1]".into(),
                fd: 4,
            }];
        },
        |s| {
            s.inherit_fds
                .iter()
                .any(|one| (one.fd, &*one.resource) == (4, "pipe:[1]"))
        },
    ),
    (
        "join_ns",
        |o| {
            o.join_ns = vec![JoinNamespace {
                ns: "net".into(),
                ns_file: "12".into(),
                extra_opt: None,
            }];
        },
        |s| {
            s.join_ns
                .iter()
                .any(|one| (&*one.kind, &*one.target) == ("net", "12"))
        },
    ),
    (
        "veths",
        |o| {
            o.veths = vec![CriuVethPair {
                if_in: "in".into(),
                if_out: "out".into(),
            }];
        },
        |s| {
            s.veth_pairs
                .iter()
                .any(|pair| (&*pair.inner, &*pair.outer) == ("in", "out"))
        },
    ),
    (
        "empty_ns",
        |o| o.empty_ns = Some(CLONE_NEWNET),
        |s| s.empty_net,
    ),
    ("log_level", |o| o.log_level = Some(4), |s| s.log.level == 4),
    (
        "log_file",
        |o| o.log_file = Some("l".into()),
        |s| s.log.file == Some("l".into()),
    ),
    (
        "log_to_stderr",
        |o| o.log_to_stderr = Some(true),
        |s| s.log.file == Some("-".into()),
    ),
];

fn empty() -> CriuOpts {
    CriuOpts {
        images_dir_fd: -1,
        ..CriuOpts::default()
    }
}

fn settings(opts: &CriuOpts) -> Settings {
    let mut settings = Settings::default();
    apply(opts, Started::ByCaller, &mut settings).expect("the values are good ones");
    settings
}

#[test]
fn every_field_reaches_the_option_that_it_stands_for() {
    let nothing = settings(&empty());
    for (field, fill, is_there) in ROWS {
        let mut opts = empty();
        fill(&mut opts);
        assert!(
            !is_there(&nothing),
            "{field} is there without being asked for"
        );
        assert!(is_there(&settings(&opts)), "{field} is lost");
    }
}

#[test]
fn no_field_is_forgotten() {
    let known: BTreeSet<&str> = ROWS.iter().map(|row| row.0).chain(ELSEWHERE).collect();
    let all: BTreeSet<&str> = SCHEMA
        .lines()
        .filter_map(|line| line.strip_prefix("rpc\tcriu_opts\t"))
        .filter_map(|line| line.split('\t').nth(1))
        .collect();
    assert_eq!(known, all);
    assert_eq!(ROWS.len() + ELSEWHERE.len(), all.len(), "a row for each");
}

#[test]
fn what_a_field_cannot_mean_is_refused_by_its_name() {
    let rows: [(&str, Fill); 10] = [
        ("pid", |o| o.pid = Some(0)),
        ("network_lock", |o| o.network_lock = Some(9)),
        ("pre_dump_mode", |o| o.pre_dump_mode = Some(9)),
        ("manage_cgroups_mode", |o| o.manage_cgroups_mode = Some(9)),
        ("empty_ns", |o| o.empty_ns = Some(1)),
        ("log_file", |o| o.log_file = Some("a/b".into())),
        ("external", |o| o.external = vec!["what".into()]),
        ("join-ns", |o| o.join_ns = vec![JoinNamespace::default()]),
        ("inherit_fd", |o| {
            o.inherit_fd = vec![InheritFdEntry::default()]
        }),
        ("ps.port", |o| {
            o.ps = Some(CriuPageServerInfo {
                port: Some(70_000),
                ..CriuPageServerInfo::default()
            });
        }),
    ];
    for (field, fill) in rows {
        let mut opts = empty();
        fill(&mut opts);
        let refused = apply(&opts, Started::ByCaller, &mut Settings::default());
        let text = refused.expect_err(field).to_string();
        assert!(text.contains(field), "{field}: {text}");
    }
    let as_service = |fill: fn(&mut CriuOpts)| {
        let mut opts = empty();
        fill(&mut opts);
        apply(&opts, Started::AsService, &mut Settings::default()).is_err()
    };
    assert!(as_service(|o| o.rst_sibling = Some(true)));
    assert!(as_service(
        |o| o.inherit_fd = vec![InheritFdEntry::default()]
    ));
}
