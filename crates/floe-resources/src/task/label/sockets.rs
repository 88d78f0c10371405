//! Labels of sockets under SELinux: those of the tasks that made them, or what a task chose (`sockcreate`).

use std::collections::{BTreeMap, BTreeSet};

use floe_kernel::security::{SecurityModule, label_new_sockets};
use rustix::fs::FileType;

use super::wanted::check_context;
use super::{Label, Labels};
use crate::collect::{CollectError, Collector, FdProbe};
use crate::restore::{Attempt, ExecuteError, Op, PlanError, Planner};

const XATTR: &str = "security.selinux";
/// Contexts are far shorter.
const ROOM: usize = 4096;

/// The label of a descriptor that is a socket.
pub fn collect(
    probe: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<Option<String>, CollectError> {
    let here = *collector.cache(SecurityModule::active);
    if here != SecurityModule::SeLinux || probe.file_type() != FileType::Socket {
        return Ok(None);
    }
    let mut text = vec![0; ROOM];
    let length = rustix::fs::fgetxattr(probe.file(), XATTR, &mut text[..]);
    let length = length.map_err(|errno| probe.failed("Reading the SELinux label", errno))?;
    Ok(here.label(&text[..length]))
}

/// By the id of the file, where it is another than that of the sockets that we make.
#[derive(Debug, Default)]
pub struct SocketLabels(BTreeMap<u32, String>);

impl SocketLabels {
    /// Decides, and refuses what the policy here does not know.
    pub fn plan(planner: &Planner<'_>) -> Result<Self, PlanError> {
        let (images, options) = (planner.images, planner.options);
        let labels = Labels::new(&images.inventory, options.lsm_profile.as_ref())?;
        if labels.here != SecurityModule::SeLinux {
            return Ok(Self::default());
        }
        let cores = images.tasks.iter().flat_map(|task| {
            let others = task.threads.values();
            others.chain([&task.core])
        });
        let creds = cores.filter_map(|core| core.thread_core.as_ref()?.creds.as_ref());
        let of_tasks: BTreeSet<String> = creds
            .filter_map(|creds| Label::of_entry(creds).current)
            .collect();
        let mut found = BTreeMap::new();
        for fd in images.tasks.iter().flat_map(|task| &task.fds) {
            let Some(saved) = &fd.xattr_security_selinux else {
                continue;
            };
            let wanted = labels.of_socket(saved, &of_tasks);
            if let Some(wanted) = wanted.filter(|wanted| labels.born() != Some(wanted)) {
                found.insert(fd.id, wanted);
            }
        }
        let different: BTreeSet<&String> = found.values().collect();
        different
            .into_iter()
            .try_for_each(|label| check_context(label))?;
        Ok(SocketLabels(found))
    }

    /// The label of a file.
    pub fn of(&self, id: u32) -> Option<&str> {
        self.0.get(&id).map(String::as_str)
    }
}

/// Does a step while new sockets get this label.
pub fn labelled<'i>(label: String, op: Op<'i>) -> Op<'i> {
    Box::new(move |world| {
        choose(Some(&label))?;
        let done = op(world);
        choose(None)?;
        done
    })
}

fn choose(label: Option<&str>) -> Result<(), ExecuteError> {
    let chosen = label_new_sockets(label);
    chosen.during("Labelling sockets", || label.unwrap_or("as usual").into())
}
