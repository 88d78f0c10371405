//! The receiving side: what a dump sends becomes pagemap and pages images.

use std::fs::File;
use std::io::{self, Write};

use floe_image::dir::{PE_LAZY, PE_PARENT, PE_PRESENT};
use floe_image::messages::{PagemapEntry, PagemapHead};
use floe_image::writer::EntryStream;
use floe_image::{ImageDir, ImageError, ImageKind, ImageWriter, WriteError};
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{IndexError, PageIndex, PageRun};

use crate::Connection;
use crate::frame::{BadFrame, Command, Frame, Target};

/// Numbers of our pages files begin above those that the dump itself may write to the same directory.
const FIRST_PAGES_ID: u32 = 0x10000;
/// Bytes that are received before they are written.
const CHUNK: u64 = 256 * 1024;

/// Why pages could not be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("Receiving pages")]
    Connection(#[source] io::Error),
    #[error("What was received is not the protocol of CRIU 4")]
    Frame(#[from] BadFrame),
    #[error("Pages of an object came out of order, at {start:#x}")]
    Order { start: u64 },
    #[error("Pages were asked for, but this server receives them")]
    Asked,
    #[error("The sender ended before it said that all was sent: the images are not whole")]
    NotClosed,
    #[error(
        "The sender says that {pages} pages at {start:#x} are in the parent generation, which has not got them"
    )]
    NotInParent { start: u64, pages: u64 },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("Writing pages")]
    Pages(#[source] io::Error),
}

/// What came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Tasks and segments.
    pub objects: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages left to the parent.
    pub in_parent: u64,
}

