//! Pages over a connection: CRIU's page server, both sides of it.
//!
//! A dump is a [`PageSender`], the page server is [`receive()`]. The order of a conversation is in [`frame`].
#![forbid(unsafe_code)]

mod connection;
pub mod frame;
mod receive;
mod send;

pub use connection::{ConnectError, Connection, Listener};
pub use receive::{ReceiveError, Received, receive};
pub use send::{PageSender, PagemapJob, SendError};
