//! Trees with mount namespaces of their own. Needs root and util-linux; says `skipped` without.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{process, skips};

/// How long a tree may take to stand.
const LIMIT: Duration = Duration::from_secs(20);

/// Ends the script of every tree: the first process of a pid namespace, with files of the tree only.
const SLEEP: &str = "
touch $READY
exec </dev/null >/dev/null 2>&1
exec 10<&-
exec sleep 1000
";

/// A tree in new pid and mount namespaces; killed when dropped.
struct Tree {
    directory: tempfile::TempDir,
    pid: i32,
}

impl Tree {
    /// Runs `script`, which ends with [`SLEEP`], as the first process of the namespaces.
    fn start(script: &str) -> anyhow::Result<Tree> {
        Self::start_with(script, "ready")
    }

    /// As [`Tree::start`], with the name below the tree's directory that appears when it stands.
    fn start_with(script: &str, ready: &str) -> anyhow::Result<Tree> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let ready = directory.path().join(ready);
        fs::create_dir(directory.path().join("images"))?;
        let mut unshare = Command::new("unshare")
            .args([
                "--fork",
                "--pid",
                "--mount",
                "--mount-proc",
                "setsid",
                "bash",
                "-ec",
                script,
            ])
            .env("DIR", directory.path())
            .env("READY", &ready)
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + LIMIT;
        while !ready.exists() {
            if let Some(status) = unshare.try_wait()? {
                bail!("the script ended with {status}");
            }
            ensure!(Instant::now() < deadline, "the tree does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = fs::read_to_string(children)?.trim().parse()?;
        // The wrapper is of no use any more; its child becomes ours.
        unshare.kill()?;
        unshare.wait()?;
        let name = || fs::read_to_string(format!("/proc/{pid}/comm"));
        while name()?.trim() != "sleep" {
            ensure!(Instant::now() < deadline, "the tree does not sleep");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Tree { directory, pid })
    }

    fn images(&self) -> std::path::PathBuf {
        self.directory.path().join("images")
    }

    fn floe(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
        command.args(arguments).arg("-D").arg(self.images());
        Ok(command.output()?)
    }

    fn dump(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let pid = self.pid.to_string();
        let output = self.floe(&[&["dump", "-t", &pid], arguments].concat())?;
        expect_success(&output)?;
        process::wait_for_ends(&[self.pid], LIMIT)
    }

    fn restore(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        let pidfile = self.directory.path().join("pid");
        let path = pidfile.to_str().context("UTF-8")?;
        let output = self.floe(&[&["restore", "-d", "--pidfile", path], arguments].concat())?;
        expect_success(&output)?;
        self.pid = fs::read_to_string(&pidfile)?.trim().parse()?;
        Ok(())
    }

    /// The mounts without their numbers: those of mounts and devices are left out, those of sharing
    /// groups are counted up from one.
    fn mounts(&self) -> anyhow::Result<Vec<String>> {
        let text = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid))?;
        let mut lines: Vec<Vec<String>> = Vec::new();
        for line in text.lines() {
            let words: Vec<String> = line.split(' ').skip(3).map(str::to_string).collect();
            lines.push(words);
        }
        lines.sort_by_key(|words| words[1].clone());
        let mut groups = BTreeMap::new();
        let number = |words: Vec<String>| {
            let named = words.into_iter().map(|word| match word.split_once(':') {
                Some((kind @ ("shared" | "master"), group)) => {
                    let next = groups.len() + 1;
                    format!("{kind}:{}", groups.entry(group.to_string()).or_insert(next))
                }
                _ => word,
            });
            named.collect::<Vec<_>>().join(" ")
        };
        Ok(lines.into_iter().map(number).collect())
    }

    /// A file as the tree sees it.
    fn read(&self, path: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/root{path}", self.pid);
        fs::read_to_string(&path).with_context(|| path)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if process::is_ours(self.pid) {
            let ended = process::kill_ours(&[self.pid], LIMIT);
            if let Err(error) = ended {
                eprintln!("a tree stays: {error:#}");
            }
        }
    }
}

fn expect_success(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

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
    let inside = |command: &str| {
        let mut nsenter = Command::new("nsenter");
        let pid = tree.pid.to_string();
        nsenter.args(["-t", &pid, "-m", "-p", "sh", "-ec", command]);
        nsenter.env("DIR", tree.directory.path()).output()
    };
    let done = inside(
        "cd $DIR/t; mkdir b/m; mount -t tmpfs new b/m; mountpoint -q c/m; mountpoint -q d/m; umount ro; cat ro/file",
    )?;
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
    for step in (1..60).step_by(4) {
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
        !without.status.success() && said.contains("--external mnt[NAME]"),
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
    let root = format!("/proc/{}/root{directory}", tree.pid);
    fs::rename(format!("{root}/layer-3"), format!("{root}/moved"))?;
    let pid = tree.pid.to_string();
    let refused = tree.floe(&["dump", "-t", &pid])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(said.contains("layer-3"), "{said}");
    Ok(())
}
