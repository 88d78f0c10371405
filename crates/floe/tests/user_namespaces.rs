//! Trees with user namespaces, of the root and below, with and without pid namespaces of their own. Needs root and
//! util-linux; says `skipped` without.
//!
//! Each test has a pid namespace around it, in which no number is taken by others.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testkit::skips;

/// Dumps and restores the tree of `$TREE`, which has `$SLEEPS` processes that sleep, and shows it before and
/// after: ids, rights, maps, and of each namespace which one is around it and which one owns it. With `$WRAP` that
/// begins a pid namespace, its first process is the root.
const SCRIPT: &str = r#"
tree() { echo $1; for c in $(cat /proc/$1/task/*/children); do tree $c; done; }
sleeps() { for p in $(tree $1); do cat /proc/$p/comm; done 2>/dev/null | grep -c sleep; }
facts() {
  for p in $(tree $1); do
    grep -E '^(Name|Uid|Gid|Groups|Cap|Sec|NoNew|NSpid|NSpgid|NSsid|Threads)' /proc/$p/status | tr '\n\t' '  '
    cat /proc/$p/uid_map /proc/$p/gid_map /proc/$p/setgroups | tr -s ' \n' ' '
    # It looks at all processes, and says nothing where one ends meanwhile.
    until lsns -n -r -o TYPE,NS,PNS,ONS -p $p | sort | tr '\n' ' ' | grep .; do :; done | tr '\n' ' '
    [ -z "$LOOK" ] || eval "nsenter -t $p $LOOK" | tr '\n' ' '
    echo
  done
}
cd "$DIR"
chmod 777 .
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
$FLOE dump -t $root -D images
while [ -d /proc/$root ]; do wait 2>/dev/null || true; done
eval "$BEFORE"
eval $FLOE restore -d -D images --pidfile "$DIR/pid" $RESTORE
facts $(cat pid) >after
eval "$AFTER"
[ $$ = 1 ] || kill -9 $(tree $(cat pid)) || true
"#;

#[derive(Default)]
struct Case<'a> {
    wrap: &'a str,
    tree: &'a str,
    sleeps: u32,
    /// Arguments of nsenter, which shows something of every task.
    look: &'a str,
    /// What `$DIR/look` does, for `look` to name.
    script: &'a str,
    /// What is done between dump and restore, options of the restore, and what is done in the end.
    before: &'a str,
    restore: &'a str,
    after: &'a str,
    /// Without a pid namespace around: its proc would lie on another one.
    bare: bool,
}

/// The facts before and after.
fn run(case: &Case<'_>) -> anyhow::Result<[Vec<String>; 2]> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("look"), case.script)?;
    let around = match case.bare {
        true => "sh -ec",
        false => "--pid --fork --kill-child --mount-proc sh -ec",
    };
    let output = Command::new("unshare")
        .args(around.split(' '))
        .arg(SCRIPT)
        .env("DIR", directory.path())
        .env("FLOE", env!("CARGO_BIN_EXE_floe"))
        .env("WRAP", case.wrap)
        .env("TREE", case.tree)
        .env("SLEEPS", case.sleeps.to_string())
        .env("LOOK", case.look)
        .env("BEFORE", case.before)
        .env("RESTORE", case.restore)
        .env("AFTER", case.after)
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
        Some(format!("n{place}"))
    };
    let mut line = |line: &str| -> String {
        let words: Vec<String> = line.split_whitespace().filter_map(&mut word).collect();
        words.join(" ")
    };
    text.lines().map(&mut line).collect()
}

fn comes_back(case: &Case<'_>) -> anyhow::Result<Vec<String>> {
    let [before, after] = run(case)?;
    ensure!(before == after, "{before:#?} became {after:#?}");
    Ok(before)
}

/// A tree that runs one after the other what `trees` has, each with one process that sleeps.
fn each_comes_back(name: &str, trees: &[&str]) {
    skips::as_root(name, || {
        for tree in trees {
            let case = Case {
                tree,
                sleeps: 1,
                ..Case::default()
            };
            comes_back(&case).with_context(|| (*tree).to_string())?;
        }
        Ok(())
    });
}

#[test]
fn a_user_namespace_without_a_pid_namespace_comes_back() {
    each_comes_back(
        "a_user_namespace_without_a_pid_namespace_comes_back",
        &[
            "exec unshare --user --map-root-user sleep 1000",
            "exec unshare --user sleep 1000",
            "exec unshare --user --map-root-user --net --uts --ipc --cgroup sleep 1000",
            "unshare --user --map-root-user --cgroup sleep 1000 & wait",
            // The network is that of another user namespace, in which nobody is any more.
            "exec unshare --user --map-root-user --net unshare --user --map-root-user sleep 1000",
        ],
    );
}

/// As `unshare -Ur` of somebody who is not root leaves them.
#[test]
fn groups_that_cannot_be_set_inside_come_back() {
    let user = "setpriv --reuid 1000 --regid 1000 --groups 27,44";
    each_comes_back(
        "groups_that_cannot_be_set_inside_come_back",
        &[
            &format!("exec {user} unshare --user --map-root-user sleep 1000"),
            &format!("exec {user} unshare --user --map-root-user --net sleep 1000"),
            &format!("exec {user} unshare --user sleep 1000"),
        ],
    );
}

/// Sets maps from outside, as container engines do.
const MAPPED: &str = r#"unshare --user sleep 1000 & n=$!
    until [ "$(cat /proc/$n/comm)" = sleep ]; do :; done
    echo 0 100000 1000 >/proc/$n/uid_map
    printf '0 200000 500\n500 300000 1000\n' >/proc/$n/gid_map
    nsenter -t $n --user setpriv --reuid 5 --regid 7 --groups 8,900 --inh-caps=-all,+chown \
        --ambient-caps=-all,+chown --bounding-set=-sys_time sleep 1001 &
    exec sleep 1002"#;

#[test]
fn ids_and_capabilities_within_maps_come_back() {
    skips::as_root("ids_and_capabilities_within_maps_come_back", || {
        let case = Case {
            tree: MAPPED,
            sleeps: 3,
            ..Case::default()
        };
        let facts = comes_back(&case)?;
        let inner = facts.iter().find(|line| line.contains("Uid: 100005"));
        ensure!(
            inner.is_some_and(|line| line.contains("Groups: 200008 300400")),
            "{facts:#?}"
        );
        Ok(())
    });
}

#[test]
fn user_namespaces_of_single_tasks_come_back() {
    skips::as_root("user_namespaces_of_single_tasks_come_back", || {
        let case = Case {
            tree: "unshare --user --map-root-user sh -c '
                    unshare --user --map-root-user --net sleep 1000 &
                    unshare --uts sh -c \"hostname inner-floe; setsid sleep 1001\" &
                    exec sleep 1002' &
                setpriv --reuid 33 --clear-groups unshare --user --map-root-user --ipc sleep 1003 &
                sleep 1004 & unshare --uts sleep 1005 & exec sleep 1006",
            sleeps: 7,
            look: "--uts hostname",
            ..Case::default()
        };
        comes_back(&case).map(drop)
    });
}

#[test]
fn threads_in_a_user_namespace_have_their_numbers() {
    skips::as_root("threads_in_a_user_namespace_have_their_numbers", || {
        let python = "exec unshare --user --map-root-user python3 -c '
import threading, time
for _ in range(9): threading.Thread(target=time.sleep, args=(1000,)).start()
open(\"/proc/self/comm\", \"w\").write(\"sleep\")'";
        let case = Case {
            tree: python,
            sleeps: 1,
            look: "--net ls /proc/$p/task",
            ..Case::default()
        };
        let facts = comes_back(&case)?;
        ensure!(facts[0].contains("Threads: 10"), "{facts:#?}");
        Ok(())
    });
}

#[test]
fn pid_namespaces_of_user_namespaces_come_back() {
    skips::as_root("pid_namespaces_of_user_namespaces_come_back", || {
        let crowd = "unshare -Urpf --net sh -c 'sleep 1000 & setsid sleep 1001 &
            setsid sh -c \"sleep 1002 & exit 3\" & exec sleep 1003' & exec sleep 1004";
        let nested = "unshare -Urpf unshare -Urpf sh -c 'sleep 1000 & unshare --pid --fork sleep 1001 &
            exec sleep 1002' & setpriv --reuid 1000 --regid 1000 --groups 27 unshare -Upf sleep 1003 &
            exec sleep 1004";
        for tree in [crowd, nested] {
            for wrap in ["", "unshare --pid --fork"] {
                let case = Case {
                    wrap,
                    tree,
                    sleeps: 5,
                    ..Case::default()
                };
                comes_back(&case)?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_root_in_a_user_namespace_within_its_pid_namespace_comes_back() {
    let name = "a_root_in_a_user_namespace_within_its_pid_namespace_comes_back";
    skips::as_root(name, || {
        // The pid namespace belongs to the user namespace, or to the one around it.
        for wrap in [
            "setpriv --reuid 1000 --regid 1000 --groups 27 unshare -Urpf",
            "unshare --pid --fork unshare -Ur",
            "unshare -Urpf unshare -Ur",
        ] {
            let python = "python3 -c 'import threading, time
for _ in range(3): threading.Thread(target=time.sleep, args=(1000,)).start()
open(\"/proc/self/comm\", \"w\").write(\"sleep\")' & exec sleep 1001";
            let case = Case {
                wrap,
                tree: python,
                sleeps: 2,
                ..Case::default()
            };
            comes_back(&case).context(wrap)?;
        }
        Ok(())
    });
}

/// What runs in a mount namespace, without the memory of other programs.
fn in_own_mounts(tree: &str) -> String {
    format!(
        "exec unshare --mount bash -c 'exec 10<&- </dev/null >/dev/null 2>&1
        umount -l /dev/shm || :
        {tree}'"
    )
}

#[test]
fn sandboxes_come_back() {
    let name = "sandboxes_come_back";
    skips::as_root(name, || {
        if Command::new("bwrap").arg("--version").output().is_err() {
            return skips::skip(name, "bwrap is not installed");
        }
        let base = "--ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib \
            --symlink usr/lib64 /lib64 --dev /dev --tmpfs /tmp";
        for options in [
            "--unshare-all --ro-bind / / --dev /dev --proc /proc --tmpfs /tmp".to_string(),
            format!("--unshare-all --uid 5 --gid 6 --hostname floe --proc /proc {base}"),
            format!("--unshare-user --share-net --die-with-parent {base}"),
        ] {
            let case = Case {
                tree: &in_own_mounts(&format!("bwrap {options} sleep 1000 & exec sleep 1001")),
                sleeps: 2,
                look: "--mount cat /proc/1/comm",
                bare: true,
                ..Case::default()
            };
            comes_back(&case).with_context(|| options.clone())?;
        }
        Ok(())
    });
}

/// Their root may mount them again with other options, and nobody else can have files there.
#[test]
fn file_systems_of_a_user_namespace_belong_to_it_again() {
    let name = "file_systems_of_a_user_namespace_belong_to_it_again";
    skips::as_root(name, || {
        let inside = "exec 10<&- </dev/null >/dev/null 2>&1
            mount -t tmpfs -o size=64k,mode=750 none /mnt && mkdir /mnt/kept
            mount -t devpts -o newinstance,ptmxmode=0666 none /mnt/kept
            mount -t tmpfs -o size=96k none /srv
            mkdir /srv/l /srv/u /srv/w; echo lower >/srv/l/f
            mount -t overlay -o lowerdir=/srv/l,upperdir=/srv/u,workdir=/srv/w,userxattr o /media";
        let script =
            "grep -E ' (/mnt|/mnt/kept|/srv|/media) ' /proc/self/mountinfo | cut -d ' ' -f 4-6,9-
            stat -c %u:%a /mnt /srv /mnt/kept/*
            touch /srv/new; stat -c %u /srv/new; rm /srv/new
            echo more >>/media/f; stat -c %u /srv/u/f; echo lower >/media/f; touch /media/new
            stat -c %u /srv/u/new; rm /media/new
            mount -t overlay o /media -o remount,ro; echo $?; touch /media/no; echo $?
            mount -t overlay o /media -o remount,rw; echo $?
            mount -t tmpfs none /srv -o remount,size=96k; echo $?
            mount -t tmpfs none /mnt -o remount,size=64k; echo $?";
        // Whoever has it made ends soon, and is not of the tree.
        let mapped = in_own_mounts(&format!(
            "setsid sh -c \"unshare --user sleep 3 & echo \\$! >holder\"; n=$(cat holder)
            until [ $(cat /proc/$n/comm) = sleep ]; do :; done
            echo 0 100000 1000 >/proc/$n/uid_map; echo 0 100000 1000 >/proc/$n/gid_map
            exec nsenter -t $n --user -S 0 -G 0 unshare --mount bash -c \"{inside}; exec sleep 1001\""
        ));
        let own = in_own_mounts(&format!(
            "exec unshare -Ur --mount bash -c \"{inside}; exec sleep 1001\""
        ));
        for (tree, how) in [(mapped, "-S 0 -G 0"), (own, "--preserve-credentials")] {
            let case = Case {
                tree: &tree,
                sleeps: 1,
                look: &format!("--user --mount {how} sh $DIR/look"),
                script,
                bare: true,
                ..Case::default()
            };
            let facts = comes_back(&case)?;
            ensure!(
                facts[0].ends_with(" 0 0 0 0 1 0 0 0"),
                "it may mount again: {facts:#?}"
            );
        }
        Ok(())
    });
}

/// Makes a user namespace of somebody else's, whose task is `$other`.
const OTHER: &str = "unshare --user --net sleep 2000 & other=$!
    until [ $(cat /proc/$other/comm) = sleep ]; do :; done
    echo 0 300000 1000 >/proc/$other/uid_map; echo 0 400000 1000 >/proc/$other/gid_map";

/// Shows ids, and whether a task is in the namespaces of `$other`.
const JOINED: &str = "for p in $(tree $(cat pid)); do
    grep -E '^(Uid|Gid|Groups)' /proc/$p/status | tr '\\n\\t' '  '
    for ns in user net; do [ /proc/$p/ns/$ns -ef /proc/$other/ns/$ns ] && echo joined-$ns; done | tr '\\n' ' '
    tr -s ' \\n' ' ' </proc/$p/uid_map; grep CapEff /proc/$p/status
    done >after; kill -9 $other";

/// Goes as root into a user namespace with maps; whoever has made it ends soon, and is not of the tree.
const ENTERED: &str = r#"setsid sh -c "unshare --user sleep 3 & echo \$! >holder"; n=$(cat holder)
    until [ "$(cat /proc/$n/comm)" = sleep ]; do :; done
    echo 0 100000 1000 >/proc/$n/uid_map; echo 0 100000 1000 >/proc/$n/gid_map
    exec nsenter -t $n --user -S 0 -G 0"#;

fn joins(tree: &str, sleeps: u32, wrap: &str, restore: &str) -> anyhow::Result<Vec<String>> {
    let case = Case {
        tree,
        sleeps,
        wrap,
        before: OTHER,
        restore,
        after: JOINED,
        ..Case::default()
    };
    let [_, after] = run(&case).with_context(|| format!("{tree} {restore}"))?;
    Ok(after)
}

#[test]
fn a_user_namespace_is_joined() {
    skips::as_root("a_user_namespace_is_joined", || {
        let user = "setpriv --reuid 5 --regid 7 --groups 8 sleep 1000 & exec sleep 1001";
        let mapped = format!("{ENTERED} sh -c '{user}'");
        for tree in [user, &mapped] {
            for given in ["$other", "/proc/$other/ns/user", "$other,0,0"] {
                let option = format!("--join-ns user:{given} --join-ns net:$other");
                let facts = joins(tree, 2, "", &option)?;
                ensure!(facts.len() == 2, "{facts:#?}");
                for line in &facts {
                    ensure!(
                        line.contains("joined-user joined-net 0 300000 1000"),
                        "{facts:#?}"
                    );
                }
                let child = facts.iter().find(|line| line.contains("Uid: 300005"));
                let child = child.with_context(|| format!("{facts:#?}"))?;
                ensure!(
                    child.contains("Gid: 400007") && child.contains("Groups: 400008"),
                    "{facts:#?}"
                );
                ensure!(child.ends_with("0000000000000000"), "{facts:#?}");
                ensure!(facts[0].contains("Uid: 300000"), "{facts:#?}");
                ensure!(!facts[0].ends_with("0000000000000000"), "{facts:#?}");
            }
        }
        Ok(())
    });
}

#[test]
fn what_belonged_to_the_roots_user_namespace_belongs_to_the_joined_one() {
    let name = "what_belonged_to_the_roots_user_namespace_belongs_to_the_joined_one";
    skips::as_root(name, || {
        let tree = "unshare -Ur sleep 1000 & exec sleep 1001";
        for wrap in ["unshare -Urpf --net --uts", "unshare --pid --fork"] {
            let facts = joins(tree, 2, wrap, "--join-ns user:$other")?;
            ensure!(facts[0].contains("joined-user 0 300000 1000"), "{facts:#?}");
            // As seen from outside; inside it is what it was.
            ensure!(facts[1].contains(" 0 300000 1 "), "{facts:#?}");
        }
        Ok(())
    });
}

#[test]
fn the_callers_user_namespace_is_joined() {
    skips::as_root("the_callers_user_namespace_is_joined", || {
        let tree = format!("{ENTERED} unshare --net setpriv --bounding-set=-all sleep 1000");
        let facts = joins(&tree, 1, "", "--join-ns user:$$")?;
        ensure!(facts[0].contains("Uid: 0 0 0 0"), "{facts:#?}");
        ensure!(facts[0].contains("0 0 4294967295"), "{facts:#?}");
        Ok(())
    });
}

#[test]
fn a_user_namespace_without_names_for_the_ids_is_not_joined() {
    let name = "a_user_namespace_without_names_for_the_ids_is_not_joined";
    skips::as_root(name, || {
        let tree = "exec setpriv --reuid 5000 --clear-groups sleep 1000";
        let refused = joins(tree, 1, "", "--join-ns user:$other").err();
        let said = format!("{:#}", refused.context("it has no user 5000")?);
        ensure!(said.contains("uid_map"), "{said}");
        let tree = "exec sleep 1000";
        let refused = joins(tree, 1, "", "--join-ns user:$other,4000,0").err();
        let said = format!("{:#}", refused.context("it has no user 4000")?);
        ensure!(said.contains("user 4000"), "{said}");
        Ok(())
    });
}

#[test]
fn open_user_namespaces_come_back() {
    skips::as_root("open_user_namespaces_come_back", || {
        let case = Case {
            // The second is around that of the second child, and nobody is in it.
            tree: "unshare -Ur sleep 1000 & a=$!; unshare -Ur unshare -Ur sleep 1001 & b=$!
                until [ $(cat /proc/$a/comm)$(cat /proc/$b/comm) = sleepsleep ]; do :; done
                exec 3</proc/$a/ns/user 4</proc/$b/ns/user 5</proc/self/ns/user; exec sleep 1002",
            sleeps: 3,
            look: "--net stat -Lc %i /proc/$p/fd/* 2>/dev/null | sed s/^/inode\\ / | grep 402 || :",
            ..Case::default()
        };
        let facts = comes_back(&case)?;
        ensure!(facts[0].matches("inode").count() == 3, "{facts:#?}");
        Ok(())
    });
}

#[test]
fn a_restore_of_low_priority_gives_tasks_theirs() {
    let name = "a_restore_of_low_priority_gives_tasks_theirs";
    skips::as_root(name, || {
        let [before, after] = run(&Case {
            tree: "nice -n 2 unshare -Ur sleep 1000 & exec unshare -Ur sleep 1001",
            sleeps: 2,
            look: "ps -o ni= -p $p",
            before: "renice -n 5 $$ >/dev/null",
            ..Case::default()
        })?;
        ensure!(before == after, "{before:#?} became {after:#?}");
        Ok(())
    });
}

#[test]
fn limits_that_only_the_mapped_root_may_set_come_back() {
    let name = "limits_that_only_the_mapped_root_may_set_come_back";
    skips::as_root(name, || {
        let inside = "echo 5555 >/proc/sys/kernel/msgmax; echo 55 >/proc/sys/fs/mqueue/msg_max; exec sleep 1000";
        let tree = format!("{ENTERED} unshare --ipc sh -c \"{inside}\"");
        let facts = comes_back(&Case {
            tree: &tree,
            sleeps: 1,
            look: "--ipc cat /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max",
            bare: true,
            ..Case::default()
        })?;
        ensure!(facts[0].ends_with("5555 55"), "{facts:#?}");
        Ok(())
    });
}
