//! Checkpoints whose tasks have security labels that this machine cannot give.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;
use testkit::{Engine, Fixture, process, skips};

/// A profile that is loaded nowhere.
const PROFILE: &str = "floe-nowhere";

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Changes an image in its JSON form.
fn edit(image: &Path, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
    let floe = |words: [&str; 2], file: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
        command.args(words).arg("-i").arg(file);
        command
    };
    let printed = floe(["image", "decode"], image).output()?.stdout;
    let mut value: Value = serde_json::from_slice(&printed)?;
    change(&mut value["entries"][0]);
    let text = image.with_extension("json");
    fs::write(&text, value.to_string())?;
    let status = floe(["image", "encode"], &text)
        .arg("-o")
        .arg(image)
        .status()?;
    ensure!(status.success(), "{} cannot be encoded", image.display());
    Ok(fs::remove_file(text)?)
}

/// A program that ended in a checkpoint which says that it ran under a profile.
fn confined() -> anyhow::Result<Fixture> {
    let mut fixture = Fixture::start("plain")?;
    fixture.dump(&floe(), &[])?;
    let images = fixture.images();
    edit(&images.join("inventory.img"), |inventory| {
        inventory["lsmtype"] = "APPARMOR".into();
    })?;
    edit(&images.join(format!("core-{}.img", fixture.pid)), |core| {
        core["thread_core"]["creds"]["lsm_profile"] = PROFILE.into();
    })?;
    // It has the sums of what was there before.
    fs::remove_file(images.join("floe.json"))?;
    Ok(fixture)
}

#[test]
fn a_label_that_cannot_be_had_is_refused_by_name_before_anything_is_made() {
    skips::as_root("labels-refused", || {
        let mut fixture = confined()?;
        for options in [&[][..], &["--lsm-profile", "apparmor:floe-nowhere-else"]] {
            let outcome = fixture.try_restore(&floe(), options, &[])?;
            let cause = outcome.cause();
            ensure!(outcome.status.code() == Some(3), "{cause}");
            ensure!(
                cause.contains(PROFILE) && cause.contains("--lsm-profile"),
                "{cause}"
            );
            ensure!(!process::exists(fixture.pid), "a task was made");
        }
        let mut verify = Command::new(env!("CARGO_BIN_EXE_floe"));
        let verified = verify.arg("verify").arg(fixture.images()).output()?;
        let said = String::from_utf8_lossy(&verified.stdout);
        ensure!(verified.status.code() == Some(3), "{said}");
        ensure!(said.contains(PROFILE), "{said}");
        Ok(())
    });
}

#[test]
fn a_label_is_given_up_where_that_is_asked_for() {
    skips::as_root("labels-given-up", || {
        for given_up in ["none", "apparmor:unconfined"] {
            let mut fixture = confined()?;
            fixture
                .restore(&floe(), &["--lsm-profile", given_up])
                .context(given_up)?;
            fixture.check().context(given_up)?;
        }
        Ok(())
    });
}

#[test]
fn the_label_of_a_task_is_shown() {
    skips::as_root("labels-shown", || {
        let fixture = confined()?;
        let mut inspect = Command::new(env!("CARGO_BIN_EXE_floe"));
        let shown = inspect.arg("inspect").arg(fixture.images()).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout);
        ensure!(
            shown.contains("label") && shown.contains(PROFILE),
            "{shown}"
        );
        Ok(())
    });
}
