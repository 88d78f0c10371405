//! The images of a dump that fails are removed again.

use floe_image::ImageWriter;

/// The images of a writer, removed when this is dropped. Only then may nobody write any more.
#[must_use = "the images are removed when this is dropped"]
pub struct Unfinished<'a>(Option<&'a ImageWriter>);

impl<'a> Unfinished<'a> {
    /// All that `writer` makes, from now on and before.
    pub fn of(writer: &'a ImageWriter) -> Self {
        Unfinished(Some(writer))
    }

    /// The images are whole, or soon the only ones: they stay whatever comes.
    pub fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.map(ImageWriter::remove_made) {
            tracing::warn!(%error, "images of a dump that failed stay");
        }
    }
}
