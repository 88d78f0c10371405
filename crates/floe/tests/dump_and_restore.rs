//! `floe dump` and `floe restore` as a user calls them. Needs root; says `skipped` without.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn floe(directory: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command
        .current_dir(directory)
        .args(["--no-default-config"])
        .args(line.split_whitespace());
    command.output().expect("the binary runs")
}

/// Whether this test can run: root is needed to stop and read other tasks.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

/// A sleeping task in a session of its own, killed and reaped when dropped.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let mut command = Command::new("setsid");
        command
            .args(["sleep", "100"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().expect("setsid is part of every system"))
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("our own child").is_none()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_pid_that_nobody_has_exits_with_2_and_is_named() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = floe(directory.path(), "dump -t 4194303");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("There is no task 4194303"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_thread_is_told_from_its_process() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            tell.send(rustix::thread::gettid())
                .expect("somebody listens");
            receiver.recv()
        });
        let tid = told.recv().expect("told").as_raw_nonzero();
        for command in ["dump", "pre-dump --track-mem"] {
            let output = floe(directory.path(), &format!("{command} -t {tid}"));
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{said}");
            let wanted = format!("is a thread of process {}", std::process::id());
            assert!(said.contains(&wanted), "{said}");
        }
        drop(sender);
    });
}

#[test]
fn a_dump_that_leaves_the_task_running_can_be_shown() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut sleeper = Sleeper::start();
    // The task is setsid itself for a moment, and then sleep under the same pid.
    while std::fs::read_to_string(format!("/proc/{}/comm", sleeper.0.id())).unwrap_or_default()
        != "sleep\n"
    {
        assert!(sleeper.is_running());
        std::thread::yield_now();
    }
    let line = format!(
        "dump -t {} --leave-running -o dump.log -v4 --display-stats",
        sleeper.0.id()
    );
    let output = floe(directory.path(), &line);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(sleeper.is_running());
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("Frozen time: "), "{shown}");
    let log = std::fs::read_to_string(directory.path().join("dump.log")).expect("the log");
    assert!(
        log.contains("Dumping finished successfully") && !log.contains("Error"),
        "{log}"
    );
    let listed = Command::new(env!("CARGO_BIN_EXE_floe"))
        .args(["image", "show"])
        .arg(directory.path())
        .output();
    let listed = String::from_utf8_lossy(&listed.expect("the binary runs").stdout).into_owned();
    assert!(
        listed.contains("sleep") && listed.contains("stats-dump"),
        "{listed}"
    );
}

#[test]
fn an_action_script_runs_at_each_stage_and_can_refuse() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = directory.path().join("script.sh");
    let text = "#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID >>stages\n[ $CRTOOLS_SCRIPT_ACTION != post-dump ]\n";
    std::fs::write(&script, text).expect("a file of our own");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("a file of our own");
    let mut sleeper = Sleeper::start();
    let line = format!(
        "dump -t {} --action-script {}",
        sleeper.0.id(),
        script.display()
    );
    let output = floe(directory.path(), &line);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("The hook for post-dump failed"),
        "{}",
        stderr(&output)
    );
    assert!(sleeper.is_running(), "a refused dump lets the task run on");
    let stages = std::fs::read_to_string(directory.path().join("stages")).expect("the script ran");
    assert!(
        stages.starts_with(&format!("pre-dump {}\n", sleeper.0.id())),
        "{stages}"
    );
}

#[test]
fn a_task_is_restored_under_its_pid_and_a_dry_run_makes_nothing() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut sleeper = Sleeper::start();
    let pid = sleeper.0.id();
    let comm = format!("/proc/{pid}/comm");
    while std::fs::read_to_string(&comm).unwrap_or_default() != "sleep\n" {
        assert!(sleeper.is_running());
        std::thread::yield_now();
    }
    let output = floe(directory.path(), &format!("dump -t {pid}"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!sleeper.is_running(), "a dump ends the task");

    let planned = floe(directory.path(), "restore --dry-run");
    assert_eq!(planned.status.code(), Some(0), "{}", stderr(&planned));
    assert!(String::from_utf8_lossy(&planned.stdout).contains(&format!("task {pid}: ")));
    assert!(!Path::new(&comm).exists());

    let output = floe(
        directory.path(),
        "restore -d --pidfile root.pid -o restore.log -v4",
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        std::fs::read_to_string(&comm).unwrap_or_default(),
        "sleep\n"
    );
    let pidfile = std::fs::read_to_string(directory.path().join("root.pid")).expect("the pidfile");
    assert_eq!(pidfile, pid.to_string());

    let again = floe(directory.path(), "restore -d");
    assert_eq!(again.status.code(), Some(3), "{}", stderr(&again));
    assert!(
        stderr(&again).contains(&format!("Pid {pid} is taken by `sleep`")),
        "{}",
        stderr(&again)
    );

    let root = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
    rustix::process::kill_process(root, rustix::process::Signal::KILL).expect("the restored task");
}

#[test]
fn a_restore_without_images_names_what_is_missing_and_exits_with_5() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = floe(directory.path(), "restore -d");
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let message = stderr(&output);
    assert!(
        message.contains(".img") && !message.contains("empty-image"),
        "{message}"
    );
}

#[test]
fn taken_pids_are_free_in_a_new_pid_namespace() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let sleeper = Sleeper::start();
    let pid = sleeper.0.id();
    let comm = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    while comm(pid) != "sleep\n" {
        std::thread::yield_now();
    }
    let output = floe(directory.path(), &format!("dump -t {pid} --leave-running"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = floe(directory.path(), "restore -d");
    assert!(
        stderr(&output).contains("--new-pidns"),
        "{}",
        stderr(&output)
    );

    let output = floe(directory.path(), "restore -d --new-pidns --pidfile pid");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let root = std::fs::read_to_string(directory.path().join("pid")).expect("the pidfile");
    let status = std::fs::read_to_string(format!("/proc/{root}/status")).expect("it runs");
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a line of status").trim().to_string()
    };
    assert_eq!(line("NSpid:"), format!("{root}\t{pid}"));
    // The first process of the namespace ends with the last task.
    let first = line("PPid:").parse().expect("a number");
    assert!(comm(first) == "floe\n" && comm(pid) == "sleep\n");
    let ended = testkit::process::watch(first as i32).expect("a pidfd");
    let tree = rustix::process::Pid::from_raw(root.parse().expect("a number")).expect("a pid");
    rustix::process::kill_process(tree, rustix::process::Signal::KILL).expect("it is ours");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let readable = testkit::process::readable_before(&ended, deadline).expect("it can be watched");
    assert!(readable, "the namespace stays");
}

#[test]
fn a_tree_outlives_the_restore_that_was_its_parent() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new("setsid");
    command.args(["setpriv", "--pdeathsig", "KILL", "sleep", "100"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let sleeper = Sleeper(command.spawn().expect("both are part of every system"));
    let pid = sleeper.0.id();
    let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    while !status().starts_with("Name:\tsleep") {
        std::thread::yield_now();
    }
    let output = floe(directory.path(), &format!("dump -t {pid}"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    drop(sleeper);
    let output = floe(directory.path(), "restore -d");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("at its parent's death"),
        "{}",
        stderr(&output)
    );
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(status().contains("State:\tS"), "it has ended");
    let tree = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
    rustix::process::kill_process(tree, rustix::process::Signal::KILL).expect("it is ours");
}
