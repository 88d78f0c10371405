//! Message queues (`msgget(2)`).
//!
//! Saved:    key, number, permissions, owner, creator and capacity of each queue; its messages.
//! Rebuilt:  made with key and number, then owner and capacity, then the messages are sent again.
//!           Needs: the namespace and its limits.
//! Not kept: times, pids of last users.

use std::io;

use floe_image::ImageKind;
use floe_image::dir::MessageQueue;
use floe_image::messages::{IpcMsg, IpcMsgEntry};
use floe_image::writer::EntryStream;
use floe_kernel::proc::{MsgQueue, parse_sysvipc_msg};
use floe_kernel::sysv::msg;
use floe_plan::Handle;

use super::{Numbered, check_number, describe, failed, limited, list, outside, padded};
use crate::collect::CollectError;
use crate::namespace::{OwnerMap, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

const NUMBERED: Numbered = Numbered {
    noun: "message queue",
    next: "/proc/sys/kernel/msg_next_id",
    remove: msg::remove,
};

/// Reads all queues with their messages; we are inside.
pub fn collect(owners: &OwnerMap) -> Result<Vec<MessageQueue>, CollectError> {
    let queues = list("msg", parse_sysvipc_msg).map_err(|source| CollectError::System {
        action: "Listing message queues".to_string(),
        source,
    })?;
    let collect_one = |queue| collect_queue(queue, owners);
    queues.iter().map(collect_one).collect()
}

fn collect_queue(queue: &MsgQueue, owners: &OwnerMap) -> Result<MessageQueue, CollectError> {
    let id = queue.owner.id;
    let capacity = msg::capacity(id).map_err(failed("Asking for the capacity of queue", id))?;
    let mut messages = Vec::new();
    let mut buffer = vec![0; limit(capacity)];
    for index in 0..queue.messages {
        let message = msg::copy(id, index, &mut buffer);
        let (mtype, text) = message.map_err(failed("Copying the messages of queue", id))?;
        let msize = text.len() as u32;
        messages.push((IpcMsg { mtype, msize }, text));
    }
    let entry = IpcMsgEntry {
        desc: describe(&queue.owner, owners),
        qbytes: u32::try_from(capacity).unwrap_or(u32::MAX),
        qnum: queue.messages,
    };
    Ok(MessageQueue { entry, messages })
}

/// Writes `ipcns-msg`.
pub fn encode(queues: Vec<MessageQueue>, image: &mut EntryStream) -> Result<(), CollectError> {
    for queue in queues {
        image.append(&queue.entry)?;
        for (message, text) in queue.messages {
            image.append(&message)?;
            image.append_raw(&padded(text, 8))?;
        }
    }
    Ok(())
}

/// Room for any message: none is larger than all that its queue holds, but where the capacity was
/// lowered meanwhile.
fn limit(capacity: u64) -> usize {
    const LARGE: u64 = 1 << 20;
    const LARGEST: u64 = 64 << 20;
    capacity.clamp(LARGE, LARGEST) as usize
}

/// Adds the step that makes all queues; returns what it makes.
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<Handle, PlanError> {
    let queues = planner.images.dir.read_message_queues(u64::from(id))?;
    for queue in &queues {
        let image = ImageKind::IpcnsMsg.file_name(u64::from(id));
        check_number(&queue.entry.desc, image)?;
    }
    let handle = Handle::Object("message queues of namespace", u64::from(id));
    let name = format!("make {} message queues", queues.len());
    planner.step_at_home(name, (&[made(id), limited(id)], &[handle]), move |world| {
        world.in_namespace(id, |world| {
            let owners = &world.images.owners;
            queues.iter().try_for_each(|queue| make(queue, owners))
        })
    });
    Ok(handle)
}

fn make(queue: &MessageQueue, owners: &OwnerMap) -> Result<(), ExecuteError> {
    let desc = &outside(&queue.entry.desc, owners);
    let capacity = u64::from(queue.entry.qbytes);
    let mode = desc.mode & 0o777;
    let create = || -> io::Result<i32> { msg::create(desc.key, mode.cast_signed()) };
    let id = NUMBERED.make(desc, &create)?;
    let what = || format!("queue {id}");
    msg::set_owner(id, (desc.uid, desc.gid), mode, capacity)
        .during("Setting owner and capacity of", what)?;
    queue.messages.iter().try_for_each(|(message, text)| {
        msg::send(id, message.mtype, text).during("Sending the messages of", what)
    })
}
