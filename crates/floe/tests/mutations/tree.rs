//! A checkpoint of a program of testkit, on the host or in a container with a root of its own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{Engine, Fixture, engine, process, program};

/// How long a tree may take to stand.
const LIMIT: Duration = Duration::from_secs(20);

/// Enters the root and becomes the program.
const ENTER: &str = r#"
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
cd "$ROOT"
mount -t proc proc proc
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs dev
mknod -m 666 dev/null c 1 3
mkdir .old
pivot_root . .old
exec /bin/bash -c 'umount -l /.old; rmdir /.old; cd /; exec </dev/null >/home/output 2>&1; exec 10<&-; exec /bin/testkit-fixture "$0" /home' "$1"
"#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// In the namespaces of the test.
    Host,
    /// In a mount, pid, network, IPC and UTS namespace.
    Container,
}

pub struct Tree {
    pub place: Where,
    directory: tempfile::TempDir,
    options: Vec<String>,
    /// Kept for its files.
    _fixture: Option<Fixture>,
}

impl Tree {
    /// Starts a program, dumps it, and leaves no task.
    pub fn dumped(name: &str, place: Where) -> anyhow::Result<Tree> {
        let found = program::find(name).with_context(|| format!("no program `{name}`"))?;
        let mut tree = Tree {
            place,
            directory: tempfile::tempdir()?,
            options: found
                .options
                .iter()
                .map(|option| option.to_string())
                .collect(),
            _fixture: None,
        };
        match place {
            Where::Host => {
                let mut fixture = Fixture::start(name)?;
                fixture.dump(&Engine::floe()?, &[])?;
                fs::rename(fixture.images(), tree.images())?;
                tree._fixture = Some(fixture);
            }
            Where::Container => tree.dump_contained(name)?,
        }
        Ok(tree)
    }

    pub fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    /// The root of a container.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Options of its dump and its restore.
    pub fn options(&self) -> Vec<String> {
        let mut options = self.options.clone();
        if self.place == Where::Container {
            options.extend(["--root".to_owned(), self.root().display().to_string()]);
        }
        options
    }

    fn dump_contained(&mut self, name: &str) -> anyhow::Result<()> {
        process::adopt_orphans()?;
        self.fill_root()?;
        fs::create_dir(self.images())?;
        let mut unshare = Command::new("unshare")
            .args(["--fork", "--pid", "--mount", "--net", "--ipc", "--uts"])
            .args(["bash", "-ec", ENTER, "bash", name])
            .env("ROOT", self.root())
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let answered = self.wait_until_ready();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = fs::read_to_string(children)?;
        // The wrapper is of no use any more; its child becomes ours.
        unshare.kill()?;
        unshare.wait()?;
        let pid: i32 = pid.trim().parse().context("the tree's first process")?;
        let dumped = answered.and_then(|()| self.dump(pid));
        if process::exists(pid) && process::is_ours(pid) {
            process::kill_ours(&[pid], LIMIT)?;
        }
        dumped
    }

    fn dump(&self, pid: i32) -> anyhow::Result<()> {
        let mut dump = Command::new(Engine::floe()?.path);
        dump.args(["dump", "-t", &pid.to_string(), "-D"]);
        let output = dump.arg(self.images()).args(self.options()).output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {text}", output.status);
        process::wait_for_ends(&[pid], LIMIT)
    }

    /// Reads what the program answers; it is ready, or says why not.
    fn wait_until_ready(&self) -> anyhow::Result<()> {
        use rustix::fs::{Mode, OFlags};
        let fifo = self.root().join("home/answer");
        let fifo = rustix::fs::open(fifo, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        if process::wait_readable(&[&fifo], Instant::now() + LIMIT)?.is_none() {
            let output = fs::read_to_string(self.root().join("home/output"));
            bail!("the tree does not stand: {}", output.unwrap_or_default());
        }
        let mut line = [0; 200];
        let length = rustix::io::read(&fifo, &mut line)?;
        let line = String::from_utf8_lossy(&line[..length]);
        ensure!(line.trim() == "ready", "{line}");
        Ok(())
    }

    /// A root with what the program needs, and with links that lead out of it where they are followed
    /// from outside.
    fn fill_root(&self) -> anyhow::Result<()> {
        let root = self.root();
        for name in ["bin", "home", "proc", "tmp", "dev"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::set_permissions(root.join("home"), fs::Permissions::from_mode(0o777))?;
        symlink("/", root.join("out"))?;
        let fifo = root.join("home/answer");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::Mode::from_raw_mode(0o666),
        )?;
        fs::set_permissions(&fifo, fs::Permissions::from_mode(0o666))?;
        copy_program(&engine::built("testkit", "testkit-fixture")?, &root)?;
        for name in ["bash", "umount", "rmdir"] {
            let path = ["/bin", "/usr/bin"].map(|place| Path::new(place).join(name));
            let path = path.iter().find(|path| path.exists());
            copy_program(path.with_context(|| name.to_owned())?, &root)?;
        }
        Ok(())
    }
}

/// Copies a program to `bin` and its libraries to their places.
fn copy_program(path: &Path, root: &Path) -> anyhow::Result<()> {
    let name = path.file_name().context("a name")?;
    fs::copy(path, root.join("bin").join(name))?;
    let output = Command::new("ldd").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a directory")?)?;
        fs::copy(library, to)?;
    }
    Ok(())
}
