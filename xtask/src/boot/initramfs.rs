//! What the guest has: our binaries and the libraries that they need, busybox, some kernel modules.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::apt::run;
use super::kernel::Kernel;
use super::{Job, cpio};

const BUSYBOX: &str = "/bin/busybox";
const INIT: &str = include_str!("init.sh");
/// Where a peer and its libraries lie in the guest.
const PEER: &str = "/peer";
/// Parts of `kernel/` whose modules are taken along: what sockets need, and nftables with its checksums; overlays.
const MODULES: [&str; 12] = [
    "lib/libcrc32c",
    "crypto/crc32c",
    "net/",
    "drivers/net/tun",
    "drivers/net/veth",
    "drivers/net/dummy",
    "drivers/net/ifb",
    "drivers/net/ipvlan",
    "drivers/net/macvlan",
    "drivers/net/nlmon",
    "drivers/net/vrf",
    "fs/overlayfs/",
];

/// A CRIU of the host.
pub struct Peer<'a> {
    /// The binary, as seen in its tree.
    pub path: &'a Path,
    /// The root of the system that it is from.
    pub tree: &'a Path,
}

enum Entry {
    Copy(PathBuf),
    Text(u32, Vec<u8>),
    Link(String),
}

/// Entries by their path in the guest.
pub struct Initramfs<'a> {
    /// For what has to be made on the way.
    directory: &'a Path,
    entries: BTreeMap<String, Entry>,
}

impl<'a> Initramfs<'a> {
    /// An empty one; `directory` is for files that are made for it.
    pub fn new(directory: &'a Path) -> Self {
        Initramfs {
            directory,
            entries: BTreeMap::new(),
        }
    }

    /// A text file.
    pub fn text(&mut self, path: &str, mode: u32, text: &str) -> anyhow::Result<()> {
        let entry = Entry::Text(mode, text.into());
        self.entries.insert(path.to_string(), entry);
        Ok(())
    }

    /// Where files can be made for it.
    pub fn directory(&self) -> &Path {
        self.directory
    }

    /// A file that only root reads.
    pub fn bytes(&mut self, path: &str, content: Vec<u8>) {
        let entry = Entry::Text(0o600, content);
        self.entries.insert(path.to_string(), entry);
    }

    /// A program of ours, without what only debuggers read, and its libraries.
    pub fn program(&mut self, path: &Path) -> anyhow::Result<()> {
        let name = path.file_name().context("a program without a name")?;
        let stripped = self.directory.join(name);
        let mut strip = Command::new("strip");
        strip
            .arg("--strip-debug")
            .arg("-o")
            .arg(&stripped)
            .arg(path);
        // Without `strip` the guest needs more memory, no more.
        let content = match run(&mut strip) {
            Ok(_) => stripped,
            Err(_) => path.to_path_buf(),
        };
        self.entries.insert(text(path)?, Entry::Copy(content));
        for library in libraries(Path::new("/"), path)? {
            self.entries
                .insert(text(&library)?, Entry::Copy(library.clone()));
        }
        Ok(())
    }

