//! Control groups of version 1 beside those of version 2: a hierarchy with a name only, and one of two controllers
//! that version 2 has not. Each test is a script in mount and pid namespaces of its own. Needs root and util-linux.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testkit::skips;

/// The words of the scripts. A script ends with 77 where the kernel lacks these hierarchies, or somebody has them.
const WORDS: &str = r#"
mount --make-rprivate /
H=floe-test-${DIR##*.tmp}; cd $DIR
mkdir named cls fx images; chmod 777 . fx; mkfifo fx/answer
clean() {
    set +e
    [ -z "$P" ] || kill -9 $P 2>/dev/null; wait 2>/dev/null
    for try in 1 2 3 4 5 6 7 8 9 10; do
        find named cls -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
    umount named cls 2>/dev/null
    # Where groups are still going when the last mount goes, the hierarchy stays until the next one does.
    for try in $(seq 50); do
        sleep 0.05
        grep -qE "name=$H:|net_cls" /proc/self/cgroup || break
        mount -t cgroup -o none,name=$H none named && umount named
        mount -t cgroup -o net_cls,net_prio none cls && umount cls
    done
    rm fx/answer
}
trap clean EXIT
mount -t cgroup -o none,name=$H none named || exit 77
mount -t cgroup -o net_cls,net_prio none cls || exit 77
# The groups of all threads in the two hierarchies.
facts() {
    for t in /proc/$P/task/*; do
        echo ${t##*/} $(grep -E "name=$H:|net_cls" $t/cgroup | cut -d: -f2- | sort)
    done
}
# A process with threads in groups of the two; one of the threads is below its leader's group in the named one.
start() {
    mkdir -p named/a/b cls/g
    echo 0x10002 >cls/g/net_cls.classid; echo 1 >named/a/notify_on_release
    chown 7:8 named/a; chmod 2750 named/a/b
    setsid $FIXTURE threads-few $DIR/fx </dev/null >/dev/null 2>&1 & P=$!
    [ "$(timeout 20 cat fx/answer)" = ready ]
    echo $P >named/a/cgroup.procs; echo $P >cls/g/cgroup.procs
    T=$(ls /proc/$P/task | tail -1); [ $T != $P ]; echo $T >named/a/b/tasks
    facts >before; grep -q ":/a/b " before; grep -q ":/a " before
}
dump() {
    $FLOE dump -t $P -D images "$@"
    while [ -d /proc/$P ]; do wait 2>/dev/null || :; done
}
away() { find named cls -mindepth 1 -depth -type d -exec rmdir {} +; }
restore() { $FLOE restore -d -D images "$@"; facts >after; }
same() { diff before after; }
"#;

fn runs(name: &str, script: &str) {
    if !skips::is_root(name) {
        return;
    }
    let floe = PathBuf::from(env!("CARGO_BIN_EXE_floe"));
    let run = || -> anyhow::Result<bool> {
        let directory = tempfile::tempdir()?;
        let output = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["bash", "-ec"])
            .arg(format!("{WORDS}{script}"))
            .env("DIR", directory.path())
            .env("FLOE", &floe)
            .env("FIXTURE", floe.with_file_name("testkit-fixture"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(directory.path().join("errors"))?)
            .output()?;
        let errors = fs::read_to_string(directory.path().join("errors")).context("errors")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let lacks = output.status.code() == Some(77);
        ensure!(lacks || output.status.success(), "{said}{errors}");
        Ok(lacks)
    };
    if run().unwrap_or_else(|error| panic!("{error:#}")) {
        skips::skip(name, "no control groups of version 1").expect("the skip is listed");
    }
}

#[test]
fn tasks_and_threads_come_back_into_groups_that_are_made_anew() {
    runs(
        "tasks_and_threads_come_back_into_groups_that_are_made_anew",
        r#"
start; stat -c '%n %a %u %g' named/a named/a/b cls/g >perms
dump; away; restore; same
[ $(cat cls/g/net_cls.classid) = 65538 ]
[ $(cat named/a/notify_on_release) = 1 ]
stat -c '%n %a %u %g' named/a named/a/b cls/g | diff perms -
"#,
    );
}

#[test]
fn groups_that_are_there_keep_their_properties_or_are_given_the_saved_ones() {
    runs(
        "groups_that_are_there_keep_their_properties_or_are_given_the_saved_ones",
        r#"
start; dump; echo 5 >cls/g/net_cls.classid
restore; same; [ $(cat cls/g/net_cls.classid) = 5 ]
dump; echo 6 >cls/g/net_cls.classid
restore --manage-cgroups=full; same; [ $(cat cls/g/net_cls.classid) = 5 ]
# The other groups of the tree are those that the test is in.
dump --cgroup-dump-controller name=$H --cgroup-dump-controller net_cls
! $FLOE restore -d -D images --manage-cgroups=strict 2>said; grep -q "is here already" said
away
! $FLOE restore -d -D images --manage-cgroups=none 2>said; grep -q "let the restore make it: --manage-cgroups=soft" said
restore --manage-cgroups=strict; same; [ $(cat cls/g/net_cls.classid) = 5 ]
"#,
    );
}

#[test]
fn each_hierarchy_may_have_a_root_of_its_own_at_the_restore() {
    runs(
        "each_hierarchy_may_have_a_root_of_its_own_at_the_restore",
        r#"
start; dump; away
restore --cgroup-root name=$H:/moved/away --cgroup-root net_prio:/else
sed "s|/a|/moved/away|; s|/g|/else|" before | diff - after
[ $(cat cls/else/net_cls.classid) = 65538 ]
dump; away
restore --cgroup-root /all
sed "s|/a|/all|; s|/g|/all|" before | diff - after
"#,
    );
}

#[test]
fn hierarchies_are_found_in_a_yard() {
    runs(
        "hierarchies_are_found_in_a_yard",
        r#"
mkdir yard empty
while IFS=: read _ names _; do
    to=yard/${names#name=}; [ -n "$names" ] || to=yard/unified
    mkdir $to
    case $names in
        '') mount -t cgroup2 none $to ;;
        name=*) mount -t cgroup -o none,$names none $to ;;
        *) mount -t cgroup -o $names none $to ;;
    esac
done </proc/self/cgroup
start
! $FLOE dump -t $P -D images --cgroup-yard $DIR/empty 2>said; grep -q "control group hierarchy" said
dump --cgroup-yard $DIR/yard; away
! $FLOE restore -d -D images --cgroup-yard $DIR/empty 2>said; grep -q "control group hierarchy" said
restore --cgroup-yard $DIR/yard; same
[ $(cat cls/g/net_cls.classid) = 65538 ]
umount yard/*
"#,
    );
}

#[test]
fn properties_are_those_that_are_asked_for() {
    runs(
        "properties_are_those_that_are_asked_for",
        r#"
start; dump --cgroup-props '"net_cls":
- "strategy": "replace"
- "properties": []'
away; restore; same; [ $(cat cls/g/net_cls.classid) = 0 ]
echo 7 >cls/g/net_cls.classid
printf '"net_cls":\n  - "strategy": "merge"\n  - "properties": ["cgroup.clone_children"]\n' >props
dump --cgroup-props-file $DIR/props; away; restore; same; [ $(cat cls/g/net_cls.classid) = 7 ]
dump --cgroup-dump-controller name=$H; away; restore
sed "s|net_cls,net_prio:/g|net_cls,net_prio:/|" before | diff - after
"#,
    );
}
