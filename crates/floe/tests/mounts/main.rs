//! Trees with mount namespaces of their own. Needs root and util-linux; says `skipped` without.

mod kinds;
mod of_caller;
mod options;
mod procs;
mod tree;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use testkit::skips;
use tree::{SLEEP, Tree, expect_success};

/// Mounts of all sorts below `$DIR/t`; the host's own tmpfs are left out, whatever is in them.
const MANY: &str = "
while umount /dev/shm 2>/dev/null; do :; done
mkdir $DIR/t; cd $DIR/t
mount -t tmpfs -o size=1m,mode=750 memory $DIR/t
cd $DIR/t
echo content >file; mkdir a b c d gone over ro
mount --bind a b; mount --make-shared b
mount --bind b c; mount --make-slave c
mount --bind c d; mount --make-slave d; mount --make-shared d
mount --bind gone over; rmdir gone
mount -t tmpfs lower ro; echo hidden >ro/file
mount -t tmpfs -o ro,nosuid,noexec upper ro
mount --make-unbindable ro
mkdir keys huge
mount -t ramfs -o mode=700 keys keys; echo secret >keys/one
if grep -q hugetlbfs /proc/filesystems; then mount -t hugetlbfs -o pagesize=2M none huge; fi
";

#[test]
fn mounts_come_back_with_flags_groups_and_files() {
    if skips::is_root("mounts_come_back_with_flags_groups_and_files") {
        many_mounts().expect("the tree comes back");
    }
}

fn many_mounts() -> anyhow::Result<()> {
    let mut tree = Tree::start(&format!("{MANY}exec 5<>file\n{SLEEP}"))?;
    let before = tree.mounts()?;
    let directory = tree.directory.path().join("t");
    let file = directory.join("file");
    let file = file.to_str().context("UTF-8")?.to_string();
    tree.dump(&[])?;
    ensure!(
        !Path::new(&file).exists(),
        "the mounts were not the tree's own"
    );
    tree.restore(&[])?;
    assert_eq!(before, tree.mounts()?);
    assert_eq!(tree.read(&file)?, "content\n");
    let key = directory.join("keys/one");
    assert_eq!(tree.read(key.to_str().context("UTF-8")?)?, "secret\n");
    let open = fs::read_link(format!("/proc/{}/fd/5", tree.pid))?;
    assert_eq!(open.to_str(), Some(file.as_str()));
    // A mount made below the shared one reaches its slaves.
    let script = "cd $DIR/t; mkdir b/m; mount -t tmpfs new b/m; mountpoint -q c/m; mountpoint -q d/m; umount ro; cat ro/file";
    let done = tree.inside(&["sh", "-ec", script])?;
    expect_success(&done)?;
    assert_eq!(String::from_utf8_lossy(&done.stdout), "hidden\n");
    Ok(())
}

#[test]
fn a_failed_restore_leaves_no_mounts() {
    if skips::is_root("a_failed_restore_leaves_no_mounts") {
        failed_restores().expect("nothing stays");
    }
}

fn failed_restores() -> anyhow::Result<()> {
    let tree = Tree::start(&format!("{MANY}{SLEEP}"))?;
    tree.dump(&[])?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for step in (1..50).step_by(4) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
        command.args(["restore", "-d", "-D"]).arg(tree.images());
        let output = command.env("FLOE_FAULT", format!("step:{step}")).output()?;
        if output.status.success() {
            bail!("step {step} is none");
        }
        ensure!(
            output.status.signal().is_some() || output.status.code().is_some(),
            "it ended"
        );
        assert_eq!(
            mounts,
            fs::read_to_string("/proc/self/mountinfo")?,
            "step {step}"
        );
    }
    Ok(())
}

