//! Servers: going to the background, and saying so.

use floe_kernel::child::{Fork, drop_streams, fork};
use floe_options::Settings;
use rustix::process::Pid;

use crate::exit::Failure;

/// Goes on in a process of its own session, without our caller's standard streams. The caller waits for the
/// process that gets [`Fork::Parent`].
pub fn enter() -> Result<Fork, Failure> {
    let failed = |error: std::io::Error| anyhow::anyhow!("going to the background: {error}");
    let side = fork().map_err(failed)?;
    if let Fork::Child = side {
        rustix::process::setsid().map_err(|errno| failed(errno.into()))?;
        drop_streams().map_err(failed)?;
    }
    Ok(side)
}

/// Writes the server's pid where `--pidfile` says.
pub fn write_pidfile(settings: &Settings, pid: Pid) -> Result<(), Failure> {
    let Some(file) = &settings.pidfile else {
        return Ok(());
    };
    let path = settings.place().work_file(file);
    std::fs::write(&path, pid.as_raw_nonzero().to_string())
        .map_err(|error| anyhow::anyhow!("pidfile {}: {error}", path.display()))?;
    Ok(())
}

/// Writes the byte that `--status-fd` asks for, and closes it.
pub fn tell_ready(settings: &Settings) -> Result<(), Failure> {
    let Some(fd) = settings.status_fd else {
        return Ok(());
    };
    let ready = floe_kernel::inherited::take(fd)
        .and_then(|fd| rustix::io::write(&fd, &[0]).map_err(Into::into));
    ready.map_err(|error| anyhow::anyhow!("--status-fd {fd}: {error}"))?;
    Ok(())
}
