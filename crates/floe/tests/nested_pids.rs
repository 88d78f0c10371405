//! Trees with pid namespaces below the root's. Needs root and util-linux; says `skipped` without.
//!
//! Each test has a pid namespace around it, in which no number is taken by others.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testkit::skips;

/// Dumps and restores the tree of `$TREE`, which has `$SLEEPS` processes that sleep, and shows it before and
/// after. `$WRAP` starts the tree; where it is a pid namespace of its own, its first process is the root.
const SCRIPT: &str = r#"
tree() { echo $1; for c in $(cat /proc/$1/task/*/children); do tree $c; done; }
sleeps() { for p in $(tree $1); do cat /proc/$p/comm; done 2>/dev/null | grep -c sleep; }
facts() {
  for p in $(tree $1); do
    grep -E '^(Name|State|NSpid|NSpgid|NSsid|Threads)' /proc/$p/status | tr '\n\t' '  '
    # A proc in which this script is not.
    [ -e /proc/$p/root/proc/self ] || echo sees $(cat /proc/$p/root/proc/[0-9]*/comm)
    for n in pid pid_for_children; do stat -Lc %i /proc/$p/ns/$n 2>/dev/null || echo none; done | tr '\n' ' '
    grep -h notify /proc/$p/timers | tr '\n' ' '
    echo
  done
}
# What the host has in memory would go along with a tree that has mounts of its own.
while umount /dev/shm 2>/dev/null; do :; done
cd "$DIR"
mkdir images
$WRAP setsid sh -c "$TREE" </dev/null >/dev/null 2>&1 &
root=$!
tries=0
while [ "$(sleeps $root)" != $SLEEPS ]; do
  tries=$((tries + 1)); [ $tries -lt 500 ] || { echo "the tree does not stand" >&2; exit 1; }
  sleep 0.02
