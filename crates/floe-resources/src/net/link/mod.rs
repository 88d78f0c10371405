//! Network devices (`rtnetlink(7)`).
//!
//! Saved:    number, name, flags, MTU, address, master, settings, what is below or at the other end; counts of queues,
//!           alias, group, further names, parameters of bridges and their ports.
//! Rebuilt:  in an order in which masters, devices below and other ends exist first; then switched on. Needs: all namespaces.
//! Not kept: offloads, traffic control, multicast groups of bridges, what the driver counts; XDP programs are refused.
//!
//! A veth whose other end is outside of the tree, and any device that is passed in, is named by `--external`.

mod collect;
mod execute;
mod extra;
mod sit;
mod tun;

pub use collect::{Surroundings, collect};
pub use execute::{Network, Outside, execute};
pub use tun::TunDevices;

use floe_image::messages::NdType;

/// Devices that a driver makes in every namespace.
const FALLBACKS: [(&str, &str); 9] = [
    ("sit", "sit0"),
    ("gre", "gre0"),
    ("gretap", "gretap0"),
    ("erspan", "erspan0"),
    ("ipip", "tunl0"),
    ("ip6tnl", "ip6tnl0"),
    ("ip6gre", "ip6gre0"),
    ("vti", "ip_vti0"),
    ("vti6", "ip6_vti0"),
];

/// Kinds that CRIU's images do not know, made again from the driver's own attributes.
const PLAIN: [&str; 6] = ["dummy", "ifb", "nlmon", "vlan", "vrf", "ipvlan"];

/// The image's number of a driver.
fn type_of(kind: &str) -> Option<NdType> {
    Some(match kind {
        "veth" => NdType::Veth,
        "tun" => NdType::Tun,
        "bridge" => NdType::Bridge,
        "macvlan" => NdType::Macvlan,
        "sit" => NdType::Sit,
        "venet" => NdType::Venet,
        _ => return None,
    })
}
