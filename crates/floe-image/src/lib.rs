//! CRIU's image formats: messages, framing, catalogue, manifest.
//!
//! Nothing here touches a running kernel object: input is bytes and directories, output is the same.
#![forbid(unsafe_code)]

pub mod messages;
