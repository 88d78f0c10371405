#![forbid(unsafe_code)]
//! Tasks of the repository: `cargo xtask COMMAND`.

mod bench;
mod boot;
mod cross;
mod engines;
mod install;
mod tidy;
mod zdtm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of the repository")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the rules that the compiler does not: directions of dependencies, sizes, unsafe, printing.
    Tidy,
    /// Measure freeze, dump and restore, beside a peer.
    Bench(bench::Arguments),
    /// Dump by Floe and by a peer, restore by each, over the programs of testkit.
    Cross(cross::Arguments),
    /// Run CRIU's test-suite, of a checkout that exists, with our binary.
    Zdtm(zdtm::Arguments),
    /// Run tests under other kernels, emulated.
    Boot(boot::Arguments),
    /// Run container engines with our binary as their `criu`.
    Engines(engines::Arguments),
    /// Receive a terminal from an engine; for `engines`.
    #[command(hide = true)]
    Console(engines::console::Arguments),
    /// Send datagrams to a socket; for `engines`.
    #[command(hide = true)]
    Tick(engines::tick::Arguments),
    /// Ask a redis again and again; for `bench`.
    #[command(hide = true)]
    Poll(bench::poll::Arguments),
    /// Build the binary for release and install it as `floe` and `criu`.
    Install(install::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Tidy => tidy::run(),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Cross(arguments) => cross::run(&arguments),
        Task::Zdtm(arguments) => zdtm::run(&arguments),
        Task::Boot(arguments) => boot::run(&arguments),
        Task::Engines(arguments) => engines::run(&arguments),
        Task::Console(arguments) => engines::console::run(&arguments),
        Task::Tick(arguments) => engines::tick::run(&arguments),
        Task::Poll(arguments) => bench::poll::run(&arguments),
        Task::Install(arguments) => install::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent()
        .expect("xtask lies in the workspace")
        .to_path_buf()
}

/// The cargo that runs us.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Builds a binary of the workspace for release, and testkit's programs beside it.
pub fn build_release(package: &str, binary: &str) -> anyhow::Result<PathBuf> {
    let mut build = std::process::Command::new(cargo());
    build
        .current_dir(root())
        .args(["build", "--release", "--quiet"]);
    build.args(["--package", package, "--bin", binary]);
    if !build.status().context("starting cargo")?.success() {
        bail!("building {binary} failed");
    }
    let metadata = tidy::dependencies::metadata(&root())?;
    let target = metadata["target_directory"].as_str();
    let target = PathBuf::from(target.context("cargo metadata names no target directory")?);
    Ok(target.join("release").join(binary))
}
