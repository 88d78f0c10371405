//! Memory: tracking, chains, the vDSO, lazy pages.

use super::{Role, Rule};

pub(super) const RULES: &[Rule] = &[
    Rule {
        pattern: r"Unexpected rt vDSO area bounds",
        role: Role::Cause,
        what: "Kernels from 6.13 on lay out the data of the vDSO in another way, and this engine expects the old one.",
        remedy: "Use a newer engine; Floe takes the layout as it is.",
        command: "upgrade criu to 4.1 or newer, or install floe as criu",
        threads: &["criu#2532"],
    },
    Rule {
        pattern: r"Compatible vdso's size is bigger than reserved buf",
        role: Role::Cause,
        what: "The kernel's vDSO grew beyond the space that this engine reserves for it.",
        remedy: "Use a newer engine.",
        command: "upgrade criu, or install floe as criu",
        threads: &["criu#1916"],
    },
    Rule {
        pattern: r"Tracking memory is not available|Dirty tracking is OFF",
        role: Role::Cause,
        what: "The kernel was built without soft-dirty bits (CONFIG_MEM_SOFT_DIRTY), the only way in which CRIU learns which pages changed. arm64 never has them.",
        remedy: "Use a tracker that needs them not: Floe has one by userfaultfd (kernel 6.7 or newer) and one by comparing content.",
        command: "floe dump --track-mem --tracker auto ...; floe check --feature mem_dirty_track",
        threads: &["criu#1859"],
    },
    Rule {
        pattern: r"Missing [0-9a-fx]+ in parent pagemap|Hole .*not found in parent|is in the parent snapshot, but it is not there",
        role: Role::Cause,
        what: "An incremental checkpoint says that a page is in its parent, and the parent does not have it. The parent is of another run or program (a pid was reused), or it was changed or removed.",
        remedy: "Check the chain. If a generation is lost, only a new full dump helps.",
        command: "floe verify DIR; floe dump -t PID -D NEW_DIR    # without --prev-images-dir",
        threads: &["criu#2995"],
    },
    Rule {
        pattern: r"PAGEMAP_SCAN: Invalid argument",
        role: Role::Cause,
        what: "The kernel (6.7) knows the call PAGEMAP_SCAN but not all categories that the engine asks for.",
        remedy: "Use an engine that asks which categories there are, as Floe does, or a newer kernel.",
        command: "uname -r; floe check --feature pagemap_scan",
        threads: &["criu#2334"],
    },
    Rule {
        pattern: r"connect to (\S*lazy-pages\.socket) failed|lazy-pages\.socket",
        role: Role::Cause,
        what: "The restore looks for the server of lazy pages by a socket in its work directory, and nobody listens there: the server was not started, or with another work directory.",
        remedy: "Start the server first, with the same work directory.",
        command: "criu lazy-pages -D DIR -W WORK & criu restore --lazy-pages -D DIR -W WORK",
        threads: &["criu#2808"],
    },
    Rule {
        pattern: r"(?:memory pages|[Ww]rite pages|Saving memory|the tree runs on).*(?:No space left on device|os error 28|ENOSPC)",
        role: Role::Consequence,
        what: "The file system of the images is full. The checkpoint is not whole; the program runs on.",
        remedy: "Free some space or use another directory; a checkpoint needs as much space as the program has memory in use.",
        command: "df -h DIR; --images-dir OTHER_DIR",
        threads: &[],
    },
    Rule {
        pattern: r"No space left on device|os error 28|ENOSPC",
        role: Role::Consequence,
        what: "The file system that was to be written to is full. What was begun is not whole; what it was made of is as before.",
        remedy: "Free some space, or write to another file system.",
        command: "df -h DIR",
        threads: &[],
    },
];
