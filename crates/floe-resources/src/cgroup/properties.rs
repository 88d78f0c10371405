//! Which files of a group are saved, and when they are written.

use std::collections::BTreeMap;
use std::io;

use floe_options::policy::CgroupOptions;

use crate::collect::CollectError;

/// Files that every group of version 1 has.
const EVERY_V1: &[&str] = &[
    "cgroup.clone_children",
    "notify_on_release",
    "cgroup.procs",
    "tasks",
];
/// Files that groups of version 2 have.
const EVERY_V2: &[&str] = &[
    "cgroup.subtree_control",
    "cgroup.max.descendants",
    "cgroup.max.depth",
    "cgroup.freeze",
    "cgroup.type",
];

/// Files of each controller, in the order in which they can be written.
const OF_CONTROLLERS: &[(&str, &[&str])] = &[
    (
        "cpu",
        &[
            "cpu.shares",
            "cpu.cfs_period_us",
            "cpu.cfs_quota_us",
            "cpu.rt_period_us",
            "cpu.rt_runtime_us",
        ],
    ),
    (
        "memory",
        &[
            // The limit of memory and swap may not be below that of memory alone.
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "memory.swappiness",
            "memory.soft_limit_in_bytes",
            "memory.move_charge_at_immigrate",
            "memory.oom_control",
            "memory.use_hierarchy",
            "memory.kmem.limit_in_bytes",
            "memory.kmem.tcp.limit_in_bytes",
        ],
    ),
    (
        "cpuset",
        &[
            "cpuset.cpus",
            "cpuset.mems",
            "cpuset.memory_migrate",
            "cpuset.cpu_exclusive",
            "cpuset.mem_exclusive",
            "cpuset.mem_hardwall",
            "cpuset.memory_spread_page",
            "cpuset.memory_spread_slab",
            "cpuset.sched_load_balance",
            "cpuset.sched_relax_domain_level",
        ],
    ),
    ("blkio", &["blkio.weight"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    ("pids", &["pids.max"]),
    ("devices", &["devices.list"]),
];

/// Whether the file can be written only while the group is empty.
pub fn is_for_empty_group(name: &str) -> bool {
    matches!(
        name,
        "cpuset.cpus"
            | "cpuset.mems"
            | "devices.list"
            | "memory.kmem.limit_in_bytes"
            | "memory.swappiness"
            | "memory.oom_control"
            | "memory.use_hierarchy"
            | "cgroup.type"
    )
}

/// The files to be saved, by controller.
#[derive(Debug)]
pub struct Selection {
    files: BTreeMap<String, Vec<String>>,
}

impl Selection {
    /// The usual files, changed by `--cgroup-props` and `--cgroup-props-file`.
    pub fn new(options: &CgroupOptions) -> Result<Self, CollectError> {
        let owned = |files: &&[&str]| files.iter().map(ToString::to_string).collect();
        let mut files: BTreeMap<String, Vec<String>> = OF_CONTROLLERS
            .iter()
            .map(|(name, files)| (name.to_string(), owned(files)))
            .collect();
        if let Some(text) = &options.props {
            add(text, &mut files).map_err(|line| bad("--cgroup-props", &line))?;
        }
        if let Some(path) = &options.props_file {
            let text = std::fs::read_to_string(path).map_err(|source| CollectError::System {
                action: format!("Reading {}", path.display()),
                source,
            })?;
            add(&text, &mut files).map_err(|line| bad("--cgroup-props-file", &line))?;
        }
        Ok(Selection { files })
    }

    /// The files of a hierarchy with these controllers.
    pub fn of(&self, controllers: &str) -> Vec<&str> {
        let every = if controllers.is_empty() {
            EVERY_V2
        } else {
            EVERY_V1
        };
        let of_one = |name| self.files.get(name).into_iter().flatten();
        let own = controllers.split(',').flat_map(of_one).map(String::as_str);
        own.chain(every.iter().copied()).collect()
    }
}

fn bad(option: &str, line: &str) -> CollectError {
    CollectError::System {
        action: format!("Reading the value of {option} at `{line}`"),
        source: io::ErrorKind::InvalidInput.into(),
    }
}

/// Reads CRIU's small YAML: a controller, then its strategy (`merge` or `replace`) and its properties.
/// The error is the line that does not read.
fn add(text: &str, files: &mut BTreeMap<String, Vec<String>>) -> Result<(), String> {
    let (mut controller, mut replace) = (None, false);
    let bare = |word: &str| word.trim().trim_matches(['"', '\'']).to_string();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let bad = || line.to_string();
        let (key, value) = line.trim().split_once(':').ok_or_else(bad)?;
        let Some(field) = key.strip_prefix('-') else {
            if !value.trim().is_empty() {
                return Err(bad());
            }
            (controller, replace) = (Some(bare(key)), false);
            continue;
        };
        let name = controller.as_ref().ok_or_else(bad)?;
        match (bare(field).as_str(), bare(value).as_str()) {
            ("strategy", "merge") => replace = false,
            ("strategy", "replace") => replace = true,
            ("properties", list) => {
                let list = list
                    .strip_prefix('[')
                    .and_then(|list| list.strip_suffix(']'));
                let list = list.ok_or_else(bad)?.split(',').map(bare);
                let of_this = files.entry(name.clone()).or_default();
                if replace {
                    of_this.clear();
                }
                of_this.extend(list.filter(|file| !file.is_empty()));
            }
            _ => return Err(bad()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_merged_or_replaced() {
        let options = CgroupOptions {
            props: Some(
                "\"cpu\":\n - \"strategy\": \"replace\"\n - \"properties\": [\"cpu.shares\", \"cpu.x\"]\n\
                 pids:\n - strategy: merge\n - properties: [pids.peak]\n"
                    .to_string(),
            ),
            ..CgroupOptions::default()
        };
        let selection = Selection::new(&options).expect("well formed");
        assert_eq!(selection.of("cpu")[..2], ["cpu.shares", "cpu.x"]);
        assert_eq!(selection.of("cpu").len(), 2 + EVERY_V1.len());
        assert_eq!(selection.of("pids")[..2], ["pids.max", "pids.peak"]);
        assert_eq!(selection.of(""), EVERY_V2);
        let wrong = CgroupOptions {
            props: Some("cpu:\n - properties: cpu.shares\n".to_string()),
            ..CgroupOptions::default()
        };
        assert!(Selection::new(&wrong).is_err());
    }
}
