#![forbid(unsafe_code)]
//! The `floe` binary: reads the command line and the environment, calls the engine, prints.
//!
//! The only crate that prints or reads the environment. Called as `criu` it is the same program
//! with CRIU's version line.

mod background;
mod check;
mod command;
mod cpuinfo;
mod demo;
mod engine;
mod exit;
mod explain;
mod help;
mod image;
mod inspect;
mod logging;
mod new_pids;
mod own;
mod pack;
mod page_server;
mod report;
mod rpc;
mod scripts;
mod squash;
mod statistics;
mod track;
mod unpack;
mod verify;

use std::process::ExitCode;

fn main() -> ExitCode {
    command::run(std::env::args_os().collect()).into()
}