done
[ -z "$WRAP" ] || root=$(cat /proc/$root/task/*/children)
facts $root >before
$FLOE dump -t $root -D images $DUMP
while [ -d /proc/$root ]; do wait 2>/dev/null || true; done
$FLOE restore -d -D images --pidfile "$DIR/pid"
facts $(cat pid) >after
"#;

struct Case<'a> {
    wrap: &'a str,
    tree: &'a str,
    sleeps: u32,
    dump: &'a str,
}

/// The facts before and after; inodes are numbered as they appear.
fn run(case: &Case<'_>) -> anyhow::Result<[Vec<String>; 2]> {
    let directory = tempfile::tempdir()?;
    let output = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-ec",
            SCRIPT,
        ])
        .env("DIR", directory.path())
        .env("FLOE", env!("CARGO_BIN_EXE_floe"))
        .env("WRAP", case.wrap)
        .env("TREE", case.tree)
        .env("SLEEPS", case.sleeps.to_string())
        .env("DUMP", case.dump)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let read = |name: &str| -> anyhow::Result<Vec<String>> {
        let text = std::fs::read_to_string(directory.path().join(name)).context("the facts")?;
        Ok(numbered(&text, !case.wrap.is_empty()))
    };
    Ok([read("before")?, read("after")?])
}

/// Replaces inodes of namespaces by their order. With namespaces of their own, tasks have other numbers
/// outside after a restore.
fn numbered(text: &str, own_pids: bool) -> Vec<String> {
    let mut inodes = Vec::new();
    let mut after_name = false;
    let mut word = |word: &str| -> Option<String> {
        let skip = own_pids && std::mem::replace(&mut after_name, word.starts_with("NS"));
        if skip {
            return None;
        }
        if word.len() != 10 || !word.starts_with("402") {
            return Some(word.to_string());
        }
        let place = inodes.iter().position(|inode| inode == word);
        let place = place.unwrap_or_else(|| {
            inodes.push(word.to_string());
            inodes.len() - 1
        });
        Some(format!("namespace {place}"))
    };
    let mut line = |line: &str| -> String {
        let words: Vec<String> = line.split_whitespace().filter_map(&mut word).collect();
        words.join(" ")
    };
    text.lines().map(&mut line).collect()
}

fn comes_back(wrap: &str, tree: &str, sleeps: u32) -> anyhow::Result<Vec<String>> {
    let case = Case {
        wrap,
        tree,
        sleeps,
        dump: "",
    };
    let [before, after] = run(&case)?;
    ensure!(before == after, "{before:#?} became {after:#?}");
    Ok(before)
}

/// Sessions and groups that begin on either side; a zombie; children of those that have ended.
const CROWD: &str = "unshare --pid --fork sh -c '
    sleep 1000 & setsid sleep 1001 &
    setsid sh -c \"sleep 1002 & exit 3\" &
    exec sleep 1003' & exec sleep 1004";

#[test]
fn a_pid_namespace_within_a_tree_comes_back() {
    skips::as_root("a_pid_namespace_within_a_tree_comes_back", || {
        let facts = comes_back("", CROWD, 5)?;
        // The wrapper is outside, the namespace of its children is theirs.
        let namespaces = |line: &String| {
            line.split(" namespace ")
                .skip(1)
                .map(str::to_string)
                .collect::<Vec<_>>()
        };
        let wrapper = facts.iter().find(|line| line.contains("Name: unshare"));
        let wrapper = namespaces(wrapper.context("it waits")?);
        ensure!(wrapper[0] != wrapper[1], "{facts:#?}");
        ensure!(
            facts.iter().any(|line| line.contains("State: Z")),
            "{facts:#?}"
        );
        Ok(())
    });
}

#[test]
fn a_pid_namespace_within_one_comes_back() {
    skips::as_root("a_pid_namespace_within_one_comes_back", || {
        comes_back("unshare --pid --fork", CROWD, 5).map(drop)
    });
}

#[test]
fn pid_namespaces_beside_and_below_each_other_come_back() {
    skips::as_root(
        "pid_namespaces_beside_and_below_each_other_come_back",
        || {
            let tree = "unshare --pid --fork sleep 1000 & unshare --pid --fork sh -c '
            unshare --pid --fork sh -c \"sleep 1001 & exec sleep 1002\" & exec sleep 1003' &
            exec sleep 1004";
            comes_back("", tree, 5).map(drop)
        },
    );
}

#[test]
fn tasks_sent_into_a_pid_namespace_come_back() {
    skips::as_root("tasks_sent_into_a_pid_namespace_come_back", || {
        let tree = "unshare --pid --fork sleep 1000 & n=$!
            until read c </proc/$n/task/$n/children; grep -q sleep /proc/$c/comm; do :; done
            nsenter -t $c --pid sh -c 'sleep 1001 & setsid sleep 1002 & exec sleep 1003' &
            exec sleep 1004";
        comes_back("", tree, 5).map(drop)
    });
}

#[test]
fn a_pid_namespace_that_nobody_is_in_yet_comes_back() {
    skips::as_root("a_pid_namespace_that_nobody_is_in_yet_comes_back", || {
        comes_back("", "unshare --pid sleep 1000 & exec sleep 1001", 2).map(drop)
    });
}

#[test]
fn a_job_that_begins_a_pid_namespace_keeps_its_group() {
    skips::as_root("a_job_that_begins_a_pid_namespace_keeps_its_group", || {
        let tree = "bash -mc 'sleep 1000 | unshare --pid --fork sh -c \"sleep 1001 & exec sleep 1002\" & exec sleep 1003' & exec sleep 1004";
        comes_back("", tree, 5).map(drop)
    });
}

#[test]
fn a_chain_of_a_tree_with_a_pid_namespace_comes_back() {
    skips::as_root("a_chain_of_a_tree_with_a_pid_namespace_comes_back", || {
        let case = Case {
            wrap: "",
            tree: CROWD,
            sleeps: 5,
            dump: "--iterate=2",
        };
        let [before, after] = run(&case)?;
        ensure!(before == after, "{before:#?} became {after:#?}");
        Ok(())
    });
}

/// Its mounts are its own, its pids are not.
const OWN_MOUNTS: &str = "exec unshare --mount bash -c '
    exec </dev/null >/dev/null 2>&1 10<&-
    unshare --pid --fork --mount-proc sh -c \"sleep 1000 & exec sleep 1001\" &
    exec sleep 1002'";

#[test]
fn a_proc_of_an_inner_pid_namespace_comes_back_among_outer_pids() {
    let name = "a_proc_of_an_inner_pid_namespace_comes_back_among_outer_pids";
    skips::as_root(name, || {
        let facts = comes_back("", OWN_MOUNTS, 3)?;
        let seen = facts
            .iter()
            .filter(|line| line.ends_with("sees sleep sleep"));
        ensure!(seen.count() == 3, "{facts:#?}");
        Ok(())
    });
}

/// It leaves the mounts behind that it has its own program from.
const COMMAND: &str = "exec unshare --pid --fork --mount-proc sh -c 'sleep 1000 & exec sleep 1001'";

#[test]
fn the_command_that_begins_a_pid_namespace_comes_back() {
    let name = "the_command_that_begins_a_pid_namespace_comes_back";
    skips::as_root(name, || {
        let facts = comes_back("", COMMAND, 2)?;
        ensure!(facts[0].contains("Name: unshare"), "{facts:#?}");
        let seen = facts
            .iter()
            .filter(|line| line.ends_with("sees sleep sleep"));
        ensure!(seen.count() == 3, "{facts:#?}");
        Ok(())
    });
}

#[test]
fn a_pid_namespace_with_a_proc_beside_the_callers_mounts_comes_back() {
    let name = "a_pid_namespace_with_a_proc_beside_the_callers_mounts_comes_back";
    skips::as_root(name, || {
        let tree = "unshare --pid --fork --mount-proc sh -c 'sleep 1000 & exec sleep 1001' & exec sleep 1002";
        let facts = comes_back("", tree, 3)?;
        let seen = facts
            .iter()
            .filter(|line| line.ends_with("sees sleep sleep"));
        ensure!(seen.count() == 3, "{facts:#?}");
        Ok(())
    });
}

/// Begins a sleeping first process of a pid namespace, `$root`, and runs a script.
fn beside(script: &str) -> anyhow::Result<std::process::Output> {
    let begin = r#"cd "$DIR"; mkdir images
        unshare --pid --fork setsid sleep 1000 </dev/null >/dev/null 2>&1 & outer=$!
        root=; tries=0
        until [ "$(cat /proc/$root/comm)" = sleep ]; do
          tries=$((tries + 1)); [ $tries -lt 500 ] || exit 1
          sleep 0.02; root=$(cat /proc/$outer/task/*/children); root=${root% }
        done 2>/dev/null
