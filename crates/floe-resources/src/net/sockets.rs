//! Which network namespace a socket of the tree is in.

use std::io;

use floe_kernel::namespace::{Namespace, NsKind};
use floe_kernel::tun::network_of;

use super::error::{Attempt, NetError};
use crate::collect::{CollectError, Collector, FdProbe, Obstacle};

/// The number of the network namespace of a socket or tun file; `None` where that cannot be asked.
pub fn network_number(
    fd: &FdProbe<'_>,
    collector: &Collector<'_>,
) -> Result<Option<u32>, CollectError> {
    let namespaces = collector.namespaces();
    let namespace =
        match network_of(fd.file()).and_then(|file| Namespace::from_fd(file, NsKind::Net)) {
            Ok(namespace) => namespace.identity(),
            // Without privilege there is only our own namespace to be in.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(None),
            Err(error) => return Err(fd.failed("Asking for the network namespace", error)),
        };
    match namespaces.number(NsKind::Net, namespace) {
        Some(number) => Ok(Some(number)),
        None => Err(CollectError::Unsupported(Obstacle::fd(
            fd.pid(),
            fd.fd(),
            String::from_utf8_lossy(fd.target()),
            "close it: no task of the tree is in its network namespace",
        ))),
    }
}

/// What `list` tells in our own network namespace and in each of the tree.
pub fn in_every_network<T>(
    collector: &Collector<'_>,
    what: &str,
    list: impl Fn() -> io::Result<Vec<T>>,
) -> Result<Vec<T>, CollectError> {
    let listed = || -> Result<Vec<T>, NetError> { list().during("Listing", || what.to_string()) };
    let mut all = listed()?;
    let namespaces = collector.namespaces();
    for namespace in namespaces
        .all()
        .iter()
        .filter(|one| one.kind() == NsKind::Net)
    {
        let _visit = namespaces.visit(&[namespace])?;
        all.extend(listed()?);
    }
    Ok(all)
}
