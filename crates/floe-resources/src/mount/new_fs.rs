//! Mounting file systems anew, with what was in them.

use std::os::fd::{AsFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::dir::ImageDir;
use floe_kernel::mount::{self, FsOption, NewMountError};
use rustix::fs::Mode;

use super::content;
use super::context::context;
use super::execute::open_within;
use super::model::{Content, FsKind, split_options, super_words};
use super::overlay;
use super::overlay_index;
use super::owner::Owner;
use super::tree::NewFs;
use crate::restore::{Attempt, ExecuteError};

/// File systems whose options are those of the one instance that the kernel has.
const SINGLE: [&str; 5] = ["devtmpfs", "debugfs", "tracefs", "securityfs", "selinuxfs"];

/// Mounts it, with its files, for `owner` where it is not ours.
pub fn make(images: &ImageDir, fs: &NewFs, owner: Option<&Owner>) -> Result<OwnedFd, ExecuteError> {
    let entry = &fs.entry;
    let what = || format!("{} for {}", fs.name, entry.mountpoint);
    let options = new_fs_options(fs);
    let _files = owner.map(Owner::files).transpose()?;
    let mount = || match owner {
        Some(owner) => owner.mount(fs, &options),
        None => Ok(mount::new_mount(&fs.name, &options)),
    };
    let mut mounted = mount()?;
    if let Err(NewMountError::Call(_, error)) = &mounted
        && error.raw_os_error() == Some(libc::ESTALE)
        && overlay_index::rebuild(&entry.options).is_ok()
    {
        mounted = mount()?;
    }
    let mounted = mounted.map_err(|error| {
        let (action, source) = describe(error);
        ExecuteError::Failed {
            action: "Mounting",
            object: format!("{}: {action}", what()),
            source,
        }
    })?;
    if has_files(fs) {
        fill(images, &mounted, fs)?;
        if entry.sb_flags.unwrap_or(0) & libc::MS_RDONLY as u32 != 0 {
            mount::reconfigure(mounted.as_fd(), "ro").during("Protecting", what)?;
        }
    }
    Ok(mounted)
}

fn fill(images: &ImageDir, mounted: &OwnedFd, fs: &NewFs) -> Result<(), ExecuteError> {
    let entry = &fs.entry;
    let (kind, id) = content_image(images, entry.root_dev, entry.mnt_id);
    let image = images.open_raw(kind, id)?;
    let what = || format!("{} for {}", fs.name, entry.mountpoint);
    let root = make_root(mounted, &entry.root).during("Making the root of", what)?;
    content::unpack(root.as_fd(), image).map_err(|error| ExecuteError::Failed {
        action: "Filling",
        object: format!(
            "{} for {}: {} {}",
            fs.name, entry.mountpoint, error.action, error.path
        ),
        source: error.source,
    })
}

/// The directory of a file system that its widest mount shows.
fn make_root(mounted: &OwnedFd, path: &str) -> std::io::Result<OwnedFd> {
    let mut at = mounted.try_clone()?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
        rustix::fs::mkdirat(&at, name, mode)?;
        at = open_within(at.as_fd(), name)?;
    }
    Ok(at)
}

/// The image with the files of a file system: by its device, or in older images by its mount.
pub fn content_image(images: &ImageDir, device: u32, mount: u32) -> (ImageKind, u64) {
    let by_device = (ImageKind::TmpfsDev, u64::from(device));
    let by_mount = (ImageKind::TmpfsImg, u64::from(mount));
    if !images.has(by_device.0, by_device.1) && images.has(by_mount.0, by_mount.1) {
        return by_mount;
    }
    by_device
}

/// Whether the files of a file system are in the images.
pub fn has_files(fs: &NewFs) -> bool {
    FsKind::of_name(&fs.name).is_some_and(|kind| kind.content == Content::Files)
}

/// The options to mount a file system with.
pub fn new_fs_options(fs: &NewFs) -> Vec<FsOption> {
    let entry = &fs.entry;
    let mut options = vec![FsOption::Text("source".into(), entry.source.clone())];
    if SINGLE.contains(&fs.name.as_str()) {
        return options;
    }
    options.extend(fs_options(&entry.options));
    // Files come in before it is protected.
    let words = super_words(entry.sb_flags.unwrap_or(0));
    let words = words.filter(|word| !(*word == "ro" && has_files(fs)));
    options.extend(words.map(|word| FsOption::Flag(word.to_string())));
    options
}

/// Options as the kernel prints them, without those that only tell what is in use.
fn fs_options(options: &str) -> Vec<FsOption> {
    let words = split_options(options).into_iter();
    words
        .filter(|word| word != "seclabel")
        .map(|word| overlay::decoded(&word))
        .flat_map(|word| match context(&word).or(word.split_once('=')) {
            Some((key, value)) => overlay::option(key, value),
            None => vec![FsOption::Flag(word)],
        })
        .collect()
}

pub fn describe(error: NewMountError) -> (String, std::io::Error) {
    match error {
        NewMountError::Call(call, source) => (call.to_string(), source),
        NewMountError::Option(FsOption::Flag(key), source) => (format!("option {key}"), source),
        NewMountError::Option(FsOption::Text(key, value), source) => {
            (format!("option {key}={value}"), source)
        }
    }
}
