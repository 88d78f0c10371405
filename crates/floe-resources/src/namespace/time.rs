//! The content of a time namespace: how its clocks are set (`time_namespaces(7)`).
//!
//! Saved:    what the monotonic and the boot clock show inside.
//! Rebuilt:  offsets by which they go on from there, written before the first task is born into the
//!           namespace. Needs: nothing.
//! Not kept: the time between dump and restore, which does not count.

use floe_image::ImageKind;
use floe_image::messages::{TimensEntry, Timespec};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{self, Namespace, NsKind, own_proc_path};
use floe_kernel::proc::ProcDir;
use rustix::time::{ClockId, clock_gettime};

use super::{TreeNamespace, host_number, own_of_root};
use crate::collect::{CollectError, Collector};
use crate::restore::{Attempt, ExecuteError, PlanError, TreeImages, World};

const NANOSECONDS: i128 = 1_000_000_000;

/// Offsets of the two clocks against those of the system, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Offsets {
    monotonic: i128,
    boottime: i128,
}

impl Offsets {
    /// From `/proc/<pid>/timens_offsets`.
    fn parse(text: &str) -> Option<Self> {
        let mut offsets = Offsets::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let place = match words.next()? {
                "monotonic" => &mut offsets.monotonic,
                "boottime" => &mut offsets.boottime,
                _ => continue,
            };
            let seconds: i64 = words.next()?.parse().ok()?;
            let nanoseconds: i64 = words.next()?.parse().ok()?;
            *place = i128::from(seconds) * NANOSECONDS + i128::from(nanoseconds);
        }
        Some(offsets)
    }

    fn of_task(task: &ProcDir) -> Result<Self, CollectError> {
        let text = task.read("timens_offsets")?;
        let text = String::from_utf8_lossy(&text);
        Self::parse(&text).ok_or_else(|| CollectError::Garbled {
            pid: task.pid(),
            what: "timens_offsets",
            text: text.into_owned(),
        })
    }
}

/// What a clock of ours shows, in nanoseconds.
fn now(clock: ClockId) -> i128 {
    let time = clock_gettime(clock);
    i128::from(time.tv_sec) * NANOSECONDS + i128::from(time.tv_nsec)
}

fn timespec(nanoseconds: i128) -> Timespec {
    Timespec {
        tv_sec: (nanoseconds / NANOSECONDS) as u64,
        tv_nsec: (nanoseconds % NANOSECONDS) as u64,
    }
}

fn nanoseconds(time: &Timespec) -> i128 {
    i128::from(time.tv_sec) * NANOSECONDS + i128::from(time.tv_nsec)
}

/// Writes the image of a namespace.
pub(super) fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let inside = Offsets::of_task(&ProcDir::open(namespace.member)?)?;
    let own = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
    let own = Offsets::of_task(&own)?;
    let entry = TimensEntry {
        monotonic: timespec(now(ClockId::Monotonic) + inside.monotonic - own.monotonic),
        boottime: timespec(now(ClockId::Boottime) + inside.boottime - own.boottime),
    };
    Ok(collector
        .writer()
        .write_one(ImageKind::Timens, u64::from(namespace.id), &entry)?)
}

/// Reads the image of a namespace, so that a missing one is found early.
pub(super) fn check(id: u32, images: &TreeImages) -> Result<(), PlanError> {
    let _: TimensEntry = images.dir.read_one(ImageKind::Timens, u64::from(id))?;
    Ok(())
}

/// Does something by which a task is born into the tree's time namespace, where it has one.
pub fn in_new_clocks<T>(
    world: &mut World<'_>,
    birth: impl FnOnce(&mut World<'_>) -> Result<T, ExecuteError>,
) -> Result<T, ExecuteError> {
    let saved = own_of_root(world.images, NsKind::Time);
    let id = saved.unwrap_or_else(|| host_number(NsKind::Time));
    let given = world.namespaces().get(id).ok();
    if saved.is_none() && given.is_none() {
        return birth(world);
    }
    let own =
        Namespace::own(NsKind::Time).during("Opening", || "our time namespace".to_string())?;
    match given {
        Some(given) => namespace::enter(&given).during("Entering", || {
            format!("the time namespace {id} that is given")
        })?,
        None => {
            let dir = &world.images.dir;
            let entry: TimensEntry = dir.read_one(ImageKind::Timens, u64::from(id))?;
            enter_new(&entry).during("Setting the clocks of", || format!("time namespace {id}"))?;
        }
    }
    let born = birth(world);
    // Only a process with one thread may; else its own children would have the tree's clocks.
    if let Err(error) = namespace::enter(&own) {
        tracing::debug!(%error, "helpers of this restore are born with the tree's clocks");
    }
    born
}

/// Has our next children live in a new namespace, whose clocks show what is saved.
fn enter_new(entry: &TimensEntry) -> std::io::Result<()> {
    let path = own_proc_path("self/timens_offsets");
    let own =
        Offsets::parse(&std::fs::read_to_string(&path)?).ok_or(std::io::ErrorKind::InvalidData)?;
    namespace::unshare(NsKind::Time.flag())?;
    let line = |name: &str, wanted: &Timespec, system: i128| {
        let offset = nanoseconds(wanted) - system;
        let (seconds, rest) = (
            offset.div_euclid(NANOSECONDS),
            offset.rem_euclid(NANOSECONDS),
        );
        format!("{name} {seconds} {rest}\n")
    };
    let monotonic = now(ClockId::Monotonic) - own.monotonic;
    let boottime = now(ClockId::Boottime) - own.boottime;
    let text = line("monotonic", &entry.monotonic, monotonic)
        + &line("boottime", &entry.boottime, boottime);
    std::fs::write(&path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_may_be_negative() {
        let text = "monotonic         -2  500000000\nboottime           7          9\n";
        let expected = Offsets {
            monotonic: -1_500_000_000,
            boottime: 7_000_000_009,
        };
        assert_eq!(Offsets::parse(text), Some(expected));
        assert_eq!(Offsets::parse("monotonic x 1\n"), None);
    }
}
