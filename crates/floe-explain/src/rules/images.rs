//! Images: missing, damaged, of another machine.

use super::{Role, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        pattern: r"Unexpected EOF on \(empty-image\)|(\S+\.img) is missing in ",
        role: Role::Cause,
        what: "An image that every checkpoint has is not in the images directory. Either the option points one directory too high or too deep, or only a part was copied, or the link `parent` leads nowhere, or only a pre-dump was made.",
        remedy: "Let Floe list what is there, what is missing and where it seems to be; then give that directory, or copy the checkpoint again with its links.",
        command: "floe verify DIR    # then: floe restore -D THE_DIRECTORY_IT_NAMES",
        threads: &["criu#2454"],
    },
    Rule {
        pattern: r"The parent link in|Can't open parent|No parent pagemap|Opening the images directory .*/parent",
        role: Role::Cause,
        what: "The checkpoint builds on an earlier one through the link `parent`, and that directory is not where the link points. Incremental checkpoints need the whole chain.",
        remedy: "Copy the earlier directories too, keeping their places relative to each other, or make one full checkpoint where the chain is whole.",
        command: "floe squash DIR    # or copy with: rsync -aH --links CHAIN/ host:CHAIN/",
        threads: &["criu#2454"],
    },
    Rule {
        pattern: r"Unexpected EOF on (\S+)|Img trimmed|Magic doesn't match|ends too early|is no \w+ image|Magic mismatch",
        role: Role::Cause,
        what: "An image file is cut short, or is another kind of file than its name says. Most often the copy was interrupted, or images of two checkpoints were mixed in one directory.",
        remedy: "Compare the files with the manifest and copy the checkpoint again into an empty directory.",
        command: "floe verify DIR",
        threads: &[],
    },
    Rule {
        pattern: r"FPU feature required by image is not supported|[Cc]pu .*do(?:es)? not match|CPU .* do(?:es)? not match run ?time|This CPU lacks|This CPU's capabilities|exit(?:ed)?(?: with)?(?: code| status)? \(?132\)?|SIGILL|[Ii]llegal instruction",
        role: Role::Cause,
        what: "The CPU here lacks instructions or register state that the CPU of the dump had, and the program may use them: it chose its code by CPUID when it started. Going on can end it with SIGILL (exit 132).",
        remedy: "Restore on a CPU with these features, or give both virtual machines the same CPU model. Only if you know that the program never uses them, switch the comparison off.",
        command: "floe verify DIR    # lists the missing features; to go on anyway: --cpu-cap=none",
        threads: &["podman#17496"],
    },
    Rule {
        pattern: r"Missing required plugin: (\S+)",
        role: Role::Cause,
        what: "The checkpoint was made with the plugin `$1`, which saved state that only it can restore, and this engine does not find it.",
        remedy: "Install the plugin and name its directory, in the version that made the images.",
        command: "--libdir DIRECTORY_OF_PLUGINS",
        threads: &[],
    },
    Rule {
        pattern: r"PID (\d+) has uprobes vma|uprobes",
        role: Role::Cause,
        what: "A tracer has attached uprobes to the program, and the kernel has put a mapping for them into its address space. It cannot be rebuilt by a restore.",
        remedy: "Detach the tracer (perf, bpftrace, systemtap), or allow such mappings on both sides.",
        command: "--allow-uprobes    # on dump and on restore",
        threads: &[],
    },
];
