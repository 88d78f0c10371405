#![forbid(unsafe_code)]
//! CRIU's protocol: one protobuf message a packet, `criu_req` in and `criu_resp` out.
//!
//! A [`Channel`] carries messages, [`options`] makes settings of a request, [`directories`] opens what a
//! request names by descriptors of its caller, [`Notifier`] asks the caller back at each stage, a
//! [`Session`] answers one connection and [`service`] accepts many. What is asked for is done by an
//! [`Engine`], which the program that serves supplies: this crate only knows how to talk.

mod channel;
mod directories;
mod engine;
mod notify;
mod options;
mod server;
pub mod service;
mod session;

pub use channel::{Channel, ChannelError, decode};
pub use engine::{Engine, Refusal};
pub use notify::Notifier;
pub use options::{OptionError, Started, apply};
pub use session::{End, Served, Session};
