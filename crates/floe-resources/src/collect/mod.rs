//! What the kinds share while a dump collects: identities, side images, obstacles, caches.
//!
//! Everything here reads and nothing changes the tasks, so all obstacles can be listed before the first
//! remote call.

mod ahead;
mod error;
mod fd_table;
mod file_ids;
mod path_files;
mod probe;
mod segments;

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use floe_image::messages::{FdTypes, FileEntry};
use floe_image::writer::EntryStream;
use floe_image::{ImageKind, ImageMessage, ImageWriter, WriteError};
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcDir;
use floe_options::DumpOptions;

use crate::namespace::{OwnerMap, PidView, TreeNamespaces};

pub use ahead::ask_ahead;
pub use error::{CollectError, Obstacle};
pub(crate) use fd_table::collect_description;
pub use fd_table::collect_fd_table;
pub use file_ids::{FileId, FileIds, make_room_for_descriptors};
pub use path_files::PathFile;
pub use probe::FdProbe;
pub(crate) use probe::{no_owner, own_link};
pub use segments::{Segment, SharedMemoryDevice};

/// Work that can be done only when the descriptors of all tasks are known.
type Deferred<'a> = Box<dyn FnOnce(&mut Collector<'a>) -> Result<(), CollectError> + 'a>;

/// One dump's collecting.
pub struct Collector<'a> {
    /// What was asked for.
    pub options: &'a DumpOptions,
    /// What this kernel can do.
    pub features: &'a KernelFeatures,
    writer: &'a ImageWriter,
    ids: FileIds,
    #[expect(
        clippy::vec_box,
        reason = "an entry has room for every kind and is large to move"
    )]
    files: Vec<Box<FileEntry>>,
    /// Pairs of a file and one that the image has to have before it.
    ordered: Vec<(FileId, FileId)>,
    sides: HashMap<(ImageKind, u64), EntryStream>,
    caches: HashMap<TypeId, Box<dyn Any>>,
    deferred: Vec<Deferred<'a>>,
    after_preflight: Vec<Deferred<'a>>,
    obstacles: Vec<Obstacle>,
    segments: BTreeMap<u64, Segment>,
    tree: HashSet<HostPid>,
    pids: Rc<PidView>,
    namespaces: TreeNamespaces,
}

impl<'a> Collector<'a> {
    /// A collector that writes side images through `writer`.
    pub fn new(
        options: &'a DumpOptions,
        features: &'a KernelFeatures,
        writer: &'a ImageWriter,
    ) -> Result<Self, CollectError> {
        Ok(Collector {
            options,
            features,
            writer,
            ids: FileIds::default(),
            files: Vec::new(),
            ordered: Vec::new(),
            sides: HashMap::new(),
            caches: HashMap::new(),
            deferred: Vec::new(),
            after_preflight: Vec::new(),
            obstacles: Vec::new(),
            segments: BTreeMap::new(),
            tree: HashSet::new(),
            pids: Rc::new(PidView::default()),
            namespaces: TreeNamespaces::new()?,
        })
    }

    /// Names the processes that are dumped, and how the images number them.
    pub fn set_tree(&mut self, processes: impl IntoIterator<Item = HostPid>, pids: Rc<PidView>) {
        self.tree = processes.into_iter().collect();
        self.pids = pids;
    }

    /// How the images have owners.
    pub fn owners(&self) -> &OwnerMap {
        self.pids.owners()
    }

    /// Whether a process with this number in the images is dumped.
    pub fn has_number(&self, number: u32) -> bool {
        self.tree
            .iter()
            .any(|process| self.pids.number(*process) == number)
    }

    /// How the images number processes.
    pub fn pids(&self) -> &Rc<PidView> {
        &self.pids
    }

    /// The processes that are dumped.
    pub fn tree(&self) -> impl Iterator<Item = HostPid> {
        self.tree.iter().copied()
    }

    /// Whether a process is dumped.
    pub fn is_in_tree(&self, process: HostPid) -> bool {
        self.tree.contains(&process)
    }

    /// The processes that are dumped, in no order.
    pub fn processes(&self) -> impl Iterator<Item = HostPid> {
        self.tree.iter().copied()
    }