"#;
    let directory = tempfile::tempdir()?;
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-ec",
    ]);
    let output = unshare
        .arg(format!("{begin}{script}"))
        .env("DIR", directory.path())
        .env("FLOE", env!("CARGO_BIN_EXE_floe"))
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(output)
}

/// As `runc exec` puts a task into a container: its parent is outside.
#[test]
fn whoever_is_beside_the_tree_in_its_pid_namespace_is_named() {
    let name = "whoever_is_beside_the_tree_in_its_pid_namespace_is_named";
    skips::as_root(name, || {
        let output = beside(
            r#"setsid nsenter -t $root --pid sh -c 'sleep 2000 & exec sleep 2001' </dev/null >/dev/null 2>&1 & way=$!
            inner=
            until [ "$(cat /proc/$inner/comm)" = sleep ]; do
              tries=$((tries + 1)); [ $tries -lt 500 ] || exit 1
              sleep 0.02; inner=$(cat /proc/$way/task/*/children); inner=${inner% }
            done 2>/dev/null
            $FLOE dump -t $root -D images"#,
        )?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("(sleep 2001); they are not saved"), "{said}");
        ensure!(
            !said.contains("sleep 2000") && !said.contains("sleep 1000"),
            "{said}"
        );
        Ok(())
    });
}

/// What `runc exec` has left: its parent has ended, and the first process does not reap it.
#[test]
fn a_zombie_whose_session_was_outside_comes_back() {
    skips::as_root("a_zombie_whose_session_was_outside_comes_back", || {
        let script = r#"nsenter -t $root --pid sh -c 'sleep 0.01 & :' </dev/null >/dev/null 2>&1
            zombie() { z=$(cat /proc/$1/task/$1/children); grep -q '^State:.Z' /proc/${z% }/status 2>/dev/null; }
            until zombie $root; do
              tries=$((tries + 1)); [ $tries -lt 500 ] || exit 1
              sleep 0.02
            done
            $FLOE dump -t $root -D images
            while [ -d /proc/$root ]; do wait 2>/dev/null || true; done
            $FLOE restore -d -D images --pidfile "$DIR/pid"
            zombie $(cat pid)"#;
        beside(script).map(drop)
    });
}
