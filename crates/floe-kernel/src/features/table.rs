//! The table of features: one line each.

use super::Need::{Always, Experimental, Sometimes};
use super::{Feature, ProbeContext, files, memory, network, process};

macro_rules! features {
    (
        engine { $($name:ident $criu:tt $need:ident $purpose:literal $without:literal $probe:path;)* }
        check { $($cname:literal $ccriu:tt $cneed:ident $cpurpose:literal $cwithout:literal $cprobe:path;)* }
    ) => {
        /// What dump and restore decide by, as far as it is cheap to find out. What nothing works without,
        /// and what needs a child or a lookup of every socket, is only in [`FEATURES`]: an operation that
        /// lacks it fails by itself and says so.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct KernelFeatures {
            $(#[doc = $purpose] pub $name: bool,)*
        }

        impl KernelFeatures {
            /// Tries everything that dump and restore decide by; a fraction of a millisecond.
            pub fn probe() -> Self {
                let context = ProbeContext::default();
                Self { $($name: $probe(&context),)* }
            }

            /// Nothing is present: for tests, and to force fallbacks.
            pub fn none() -> Self {
                Self { $($name: false,)* }
            }
        }

        /// Every feature, in the order of `floe check`.
        pub const FEATURES: &[Feature] = &[
            $(Feature {
                name: stringify!($name), criu_names: &$criu, need: $need,
                purpose: $purpose, without: $without, probe: $probe,
            },)*
            $(Feature {
                name: $cname, criu_names: &$ccriu, need: $cneed,
                purpose: $cpurpose, without: $cwithout, probe: $cprobe,
            },)*
        ];
    };
}

