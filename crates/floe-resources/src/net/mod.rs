//! The content of a network namespace (`network_namespaces(7)`).
//!
//! Saved:    devices, addresses, next hops, routes, routing and packet rules, neighbours, tracked connections,
//!           settings, ids of others.
//! Rebuilt:  settings, all devices of all namespaces, then what refers to them. Needs: the empty namespaces.
//! Not kept: neighbours that were learned, traffic control, IPsec, devices of kinds that are refused by name.
//!
//! A namespace that is somebody else's (`--external net[INODE]:NAME`) or that somebody else fills
//! (`--empty-ns net`) is left as it is.

mod collect;
mod conntrack;
mod error;
mod firewall;
mod ip_dump;
mod link;
mod locks;
mod neighbour;
mod nexthop;
mod place;
mod plan;
mod settings;
mod sockets;
mod sysctl;

pub use collect::{collect, external_name};
pub use error::NetError;
pub use link::TunDevices;
pub(crate) use locks::unlock_networks;
pub(crate) use place::SocketPlace;
pub use plan::plan;
pub(crate) use sockets::{in_every_network, network_number};

#[cfg(test)]
mod tests;
