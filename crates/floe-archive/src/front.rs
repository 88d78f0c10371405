//! What stands before the pages of an archive that a dump writes, and is known after them: it goes into room
//! that was left for it. What of the room is not needed is a frame without content, or is closed up.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use floe_image::frames::{Codec, FILLER_HEAD, Frame, FrameWriter, filler};

use crate::archive::Member;
use crate::pack::{PackError, Packer};

/// Room that is left, in bytes: the images of some hundred tasks, compressed.
pub(crate) const ROOM: u64 = 1 << 20;
/// Most bytes in a frame without content: a reader of a stream holds one.
const FILLER: u64 = 256 << 10;
/// Room is closed up by moving what stands behind it, if that is not more, in bytes.
const MOVED: u64 = 16 << 20;

/// Compressed members.
pub(crate) struct Front {
    stored: Vec<u8>,
    pub(crate) frames: Vec<Frame>,
    pub(crate) members: BTreeMap<String, Member>,
}

/// Memory that takes no more than the room.
pub(crate) struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Room that is left over has at least the head of a frame.
        if self.0.len() + bytes.len() + FILLER_HEAD > ROOM as usize {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Front {
    /// Compresses what `pack` packs; `None` where that does not fit the room.
    pub(crate) fn make(
        level: i32,
        modified: u64,
        pack: impl FnOnce(&mut Packer<Bounded>) -> Result<(), PackError>,
    ) -> Result<Option<Front>, PackError> {
        let frames = FrameWriter::new(Bounded(Vec::new()), Codec::Zstd(level), 1);
        let mut packer = Packer::new(frames.map_err(PackError::Write)?, modified);
        let made = pack(&mut packer).and_then(|()| {
            let frames = packer.frames.into_frames();
            frames.map_err(PackError::Write)
        });
        match made {
            Ok((Bounded(stored), frames)) => Ok(Some(Front {
                stored,
                frames,
                members: packer.members,
            })),
            Err(PackError::Write(error)) if error.kind() == io::ErrorKind::FileTooLarge => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Bytes of content.
    pub(crate) fn content(&self) -> u64 {
        let last = self.frames.last();
        last.map_or(0, |frame| frame.start + u64::from(frame.len))
    }

    /// Writes it into the room at the beginning of `file`, behind which `behind` bytes stand.
    pub(crate) fn place(&mut self, file: &mut File, behind: u64) -> io::Result<()> {
        file.write_all_at(&self.stored, 0)?;
        let mut at = self.stored.len() as u64;
        if behind <= MOVED {
            let mut moved = vec![0; behind as usize];
            file.read_exact_at(&mut moved, ROOM)?;
            file.write_all_at(&moved, at)?;
            file.set_len(at + behind)?;
            file.seek(SeekFrom::End(0))?;
            return Ok(());
        }
        while at < ROOM {
            let rest = ROOM - at;
            // What remains has room for a head of its own.
            let size = match rest <= FILLER {
                true => rest,
                false => FILLER.min(rest - FILLER_HEAD as u64),
            };
            file.write_all_at(&filler(size as u32), at)?;
            self.frames.push(Frame {
                start: self.content(),
                len: 0,
                stored_at: at,
                stored_len: size as u32,
            });
            at += size;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame_stream::FrameStream;
    use floe_image::frames::FramedReader;
    use std::io::Read;

    /// Bytes that do not become fewer by compressing.
    fn noise(len: usize) -> Vec<u8> {
        let mut content = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        content
    }

    #[test]
    fn what_was_written_last_is_read_first() {
        for behind in [0, 5000, MOVED as usize + 1_000_000] {
            let mut file = tempfile::tempfile().expect("a file");
            file.seek(SeekFrom::Start(ROOM)).expect("a file");
            let pages = noise(behind);
            let out = file.try_clone().expect("a descriptor");
            let mut frames = FrameWriter::new(out, Codec::Zstd(1), 2).expect("threads");
            frames.write_all(&pages).expect("written");
            let (written, _) = frames.drain().expect("written");
            let stored = written.iter().map(|frame| u64::from(frame.stored_len));
            let stored: u64 = stored.sum();
            let front = Front::make(1, 0, |packer| packer.bytes("first", b"content"));
            let mut front = front.expect("memory").expect("it fits");
            front.place(&mut file, stored).expect("written");
            frames.put_before(front.frames.clone());
            let (_, size) = frames.finish().expect("written");
            assert_eq!(size, file.metadata().expect("a file").len());

            let reader = FramedReader::open(file.try_clone().expect("a descriptor"));
            let reader = reader.expect("it has a table");
            let mut all = vec![0; reader.len() as usize];
            reader.read_exact_at(&mut all, 0).expect("read");
            for frame in reader.frames().iter().filter(|frame| frame.len == 0) {
                reader.decode(frame, &mut []).expect("nothing");
            }
            let mut streamed = Vec::new();
            file.seek(SeekFrom::Start(0)).expect("a file");
            FrameStream::new(&file)
                .read_to_end(&mut streamed)
                .expect("read");
            let (first, rest) = all.split_at(front.content() as usize);
            let at = front.members["first"].offset as usize;
            assert_eq!(&first[at..at + 7], b"content");
            assert!(rest == pages && streamed == all, "{behind}");
        }
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let large = noise(ROOM as usize);
        let front = Front::make(1, 0, |packer| packer.bytes("large", &large));
        assert!(front.expect("no error").is_none());
    }
}
