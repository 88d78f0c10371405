//! Trees with a `proc` of a pid namespace below that of the tree.

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use anyhow::ensure;
use testkit::{process, skips};

use super::tree::{LIMIT, SLEEP, Tree, expect_success};

/// The host's own tmpfs are left out, whatever is in them.
const BARE: &str = "while umount /dev/shm 2>/dev/null; do :; done\n";

/// What a task sees: the processes of its `/proc`, and its files and directory there.
fn sight(pid: i32) -> anyhow::Result<String> {
    let own = format!("/proc/{pid}");
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(format!("{own}/root/proc"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Ok(number) = name.parse::<u32>() {
            let comm = fs::read_to_string(format!("{own}/root/proc/{name}/comm"))?;
            seen.insert((number, comm.trim().to_string()));
        }
    }
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(format!("{own}/fd"))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let file = fs::read_link(&path)?;
        if file.is_absolute() {
            files.insert((name, file));
        }
    }
    let directory = fs::read_link(format!("{own}/cwd"))?;
    Ok(format!("{seen:?} {files:?} {directory:?}"))
}

/// Numbers of system calls.
const CLOCK_NANOSLEEP: &str = "230";
const WAIT4: &str = "61";

/// What the tree has mounted and its tasks see, when all of them wait.
fn facts(tree: &Tree) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + LIMIT;
    for pid in process::family(tree.pid) {
        // A program that has just begun still opens files.
        let is_early = || -> anyhow::Result<bool> {
            let call = fs::read_to_string(format!("/proc/{pid}/syscall"))?;
            let number = call.split(' ').next();
            Ok(!matches!(number, Some(CLOCK_NANOSLEEP | WAIT4)))
        };
        while is_early()? {
            ensure!(Instant::now() < deadline, "task {pid} does not wait");
            std::thread::yield_now();
        }
    }
    let sights = process::family(tree.pid).into_iter().map(sight);
    let mut facts = sights.collect::<anyhow::Result<Vec<String>>>()?;
    facts.extend(tree.mounts()?);
    Ok(facts)
}

/// Starts a tree, takes it through a dump and a restore, twice, and holds what all tasks see against before.
fn comes_back(script: &str) -> anyhow::Result<Tree> {
    let mut tree = Tree::start(&format!("{BARE}{script}{SLEEP}"))?;
    let before = facts(&tree)?;
    for _ in 0..2 {
        tree.dump(&[])?;
        tree.restore(&[])?;
        let after = facts(&tree)?;
        let changed: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).collect();
        ensure!(
            changed.is_empty() && before.len() == after.len(),
            "{changed:#?}"
        );
    }
    Ok(tree)
}

/// The end of a task that says that it stands.
const STANDS: &str = "exec </dev/null; touch $R; exec sleep 1000";

/// A script that waits until the commands `inner`, which end with [`STANDS`], stand in the background.
fn beside(begin: &str, inner: &str) -> String {
    format!(
        "export R=$(mktemp -u $DIR/stands.XXXX)
        {begin} bash -ec '{inner}
{STANDS}' </dev/null >/dev/null 2>&1 10<&- &
        until [ -e $R ]; do sleep 0.01; done; rm $R\n"
    )
}

/// The commonest way to begin a pid namespace.
const UNSHARE: &str = "unshare --pid --fork --mount-proc";

