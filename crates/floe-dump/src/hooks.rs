//! The caller's part in a dump, where it leaves something to be undone or changes what is saved.

use std::borrow::Cow;

use floe_kernel::ids::HostPid;
use floe_options::{Action, DumpOptions, HookEvent};

use crate::error::DumpError;
use crate::freeze::FrozenTree;

/// The caller's network is locked as long as this lives.
pub struct NetworkHook<'a> {
    options: &'a DumpOptions,
    root: HostPid,
}

impl NetworkHook<'_> {
    /// The tree is gone: whoever restores it unlocks the network.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for NetworkHook<'_> {
    fn drop(&mut self) {
        let event = HookEvent::new(Action::NetworkUnlock, Some(self.root.0));
        if let Err(error) = self.options.hooks.run(event) {
            tracing::warn!(%error, "a hook failed");
        }
    }
}

/// The caller may hold back packets of a network that the tree has for itself.
pub fn lock_network<'a>(
    options: &'a DumpOptions,
    tree: &FrozenTree,
) -> Result<Option<NetworkHook<'a>>, DumpError> {
    let root = tree.root().pid;
    let network = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/net")).ok();
    if network("self") == network(&root.to_string()) {
        return Ok(None);
    }
    let event = HookEvent::new(Action::NetworkLock, Some(root.0));
    options.hooks.run(event)?;
    Ok(Some(NetworkHook { options, root }))
}

/// The options, with what the caller names only now that the tree stands still.
pub fn asked_external(options: &DumpOptions) -> Result<Cow<'_, DumpOptions>, DumpError> {
    let asked = options.hooks.external_files()?;
    if asked.is_empty() {
        return Ok(Cow::Borrowed(options));
    }
    let mut options = options.clone();
    options.external.extend(asked);
    Ok(Cow::Owned(options))
}
