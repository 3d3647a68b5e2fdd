//! What a save does to its directory, as a disk sees it.

use crate::map::disk::{self, Op, Watch};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;

/// A file, whatever its name: inode numbers are used again, these are not.
pub(super) type FileId = usize;

/// One thing that happened, in the order it happened.
#[derive(Debug, Clone)]
pub(super) enum Change {
    Create(FileId, OsString),
    Rename(FileId, OsString, OsString),
    Remove(FileId, OsString),
    /// A new length; what it adds reads as zeros.
    Size(FileId, usize),
    /// New bytes in one sector, given by its number. The last one of a file may be short.
    Sector(FileId, usize, Arc<[u8]>),
    /// Content and length of a file are durable, as they were here.
    Sync(FileId),
    /// All names are, as they were here.
    SyncDir,
    /// The caller was told that this generation is durable.
    Saved(u8),
}

/// Names and contents.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    pub(super) names: BTreeMap<OsString, FileId>,
    pub(super) files: Vec<Vec<u8>>,
}

/// What was there, and what happened to it.
#[derive(Debug, Clone)]
pub(super) struct Log {
    pub(super) start: Disk,
    pub(super) changes: Vec<Change>,
    /// The first operation that was refused, by its kind.
    pub(super) refused: Option<&'static str>,
}

/// An operation that is refused instead of done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    /// Which one, counted from 1.
    pub(super) at: usize,
    pub(super) errno: i32,
    /// Whether everything after it is refused as well, as by a disk that died.
    pub(super) for_good: bool,
}

/// Does `work` on the directory at `root`, and writes down what it did. `work` is given a way to say that a
/// generation is saved.
pub(super) fn record<T>(root: &Path, fault: Option<Fault>, work: impl FnOnce(&dyn Fn(u8)) -> T) -> (T, Log) {
    let recorder = Arc::new(Recorder::new(root, fault));
    let saved = |generation| recorder.with(|state| state.changes.push(Change::Saved(generation)));
    let done = disk::watched(Some(recorder.clone()), || work(&saved));
    let log = recorder.with(|state| Log {
        start: state.start.clone(),
        changes: std::mem::take(&mut state.changes),
        refused: state.refused,
    });
    (done, log)
}

impl Log {
    /// The last generation that the caller was told is durable.
    pub(super) fn saved(&self) -> Option<u8> {
        self.changes.iter().rev().find_map(|change| match change {
            Change::Saved(generation) => Some(*generation),
            _ => None,
        })
    }
}

struct Recorder {
    root: PathBuf,
    inode: u64,
    fault: Option<Fault>,
    state: Mutex<State>,
}

struct State {
    start: Disk,
    now: Disk,
    inodes: BTreeMap<u64, FileId>,
    /// Files renamed to a temporary's name, to be used again. They come under a lease, which opening them would
    /// break: they are read through the descriptor of whoever uses them.
    hidden: BTreeMap<FileId, Option<File>>,
    changes: Vec<Change>,
    operations: usize,
    refused: Option<&'static str>,
}

impl Recorder {
    fn new(root: &Path, fault: Option<Fault>) -> Self {
        let (mut start, mut inodes) = (Disk::default(), BTreeMap::new());
        for entry in std::fs::read_dir(root).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            assert!(metadata.is_file(), "only files are followed");
            let id = *inodes.entry(metadata.ino()).or_insert(start.files.len());
            if id == start.files.len() {
                start.files.push(std::fs::read(entry.path()).unwrap());
            }
            start.names.insert(entry.file_name(), id);
        }
        let state = State {
            now: start.clone(),
            start,
            inodes,
            hidden: BTreeMap::new(),
            changes: Vec::new(),
            operations: 0,
            refused: None,
        };
        let inode = std::fs::metadata(root).unwrap().ino();
        Self { root: root.into(), inode, fault, state: Mutex::new(state) }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }

    fn observe(&self, op: &Op<'_>) {
        // Under a lease nobody may open the file, this recorder included: what is written to is read through
        // the writer's own descriptor.
        let writer = match op {
            Op::Write(file, ..) => Some(*file),
            _ => None,
        };
        self.with(|state| state.observe(&self.root, writer));
    }
}

fn is_temporary(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(".maptensors-")
}

