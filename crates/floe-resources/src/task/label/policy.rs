//! Namespaces of AppArmor policy, which a container loads for itself (`apparmor.img`).
//!
//! Saved:    those that a label names, with all below: names and binary policy of their profiles.
//! Rebuilt:  made and loaded before the first task; what is there already must be the same. Needs: nothing.
//! Not kept: the names that the kernel gives to directories of profiles.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use floe_image::messages::{AaNamespace, AaPolicy, ApparmorEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::security::APPARMOR_POLICY;

use super::wanted::profile_of;
use crate::collect::Obstacle;
use crate::restore::{Attempt, ExecuteError, PlanError, World};

/// Namespaces in namespaces that we follow.
const MAX_DEPTH: usize = 16;
const STACKED: &str = "//&";

/// The policy of all namespaces that these labels name; `None` where they name none.
pub fn collect<'l>(
    labels: impl Iterator<Item = &'l str>,
    pid: HostPid,
) -> Result<Option<ApparmorEntry>, Obstacle> {
    let names: BTreeSet<&str> = labels.flat_map(namespaces).collect();
    let mut namespaces = Vec::new();
    for name in &names {
        let found = collect_namespace(&place(name), name, 0);
        namespaces.push(found.map_err(|error| Obstacle {
            pid,
            object: format!("its AppArmor namespace {name}, whose policy cannot be read ({error})"),
            remedy: "mount -t securityfs securityfs /sys/kernel/security; the kernel must hand out policy \
                     (apparmor.export_binary=Y)"
                .to_string(),
        })?);
    }
    Ok((!names.is_empty()).then_some(ApparmorEntry { namespaces }))
}

/// The outermost namespaces in a label: `:OUTER//INNER:PROFILE`.
fn namespaces(label: &str) -> impl Iterator<Item = &str> {
    let named = label.split(STACKED).filter_map(|part| {
        let (path, _) = part.strip_prefix(':')?.split_once(':')?;
        path.split("//").next()
    });
    named.filter(|name| is_plain(name))
}

/// Whether a name can be that of a directory.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains('/')
}

fn place(name: &str) -> PathBuf {
    Path::new(APPARMOR_POLICY).join("namespaces").join(name)
}

fn collect_namespace(place: &Path, name: &str, depth: usize) -> io::Result<AaNamespace> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("namespaces are too deep in each other"));
    }
    let mut policies = Vec::new();
    for directory in names_in(&place.join("profiles"))? {
        let profile = place.join("profiles").join(directory);
        policies.push(AaPolicy {
            name: fs::read_to_string(profile.join("name"))?
                .trim_end()
                .to_string(),
            blob: fs::read(profile.join("raw_data"))?,
        });
    }
    let below = place.join("namespaces");
    let inner = names_in(&below)?.into_iter();
    let namespaces = inner.map(|inner| collect_namespace(&below.join(&inner), &inner, depth + 1));
    Ok(AaNamespace {
        name: name.to_string(),
        policies,
        namespaces: namespaces.collect::<Result<_, _>>()?,
    })
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// What a restore loads.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    namespaces: Vec<AaNamespace>,
}

impl Policy {
    /// The namespaces of an image that these labels need, if they can be had here.
    pub fn plan<'l>(
        entry: ApparmorEntry,
        labels: impl Iterator<Item = &'l str>,
    ) -> Result<Self, PlanError> {
        let needed: BTreeSet<&str> = labels.flat_map(namespaces).collect();
        let mut namespaces = entry.namespaces;
        namespaces.retain(|one| needed.contains(one.name.as_str()));
        for one in &namespaces {
            check_names(one, 0)?;
            if !Path::new(APPARMOR_POLICY).exists() {
                return Err(PlanError::Unsupported {
                    object: format!("The AppArmor namespace {}", one.name),
                    remedy: "mount -t securityfs securityfs /sys/kernel/security",
                });
            }
            check_same(&place(&one.name), one)?;
        }
        Ok(Policy { namespaces })
    }

    /// Whether there is nothing to load.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }

    /// What of a label must be there already.
    pub fn rest(&self, label: &str) -> Option<String> {
        let there: Vec<&str> = label
            .split(STACKED)
            .filter(|part| !self.brings(part))
            .collect();
        (!there.is_empty()).then(|| there.join(STACKED))
    }

    fn brings(&self, part: &str) -> bool {
        let Some((path, _)) = part.strip_prefix(':').and_then(|rest| rest.split_once(':')) else {
            return false;
        };
        let mut level = &self.namespaces;
        let mut found = None;
        for name in path.split("//") {
            let Some(namespace) = level.iter().find(|one| one.name == name) else {
                return false;
            };
            level = &namespace.namespaces;
            found = Some(namespace);
        }
        // A child or a hat comes with its parent.
        let profile = profile_of(part);
        let parent = profile.split("//").next().unwrap_or(profile);
        profile == "unconfined"
            || found.is_some_and(|one| one.policies.iter().any(|policy| policy.name == parent))
    }

    /// Makes and loads the namespaces.
    pub fn execute(&self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        self.namespaces
            .iter()
            .try_for_each(|one| load(&place(&one.name), one, world))
    }
}

