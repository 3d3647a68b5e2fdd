//! A file on its way to its name: the commit protocol's steps, in their only order.

use super::beside;
use crate::error::{Error, Result};
use crate::os;
use crate::os::Unfinished;
use crate::os::disk::{self, Dir};
use crate::os::fork::Owner;
use crate::os::{ExclusiveFile, mode_of_new_files};
use rustix::fs::FileType;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An unfinished file that is meant for a path: without a name, or beside that under a random one. Dropped without
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
    owner: Owner,
}

impl Pending {
    /// Step 1: a file in the directory of `path`, without a name where that can be.
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
        let (dir, owner) = (dir.clone(), Owner::me());
        let unfinished = Unfinished::new(&dir, file.name());
        let (stays, published) = (false, false);
        Self { dir, path: path.into(), name: name.into(), file, unfinished, mode, stays, published, owner }
    }

    fn staying(mut self) -> Self {
        self.stays = true;
        self
    }

    /// # Errors
    /// In a fork's child: it has a copy of this value, and no business with the file.
    pub(crate) fn own(&self) -> Result<()> {
        self.owner.check(&format!("the unfinished {}", self.path.display()))
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

    /// Whether the file, if it has a name, is still where it was made.
    pub(crate) fn is_in_place(&self) -> bool {
        self.file.is_in(&self.dir)
    }

    /// Whether its directory is held open for more than this file: of checkpoints, a publication, or a set.
    pub(crate) fn stays(&self) -> bool {
        self.stays
    }

    /// The directory it is made in.
    pub(crate) fn dir(&self) -> &Arc<Dir> {
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

    /// Steps 4 to 6: mode, sync, name, sync of the directory. Nobody holds memory of the file any more.
    pub(crate) fn publish(mut self, durable: bool) -> Result<()> {
        self.own()?;
        let path = self.path.clone();
        // It may have been filled under another work than this.
        self.unfinished.take_on(&self.dir).map_err(Error::io(&path, "finishing it"))?;
        if let Some(mode) = self.mode {
            self.file.set_mode(mode).map_err(Error::io(&path, "setting its mode"))?;
        }
        if durable && self.file.name().is_none() && !disk::syncs_unnamed(self.file.file()) {
            self.give_name(false)?;
        }
        if durable {
            self.file.sync().map_err(Error::io(&path, "writing it to disk"))?;
        }
        if !self.file.is_undisputed() {
            // Somebody has waited for what this was, perhaps for longer than the kernel has them wait: they may have
            // it open by now, and to write. They may keep it.
            self.copy_out(durable)?;
        }
        self.file.release().map_err(Error::io(&path, "giving up its lease"))?;
        if self.stays {
            self.dir.stands("nothing was saved; begin again where it is to be")?;
        }
        let placed = self.place(durable);
        if placed.is_err() {
            self.dir.stands("nothing was saved")?;
        }
        placed?;
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

    /// Gives the file its name, in place of what has that.
    fn place(&mut self, durable: bool) -> Result<()> {
        let renaming = "renaming the finished file into place";
        if self.file.name().is_none() && !self.dir.contains(&self.name) {
            match self.unfinished.finish(|| self.dir.link(self.file.file(), &self.name)) {
                Ok(()) => return Ok(()),
                Err(error) if is_canceled(&error) => return Err(Error::io(&self.path, renaming)(error)),
                // Somebody was faster, or it cannot be.
                Err(_) => {}
            }
        }
        if self.file.name().is_none() {
            self.give_name(durable)?;
        }
        let hidden = self.file.name().unwrap_or_default();
        self.unfinished
            .finish(|| self.dir.rename(hidden, &self.name))
            .map_err(Error::io(&self.path, renaming))?;
        Ok(())
    }

    /// Gives a file that has no name a random one, out of which it can be renamed over another. Where that is refused,
    /// it is copied into one that was made with a name.
    fn give_name(&mut self, durable: bool) -> Result<()> {
        let Self { unfinished, dir, file, .. } = self;
        match unfinished.named(dir, || file.link_hidden(dir)) {
            Err(error) if is_canceled(&error) => {
                Err(Error::io(&self.path, "naming the finished file")(error))
            }
            Err(_) => self.copy_out(durable),
            Ok(()) => Ok(()),
        }
    }

    /// Goes on with a copy of the file, which has a random name from the start.
    fn copy_out(&mut self, durable: bool) -> Result<()> {
        let io = |action| Error::io(&self.path, action);
        let Self { unfinished, dir, .. } = self;
        let mut made = None;
        let named = unfinished.named(dir, || {
            let file = made.insert(ExclusiveFile::create_named(dir, 0o600)?);
            Ok(file.name().unwrap_or_default().into())
        });
        named.map_err(io("creating a temporary file beside it"))?;
        let Some(made) = made else { return Ok(()) };
        let old = std::mem::replace(&mut self.file, made);
        if let Some(hidden) = old.name() {
            dir.remove(hidden).ok();
        }
        let copied = old.file().metadata().and_then(|metadata| {
            self.file.allocate(metadata.len())?;
            os::clone_or_copy(old.file(), self.file.file(), metadata.len())?;
            self.file.set_mode(metadata.mode() & 0o777)?;
            if durable { self.file.sync() } else { Ok(()) }
        });
        copied.map_err(io("copying it into a file that can be renamed"))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(hidden) = self.file.name().filter(|_| !self.published && self.owner.is_me()) {
            self.dir.remove(hidden).ok();
        }
    }
}

fn is_canceled(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECANCELED)
}

/// The last component, which names a file. (`Path::file_name` looks past a trailing slash.)
pub(crate) fn file_name(path: &Path) -> Result<&OsStr> {
    let whole = path.as_os_str().as_encoded_bytes();
    let name = path.file_name().filter(|name| whole.ends_with(name.as_encoded_bytes()));
    name.ok_or_else(|| Error::Argument(format!("{} names no file", path.display())))
}

fn open_dir(path: &Path) -> Result<Dir> {
    Dir::open(path.parent().unwrap_or(Path::new(""))).map_err(Error::io(path, "opening its directory"))
}

/// The mode of the file at `path`, if there is one; refuses what a rename would wrongly replace.
pub(crate) fn replaced_mode(dir: &Dir, path: &Path, name: &OsStr) -> Result<Option<u32>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::disk::{Op, Watch, watched};
    #[cfg(target_os = "linux")]
    use std::time::Duration;

    /// In memory, where the kernel tells who has a file open: below a container's overlay it does not.
    #[cfg(target_os = "linux")]
    fn leasing() -> tempfile::TempDir {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_somebody_waits_to_open_is_left_to_them_and_a_copy_published() {
        for waits in [false, true] {
            let temporary = leasing();
            let at = |name: &str| temporary.path().join(name);
            std::fs::write(at("old"), b"old").unwrap();
            let dir = Arc::new(Dir::open(temporary.path()).unwrap());
            let hidden = ExclusiveFile::hide(&dir, "old".as_ref()).unwrap();
            let mut pending = Pending::adopt(&dir, temporary.path(), &hidden).unwrap().unwrap();
            let path = temporary.path().join(hidden);
            let inode = pending.file().file().metadata().unwrap().ino();
            pending.file().write_all_at(b"new", 0).unwrap();
            pending.aim(&at("new")).unwrap();
            // As one who had looked the old name up before it was gone.
            let reader = waits.then(|| std::thread::spawn(move || std::fs::File::open(path).unwrap()));
            while pending.file().is_undisputed() == waits {
                std::thread::sleep(Duration::from_millis(1));
            }
            pending.publish(true).unwrap();
            assert_eq!(std::fs::read(at("new")).unwrap(), b"new");
            assert_eq!(std::fs::metadata(at("new")).unwrap().ino() == inode, !waits);
            if let Some(reader) = reader {
                assert_eq!(reader.join().unwrap().metadata().unwrap().ino(), inode);
            }
            assert_eq!(dir.names().unwrap(), ["new"]);
        }
    }

    /// Refuses all links, as some security policies do.
    struct NoLinks;

    impl Watch for NoLinks {
        fn before(&self, op: &Op<'_>) -> io::Result<()> {
            if matches!(op, Op::Link(..)) { Err(Errno::PERM.into()) } else { Ok(()) }
        }
        fn after(&self, _: &Op<'_>, _: bool) {}
    }

    #[test]
    fn where_no_link_may_be_made_a_copy_is_published_with_the_same_mode() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("model");
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o777;
        for (bytes, wanted) in [(&b"first"[..], None), (b"second", None), (b"third", Some(0o640))] {
            let before = if path.exists() { Some(mode()) } else { mode_of_new_files() };
            watched(Some(Arc::new(NoLinks)), || {
                let pending = Pending::create_with(&path, wanted).unwrap();
                pending.file().write_all_at(bytes, 0).unwrap();
                pending.publish(true).unwrap();
            });
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
            assert_eq!(Some(mode()), wanted.or(before));
            assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1);
        }
    }
}
