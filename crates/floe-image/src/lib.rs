//! CRIU's image formats: messages, framing, catalogue, manifest.
//!
//! Nothing here touches a running kernel object: input is bytes and directories, output is the same.
#![forbid(unsafe_code)]

pub mod catalogue;
pub mod dir;
pub mod error;
pub mod explore;
pub mod frames;
pub mod framing;
pub mod json;
pub mod manifest;
pub mod messages;
pub mod pages;
mod pieces;
pub mod schema;
mod store;
pub mod upgrade;
pub mod wire;
pub mod writer;

pub use catalogue::{ImageKind, is_image_name};
pub use dir::ImageDir;
pub use error::ImageError;
pub use pages::{PagesReader, PassingPages};
pub use pieces::{PIECE_BYTES, PieceHashes};
pub use schema::ImageMessage;
pub use store::ImageStore;
pub use writer::{ImageWriter, Sync, WriteError};