    /// The namespaces that the tree has of its own.
    pub fn namespaces(&self) -> &TreeNamespaces {
        &self.namespaces
    }

    /// Notes the namespaces of a living task, the root's before all others.
    pub fn learn_namespaces(&mut self, task: &ProcDir) -> Result<(), CollectError> {
        self.namespaces.learn(task)
    }

    /// Notes in which pid namespace a zombie is.
    pub fn learn_zombie(&mut self, zombie: &ProcDir) -> Result<(), CollectError> {
        self.namespaces.learn_zombie(zombie)
    }

    /// Where images go.
    pub fn writer(&self) -> &'a ImageWriter {
        self.writer
    }

    /// Whether what is found is dropped: then nothing is made for it outside of the images either.
    pub fn only_looks(&self) -> bool {
        self.writer.is_nowhere()
    }

    /// Identities of open file descriptions and mapped files.
    pub fn ids(&mut self) -> &mut FileIds {
        &mut self.ids
    }

    /// Adds an entry to `files.img`.
    pub fn add_file(&mut self, entry: FileEntry) {
        self.files.push(Box::new(entry));
    }

    /// The entry of a file collected before, to be completed.
    pub(crate) fn file_mut(&mut self, id: FileId) -> Option<&mut FileEntry> {
        self.files
            .iter_mut()
            .find(|file| file.id == id.0)
            .map(|file| &mut **file)
    }

    /// Has the entry of `earlier` written before that of `file`, for readers that go through them once.
    pub(crate) fn write_after(&mut self, file: FileId, earlier: FileId) {
        self.ordered.push((file, earlier));
    }

    /// How many files were collected so far.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// The image `kind` with this `id`, to append to; begun with the first call. The collector ends it.
    pub fn side(&mut self, kind: ImageKind, id: u64) -> Result<&mut EntryStream, CollectError> {
        use std::collections::hash_map::Entry;
        match self.sides.entry((kind, id)) {
            Entry::Occupied(begun) => Ok(begun.into_mut()),
            Entry::Vacant(free) => Ok(free.insert(self.writer.stream(kind, id)?)),
        }
    }

    /// Appends one entry to the image `kind`.
    pub fn append_side<M: ImageMessage>(
        &mut self,
        kind: ImageKind,
        message: &M,
    ) -> Result<(), CollectError> {
        Ok(self.side(kind, 0)?.append(message)?)
    }

    /// A value that lives as long as the dump, made with the first call: a table of `sock_diag`, the
    /// pipes whose data was saved. Each kind uses a type of its own.
    pub fn cache<T: Any>(&mut self, make: impl FnOnce() -> T) -> &mut T {
        let value = self
            .caches
            .entry(TypeId::of::<T>())
            .or_insert_with(|| Box::new(make()));
        value.downcast_mut().expect("the key is the type's own id")
    }

    /// As [`Collector::cache`], for a value whose making can fail.
    pub fn try_cache<T: Any>(
        &mut self,
        make: impl FnOnce(&mut Self) -> Result<T, CollectError>,
    ) -> Result<&mut T, CollectError> {
        if !self.caches.contains_key(&TypeId::of::<T>()) {
            let value = make(self)?;
            self.caches.insert(TypeId::of::<T>(), Box::new(value));
        }
        Ok(self.cache::<T>(|| unreachable!("inserted above")))
    }

    /// Does `work` when the descriptors of all tasks have been collected.
    pub fn defer(
        &mut self,
        work: impl FnOnce(&mut Collector<'a>) -> Result<(), CollectError> + 'a,
    ) {
        self.deferred.push(Box::new(work));
    }

    /// Does `work` when nothing is known to be in the way of the dump: what is long or writes much.
    pub fn after_preflight(
        &mut self,
        work: impl FnOnce(&mut Collector<'a>) -> Result<(), CollectError> + 'a,
    ) {
        self.after_preflight.push(Box::new(work));
    }

    /// Does what was left for after the preflight.
    pub fn run_after_preflight(&mut self) -> Result<(), CollectError> {
        for work in std::mem::take(&mut self.after_preflight) {
            work(self)?;
        }
        Ok(())
    }

    /// Notes something that cannot be saved; the dump goes on looking for more and then refuses.
    pub fn obstacle(&mut self, obstacle: Obstacle) {
        // Mappings and threads may share one.
        if !self.obstacles.contains(&obstacle) {
            self.obstacles.push(obstacle);
        }
    }

    /// Turns `Unsupported` into an obstacle, and passes on all other results.
    pub fn note<T>(&mut self, result: Result<T, CollectError>) -> Result<Option<T>, CollectError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(CollectError::Unsupported(obstacle)) => {
                self.obstacle(obstacle);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Does the deferred work; what it defers itself comes after.
    pub fn run_deferred(&mut self) -> Result<(), CollectError> {
        while !self.deferred.is_empty() {
            for work in std::mem::take(&mut self.deferred) {
                let done = work(self);
                self.note(done)?;
            }
        }
        Ok(())
    }

    /// Everything that was found to be in the way so far.
    pub fn take_obstacles(&mut self) -> Vec<Obstacle> {
        std::mem::take(&mut self.obstacles)
    }

    /// Notes shared memory whose pages are to be saved; once noted, further mappings of it are free.
    pub fn add_segment(&mut self, segment: Segment) {
        self.segments.entry(segment.id).or_insert(segment);
    }

    /// Whether pages of shared memory with this number are to be saved.
    pub fn has_segment(&self, id: u64) -> bool {
        self.segments.contains_key(&id)
    }

    /// The shared memory found so far.
    pub fn take_segments(&mut self) -> BTreeMap<u64, Segment> {
        std::mem::take(&mut self.segments)
    }

    /// The device of the kernel's own tmpfs, where memfds and shared anonymous memory live.
    pub fn shared_memory_device(&mut self) -> Result<SharedMemoryDevice, CollectError> {
        Ok(*self.try_cache(|_| SharedMemoryDevice::probe())?)
    }

    /// Writes `files.img` and ends the side images.
    pub fn finish(self) -> Result<(), WriteError> {
        let mut files = self.writer.stream(ImageKind::Files, 0)?;
        for entry in order_files(self.files, &self.ordered) {
            if let (Some(_), Some(reg)) = (&entry.tunf, &entry.reg) {
                // Readers look for the name in an entry of its own with the same number.
                let mut name = crate::fd::file_entry(FdTypes::Reg, FileId(entry.id));
                name.reg = Some(reg.clone());
                files.append(&name)?;
            }
            files.append(&*entry)?;
        }
        files.finish()?;
        for (_, stream) in self.sides {
            stream.finish()?;
        }
        Ok(())
    }
}

/// Moves files behind those that they are to follow; where two are to follow each other, one does not.
#[expect(clippy::vec_box, reason = "an entry is large to move")]
fn order_files(files: Vec<Box<FileEntry>>, ordered: &[(FileId, FileId)]) -> Vec<Box<FileEntry>> {
    let mut earlier: HashMap<u32, Vec<u32>> = HashMap::new();
    for (file, first) in ordered {
        earlier.entry(file.0).or_default().push(first.0);
    }
    let numbers: Vec<u32> = files.iter().map(|file| file.id).collect();
    let mut left: HashMap<u32, Box<FileEntry>> =
        files.into_iter().map(|file| (file.id, file)).collect();
    let mut result = Vec::with_capacity(numbers.len());
    for number in numbers {
        // Each is pushed, opened up once, and written when what it follows has been.
        let mut waiting = vec![number];
        while let Some(&last) = waiting.last() {
            match earlier.remove(&last) {
                Some(first) => waiting.extend(first),
                None => {
                    result.extend(left.remove(&last));
                    waiting.pop();
                }
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_follow_what_they_are_to_follow() {
        let file = |id| {
            Box::new(FileEntry {
                id,
                ..FileEntry::default()
            })
        };
        let files = (1..=5).map(file).collect();
        let pairs = [(1, 3), (3, 5), (5, 3), (2, 1)].map(|(a, b)| (FileId(a), FileId(b)));
        let order: Vec<u32> = order_files(files, &pairs)
            .iter()
            .map(|file| file.id)
            .collect();
        assert_eq!(order, [3, 5, 1, 2, 4]);
    }
}
