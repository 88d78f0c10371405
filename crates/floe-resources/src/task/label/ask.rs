//! What only the thread itself is told: its state under AppArmor beside the label. Whoever else reads these files
//! is told his own (`apparmor_getprocattr` looks at the reader).

use floe_inject::{Arg, BufferId, CallId, Outcome, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::security::SecurityModule;

use super::Label;
use crate::collect::{CollectError, Obstacle};

/// Room for a label.
const ROOM: usize = 1024;

/// What a thread is asked.
#[derive(Debug)]
pub struct LabelQuestions {
    module: SecurityModule,
    /// The profile to which a thread in a hat can go back, and that of the next `exec`.
    previous: Option<Reading>,
    exec: Option<Reading>,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    read: CallId,
    text: BufferId,
}

impl LabelQuestions {
    /// Adds the questions to the program of a thread.
    pub fn ask(module: SecurityModule, program: &mut Program) -> Self {
        let mut ask = |name: &str| {
            let path = format!("/proc/thread-self/{}/{name}\0", module.directory());
            (module == SecurityModule::AppArmor).then(|| Reading::ask(&path, program))
        };
        LabelQuestions {
            module,
            previous: ask("prev"),
            exec: ask("exec"),
        }
    }

    /// Refuses what cannot be given back.
    pub fn read(&self, outcome: &Outcome, pid: HostPid, label: &Label) -> Result<(), CollectError> {
        let answer = |reading: &Option<Reading>| {
            let answered = reading.as_ref().map(|reading| reading.answer(outcome));
            answered.unwrap_or(Ok(None))
        };
        let current = label.current.as_deref().unwrap_or("unconfined");
        let refuse = |object: String, remedy: &str| {
            let remedy = remedy.to_string();
            Err(CollectError::Unsupported(Obstacle {
                pid,
                object,
                remedy,
            }))
        };
        match answer(&self.previous) {
            Ok(Some(text)) => {
                let previous = self.module.label(text).unwrap_or("unconfined".into());
                let object = format!(
                    "its AppArmor hat {current}, from which it goes back to {previous} with a secret that the kernel does not tell"
                );
                return refuse(object, "dump it while it is in no hat");
            }
            // Hats are named as children of their profile.
            Err(errno) if current.replace("//&", "").contains("//") => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::warn!(pid = pid.0, current, %error, "it cannot be asked whether it is in a hat of AppArmor's: should it be, it cannot leave it");
            }
            _ => {}
        }
        match answer(&self.exec) {
            Ok(Some(text)) => {
                let exec = self.module.label(text).unwrap_or("unconfined".into());
                let object = format!("its AppArmor profile for the next exec, {exec}");
                refuse(object, "dump it once it has started that program")
            }
            _ => Ok(()),
        }
    }
}

impl Reading {
    fn ask(path: &str, program: &mut Program) -> Self {
        let path = program.buffer(path.as_bytes());
        let text = program.zeroed(ROOM);
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        let args = [Arg::from(libc::AT_FDCWD), path.into(), flags.into()];
        // What follows fails, too, where this does.
        let file = program.try_call("open of a label", libc::SYS_openat, &args);
        let args = [file.into(), text.into(), ROOM.into()];
        let read = program.try_call("read of a label", libc::SYS_read, &args);
        program.try_call("close", libc::SYS_close, &[file.into()]);
        Reading { read, text }
    }

    /// The text; `None` where there is nothing to tell, an errno where the file could not be read.
    fn answer<'o>(&self, outcome: &'o Outcome) -> Result<Option<&'o [u8]>, i32> {
        match outcome.result(self.read) {
            // So the kernel says that there is none.
            0 => Ok(None),
            error if error == -i64::from(libc::EINVAL) => Ok(None),
            error if error < 0 => Err(-error as i32),
            length => Ok(outcome.data(self.text).get(..length as usize)),
        }
    }
}
