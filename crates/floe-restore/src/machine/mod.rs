//! Whether a checkpoint can be restored on this machine: all obstacles at once, nothing is made.

mod files;
mod ports;

use floe_archive::check::Row;
use floe_image::{ImageDir, ImageKind};
use floe_kernel::cpu::CpuFacts;
use floe_kernel::features::KernelFeatures;
use floe_options::{Need, RestoreOptions};
use floe_resources::cgroup::{GroupFault, look_at_groups};
use floe_resources::cpu;
use floe_resources::namespace::has_own_pids;
use floe_resources::restore::{PlanError, Planner, TreeImages};

use crate::engine::{Owner, needless_pids, plan};
use crate::tree::Tree;

/// In which pid namespace a restore would make a tree that had none of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidSpace {
    /// That of the caller.
    Callers,
    /// A new one (`--new-pidns`).
    New,
}

/// What a restore of a checkpoint meets on this machine.
#[derive(Debug, Default)]
pub struct Outlook {
    /// What only planning finds wrong with the images.
    pub damaged: Vec<Row>,
    /// What is here, and what is in the way.
    pub machine: Vec<Row>,
    /// What the options lack that the images call for.
    pub needed: Vec<Row>,
    /// The options that `needed` is about, as they are to be given.
    pub options: Vec<String>,
}

/// Looks at everything that a restore of `dir` with `options` needs here.
pub fn check_machine(
    dir: &ImageDir,
    (options, pids): (&RestoreOptions, PidSpace),
    features: &KernelFeatures,
) -> Outlook {
    let images = match TreeImages::read(dir.clone()) {
        Ok(images) => images,
        Err(error) => {
            let row = Row::bad(
                "images",
                chain(&error),
                "copy the checkpoint again, or dump again",
            );
            return Outlook {
                damaged: vec![row],
                ..Outlook::default()
            };
        }
    };
    let mut outlook = planned(&images, options, features);
    outlook.machine.insert(0, processor(dir, options));
    outlook.machine.extend(ids(&images, pids));
    outlook.machine.extend(files::rows(&images, options));
    outlook.machine.extend(files::mounts(&images, options));
    outlook.machine.extend(groups(&images, options, features));
    outlook.machine.extend(ports::rows(&images, options));
    outlook
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn processor(dir: &ImageDir, options: &RestoreOptions) -> Row {
    let saved = match dir.read_optional(ImageKind::Cpuinfo, 0) {
        Ok(Some(saved)) => saved,
        Ok(None) => {
            return Row::note(
                "cpu",
                "the checkpoint does not say which CPU it was made on (--cpu-cap=none at the dump)",
            );
        }
        Err(error) => return Row::bad("cpu", chain(&error), "copy the checkpoint again"),
    };
    let here = match CpuFacts::read() {
        Ok(here) => here,
        Err(error) => return Row::note("cpu", format!("this CPU cannot be compared: {error}")),
    };
    match cpu::compare(&saved, &here, options.cpu_cap) {
        Ok(()) => Row::good("cpu", "this CPU has all that the tasks may use"),
        Err(mismatches) => {
            let lines: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
            Row::bad(
                "cpu",
                lines.join("; "),
                "restore on a CPU with these features; --cpu-cap=none only if the program never uses them",
            )
        }
    }
}

/// The plan needs every feature of the kernel that a restore will use, and every option.
fn planned(images: &TreeImages, options: &RestoreOptions, features: &KernelFeatures) -> Outlook {
    let mut outlook = Outlook::default();
    let mut assumed = options.clone();
    let mut known: Vec<Need> = Vec::new();
    let row = loop {
        match plan(images, &assumed, features).map(drop) {
            Ok(()) => {
                break Row::good(
                    "plan",
                    "everything in the images can be restored, and the kernel has what that needs",
                );
            }
            // What was assumed once and is asked for again would be so for ever.
            Err(PlanError::NeedsOption { object, need }) if !known.contains(&need) => {
                let text = format!("{}: {object} calls for it", need.option());
                outlook
                    .needed
                    .push(Row::needed("options", text, need.remedy()));
                outlook.options.push(need.option());
                need.assume(&mut assumed);
                known.push(need);
            }
            Err(
                error
                @ (PlanError::Image(_) | PlanError::Damaged { .. } | PlanError::Incoherent(_)),
            ) => {
                let row = Row::bad(
                    "plan",
                    chain(&error),
                    "copy the checkpoint again, or dump again",
                );
                outlook.damaged.push(row);
                return outlook;
            }
            Err(PlanError::Unsupported { object, remedy }) => {
                break Row::bad("plan", format!("{object} cannot be restored"), remedy);
            }
            Err(error) => {
                break Row::bad(
                    "plan",
                    chain(&error),
                    "see the message; `floe check` lists what this kernel offers",
                );
            }
        }
    };
    outlook.machine.push(row);
    outlook
}

fn ids(images: &TreeImages, pids: PidSpace) -> Vec<Row> {
    let tree = match Tree::new(images) {
        Ok(tree) => tree,
        Err(error) => return vec![Row::bad("pids", chain(&error), "copy the checkpoint again")],
    };
    match (has_own_pids(images), pids) {
        (false, PidSpace::Callers) => {}
        (false, PidSpace::New) => {
            return vec![Row::good(
                "pids",
                "in the new pid namespace all pids are free",
            )];
        }
        (true, PidSpace::Callers) => {
            return vec![Row::good("pids", "the tree has a pid namespace of its own")];
        }
        (true, PidSpace::New) => {
            let error = needless_pids();
            return vec![Row::bad("pids", error.to_string(), "leave out --new-pidns")];
        }
    }
    let mut rows = Vec::new();
    let mut count = 0;
    for id in tree.ids(images) {
        count += 1;
        if let Some(owner) = Owner::of(id) {
            let text = format!("pid {id} is taken by {}", owner.shown);
            rows.push(match owner.is_zombie {
                // Init processes reap orphans within seconds.
                true => Row::note("pids", format!("{text} yet; a restore waits some seconds for that")),
                false => Row::bad(
                    "pids",
                    text,
                    format!("end it (kill {id}), or restore in a new pid namespace: floe restore --new-pidns ..."),
                ),
            });
        }
    }
    if rows.is_empty() {
        rows.push(Row::good("pids", format!("all {count} pids are free")));
    }
    rows
}

/// Control groups that are not as the options need them.
fn groups(images: &TreeImages, options: &RestoreOptions, features: &KernelFeatures) -> Vec<Row> {
    let planner = Planner::new(images, options, features);
    // What is damaged in them the plan has said.
    let faults = look_at_groups(&planner).unwrap_or_default();
    let bad = |fault: &GroupFault| Row::bad("cgroups", fault.to_string(), fault.remedy());
    faults.iter().map(bad).collect()
}
