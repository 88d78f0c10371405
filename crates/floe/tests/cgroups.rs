//! A task in a control group that is gone at the restore. Needs root and cgroup v2; says `skipped` without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use testkit::skips;

fn floe(directory: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command
        .current_dir(directory)
        .args(["--no-default-config"])
        .args(line.split_whitespace());
    command.output().expect("the binary runs")
}

/// Repeats `attempt` until it succeeds; the last error after ten seconds.
fn patiently<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// A group of version 2, removed when dropped.
struct Group {
    path: PathBuf,
    name: String,
}

impl Group {
    fn make(purpose: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("always there");
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let Some(mount) = line.and_then(|line| line.split(' ').nth(4)) else {
            eprintln!("skipped: cgroup v2 is not mounted");
            return None;
        };
        let name = format!("floe-test-{purpose}-{}", std::process::id());
        let path = Path::new(mount).join(&name);
        match fs::create_dir(&path) {
            Ok(()) => Some(Group { path, name }),
            Err(error) => {
                eprintln!("skipped: no group can be made: {error}");
                None
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn has(&self, pid: u32) -> bool {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let wanted = format!("/{}", self.name);
        groups
            .lines()
            .any(|line| line.starts_with("0::") && line.ends_with(&wanted))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.path.exists() && !std::thread::panicking() {
            patiently(|| fs::remove_dir(&self.path));
        }
    }
}

/// A sleeping task in a session of its own, in a group.
fn start_in(group: &Group) -> Child {
    let child = start("sleep", &["100"]);
    fs::write(group.file("cgroup.procs"), child.id().to_string()).expect("the group is ours");
    child
}

/// A program that becomes `sleep`, in a session of its own.
fn start(program: &str, args: &[&str]) -> Child {
    let mut command = Command::new("setsid");
    command
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = command.spawn().expect("setsid is part of every system");
    let comm = format!("/proc/{}/comm", child.id());
    patiently(|| match fs::read_to_string(&comm)?.as_str() {
        "sleep\n" => Ok(()),
        _ => Err(std::io::ErrorKind::WouldBlock.into()),
    });
    child
}

fn expect_success(output: &Output) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// Dumps a task, which is ended by that or because that failed.
fn dump(task: &mut Child, images: &Path) -> Output {
    let output = floe(images, &format!("dump -t {}", task.id()));
    if !output.status.success() {
        let _ = task.kill();
    }
    task.wait().expect("our own child");
    output
}

/// Dumps a task of a group, and removes the group; the task's pid.
fn dump_away(group: &Group, images: &Path) -> u32 {
    let mut task = start_in(group);
    fs::write(group.file("cgroup.max.descendants"), "7").expect("every group has it");
    expect_success(&dump(&mut task, images));
    patiently(|| fs::remove_dir(&group.path));
    task.id()
}

fn end(pid: u32) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.expect("kill is part of every system").success());
}

#[test]
fn a_missing_group_is_made_with_its_properties_and_entered() {
    if !skips::is_root("a_missing_group_is_made_with_its_properties_and_entered") {
        return;
    }
    let Some(group) = Group::make("made") else {
        return;
    };
    let images = tempfile::tempdir().expect("a temporary directory");
    let pid = dump_away(&group, images.path());
    expect_success(&floe(images.path(), "restore -d"));
    let (member, limit) = (
        group.has(pid),
        fs::read_to_string(group.file("cgroup.max.descendants")),
    );
    end(pid);
    assert!(member);
    assert_eq!(limit.expect("the group is there"), "7\n");
}

/// A service manager keeps groups that no task is in.
#[test]
fn empty_groups_that_a_cgroup_namespace_shows_come_back() {
    if !skips::is_root("empty_groups_that_a_cgroup_namespace_shows_come_back") {
        return;
    }
    let Some(group) = Group::make("empty") else {
        return;
    };
    let images = tempfile::tempdir().expect("a temporary directory");
    let empty = group.file("empty");
    fs::create_dir(&empty).expect("the group is ours");
    let enter = group.file("cgroup.procs");
    let script = format!(
        "echo $$ > {}; exec unshare -C sh -c 'echo $$ > {}/cgroup.procs; exec sleep 100'",
        enter.display(),
        group.file("busy").display()
    );
    fs::create_dir(group.file("busy")).expect("the group is ours");
    let mut task = start("sh", &["-c", &script]);
    let output = dump(&mut task, images.path());
    let below = [empty.clone(), group.file("busy"), group.path.clone()];
    below
        .iter()
        .for_each(|path| patiently(|| fs::remove_dir(path)));
    expect_success(&output);
    expect_success(&floe(images.path(), "restore -d"));
    let found = empty.exists();
    end(task.id());
    for path in &below[..2] {
        patiently(|| match fs::remove_dir(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        });
    }
    assert!(found);
}

#[test]
fn groups_are_left_alone_when_told_so() {
    if !skips::is_root("groups_are_left_alone_when_told_so") {
        return;
    }
    let Some(group) = Group::make("ignored") else {
        return;
    };
    let images = tempfile::tempdir().expect("a temporary directory");
    let pid = dump_away(&group, images.path());
    let refused = floe(images.path(), "restore -d --manage-cgroups=props");
    assert!(!refused.status.success(), "the group is missing");
    expect_success(&floe(images.path(), "restore -d --manage-cgroups=ignore"));
    let member = group.has(pid);
    end(pid);
    assert!(!member && !group.path.exists());
}

#[test]
fn a_tree_is_frozen_by_its_group_and_the_group_is_what_it_was() {
    if !skips::is_root("a_tree_is_frozen_by_its_group_and_the_group_is_what_it_was") {
        return;
    }
    let Some(group) = Group::make("frozen") else {
        return;
    };
    let images = tempfile::tempdir().expect("a temporary directory");
    let mut task = start_in(&group);
    let line = format!(
        "dump -t {} --leave-running -v4 -o log --freeze-cgroup {}",
        task.id(),
        group.path.display()
    );
    let mut ends = Vec::new();
    for before in ["0", "1"] {
        fs::write(group.file("cgroup.freeze"), before).expect("the group is ours");
        let output = floe(images.path(), &line);
        let after = fs::read_to_string(group.file("cgroup.freeze")).expect("the group is there");
        ends.push((output, before, after));
    }
    let log = fs::read_to_string(images.path().join("log")).unwrap_or_default();
    let without = line.split(" --freeze-cgroup").next().expect("a line");
    let unnamed = floe(images.path(), &without.replace("-o log", ""));
    fs::write(group.file("cgroup.freeze"), "0").expect("the group is ours");
    task.kill().expect("our own child");
    task.wait().expect("our own child");
    for (output, before, after) in ends {
        expect_success(&output);
        assert_eq!(after.trim(), before);
    }
    assert!(log.contains("seized in a frozen group"), "{log}");
    let said = String::from_utf8_lossy(&unnamed.stderr);
    assert_eq!(unnamed.status.code(), Some(3), "{said}");
    assert!(
        said.contains("freezes") && said.contains("what to do: Thaw"),
        "{said}"
    );
}

/// A namespace begins where its maker was; its tasks may have moved on.
#[test]
fn a_cgroup_namespace_of_a_child_begins_where_it_did() {
    if !skips::is_root("a_cgroup_namespace_of_a_child_begins_where_it_did") {
        return;
    }
    let Some(group) = Group::make("child") else {
        return;
    };
    let images = tempfile::tempdir().expect("a temporary directory");
    let busy = group.file("busy");
    fs::create_dir(&busy).expect("the group is ours");
    // The root goes last: then the child stands as well.
    let script = format!(
        "(echo $(exec sh -c 'echo $PPID') > {0}/cgroup.procs; exec unshare -UrC sleep 101) &
        until grep -q sleep /proc/$!/comm; do :; done
        echo $! > {1}/cgroup.procs; exec sleep 100",
        group.path.display(),
        busy.display()
    );
    let mut task = start("sh", &["-c", &script]);
    let seen = |root: u32| {
        let children = format!("/proc/{root}/task/{root}/children");
        let child = fs::read_to_string(children).expect("it lives");
        let child = child.trim().to_string();
        let output = Command::new("nsenter")
            .args(["--target", &child, "--cgroup", "cat"])
            .arg(format!("/proc/{child}/cgroup"))
            .output()
            .expect("nsenter is part of every system");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.starts_with("0::"));
        (line.map(str::to_string), child)
    };
    let (before, _) = seen(task.id());
    let output = dump(&mut task, images.path());
    for path in [&busy, &group.path] {
        patiently(|| fs::remove_dir(path));
    }
    expect_success(&output);
    expect_success(&floe(images.path(), "restore -d"));
    let (after, child) = seen(task.id());
    end(task.id());
    end(child.parse().expect("a pid"));
    patiently(|| fs::remove_dir(&busy));
    assert_eq!(before.as_deref(), Some("0::/busy"));
    assert_eq!(before, after);
}
