//! Which crate may depend on which: each boundary forbids something.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::Finding;

/// Each crate and the crates of ours that it may use, lowest first. Dump and restore never see
/// each other; formats and plans know no kernel; nobody but the tests uses `testkit`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("floe-image", &[]),
    ("floe-options", &[]),
    ("floe-plan", &[]),
    ("floe-explain", &[]),
    ("floe-kernel", &[]),
    ("floe-inject", &["floe-kernel"]),
    (
        "floe-memory",
        &["floe-image", "floe-kernel", "floe-inject", "floe-options"],
    ),
    (
        "floe-archive",
        &["floe-image", "floe-kernel", "floe-memory"],
    ),
    (
        "floe-transfer",
        &["floe-image", "floe-kernel", "floe-memory"],
    ),
    (
        "floe-resources",
        &[
            "floe-image",
            "floe-options",
            "floe-plan",
            "floe-kernel",
            "floe-inject",
            "floe-memory",
        ],
    ),
    (
        "floe-dump",
        &[
            "floe-image",
            "floe-options",
            "floe-plan",
            "floe-kernel",
            "floe-inject",
            "floe-memory",
            "floe-resources",
            "floe-transfer",
        ],
    ),
    (
        "floe-restore",
        &[
            "floe-archive",
            "floe-image",
            "floe-options",
            "floe-plan",
            "floe-kernel",
            "floe-inject",
            "floe-memory",
            "floe-resources",
        ],
    ),
    (
        "floe-rpc",
        &["floe-image", "floe-options", "floe-kernel", "floe-inject"],
    ),
    (
        "floe",
        &[
            "floe-archive",
            "floe-rpc",
            "floe-transfer",
            "floe-explain",
            "floe-image",
            "floe-options",
            "floe-kernel",
            "floe-inject",
            "floe-memory",
            "floe-resources",
            "floe-dump",
            "floe-restore",
        ],
    ),
    ("testkit", &["floe-image", "floe-kernel"]),
    ("xtask", &["floe-image", "testkit"]),
];

/// What `cargo metadata` says about the workspace.
pub fn metadata(root: &Path) -> anyhow::Result<Value> {
    let mut command = Command::new(crate::cargo());
    command.current_dir(root).args([
        "metadata",
        "--no-deps",
        "--offline",
        "--format-version",
        "1",
    ]);
    let output = command.output().context("starting cargo")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    serde_json::from_slice(&output.stdout).context("reading cargo metadata")
}

/// Compares every dependency between our crates with the table.
pub(super) fn check(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let metadata = metadata(root)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    let names: Vec<&str> = packages
        .iter()
        .filter_map(|package| package["name"].as_str())
        .collect();
    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let place = format!("crate {name}");
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            let rule = "is not in the table of xtask/src/tidy/dependencies.rs".to_owned();
            findings.push(Finding { place, rule });
            continue;
        };
        let dependencies = package["dependencies"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        for dependency in dependencies
            .iter()
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
        {
            let other = dependency["name"].as_str().unwrap_or_default();
            if names.contains(&other) && !allowed.contains(&other) {
                findings.push(Finding {
                    place: place.clone(),
                    rule: format!("must not depend on {other}"),
                });
            }
        }
    }
    Ok(findings)
}
