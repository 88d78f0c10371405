//! Files of `/dev/net/tun`.
//!
//! Saved:    path and flags as of a regular file, the device that the file is attached to, whether its queue is on.
//! Rebuilt:  opened in its network namespace, attached, switched off. Needs: the device, which is then given its
//!           own lifetime.
//! Not kept: packets that nobody has read, filters of packets (refused).

use std::os::fd::{AsFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, NetDeviceEntry, TunfileEntry};
use floe_kernel::tun::{
    IFF_DETACH_QUEUE, IFF_PERSIST, TunSetting, attach_tun, detach_tun_queue, set_tun, tun_device,
};
use rustix::fs::{FileType, OFlags};

use super::regular::{self, NamedFile, collect_named};
use super::{FdKind, FdRestore, file_entry, payload, remap};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::net::{NetError, SocketPlace, TunDevices, network_number};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, plan_owner, set_flags};

/// See the module.
pub struct TunFile;

/// Major and minor number of the device.
const TUN: (u32, u32) = (10, 200);

impl FdKind for TunFile {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        let rdev = fd.stat().st_rdev;
        let number = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        fd.file_type() == FileType::CharacterDevice && !fd.is_path() && number == TUN
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let refuse = |what: String, remedy: &str| {
            CollectError::Unsupported(Obstacle::fd(fd.pid(), fd.fd(), what, remedy))
        };
        let network = network_number(fd, collector)?;
        let mut entry = TunfileEntry {
            id: id.0,
            ns_id: network,
            ..TunfileEntry::default()
        };
        let device =
            tun_device(fd.file()).map_err(|error| fd.failed("Asking for the device", error))?;
        if let Some((name, flags)) = device {
            let networks = collector.namespaces().all();
            let Some(network) = network.filter(|id| networks.iter().any(|one| one.id == *id))
            else {
                return Err(refuse(
                    format!("tun device {name} of the caller's network namespace"),
                    "run the program in a network namespace of its own",
                ));
            };
            let noted =
                collector
                    .cache(TunDevices::default)
                    .note(network, (&name, flags), fd.file());
            noted.map_err(|error| match error {
                NetError::Unsupported { object, remedy } => refuse(object, &remedy),
                error => error.into(),
            })?;
            entry.netdev = Some(name);
            entry.detached = (flags & IFF_DETACH_QUEUE != 0).then_some(true);
        }
        let named = collect_named(id, NamedFile::of(fd)?, collector)?;
        Ok(FileEntry {
            reg: named.reg,
            tunf: Some(entry),
            ..file_entry(FdTypes::Tunf, id)
        })
    }
}

impl FdRestore for TunFile {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Tunf
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.tunf)?;
        let reg = payload(file, &file.reg)?;
        let place = SocketPlace::new(planner, entry.ns_id);
        let attached = match &entry.netdev {
            Some(name) => Some((name.as_str(), device_flags(name, place, planner)?)),
            None => None,
        };
        let mut needs = place.needs();
        needs.extend(remap::needs_of_name(planner.images, reg));
        let name = format!("open tun file {:#x}", entry.id);
        planner.open(entry.id, name, &needs, move |world| {
            place.visit(world, |world| {
                let flags = OFlags::from_bits_retain(reg.flags) & OFlags::ACCMODE;
                let file = regular::open(world, reg, flags | OFlags::CLOEXEC)?;
                if let Some(device) = attached {
                    attach(&file, device, entry.detached == Some(true))?;
                }
                set_flags(file.as_fd(), reg.flags)?;
                Ok(file)
            })
        });
        plan_owner(planner, entry.id, &reg.fown);
        Ok(())
    }
}

/// With which flags the device was made.
fn device_flags(name: &str, place: SocketPlace, planner: &Planner<'_>) -> Result<u32, PlanError> {
    let number = u64::from(place.number().unwrap_or(0));
    let devices: Vec<NetDeviceEntry> = planner.images.dir.read_all(ImageKind::Netdev, number)?;
    let device = devices.iter().find(|device| device.name == name);
    let tun = device.and_then(|device| device.tun.as_ref());
    let tun = tun.ok_or_else(|| {
        let image = ImageKind::Netdev.file_name(number);
        PlanError::damaged(image, format!("no tun device {name}, which a file uses"))
    })?;
    Ok(tun.flags)
}

fn attach(file: &OwnedFd, (name, flags): (&str, u32), detached: bool) -> Result<(), ExecuteError> {
    let what = || name.to_string();
    attach_tun(file.as_fd(), name, flags).during("Attaching to tun device", what)?;
    if detached {
        detach_tun_queue(file.as_fd(), name).during("Detaching from tun device", what)?;
    }
    if flags & IFF_PERSIST == 0 {
        set_tun(file.as_fd(), TunSetting::Persist, 0).during("Letting go of tun device", what)?;
    }
    Ok(())
}
