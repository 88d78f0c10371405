//! Whether a checkpoint can be restored on this machine: all obstacles at once, nothing is made.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use floe_archive::check::Row;
use floe_image::messages::{InetSkEntry, RegFileEntry};
use floe_image::{ImageDir, ImageKind};
use floe_kernel::cpu::CpuFacts;
use floe_kernel::features::KernelFeatures;
use floe_options::RestoreOptions;
use floe_resources::cpu;
use floe_resources::namespace::has_own_pids;
use floe_resources::restore::TreeImages;

use crate::engine::{Owner, plan};
use crate::tree::Tree;

const TCP: u32 = 6;
const UDP: u32 = 17;
/// State of a listening socket in images and in `/proc/net/tcp`.
const LISTENS: u32 = 10;
const PERMISSIONS: u32 = 0o7777;

/// Looks at everything that a restore of `dir` needs here.
pub fn check_machine(
    dir: &ImageDir,
    options: &RestoreOptions,
    features: &KernelFeatures,
) -> Vec<Row> {
    let images = match TreeImages::read(dir.clone()) {
        Ok(images) => images,
        Err(error) => {
            return vec![Row::bad(
                "images",
                chain(&error),
                "copy the checkpoint again, or dump again",
            )];
        }
    };
    let mut rows = vec![processor(dir, options), planned(&images, options, features)];
    rows.extend(ids(&images));
    rows.extend(files(&images, options));
    rows.extend(ports(&images));
    rows
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

/// The plan needs every feature of the kernel that a restore will use.
fn planned(images: &TreeImages, options: &RestoreOptions, features: &KernelFeatures) -> Row {
    match plan(images, options, features) {
        Ok(_) => Row::good(
            "plan",
            "everything in the images can be restored, and the kernel has what that needs",
        ),
        Err(error) => Row::bad(
            "plan",
            chain(&error),
            "see the message; `floe check` lists what this kernel offers",
        ),
    }
}

fn ids(images: &TreeImages) -> Vec<Row> {
    let tree = match Tree::new(images) {
        Ok(tree) => tree,
        Err(error) => return vec![Row::bad("pids", chain(&error), "copy the checkpoint again")],
    };
    if has_own_pids(images) {
        return vec![Row::good("pids", "the tree has a pid namespace of its own")];
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

fn files(images: &TreeImages, options: &RestoreOptions) -> Vec<Row> {
    if !images
        .dir
        .ids(ImageKind::Mnts)
        .unwrap_or_default()
        .is_empty()
    {
        return vec![Row::note(
            "files",
            "the tasks had mounts of their own; their files are not looked at",
        )];
    }
    let named = images.files.values().filter_map(|file| file.reg.as_ref());
    let mut count = 0;
    let mut seen = BTreeSet::new();
    let mut rows = Vec::new();
    for file in named {
        let looked_at = file.name.starts_with('/')
            && !file.name.starts_with("/proc/")
            && !file.ext.unwrap_or(false)
            && !images.remaps.contains_key(&file.id);
        if !looked_at || !seen.insert(&file.name) {
            continue;
        }
        count += 1;
        rows.extend(one_file(file, options));
    }
    if rows.is_empty() {
        rows.push(Row::good(
            "files",
            format!("{count} files and directories are as they were"),
        ));
    }
    rows
}

/// What is wrong with a file that a task had open, mapped or as its directory.
fn one_file(file: &RegFileEntry, options: &RestoreOptions) -> Option<Row> {
    let name = &file.name;
    let found = match std::fs::symlink_metadata(name) {
        Ok(found) => found,
        Err(error) => {
            return Some(Row::bad(
                "files",
                format!("{name}: {error}"),
                "bring the file here, as it was at the dump",
            ));
        }
    };
    if let Some(size) = file
        .size
        .filter(|size| found.is_file() && *size != found.len())
    {
        return Some(Row::bad(
            "files",
            format!("{name} has {} bytes, {size} at the dump", found.len()),
            "bring back the file as it was at the dump (a snapshot of its file system)",
        ));
    }
    let mode = file
        .mode
        .filter(|mode| mode & PERMISSIONS != found.mode() & PERMISSIONS);
    if let Some(mode) = mode.filter(|_| !options.skip_file_rwx_check) {
        return Some(Row::bad(
            "files",
            format!(
                "{name} has the mode {:o}, {:o} at the dump",
                found.mode() & PERMISSIONS,
                mode & PERMISSIONS
            ),
            format!(
                "chmod {:o} {name}, or restore with --skip-file-rwx-check",
                mode & PERMISSIONS
            ),
        ));
    }
    None
}

/// Ports that sockets of the checkpoint listen on, and others hold now.
fn ports(images: &TreeImages) -> Vec<Row> {
    if !images
        .dir
        .ids(ImageKind::Netdev)
        .unwrap_or_default()
        .is_empty()
    {
        return vec![Row::note(
            "ports",
            "the tasks had a network namespace of their own; all its ports are free",
        )];
    }
    let sockets = images.files.values().filter_map(|file| file.isk.as_ref());
    let bound: Vec<&InetSkEntry> = sockets
        .filter(|socket| socket.src_port != 0 && takes_port(socket))
        .collect();
    if bound.is_empty() {
        return vec![Row::good("ports", "no port is needed")];
    }
    let (tcp, udp) = (
        taken(&["tcp", "tcp6"], true),
        taken(&["udp", "udp6"], false),
    );
    let mut rows = Vec::new();
    let mut seen = BTreeSet::new();
    for socket in bound {
        let (table, word) = if socket.proto == TCP {
            (&tcp, "tcp")
        } else {
            (&udp, "udp")
        };
        if table.contains(&socket.src_port) && seen.insert((socket.proto, socket.src_port)) {
            rows.push(Row::bad(
                "ports",
                format!("{word} port {} is in use", socket.src_port),
                format!("end the program that holds it (ss -lp 'sport = {}'), or restore in a network namespace", socket.src_port),
            ));
        }
    }
    if rows.is_empty() {
        rows.push(Row::good("ports", "all ports are free"));
    }
    rows
}

fn takes_port(socket: &InetSkEntry) -> bool {
    (socket.proto == TCP && socket.state == LISTENS) || socket.proto == UDP
}

/// Local ports in tables of `/proc/net`; of TCP only those that are listened on.
fn taken(tables: &[&str], only_listening: bool) -> BTreeSet<u32> {
    let texts = tables
        .iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/net/{table}")).ok());
    let mut ports = BTreeSet::new();
    for text in texts {
        for line in text.lines().skip(1) {
            // `0: 00000000:0016 00000000:0000 0A ...`
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().and_then(|address| address.rsplit_once(':'));
            let state = words
                .nth(1)
                .and_then(|state| u32::from_str_radix(state, 16).ok());
            let port = local.and_then(|(_, port)| u32::from_str_radix(port, 16).ok());
            if let Some(port) = port.filter(|_| !only_listening || state == Some(LISTENS)) {
                ports.insert(port);
            }
        }
    }
    ports
}
