//! Every file operation that a save depends on, in one place: what a test can record, fail, and work out
//! from what a crash could leave behind.

use super::fork::Private;
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What is about to be done. Names are relative to their directory.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code)] // tests read what they follow
pub(crate) enum Op<'a> {
    /// Opening a directory, to work in it.
    OpenDir(&'a Path),
    /// A new, empty file.
    Create(&'a Dir, &'a OsStr),
    /// A new, empty file without a name.
    CreateUnnamed(&'a Dir),
    /// Giving a name that nothing has to a file that has none.
    Link(&'a Dir, &'a File, &'a OsStr),
    /// Opening a file that is there.
    Open(&'a Dir, &'a OsStr),
    /// Giving a name to another file, in place of what has that name.
    Rename(&'a Dir, &'a OsStr, &'a OsStr),
    /// Taking a name away.
    Remove(&'a Dir, &'a OsStr),
    /// Names made durable.
    SyncDir(&'a Dir),
    /// A size, with all its blocks.
    Allocate(&'a File, u64),
    /// A size.
    Resize(&'a File, u64),
    /// Bytes at an offset: how many, where.
    Write(&'a File, usize, u64),
    /// Bytes of another file, or its blocks: from which, to which.
    Copy(&'a File, &'a File),
    /// A mode.
    SetMode(&'a File),
    /// Content and size made durable.
    Sync(&'a File),
    /// The lock that says that a file has a living owner.
    Lock(&'a File),
}

/// Does it, unless a test says otherwise.
pub(crate) fn act<T>(op: Op<'_>, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    if let Some(watch) = watch::current() {
        watch.before(&op)?;
        let done = call();
        watch.after(&op, done.is_ok());
        return done;
    }
    let _ = op;
    call()
}

/// A directory, held open: what it is renamed to meanwhile does not matter to what is done in it.
/// [`Dir::stands`] says whether it still is where it was opened.
#[derive(Debug)]
pub(crate) struct Dir {
    /// Of one that was locked: a forked child would hold the lock as long as it lives. Declared before the descriptor:
    /// forgotten before that is closed.
    locked: OnceLock<Private>,
    pub(crate) fd: OwnedFd,
    /// The path that it was opened by, from the root; `None` where that is not known.
    pub(crate) path: Option<PathBuf>,
}

impl Dir {
    /// Opens the directory at `path`; an empty path is the current one.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_as(path, OFlags::empty())
    }

    /// As [`Dir::open`], where `path` is no link to one.
    pub(crate) fn open_itself(path: &Path) -> io::Result<Self> {
        Self::open_as(path, OFlags::NOFOLLOW)
    }

    fn open_as(path: &Path, also: OFlags) -> io::Result<Self> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | also;
        let fd = act(Op::OpenDir(path), || Ok(rustix::fs::open(path, flags, Mode::empty())?))?;
        // The process may change its own directory later.
        Ok(Self { locked: OnceLock::new(), fd, path: std::path::absolute(path).ok() })
    }

    /// Creates a file that must not be there yet.
    pub(crate) fn create(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        act(Op::Create(self, name), || {
            let fd = rustix::io::retry_on_intr(|| rustix::fs::openat(&self.fd, name, flags, mode))?;
            Ok(File::from(fd))
        })
    }

    /// Creates a file that has no name, in the file system of the directory (`O_TMPFILE`). `None` where that cannot.
    pub(crate) fn create_unnamed(&self, mode: u32) -> io::Result<Option<File>> {
        #[cfg(target_os = "linux")]
        return act(Op::CreateUnnamed(self), || {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(mode);
            rustix::io::retry_on_intr(|| rustix::fs::openat(&self.fd, ".", flags, mode))
                .map(|fd| Some(fd.into()))
                .map_err(io::Error::from)
        })
        .or_else(|error| match error.raw_os_error() {
            // open(2): a file system without it; a kernel without it, which sees a directory to be written.
            Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT | libc::EINVAL) => Ok(None),
            _ => Err(error),
        });
        #[cfg(not(target_os = "linux"))]
        {
            let _ = mode;
            Ok(None)
        }
    }

    /// Gives a file that was [created without a name](Dir::create_unnamed) one that nothing has yet.
    pub(crate) fn link(&self, file: &File, name: &OsStr) -> io::Result<()> {
        act(Op::Link(self, file, name), || {
            #[cfg(target_os = "linux")]
            match rustix::fs::linkat(file, "", &self.fd, name, AtFlags::EMPTY_PATH) {
                // A kernel before 6.10 wants CAP_DAC_READ_SEARCH for that. The other way needs /proc.
                Err(error) if error != Errno::EXIST => {}
                done => return Ok(done?),
            }
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ok(rustix::fs::linkat(rustix::fs::CWD, path, &self.fd, name, AtFlags::SYMLINK_FOLLOW)?)
        })
    }

    /// Opens a file without following a link or waiting for a FIFO's other end.
    pub(crate) fn open_file(&self, name: &OsStr, write: bool) -> io::Result<File> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        act(Op::Open(self, name), || Ok(rustix::fs::openat(&self.fd, name, flags, Mode::empty())?.into()))
    }

    /// Opens a file to read, following links: an archived checkpoint counts as one.
    pub(crate) fn open_linked(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        act(Op::Open(self, name), || Ok(rustix::fs::openat(&self.fd, name, flags, Mode::empty())?.into()))
    }

    /// Reads a regular file of at most `most` bytes; links are followed.
    pub(crate) fn read(&self, name: &OsStr, most: u64) -> io::Result<Vec<u8>> {
        use std::io::Read as _;
        let file = self.open_linked(name)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > most {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The same directory, opened once more: with a lock of its own.
    pub(crate) fn again(&self) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?;
        Ok(Self { locked: OnceLock::new(), fd, path: self.path.clone() })
    }

    /// What `name` is; links are followed.
    pub(crate) fn stat(&self, name: &OsStr) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.fd, name, AtFlags::empty())
    }

    /// What `name` itself is, be it a link.
    pub(crate) fn lstat(&self, name: &OsStr) -> Result<Stat, Errno> {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Whether there is anything called `name`, a dangling link included.
    pub(crate) fn contains(&self, name: &OsStr) -> bool {
        self.lstat(name).is_ok()
    }

    /// The names in it.
    pub(crate) fn names(&self) -> io::Result<Vec<std::ffi::OsString>> {
        use std::os::unix::ffi::OsStringExt as _;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(std::ffi::OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// rename(2): atomic, replacing what is called `to`.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        act(Op::Rename(self, from, to), || Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?))
    }

    /// As [`Dir::rename`], where nothing is called `to`.
    pub(crate) fn rename_to_new(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        act(Op::Rename(self, from, to), || {
            #[cfg(target_os = "linux")]
            match rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE) {
                Err(Errno::INVAL | Errno::NOSYS) => {}
                done => return Ok(done?),
            }
            // A file system without the flag. `to` is a random name: nobody else makes it meanwhile.
            if self.contains(to) {
                return Err(Errno::EXIST.into());
            }
            Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
        })
    }

    /// unlink(2).
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        act(Op::Remove(self, name), || Ok(rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?))
    }

    /// fsync(2) of the directory: its names are durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        act(Op::SyncDir(self), || Ok(rustix::fs::fsync(&self.fd)?))
    }

    /// Waits for the directory's lock, which dies with this value or its process.
    pub(crate) fn flock(&self) -> io::Result<()> {
        self.locked.get_or_init(|| Private::new(&self.fd));
        Ok(rustix::io::retry_on_intr(|| rustix::fs::flock(&self.fd, FlockOperation::LockExclusive))?)
    }

    /// Gives the lock back: closing would not, where a fork's child holds the directory open as well.
    pub(crate) fn unlock(&self) {
        rustix::fs::flock(&self.fd, FlockOperation::Unlock).ok();
    }

    #[cfg(test)]
    pub(crate) fn inode(&self) -> u64 {
        rustix::fs::fstat(&self.fd).map_or(0, |stat| stat.st_ino)
    }
}

/// fallocate(2) of the first `len` bytes: all blocks, now. `false` where the file system cannot.
pub(crate) fn allocate(file: &File, len: u64) -> io::Result<bool> {
    act(Op::Allocate(file, len), || {
        let empty = FallocateFlags::empty();
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, empty, 0, len)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
}

/// ftruncate(2).
pub(crate) fn resize(file: &File, len: u64) -> io::Result<()> {
    act(Op::Resize(file, len), || file.set_len(len))
}

/// pwrite(2), all of it.
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    act(Op::Write(file, bytes.len(), offset), || file.write_all_at(bytes, offset))
}

/// As [`write_all_at`], of bytes that others may be changing: no reference to them is made, and the kernel does not mind.
///
/// # Safety
/// `from` is readable for `len` bytes.
pub(crate) unsafe fn write_raw_at(file: &File, from: *const u8, len: usize, offset: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    act(Op::Write(file, len, offset), || {
        let mut done = 0;
        while done < len {
            let at = libc::off_t::try_from(offset + done as u64).map_err(|_| Errno::FBIG)?;
            let (rest, left) = (from.wrapping_add(done), len - done);
            // SAFETY: pwrite(2) reads what the caller says is readable.
            let written = unsafe { libc::pwrite(file.as_raw_fd(), rest.cast(), left, at) };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    })
}

/// fchmod(2). File systems without modes keep their own.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    act(Op::SetMode(file), || match rustix::fs::fchmod(file, Mode::from_raw_mode(mode)) {
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    })
}

/// fsync(2), once: after a failure the kernel marks the pages clean, and a second call would lie.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    act(Op::Sync(file), || Ok(rustix::fs::fsync(file)?))
}

