//! Messages as people paste them, each with a part of the command that they are told.

mod own;

use floe_explain::{Explanation, Finding, explain, rules};

/// Message, and what the command or the remedy must say.
const MESSAGES: &[(&str, &str)] = &[
    (
        "Error (criu/protobuf.c:72): Unexpected EOF on (empty-image)",
        "floe verify",
    ),
    ("floe: core-7.img is missing in /c", "floe verify"),
    (
        "Error (criu/image.c:1): Can't open parent snapshot /c/2/parent: No such file or directory",
        "floe squash",
    ),
    (
        "floe: the link `parent` in /c/2 leads to ../1, which cannot be opened (Opening the images directory /c/2/parent: No such file or directory (os error 2))",
        "floe squash",
    ),
    (
        "Error (criu/page-xfer.c:1): page-xfer: Can't write pages: No space left on device",
        "df -h",
    ),
    (
        "floe: Writing 262144 bytes of memory pages at offset 0: No space left on device (os error 28)",
        "df -h",
    ),
    (
        "Error (criu/image.c:1): Magic mismatch in core-7.img",
        "floe verify",
    ),
    (
        "Error (criu/protobuf.c:72): Unexpected EOF on pagemap-12.img",
        "floe verify",
    ),
    (
        "Error (criu/image.c:88): Img trimmed at entry 4",
        "floe verify",
    ),
    (
        "Error (criu/image.c:311): Magic doesn't match for core-1.img",
        "floe verify",
    ),
    (
        "criu failed: type NOTIFY errno 0\nlog file: /run/c/dump.log",
        "floe explain",
    ),
    (
        "runc did not terminate successfully: criu failed: type DUMP errno 0",
        "floe explain",
    ),
    (
        "CRIU checkpointing failed -52.  Please check CRIU logfile dump.log",
        "floe explain",
    ),
    ("criu restore: Invalid exchange", "floe explain"),
    ("CRIU checkpointing failed -70", "criu check"),
    ("CRIU restoring failed -111", "criu check"),
    ("CRIU checkpointing failed -74", "criu check"),
    (
        "open /run/x/restore.log: No such file or directory",
        "log-file",
    ),
    (
        "Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/a (deleted) of 2097152 size, increase limit",
        "--ghost-limit",
    ),
    (
        "Error (criu/files-reg.c:1): Can't create link remap for /dev/shm/sem.x. Use link-remap option.",
        "--link-remap",
    ),
    (
        "Error (criu/files-reg.c:1): Can't link dev/shm/link_remap.4 -> dev/shm/sem.x: No such file or directory",
        "devshm",
    ),
    (
        "Error (criu/tty.c:2399): tty: Unable to find a master for /0",
        "--orphan-pts-master",
    ),
    (
        "Error (criu/tty.c:1): tty: Found dangling tty with sid 10 pgid 10 (pts)",
        "--shell-job",
    ),
    (
        "Error (criu/tty.c:1): tty: ctty inheritance detected",
        "--shell-job",
    ),
    (
        "Error (criu/tty.c:1): Don't have tty to inherit session from, aborting",
        "setsid",
    ),
    (
        "Error (criu/pstree.c:1): The root process 77 is not a session leader. Consider using --shell-job",
        "--shell-job",
    ),
    (
        "Error (criu/files-reg.c:1790): Can't lookup mount=23 for fd=1 path=/dev/pts/3",
        "fd/1",
    ),
    (
        "Error (criu/mount.c:1): 12:/etc/hosts doesn't have a proper root mount",
        "--external",
    ),
    (
        "Error (criu/mount.c:1): Mount 9 ./x has unreachable sharing. Try --enable-external-masters.",
        "--enable-external-masters",
    ),
    (
        "Error (criu/mount.c:1): mnt: 5:./x is autodetected external mount. Try \"--ext-mount-map auto\" to allow them.",
        "mnt[]",
    ),
    (
        "Error (criu/proc_parse.c:1): Bad format in 1 mountinfo: '...'",
        "criu --version",
    ),
    (
        "Error (criu/mount.c:1): mnt: Can't mount at ./data: No such file or directory",
        "docker",
    ),
    (
        "Error (criu/files-reg.c:1): Can't open file var/log/x on restore: No such file or directory",
        "export",
    ),
    (
        "Error (criu/files-reg.c:2175): File var/log/x has bad size 12 (expect 10)",
        "UsePerfData",
    ),
    (
        "Error (criu/files-reg.c:1): File usr/lib/libc.so.6 has bad build-ID",
        "Build ID",
    ),
    (
        "Error (criu/files-reg.c:1): File a has bad mode 0100600 (expect 0100644)",
        "--skip-file-rwx-check",
    ),
    (
        "Error (criu/cr-restore.c:1539): Pid 12 do not match expected 13",
        "--new-pidns",
    ),
    (
        "Error (criu/pie/restorer.c:1): Thread pid mismatch 5/6",
        "--new-pidns",
    ),
    (
        "Error (criu/cr-restore.c:1230): Can't fork for 812: File exists",
        "--new-pidns",
    ),
    (
        "Error (criu/pstree.c:1): Current sid 812 intersects with pid (812) in images",
        "--new-pidns",
    ),
    (
        "Error (criu/vdso.c:401): vdso: Unexpected rt vDSO area bounds",
        "4.1",
    ),
    (
        "Error (criu/pie-util-vdso.c:1): Compatible vdso's size is bigger than reserved buf",
        "floe",
    ),
    (
        "Error (criu/cpu.c:1): cpu: FPU feature required by image is not supported on host (expected avx512)",
        "--cpu-cap=none",
    ),
    (
        "Error (criu/cpu.c:1): CPU instruction capabilities do not match run time",
        "--cpu-cap=none",
    ),
    ("container exited with code 132", "--cpu-cap=none"),
    (
        "Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
        "--tcp-established",
    ),
    (
        "Error (criu/sk-inet.c:1): inet: Connected TCP socket in image",
        "--tcp-established",
    ),
    (
        "Error (criu/sk-inet.c:1): inet: Need to set the --tcp-close options.",
        "--tcp-close",
    ),
    (
        "Error (criu/sk-inet.c:1): inet: In-flight connection (l) for 5, consider --skip-in-flight",
        "--skip-in-flight",
    ),
    (
        "Error (criu/sk-inet.c:1): inet: Unsupported proto 58 for socket 4",
        "ss ",
    ),
    (
        "Error (criu/sk-inet.c:1): inet: Unsupported proto 255 for socket 4",
        "ss ",
    ),
    (
        "Error (criu/sk-inet.c:1): Unsupported proto 262, consider using \"GODEBUG=multipathtcp=0\"",
        "GODEBUG",
    ),
    (
        "Error (criu/sk-netlink.c:77): netlink: The socket has data to read",
        "repeat",
    ),
    (
        "Error (criu/sk-unix.c:874): unix: Can't dump half of stream unix connection.",
        "--external unix",
    ),
    (
        "Error (criu/sk-unix.c:881): unix: External socket is used. Consider using --ext-unix-sk option.",
        "--external unix",
    ),
    (
        "Error (criu/net.c:3332): net: Locking network failed: iptables-restore returned -1.",
        "nftables",
    ),
    (
        "Error (criu/util.c:642): execvp(\"iptables-restore\", ...) failed: No such file or directory",
        "nftables",
    ),
    (
        "Error: Could not process rule: File exists",
        "nft delete table",
    ),
    (
        "Error (criu/namespaces.c:1): Can't dump nested mnt namespace for 55",
        "lsns",
    ),
    (
        "Error (criu/namespaces.c:1): Can't dump a pid namespace without the process init",
        "lsns",
    ),
    (
        "Error (criu/proc_parse.c:502): Unknown shit 600 (anon_inode:[io_uring])",
        "UV_USE_IO_URING",
    ),
    (
        "Error (criu/files-ext.c:98): Can't dump file 7 of that type [600] (anon anon_inode:[perf_event])",
        "fd/7",
    ),
    (
        "Error (criu/fsnotify.c:1): fsnotify: Can't dump that handle",
        "--force-irmap",
    ),
    (
        "Error (criu/cr-dump.c:1): handle_device_vma plugin failed: No such file or directory",
        "UCX_TLS",
    ),
    (
        "Error (criu/cr-dump.c:1): Task 5 with SysVIPC shmem map @7f00 doesn't live in IPC ns",
        "ipc",
    ),
    (
        "Error (criu/file-lock.c:1): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
        "--file-locks",
    ),
    (
        "Error (criu/parasite-syscall.c:1): Unable to connect a transport socket: Permission denied",
        "apparmor",
    ),
    (
        "Error (criu/lsm.c:1): mismatched lsm types and lsm profile specified",
        "--lsm-profile",
    ),
    (
        "The AppArmor profile web, which is not loaded here (No such file or directory (os error 2)), cannot be restored",
        "--lsm-profile",
    ),
    (
        "Error (criu/seize.c:1): Timeout reached. Try to interrupt: 0",
        "--timeout",
    ),
    ("unable to freeze: Unable to freeze cgroup /x", "--timeout"),
    (
        "Error (compel/src/lib/infect.c:261): Unseizable non-zombie 44 found, state S, err -1/1",
        "TracerPid",
    ),
    (
        "Error (criu/cr-dump.c:1): The criu itself is within dumped tree.",
        "setsid",
    ),
    (
        "Warn  (criu/kerndat.c:1): Tracking memory is not available. Consider omitting --track-mem option.",
        "--tracker",
    ),
    (
        "Dirty tracking is OFF. Memory snapshot will not work.",
        "--tracker",
    ),
    (
        "Error (criu/page-xfer.c:1): Missing 7f00 in parent pagemap",
        "floe verify",
    ),
    (
        "Error (criu/page-xfer.c:1): Hole 0x7f00/4096 not found in parent",
        "floe verify",
    ),
    (
        "Error (criu/pagemap-cache.c:1): pagemap-cache: PAGEMAP_SCAN: Invalid argument",
        "pagemap_scan",
    ),
    (
        "Error (criu/sockets.c:1): sockets: Can't get 1:16 opt: Operation not supported",
        "floe",
    ),
    (
        "Error (criu/cgroup.c:1): cg: writing 5 to cpuset/x/cgroup.procs: No space left on device",
        "cpuset.cpus",
    ),
    (
        "pod was killed right after restore",
        "--manage-cgroups=ignore",
    ),
    (
        "Error (criu/uffd.c:1): uffd: connect to lazy-pages.socket failed: No such file or directory",
        "lazy-pages -D",
    ),
    (
        "custom checkpointdir is not supported",
        "/var/lib/docker/containers",
    ),
    ("unrecognized option '--pre-dump'", "crun"),
    (
        "Error (criu/image.c:198): Missing required plugin: cuda_plugin.so",
        "--libdir",
    ),
    (
        "Error (criu/proc_parse.c:1): PID 55 has uprobes vma. Consider using --allow-uprobes.",
        "--allow-uprobes",
    ),
    (
        "floe: directory /c/none (--images-dir): No such file or directory (os error 2)",
        "floe inspect DIR",
    ),
    (
        "floe: making /none/c (--images-dir): No such file or directory (os error 2)",
        "mkdir -p DIR",
    ),
    (
        "floe: directory /c/file (--images-dir): Not a directory (os error 20)",
        "floe unpack FILE",
    ),
    (
        "floe: directory /none (--work-dir): No such file or directory (os error 2)",
        "mkdir -p WORK",
    ),
    (
        "floe: Reading the archive /none.floe: No such file or directory (os error 2)",
        "ls -l",
    ),
    (
        "floe: the archive /c: Is a directory (os error 21)",
        "floe restore -D DIR",
    ),
    (
        "floe: /c/file is no whole archive of Floe",
        "sha256sum FILE",
    ),
    (
        "floe: /c/a.floe has a format 9; this version of Floe knows 2",
        "floe --version",
    ),
    ("floe: There is no task 99999", "pgrep -a NAME"),
    (
        "floe: Task 77 is dead already: it waits for its parent to take note",
        "ps -o pid,ppid,stat,cmd -p PID",
    ),
    (
        "floe: Task 2 is a thread of the kernel, which cannot be checkpointed: give the pid of a program",
        "pgrep -a NAME",
    ),
    (
        "floe: Task 77 may not be traced: run Floe as root, or with CAP_SYS_PTRACE and all capabilities that the task has",
        "sudo floe dump ...",
    ),
    (
        "floe: creating /c: Is a directory (os error 21)",
        "mkdir -p DIR",
    ),
    (
        "floe: /c must be new or empty",
        "floe unpack FILE -C NEW_DIR",
    ),
    (
        "floe: Reading the parent generation (--prev-images-dir ../0)",
        "floe dump -t PID -D new --prev-images-dir ../old",
    ),
    (
        "floe: creating /c/x: Read-only file system (os error 30)",
        "findmnt -T DIR",
    ),
    ("floe: /c: Permission denied (os error 13)", "sudo floe ..."),
    ("floe: /c holds no checkpoint", "ls DIR"),
    (
        "floe: /c/file begins with no known magic",
        "floe image ls DIR",
    ),
    (
        "floe: Reading /c/x.img at offset 0: No such file or directory (os error 2)",
        "floe image ls DIR",
    ),
];