#[test]
fn a_proc_of_a_pid_namespace_within_the_tree_comes_back() {
    skips::as_root(
        "a_proc_of_a_pid_namespace_within_the_tree_comes_back",
        || {
            let tree = comes_back(&beside(UNSHARE, "sleep 1001 </dev/null &"))?;
            let family = process::family(tree.pid);
            let seen = sight(*family.last().expect("it has tasks"))?;
            ensure!(
                seen.starts_with(r#"{(1, "sleep"), (2, "sleep")} "#),
                "{seen}"
            );
            Ok(())
        },
    );
}

#[test]
fn a_proc_two_namespaces_deep_comes_back() {
    skips::as_root("a_proc_two_namespaces_deep_comes_back", || {
        let inmost = format!("{UNSHARE} sleep 1001 </dev/null & until [ -e /proc/3 ]; do :; done");
        let tree = comes_back(&beside(UNSHARE, &inmost))?;
        let family = process::family(tree.pid);
        let seen = sight(*family.last().expect("it has tasks"))?;
        ensure!(seen.starts_with(r#"{(1, "sleep")} "#), "{seen}");
        Ok(())
    });
}

#[test]
fn procs_of_inner_pid_namespaces_come_back_in_shared_mounts() {
    skips::as_root(
        "procs_of_inner_pid_namespaces_come_back_in_shared_mounts",
        || {
            let mount = |point: &str, options: &str| {
                let inner = format!(
                    "mount -t proc -o {options} {point} $DIR/{point}; sleep 100{point} </dev/null &"
                );
                beside("unshare --pid --fork", &inner)
            };
            let script = [
                "mkdir $DIR/1 $DIR/2 $DIR/part\n",
                &mount("1", "hidepid=ptraceable,subset=pid,gid=7"),
                &mount("2", "hidepid=invisible,nosuid,ro"),
                "mount --bind $DIR/2/sys/kernel $DIR/part\n",
                "exec 5<$DIR/1/3/status 6<$DIR/2/3/status 7<$DIR/part/ostype 8<$DIR/2\n",
            ];
            let tree = comes_back(&script.concat())?;
            for (point, file) in [("1", 5), ("2", 6)] {
                let list = tree.inside(&[
                    "sh",
                    "-c",
                    "ls $DIR/$0 | grep -c ^[0-9]; grep -a . $DIR/$0/3/cmdline",
                    point,
                ])?;
                expect_success(&list)?;
                let seen = String::from_utf8_lossy(&list.stdout).replace(['\0', '\n'], " ");
                ensure!(seen == format!("2 sleep 100{point}  "), "{seen}");
                let status = fs::read_to_string(format!("/proc/{}/fd/{file}", tree.pid))?;
                let inner = fs::read_to_string(format!(
                    "/proc/{}/root{}/{point}/3/status",
                    tree.pid,
                    tree.directory.path().display()
                ))?;
                ensure!(
                    status == inner && status.contains("sleep"),
                    "{status} is not {inner}"
                );
            }
            Ok(())
        },
    );
}

#[test]
fn files_of_an_inner_proc_come_back() {
    skips::as_root("files_of_an_inner_proc_come_back", || {
        // Of a process that lives, of one that has ended, and of one that ends as its directory is entered.
        let inner = "sleep 1001 </dev/null & exec 5</proc/$!/status 6</proc/self/task/1/comm 9</proc/$!
            sleep 7 & ended=$!; exec 7</proc/$ended/status; cd /proc/$ended; kill $ended; wait $ended || true
            exec 8</proc/sys/kernel/ostype";
        let tree = comes_back(&beside(UNSHARE, inner))?;
        let family = process::family(tree.pid);
        let first = family
            .iter()
            .find(|pid| fs::read_link(format!("/proc/{pid}/fd/5")).is_ok());
        let first = first.expect("a task has the files");
        let read = |file: u32| fs::read_to_string(format!("/proc/{first}/fd/{file}"));
        ensure!(read(5)?.contains("sleep") && read(6)? == "sleep\n" && read(8)? == "Linux\n");
        ensure!(read(7).is_err(), "its process has ended");
        Ok(())
    });
}

#[test]
fn a_proc_from_around_the_tree_stays_one() {
    skips::as_root("a_proc_from_around_the_tree_stays_one", || {
        let mut tree = Tree::start(&format!("{BARE}{SLEEP}"))?;
        tree.dump(&[])?;
        tree.restore(&[])?;
        // The tree's own one hides it.
        let script = format!("umount /proc; cat /proc/{}/comm", tree.pid);
        let seen = tree.inside(&["sh", "-ec", &script])?;
        expect_success(&seen)?;
        ensure!(seen.stdout == b"sleep\n", "{seen:?}");
        Ok(())
    });
}

#[test]
fn a_proc_of_a_pid_namespace_that_has_ended_is_refused() {
    skips::as_root(
        "a_proc_of_a_pid_namespace_that_has_ended_is_refused",
        || {
            let script = "mkdir $DIR/p; unshare --pid --fork mount -t proc ended $DIR/p\n";
            let tree = Tree::start(&format!("{BARE}{script}{SLEEP}"))?;
            let refused = tree.floe(&["dump", "-t", &tree.pid.to_string()])?;
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            ensure!(refused.status.code() == Some(3), "{said}");
            ensure!(
                said.contains("/p (proc, of a pid namespace that is not the tree's)"),
                "{said}"
            );
            Ok(())
        },
    );
}