/// flock(2), where nobody else has it; `false` where somebody has.
pub(crate) fn flock(file: &File) -> io::Result<bool> {
    act(Op::Lock(file), || match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        done => Ok(done.map(|()| true)?),
    })
}

/// Whether fsync(2) of a file that has no name keeps its content for when it gets one, by the next sync of the
/// directory. ext4 and XFS do (and their code shows why); Btrfs writes no inode to its log that nothing
/// leads to, and of others nobody knows.
pub(crate) fn syncs_unnamed(file: &File) -> bool {
    #[cfg(test)]
    if let Some(watch) = watch::current() {
        return watch.syncs_unnamed();
    }
    // From linux/magic.h: ext2, ext3 and ext4; tmpfs, where nothing is kept anyway; XFS.
    #[cfg(target_os = "linux")]
    return rustix::fs::fstatfs(file).is_ok_and(|stat| {
        u32::try_from(stat.f_type).is_ok_and(|kind| [0xef53, 0x0102_1994, 0x5846_5342].contains(&kind))
    });
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

#[cfg(test)]
pub(crate) use watch::{Watch, watched};

#[cfg(test)]
mod watch {
    use super::Op;
    use crate::work::inherited;
    use std::io;
    use std::sync::Arc;

    /// Sees every operation of the threads it watches.
    pub(crate) trait Watch: Send + Sync {
        /// Before it is done; an error is returned in place of doing it.
        fn before(&self, op: &Op<'_>) -> io::Result<()>;
        /// Whether the disk keeps what was synced of a file that had no name.
        fn syncs_unnamed(&self) -> bool {
            true
        }
        /// After it was done, or failed.
        fn after(&self, op: &Op<'_>, done: bool);
    }

    type Watching = Option<Arc<dyn Watch>>;

    pub(crate) fn current() -> Watching {
        inherited::current().and_then(|watching| watching.downcast_ref::<Arc<dyn Watch>>().cloned())
    }

    /// Does `work` under a watch, as the threads that it starts are.
    pub(crate) fn watched<T>(watching: Watching, work: impl FnOnce() -> T) -> T {
        inherited::with(watching.map(|watch| Arc::new(watch) as Arc<_>), work)
    }
}
