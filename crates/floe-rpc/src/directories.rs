//! Directories and descriptors that a request names by numbers of its caller.
//!
//! The caller marks them close-on-exec, so they are opened through `/proc/PID/fd`.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use floe_image::messages::CriuOpts;
use floe_kernel::peer::Peer;
use floe_options::Settings;
use rustix::fs::{CWD, Mode, OFlags};

/// The log's name where the request does not name one, as in CRIU.
const LOG_NAME: &str = "criu.log";

/// Why a directory of the request cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("the caller is not in our pid namespace, so its descriptors cannot be opened")]
    UnseenCaller,
    #[error("Opening the caller's {what} ({})", .path.display())]
    Open {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("neither images_dir_fd nor images_dir says where the images are")]
    NoImages,
}

/// Whether an operation can do without images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    Needed,
    NotNeeded,
}

/// What the directories are resolved by, beside the request.
#[derive(Debug)]
pub struct Context {
    /// Whose descriptors are meant.
    pub peer: Peer,
    /// Whether there must be images.
    pub images: Images,
    /// The work directory of a default configuration file: for a request without one.
    pub work_dir: Option<PathBuf>,
}

/// The directories of a request, open as long as this lives: their paths may lead through us.
#[derive(Debug, Default)]
pub struct Directories {
    _held: Vec<OwnedFd>,
}

impl Directories {
    /// Resolves the directories of `opts` into `settings`. Those that `settings` names already come from
    /// the request's configuration file, which has the last word.
    pub fn resolve(
        opts: &CriuOpts,
        context: Context,
        settings: &mut Settings,
    ) -> Result<Self, DirectoryError> {
        let Context { peer, images, .. } = context;
        let mut held = Vec::new();
        let mut open = |what, path: PathBuf| -> Result<PathBuf, DirectoryError> {
            let (fd, path) = open_directory(what, path)?;
            held.push(fd);
            Ok(path)
        };
        let images_dir = match (&settings.images_dir, opts.images_dir_fd, &opts.images_dir) {
            (Some(path), ..) => Some(path.clone()),
            (None, fd, _) if fd >= 0 => Some(of_peer(peer, fd)?),
            (None, _, Some(path)) => Some(path.into()),
            (None, _, None) if images == Images::Needed => return Err(DirectoryError::NoImages),
            (None, _, None) => None,
        };
        let work_dir = match (&settings.work_dir, opts.work_dir_fd) {
            (Some(path), _) => Some(path.clone()),
            (None, Some(fd)) if fd >= 0 => Some(of_peer(peer, fd)?),
            (None, _) => context.work_dir,
        };
        if let Some(path) = images_dir {
            settings.images_dir = Some(open("images directory", path)?);
        }
        settings.work_dir = match work_dir {
            Some(path) => Some(open("work directory", path)?),
            None => settings.images_dir.clone(),
        };
        if settings.log.file.is_none() && settings.work_dir.is_some() {
            settings.log.file = Some(LOG_NAME.into());
        }
        Ok(Directories { _held: held })
    }
}

/// The file behind a descriptor of the caller.
pub fn of_peer(peer: Peer, fd: i32) -> Result<PathBuf, DirectoryError> {
    let pid = peer.pid.ok_or(DirectoryError::UnseenCaller)?;
    Ok(PathBuf::from(format!("/proc/{pid}/fd/{fd}")))
}

/// Opens what the caller wants to hear from that all is ready (`status_fd`).
pub fn open_status(peer: Peer, fd: i32) -> Result<OwnedFd, DirectoryError> {
    let path = of_peer(peer, fd)?;
    let opened = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| DirectoryError::Open {
        what: "status_fd",
        path,
        source: errno.into(),
    })
}

/// Opens a directory, and says by which path it is found from now on: its own where that leads there, for
/// scripts and messages, one through our descriptor where the caller sees other mounts than we.
fn open_directory(what: &'static str, path: PathBuf) -> Result<(OwnedFd, PathBuf), DirectoryError> {
    let failed = |source: std::io::Error| DirectoryError::Open {
        what,
        path: path.clone(),
        source,
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, &path, flags, Mode::empty());
    let fd = fd.map_err(|errno| failed(errno.into()))?;
    let file = File::from(fd);
    let opened = file.metadata().map_err(failed)?;
    let same = |found: &Path| {
        std::fs::metadata(found)
            .is_ok_and(|named| (named.dev(), named.ino()) == (opened.dev(), opened.ino()))
    };
    let fd = OwnedFd::from(file);
    let own = std::fs::canonicalize(&path).ok().filter(|path| same(path));
    let own = own.unwrap_or_else(|| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())));
    Ok((fd, own))
}