/// A root of its own below `$DIR/root`, with programs from outside.
const CONTAINER: &str = "
R=$DIR/root
mkdir $R
mount --bind $R $R
mkdir $R/proc $R/old $R/dev $R/usr
for d in bin lib lib64 sbin; do [ -e /$d ] && ln -s usr/$d $R/$d; done
mount -t proc proc $R/proc
mount -t tmpfs -o mode=755 dev $R/dev
touch $R/dev/null $R/dev/mask; mount --bind /dev/null $R/dev/null
mkdir $R/dev/pts; mount -t devpts -o newinstance,ptmxmode=666 devpts $R/dev/pts
mount --bind /usr $R/usr
mount --bind $R/dev/null $R/proc/version
mount --bind $R/proc/sys $R/proc/sys; mount -o remount,bind,ro $R/proc/sys
cd $R; pivot_root . old; umount -l old; rmdir old
exec 6</proc/self/status
";

#[test]
fn a_container_gets_its_root_and_external_mounts() {
    if skips::is_root("a_container_gets_its_root_and_external_mounts") {
        container().expect("the container comes back");
    }
}

fn container() -> anyhow::Result<()> {
    // Seen from inside after the change of roots.
    let end = SLEEP.replace("touch $READY", "touch /ready");
    let mut tree = Tree::start_with(&(CONTAINER.to_string() + &end), "root/ready")?;
    let before = tree.mounts()?;
    let external = [
        "--external",
        "mnt[/usr]:programs",
        "--external",
        "mnt[/dev/null]:null",
    ];
    tree.dump(&external)?;
    // The engine supplies a root somewhere else.
    let root = tree.directory.path().join("root");
    let root = root.to_str().context("UTF-8")?.to_string();
    let without = tree.floe(&["restore", "-d", "--root", &root])?;
    let said = String::from_utf8_lossy(&without.stderr).into_owned();
    ensure!(
        without.status.code() == Some(3) && said.contains("--external mnt[null]:PATH"),
        "{said}"
    );
    let external = [
        "--root",
        &root,
        "--external",
        "mnt[programs]:/usr",
        "--external",
        "mnt[null]:/dev/null",
    ];
    tree.restore(&external)?;
    assert_eq!(before, tree.mounts()?);
    let open = fs::read_link(format!("/proc/{}/fd/6", tree.pid))?;
    assert_eq!(open.to_str(), Some("/proc/1/status"));
    let status = tree.read("/proc/1/status")?;
    assert!(status.contains("sleep"), "{status}");
    Ok(())
}

/// Overlays with their layers in a file system of the tree, one of them with a list of layers that is longer
/// than one option, and one on top of another.
const OVERLAYS: &str = "
while umount /dev/shm 2>/dev/null; do :; done
mkdir $DIR/t; mount -t tmpfs memory $DIR/t; cd $DIR/t
mkdir upper work merged many upper2 work2 top
LAYERS=
for i in $(seq 30); do
    layer=$DIR/t/layer-$i; mkdir $layer; echo $i >$layer/file-$i; LAYERS=$LAYERS:$layer
done
mount -t overlay -o lowerdir=$DIR/t/layer-1,upperdir=$DIR/t/upper,workdir=$DIR/t/work one merged
echo changed >merged/file-1
mount -t overlay -o lowerdir=${LAYERS#:} many many
mount -t overlay -o lowerdir=$DIR/t/merged,upperdir=$DIR/t/upper2,workdir=$DIR/t/work2 two top
echo new >top/new
mkdir below; mount --bind many below
exec 5<many/file-30
";

#[test]
fn overlays_of_the_tree_come_back() {
    if skips::is_root("overlays_of_the_tree_come_back") {
        overlays().expect("the tree comes back");
    }
}

fn overlays() -> anyhow::Result<()> {
    let mut tree = Tree::start(&format!("{OVERLAYS}{SLEEP}"))?;
    let options = |tree: &Tree| -> anyhow::Result<Vec<String>> {
        let mut mounts = tree.mounts()?;
        // A list of layers may be shown as one or one by one.
        for mount in &mut mounts {
            *mount = mount
                .replace("ro,lowerdir+=", "ro,lowerdir=")
                .replace(",lowerdir+=", ":");
        }
        Ok(mounts)
    };
    let before = options(&tree)?;
    let directory = tree.directory.path().join("t");
    let directory = directory.to_str().context("UTF-8")?.to_string();
    for round in 0..2 {
        tree.dump(&[])?;
        tree.restore(&[])?;
        assert_eq!(before, options(&tree)?, "round {round}");
        let read = |name: &str| tree.read(&format!("{directory}/{name}"));
        assert_eq!(read("merged/file-1")?, "changed\n");
        assert_eq!(read("layer-1/file-1")?, "1\n");
        assert_eq!(
            (read("top/new")?, read("below/file-7")?),
            ("new\n".into(), "7\n".into())
        );
        let open = fs::read_to_string(format!("/proc/{}/fd/5", tree.pid))?;
        assert_eq!(open, "30\n");
    }
    // The kernel knows a layer by the name that it had when it was mounted.
    let root = |tree: &Tree| format!("/proc/{}/root{directory}", tree.pid);
    fs::rename(root(&tree) + "/layer-3", root(&tree) + "/moved")?;
    tree.dump(&[])?;
    tree.restore(&[])?;
    assert_eq!(tree.read(&format!("{directory}/many/file-3"))?, "3\n");
    assert!(options(&tree)?.concat().contains("/moved:"));
    // Of this one nothing is seen.
    fs::remove_file(root(&tree) + "/layer-5/file-5")?;
    fs::rename(root(&tree) + "/layer-5", root(&tree) + "/gone")?;
    let pid = tree.pid.to_string();
    let refused = tree.floe(&["dump", "-t", &pid])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("layer-5"), "{said}");
    Ok(())
}

