//! What runtimes and container engines pass on: mostly not the cause itself.

use super::{Role, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        pattern: r"custom checkpointdir is not supported",
        role: Role::Cause,
        what: "Docker's daemon takes checkpoints only from its own place and refuses another directory on start.",
        remedy: "Copy the checkpoint to the container's directory and start it from there.",
        command: "cp -a DIR/NAME /var/lib/docker/containers/ID/checkpoints/ && docker start --checkpoint NAME CONTAINER",
        threads: &["moby#37344"],
    },
    Rule {
        pattern: r"unrecogni[sz]ed option '?--pre-dump",
        role: Role::Cause,
        what: "This crun was built against a libcriu without pre-dump (3.16.1 or older).",
        remedy: "Use a newer crun, or runc, for checkpoints with a pre-dump.",
        command: "crun --version; podman --runtime runc container checkpoint --pre-checkpoint NAME",
        threads: &["criu#1618"],
    },
    Rule {
        pattern: r"(?:restore|dump)\.log:? .*(?:No such file|missing|not found)|(?:No such file|missing|not found).*(?:restore|dump)\.log",
        role: Role::Consequence,
        what: "The engine has already deleted its work directory, and with it the log that names the cause.",
        remedy: "Send the log to a place that lasts and try again.",
        command: "echo 'log-file /var/log/criu.log' >> /etc/criu/runc.conf    # crun: /etc/criu/crun.conf",
        threads: &["criu#2366", "criu#826"],
    },
    Rule {
        pattern: r"criu failed: type (?:NOTIFY|DUMP|RESTORE|PRE_DUMP)",
        role: Role::Symptom,
        what: "The runtime only says that the engine below it failed (the 0 after `errno` means nothing). The cause is in the engine's own log.",
        remedy: "Explain that log: its first error is the cause.",
        command: "floe explain /run/containerd/*/*/*/criu-dump.log    # or dump.log, restore.log in the work directory",
        threads: &["criu#1127", "criu#874", "criu#2530"],
    },
    Rule {
        pattern: r"CRIU (?:checkpointing|restoring) failed:? -52|Invalid exchange|EBADE",
        role: Role::Symptom,
        what: "crun passes on error 52, which means only that the engine answered `not successful`. The cause is in the engine's own log.",
        remedy: "Explain that log: its first error is the cause.",
        command: "floe explain dump.log    # in the work path that crun was given, or in the bundle",
        threads: &["criu#1418", "crun#1651"],
    },
    Rule {
        pattern: r"(?:CRIU|criu|checkpoint|restor)\w* failed:? -(?:70|111|74)\b|ECOMM|EBADMSG|Communication error on send|Bad message|(?i:criu).*Connection refused",
        role: Role::Cause,
        what: "The library could not start or reach the engine (70), its service refused the connection (111), or its answer was damaged (74).",
        remedy: "See that the binary is in the PATH of the runtime's service, runs, and answers.",
        command: "command -v criu && criu check",
        threads: &["criu#1318"],
    },
];
