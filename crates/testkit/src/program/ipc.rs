//! An IPC namespace with something of everything in it.

use std::fs;

use anyhow::{Context, ensure};

use super::{Check, Missing, Place, Program, all, fact, unchanged};
use crate::sys::sysv;

pub const PROGRAMS: &[Program] = &[Program::new("ipc-namespace", namespace)];

/// Settings, segments with and without a mapping, semaphores, queues with messages.
fn namespace(_: &Place) -> anyhow::Result<Check> {
    sysv::leave().map_err(|error| Missing(format!("no namespaces: {error}")))?;
    const MSGMAX: &str = "/proc/sys/kernel/msgmax";
    fs::write(MSGMAX, "4000").map_err(|error| Missing(format!("settings: {error}")))?;
    // The first numbers are used up, so that the others are not what a new namespace gives.
    let used = sysv::segment(1, 1)?;
    let attached = sysv::attach(sysv::segment(2, 3)?, 3, 0)?.leak();
    sysv::mark(used)?;
    attached.fill_page(1, 16);
    let detached = sysv::segment(-3, 2)?;
    sysv::attach(detached, 2, 0)?.fill(17);
    sysv::semaphores(4, &mut [1, 65, 32767])?;
    let (empty, queue) = (sysv::queue(5)?, sysv::queue(libc::IPC_PRIVATE)?);
    let messages = [(7, b"first".to_vec()), (1, vec![8; 3999]), (9, Vec::new())];
    for (kind, text) in &messages {
        sysv::send(queue, *kind, text)?;
    }
    let facts = unchanged(move || {
        let own = |name: &str| -> anyhow::Result<String> {
            let text = fs::read_to_string(format!("/proc/sysvipc/{name}"))?;
            // Without pids and times.
            let columns = |line: &str| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words[..4.min(words.len())].join(" ")
            };
            Ok(text.lines().map(columns).collect::<Vec<_>>().join("\n"))
        };
        Ok(vec![
            fact("segments", own("shm")?),
            fact("semaphores", own("sem")?),
            fact("queues", own("msg")?),
            fact("msgmax", fs::read_to_string(MSGMAX)?),
            fact("values", format!("{:?}", sysv::values(4, 3)?)),
            fact("first queue", sysv::receive(empty).is_err()),
        ])
    })?;
    let content = Box::new(move || {
        attached.check_page(1, 16).map_err(anyhow::Error::msg)?;
        let seen = sysv::attach(detached, 2, 0).context("the segment that nobody maps")?;
        seen.check(17).map_err(anyhow::Error::msg)?;
        // Around once: the queue is as it was.
        for message in &messages {
            let found = sysv::receive(queue)?;
            ensure!(found == *message, "a message of type {} came", found.0);
            sysv::send(queue, found.0, &found.1)?;
        }
        Ok(())
    });
    Ok(all(vec![facts, content]))
}
