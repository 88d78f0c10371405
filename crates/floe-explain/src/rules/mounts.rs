//! Mounts, and files on them.

use super::{Role, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        pattern: r"Can't lookup mount=(-?\d+) for fd=(-?\d+) path=(\S+)",
        role: Role::Cause,
        what: "Descriptor $2 ($3) lies on a mount that the dumped tree does not have: it was opened outside of the container, the wrong task was dumped, or the kernel reports a wrong mount for overlay.",
        remedy: "Dump the container's first process; restart the program with its standard streams inside the container or on /dev/null.",
        command: "ls -l /proc/PID/fd/$2; grep '^$1 ' /proc/*/mountinfo",
        threads: &["criu#860", "criu#1785", "criu#139"],
    },
    Rule {
        pattern: r"doesn't have a proper root mount",
        role: Role::Cause,
        what: "A file or directory of the host is mounted into the container (Docker does so with /etc/hosts), and nobody told the dump that it comes from outside.",
        remedy: "Declare such mounts external, or checkpoint through the container engine, which does it.",
        command: "--external 'mnt[]:'    # restore: the same",
        threads: &["criu#1511"],
    },
    Rule {
        pattern: r"has unreachable sharing|--enable-external-masters|receives from mounts outside of the tree",
        role: Role::Cause,
        what: "A mount receives mounts from a group whose other members are outside of the dump (a slave of the host's mount).",
        remedy: "Allow masters outside, or declare the mount external.",
        command: "--external 'mnt[]:ms'    # on dump and restore; CRIU: --ext-mount-map auto --enable-external-masters; one by one: --external 'mnt[MOUNTPOINT]:NAME'",
        threads: &["criu#1230"],
    },
    Rule {
        pattern: r"is autodetected external mount|--ext-mount-map auto",
        role: Role::Cause,
        what: "A mount of the tree comes from outside of it, and the dump was not allowed to leave such mounts out.",
        remedy: "Allow all mounts from outside, on dump and on restore.",
        command: "--external 'mnt[]'",
        threads: &[],
    },
    Rule {
        pattern: r"(\S+), which is to be mounted in the tree, cannot be reached",
        role: Role::Cause,
        what: "A mount of the tree comes from outside, from a place that was named by an option or that the dump found, and nothing is at $1.",
        remedy: "Bring it there, or name the place where it is on this machine.",
        command: "ls -ld $1; floe restore --external 'mnt[NAME]:PATH' --root DIR ...",
        threads: &[],
    },
    Rule {
        pattern: r"Bad format in (\d+) mountinfo",
        role: Role::Cause,
        what: "The engine could not read the list of mounts: old versions stop at long lines, which overlay file systems with many layers have.",
        remedy: "Use a newer engine; Floe reads lines of any length.",
        command: "criu --version    # upgrade, or install floe as criu",
        threads: &["criu#302", "moby#37808"],
    },
    Rule {
        pattern: r"Can't mount at (\S+): No such file",
        role: Role::Cause,
        what: "The place where a volume is to be mounted does not exist yet: some engines mount volumes only after the restore has begun.",
        remedy: "Start the restore from a container that was created with the same volumes, so that their directories are there.",
        command: "docker create ... -v SOURCE:TARGET IMAGE && docker start --checkpoint NAME CONTAINER",
        threads: &["moby#32227"],
    },
];
