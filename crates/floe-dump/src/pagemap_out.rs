//! Where the pages of one task or segment go: to files here, to a store, or to a page server.

use std::sync::Arc;

use floe_image::ImageWriter;
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{
    PagePump, PageRun, PageSource, PageStore, PagemapBuilder, PagemapStats, page_count,
};
use floe_options::PageServer;
use floe_transfer::frame::Target;
use floe_transfer::{Connection, PageSender, PagemapJob};

use crate::error::DumpError;

/// One pagemap that is being collected.
#[derive(Debug)]
pub enum PagemapOut {
    /// To files.
    Files(PagemapBuilder),
    /// To a store, once it is whole: how much will come must be known when it begins.
    Store(StoredPagemap),
    /// To a page server, once it is whole: an index must be sent in the order of addresses.
    Server(PagemapJob),
}

/// A pagemap whose pages go to a store.
#[derive(Debug)]
pub struct StoredPagemap {
    target: Target,
    pages_id: u32,
    store: Arc<dyn PageStore>,
    runs: Vec<(Arc<dyn PageSource>, Vec<PageRun>)>,
    in_parent: Vec<PageRun>,
}

impl StoredPagemap {
    fn finish(self, pump: &mut PagePump, writer: &ImageWriter) -> Result<PagemapStats, DumpError> {
        let pages: u64 = self.runs.iter().map(|(_, runs)| page_count(runs)).sum();
        let sink = self.store.begin(self.pages_id, pages * PAGE_SIZE);
        let (kind, id) = self.target.image();
        let mut builder = PagemapBuilder::with_sink(kind, id, (self.pages_id, sink));
        for (source, runs) in &self.runs {
            builder.send(pump, source, runs)?;
        }
        builder.leave_in_parent(&self.in_parent);
        Ok(builder.finish(writer)?)
    }
}

impl PagemapOut {
    /// A pagemap for a store.
    pub fn to_store(target: Target, pages_id: u32, store: Arc<dyn PageStore>) -> Self {
        PagemapOut::Store(StoredPagemap {
            target,
            pages_id,
            store,
            runs: Vec::new(),
            in_parent: Vec::new(),
        })
    }

    /// A pagemap for a page server.
    pub fn to_server(target: Target) -> Self {
        PagemapOut::Server(PagemapJob {
            target,
            runs: Vec::new(),
            in_parent: Vec::new(),
        })
    }

    /// Takes pages, which must come in the order of their addresses.
    pub fn send(
        &mut self,
        pump: &mut PagePump,
        source: &Arc<dyn PageSource>,
        runs: &[PageRun],
    ) -> Result<(), DumpError> {
        match self {
            PagemapOut::Files(builder) => Ok(builder.send(pump, source, runs)?),
            PagemapOut::Store(stored) => {
                stored.runs.push((source.clone(), runs.to_vec()));
                Ok(())
            }
            PagemapOut::Server(job) => {
                job.runs.push((source.clone(), runs.to_vec()));
                Ok(())
            }
        }
    }

    /// Notes pages whose content the parent has.
    pub fn leave_in_parent(&mut self, runs: &[PageRun]) {
        match self {
            PagemapOut::Files(builder) => builder.leave_in_parent(runs),
            PagemapOut::Store(stored) => stored.in_parent.extend_from_slice(runs),
            PagemapOut::Server(job) => job.in_parent.extend_from_slice(runs),
        }
    }

    /// Ends the pagemap; its pages may still be on their way.
    pub fn finish(
        self,
        writer: &ImageWriter,
        pump: &mut PagePump,
        server: Option<&mut PageSender>,
    ) -> Result<PagemapStats, DumpError> {
        match (self, server) {
            (PagemapOut::Files(builder), _) => Ok(builder.finish(writer)?),
            (PagemapOut::Store(stored), _) => stored.finish(pump, writer),
            (PagemapOut::Server(job), Some(server)) => {
                let count = |runs: &[PageRun]| runs.iter().map(|run| run.pages).sum::<u64>();
                let stats = PagemapStats {
                    pages: job.runs.iter().map(|(_, runs)| count(runs)).sum(),
                    in_parent: count(&job.in_parent),
                };
                server.send(job);
                Ok(stats)
            }
            (PagemapOut::Server(_), None) => unreachable!("made for a server that is there"),
        }
    }
}

/// Connects to the page server of the options, before anything is stopped.
pub fn connect(server: &PageServer) -> Result<PageSender, DumpError> {
    match server {
        PageServer::At { address, port } => {
            let connection = Connection::open(address, *port)?;
            Ok(PageSender::connected(connection)?)
        }
        PageServer::Socket(fd) => {
            // Our caller may keep its own copy, and the next command of this process may use it again.
            let connection = floe_kernel::inherited::duplicate(*fd)
                .and_then(Connection::new)
                .map_err(|source| DumpError::PageSocket { fd: *fd, source })?;
            Ok(PageSender::lent(connection)?)
        }
    }
}
