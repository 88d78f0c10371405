//! Kernels of Debian: the packages that `linux-image-cloud-amd64` names in a suite.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::apt::{Apt, unpacked};

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
        let tree = if name.ends_with(".deb") {
            unpacked(Path::new(name))?
        } else {
            let found = newest(name);
            found.with_context(|| format!("fetching the kernel of {name}"))?
        };
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
        bail!("{} has no kernel", tree.display())
    }
}

/// The tree of a suite's newest kernel.
fn newest(suite: &str) -> anyhow::Result<PathBuf> {
    let apt = Apt::of(suite)?;
    let depends = apt.depends(NEWEST)?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        .with_context(|| format!("{NEWEST} depends on no kernel"))?;
    apt.tree(&format!("linux-image-{package}"))
}
