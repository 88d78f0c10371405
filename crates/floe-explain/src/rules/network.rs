//! Sockets and network namespaces.

use super::{Role, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        pattern: r"[Ii]n-flight connection|--skip-in-flight",
        role: Role::Cause,
        what: "A connection is half made: it waits in the queue of a listening socket and the program has not accepted it yet.",
        remedy: "Leave such connections out; their clients try again.",
        command: "--skip-in-flight    # engines: tcp-skip-in-flight",
        threads: &[],
    },
    Rule {
        pattern: r"multipathtcp=0|[Uu]nsupported proto 262|MPTCP",
        role: Role::Cause,
        what: "A Go program (built with 1.24 or newer) listens by multipath TCP, whose state the kernel gives out to nobody.",
        remedy: "Switch multipath TCP off for that program.",
        command: "GODEBUG=multipathtcp=0",
        threads: &[],
    },
    Rule {
        pattern: r"Connected TCP socket|[Nn]eed to set the --tcp-close|TCP connection.*--tcp-(?:established|close)|--tcp-established",
        role: Role::Cause,
        what: "The program has an established TCP connection, and the engine was not told what to do with it. The choice must be the same on dump and on restore.",
        remedy: "Keep connections (same address on the other side), or let them appear closed.",
        command: "--tcp-established    # or: --tcp-close; the same on dump and on restore",
        threads: &["criu#286"],
    },
    Rule {
        pattern: r"[Uu]nsupported (?:socket )?proto(?:col)? (58|1|255)\b|raw socket|ICMP socket",
        role: Role::Cause,
        what: "The program holds a raw or ICMP socket (ping, keepalived, a DHCP client), which cannot be restored.",
        remedy: "Let the program close it before the dump, or end that helper.",
        command: "ss -wap    # shows which program holds it",
        threads: &["criu#540", "criu#2557", "criu#588"],
    },
    Rule {
        pattern: r"The socket has data to read",
        role: Role::Cause,
        what: "A netlink socket has messages that the program has not read. They cannot be put back.",
        remedy: "Try again a moment later, when the program has read them.",
        command: "repeat the dump    # seen often: let the program drain its netlink sockets",
        threads: &["criu#508"],
    },
    Rule {
        pattern: r"Can't dump half of stream unix connection|External socket is used|--ext-unix-sk|unix socket .*outside",
        role: Role::Cause,
        what: "A Unix socket is connected to a process outside of the tree: the system bus, the log daemon, an X server.",
        remedy: "Include that process, let the program close the connection, or declare the socket external so that it is connected again at the restore.",
        command: "--external unix[INODE]    # CRIU: --ext-unix-sk; inode from: ss -xp",
        threads: &[],
    },
    Rule {
        pattern: r#"Locking network failed|execvp\("?ip6?tables-restore|iptables-restore.*(?:returned|failed|No such)"#,
        role: Role::Cause,
        what: "The network could not be locked while the program is stopped: iptables is not installed or does not fit the kernel (nf_tables), or the module xt_mark is missing.",
        remedy: "Lock by nftables, which needs no program, or do without the lock if nobody else talks to the connections.",
        command: "--network-lock nftables    # or: --network-lock skip",
        threads: &["criu#2339", "criu#813"],
    },
    Rule {
        pattern: r"nft.*File exists|Could not process rule: File exists|no network after (?:a failed )?restore|CRIU table",
        role: Role::Cause,
        what: "Rules that lock the network were left by an earlier dump or restore that was killed. They block the connections, or the new rules collide with them.",
        remedy: "Delete the left table or chain in the network namespace of the program.",
        command: "nsenter -t PID -n nft list tables; nsenter -t PID -n nft delete table inet CRIU-PID",
        threads: &["criu#3135", "criu#2828", "criu#577"],
    },
    Rule {
        pattern: r"Can't get 1:16 opt: Operation not supported|SO_PASSCRED",
        role: Role::Cause,
        what: "Kernels from 6.16 on refuse to say whether a TCP socket passes credentials, and older engines take that for an error.",
        remedy: "Use an engine that knows it; Floe does.",
        command: "upgrade criu, or install floe as criu",
        threads: &["criu#2829"],
    },
];
