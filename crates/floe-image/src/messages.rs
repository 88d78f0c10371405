//! Every message and enum of CRIU's images and RPC, generated from `schema/` by `build.rs`.
#![allow(clippy::doc_markdown)]

include!(concat!(env!("OUT_DIR"), "/messages.rs"));
