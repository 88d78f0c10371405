//! What a dump holds, for people: tasks, descriptors, mappings, pages, files.
//!
//! The lines are those of CRIU's image tool (`crit x DIR ps|fds|mems|rss`).

use std::collections::HashMap;
use std::fmt;

use crate::catalogue::ImageKind;
use crate::dir::ImageDir;
use crate::error::ImageError;
use crate::json::{self, ImageInfo};
use crate::messages::{FdTypes, FdinfoEntry, FileEntry, FsEntry, PstreeEntry, VmaEntry};

/// Bits of `vma_entry.status` that decide how a mapping is described.
mod status {
    pub const REGULAR: u32 = 1;
    pub const STACK: u32 = 1 << 1;
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const FILE_SHARED: u32 = 1 << 7;
    pub const ANON_SHARED: u32 = 1 << 8;
    pub const SYSV: u32 = 1 << 10;
    pub const SOCKET: u32 = 1 << 11;
}
const MAP_GROWSDOWN: u32 = 0x100;
const PAGE_SHIFT: u32 = 12;

/// One task of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskLine {
    /// Its pid.
    pub pid: u32,
    /// Its process group.
    pub pgid: u32,
    /// Its session.
    pub sid: u32,
    /// Ancestors above it.
    pub depth: usize,
    /// Its name.
    pub comm: String,
    /// Its security label, where it had one.
    pub label: Option<String>,
}

impl fmt::Display for TaskLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let indent = 4 * self.depth;
        write!(
            f,
            "{:>7}{:>7}{:>7}   {:indent$}{}",
            self.pid, self.pgid, self.sid, "", self.comm
        )
    }
}

/// Something of a task, each thing with its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskTable {
    /// The task's pid.
    pub pid: u32,
    /// Lines below it.
    pub lines: Vec<String>,
}

impl fmt::Display for TaskTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.pid)?;
        for line in &self.lines {
            write!(f, "\n\t{line}")?;
        }
        Ok(())
    }
}

/// One file of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLine {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its entries; `None` for raw files and others without entries.
    pub info: Option<ImageInfo>,
    /// What is wrong with it.
    pub damage: Option<String>,
}

/// All files of a directory by name, damaged ones included.
pub fn list(dir: &ImageDir) -> Result<Vec<FileLine>, ImageError> {
    let mut names = dir.file_names()?;
    names.sort();
    let mut lines = Vec::new();
    for name in names {
        let path = dir.path().join(&name);
        let Some(file) = dir.open_file(&name)? else {
            continue;
        };
        let metadata = file.metadata();
        let metadata = metadata.map_err(|source| ImageError::Read {
            path: path.clone(),
            offset: 0,
            source,
        })?;
        if !metadata.is_file() {
            continue;
        }
        let size = metadata.len();
        let has_entries = ImageKind::of_file_name(&name).is_some_and(|(kind, _)| !kind.is_raw());
        let info =
            has_entries.then(|| json::reader_by_magic(file, size, path).and_then(json::info));
        let (info, damage) = match info {
            None => (None, None),
            Some(Ok(info)) => (Some(info), None),
            Some(Err(error)) => (None, Some(error.to_string())),
        };
        lines.push(FileLine {
            name,
            size,
            info,
            damage,
        });
    }
    Ok(lines)
}

/// The tasks, each child below its parent.
pub fn tasks(dir: &ImageDir) -> Result<Vec<TaskLine>, ImageError> {
    let mut left: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree, 0)?;
    let mut lines = Vec::new();
    let mut waiting = take_children(&mut left, 0, 0);
    while let Some((depth, task)) = waiting.pop() {
        let core = dir.read_core(task.pid.into())?;
        let comm = core.tc.map(|tc| tc.comm).unwrap_or_default();
        let creds = core.thread_core.and_then(|thread| thread.creds);
        lines.push(TaskLine {
            pid: task.pid,
            pgid: task.pgid,
            sid: task.sid,
            depth,
            comm,
            label: creds.and_then(|creds| creds.lsm_profile),
        });
        waiting.extend(take_children(&mut left, task.pid, depth + 1));
    }
    Ok(lines)
}

