//! A file on its way to its name: the commit protocol's steps, in their only order.

use super::beside;
use crate::error::{Error, Result};
use crate::map::cancel::Unfinished;
use crate::map::disk::Dir;
use crate::map::{ExclusiveFile, mode_of_new_files};
use rustix::fs::FileType;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An unfinished file beside the path it is meant for. Dropped without
/// [`publish`](Pending::publish), it leaves nothing behind.
pub(crate) struct Pending {
    dir: Arc<Dir>,
    path: PathBuf,
    name: OsString,
    file: ExclusiveFile,
    /// Removed by whoever calls the work off.
    unfinished: Unfinished,
    /// The mode of the file to be replaced, if there is one.
    mode: Option<u32>,
    published: bool,
    /// A fork's child has a copy of this value, and no business with the file.
    owner: u32,
}

impl Pending {
    /// Step 1: a temporary sibling of `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        Self::create_with(path, None)
    }

    /// As [`create`](Pending::create), of a file that is to have this mode.
    pub(crate) fn create_with(path: &Path, mode: Option<u32>) -> Result<Self> {
        let name = file_name(path)?;
        let dir = open_dir(path)?;
        let mode = mode.or(replaced_mode(&dir, path, name)?);
        ExclusiveFile::sweep(&dir);
        // A replacement is nobody else's to read until it has the old file's mode.
        let file = ExclusiveFile::create(&dir, if mode.is_some() { 0o600 } else { 0o666 })
            .map_err(Error::io(path, "creating a temporary file beside it"))?;
        Ok(Self::new(dir, file, path, name, mode))
    }

    /// As step 1, of a file in the directory at `parent` whose name is not known yet: see
    /// [`aim`](Pending::aim).
    pub(crate) fn unnamed(parent: &Path) -> Result<Self> {
        let path = parent.join("");
        let dir = Dir::open(parent).map_err(Error::io(parent, "opening the directory"))?;
        ExclusiveFile::sweep(&dir);
        let file = ExclusiveFile::create(&dir, 0o600)
            .map_err(Error::io(parent, "creating a temporary file in it"))?;
        Ok(Self::new(dir, file, &path, OsStr::new(""), None))
    }

    /// As step 1, out of the [hidden](ExclusiveFile::hide) file at `path`, whose blocks and pages are used
    /// again. `None`, with that file removed, where somebody still has it.
    #[cfg(target_os = "linux")]
    pub(crate) fn adopt(path: &Path) -> Result<Option<Self>> {
        let name = file_name(path)?;
        let dir = open_dir(path)?;
        let file = ExclusiveFile::adopt(&dir, name);
        let file = file.map_err(Error::io(path, "taking over its space"))?;
        Ok(file.map(|file| Self::new(dir, file, path, name, None)))
    }

    fn new(dir: Dir, file: ExclusiveFile, path: &Path, name: &OsStr, mode: Option<u32>) -> Self {
        let (dir, owner) = (Arc::new(dir), std::process::id());
        let unfinished = Unfinished::new(&dir, file.name());
        Self { dir, path: path.into(), name: name.into(), file, unfinished, mode, published: false, owner }
    }

    /// Means the file for another path in the same directory, with the mode that a file made there would have.
    pub(crate) fn aim(&mut self, path: &Path) -> Result<()> {
        let name = file_name(path)?;
        self.mode = replaced_mode(&self.dir, path, name)?.or_else(mode_of_new_files);
        (self.path, self.name) = (path.into(), name.into());
        Ok(())
    }

    /// Gives the file this mode, whatever the umask or the file that it replaces.
    pub(crate) fn set_mode(&mut self, mode: u32) {
        self.mode = Some(mode);
    }

    /// Whether the file is still where it was made.
    pub(crate) fn is_in_place(&self) -> bool {
        self.file.is_in(&self.dir)
    }

    /// The directory it is made in.
    pub(super) fn dir(&self) -> &Arc<Dir> {
        &self.dir
    }

    /// The path this file is meant for.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &ExclusiveFile {
        &self.file
    }

    /// Step 2: all space, now. `false` where it can only be written, not mapped.
    pub(crate) fn allocate(&self, len: u64) -> Result<bool> {
        self.file.allocate(len).map_err(Error::io(&self.path, "allocating space for it"))
    }

    /// As [`publish`](Pending::publish), of a whole model: a sharded set of its name goes, whose place it takes.
    pub(crate) fn publish_model(self, durable: bool) -> Result<()> {
        beside::publish_model(self, durable)
    }

    /// Steps 4 to 6: mode, sync, rename, sync of the directory.
    pub(crate) fn publish(mut self, durable: bool) -> Result<()> {
        let path = self.path.clone();
        // It may have been filled under another work than this.
        self.unfinished.take_on(&self.dir).map_err(Error::io(&path, "finishing it"))?;
        if let Some(mode) = self.mode {
            self.file.set_mode(mode).map_err(Error::io(&path, "setting its mode"))?;
        }
        if durable {
            self.file.sync().map_err(Error::io(&path, "writing it to disk"))?;
        }
        self.file.release().map_err(Error::io(&path, "giving up its lease"))?;
        self.unfinished
            .finish(|| self.dir.rename(self.file.name(), &self.name))
            .map_err(Error::io(&path, "renaming the finished file into place"))?;
        self.published = true;
        if durable {
            self.dir.sync().map_err(|source| Error::NotDurable { path, source })?;
        }
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.published && self.owner == std::process::id() {
            self.dir.remove(self.file.name()).ok();
        }
    }
}

/// The last component, which names a file. (`Path::file_name` looks past a trailing slash.)
pub(super) fn file_name(path: &Path) -> Result<&OsStr> {
    let whole = path.as_os_str().as_encoded_bytes();
    let name = path.file_name().filter(|name| whole.ends_with(name.as_encoded_bytes()));
    name.ok_or_else(|| Error::Argument(format!("{} names no file", path.display())))
}

fn open_dir(path: &Path) -> Result<Dir> {
    Dir::open(path.parent().unwrap_or(Path::new(""))).map_err(Error::io(path, "opening its directory"))
}

/// The mode of the file at `path`, if there is one; refuses what a rename would wrongly replace.
pub(super) fn replaced_mode(dir: &Dir, path: &Path, name: &OsStr) -> Result<Option<u32>> {
    // Followed, for a link to a device is as bad as the device; a dangling link counts as nothing.
    let stat = match dir.stat(name) {
        Ok(stat) => stat,
        Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(Error::io(path, "looking at the file to replace")(error.into())),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(stat.st_mode & 0o777)),
        FileType::Directory => Err(Error::NotRegular { path: path.into(), found: "a directory" }),
        _ => Err(Error::NotRegular { path: path.into(), found: "a device, FIFO or socket" }),
    }
}
