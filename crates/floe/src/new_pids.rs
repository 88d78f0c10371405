//! `floe restore --new-pidns`: the caller's side of a restore in a new pid namespace.

use std::sync::Arc;

use floe_options::{NoHooks, Settings};
use floe_restore::new_pids::{Inside, Outside, Side, split, write_pid};

use crate::engine;
use crate::exit::{Exit, Failure};

/// Restores by `work` in a new pid namespace; the pidfile gets the root's pid as the caller sees it.
pub fn restore(
    settings: &Settings,
    work: impl FnOnce(&Settings, Inside) -> Result<Exit, Failure>,
) -> Result<Exit, Failure> {
    let highest = engine::highest_pid(&settings.restore_options(Arc::new(NoHooks)))?;
    match split(highest) {
        Ok(Side::Outside(outside)) => watch(settings, outside),
        Ok(Side::Inside(inside)) => {
            let mut settings = settings.clone();
            settings.pidfile = None;
            work(&settings, inside)
        }
        Err(error) => Err(failed("making a pid namespace", error)),
    }
}

fn failed(what: &str, error: std::io::Error) -> Failure {
    anyhow::anyhow!("{what}: {error}").into()
}

fn watch(settings: &Settings, mut outside: Outside) -> Result<Exit, Failure> {
    let options = settings.restore_options(Arc::new(NoHooks));
    let root = outside.root();
    let root = root.map_err(|error| failed("making a pid namespace", error))?;
    if let (Some(root), Some(path)) = (root, &options.pidfile) {
        let written = write_pid(path, root);
        written.map_err(|error| failed(&path.display().to_string(), error))?;
    }
    let code = outside.end();
    let code = code.map_err(|error| failed("waiting for the restore", error))?;
    // The process inside has said all there is to say; its descriptors are not ours to close.
    std::process::exit(code)
}