fn check_names(namespace: &AaNamespace, depth: usize) -> Result<(), PlanError> {
    if depth > MAX_DEPTH || !is_plain(&namespace.name) {
        let what = format!("`{}` is no name of a namespace", namespace.name);
        return Err(PlanError::damaged("apparmor.img", what));
    }
    let mut inner = namespace.namespaces.iter();
    inner.try_for_each(|one| check_names(one, depth + 1))
}

/// What is there already must not be changed: others may use it.
fn check_same(place: &Path, wanted: &AaNamespace) -> Result<(), PlanError> {
    let Ok(here) = collect_namespace(place, &wanted.name, 0) else {
        return Ok(());
    };
    for policy in &wanted.policies {
        let mut same_name = here.policies.iter().filter(|one| one.name == policy.name);
        if same_name.any(|one| one.blob != policy.blob) {
            return Err(PlanError::Unsupported {
                object: format!(
                    "The profile {} of the AppArmor namespace {}, which is another one here,",
                    policy.name, wanted.name
                ),
                remedy: "remove that namespace (rmdir /sys/kernel/security/apparmor/policy/namespaces/NAME), if nobody needs it",
            });
        }
    }
    let mut inner = wanted.namespaces.iter();
    inner.try_for_each(|one| check_same(&place.join("namespaces").join(&one.name), one))
}

fn load(place: &Path, namespace: &AaNamespace, world: &mut World<'_>) -> Result<(), ExecuteError> {
    let shown = || place.display().to_string();
    match fs::create_dir(place) {
        Ok(()) => {
            // Goes with all that is in it.
            let made = place.to_path_buf();
            world.on_failure(move || {
                if let Err(error) = fs::remove_dir(&made) {
                    tracing::warn!(%error, place = %made.display(), "an AppArmor namespace of the failed restore stays");
                }
            });
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).during("Making the AppArmor namespace", shown),
    }
    let here = collect_namespace(place, &namespace.name, 0);
    let here = here.during("Reading the AppArmor namespace", shown)?;
    let mut loaded = BTreeSet::new();
    for policy in &namespace.policies {
        let is_there = here.policies.iter().any(|one| one.name == policy.name);
        // Profiles of one file share its binary form.
        if !is_there && loaded.insert(&policy.blob) {
            let file = fs::File::options().write(true).open(place.join(".replace"));
            // The kernel takes it in one call.
            let written = file.and_then(|mut file| file.write(&policy.blob));
            written.during("Loading the AppArmor profile", || policy.name.clone())?;
        }
    }
    let mut inner = namespace.namespaces.iter();
    inner.try_for_each(|one| load(&place.join("namespaces").join(&one.name), one, world))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_their_namespaces() {
        let of = |label| namespaces(label).collect::<Vec<_>>();
        assert_eq!(of("docker-default"), Vec::<&str>::new());
        assert_eq!(of(":ns:profile"), ["ns"]);
        assert_eq!(of("outer//&:ns//inner://profile"), ["ns"]);
        assert_eq!(of(":../x:profile"), Vec::<&str>::new());
    }

    #[test]
    fn only_what_the_images_do_not_bring_must_be_there() {
        let policy = Policy {
            namespaces: vec![AaNamespace {
                name: "ns".into(),
                policies: vec![AaPolicy {
                    name: "p".into(),
                    blob: vec![1],
                }],
                namespaces: vec![],
            }],
        };
        assert_eq!(policy.rest(":ns:p"), None);
        assert_eq!(policy.rest(":ns:p//hat"), None);
        assert_eq!(
            policy.rest("outer//&:ns:unconfined").as_deref(),
            Some("outer")
        );
        assert_eq!(policy.rest(":ns:q").as_deref(), Some(":ns:q"));
        assert_eq!(policy.rest(":other:p").as_deref(), Some(":other:p"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let namespace = |name: &str| AaNamespace {
            name: name.into(),
            policies: vec![],
            namespaces: vec![],
        };
        assert!(check_names(&namespace("ns"), 0).is_ok());
        for name in ["", "..", "a/b", ".hidden"] {
            assert!(check_names(&namespace(name), 0).is_err(), "{name}");
        }
    }
}
