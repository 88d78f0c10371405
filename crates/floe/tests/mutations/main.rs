//! Whole, well-formed checkpoints whose fields lie: restored in earnest, in a sandbox.
//!
//! `floe.json` is left out, as whoever changes an image can change its checksum too. A restore may refuse
//! or succeed; it must not panic, hang, leave a task or a name behind, or touch what lies outside of the
//! tree's root. Needs root and util-linux; says `skipped` without.

mod mutate;
mod sandbox;
mod tree;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, ensure};
use mutate::{Mutant, Random};
use sandbox::{Sandbox, Verdict};
use testkit::skips;
use tree::{Tree, Where};

/// How many mutants of each program are restored; `FLOE_MUTANTS` makes it another number.
const ROUNDS: usize = 12;

/// Programs of the host, and those in a mount namespace with a root of their own.
const PROGRAMS: &[(&str, Where)] = &[
    ("files-deleted", Where::Host),
    ("unix-listen", Where::Host),
    ("threads", Where::Host),
    ("memory-shared", Where::Host),
    ("files-linked", Where::Container),
    ("pipes", Where::Container),
];

fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The programs that `FLOE_MUTATE=NAME[@host|@container],...` names, or the usual ones.
fn chosen() -> Vec<(String, Where)> {
    let Ok(names) = std::env::var("FLOE_MUTATE") else {
        let usual = PROGRAMS.iter();
        return usual
            .map(|(name, place)| (name.to_string(), *place))
            .collect();
    };
    let parse = |word: &str| match word.split_once('@') {
        Some((name, "container")) => (name.to_owned(), Where::Container),
        Some((name, _)) => (name.to_owned(), Where::Host),
        None => (word.to_owned(), Where::Host),
    };
    names.split(',').map(parse).collect()
}

#[test]
fn no_field_of_an_image_breaks_a_restore_or_leads_out_of_the_root() {
    skips::as_root(
        "no_field_of_an_image_breaks_a_restore_or_leads_out_of_the_root",
        || {
            let mut failures = Vec::new();
            for (name, place) in chosen() {
                failures.extend(try_program(&name, place).with_context(|| name.clone())?);
            }
            ensure!(
                failures.is_empty(),
                "{} mutants did harm:\n{}",
                failures.len(),
                failures.join("\n")
            );
            Ok(())
        },
    );
}

/// Restores mutants of one program; what was wrong with each that did harm.
fn try_program(name: &str, place: Where) -> anyhow::Result<Vec<String>> {
    let tree = Tree::dumped(name, place)?;
    let images = mutate::load(&tree.images())?;
    std::fs::remove_file(tree.images().join("floe.json"))?;
    let sandbox = Sandbox::new(&tree)?;
    let whole = sandbox.restore()?;
    ensure!(whole.restored(), "the whole checkpoint: {}", whole.text);
    ensure!(whole.faults(&tree).is_empty(), "{:?}", whole.faults(&tree));
    let mut random = Random::new(number("FLOE_MUTANT_SEED", 1), name);
    let mut failures = Vec::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for round in 0..number("FLOE_MUTANTS", ROUNDS as u64) {
        let mutant = mutate::mutant(&images, &mut random)?;
        let verdict = try_mutant(&tree, &mutant, &sandbox)?;
        let outcome = if verdict.restored() {
            "restored"
        } else {
            "refused"
        };
        *counts.entry(outcome).or_default() += 1;
        let faults = verdict.faults(&tree);
        if number("FLOE_MUTANT_SHOW", 0) > 0 {
            println!(
                "{name} {round} {}: {outcome}: {}",
                mutant.what,
                verdict.text.trim()
            );
        }
        if !faults.is_empty() {
            let text = verdict.text.trim();
            failures.push(format!(
                "{name} {round}: {}: {}\n{text}\n",
                mutant.what,
                faults.join("; ")
            ));
        }
    }
    println!("{name} {place:?}: {counts:?}");
    Ok(failures)
}

fn try_mutant(tree: &Tree, mutant: &Mutant, sandbox: &Sandbox) -> anyhow::Result<Verdict> {
    let put = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).context("writing an image");
    for (name, change) in &mutant.files {
        put(&tree.images().join(name), &change.mutated)?;
    }
    let verdict = sandbox.restore();
    for (name, change) in &mutant.files {
        put(&tree.images().join(name), &change.whole)?;
    }
    verdict
}
