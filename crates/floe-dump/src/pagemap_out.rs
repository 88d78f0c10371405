//! Where the pages of one task or segment go: to files here, or to a page server.

use std::sync::Arc;

use floe_image::ImageWriter;
use floe_memory::{PagePump, PageRun, PageSource, PagemapBuilder, PagemapStats};
use floe_options::PageServer;
use floe_transfer::frame::Target;
use floe_transfer::{Connection, PageSender, PagemapJob};

use crate::error::DumpError;

/// One pagemap that is being collected.
#[derive(Debug)]
pub enum PagemapOut {
    /// To files.
    Files(PagemapBuilder),
    /// To a page server, once it is whole: an index must be sent in the order of addresses.
    Server(PagemapJob),
}

impl PagemapOut {
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
            PagemapOut::Server(job) => job.in_parent.extend_from_slice(runs),
        }
    }

    /// Ends the pagemap; its pages may still be on their way.
    pub fn finish(
        self,
        writer: &ImageWriter,
        server: Option<&mut PageSender>,
    ) -> Result<PagemapStats, DumpError> {
        match (self, server) {
            (PagemapOut::Files(builder), _) => Ok(builder.finish(writer)?),
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
