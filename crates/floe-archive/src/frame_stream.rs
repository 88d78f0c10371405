//! Decoding frames that come through a pipe, by all processors.
//!
//! An archive's frames are small and independent, so some are gathered and decoded at once. The threads end
//! with each gathering: a restore changes namespaces between reads, which a process with threads cannot.
//! Anything else that zstd can read (one frame by another program) is decoded as one stream.

use std::io::{self, BufReader, Cursor, Read};

use zstd::stream::read::Decoder;
use zstd::zstd_safe::{find_frame_compressed_size, get_frame_content_size};

/// Compressed bytes that are read at once.
const READ: usize = 256 << 10;
/// Longest frame that is decoded in one piece, stored and as content, in bytes. Ours have 256 KiB.
const LONGEST: usize = 1 << 20;
/// Content that is decoded at once, in bytes.
const GATHERED: usize = 4 << 20;

/// What the frames of `source` hold.
pub struct FrameStream<R: Read> {
    /// None when the rest is decoded as one stream.
    source: Option<R>,
    stored: Vec<u8>,
    ended: bool,
    ready: Vec<Vec<u8>>,
    /// Which of those that are ready is read, and how much of it is done.
    at: (usize, usize),
    rest: Option<Decoder<'static, BufReader<Rest<R>>>>,
    threads: usize,
}

/// What was read already, and what comes.
type Rest<R> = io::Chain<Cursor<Vec<u8>>, R>;

/// A frame that is there as a whole.
struct Stored {
    start: usize,
    len: usize,
    content: usize,
}

impl<R: Read> FrameStream<R> {
    /// Decodes with as many threads as there are processors.
    pub fn new(source: R) -> FrameStream<R> {
        FrameStream {
            source: Some(source),
            stored: Vec::new(),
            ended: false,
            ready: Vec::new(),
            at: (0, 0),
            rest: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Reads and decodes the next frames; at the end nothing is ready.
    fn advance(&mut self) -> io::Result<()> {
        self.ready.clear();
        self.at = (0, 0);
        let mut frames: Vec<Stored> = Vec::new();
        let (mut end, mut content) = (0, 0);
        while content < GATHERED {
            match next_frame(&self.stored, end) {
                Next::Frame(frame) => {
                    end = frame.start + frame.len;
                    content += frame.content;
                    frames.push(frame);
                }
                Next::Incomplete if !self.ended => self.read_more()?,
                Next::Incomplete if end == self.stored.len() => break,
                // A cut one is left to the stream's decoder, too: it says what is wrong.
                Next::Incomplete | Next::Other => {
                    if frames.is_empty() {
                        return self.as_one_stream();
                    }
                    break;
                }
            }
        }
        self.ready = decode(&self.stored, &frames, self.threads)?;
        self.stored.drain(..end);
        Ok(())
    }

    fn read_more(&mut self) -> io::Result<()> {
        let Some(source) = &mut self.source else {
            self.ended = true;
            return Ok(());
        };
        let read = source.take(READ as u64).read_to_end(&mut self.stored)?;
        self.ended = read == 0;
        Ok(())
    }

    fn as_one_stream(&mut self) -> io::Result<()> {
        if let Some(source) = self.source.take() {
            let before = Cursor::new(std::mem::take(&mut self.stored));
            let all = BufReader::with_capacity(READ, before.chain(source));
            self.rest = Some(Decoder::with_buffer(all)?);
        }
        Ok(())
    }
}

impl<R: Read> Read for FrameStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(rest) = &mut self.rest {
                return rest.read(buffer);
            }
            let (number, done) = self.at;
            match self.ready.get(number).map(|frame| &frame[done..]) {
                Some([]) => self.at = (number + 1, 0),
                Some(found) => {
                    let read = found.len().min(buffer.len());
                    buffer[..read].copy_from_slice(&found[..read]);
                    self.at.1 += read;
                    return Ok(read);
                }
                None => {
                    self.advance()?;
                    if self.ready.is_empty() && self.rest.is_none() {
                        return Ok(0);
                    }
                }
            }
        }
    }
}

enum Next {
    Frame(Stored),
    /// More must be read to know.
    Incomplete,
    /// Long, without its length, or no frame.
    Other,
}

fn next_frame(stored: &[u8], start: usize) -> Next {
    let found = &stored[start..];
    let Ok(len) = find_frame_compressed_size(found) else {
        return match found.len() < LONGEST {
            true => Next::Incomplete,
            false => Next::Other,
        };
    };
    match get_frame_content_size(found) {
        Ok(Some(content)) if content <= LONGEST as u64 => Next::Frame(Stored {
            start,
            len,
            content: content as usize,
        }),
        _ => Next::Other,
    }
}

/// Decodes frames, each by one of the threads.
fn decode(stored: &[u8], frames: &[Stored], threads: usize) -> io::Result<Vec<Vec<u8>>> {
    let decode = |frames: &[Stored]| -> io::Result<Vec<Vec<u8>>> {
        let mut decoder = zstd::bulk::Decompressor::new()?;
        let frames = frames.iter();
        let one = frames.map(|frame| {
            let bytes = &stored[frame.start..frame.start + frame.len];
            decoder.decompress(bytes, frame.content)
        });
        one.collect()
    };
    let share = frames.len().div_ceil(threads).max(1);
    let mut shares = frames.chunks(share);
    let own = shares.next().unwrap_or_default();
    std::thread::scope(|scope| {
        let others: Vec<_> = shares
            .map(|part| scope.spawn(move || decode(part)))
            .collect();
        let mut decoded = decode(own)?;
        for other in others {
            decoded.extend(other.join().expect("decoding does not panic")?);
        }
        Ok(decoded)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn content(len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| (at / 7 % 251) as u8 ^ (at >> 13) as u8)
            .collect()
    }

    fn frames(content: &[u8], each: usize) -> Vec<u8> {
        let frames = content.chunks(each);
        frames
            .flat_map(|part| zstd::bulk::compress(part, 1).expect("compressed"))
            .collect()
    }

    fn read(stored: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        FrameStream::new(Cursor::new(stored)).read_to_end(&mut all)?;
        Ok(all)
    }

    #[test]
    fn frames_of_every_length_come_in_their_order() {
        let content = content(9_000_000);
        for each in [1000, 256 << 10, 3 << 20] {
            assert!(
                read(frames(&content, each)).expect("whole") == content,
                "{each}"
            );
        }
        let mut one = zstd::stream::Encoder::new(Vec::new(), 1).expect("an encoder");
        one.write_all(&content).expect("memory");
        let mut stored = frames(&content, 256 << 10);
        stored.extend(one.finish().expect("memory"));
        assert!(read(stored).expect("a frame without its length") == [&content[..]; 2].concat());
        assert!(read(Vec::new()).expect("nothing").is_empty());
    }

    #[test]
    fn a_cut_or_changed_stream_is_an_error() {
        let stored = frames(&content(2_000_000), 256 << 10);
        for cut in [1, 3, 10, 4000, stored.len() / 2] {
            assert!(
                read(stored[..stored.len() - cut].to_vec()).is_err(),
                "{cut}"
            );
        }
        let mut changed = stored;
        changed[0] ^= 1;
        assert!(read(changed).is_err());
    }
}
