//! What the command is told about mounts: those from outside, those to be left out. Each test is a script in
//! a mount namespace of its own, which is the host of the tree that it starts.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testkit::{process, skips};

/// The words of the scripts.
const WORDS: &str = r#"
mount --make-rprivate /
while umount /dev/shm 2>/dev/null; do :; done
mkdir $DIR/images; cd $DIR
# start PROPAGATION SCRIPT: the first process of new namespaces runs SCRIPT in $DIR, then sleeps.
start() {
    unshare $MORE --fork --pid --mount --mount-proc --propagation $1 setsid bash -ec "$2
touch $DIR/ready; exec </dev/null >/dev/null 2>&1 10<&-; cd /; exec sleep 1001" &
    U=$!
    until [ -e ready ]; do kill -0 $U; sleep 0.01; done
    P=$(cat /proc/$U/task/$U/children); P=${P% }
    until [ "$(cat /proc/$P/comm)" = sleep ]; do sleep 0.01; done
}
dump() { $FLOE dump -t $P -D images "$@"; wait $U || :; }
refused() { if $FLOE dump -t $P -D images "$@" 2>said; then echo "no refusal"; exit 1; fi; }
says() { grep -q -- "$1" said || { cat said; exit 1; }; }
restore() { $FLOE restore -d --pidfile $DIR/pid -D images "$@"; P=$(cat pid); }
inside() { nsenter -t $P -m -p "$@"; }
trap '[ -z "$P" ] || kill -9 $P 2>/dev/null' EXIT
"#;

fn runs(name: &str, script: &str) {
    runs_in(&["--mount"], name, script);
}

