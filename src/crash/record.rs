//! What a save does to its directory, as a disk sees it.

use crate::os::disk::{self, Op, Watch};
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
    /// A name for a file that was made without one.
    Link(FileId, OsString),
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
    pub(super) kind: Kind,
}

/// What a disk makes of files without a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    /// Whether there are any.
    pub(super) unnamed: bool,
    /// Whether savers take it to keep what was synced of one.
    pub(super) told: bool,
    /// Whether it does.
    pub(super) keeps: bool,
}

impl Kind {
    /// Every file has a name from the start.
    pub(super) const NAMED: Self = Self { unnamed: false, told: false, keeps: false };
    /// As ext4 and XFS.
    pub(super) const KEEPS: Self = Self { unnamed: true, told: true, keeps: true };
    /// As Btrfs may.
    pub(super) const FORGETS: Self = Self { unnamed: true, told: false, keeps: false };

    pub(super) const ALL: [Self; 3] = [Self::NAMED, Self::KEEPS, Self::FORGETS];
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
pub(super) fn record<T>(
    root: &Path,
    kind: Kind,
    fault: Option<Fault>,
    work: impl FnOnce(&dyn Fn(u8)) -> T,
) -> (T, Log) {
    let recorder = Arc::new(Recorder::new(root, kind, fault));
    let saved = |generation| recorder.with(|state| state.changes.push(Change::Saved(generation)));
    let done = disk::watched(Some(recorder.clone()), || work(&saved));
    let log = recorder.with(|state| Log {
        start: state.start.clone(),
        changes: std::mem::take(&mut state.changes),
        refused: state.refused,
        kind,
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
    kind: Kind,
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
    /// Files without a name, read through the descriptor of whoever makes them. Given back once they have one: a file
    /// that is to be used again may be open nowhere else.
    unnamed: BTreeMap<FileId, File>,
    changes: Vec<Change>,
    operations: usize,
    refused: Option<&'static str>,
}

impl Recorder {
    fn new(root: &Path, kind: Kind, fault: Option<Fault>) -> Self {
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
            unnamed: BTreeMap::new(),
            changes: Vec::new(),
            operations: 0,
            refused: None,
        };
        let inode = std::fs::metadata(root).unwrap().ino();
        Self { root: root.into(), inode, kind, fault, state: Mutex::new(state) }
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
        let unnamed: Vec<_> = self.unnamed.iter().map(|(&id, file)| (id, read_through(file))).collect();
        for (id, bytes) in unnamed {
            self.changed(id, bytes);
        }
        let names: Vec<_> = self.now.names.iter().map(|(name, &id)| (name.clone(), id)).collect();
        for (name, id) in names {
            let bytes = match (self.hidden.get(&id), writer) {
                (Some(None), _) => continue,
                (Some(Some(file)), _) => read_through(file),
                (None, Some(file)) if Some(id) == written => read_through(file),
                _ => match std::fs::read(root.join(&name)) {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        // Removed past the seam, which a clean-up may.
                        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{name:?}");
                        gone.push(name);
                        continue;
                    }
                },
            };
            self.changed(id, bytes);
        }
        for name in gone {
            let id = self.now.names.remove(&name).unwrap();
            self.changes.push(Change::Remove(id, name));
        }
    }

    /// Writes down in what a file's bytes differ from those that it had.
    fn changed(&mut self, id: FileId, bytes: Vec<u8>) {
        let known = &mut self.now.files[id];
        if *known == bytes {
            return;
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

    /// Keeps a way to read a hidden file, or one without a name, once there is one.
    fn hold(&mut self, op: &Op<'_>) {
        if let Op::Lock(file) = op
            && file.metadata().unwrap().nlink() == 0
        {
            let id = self.now.files.len();
            self.now.files.push(Vec::new());
            self.inodes.insert(file.metadata().unwrap().ino(), id);
            self.unnamed.insert(id, file.try_clone().unwrap());
        }
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

    fn follow(&mut self, root: &Path, kind: Kind, op: &Op<'_>) {
        match *op {
            Op::Create(_, name) => {
                let id = self.now.files.len();
                self.now.files.push(Vec::new());
                self.inodes.insert(std::fs::symlink_metadata(root.join(name)).unwrap().ino(), id);
                self.now.names.insert(name.into(), id);
                self.changes.push(Change::Create(id, name.into()));
            }
            Op::Link(_, file, name) => {
                let id = self.id(file).unwrap();
                self.unnamed.remove(&id);
                self.now.names.insert(name.into(), id);
                self.changes.push(Change::Link(id, name.into()));
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
            Op::Sync(file) => {
                let synced = self.id(file).filter(|id| kind.keeps || !self.unnamed.contains_key(id));
                self.changes.extend(synced.map(Change::Sync));
            }
            Op::SyncDir(_) => self.changes.push(Change::SyncDir),
            _ => {}
        }
    }
}

impl Watch for Recorder {
    fn before(&self, op: &Op<'_>) -> io::Result<()> {
        if let Op::Create(dir, _)
        | Op::CreateUnnamed(dir)
        | Op::Link(dir, ..)
        | Op::Rename(dir, ..)
        | Op::Remove(dir, _)
        | Op::SyncDir(dir) = op
        {
            assert_eq!(dir.inode(), self.inode, "a directory that is not followed");
        }
        if matches!(op, Op::CreateUnnamed(_)) && !self.kind.unnamed {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
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

    fn syncs_unnamed(&self) -> bool {
        self.kind.told
    }

    fn after(&self, op: &Op<'_>, done: bool) {
        if done {
            self.with(|state| state.follow(&self.root, self.kind, op));
        }
        self.observe(op);
    }
}

/// What an operation is called in reports.
fn kind(op: &Op<'_>) -> &'static str {
    match op {
        Op::OpenDir(_) => "open directory",
        Op::Create(..) => "create",
        Op::CreateUnnamed(_) => "create without a name",
        Op::Link(..) => "link",
        Op::Lock(_) => "lock",
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
        matches!(self, Self::Create(..) | Self::Link(..) | Self::Rename(..) | Self::Remove(..))
    }

    /// Whether this gives a name that `chosen` picks to a file that had another, or none.
    pub(super) fn names(&self, chosen: impl Fn(&OsStr) -> bool) -> Option<FileId> {
        match self {
            Self::Link(id, to) | Self::Rename(id, _, to) if chosen(to) => Some(*id),
            _ => None,
        }
    }

    /// Whether this gives a name that `chosen` picks to a file that had another.
    pub(super) fn renames_to(&self, chosen: impl Fn(&OsStr) -> bool) -> Option<FileId> {
        match self {
            Self::Rename(id, _, to) if chosen(to) => Some(*id),
            _ => None,
        }
    }
}
