//! `floe check`: a table of what the kernel offers.

use std::io::Write;

use floe_kernel::features::{FEATURES, Feature, KernelFeatures, Need, ProbeContext, find, names};
use floe_memory::TrackerKind;
use floe_options::settings::CheckSettings;

use crate::exit::{Exit, Failure};

/// Answers `--feature` by the exit code, or prints the table.
pub fn run(settings: &CheckSettings) -> Result<Exit, Failure> {
    match settings.feature.as_deref() {
        Some("list") => list(),
        Some(name) => one(name),
        None => table(settings),
    }
}

fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::new(Exit::Failed, error))
}

fn list() -> Result<Exit, Failure> {
    print(&format!("{}\n", names().join("\n")))?;
    Ok(Exit::Done)
}

fn one(name: &str) -> Result<Exit, Failure> {
    let Some(feature) = find(name) else {
        let nearest = floe_options::error::nearest(name, names()).map(Into::into);
        return Err(UnknownFeature {
            name: name.into(),
            nearest,
        }
        .into());
    };
    if feature.present(&ProbeContext::default()) {
        print(&format!("{name} is supported\n"))?;
        return Ok(Exit::Done);
    }
    print(&format!(
        "{name} is not supported: {} ({})\n",
        feature.without, feature.purpose
    ))?;
    Ok(Exit::Kernel)
}

#[derive(Debug, thiserror::Error)]
#[error("unknown feature `{name}`{}; `--feature list` lists them", .nearest.as_ref().map(|n: &String| format!(", did you mean `{n}`?")).unwrap_or_default())]
struct UnknownFeature {
    name: String,
    nearest: Option<String>,
}

impl From<UnknownFeature> for Failure {
    fn from(error: UnknownFeature) -> Self {
        Self::new(Exit::Usage, error)
    }
}

/// What nothing works without and this kernel lacks; `Err` names it.
pub fn essentials() -> Result<(), Vec<&'static Feature>> {
    let context = ProbeContext::default();
    let needed = FEATURES
        .iter()
        .filter(|feature| feature.need == Need::Always);
    let missing: Vec<_> = needed
        .filter(|feature| !feature.present(&context))
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(missing)
    }
}

/// All features are shown; only those asked for decide the verdict. The last line and the exit
/// code are what scripts look at, with CRIU's words.
fn table(settings: &CheckSettings) -> Result<Exit, Failure> {
    let context = ProbeContext::default();
    let mut answers: Vec<(&Feature, bool)> = FEATURES
        .iter()
        .map(|feature| (feature, feature.present(&context)))
        .collect();
    // What nothing works without comes first.
    answers.sort_by_key(|(feature, _)| feature.need);
    let asked = |need: Need| match need {
        Need::Always => true,
        Need::Sometimes => settings.extra,
        Need::Experimental => settings.experimental,
    };
    let width = FEATURES
        .iter()
        .map(|feature| feature.name.len())
        .max()
        .unwrap_or(0);
    let purpose_width = FEATURES
        .iter()
        .map(|feature| feature.purpose.len())
        .max()
        .unwrap_or(0);
    let mut text = format!(
        "{:width$}  present  {:purpose_width$}  without it\n",
        "feature", "what it is for"
    );
    for (feature, present) in &answers {
        let (mark, without) = if *present {
            ("yes", "")
        } else {
            ("NO", feature.without)
        };
        let line = format!(
            "{:width$}  {mark:7}  {:purpose_width$}  {without}",
            feature.name, feature.purpose
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    let missing = |need: &dyn Fn(Need) -> bool| {
        answers
            .iter()
            .any(|(feature, present)| !present && need(feature.need))
    };
    let (verdict, exit) = if missing(&|need| need == Need::Always) {
        ("Does not look good.", Exit::Kernel)
    } else if missing(&asked) {
        (
            "Looks good but some kernel features are missing\nwhich, depending on your process tree, may cause\ndump or restore failure.",
            Exit::Kernel,
        )
    } else {
        ("Looks good.", Exit::Done)
    };
    let (tracker, why) = TrackerKind::best(&KernelFeatures::probe());
    let tracker = format!("Changed memory is found by `{}`: {why}.\n", tracker.name());
    print(&format!("{text}{tracker}{verdict}\n"))?;
    Ok(exit)
}
