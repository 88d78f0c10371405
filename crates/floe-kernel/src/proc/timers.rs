//! `/proc/<pid>/timers`: POSIX timers.

use super::text::{ParseError, decimal, hex, lines, signed};

/// One timer, as created; its setting is known only to the task itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    pub id: u32,
    pub signal: u32,
    /// `sival_ptr`.
    pub value: u64,
    /// `SIGEV_*` without `SIGEV_THREAD_ID`.
    pub notify: u32,
    /// Notifies the thread with this id, instead of the process.
    pub thread: bool,
    /// Pid, or thread id, that is notified.
    pub target: u32,
    pub clock: i32,
}

/// Reads a whole `timers` file (`proc_pid_timers(5)`).
pub fn parse_timers(text: &[u8]) -> Result<Vec<PosixTimer>, ParseError> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in lines(text) {
        let bad = || ParseError::new("timers", "timer", line);
        let colon = line.iter().position(|&b| b == b':').ok_or_else(bad)?;
        let value = line[colon + 1..].trim_ascii();
        if &line[..colon] == b"ID" {
            let id = decimal(value)
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(bad)?;
            timers.push(PosixTimer {
                id,
                signal: 0,
                value: 0,
                notify: 0,
                thread: false,
                target: 0,
                clock: 0,
            });
        } else {
            let timer = timers.last_mut().ok_or_else(bad)?;
            read_line(timer, &line[..colon], value).ok_or_else(bad)?;
        }
    }
    Ok(timers)
}

fn read_line(timer: &mut PosixTimer, key: &[u8], value: &[u8]) -> Option<()> {
    match key {
        b"signal" => {
            let slash = value.iter().position(|&b| b == b'/')?;
            timer.signal = u32::try_from(decimal(&value[..slash])?).ok()?;
            // printf("%px"): no 0x, no leading zeros guaranteed.
            timer.value = hex(&value[slash + 1..])?;
        }
        b"notify" => {
            // `signal/pid.42`, `none/pid.42`, `thread/tid.42`
            let slash = value.iter().position(|&b| b == b'/')?;
            let dot = value.iter().position(|&b| b == b'.')?;
            timer.notify = match &value[..slash] {
                b"signal" => 0,
                b"none" => 1,
                b"thread" => 2,
                _ => return None,
            };
            timer.thread = value.get(slash + 1..dot)? == b"tid";
            timer.target = u32::try_from(decimal(&value[dot + 1..])?).ok()?;
        }
        b"ClockID" => timer.clock = i32::try_from(signed(value)?).ok()?,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read_in_order() {
        let text = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
            ID: 0\nsignal: 14/0000000000000001\nnotify: signal/tid.2635\nClockID: -6\n";
        let timers = parse_timers(text).expect("well formed");
        assert_eq!(
            (timers[0].id, timers[0].signal, timers[0].value),
            (1, 60, 0x7fff_86e4_52a8)
        );
        assert!(
            !timers[0].thread
                && timers[1].thread
                && timers[1].target == 2635
                && timers[1].clock == -6
        );
        assert!(parse_timers(b"signal: 1/0\n").is_err());
    }
}
