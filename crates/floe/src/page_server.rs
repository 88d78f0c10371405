//! `floe page-server`: receives the pages of one dump into a directory.

use floe_image::{ImageDir, ImageWriter, Sync};
use floe_kernel::child::Fork;
use floe_memory::punch_replaced;
use floe_options::Settings;
use floe_transfer::{Connection, Listener};

use crate::background;
use crate::exit::{Exit, Failure};

/// Where pages come from.
pub enum Source {
    /// Whoever connects.
    Listener(Listener),
    /// The socket of `--ps-socket`, which may stay open elsewhere.
    Lent(Connection),
}

/// A page server that nobody talks to yet.
pub struct PageServer {
    source: Source,
    writer: ImageWriter,
    auto_dedup: bool,
}

impl PageServer {
    /// Opens the directory and the socket; also gives the port, 0 for a socket of the caller's.
    pub fn open(settings: &Settings) -> Result<(Self, u16), Failure> {
        let place = settings.place();
        floe_dump::refuse_own_parent(&place).map_err(|error| Failure::new(Exit::Usage, error))?;
        let writer = ImageWriter::create(&place.images_dir, Sync::None)
            .map_err(|error| Failure::new(Exit::Failed, error))?;
        if let Some(parent) = &place.prev_images_dir {
            writer
                .link_parent(parent)
                .map_err(|error| Failure::new(Exit::Failed, error))?;
        }
        let server = &settings.server;
        let (source, port) = match server.socket {
            Some(fd) => {
                let socket = floe_kernel::inherited::take(fd).and_then(Connection::new);
                let socket =
                    socket.map_err(|error| anyhow::anyhow!("--ps-socket {fd}: {error}"))?;
                (Source::Lent(socket), 0)
            }
            None => {
                let port = server.port.unwrap_or(0);
                let listener =
                    Listener::bind(server.address.as_deref(), port).map_err(anyhow::Error::from)?;
                let port = listener.port().map_err(anyhow::Error::from)?;
                tracing::info!("listening at port {port}");
                (Source::Listener(listener), port)
            }
        };
        let server = PageServer {
            source,
            writer,
            auto_dedup: settings.auto_dedup,
        };
        Ok((server, port))
    }

    /// Receives the pages of one dump; what came of one that failed is removed again.
    pub fn serve(self) -> Result<(), Failure> {
        let writer = self.writer.clone();
        let served = self.receive();
        if served.is_err()
            && let Err(error) = writer.remove_made()
        {
            tracing::warn!(%error, "pages of a dump that failed stay");
        }
        served
    }

    fn receive(self) -> Result<(), Failure> {
        let (mut connection, lent) = match self.source {
            Source::Lent(connection) => (connection, true),
            Source::Listener(listener) => (listener.accept().map_err(anyhow::Error::from)?, false),
        };
        let received = floe_transfer::receive(&mut connection, &self.writer);
        let received = received.map_err(|error| Failure::new(Exit::Failed, error))?;
        if !lent {
            connection.wait_for_end().map_err(anyhow::Error::from)?;
        }
        tracing::info!(
            "received {} pages of {} tasks and segments, {} are in the parent",
            received.pages,
            received.objects,
            received.in_parent
        );
        if self.auto_dedup {
            let images = ImageDir::open(self.writer.path());
            let images = images.map_err(|error| Failure::new(Exit::BadImage, error))?;
            punch_replaced(&images).map_err(|error| Failure::new(Exit::Failed, error))?;
        }
        Ok(())
    }
}

/// Runs the command.
pub fn run(settings: &Settings) -> Result<Exit, Failure> {
    let (server, port) = PageServer::open(settings)?;
    if settings.server.port.is_none() && settings.server.socket.is_none() {
        // Nobody could know it otherwise.
        crate::own::print(&format!("port {port}\n"))?;
    }
    if settings.detached {
        if let Fork::Parent(pid) = background::enter()? {
            background::write_pidfile(settings, pid)?;
            return Ok(Exit::Done);
        }
    } else {
        background::write_pidfile(settings, rustix::process::getpid())?;
    }
    background::tell_ready(settings)?;
    server.serve()?;
    Ok(Exit::Done)
}