    /// Any file of the host, with its libraries where it is a program.
    pub fn file(&mut self, path: &Path) -> anyhow::Result<()> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        if content.starts_with(b"\x7fELF") {
            return self.program(path);
        }
        self.entries.insert(text(path)?, Entry::Copy(path.into()));
        Ok(())
    }

    /// A peer; answers its path in the guest.
    pub fn peer(&mut self, peer: &Peer<'_>) -> anyhow::Result<String> {
        let binary = text(peer.path)?;
        let outside = |path: &Path| peer.tree.join(path.strip_prefix("/").unwrap_or(path));
        let mut loader = None;
        let mut directories = Vec::new();
        for library in libraries(peer.tree, peer.path)? {
            let path = text(&library)?;
            if library.starts_with("/lib64") || path.contains("/ld-linux") {
                loader = Some(path.clone());
            }
            let directory = format!("{PEER}{}", text(library.parent().context("a file")?)?);
            if !directories.contains(&directory) {
                directories.push(directory);
            }
            let content = outside(&library);
            self.entries
                .insert(format!("{PEER}{path}"), Entry::Copy(content));
        }
        let content = outside(peer.path);
        self.entries
            .insert(format!("{PEER}{binary}"), Entry::Copy(content));
        let loader = loader.context("the peer has no loader")?;
        let start = format!(
            "#!/bin/sh\nexec {PEER}{loader} --argv0 criu --library-path {} {PEER}{binary} \"$@\"\n",
            directories.join(":")
        );
        let path = format!("{PEER}/criu");
        self.text(&path, 0o755, &start)?;
        Ok(path)
    }

    /// The modules that programs under test have the kernel load.
    pub fn kernel_modules(&mut self, kernel: &Kernel) -> anyhow::Result<()> {
        let release = &kernel.release;
        let stage = self.directory.join("modules");
        let modules = stage.join("lib/modules").join(release);
        copy_modules(&kernel.modules, &modules)?;
        let mut index = Command::new("/sbin/depmod");
        run(index.arg("-b").arg(&stage).arg(release))?;
        let mut files = Vec::new();
        files_below(&modules, &mut files)?;
        for file in files {
            let path = format!("/{}", text(file.strip_prefix(&stage)?)?);
            self.entries.insert(path, Entry::Copy(file));
        }
        Ok(())
    }

    /// Everything else: busybox, users, and the program that runs the jobs.
    pub fn system(&mut self, floe: &str, peer: Option<&str>, jobs: &[Job]) -> anyhow::Result<()> {
        ensure!(
            Path::new(BUSYBOX).exists(),
            "{BUSYBOX} is missing: install busybox-static"
        );
        self.entries
            .insert(BUSYBOX.into(), Entry::Copy(BUSYBOX.into()));
        self.entries
            .insert("/bin/sh".into(), Entry::Link("busybox".into()));
        self.entries
            .insert("/bin/floe".into(), Entry::Link(floe.into()));
        self.text(
            "/etc/passwd",
            0o644,
            "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        )?;
        self.text("/etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")?;
        let mut script = INIT.to_string();
        if let Some(peer) = peer {
            script.push_str(&format!("export FLOE_PEER_CRIU={peer}\n"));
        }
        for (number, job) in jobs.iter().enumerate() {
            let path = format!("/tests/job-{number}.sh");
            self.text(&path, 0o755, &format!("{}\n", job.script))?;
            let seconds = job.limit.as_secs();
            script.push_str(&format!("run {} {seconds} {path}\n", job.name));
        }
        script.push_str("finish\n");
        self.text("/init", 0o755, &script)
    }

    /// Writes the archive and answers where it is.
    pub fn write(self) -> anyhow::Result<PathBuf> {
        let path = self.directory.join("initrd");
        let mut archive = cpio::Writer::new(BufWriter::new(File::create(&path)?));
        let mut made = Vec::new();
        for place in ["/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/var/tmp"] {
            parents(&mut archive, &mut made, &format!("{place}/."))?;
        }
        for (path, entry) in &self.entries {
            parents(&mut archive, &mut made, path)?;
            match entry {
                Entry::Copy(from) => {
                    let content =
                        fs::read(from).with_context(|| format!("reading {}", from.display()))?;
                    archive.file(path, 0o755, &content)?;
                }
                Entry::Text(mode, content) => archive.file(path, *mode, content)?,
                Entry::Link(target) => archive.link(path, target)?,
            }
        }
        archive.finish()?;
        Ok(path)
    }
}

/// Writes the directories above a path that are not there yet.
fn parents(
    archive: &mut cpio::Writer<BufWriter<File>>,
    made: &mut Vec<String>,
    path: &str,
) -> anyhow::Result<()> {
    for (at, _) in path.match_indices('/').skip(1) {
        let directory = path[..at].to_string();
        if !made.contains(&directory) {
            let mode = if directory == "/tmp" { 0o1777 } else { 0o755 };
            archive.directory(&directory, mode)?;
            made.push(directory);
        }
    }
    Ok(())
}

/// The libraries of a program in a tree, by their paths there, the loader among them.
fn libraries(tree: &Path, program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut ldd = match tree == Path::new("/") {
        true => Command::new("ldd"),
        false => {
            let mut ldd = Command::new("chroot");
            ldd.arg(tree).arg("ldd");
            ldd
        }
    };
    let printed = run(ldd.arg(program))?;
    let path = |line: &str| {
        let mut words = line.split_whitespace();
        words.find(|word| word.starts_with('/')).map(PathBuf::from)
    };
    Ok(printed.lines().filter_map(path).collect())
}

/// Copies the modules that we take, unpacked.
fn copy_modules(from: &Path, to: &Path) -> anyhow::Result<()> {
    let kernel = from.join("kernel");
    let mut files = Vec::new();
    files_below(&kernel, &mut files)?;
    for file in files {
        let inner = file.strip_prefix(&kernel)?;
        let name = text(inner)?;
        if !MODULES.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let copy = to.join("kernel").join(inner);
        fs::create_dir_all(copy.parent().context("a file")?)?;
        fs::copy(&file, &copy)?;
        if name.ends_with(".xz") {
            run(Command::new("xz").arg("--decompress").arg(&copy))?;
        }
    }
    for list in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        if from.join(list).exists() {
            fs::copy(from.join(list), to.join(list))?;
        }
    }
    Ok(())
}

fn files_below(directory: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = fs::read_dir(directory);
    for entry in entries.with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files_below(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    Ok(())
}

fn text(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str();
    Ok(text
        .with_context(|| format!("{} is no text", path.display()))?
        .to_string())
}
