//! `cargo xtask install`: the binary, and its second name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Where to, and what may be replaced.
#[derive(clap::Args)]
pub struct Arguments {
    /// The binary goes to PREFIX/bin.
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Replace a `criu` that is not a link to `floe`.
    #[arg(long)]
    force: bool,
}

/// Builds, copies, and links `criu` to `floe`.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let root = crate::root();
    let mut build = Command::new(crate::cargo());
    let status = build
        .current_dir(&root)
        .args(["build", "--release", "--package", "floe"])
        .status();
    if !status.context("starting cargo")?.success() {
        bail!("the build failed");
    }
    let bin = arguments.prefix.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    let (floe, criu) = (bin.join("floe"), bin.join("criu"));
    // Copied beside and renamed, so that a running `floe` keeps its file.
    let new = bin.join(".floe.new");
    let built = target_directory(&root)?.join("release/floe");
    fs::copy(&built, &new)
        .with_context(|| format!("copying {} to {}", built.display(), new.display()))?;
    fs::rename(&new, &floe).with_context(|| format!("renaming to {}", floe.display()))?;
    link(&criu, arguments.force)?;
    println!(
        "installed {} and {} -> floe",
        floe.display(),
        criu.display()
    );
    Ok(())
}

fn link(criu: &Path, force: bool) -> anyhow::Result<()> {
    let ours = fs::read_link(criu).is_ok_and(|target| target == Path::new("floe"));
    if ours {
        return Ok(());
    }
    if criu.symlink_metadata().is_ok() {
        if !force {
            bail!("{} is another program; --force replaces it", criu.display());
        }
        fs::remove_file(criu).with_context(|| format!("removing {}", criu.display()))?;
    }
    symlink("floe", criu).with_context(|| format!("linking {}", criu.display()))
}

fn target_directory(root: &Path) -> anyhow::Result<PathBuf> {
    let metadata = crate::tidy::dependencies::metadata(root)?;
    let target = metadata["target_directory"]
        .as_str()
        .context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(target))
}