fn read_through(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

impl State {
    /// Contents are looked at, not believed: a write through a mapping passes no operation.
    fn observe(&mut self, root: &Path, writer: Option<&File>) {
        let written = writer.and_then(|file| self.id(file));
        let mut gone = Vec::new();
        for (name, &id) in &self.now.names {
            let bytes = match (self.hidden.get(&id), writer) {
                (Some(None), _) => continue,
                (Some(Some(file)), _) => read_through(file),
                (None, Some(file)) if Some(id) == written => read_through(file),
                _ => match std::fs::read(root.join(name)) {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        // Removed past the seam, which a clean-up may.
                        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{name:?}");
                        gone.push(name.clone());
                        continue;
                    }
                },
            };
            let known = &mut self.now.files[id];
            if *known == bytes {
                continue;
            }
            if known.len() != bytes.len() {
                self.changes.push(Change::Size(id, bytes.len()));
                known.resize(bytes.len(), 0);
            }
            for (i, (old, new)) in known.chunks(SECTOR).zip(bytes.chunks(SECTOR)).enumerate() {
                if old != new {
                    self.changes.push(Change::Sector(id, i, new.into()));
                }
            }
            *known = bytes;
        }
        for name in gone {
            let id = self.now.names.remove(&name).unwrap();
            self.changes.push(Change::Remove(id, name));
        }
    }

    /// Keeps a way to read a hidden file, once there is one.
    fn hold(&mut self, op: &Op<'_>) {
        let (Op::Allocate(file, _) | Op::Resize(file, _) | Op::SetMode(file) | Op::Sync(file)) = op else {
            return;
        };
        if let Some(held @ None) = self.id(file).and_then(|id| self.hidden.get_mut(&id)) {
            *held = Some(file.try_clone().unwrap());
        }
    }

    fn id(&self, file: &File) -> Option<FileId> {
        self.inodes.get(&file.metadata().unwrap().ino()).copied()
    }

    fn follow(&mut self, root: &Path, op: &Op<'_>) {
        match *op {
            Op::Create(_, name) => {
                let id = self.now.files.len();
                self.now.files.push(Vec::new());
                self.inodes.insert(std::fs::symlink_metadata(root.join(name)).unwrap().ino(), id);
                self.now.names.insert(name.into(), id);
                self.changes.push(Change::Create(id, name.into()));
            }
            Op::Rename(_, from, to) => {
                let id = self.now.names.remove(from).unwrap();
                self.now.names.insert(to.into(), id);
                match (is_temporary(from), is_temporary(to)) {
                    (false, true) => drop(self.hidden.insert(id, None)),
                    (true, false) => drop(self.hidden.remove(&id)),
                    _ => {}
                }
                self.changes.push(Change::Rename(id, from.into(), to.into()));
            }
            Op::Remove(_, name) => {
                let id = self.now.names.remove(name).unwrap();
                self.changes.push(Change::Remove(id, name.into()));
            }
            Op::Sync(file) => self.changes.extend(self.id(file).map(Change::Sync)),
            Op::SyncDir(_) => self.changes.push(Change::SyncDir),
            _ => {}
        }
    }
}

impl Watch for Recorder {
    fn before(&self, op: &Op<'_>) -> io::Result<()> {
        if let Op::Create(dir, _) | Op::Rename(dir, ..) | Op::Remove(dir, _) | Op::SyncDir(dir) = op {
            assert_eq!(dir.inode(), self.inode, "a directory that is not followed");
        }
        self.with(|state| state.hold(op));
        self.observe(op);
        self.with(|state| {
            state.operations += 1;
            let Some(fault) = self.fault else { return Ok(()) };
            if state.operations == fault.at || (fault.for_good && state.operations > fault.at) {
                state.refused.get_or_insert(kind(op));
                return Err(io::Error::from_raw_os_error(fault.errno));
            }
            Ok(())
        })
    }

    fn after(&self, op: &Op<'_>, done: bool) {
        if done {
            self.with(|state| state.follow(&self.root, op));
        }
        self.observe(op);
    }
}

/// What an operation is called in reports.
fn kind(op: &Op<'_>) -> &'static str {
    match op {
        Op::OpenDir(_) => "open directory",
        Op::Create(..) => "create",
        Op::Open(..) => "open",
        Op::Rename(..) => "rename",
        Op::Remove(..) => "remove",
        Op::SyncDir(_) => "sync directory",
        Op::Allocate(..) => "allocate",
        Op::Resize(..) => "resize",
        Op::Write(..) => "write",
        Op::SetMode(_) => "set mode",
        Op::Sync(_) => "sync",
        Op::Copy(..) => "copy",
    }
}

impl Change {
    /// The file whose content this changes.
    pub(super) fn content_of(&self) -> Option<FileId> {
        match *self {
            Self::Size(id, _) | Self::Sector(id, ..) => Some(id),
            _ => None,
        }
    }

    /// Whether this changes names.
    pub(super) fn is_name(&self) -> bool {
        matches!(self, Self::Create(..) | Self::Rename(..) | Self::Remove(..))
    }

    /// Whether this gives a name that `chosen` picks to a file that had another.
    pub(super) fn renames_to(&self, chosen: impl Fn(&OsStr) -> bool) -> Option<FileId> {
        match self {
            Self::Rename(id, _, to) if chosen(to) => Some(*id),
            _ => None,
        }
    }
}