/// The children of a task, last first. They are taken out, so that a loop comes to an end.
fn take_children(
    left: &mut Vec<PstreeEntry>,
    parent: u32,
    depth: usize,
) -> Vec<(usize, PstreeEntry)> {
    let children = left.extract_if(.., |task| task.ppid == parent);
    let mut children: Vec<_> = children.map(|task| (depth, task)).collect();
    children.reverse();
    children
}

/// The descriptors, working directory and root of each task.
pub fn descriptors(dir: &ImageDir) -> Result<Vec<TaskTable>, ImageError> {
    let files = FileNames::read(dir)?;
    let mut tables = Vec::new();
    for task in dir.read_all::<PstreeEntry>(ImageKind::Pstree, 0)? {
        let mut lines = Vec::new();
        // A zombie has neither descriptors nor a working directory.
        if let Some(ids) = dir.read_ids(task.pid.into())? {
            for fd in dir.read_all::<FdinfoEntry>(ImageKind::Fdinfo, ids.files_id.into())? {
                lines.push(format!(
                    "{:>7}: {}",
                    fd.fd,
                    files.describe(fd.r#type, fd.id)
                ));
            }
        }
        if let Some(fs) = dir.read_optional::<FsEntry>(ImageKind::Fs, task.pid.into())? {
            lines.push(format!("{:>7}: {}", "cwd", files.path(fs.cwd_id)));
            lines.push(format!("{:>7}: {}", "root", files.path(fs.root_id)));
        }
        tables.push(TaskTable {
            pid: task.pid,
            lines,
        });
    }
    Ok(tables)
}

/// The program and the mappings of each task.
pub fn mappings(dir: &ImageDir) -> Result<Vec<TaskTable>, ImageError> {
    let files = FileNames::read(dir)?;
    let mut segments = HashMap::new();
    let mut tables = Vec::new();
    for task in dir.read_all::<PstreeEntry>(ImageKind::Pstree, 0)? {
        let mut lines = Vec::new();
        if dir.has(ImageKind::Mm, task.pid.into()) {
            let mm = dir.read_mm(task.pid.into())?;
            lines.push(format!("{:<36}    {}", "exe", files.path(mm.exe_file_id)));
            for vma in &mm.vmas {
                let range = format!("{:08x}-{:08x}", vma.start, vma.end);
                let object = describe_mapping(vma, &files, &mut segments);
                lines.push(format!("{range:<36}{}{object}", protection(vma.prot)));
            }
        }
        tables.push(TaskTable {
            pid: task.pid,
            lines,
        });
    }
    Ok(tables)
}

/// The stored pages of each task, beside the mappings that they belong to.
pub fn pages(dir: &ImageDir) -> Result<Vec<TaskTable>, ImageError> {
    let files = FileNames::read(dir)?;
    let mut tables = Vec::new();
    for task in dir.read_all::<PstreeEntry>(ImageKind::Pstree, 0)? {
        let pid = u64::from(task.pid);
        let mut lines = Vec::new();
        if dir.has(ImageKind::Pagemap, pid) {
            let (_, entries) = dir.read_pagemap(ImageKind::Pagemap, pid)?;
            let vmas = if dir.has(ImageKind::Mm, pid) {
                dir.read_mm(pid)?.vmas
            } else {
                Vec::new()
            };
            let mut shown = None;
            for entry in entries {
                let count = entry.nr_pages();
                let end = entry
                    .vaddr
                    .saturating_add(count.saturating_mul(1 << PAGE_SHIFT));
                let mut line = format!("{:<23}", format!("{:x} / {count:<8}", entry.vaddr));
                let first = vmas.partition_point(|vma| vma.end <= entry.vaddr);
                for (index, vma) in vmas
                    .iter()
                    .enumerate()
                    .skip(first)
                    .take_while(|(_, vma)| vma.start < end)
                {
                    if index > first {
                        line.push_str(&format!("\n\t{:23}", ""));
                    }
                    line.push_str(&describe_range(vma, shown == Some(index), &files));
                    shown = Some(index);
                }
                lines.push(line);
            }
        }
        tables.push(TaskTable {
            pid: task.pid,
            lines,
        });
    }
    Ok(tables)
}

fn describe_range(vma: &VmaEntry, again: bool, files: &FileNames) -> String {
    if again {
        return " ~".to_string();
    }
    let count = vma.end.saturating_sub(vma.start) >> PAGE_SHIFT;
    let mut text = format!(" {:08x} / {count:<8}", vma.start);
    if vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0 {
        text.push_str(&format!(" {}", files.path_of_mapping(vma)));
    }
    text
}

fn protection(prot: u32) -> String {
    let letters = [(1, 'r'), (2, 'w'), (4, 'x')];
    letters
        .iter()
        .map(|(bit, letter)| if prot & bit != 0 { *letter } else { '-' })
        .collect()
}

/// What a mapping is of; `segments` numbers the shared ones as they come.
fn describe_mapping(
    vma: &VmaEntry,
    files: &FileNames,
    segments: &mut HashMap<u64, usize>,
) -> String {
    let has = |bit| vma.status & bit != 0;
    let next = segments.len() + 1;
    let mut segment = || *segments.entry(vma.shmid).or_insert(next);
    let mut text = if has(status::SYSV) {
        format!(" ips[{:x}]", segment())
    } else if has(status::ANON_SHARED) {
        format!(" shmem[{:x}]", segment())
    } else if has(status::SOCKET) {
        format!(" packet[{:x}]", segment())
    } else if has(status::FILE_PRIVATE | status::FILE_SHARED) {
        let offset = if vma.pgoff == 0 {
            String::new()
        } else {
            format!(" + {:#x}", vma.pgoff)
        };
        let shared = if has(status::FILE_SHARED) { " (s)" } else { "" };
        format!(" {}{offset}{shared}", files.path_of_mapping(vma))
    } else if has(status::STACK) {
        " [stack]".to_string()
    } else if has(status::VSYSCALL) {
        " [vsyscall]".to_string()
    } else if has(status::VDSO) {
        " [vdso]".to_string()
    } else if vma.flags & MAP_GROWSDOWN != 0 {
        " [stack?]".to_string()
    } else {
        String::new()
    };
    if !has(status::REGULAR) {
        text.push_str(" *");
    }
    text
}

/// The dump's file descriptions by id.
struct FileNames(HashMap<u32, Box<FileEntry>>);

impl FileNames {
    fn read(dir: &ImageDir) -> Result<FileNames, ImageError> {
        let files = dir.read_files()?;
        Ok(FileNames(
            files.into_iter().map(|file| (file.id, file)).collect(),
        ))
    }

    fn path(&self, id: u32) -> String {
        let file = self.0.get(&id).and_then(|file| file.reg.as_ref());
        file.map_or("unknown path".to_string(), |file| file.name.clone())
    }

    fn path_of_mapping(&self, vma: &VmaEntry) -> String {
        let id = u32::try_from(vma.shmid);
        id.map_or("unknown path".to_string(), |id| self.path(id))
    }

    fn describe(&self, kind: i32, id: u32) -> String {
        let file = self.0.get(&id);
        match FdTypes::try_from(kind) {
            Ok(FdTypes::Reg) => self.path(id),
            Ok(FdTypes::Pipe) => match file.and_then(|file| file.pipe.as_ref()) {
                Some(pipe) => format!("pipe[{}]", pipe.pipe_id),
                None => "pipe[?]".to_string(),
            },
            Ok(FdTypes::Unixsk) => match file.and_then(|file| file.usk.as_ref()) {
                Some(socket) => {
                    let name = String::from_utf8_lossy(&socket.name).replace('\0', "@");
                    let name = if name.is_empty() {
                        name
                    } else {
                        format!(" {name}")
                    };
                    format!("unix[{} ({}){name}]", socket.ino, socket.peer)
                }
                None => "unix[?]".to_string(),
            },
            Ok(kind) => format!("{}.{id}", format!("{kind:?}").to_uppercase()),
            Err(_) => format!("{kind}.{id}"),
        }
    }
}
