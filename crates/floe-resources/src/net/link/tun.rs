//! Devices of `/dev/net/tun`.
//!
//! Two numbers of such a device can be read only through a file that is attached to it: those of the tree are
//! noted as they are collected; a device without any is persistent, and one can attach for the time.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::{NetDeviceEntry, TunLinkEntry};
use floe_kernel::netlink::attributes;
use floe_kernel::rtnetlink::Link;
use floe_kernel::tun::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_PERSIST, IFF_TAP, IFF_VNET_HDR, TunNumber, TunSetting,
    attach_tun, choose_tun_index, has_tap_filter, set_tun, set_tun_number, tun_number,
};
use rustix::fs::{Mode, OFlags};

use crate::net::error::{Attempt, NetError};

/// What files of the tree told about their devices, by the number of the namespace and the name.
#[derive(Debug, Default)]
pub struct TunDevices(HashMap<(u32, String), Numbers>);

#[derive(Clone, Copy, Debug)]
struct Numbers {
    send_buffer: u32,
    header: u32,
}

impl TunDevices {
    /// Notes what a file that is attached to the device tells.
    pub fn note(
        &mut self,
        namespace: u32,
        (name, flags): (&str, u32),
        file: BorrowedFd<'_>,
    ) -> Result<(), NetError> {
        if flags & IFF_TAP != 0 && has_tap_filter(file).during("Reading", || name.to_string())? {
            return Err(NetError::Unsupported {
                object: format!("The packet filter of network device {name}"),
                remedy: "detach it: the kernel does not tell what it is".into(),
            });
        }
        let read = |what| tun_number(file, what).during("Reading", || name.to_string());
        let numbers = Numbers {
            send_buffer: read(TunNumber::SendBuffer)?,
            header: read(TunNumber::Header)?,
        };
        self.0.insert((namespace, name.to_string()), numbers);
        Ok(())
    }

    /// The driver's part of an entry; the calling thread is in the device's namespace.
    pub fn collect(&mut self, link: &Link, namespace: u32) -> Result<TunLinkEntry, NetError> {
        let (flags, owner, group) = settings(link);
        let key = (namespace, link.name.clone());
        if !self.0.contains_key(&key) {
            if flags & IFF_PERSIST == 0 {
                return Err(NetError::Unsupported {
                    object: format!("Network device {} (tun)", link.name),
                    remedy: "dump the process that holds it open too".into(),
                });
            }
            let file = open()?;
            attach_tun(file.as_fd(), &link.name, flags)
                .during("Attaching to", || link.name.clone())?;
            self.note(namespace, (&link.name, flags), file.as_fd())?;
        }
        let numbers = self.0.get(&key).expect("noted above");
        Ok(TunLinkEntry {
            flags,
            owner,
            group,
            vnethdr: numbers.header,
            sndbuf: numbers.send_buffer,
        })
    }
}

/// Flags as `TUNSETIFF` takes them, owner and group or -1.
fn settings(link: &Link) -> (u32, i32, i32) {
    const OWNER: u16 = 1;
    const GROUP: u16 = 2;
    const TYPE: u16 = 3;
    const PI: u16 = 4;
    const VNET_HDR: u16 = 5;
    const PERSIST: u16 = 6;
    const MULTI_QUEUE: u16 = 7;
    let (mut flags, mut owner, mut group) = (0, -1, -1);
    for (kind, value) in attributes(&link.data) {
        let is_set = value.first() == Some(&1);
        let word = || value.try_into().map_or(-1, i32::from_ne_bytes);
        let mut flag = |bit, on: bool| flags |= if on { bit } else { 0 };
        match kind {
            OWNER => owner = word(),
            GROUP => group = word(),
            TYPE => flags |= u32::from(value.first().copied().unwrap_or(0)),
            PI => flag(IFF_NO_PI, !is_set),
            VNET_HDR => flag(IFF_VNET_HDR, is_set),
            PERSIST => flag(IFF_PERSIST, is_set),
            MULTI_QUEUE => flag(IFF_MULTI_QUEUE, is_set),
            _ => {}
        }
    }
    (flags, owner, group)
}

fn open() -> Result<OwnedFd, NetError> {
    let path = "/dev/net/tun";
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).during("Opening", || path.to_string())
}

/// Makes the device, persistent until the tree's file is attached to it. The calling thread is in its namespace.
pub fn execute(entry: &NetDeviceEntry) -> Result<(), NetError> {
    let tun = entry.tun.as_ref().ok_or_else(|| {
        NetError::Damaged(format!(
            "The image of network device {} lacks what tun needs",
            entry.name
        ))
    })?;
    let what = || entry.name.clone();
    let file = open()?;
    let fd = file.as_fd();
    choose_tun_index(fd, entry.ifindex).during("Numbering", what)?;
    attach_tun(fd, &entry.name, tun.flags).during("Making", what)?;
    for (setting, id) in [
        (TunSetting::Owner, tun.owner),
        (TunSetting::Group, tun.group),
    ] {
        if let Ok(id) = u32::try_from(id) {
            set_tun(fd, setting, id).during("Setting the owner of", what)?;
        }
    }
    set_tun_number(fd, TunNumber::SendBuffer, tun.sndbuf).during("Setting the queue of", what)?;
    set_tun_number(fd, TunNumber::Header, tun.vnethdr).during("Setting the header of", what)?;
    set_tun(fd, TunSetting::Persist, 1).during("Keeping", what)
}