/// Writes what a dump sends, until it says that all was sent.
pub fn receive(
    connection: &mut Connection,
    writer: &ImageWriter,
) -> Result<Received, ReceiveError> {
    let mut receiver = Receiver {
        connection,
        writer,
        open: None,
        pages_id: FIRST_PAGES_ID,
        received: Received::default(),
        buffer: Vec::new(),
    };
    loop {
        let bytes = receiver.connection.read_frame();
        let Some(bytes) = bytes.map_err(ReceiveError::Connection)? else {
            return Err(ReceiveError::NotClosed);
        };
        if receiver.take(&Frame::decode(&bytes)?)? == Next::End {
            return Ok(receiver.received);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Next {
    Frame,
    End,
}

struct Receiver<'a> {
    connection: &'a mut Connection,
    writer: &'a ImageWriter,
    open: Option<OpenObject>,
    pages_id: u32,
    received: Received,
    buffer: Vec<u8>,
}

struct OpenObject {
    object: u64,
    index: EntryStream,
    pages: File,
    parent: Option<PageIndex>,
    reached: u64,
}

impl Receiver<'_> {
    fn take(&mut self, frame: &Frame) -> Result<Next, ReceiveError> {
        match frame.command {
            Command::Open => self.open(frame.object)?,
            Command::OpenAnswered => {
                self.open(frame.object)?;
                let has_parent = self.open.as_ref().is_some_and(|open| open.parent.is_some());
                self.answer(&[u8::from(has_parent)])?;
            }
            Command::HasParent => {
                let (kind, id) = Target::decode(frame.object)?.image();
                let has = self.parent()?.is_some_and(|parent| parent.has(kind, id));
                self.answer(&i32::from(has).to_le_bytes())?;
            }
            Command::Add { flags } => self.add(frame, flags)?,
            Command::Hole => self.add(frame, PE_PARENT)?,
            Command::Get => return Err(ReceiveError::Asked),
            Command::Close | Command::ForceClose => {
                self.finish_object()?;
                rustix::fs::syncfs(self.writer.as_fd())
                    .map_err(|errno| ReceiveError::Pages(errno.into()))?;
                self.answer(&0i32.to_le_bytes())?;
                return Ok(Next::End);
            }
        }
        Ok(Next::Frame)
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        self.connection
            .write(bytes)
            .and_then(|()| self.connection.flush())
            .map_err(ReceiveError::Connection)
    }

    /// The generation before, as the directory's link says now: the dump may make it after we began.
    fn parent(&self) -> Result<Option<ImageDir>, ReceiveError> {
        let fd = self.writer.as_fd().try_clone_to_owned();
        let fd = fd.map_err(ReceiveError::Pages)?;
        Ok(ImageDir::from_fd(fd, self.writer.path().to_path_buf())?.parent()?)
    }

    fn open(&mut self, object: u64) -> Result<(), ReceiveError> {
        self.finish_object()?;
        let (kind, id) = Target::decode(object)?.image();
        tracing::info!("receiving {}", kind.file_name(id));
        let parent = match self.parent()?.filter(|parent| parent.has(kind, id)) {
            Some(parent) => Some(PageIndex::read(&parent, kind, id)?),
            None => None,
        };
        let pages_id = self.pages_id;
        self.pages_id += 1;
        let pages = self
            .writer
            .create_raw(ImageKind::Pages, u64::from(pages_id))?;
        let mut index = self.writer.stream(kind, id)?;
        index.append(&PagemapHead { pages_id })?;
        self.received.objects += 1;
        self.open = Some(OpenObject {
            object,
            index,
            pages,
            parent,
            reached: 0,
        });
        Ok(())
    }

    fn finish_object(&mut self) -> Result<(), ReceiveError> {
        match self.open.take() {
            Some(open) => Ok(open.index.finish()?),
            None => Ok(()),
        }
    }

    fn add(&mut self, frame: &Frame, flags: u32) -> Result<(), ReceiveError> {
        if self
            .open
            .as_ref()
            .is_none_or(|open| open.object != frame.object)
        {
            // Senders of old versions open nothing.
            self.open(frame.object)?;
        }
        let open = self.open.as_mut().expect("opened above");
        let run = frame.run;
        if run.start < open.reached {
            return Err(ReceiveError::Order { start: run.start });
        }
        open.reached = run.end();
        let flags = flags & (PE_PARENT | PE_LAZY | PE_PRESENT);
        if flags & (PE_PARENT | PE_PRESENT) == PE_PARENT {
            check_parent(open.parent.as_ref(), run)?;
            self.received.in_parent += run.pages;
        }
        open.index.append(&PagemapEntry {
            vaddr: run.start,
            // Only read when `nr_pages` is absent.
            compat_nr_pages: 0,
            in_parent: None,
            flags: Some(flags),
            nr_pages: Some(run.pages),
        })?;
        if flags & PE_PRESENT != 0 {
            self.received.pages += run.pages;
            self.copy(run.pages)?;
        }
        Ok(())
    }

    /// Moves the content that follows into the pages file.
    fn copy(&mut self, pages: u64) -> Result<(), ReceiveError> {
        let open = self.open.as_mut().expect("an entry was added to it");
        let mut left = pages;
        while left > 0 {
            let part = left.min(CHUNK / PAGE_SIZE);
            self.buffer.resize((part * PAGE_SIZE) as usize, 0);
            let read = self.connection.read(&mut self.buffer);
            read.map_err(ReceiveError::Connection)?;
            let written = open.pages.write_all(&self.buffer);
            written.map_err(ReceiveError::Pages)?;
            left -= part;
        }
        Ok(())
    }
}

/// Whether the chain has all pages of a hole.
fn check_parent(parent: Option<&PageIndex>, run: PageRun) -> Result<(), ReceiveError> {
    let stored: u64 = parent.map_or(0, |index| {
        index
            .runs_in(run.start..run.end())
            .map(|stored| stored.len)
            .sum()
    });
    if stored == run.pages * PAGE_SIZE {
        return Ok(());
    }
    Err(ReceiveError::NotInParent {
        start: run.start,
        pages: run.pages,
    })
}
