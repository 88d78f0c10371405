//! Kernels of Debian: the packages that `linux-image-cloud-amd64` names in a suite.
//!
//! apt fetches and checks them, with lists and a cache of its own below the user's, so nothing of the
//! system's apt changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Small, and it has what the tests need.
const NEWEST: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What is booted.
    pub image: PathBuf,
    /// `lib/modules/RELEASE`.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel of a suite, or of a package file.
    pub fn find(name: &str) -> anyhow::Result<Kernel> {
        let cache = cache()?;
        let package = if name.ends_with(".deb") {
            PathBuf::from(name)
        } else {
            let found = download(&cache, name);
            found.with_context(|| format!("fetching the kernel of {name}"))?
        };
        let stem = package.file_stem().context("a package without a name")?;
        let tree = cache.join(stem);
        if !tree.exists() {
            let unfinished = cache.join("unfinished");
            let _ = fs::remove_dir_all(&unfinished);
            let mut unpack = Command::new("dpkg-deb");
            run(unpack.arg("--extract").arg(&package).arg(&unfinished))?;
            fs::rename(&unfinished, &tree)?;
        }
        let boot = tree.join("boot");
        for entry in fs::read_dir(&boot).context("a package without a kernel")? {
            let file = entry?.file_name();
            let Some(release) = file.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) else {
                continue;
            };
            let modules =
                ["lib", "usr/lib"].map(|lib| tree.join(lib).join("modules").join(release));
            return Ok(Kernel {
                release: release.to_string(),
                image: boot.join(&file),
                modules: modules
                    .into_iter()
                    .find(|path| path.exists())
                    .context("a package without modules")?,
            });
        }
        bail!("{} has no kernel", package.display())
    }
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

/// The package file of a suite's newest kernel. A list of packages that cannot be brought up to date is
/// used as it is.
fn download(cache: &Path, suite: &str) -> anyhow::Result<PathBuf> {
    let lists = cache.join(format!("lists-{suite}"));
    fs::create_dir_all(lists.join("partial"))?;
    fs::create_dir_all(cache.join("archives/partial"))?;
    // Not below the lists, where apt removes what it does not know.
    let sources = cache.join(format!("{suite}.list"));
    let line = format!("deb [arch=amd64 signed-by={KEYRING}] {MIRROR} {suite} main\n");
    fs::write(&sources, line)?;
    let apt = |program: &str| {
        let mut command = Command::new("timeout");
        command.args(["300", program]);
        for (option, value) in [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State::lists", &lists),
            ("Dir::Cache", cache),
            ("APT::Sandbox::User", Path::new("root")),
            ("APT::Architecture", Path::new("amd64")),
        ] {
            command.arg(format!("-o={option}={}", value.display()));
        }
        command.current_dir(cache);
        command
    };
    if let Err(error) = run(apt("apt-get").args(["-qq", "update"])) {
        println!("{error:#}: trying with what is there");
    }
    let depends = run(apt("apt-cache").args(["depends", NEWEST]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        .with_context(|| format!("{NEWEST} depends on no kernel"))?;
    let package = format!("linux-image-{package}");
    let shown = run(apt("apt-cache").args(["show", "--no-all-versions", &package]))?;
    let field = |name: &str| {
        let line = shown.lines().find_map(|line| line.strip_prefix(name));
        line.with_context(|| format!("apt does not tell {name} of {package}"))
    };
    let file = Path::new(field("Filename: ")?)
        .file_name()
        .context("a package without a name")?;
    let file = cache.join(file);
    if !file.exists() {
        // Checked by apt against the signed list.
        run(apt("apt-get").args(["-qq", "download", &package]))?;
        // apt escapes characters in names as it likes.
        if !file.exists() {
            fs::rename(downloaded(cache, &package)?, &file)?;
        }
    }
    Ok(file)
}

fn downloaded(cache: &Path, package: &str) -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&format!("{package}_")) && name.ends_with(".deb") {
            return Ok(path);
        }
    }
    bail!("apt did not fetch {package}")
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
