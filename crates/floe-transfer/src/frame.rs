//! The frames of CRIU's page server, as version 4 of it speaks.
//!
//! A dump sends, for each task and each shared segment, `Open` (answered by one byte: whether the server
//! has that object's pages of an earlier generation) and an `Add` for each stretch of pages, with the pages
//! behind it where they are present. `Close` ends the conversation and is answered by four bytes of status.
//! Pages left behind for later are asked for by `Get`, which is answered by an `Add` with pages.

use floe_image::ImageKind;
use floe_memory::PageRun;

/// Bytes of a frame: a 32-bit command, 4 bytes of padding, three 64-bit numbers, all little-endian.
pub const FRAME_BYTES: usize = 32;

const COMMAND_BITS: u32 = 16;
const TARGET_BITS: u32 = 8;

/// What a frame asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Pages follow: the entry of a pagemap, with its flags.
    Add { flags: u32 },
    /// The older form of an entry in the parent.
    Hole,
    /// Begins an object; not answered (older senders).
    Open,
    /// Begins an object; answered by one byte.
    OpenAnswered,
    /// Whether an earlier generation has the object; answered by four bytes.
    HasParent,
    /// Asks for pages.
    Get,
    /// The end.
    Close,
    /// The end, where the connection may stay open in another process.
    ForceClose,
}

/// Whose pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A task, by its pid in the images.
    Task(u64),
    /// A shared segment, by its id.
    Segment(u64),
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it asks for.
    pub command: Command,
    /// The pages.
    pub run: PageRun,
    /// The object, still encoded: a `Get` has the bare pid.
    pub object: u64,
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("command {0:#x} is not known")]
    Command(u32),
    #[error("type {0} of pages is not known")]
    Target(u64),
    #[error("{pages} pages at {start:#x} are no stretch of memory")]
    Run { start: u64, pages: u64 },
}

impl Command {
    fn number(self) -> u32 {
        match self {
            Command::Hole => 2,
            Command::Open => 3,
            Command::OpenAnswered => 4,
            Command::HasParent => 5,
            Command::Add { flags } => flags << COMMAND_BITS | 6,
            Command::Get => 7,
            Command::Close => 0x1023,
            Command::ForceClose => 0x1024,
        }
    }

    fn of(number: u32) -> Result<Self, BadFrame> {
        Ok(match number & ((1 << COMMAND_BITS) - 1) {
            1 => Command::Add {
                flags: floe_image::dir::PE_PRESENT,
            },
            2 => Command::Hole,
            3 => Command::Open,
            4 => Command::OpenAnswered,
            5 => Command::HasParent,
            6 => Command::Add {
                flags: number >> COMMAND_BITS,
            },
            7 => Command::Get,
            0x1023 => Command::Close,
            0x1024 => Command::ForceClose,
            _ => return Err(BadFrame::Command(number)),
        })
    }
}

impl Target {
    /// As in a frame.
    pub fn encode(self) -> u64 {
        match self {
            Target::Task(id) => id << TARGET_BITS | 1,
            Target::Segment(id) => id << TARGET_BITS | 2,
        }
    }

    /// From a frame. The larger numbers are what versions 1 to 3 sent by mistake.
    pub fn decode(object: u64) -> Result<Self, BadFrame> {
        let id = object >> TARGET_BITS;
        match object & ((1 << TARGET_BITS) - 1) {
            1 | 10 | 11 | 16 | 17 => Ok(Target::Task(id)),
            2 | 27..=29 | 32..=34 => Ok(Target::Segment(id)),
            other => Err(BadFrame::Target(other)),
        }
    }

    /// The image that is its index.
    pub fn image(self) -> (ImageKind, u64) {
        match self {
            Target::Task(id) => (ImageKind::Pagemap, id),
            Target::Segment(id) => (ImageKind::ShmemPagemap, id),
        }
    }
}

impl Frame {
    /// A frame about an object as a whole.
    pub fn about(command: Command, target: Target) -> Self {
        Frame {
            command,
            run: PageRun { start: 0, pages: 0 },
            object: target.encode(),
        }
    }

    /// A frame about nothing: `Close` and `ForceClose`.
    pub fn bare(command: Command) -> Self {
        Frame {
            command,
            run: PageRun { start: 0, pages: 0 },
            object: 0,
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        bytes[..4].copy_from_slice(&self.command.number().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.pages.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.run.start.to_le_bytes());
        bytes[24..].copy_from_slice(&self.object.to_le_bytes());
        bytes
    }

    /// From the bytes on the wire; a stretch beyond the end of memory is refused.
    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, BadFrame> {
        let number = |at: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(eight)
        };
        let command = Command::of(number(0) as u32)?;
        let (pages, start) = (number(8), number(16));
        let end = pages
            .checked_mul(floe_kernel::ids::PAGE_SIZE)
            .and_then(|len| start.checked_add(len));
        if end.is_none() || start % floe_kernel::ids::PAGE_SIZE != 0 {
            return Err(BadFrame::Run { start, pages });
        }
        Ok(Frame {
            command,
            run: PageRun { start, pages },
            object: number(24),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_laid_out_as_criu_does() {
        let frame = Frame {
            command: Command::Add { flags: 4 },
            run: PageRun {
                start: 0x7000,
                pages: 3,
            },
            object: Target::Task(77).encode(),
        };
        let bytes = frame.encode();
        assert_eq!(bytes[..8], [6, 0, 4, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..24], [0, 0x70, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[24..], [1, 77, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Frame::decode(&bytes), Ok(frame));
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut bytes = Frame::bare(Command::Get).encode();
        bytes[8..16].fill(0xff);
        assert!(matches!(Frame::decode(&bytes), Err(BadFrame::Run { .. })));
        bytes[0] = 9;
        assert_eq!(Frame::decode(&bytes), Err(BadFrame::Command(9)));
        assert_eq!(Target::decode(3), Err(BadFrame::Target(3)));
    }
}
