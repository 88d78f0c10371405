//! Packages of Debian, unpacked.
//!
//! apt fetches and checks them, with lists and a cache of its own below the user's, so nothing of the
//! system's apt changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The packages of a suite.
pub struct Apt {
    suite: String,
    cache: PathBuf,
}

impl Apt {
    /// Brings the list of packages up to date; one for which that fails is used as it is.
    pub fn of(suite: &str) -> anyhow::Result<Apt> {
        let apt = Apt {
            suite: suite.to_string(),
            cache: cache()?,
        };
        fs::create_dir_all(apt.lists().join("partial"))?;
        fs::create_dir_all(apt.cache.join("archives/partial"))?;
        let line = format!("deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {suite} main\n");
        fs::write(apt.sources(), line)?;
        if let Err(error) = run(apt.command("apt-get").args(["-qq", "update"])) {
            println!("{error:#}: trying with what is there");
        }
        Ok(apt)
    }

    /// What a package depends on.
    pub fn depends(&self, package: &str) -> anyhow::Result<String> {
        run(self.command("apt-cache").args(["depends", package]))
    }

    /// The tree of a package, fetched if it is not there.
    pub fn tree(&self, package: &str) -> anyhow::Result<PathBuf> {
        let file = self.file(package);
        unpacked(&file.with_context(|| format!("fetching {package} of {}", self.suite))?)
    }

    fn lists(&self) -> PathBuf {
        self.cache.join(format!("lists-{}", self.suite))
    }

    /// Not below the lists, where apt removes what it does not know.
    fn sources(&self) -> PathBuf {
        self.cache.join(format!("{}.list", self.suite))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["300", program]);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.sources().as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State::lists", &self.lists()),
            ("Dir::Cache", &self.cache),
            ("APT::Sandbox::User", Path::new("root")),
            ("APT::Architecture", Path::new("amd64")),
        ] {
            command.arg(format!("-o={option}={}", value.display()));
        }
        command.current_dir(&self.cache);
        command
    }

    fn file(&self, package: &str) -> anyhow::Result<PathBuf> {
        let mut show = self.command("apt-cache");
        let shown = run(show.args(["show", "--no-all-versions", package]))?;
        let line = shown
            .lines()
            .find_map(|line| line.strip_prefix("Filename: "));
        let name = line.with_context(|| format!("apt does not tell the file of {package}"))?;
        let name = Path::new(name).file_name();
        let file = self.cache.join(name.context("a package without a name")?);
        if !file.exists() {
            // Checked by apt against the signed list.
            run(self.command("apt-get").args(["-qq", "download", package]))?;
            // apt escapes characters in names as it likes.
            if !file.exists() {
                fs::rename(self.downloaded(package)?, &file)?;
            }
        }
        Ok(file)
    }

    fn downloaded(&self, package: &str) -> anyhow::Result<PathBuf> {
        for entry in fs::read_dir(&self.cache)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&format!("{package}_")) && name.ends_with(".deb") {
                return Ok(path);
            }
        }
        bail!("apt did not fetch {package}")
    }
}

/// Unpacks a package file into the cache; answers where its tree is.
pub fn unpacked(package: &Path) -> anyhow::Result<PathBuf> {
    let cache = cache()?;
    let tree = cache.join(package.file_stem().context("a package without a name")?);
    if !tree.exists() {
        let unfinished = tempfile::tempdir_in(&cache)?;
        let inside = unfinished.path().join("tree");
        let mut unpack = Command::new("dpkg-deb");
        run(unpack.arg("--extract").arg(package).arg(&inside))?;
        fs::rename(&inside, &tree)?;
    }
    Ok(tree)
}

fn cache() -> anyhow::Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home);
    let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set")?;
    let cache = cache.join("floe/boot");
    fs::create_dir_all(&cache)?;
    Ok(cache)
}

/// Runs a command and answers what it printed.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        said.lines().last().unwrap_or_default()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
