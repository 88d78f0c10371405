//! One tree for each kind of mount, all in one way: its mounts must come back, and what a command inside says.

use anyhow::{Context, ensure};
use testkit::skips;

use super::tree::{SLEEP, Tree, expect_success};

/// A kind of mount.
struct Kind {
    name: &'static str,
    /// Run by the first process, in the directory `$DIR/t`.
    setup: &'static str,
    /// Run inside before the dump and after the restore, in the same directory: it must say the same.
    look: &'static str,
    /// Options of the dump.
    dump: &'static [&'static str],
    /// Options of the restore.
    restore: &'static [&'static str],
}

const fn kind(name: &'static str, setup: &'static str, look: &'static str) -> Kind {
    Kind {
        name,
        setup,
        look,
        dump: &[],
        restore: &[],
    }
}

/// Goes before every setup: the host's own file systems in memory are left out, whatever is in them.
const BEGIN: &str = "
while umount /dev/shm 2>/dev/null; do :; done
mkdir -p $DIR/t; cd $DIR/t
";

const KINDS: &[Kind] = &[
    kind(
        "bind of a bind, of a directory, of a file",
        "mkdir a a/sub b c d; echo x >a/sub/f; touch e
         mount -t tmpfs m a; mkdir a/sub; echo y >a/sub/f
         mount --bind a b; mount --bind b/sub c; mount --bind c d; mount --bind d/f e",
        "cat c/f d/f e; stat -c %i a/sub/f c/f d/f e | sort -u | wc -l",
    ),
    kind(
        "bind whose source is mounted over",
        "mkdir a b; mount -t tmpfs m a; mkdir a/sub; echo below >a/sub/f
         mount --bind a/sub b; mount -t tmpfs over a/sub; echo above >a/sub/f
         mount -t tmpfs top a; echo top >a/f",
        "cat b/f a/f; umount a; cat a/sub/f; umount a/sub; cat a/sub/f",
    ),
    kind(
        "deleted mount point and deleted source",
        "mkdir base; mount -t tmpfs m base; cd base; mkdir src dst file-dst; touch src-file file-dst/f
         echo in >src-file; mount --bind src dst; mount --bind src-file file-dst/f; rmdir src; rm src-file",
        "grep -c deleted /proc/self/mountinfo; ls base; stat -c %h base/dst",
    ),
    kind(
        "unbindable and private",
        "mkdir a b; mount -t tmpfs m a; mkdir a/x; mount -t tmpfs n a/x; mount --make-unbindable a/x
         mount -t tmpfs p b; mount --make-private b",
        "mkdir -p z; mount --bind a/x z 2>/dev/null || echo refused",
    ),
    kind(
        "read-only bind and read-only file system",
        "mkdir a b c; mount -t tmpfs m a; mkdir a/d; mount --bind a b; mount -o remount,bind,ro b
         mount -t tmpfs n c; echo x >c/f; mount -o remount,ro c",
        "touch b/f 2>/dev/null || echo ro; touch a/f && echo rw; touch c/g 2>/dev/null || echo ro; cat c/f; rm a/f",
    ),
    kind(
        "flags of single mounts",
        "mkdir a b c d e; mount -t tmpfs -o noatime m a
         for i in b,nosuid c,nodev d,noexec,nodiratime e,strictatime,nosymfollow; do
             p=${i%%,*}; mount --bind a $p; mount -o remount,bind,${i#*,} $p; done",
        "true",
    ),
    kind(
        "options of tmpfs",
        "mkdir a b c; mount -t tmpfs -o size=3m,mode=1751,uid=7,gid=9,nr_inodes=77 m a
         mount -t tmpfs -o huge=within_size n b 2>/dev/null || mount -t tmpfs n b
         mount -t tmpfs -o size=50%,noswap o c 2>/dev/null || mount -t tmpfs o c",
        "stat -c '%a %u %g' a; df -k --output=size a | tail -1",
    ),
    kind(
        "all sorts of files in tmpfs",
        "mkdir a; mount -t tmpfs m a; cd a; mkfifo -m 640 fifo; mknod -m 600 dev c 1 3; mknod blk b 7 9
         ln -s nowhere link; echo x >hard; ln hard hard2; mkdir -m 2755 dir; chown 5:6 dir
         truncate -s 8M sparse; echo data | dd of=sparse bs=1 seek=4000000 conv=notrunc 2>/dev/null
         python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")' 2>/dev/null || mknod sock p
         setfattr -n user.a -v b hard 2>/dev/null || :; setfattr -n trusted.t -v u dir 2>/dev/null || :
         touch -d '2001-02-03 04:05:06.789' hard; chattr +i link 2>/dev/null || :
         echo odd >\"$(printf 'a\\nb\\\\ c')\"; chmod 4755 hard",
        "cd a; stat -c '%n %F %a %u %g %h %s %t %T %Y' *; stat -c %b sparse; md5sum sparse hard2
         getfattr -d -m - * 2>/dev/null || :; stat -c %y hard",
    ),
    kind(
        "chains of groups over two namespaces",
        "mkdir a b c d; mount -t tmpfs m a; mount --make-shared a; mkdir a/x
         mount --bind a b; mount --make-slave b; mount --bind b c; mount --make-shared c
         unshare --mount --propagation slave sh -c 'mount --make-shared c; mount --bind a/x d
             touch a/stands; exec </dev/null >/dev/null 2>&1 10<&-; exec sleep 1001' &
         while [ ! -e a/stands ]; do sleep 0.01; done",
        "cat /proc/self/mountinfo | wc -l",
    ),
    kind(
        "shared root and mounts below it",
        "mount --make-rshared /; mkdir a b; mount -t tmpfs m a; mkdir a/in; mount -t tmpfs n a/in
         mount --rbind a b; touch a/in/x",
        "ls b/in",
    ),
    kind(
        "proc that hides, sysfs, mqueue, cgroup2",
        "mkdir a b c d e; mount -t proc -o hidepid=invisible,subset=pid p a; mount -t proc q e
         mount -t sysfs s b; mount -t mqueue m c; mount -t cgroup2 g d || rmdir d",
        "ls a/1/comm b/kernel/mm -d; [ ! -d d ] || ls d/cgroup.procs; ls a/uptime 2>/dev/null || echo hidden",
    ),
    kind(
        "overlay with options of its own",
        "mkdir l; mount -t tmpfs m l; cd l; mkdir lower upper work merged upper2 work2 second
         mkdir lower/dir; echo x >lower/dir/f; echo y >lower/g; ln lower/g lower/h
         mount -t overlay -o metacopy=on,redirect_dir=on,lowerdir=$DIR/t/l/lower,upperdir=$DIR/t/l/upper,workdir=$DIR/t/l/work o merged
         mv merged/dir merged/moved; chmod 600 merged/g
         mount -t overlay -o userxattr,lowerdir=$DIR/t/l/lower,upperdir=$DIR/t/l/upper2,workdir=$DIR/t/l/work2 o second; rm second/g",
        "cd l; cat merged/moved/f merged/g; stat -c %a merged/g; ls second",
    ),
    kind(
        "overlay with an index",
        "mkdir l; mount -t tmpfs m l; cd l; mkdir lower upper work merged
         echo y >lower/g; ln lower/g lower/h
         mount -t overlay -o index=on,xino=on,lowerdir=$DIR/t/l/lower,upperdir=$DIR/t/l/upper,workdir=$DIR/t/l/work o merged
         echo more >>merged/g",
        "cd l; cat merged/g merged/h; stat -c %h merged/g",
    ),
    kind(
        "overlay whose layers have odd names",
        r#"mkdir l; mount -t tmpfs m l; cd l; mkdir 'a,b' 'c:d' 'e f' 'g\h' u w m; echo x >'a,b/1'; echo y >'c:d/2'
         echo z >'e f/3'; L=$DIR/t/l
         mount -t overlay -o lowerdir="$L/a\\,b:$L/c\\:d:$L/e f:$L/g\\\\h",upperdir=$L/u,workdir=$L/w o m; echo new >m/4"#,
        "cat l/m/*",
    ),
    kind(
        "formats of programs",
        r#"mkdir f; mount -t binfmt_misc formats f; cp /bin/true interpreter
         printf '%s' ':floe-magic:M:3:\x7fab\x00:\xff\xf0\xff\xff:/bin/tr ue:OC' >f/register
         printf '%s' ':floe-ext:E::floe::/bin/x:' >f/register; echo 0 >f/floe-ext
         printf '%s' "|floe:odd|E||odd||$DIR/t/interpreter|FP" >f/register"#,
        "ls -U f | grep floe; tail -n +1 f/floe*; cat f/status",
    ),
];

#[test]
fn every_kind_of_mount_comes_back() {
    if !skips::is_root("every_kind_of_mount_comes_back") {
        return;
    }
    let only = std::env::var("FLOE_KIND").ok();
    let mut wrong = Vec::new();
    for kind in KINDS {
        if only
            .as_ref()
            .is_some_and(|only| !kind.name.contains(only.as_str()))
        {
            continue;
        }
        if let Err(error) = comes_back(kind) {
            wrong.push(format!("{}: {error:#}", kind.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn comes_back(kind: &Kind) -> anyhow::Result<()> {
    let mut tree = Tree::start(&format!("{BEGIN}{}\ncd /\n{SLEEP}", kind.setup))?;
    let (mounts, said) = (tree.mounts()?, look(&tree, kind)?);
    tree.dump(kind.dump)?;
    tree.restore(kind.restore)?;
    let after = tree.mounts()?;
    ensure!(mounts == after, "{}", difference(&mounts, &after));
    let after = look(&tree, kind)?;
    ensure!(said == after, "{}", difference(&said, &after));
    Ok(())
}

/// What the tree shows, seen by a process in a copy of its mount namespace.
fn look(tree: &Tree, kind: &Kind) -> anyhow::Result<Vec<String>> {
    let script = format!("cd $DIR/t; {}", kind.look);
    let output = tree.inside(&[
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-ec",
        &script,
    ])?;
    expect_success(&output).context("looking inside")?;
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(said.lines().map(str::to_string).collect())
}

/// The lines that are only on one side.
fn difference(before: &[String], after: &[String]) -> String {
    let only = |these: &[String], those: &[String], sign: &str| {
        let gone = these.iter().filter(|line| !those.contains(line));
        gone.map(|line| format!("\n{sign}{line}"))
            .collect::<String>()
    };
    only(before, after, "-") + &only(after, before, "+")
}
