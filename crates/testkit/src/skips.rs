//! Tests that cannot run here say so, and the list of those that may is checked.

use anyhow::bail;

use crate::program::Missing;

/// `NAME: part of the reason` a line; the order is the file's.
const EXPECTED: &str = include_str!("../expected-skips.txt");

/// Turns a lack of this machine into a printed skip; other errors stay errors, and so does a
/// skip that `expected-skips.txt` does not list.
pub fn or_skip(name: &str, result: anyhow::Result<()>) -> anyhow::Result<()> {
    let Err(error) = result else { return Ok(()) };
    let Some(missing) = error.downcast_ref::<Missing>() else {
        return Err(error);
    };
    skip(name, &missing.0)
}

/// Says that `name` is skipped; an error if nobody expects that.
pub fn skip(name: &str, why: &str) -> anyhow::Result<()> {
    if !is_expected(name, why) {
        bail!("{name} is skipped without being in expected-skips.txt: {why}");
    }
    println!("skipped: {name}: {why}");
    Ok(())
}

/// Whether a test that needs root can run; says that `name` is skipped where it cannot.
pub fn is_root(name: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(name, "needs root").expect("the skip is listed");
    }
    root
}

/// Runs a test that needs root, or says that `name` is skipped.
pub fn as_root(name: &str, test: impl FnOnce() -> anyhow::Result<()>) {
    if is_root(name) {
        test().unwrap_or_else(|error| panic!("{error:#}"));
    }
}

fn is_expected(name: &str, why: &str) -> bool {
    EXPECTED
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(": "))
        .any(|(known, reason)| (known == "*" || known == name) && why.contains(reason))
}

/// A lack that skips the tests of `name`, as an error for [`or_skip`].
pub fn missing(why: impl Into<String>) -> anyhow::Error {
    Missing(why.into()).into()
}