fn all() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    MESSAGES.iter().chain(own::MESSAGES)
}

fn known(text: &str) -> Explanation {
    match explain(text) {
        Finding::Known(explanation) => *explanation,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn every_message_gets_the_right_remedy() {
    let mut wrong = Vec::new();
    for (message, wanted) in all() {
        let found = known(message);
        let told = format!("{}\n{}", found.remedy, found.command);
        if !told.contains(wanted) {
            wrong.push(format!("{message}\n    wanted `{wanted}`, got: {told}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_row_is_reached_by_some_message() {
    let texts: Vec<String> = all().map(|(message, _)| known(message).remedy).collect();
    let unseen: Vec<&str> = rules::all()
        .filter(|rule| !texts.iter().any(|text| text == rule.remedy))
        .map(|rule| rule.pattern)
        .collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}

#[test]
fn rows_have_few_sentences_and_no_word_of_the_old_message() {
    for rule in rules::all() {
        let sentences = rule.what.matches(". ").count() + rule.what.matches(": ").count() / 2 + 1;
        assert!(sentences <= 4, "{}", rule.what);
        for text in [rule.what, rule.remedy, rule.command] {
            assert!(!text.is_empty() && !text.contains("empty-image"), "{text}");
        }
    }
}

#[test]
fn the_first_cause_wins_over_the_last_symptom() {
    let log = "\
(00.001) Version: 4.2 (gitid 0)
(00.010) Dumping task (pid: 5)
(00.020) Warn  (criu/kerndat.c:9): Tracking memory is not available
(00.030) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.
(00.031) Error (criu/cr-dump.c:2): Dump files (pid: 5) failed with -1
(00.040) Error (criu/cr-dump.c:3): Dumping FAILED.
criu failed: type NOTIFY errno 0";
    let found = known(log);
    assert_eq!(found.number, 4);
    assert!(found.command.contains("--tcp-established"));
}

#[test]
fn an_unknown_error_is_shown_and_noise_is_not() {
    let log = "(00.001) io_uring is supported\n(00.002) Error (criu/x.c:1): something new\n(00.003) Error (criu/x.c:2): Dumping FAILED.";
    assert!(
        matches!(explain(log), Finding::Unknown { number: 2, .. }),
        "{:?}",
        explain(log)
    );
    assert_eq!(explain("all is well\n"), Finding::Nothing);
    assert_eq!(explain(""), Finding::Nothing);
}

#[test]
fn values_of_the_message_stand_in_the_answer() {
    let found = known("Error (criu/image.c:198): Missing required plugin: cuda_plugin.so");
    assert!(found.what.contains("`cuda_plugin.so`"), "{}", found.what);
}

/// A log of an engine: thousands of lines that tell, the cause, and what follows from it.
fn long_log(noise: &str, cause: &str, end: &[&str]) -> String {
    let mut log: Vec<String> = (0..5000)
        .map(|number| noise.replace('N', &number.to_string()))
        .collect();
    log.insert(4000, cause.to_owned());
    log.extend(end.iter().map(|line| (*line).to_owned()));
    log.join("\n")
}

#[test]
fn the_cause_is_found_in_long_logs_of_engines() {
    let cause = "(00.523) Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/a of 2097152 size, increase limit";
    let runc = long_log(
        "(00.N) Dumping path for N fd via self 14 [/var/lib/error-log/N]",
        cause,
        &[
            "(00.524) Error (criu/cr-dump.c:1900): Dump files (pid: 7) failed with -1",
            "(00.530) Error (criu/cr-dump.c:2111): Dumping FAILED.",
            "criu failed: type NOTIFY errno 0",
        ],
    );
    let podman = long_log(
        "time=\"2026-11-23T10:00:N\" level=debug msg=\"Called checkpoint.PersistentPreRunE(podman --log-level=debug)\"",
        "time=\"2026-11-23T10:01:00Z\" level=error msg=\"Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.\"",
        &[
            "time=\"2026-11-23T10:01:01Z\" level=error msg=\"CRIU checkpointing failed -52.  Please check CRIU logfile /run/c/dump.log\"",
            "Error: `/usr/bin/crun checkpoint` failed: exit status 1",
        ],
    );
    let docker = long_log(
        "Nov 23 10:00:00 host dockerd[N]: time=\"x\" level=info msg=\"NetworkDB stats\" N",
        "Nov 23 10:01:00 host dockerd[9]: level=error msg=\"(00.1) Error (criu/mount.c:1): mnt: 5:./x is autodetected external mount. Try --ext-mount-map auto\"",
        &[
            "Error response from daemon: Cannot checkpoint container c: runc did not terminate successfully: criu failed: type DUMP errno 0",
        ],
    );
    for (log, wanted) in [
        (runc, "--ghost-limit"),
        (podman, "--tcp-established"),
        (docker, "mnt[]"),
    ] {
        let found = known(&log);
        assert_eq!(found.number, 4001, "{}", found.line);
        assert!(found.command.contains(wanted), "{}", found.command);
    }
}