features! {
engine {
    // Tasks
    pidfs [] Sometimes "pidfds with a stable inode" "pidfds held by programs cannot be told apart" process::pidfs;
    kcmp_epoll ["kcmp_epoll"] Sometimes "finding the descriptor behind an epoll entry"
        "epoll sets with closed or duplicated members are refused" process::kcmp_epoll;
    membarrier_registrations [] Sometimes "reading membarrier registrations"
        "a program's membarrier calls may fail after restore" process::membarrier_registrations;
    timer_restore_ids ["timer_cr_ids"] Sometimes "POSIX timers made with a chosen id"
        "timers with high ids are reached by making and deleting all the lower ones" process::timer_restore_ids;
    shadow_stack [] Experimental "user shadow stacks of this CPU" "nothing, unless a program uses them" process::shadow_stack;
    time_namespace ["timens"] Sometimes "time namespaces" "monotonic time jumps after a reboot" process::time_namespace;
    // Memory
    pagemap_scan ["pagemap_scan"] Sometimes "finding pages by PAGEMAP_SCAN"
        "pages are found through /proc/PID/pagemap, five times slower" memory::pagemap_scan;
    pagemap_scan_guard ["pagemap_scan_guard_pages"] Sometimes "seeing guard regions in PAGEMAP_SCAN"
        "guard regions are lost if there are any" memory::pagemap_scan_guard;
    madv_guard [] Sometimes "making guard regions" "programs with guard regions are refused" memory::madv_guard;
    userfaultfd ["uffd"] Sometimes "userfaultfd" "no lazy restore, no tracking by write protection" memory::userfaultfd;
    uffd_wp_async [] Sometimes "asynchronous write protection"
        "dirty pages cannot be tracked by userfaultfd" memory::uffd_wp_async;
    uffd_move [] Experimental "UFFDIO_MOVE" "pages are copied where they could be moved" memory::uffd_move;
    soft_dirty [] Sometimes "soft-dirty bits in pagemap" "another tracker is used" memory::soft_dirty;
    memfd_hugetlb ["memfd_hugetlb"] Sometimes "memfd of huge pages" "hugetlb memfds are refused" memory::memfd_hugetlb;
    // Files and mounts
    openat2 ["openat2"] Sometimes "paths that cannot leave a directory" "paths are checked one by one" files::openat2;
    move_mount ["move_mount_set_group"] Sometimes "building mounts out of place, with sharing groups"
        "complex mount propagation cannot be rebuilt" files::move_mount_set_group;
    mount_setattr [] Sometimes "changing a mount by handle" "mount flags are set by remounting" files::mount_setattr;
    // Network
    tcp_repair_window [] Sometimes "TCP_REPAIR_WINDOW" "connections resume with a small window" network::tcp_repair_window;
    unix_socket_file ["sk_unix_file"] Sometimes "opening the file of a bound unix socket"
        "renamed or deleted socket names are not found" network::unix_socket_file;
    socket_netns ["sk_ns"] Sometimes "the network namespace of a socket"
        "sockets of foreign namespaces are not noticed" network::socket_netns;
    scm_pidfd [] Sometimes "SO_PASSPIDFD" "the option is not restored" network::scm_pidfd;
    sockopt_buf_lock ["sockopt_buf_lock"] Sometimes "reading which socket buffers are fixed"
        "buffer sizes grow no more after restore" network::sockopt_buf_lock;
    ipv6_freebind ["ipv6_freebind"] Sometimes "IPV6_FREEBIND" "the option is not restored" network::ipv6_freebind;
    nftables ["nftables"] Sometimes "nftables" "established connections need --network-lock iptables or skip"
        network::nftables;
}
check {
    // Tasks
    "checkpoint_restore_cap" [] Always "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in effect"
        "pids cannot be chosen and /proc/PID/map_files stays closed: run as root" process::checkpoint_restore_cap;
    "clone3_set_tid" ["clone3_set_tid"] Always "clone3 with a chosen pid"
        "tasks cannot be restored under their pids" process::clone3_set_tid;
    "pidfd_open" [] Always "a stable handle for a task" "a reused pid could be taken for the task" process::pidfd_open;
    "pidfd_getfd" ["pidfd_store"] Always "taking a descriptor out of a task"
        "sockets and anonymous files cannot be examined" process::pidfd_getfd;
    "kcmp" [] Always "telling whether two tasks share an object" "shared descriptors would be split" process::kcmp;
    "ns_pid" ["ns_pid"] Sometimes "NSpid in /proc/PID/status" "pids in nested namespaces are unknown" process::ns_pid;
    "ptrace_peek_siginfo" [] Always "reading queued signals" "pending signals would be lost" process::ptrace_peek_siginfo;
    "ptrace_rseq_config" ["get_rseq_conf"] Sometimes "reading a thread's rseq registration"
        "programs of glibc 2.35 and newer would crash after restore" process::ptrace_rseq_config;
    "ptrace_suspend_seccomp" ["seccomp_suspend"] Sometimes "stopping seccomp while we work in a task"
        "tasks under strict seccomp filters cannot be saved" process::ptrace_suspend_seccomp;
    "ptrace_seccomp_filters" ["seccomp_filters"] Sometimes "reading seccomp filters"
        "tasks with filters are refused" process::ptrace_seccomp_filters;
    "ptrace_syscall_dispatch" [] Sometimes "reading syscall user dispatch"
        "programs that use it (wine) lose it" process::ptrace_syscall_dispatch;
    "ptrace_xstate" [] Always "reading the whole FPU state" "AVX and newer registers would be lost" process::ptrace_xstate;
    // Memory
    "prctl_mm_map" [] Always "setting the memory layout as /proc shows it"
        "command line, environment and auxv pointers cannot be restored" process::prctl_mm_map;
    "map_vdso" ["can_map_vdso"] Always "mapping the vDSO at a chosen address"
        "the vDSO cannot be put where it was" process::map_vdso;
    "map_files" [] Always "/proc/PID/map_files" "mappings of deleted files cannot be opened" memory::map_files;
    "memfd" [] Always "memfd_create" "anonymous shared memory cannot be rebuilt" memory::memfd;
    // Files and mounts
    "fdinfo_mnt_id" ["mnt_id"] Always "mnt_id in fdinfo" "a file's mount is unknown" files::fdinfo_mnt_id;
    "fdinfo_locks" ["fdinfo_lock"] Sometimes "locks in fdinfo" "file locks cannot be saved" files::fdinfo_locks;
    "timerfd_fdinfo" ["timerfd"] Sometimes "timerfd state in fdinfo and TFD_IOC_SET_TICKS"
        "timerfds are refused" files::timerfd_fdinfo;
    "cgroup2_freezer" [] Sometimes "freezing a cgroup v2 group" "tasks are stopped one by one" files::cgroup2_freezer;
    // Network
    "tcp_repair" [] Sometimes "TCP_REPAIR" "established connections cannot be saved" network::tcp_repair;
    "tcp_half_closed" ["tcp_half_closed"] Sometimes "TCP_REPAIR on closing connections"
        "half-closed connections are refused" network::tcp_half_closed;
    "unix_diag" [] Always "sock_diag for unix sockets" "unix sockets cannot be saved" network::unix_diag;
    "inet_diag" [] Always "sock_diag for TCP" "TCP sockets cannot be saved" network::inet_diag;
    "udp_diag" [] Sometimes "sock_diag for UDP" "UDP sockets cannot be saved" network::udp_diag;
    "raw_diag" ["net_diag_raw"] Sometimes "sock_diag for raw sockets" "raw sockets cannot be saved" network::raw_diag;
    "packet_diag" [] Sometimes "sock_diag for packet sockets" "packet sockets cannot be saved" network::packet_diag;
    "netlink_diag" [] Sometimes "sock_diag for netlink" "netlink sockets cannot be saved" network::netlink_diag;
    // The rest
    "mem_dirty_track" ["mem_dirty_track"] Sometimes "incremental dumps (--track-mem, pre-dump)"
        "every dump is a full one" memory::incremental_dumps;
    // Destroying a context takes tens of milliseconds, so no operation waits for this probe.
    "aio_remap" ["aio_remap"] Sometimes "moving the ring of an AIO context"
        "programs with AIO contexts are refused" memory::aio_remap;
    "uffd_noncoop" ["uffd-noncoop"] Sometimes "userfaultfd events of fork, mremap and madvise"
        "no lazy restore of programs that fork" memory::uffd_noncoop;
    "userns" ["userns"] Sometimes "user namespaces" "none can be restored" files::user_namespace;
    "cgroupns" ["cgroupns"] Sometimes "cgroup namespaces" "none can be restored" files::cgroup_namespace;
    "loginuid" ["loginuid"] Sometimes "/proc/PID/loginuid" "the login uid is not restored" files::loginuid;
    "tun" ["tun"] Sometimes "tun and tap devices" "programs with tun devices are refused" network::tun;
    "tun_ns" ["tun_ns"] Sometimes "the network namespace of a tun device"
        "tun devices of other namespaces are refused" network::tun_netns;
    "nsid" ["nsid"] Sometimes "ids of network namespaces" "links between namespaces cannot be rebuilt" network::nsid;
    "link_nsid" ["link_nsid"] Sometimes "a link's peer namespace"
        "veth pairs between saved namespaces are refused" network::nsid;
    "newifindex" ["newifindex"] Sometimes "moving a device with a chosen index"
        "device indexes may change" network::new_ifindex;
    "external_net_ns" ["external_net_ns"] Sometimes "network namespaces by name from outside"
        "nothing: it is the engine's own" files::always;
    "network_lock_nftables" ["network_lock_nftables"] Sometimes "locking connections by nftables"
        "use --network-lock iptables or skip" network::nftables;
    "iptables_legacy" ["has_ipt_legacy"] Sometimes "the older iptables in the kernel"
        "--network-lock iptables needs iptables-nft" network::iptables_legacy;
    "apparmor_stacking" ["apparmor_stacking"] Sometimes "AppArmor policy in namespaces"
        "tasks in namespaces of AppArmor policy cannot be restored" files::apparmor_stacking;
    "overlayfs_maps" ["overlayfs_maps"] Sometimes "overlayfs inode numbers in /proc/PID/maps"
        "mapped files on overlayfs are found by path" files::overlayfs_maps;
    "autofs" ["autofs"] Experimental "autofs" "autofs mounts are refused" files::autofs;
    "compat_cr" ["compat_cr"] Experimental "32-bit vDSO at a chosen address"
        "32-bit programs are refused" process::map_vdso_32;
    "breakpoints" ["breakpoints"] Experimental "hardware breakpoints by ptrace" "nothing: Floe needs none"
        process::breakpoints;
}
}
