//! A file on its way to its name: the commit protocol's steps, in their only order.

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
    /// Whether it goes to its path or nowhere: its directory is others' as well, who remove by name there.
    stays: bool,
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
        Self::begin(&Arc::new(open_dir(path)?), path, mode)
    }

    /// As [`create_with`](Pending::create_with), in a directory that is open. If that is not where it was opened any
    /// more when the file is to get its name, it does not get it.
    pub(crate) fn create_in(dir: &Arc<Dir>, path: &Path, mode: Option<u32>) -> Result<Self> {
        Ok(Self::begin(dir, path, mode)?.staying())
    }

    fn begin(dir: &Arc<Dir>, path: &Path, mode: Option<u32>) -> Result<Self> {
        let name = file_name(path)?;
        let mode = mode.or(replaced_mode(dir, path, name)?);
        ExclusiveFile::sweep(dir);
        // A replacement is nobody else's to read until it has the old file's mode.
        let file = ExclusiveFile::create(dir, if mode.is_some() { 0o600 } else { 0o666 });
        if file.is_err() {
            dir.stands("nothing was saved")?;
        }
        let file = file.map_err(Error::io(path, "creating a temporary file beside it"))?;
        Ok(Self::new(dir, file, path, name, mode))
    }

    /// As [`create_in`](Pending::create_in), of a file in the directory at `parent` whose name is not known yet: see
    /// [`aim`](Pending::aim).
    pub(crate) fn unnamed(dir: &Arc<Dir>, parent: &Path) -> Result<Self> {
        let path = parent.join("");
        ExclusiveFile::sweep(dir);
        let file = ExclusiveFile::create(dir, 0o600)
            .map_err(Error::io(parent, "creating a temporary file in it"))?;
        Ok(Self::new(dir, file, &path, OsStr::new(""), None).staying())
    }

    /// As [`unnamed`](Pending::unnamed), out of the [hidden](ExclusiveFile::hide) file of that name, whose blocks and
    /// pages are used again. `None`, with that file removed, where somebody still has it.
    #[cfg(target_os = "linux")]
    pub(crate) fn adopt(dir: &Arc<Dir>, parent: &Path, hidden: &OsStr) -> Result<Option<Self>> {
        let path = parent.join(hidden);
        let file = ExclusiveFile::adopt(dir, hidden);
        let file = file.map_err(Error::io(&path, "taking over its space"))?;
        Ok(file.map(|file| Self::new(dir, file, &path, hidden, None).staying()))
    }

    fn new(dir: &Arc<Dir>, file: ExclusiveFile, path: &Path, name: &OsStr, mode: Option<u32>) -> Self {
        let (dir, owner) = (dir.clone(), std::process::id());
        let unfinished = Unfinished::new(&dir, file.name());
        let (stays, published) = (false, false);
        Self { dir, path: path.into(), name: name.into(), file, unfinished, mode, stays, published, owner }
    }

    fn staying(mut self) -> Self {
        self.stays = true;
        self
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
        if self.stays {
            self.dir.stands("nothing was saved; begin again where it is to be")?;
        }
        let renamed = self.unfinished.finish(|| self.dir.rename(self.file.name(), &self.name));
        if renamed.is_err() {
            self.dir.stands("nothing was saved")?;
        }
        renamed.map_err(Error::io(&path, "renaming the finished file into place"))?;
        self.published = true;
        if durable {
            self.dir.sync().map_err(|source| Error::NotDurable { path, source })?;
        }
        if self.stays {
            return Ok(()); // looked at just before
        }
        // What was filled for hours is not thrown away for that.
        self.dir.stands(
            "the file was saved in that directory, whole, and is not at the path that it was begun for",
        )
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
fn file_name(path: &Path) -> Result<&OsStr> {
    let whole = path.as_os_str().as_encoded_bytes();
    let name = path.file_name().filter(|name| whole.ends_with(name.as_encoded_bytes()));
    name.ok_or_else(|| Error::Argument(format!("{} names no file", path.display())))
}

fn open_dir(path: &Path) -> Result<Dir> {
    Dir::open(path.parent().unwrap_or(Path::new(""))).map_err(Error::io(path, "opening its directory"))
}

/// The mode of the file at `path`, if there is one; refuses what a rename would wrongly replace.
fn replaced_mode(dir: &Dir, path: &Path, name: &OsStr) -> Result<Option<u32>> {
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