/// Overlays whose layers are named from a directory, or have moved with it.
const MOVED: &str = "
while umount /dev/shm 2>/dev/null; do :; done
mkdir $DIR/t; mount -t tmpfs memory $DIR/t; cd $DIR/t
mkdir -p near/upper near/work near/l1 near/l2 merged far/upper far/work far/lower moved second
echo 1 >near/l1/one; echo 2 >near/l2/two; echo 3 >far/lower/three
cd near; mount -t overlay -o lowerdir=l1:l2,upperdir=upper,workdir=work one ../merged; cd ..
mount -t overlay -o lowerdir=$DIR/t/far/lower,upperdir=$DIR/t/far/upper,workdir=$DIR/t/far/work two second
echo new >merged/new; echo newer >second/newer; mv far 'moved/so far'
cd /
";

#[test]
fn layers_are_found_where_they_are_now() {
    skips::as_root("layers_are_found_where_they_are_now", || {
        let mut tree = Tree::start(&format!("{MOVED}{SLEEP}"))?;
        for round in 0..2 {
            tree.dump(&[])?;
            tree.restore(&[])?;
            let words = "cd $DIR/t; cat merged/* second/*; echo x >>merged/one; cat near/upper/one";
            let seen = tree.inside(&["sh", "-ec", words])?;
            expect_success(&seen)?;
            let seen = String::from_utf8_lossy(&seen.stdout).replace('\n', " ");
            let changed = "x ".repeat(round);
            let expected = format!("new 1 {changed}2 newer 3 1 {changed}x ");
            ensure!(seen == expected, "{seen} instead of {expected}");
        }
        Ok(())
    });
}

/// Most of it is the same again and again, which compresses fast.
const LARGE: &str = "
while umount /dev/shm 2>/dev/null; do :; done
mkdir $DIR/t; mount -t tmpfs memory $DIR/t; cd $DIR/t
for i in 1 2 3 4; do yes $i | head -c 50M >file-$i; done
head -c 2M /dev/urandom >random; md5sum * >sums; cd /
";

/// More than this none of our processes may ever hold.
const BOUND: usize = 96 << 20;

#[test]
fn large_content_takes_little_memory() {
    skips::as_root("large_content_takes_little_memory", || {
        let mut tree = Tree::start(&format!("{LARGE}{SLEEP}"))?;
        tree.dump(&[])?;
        let images = fs::read_dir(tree.images())?;
        let sizes = images.map(|entry| Ok(entry?.metadata()?.len()));
        let stored = sizes.sum::<std::io::Result<u64>>()?;
        tree.restore(&[])?;
        let check = tree.inside(&["sh", "-c", "cd $DIR/t && md5sum --quiet -c sums"])?;
        expect_success(&check)?;
        let peak = testkit::process::peak_of_children()?;
        ensure!(peak < BOUND, "{peak} bytes of memory, {stored} of images");
        Ok(())
    });
}
