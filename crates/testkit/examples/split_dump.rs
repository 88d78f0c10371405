//! Makes a chain of a full dump: `split_dump FULL ROOT COUNT` writes `ROOT/0`, `ROOT/1`, ...

use std::path::PathBuf;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let mut next = || args.next().context("FULL ROOT COUNT are needed");
    let (full, root, count) = (PathBuf::from(next()?), PathBuf::from(next()?), next()?);
    let count = count.to_str().and_then(|count| count.parse().ok());
    testkit::chain::split_dump(&full, &root, count.context("COUNT is a number")?)?;
    Ok(())
}