/// Runs a script in these namespaces, given as options of unshare(1).
pub fn runs_in(namespaces: &[&str], name: &str, script: &str) {
    if !skips::is_root(name) {
        return;
    }
    let run = || -> anyhow::Result<()> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let output = Command::new("unshare")
            .args(namespaces)
            .args(["bash", "-ec"])
            .arg(format!("{WORDS}{script}"))
            .env("DIR", directory.path())
            .env("FLOE", env!("CARGO_BIN_EXE_floe"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(directory.path().join("errors"))?)
            .output()?;
        let errors = fs::read_to_string(directory.path().join("errors")).context("errors")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{said}{errors}");
        Ok(())
    };
    run().unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn masters_outside_are_found_by_themselves() {
    runs(
        "masters_outside_are_found_by_themselves",
        r#"
mkdir ext; mount -t tmpfs ext ext; mount --make-shared ext; mkdir ext/sub ext/late; echo kept >ext/file
start slave "true"
refused; says "ext"
dump --external 'mnt[]:m'
refused_restore() { if $FLOE restore -d -D images 2>said; then exit 1; fi; }
refused_restore; says "mnt\[\]"
restore --external 'mnt[]:m'
inside cat $DIR/ext/file
mount -t tmpfs new ext/sub; echo seen >ext/sub/f
[ "$(inside cat $DIR/ext/sub/f)" = seen ]
inside mount -t tmpfs own $DIR/ext/late
! mountpoint -q ext/late
"#,
    );
}

#[test]
fn groups_may_be_shared_with_the_outside() {
    runs(
        "groups_may_be_shared_with_the_outside",
        r#"
mkdir ext; mount -t tmpfs ext ext; mount --make-shared ext; mkdir ext/sub ext/late
start unchanged "true"
dump --ext-mount-map auto --enable-external-sharing --enable-external-masters
restore --ext-mount-map auto --enable-external-sharing --enable-external-masters
mount -t tmpfs new ext/sub; echo seen >ext/sub/f
[ "$(inside cat $DIR/ext/sub/f)" = seen ]
inside mount -t tmpfs own $DIR/ext/late
mountpoint -q ext/late
"#,
    );
}

#[test]
fn external_mounts_are_named_both_ways() {
    runs(
        "external_mounts_are_named_both_ways",
        r#"
mkdir one two other; mount -t tmpfs one one; echo first >one/f; mount -t tmpfs two two; echo second >two/f
echo third >other/f
start private "true"
dump --ext-mount-map $DIR/one:FIRST --external mnt[$DIR/two]:SECOND
! zcat images/tmpfs-dev-*.gz.img | grep -q first
restore --mntns-compat-mode --ext-mount-map FIRST:$DIR/two --external mnt[SECOND]:$DIR/other
[ "$(inside cat $DIR/one/f)" = second ]
[ "$(inside cat $DIR/two/f)" = third ]
"#,
    );
}

#[test]
fn mounts_are_skipped_with_what_is_on_them() {
    runs(
        "mounts_are_skipped_with_what_is_on_them",
        r#"
mkdir a b
start private "mount -t tmpfs a a; mkdir a/in; mount -t tmpfs in a/in; mount -t tmpfs b b; touch b/f"
dump --skip-mnt $DIR/a
restore
! inside mountpoint -q $DIR/a
inside test -e $DIR/b/f
"#,
    );
}

#[test]
fn other_file_systems_are_enabled_by_name() {
    runs(
        "other_file_systems_are_enabled_by_name",
        r#"
mkdir a
start private "mount -t bpf r a"
refused; says "--external mnt"
dump --enable-fs bpf
restore
inside grep -q "$DIR/a .* bpf" /proc/self/mountinfo
"#,
    );
}

#[test]
fn automounters_are_refused_by_name() {
    runs(
        "automounters_are_refused_by_name",
        r#"
mkdir a
if ! start private "exec 5> >(exec sleep 1002); mount -t autofs -o fd=5,pgrp=1,minproto=5,maxproto=5,direct none a" ; then
    exit 0; fi
refused; says "autofs"; says "unmount it"
kill -0 $P
"#,
    );
}

#[test]
fn file_systems_of_programs_are_refused_by_name() {
    runs(
        "file_systems_of_programs_are_refused_by_name",
        r#"
mkdir a; [ -e /dev/fuse ] || exit 0
start private "exec 5<>/dev/fuse; mount -i -t fuse -o fd=5,rootmode=40000,user_id=0,group_id=0 prog a || exec 5<&-; exec 5<&-"
grep -q fuse /proc/$P/mountinfo || exit 0
refused; says "fuse"; says "--external mnt"
kill -0 $P
"#,
    );
}

#[test]
fn formats_of_a_user_namespace_are_its_own() {
    runs(
        "formats_of_a_user_namespace_are_its_own",
        r#"
mkdir f out; chmod 777 . f
# What lies below other mounts cannot be seen in a user namespace that did not make them.
umount -R /sys/fs/cgroup 2>/dev/null || :
MORE="--user --map-root-user" start private "mount -t binfmt_misc own f; echo ':floe-own:E::floe::/bin/x:' >f/register"
mount -t binfmt_misc host out
[ ! -e out/floe-own ]
inside cat $DIR/f/floe-own >before
dump
restore
inside cat $DIR/f/floe-own | cmp - before
[ ! -e out/floe-own ]
"#,
    );
}

#[test]
fn files_in_memory_of_the_caller_are_named_before_they_go_along() {
    runs(
        "files_in_memory_of_the_caller_are_named_before_they_go_along",
        r#"
mkdir ext own; mount -t tmpfs ext ext; head -c 8388608 /dev/zero >ext/file
start private "mount -t tmpfs own own; head -c 8388608 /dev/zero >own/file"
mkdir images/first
$FLOE dump -t $P -D images/first --leave-running 2>said
says "$DIR/ext (8 MiB)"; says "external mnt\[$DIR/ext\]:NAME"
if grep own said; then exit 1; fi
[ -n "$(ls images/first/tmpfs-dev-*)" ]
dump --external "mnt[$DIR/ext]:e" 2>said
if grep "$DIR/ext" said; then exit 1; fi
echo since >ext/since
restore --external "mnt[e]:$DIR/ext"
inside cat $DIR/ext/since; inside cmp -n 8388608 /dev/zero $DIR/own/file
"#,
    );
}

#[test]
fn what_shows_a_network_or_queues_shows_those_of_who_mounted_it() {
    runs(
        "what_shows_a_network_or_queues_shows_those_of_who_mounted_it",
        r#"
mkdir sys mq own
start private "mount -t sysfs root own; unshare --net --ipc bash -ec '
    ip link add v0 type veth peer name v1; mount -t sysfs s sys; mount -t mqueue q mq; touch mq/inner; exec 5<mq/inner
    exec sleep 1002 </dev/null >/dev/null 2>&1 10<&-' &
    until [ -e mq/inner ] && [ \$(cat /proc/\$!/comm) = sleep ]; do :; done"
see() { for d in "$@"; do inside ls -x $d; done; }
all="$DIR/sys/class/net $DIR/mq $DIR/own/class/net /sys/class/net"
see $all >before; cat before
grep -q v0 before; grep -q inner before
dump; restore
see $all >after; diff before after
inside sh -c 'ls -l /proc/[0-9]*/fd/5' | grep -q inner
kill -9 $P

# What was there before the root had a network of its own shows that of its caller.
rm -r ready images; mkdir images
MORE=--net start private "ip link add v2 type veth peer name v3; mount -t sysfs s sys"
see $DIR/sys/class/net /sys/class/net >before; [ $(grep -c v2 before) = 1 ]
dump; restore
see $DIR/sys/class/net /sys/class/net >after; diff before after
"#,
    );
}

/// As `ip netns` does with its directory of names.
#[test]
fn a_part_mounted_onto_itself_receives_from_the_same_part_outside() {
    runs(
        "a_part_mounted_onto_itself_receives_from_the_same_part_outside",
        r#"
mkdir -p names/late; mount --bind names names; mount --make-shared names
start slave "true"
dump
restore
mount -t tmpfs new names/late; echo seen >names/late/f
[ "$(inside cat $DIR/names/late/f)" = seen ]
umount names/late
dump
# Where nothing outside is shared, the tree has its mounts all the same.
umount names
$FLOE restore -d --pidfile $DIR/pid -D images 2>said; P=$(cat pid)
says "names receives no mounts of the caller's any more"
inside mountpoint -q $DIR/names
"#,
    );
}

#[test]
fn a_mount_that_only_the_caller_can_supply_is_named_with_its_place() {
    runs(
        "a_mount_that_only_the_caller_can_supply_is_named_with_its_place",
        r#"
touch network; unshare --net=network true
start private "true"
refused; says "external 'mnt\[$DIR/network\]:NAME'"
dump --external "mnt[$DIR/network]:net"
restore --external "mnt[net]:$DIR/network"
[ "$(inside stat -c %i $DIR/network)" = "$(stat -c %i network)" ]
"#,
    );
}

/// As a sandbox does.
#[test]
fn a_root_in_memory_goes_along() {
    runs(
        "a_root_in_memory_goes_along",
        r#"
begin() { start private 'mkdir new; mount -t tmpfs new new; mkdir new/bin new/old new/proc; cp /bin/busybox new/bin
    ln -s busybox new/bin/sleep; echo kept >new/file; mknod new/null c 1 3; touch ready; cd new; mount -t proc proc proc
    pivot_root . old; bin/busybox umount -l old; exec 5</file </null >/null 2>&1 10<&-; exec /bin/sleep 1001'; }
seen() { cut -d ' ' -f 4- /proc/$P/mountinfo | sort; }
if ! [ -e /bin/busybox ]; then exit 0; fi
begin
seen >before
dump
$FLOE verify images >/dev/null
restore
seen | diff before -
[ "$(cat /proc/$P/root/file)" = kept ]
[ "$(readlink /proc/$P/fd/5)" = /file ]
kill -9 $P
# Whoever supplies a root has that taken.
mkdir -p other/bin other/old other/proc; chmod 1777 other; cp /bin/busybox other/bin; ln -s busybox other/bin/sleep; mknod other/null c 1 3; echo ours >other/file
mount --bind other other
restore --root $DIR/other
[ "$(cat /proc/$P/root/file)" = ours ]
"#,
    );
}
