//! Messages of Floe's own, as it prints them, each with a part of the command that is told.

pub const MESSAGES: &[(&str, &str)] = &[
    (
        "floe: Step `coordinator: open /d/data.txt` failed: /d/data.txt is not as it was at the dump: its size was 6 bytes, is 8 bytes; bring back the file as it was at the dump (a snapshot of its file system)",
        "snapshot made while",
    ),
    (
        "floe: /d/data.txt is not as it was at the dump: its type was a file, is a directory; bring back",
        "snapshot made while",
    ),
    (
        "floe: /d/data.txt is not as it was at the dump: its mode was 644, is 600; chmod 644 /d/data.txt",
        "chmod",
    ),
    (
        "floe: /usr/bin/x is not as it was at the dump: its build id was 00, is 11; install the build",
        "readelf -n",
    ),
    (
        "floe: Step `coordinator: open /d/data.txt` failed: /d/data.txt cannot be opened: No such file or directory (os error 2); bring it here",
        "export the container's file system",
    ),
    (
        "floe: Step `coordinator: make 22 mounts` failed: /d/nowhere, which is to be mounted in the tree, cannot be reached: No such file or directory (os error 2)",
        "ls -ld /d/nowhere;",
    ),
    (
        "floe: Step `coordinator: make 22 mounts` failed: Copying the mount of /d: Operation not supported (os error 95)",
        "restore.log",
    ),
    (
        "floe: Step `coordinator: make control groups` failed: control group /g/sub is not here; make it",
        "--manage-cgroups=soft",
    ),
    (
        "floe: Step `coordinator: make internet socket 24` failed: tcp port 80 is in use; end the program",
        "sport = 80",
    ),
    (
        "floe: Step `coordinator: make internet socket 24` failed: no network device here has the address 10.0.0.7; give it to one",
        "ip address add 10.0.0.7 dev",
    ),
    (
        "floe: unpack: Writing /c/pages-1.img: No space left on device (os error 28)",
        "another file system",
    ),
    (
        "floe: The mnt namespace of task 7 cannot be restored: only the whole tree may be in one of its own; restore it with CRIU",
        "lsns",
    ),
    (
        "floe: Pkey rights of task 7 needs PKU, which this machine lacks",
        "floe check",
    ),
    (
        "floe: The plan does not hold together: files.img 0x7 is used 0 times instead of once",
        "floe verify",
    ),
    (
        "floe: The xsave area has 2696 bytes here and had 2440 (restore anyway with --cpu-cap=none)",
        "--cpu-cap=none",
    ),
    (
        "floe: /c/pages-1.img has 4096 bytes, 40960 when it was made: it was copied only in part or changed since: copy it again",
        "floe verify",
    ),
    (
        "floe: /c/mm-7.img, entry 0 at offset 12: mm_entry lacks its required field mm_arg_start",
        "Nothing was made of it",
    ),
    (
        "floe: /c/inventory.img: its images have version 9, known are 1 to 2: use a newer Floe",
        "floe image show",
    ),
    (
        "floe: The arena at 0x7000 lies where the task has a mapping",
        "floe inspect DIR",
    ),
    (
        "floe: /c/0 is a pre-dump (generation 0): it holds memory only, no task can be made of it",
        "floe inspect DIR",
    ),
    (
        "floe: /c has no floe.json: only finished checkpoints of Floe are compressed",
        "floe pack",
    ),
    (
        "floe: The archive has the member \"../x\", which leads outside: refused, nothing of ours looks so",
        "tar -tf",
    ),
    (
        "floe: /c/full is there already: give a new directory",
        "mkdir -p",
    ),
    (
        "floe: Connecting to the page server at 10.0.0.1, port 77: is it running?",
        "floe page-server",
    ),
    (
        "floe: Running iptables-restore; --network-lock nftables needs no program",
        "--network-lock nftables",
    ),
    (
        "floe: /sys/fs/cgroup/x is no control group with a freezer",
        "cgroup.freeze",
    ),
    (
        "floe: This kernel has no `soft-dirty` tracker: leave out --tracker, or use `--tracker content`",
        "--tracker auto",
    ),
    ("floe: Reading the parent generation", "floe verify PARENT"),
    (
        "floe: Refused, nothing was changed: task 7: a task that the control group /a freezes cannot be checkpointed: thaw that",
        "--freeze-cgroup GROUP",
    ),
    (
        "floe: The dump was called off: the process that asked for it has ended",
        "setsid floe dump",
    ),
    (
        "floe: Setting aside the checkpoint that is in /c: File exists (os error 17)",
        "-D NEW_DIR",
    ),
    (
        "floe: --archive: `-` is standard output, which is closed: nobody would have the archive. Give a file, or a pipe",
        "--archive FILE",
    ),
    (
        "floe: /c is being written by another dump: wait for its end",
        "-D DIRECTORY_OF_ITS_OWN",
    ),
    (
        "floe: Task 8 is a thread of process 7: give the pid of the process (-t 7)",
        "-t 7",
    ),
    (
        "floe: Saving memory: Writing 262144 bytes of memory pages at offset 3407872: Broken pipe (os error 32)",
        "floe restore -d -i -",
    ),
    (
        "floe: inc is an increment: it builds on generation 0, which is not in it",
        "floe verify DIR; floe inspect DIR",
    ),
    (
        "floe: The images would take the place of what they build on: /c/2 is --prev-images-dir ../2 or a parent of that",
        "-D NEW --track-mem",
    ),
    (
        "floe: /c/1 builds on another checkpoint than the one that is in /c/0 now",
        "floe verify DIR; floe inspect DIR",
    ),
    (
        "floe: Talking to the keeper of task 7: Broken pipe (os error 32)",
        "floe track",
    ),
    (
        "floe: Task 7 is being dumped by process 9 at this moment: wait for its end and try again",
        "kill 9",
    ),
    (
        "floe: Process 9 is still dumping the tree of task 7 after 20 s: wait for its end, or end it (`kill 9`; the tree runs on), and try again",
        "floe track",
    ),
    (
        "floe: the dump was killed by signal 9; the tasks run on as before",
        "killed process",
    ),
    (
        "floe: ptrace PTRACE_GETREGSET of task 7: No such process (os error 3)",
        "floe dump -v4",
    ),
    (
        "floe: CPU vendor `HygonGenuine` has no number in the image format",
        "--cpu-cap=none",
    ),
    (
        "floe: The images are complete, but pages that they replace stay in the parents",
        "floe dedup",
    ),
    (
        "floe: The hook for pre-dump failed: exit status: 1",
        "sh -x",
    ),
    (
        "floe: --status-fd 9: Bad file descriptor (os error 9)",
        "strace",
    ),
    (
        "floe: --lazy-pages is not supported yet: leave it out: memory is filled before the start",
        "floe --help",
    ),
    (
        "floe: bad value `x` for `--ghost-limit`: expected a size such as 1048576, 512K, 64M or 2G",
        "floe COMMAND --help",
    ),
    (
        "floe: entries[0]: core_entry has no field mtpye",
        "floe image decode",
    ),
    (
        "floe: Namespace 7 (file 0x7) cannot be restored: only namespaces that a task is in can be kept",
        "what the message says",
    ),
    (
        "floe: log file /nowhere/x.log: Is a directory (os error 21)",
        "ls -ld FILE",
    ),
    (
        "floe: Reading /c/mm-7.img at offset 12: Input/output error (os error 5)",
        "dmesg",
    ),
    (
        "floe: Syncing /c/mm-7.img: Input/output error (os error 5)",
        "dmesg",
    ),
    (
        "floe: starting the engine: Resource temporarily unavailable (os error 11)",
        "ulimit",
    ),
    (
        "floe: Step `task 7: set the limits` failed: Setting limits of task 7 to 9: Invalid argument (os error 22)",
        "restore.log",
    ),
];
