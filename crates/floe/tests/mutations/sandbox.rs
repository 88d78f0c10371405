//! Where mutants are restored: namespaces of their own on a layer above the file system of the host, so that
//! all that a restore makes is seen, and goes away with its first process.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::Engine;

use super::tree::{Tree, Where};

/// The longest that a restore may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes the layer the root; the names that change appear in `/.upper`.
const ENTER: &str = r#"
S=$1; shift
mount --make-rprivate /
mount -t tmpfs -o mode=700 tmpfs "$S"
mkdir "$S/upper" "$S/work" "$S/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$S/upper,workdir=$S/work" "$S/root"
mount -t proc proc "$S/root/proc"
mount -t sysfs sysfs "$S/root/sys"
mount --rbind /dev "$S/root/dev"
mount -t tmpfs tmpfs "$S/root/dev/shm"
mkdir "$S/root/.upper" "$S/root/.old"
ip link set lo up 2>/dev/null || true
mount --bind "$S/upper" "$S/root/.upper"
cd "$S/root"
pivot_root . .old
umount -l /.old
exec chroot . sh -c "$INSIDE" sh "$@"
"#;

/// Restores, and tells what is there afterwards. A helper may end a little later than the command.
const INSIDE: &str = r#"
"$@" </dev/null 2>&1
code=$?
echo "@code $code"
tries=0
while :; do
    left=
    for task in /proc/[0-9]*; do
        [ "$task" = "/proc/$$" ] && continue
        read comm 2>/dev/null <"$task/comm" && left="$left ${task#/proc/}:$comm"
    done
    [ -z "$left" ] || [ $tries -ge 20 ] && break
    [ $code = 0 ] && break
    tries=$((tries + 1))
    sleep 0.05
done
for task in $left; do echo "@left $task"; done
cd /.upper && find . -mindepth 1 -printf '@name %y %P\n'
"#;

pub struct Sandbox {
    scratch: tempfile::TempDir,
    command: Vec<String>,
    log: PathBuf,
}

/// What became of a restore.
pub struct Verdict {
    /// `None` where it took too long.
    code: Option<i32>,
    left: Vec<String>,
    /// Type and path of what is in the layer.
    names: Vec<(char, PathBuf)>,
    /// All that it printed.
    pub text: String,
}

impl Sandbox {
    pub fn new(tree: &Tree) -> anyhow::Result<Sandbox> {
        let images = tree.images();
        let images = images.to_str().context("UTF-8")?;
        let mut command = vec![Engine::floe()?.path.display().to_string()];
        command.extend(["restore", "-d", "-D", images].map(str::to_owned));
        command.extend(tree.options());
        Ok(Sandbox {
            scratch: tempfile::tempdir()?,
            command,
            log: tree.images().with_extension("verdict"),
        })
    }

    pub fn restore(&self) -> anyhow::Result<Verdict> {
        let output = fs::File::create(&self.log)?;
        let mut child = Command::new("unshare")
            .args([
                "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork",
            ])
            .args(["--kill-child", "sh", "-ec", ENTER, "sh"])
            .arg(self.scratch.path())
            .args(&self.command)
            .env("INSIDE", INSIDE)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("starting unshare")?;
        let began = Instant::now();
        let mut in_time = true;
        while child.try_wait()?.is_none() {
            if began.elapsed() > LIMIT {
                in_time = false;
                child.kill()?;
                child.wait()?;
                break;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let mut text = Vec::new();
        fs::File::open(&self.log)?.read_to_end(&mut text)?;
        let verdict = Verdict::parse(&String::from_utf8_lossy(&text));
        ensure!(
            verdict.code.is_some() || !in_time,
            "the sandbox failed: {}",
            verdict.text
        );
        Ok(verdict)
    }
}

impl Verdict {
    fn parse(printed: &str) -> Verdict {
        let mut verdict = Verdict {
            code: None,
            left: Vec::new(),
            names: Vec::new(),
            text: String::new(),
        };
        for line in printed.lines() {
            if let Some(code) = line.strip_prefix("@code ") {
                verdict.code = code.parse().ok();
            } else if let Some(task) = line.strip_prefix("@left ") {
                verdict.left.push(task.to_owned());
            } else if let Some((kind, path)) = line
                .strip_prefix("@name ")
                .and_then(|line| line.split_once(' '))
            {
                let kind = kind.chars().next().unwrap_or('?');
                verdict.names.push((kind, Path::new("/").join(path)));
            } else {
                verdict.text += line;
                verdict.text.push('\n');
            }
        }
        verdict
    }

    pub fn restored(&self) -> bool {
        self.code == Some(0)
    }

    /// All that must not be.
    pub fn faults(&self, tree: &Tree) -> Vec<String> {
        let mut faults = Vec::new();
        let Some(code) = self.code else {
            return vec!["it hung".into()];
        };
        if code > 100 || self.text.contains("panicked") {
            faults.push(format!("it crashed with code {code}"));
        }
        if code != 0 {
            if self.text.trim().is_empty() {
                faults.push("it failed without a word".into());
            }
            let left = self.left.iter().map(|task| format!("task {task} is left"));
            faults.extend(left);
        }
        let own = |path: &Path| {
            let sandbox = [".old", ".upper"]
                .iter()
                .any(|own| path == Path::new("/").join(own));
            sandbox || path.starts_with(tree.images())
        };
        for (kind, path) in &self.names {
            let is_new = fs::symlink_metadata(path).is_err();
            let is_changed = is_new || *kind != 'd';
            // A character device of the layer stands for a name that was removed.
            let is_gone = *kind == 'c' && !is_new;
            if own(path) || !is_changed {
                continue;
            }
            let shown = path.display();
            if tree.place == Where::Container && !path.starts_with(tree.root()) {
                faults.push(format!("it reached {shown} outside of its root"));
            } else if code != 0 && (is_new || is_gone) {
                faults.push(format!("{kind} {shown} is left, or is gone"));
            }
        }
        faults
    }
}
