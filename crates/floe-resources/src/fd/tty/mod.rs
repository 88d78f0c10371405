//! Terminals: pseudo-terminals, consoles, `/dev/tty` (`pty(7)`, `ioctl_tty(2)`).
//!
//! Saved:    kind, number, settings, size, session and foreground group once for each terminal, bytes
//!           that wait in a pair; flags and owner of each description, its name as a regular file entry.
//! Rebuilt:  the master is opened until it has its number, the slaves by name, then bytes and settings.
//!           The session leader takes its terminal before it forks. Needs: the number to be free; with
//!           --shell-job a terminal as our standard input.
//! Not kept: a line that is being edited, events of packet mode.

mod collect;
mod early;
mod execute;
mod plan;
mod queue;
mod settings;

pub use early::EarlyMasters;
pub use execute::take_controlling_terminal;

use floe_image::messages::TtyType;
use rustix::fs::{major, minor};

/// See the module.
pub struct Tty;

/// What a terminal is, by its device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Master,
    Slave {
        index: u32,
    },
    Console,
    /// `/dev/tty`: whatever terminal controls the session of who opens it.
    Current,
    Virtual,
    Serial,
}

/// Terminals without a number of their own have ids from here on in the images.
const CONSOLE_INDEX: u32 = 1002;
const VIRTUAL_INDEX: u32 = 1004;
const CURRENT_INDEX: u32 = 1006;
const SERIAL_INDEX: u32 = 1010;
const EXTERNAL_INDEX: u32 = 1012;
/// Highest number of a pty that leaves those ids alone.
const MAX_PTY_INDEX: u32 = 1000;

/// Whether the terminal of this id in the images is one end of a pair.
pub fn is_pseudo(id: u32) -> bool {
    id >> 1 <= MAX_PTY_INDEX
}

impl Kind {
    /// `None` for devices that are no terminals, or none that can be saved
    /// (`Documentation/admin-guide/devices.txt` of the kernel).
    fn of(rdev: u64) -> Option<Kind> {
        match (major(rdev), minor(rdev)) {
            (5, 0) => Some(Kind::Current),
            (5, 1) => Some(Kind::Console),
            (5, 2) | (128..=135, _) => Some(Kind::Master),
            (136..=143, index) => Some(Kind::Slave {
                index: (major(rdev) - 136) * 256 + index,
            }),
            (4, 1..=63) => Some(Kind::Virtual),
            (188 | 204, _) => Some(Kind::Serial),
            _ => None,
        }
    }

    fn image_type(self) -> TtyType {
        match self {
            Kind::Master | Kind::Slave { .. } => TtyType::Pty,
            Kind::Console => TtyType::Console,
            Kind::Current => TtyType::Ctty,
            Kind::Virtual => TtyType::Vt,
            Kind::Serial => TtyType::Serial,
        }
    }
}

/// The id of a terminal in the images: both ends of a pair differ in the last bit.
fn terminal_id(kind: Kind, pty_index: u32) -> u32 {
    match kind {
        Kind::Master => pty_index << 1 | 1,
        Kind::Slave { .. } => pty_index << 1,
        Kind::Console => CONSOLE_INDEX << 1,
        Kind::Virtual => VIRTUAL_INDEX << 1,
        Kind::Current => CURRENT_INDEX << 1,
        Kind::Serial => SERIAL_INDEX << 1,
    }
}

/// The id of the other end.
fn other_end(id: u32) -> u32 {
    id ^ 1
}

fn is_master(id: u32) -> bool {
    id & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::makedev;

    #[test]
    fn the_ends_of_a_pair_are_told_apart() {
        let slave = Kind::of(makedev(136, 7)).expect("a slave");
        assert_eq!(slave, Kind::Slave { index: 7 });
        assert_eq!(terminal_id(slave, 7), 14);
        assert_eq!(Kind::of(makedev(5, 2)), Some(Kind::Master));
        assert_eq!(other_end(terminal_id(Kind::Master, 7)), 14);
        assert!(is_master(15) && !is_master(14));
        assert_eq!(Kind::of(makedev(1, 3)), None);
    }
}
