//! What the state of a TCP connection says about the end marks (FIN) in its queues: pure.
//!
//! A FIN takes one sequence number after the last byte. `tcp_stream_entry` counts it in the sequence
//! numbers (`inq_seq`, `outq_seq`) and not in the lengths.

use floe_image::messages::TcpStreamEntry;
use floe_kernel::tcp_repair::{Agreed, Agreement, Window};

use crate::restore::PlanError;

const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;
pub(super) const SYN_SENT: u32 = 2;
const CLOSE: u32 = 7;

/// Which directions of a connection have ended.
///
/// A closed socket that was connected is brought there by the way of LAST_ACK, whichever way it went: what it
/// received stays readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    /// The peer has sent its FIN.
    pub received: bool,
    /// We have sent ours, or it waits behind unsent bytes.
    pub sent: bool,
    /// Ours came first, so the peer's was taken by a socket that was shut.
    pub sent_first: bool,
    /// The peer has acknowledged ours.
    pub acknowledged: bool,
}

impl Ends {
    /// What a state means.
    pub fn of(state: u32) -> Self {
        Ends {
            received: matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING | CLOSE),
            sent: matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING | CLOSE),
            sent_first: matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING),
            acknowledged: matches!(state, FIN_WAIT2 | CLOSE),
        }
    }
}

/// Lengths of the queues, without end marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    pub receive: u32,
    pub send: u32,
    pub unsent: u32,
}

impl Lengths {
    /// From what the kernel counts, which has our FIN in it.
    pub fn from_kernel(state: u32, counted: Lengths) -> Self {
        if state == CLOSE {
            // After a reset nobody can read what is left.
            return Lengths {
                send: 0,
                unsent: 0,
                ..counted
            };
        }
        let fin = u32::from(Ends::of(state).sent);
        Lengths {
            send: counted.send.saturating_sub(fin),
            unsent: counted.unsent.saturating_sub(fin),
            ..counted
        }
    }
}

/// Where a connection to be rebuilt begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sequences {
    /// The end of the received bytes.
    pub receive_end: u32,
    /// The end of the bytes to be sent.
    pub send_end: u32,
    pub receive_start: u32,
    pub send_start: u32,
}

impl Sequences {
    /// From an image.
    pub fn new(state: u32, stream: &TcpStreamEntry) -> Self {
        let ends = Ends::of(state);
        let receive_end = stream.inq_seq.wrapping_sub(ends.received.into());
        let send_end = stream.outq_seq.wrapping_sub(ends.sent.into());
        Sequences {
            receive_end,
            send_end,
            receive_start: receive_end.wrapping_sub(stream.inq_len),
            send_start: send_end.wrapping_sub(stream.outq_len),
        }
    }
}

/// The windows of an image; without the peer's FIN, which is received again.
pub(super) fn window(state: u32, stream: &TcpStreamEntry) -> Option<Window> {
    let fin = u32::from(Ends::of(state).received);
    Some(Window {
        snd_wl1: stream.snd_wl1?,
        snd_wnd: stream.snd_wnd?,
        max_window: stream.max_window?,
        rcv_wnd: stream.rcv_wnd?.wrapping_add(fin),
        rcv_wup: stream.rcv_wup?.wrapping_sub(fin),
    })
}

/// What the ends agreed on, from an image.
pub(super) fn agreement(stream: &TcpStreamEntry) -> Result<Agreement, PlanError> {
    let agreed = Agreed(stream.opt_mask as u8);
    let missing = |field: &str| PlanError::damaged("tcp-stream", format!("{field} is missing"));
    let scaled = agreed.has(Agreed::WINDOW_SCALE);
    let scale = |value: u32| u8::try_from(value).ok().filter(|scale| *scale <= 14);
    let (send_scale, receive_scale) = if scaled {
        let receive = stream.rcv_wscale.ok_or_else(|| missing("rcv_wscale"))?;
        (scale(stream.snd_wscale), scale(receive))
    } else {
        (Some(0), Some(0))
    };
    let (Some(send_scale), Some(receive_scale)) = (send_scale, receive_scale) else {
        return Err(PlanError::damaged(
            "tcp-stream",
            "a window scale is above 14",
        ));
    };
    let timestamp = match stream.timestamp {
        None if agreed.has(Agreed::TIMESTAMPS) => return Err(missing("timestamp")),
        timestamp => timestamp.unwrap_or(0),
    };
    Ok(Agreement {
        agreed,
        send_scale,
        receive_scale,
        mss: stream.mss_clamp,
        timestamp,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> TcpStreamEntry {
        TcpStreamEntry {
            inq_len: 10,
            inq_seq: 5,
            outq_len: 3,
            outq_seq: 100,
            opt_mask: 7,
            snd_wscale: 7,
            rcv_wscale: Some(8),
            timestamp: Some(99),
            mss_clamp: 1460,
            ..TcpStreamEntry::default()
        }
    }

    #[test]
    fn sequences_wrap_and_leave_end_marks_out() {
        let plain = Sequences::new(1, &stream());
        assert_eq!(
            (plain.receive_start, plain.send_start),
            (5u32.wrapping_sub(10), 97)
        );
        let closing = Sequences::new(CLOSING, &stream());
        assert_eq!((closing.receive_end, closing.send_end), (4, 99));
        let waiting = Sequences::new(CLOSE_WAIT, &stream());
        assert_eq!((waiting.receive_end, waiting.send_end), (4, 100));
    }

    #[test]
    fn our_end_mark_is_not_counted_as_a_byte() {
        let counted = Lengths {
            receive: 4,
            send: 8,
            unsent: 1,
        };
        let lengths = Lengths::from_kernel(FIN_WAIT1, counted);
        assert_eq!((lengths.send, lengths.unsent), (7, 0));
        assert_eq!(Lengths::from_kernel(CLOSE_WAIT, counted), counted);
        assert_eq!(Lengths::from_kernel(CLOSE, counted).send, 0);
    }

    #[test]
    fn an_agreement_needs_what_its_mask_promises() {
        assert_eq!(agreement(&stream()).expect("whole").receive_scale, 8);
        let mut lacking = stream();
        lacking.timestamp = None;
        assert!(agreement(&lacking).is_err());
        lacking = stream();
        lacking.snd_wscale = 15;
        assert!(agreement(&lacking).is_err());
    }
}
