//! The log: lines as CRIU writes them, `(00.001234) Error (module): message`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    File,
    StandardError,
}

/// The program's log. It begins without a place to write to: a request may name one late, or another one.
#[derive(Clone)]
pub struct Log(Arc<Shared>);

struct Shared {
    started: Instant,
    /// As [`filter`] takes it.
    level: AtomicU32,
    sink: Mutex<Box<dyn Write + Send>>,
}

impl Log {
    /// Makes the log that all events of this process go to.
    pub fn install() -> Self {
        let shared = Arc::new(Shared {
            started: Instant::now(),
            level: AtomicU32::new(0),
            sink: Mutex::new(Box::new(io::sink())),
        });
        let layer = LogLayer(shared.clone());
        // A second one in one process can only come from a test; the first log stays.
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer));
        Self(shared)
    }

    /// From now on events go to `path` (made anew, readable by the owner only) or to standard error.
    pub fn open(&self, path: Option<&Path>, level: u32) -> io::Result<Target> {
        let (sink, target): (Box<dyn Write + Send>, _) = match path {
            Some(path) => {
                let mut options = File::options();
                options.create(true).write(true).truncate(true).mode(0o600);
                (Box::new(options.open(path)?), Target::File)
            }
            None => (Box::new(io::stderr()), Target::StandardError),
        };
        *self.0.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink;
        self.0.level.store(level, Ordering::Relaxed);
        // What an event's place was found to be before does not hold any more.
        tracing::callsite::rebuild_interest_cache();
        Ok(target)
    }
}

/// CRIU's 0 to 4; 5 and more add what Floe calls trace.
fn filter(level: u32) -> Option<Level> {
    match level {
        0 => None,
        1 => Some(Level::ERROR),
        2 => Some(Level::WARN),
        3 => Some(Level::INFO),
        4 => Some(Level::DEBUG),
        _ => Some(Level::TRACE),
    }
}

struct LogLayer(Arc<Shared>);

/// The fields of a span, written once when it is made.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        let level = filter(self.0.level.load(Ordering::Relaxed));
        level.is_some_and(|level| *metadata.level() <= level)
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut line = Line::default();
        attributes.record(&mut line);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(line.fields));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        if let Some(scope) = context.event_scope(event) {
            for span in scope.from_root() {
                if let Some(SpanFields(fields)) = span.extensions().get() {
                    line.fields.push_str(fields);
                }
            }
        }
        let module = module(event.metadata().target());
        let kind = match *event.metadata().level() {
            Level::ERROR => format!("Error ({module}): "),
            Level::WARN => format!("Warn  ({module}): "),
            _ => format!("{module}: "),
        };
        let elapsed = self.0.started.elapsed();
        let stamp = format!("({:02}.{:06}) ", elapsed.as_secs(), elapsed.subsec_micros());
        let Ok(mut sink) = self.0.sink.lock() else {
            return;
        };
        for part in line.message.lines() {
            // A full disk must not end a dump that could be finished or undone.
            let _ = sink.write_all(format!("{stamp}{kind}{part}{}\n", line.fields).as_bytes());
        }
    }
}

/// `floe_dump::freeze` is `dump/freeze`.
fn module(target: &str) -> String {
    target
        .strip_prefix("floe_")
        .unwrap_or(target)
        .replace("::", "/")
}

/// The message and, behind it, the fields as ` name=value`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = if field.name() == "message" {
            write!(self.message, "{value}")
        } else {
            write!(self.fields, " {}={value}", field.name())
        };
    }
}
