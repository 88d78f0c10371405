//! Trees whose root is among the mounts of its caller, with a child that has left them. Each test is a script in
//! a mount namespace that stands for the caller's, as the first process of a pid namespace: it reaps.

use super::options::runs_in;

/// `begin PROPAGATION SCRIPT`: a child runs SCRIPT in mounts of its own, then both sleep. `seen` are its mounts
/// that none hides, without their numbers and devices. `gone` says that nothing of the tree is left.
const WORDS: &str = r#"
mkdir source placed other below
cat >tree <<'TREE'
exec </dev/null >/dev/null 2>&1 10<&-
unshare --mount --propagation $1 bash -ec "$2; touch $DIR/ready; exec sleep 1001" &
exec sleep 1002
TREE
begin() {
    rm -f ready
    setsid bash tree "$@" &
    P=$!
    until [ -e ready ] && [ "$(cat /proc/$P/comm)" = sleep ]; do sleep 0.01; done
    child
}
child() { C=$(cat /proc/$P/task/$P/children); C=${C% }; until [ "$(cat /proc/$C/comm)" = sleep ]; do sleep 0.01; done; }
seen() { cut -d ' ' -f 4- /proc/$C/mountinfo | awk '{ top[$2] = $0 } END { for (point in top) print top[point] }' | sort; }
save() { rm -rf images; mkdir images; $FLOE dump -t $P -D images "$@" 2>>errors; wait $P || :; gone; }
bring() { $FLOE restore -d -D images "$@"; child; }
gone() { ! [ -e /proc/$P ] && ! [ -e /proc/$C ]; }
end() { kill -9 $P $C; while [ -e /proc/$P ] || [ -e /proc/$C ]; do sleep 0.01; done; P=; }
"#;

fn test(name: &str, script: &str) {
    let namespaces = ["--mount", "--pid", "--fork", "--mount-proc"];
    runs_in(&namespaces, name, &format!("{WORDS}{script}"));
}

#[test]
fn a_childs_mounts_come_back_from_the_callers() {
    let name = "a_childs_mounts_come_back_from_the_callers";
    test(
        name,
        r#"
mount --make-rshared /
for propagation in private slave shared; do
    begin $propagation "mount --make-private --bind source placed; mount -t tmpfs -o mode=711 t other; echo in >other/file"
    seen >before
    save; bring
    seen >after
    diff before after
    [ "$(cat /proc/$C/root/$DIR/other/file)" = in ]
    [ "$(readlink /proc/$P/ns/mnt)" = "$(readlink /proc/self/ns/mnt)" ]
    # What the caller mounts now reaches a slave and a peer.
    mount -t tmpfs later below
    reached=$(grep -c ' later ' /proc/$C/mountinfo || :)
    umount below
    case $propagation in private) [ $reached = 0 ] ;; *) [ $reached = 1 ] ;; esac
    end
done
"#,
    );
}

#[test]
fn a_place_that_is_gone_is_named_and_may_be_given_anew() {
    let name = "a_place_that_is_gone_is_named_and_may_be_given_anew";
    test(
        name,
        r#"
echo elsewhere >other/file
begin private "mount --bind source /mnt"
save
rmdir source
if $FLOE restore -d -D images 2>said; then exit 1; fi
says "$DIR/source, which is to be mounted in the tree, cannot be reached"
gone
if $FLOE verify images >said 2>&1; then exit 1; fi
says "$DIR/source"
bring --external "mnt[/mnt]:$DIR/other"
[ "$(cat /proc/$C/root/mnt/file)" = elsewhere ]
"#,
    );
}

#[test]
fn what_the_caller_has_hidden_is_left_out_and_named() {
    let name = "what_the_caller_has_hidden_is_left_out_and_named";
    test(
        name,
        r#"
mount -t tmpfs lower below; mount -t tmpfs upper below; echo top >below/file
begin private true
save -v4 -o dump.log
grep -q "the mount $DIR/below (tmpfs) below another one is left out" images/dump.log
bring
[ "$(grep -c $DIR/below /proc/$C/mountinfo)" = 1 ]
[ "$(cat /proc/$C/root/$DIR/below/file)" = top ]
echo new >below/file
[ "$(cat /proc/$C/root/$DIR/below/file)" = new ]
"#,
    );
}
