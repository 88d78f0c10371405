//! The content of a UTS namespace: names of the host (`uts_namespaces(7)`).
//!
//! Saved:    host name and NIS domain name, as a task inside sees them.
//! Rebuilt:  set inside the new namespace. Needs: the namespace.
//! Not kept: nothing.

use floe_image::ImageKind;
use floe_image::messages::UtsnsEntry;
use floe_kernel::namespace::NsKind;

use super::{TreeNamespace, filled, made};
use crate::collect::{CollectError, Collector};
use crate::restore::{Attempt, PlanError, Planner};

/// Writes the image of a namespace.
pub(super) fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let names = {
        let _visit = collector.namespaces().visit(&[namespace])?;
        rustix::system::uname()
    };
    let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
    let entry = UtsnsEntry {
        nodename: text(names.nodename()),
        domainname: text(names.domainname()),
    };
    Ok(collector
        .writer()
        .write_one(ImageKind::Utsns, u64::from(namespace.id), &entry)?)
}

/// Adds the step that sets the names.
pub(super) fn plan(id: u32, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let entry: UtsnsEntry = planner
        .images
        .dir
        .read_one(ImageKind::Utsns, u64::from(id))?;
    let name = format!("set the host name of {} namespace {id}", NsKind::Uts);
    planner.step_at_home(name, (&[made(id)], &[filled(id)]), move |world| {
        world.in_namespace(id, |_| {
            rustix::system::sethostname(entry.nodename.as_bytes())
                .during("Setting the host name", || entry.nodename.clone())?;
            rustix::system::setdomainname(entry.domainname.as_bytes())
                .during("Setting the domain name", || entry.domainname.clone())
        })
    });
    Ok(())
}
