//! A file that this process has just made, and nobody else knows of.

use super::disk::{self, Dir};
use super::fork::{self, Owner, Private};
#[cfg(target_os = "linux")]
use super::lease;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;

/// A file on its way to becoming someone's weights: created without a name (`O_TMPFILE`), or
/// [adopted](ExclusiveFile::adopt) when nobody else had it any more.
///
/// Only this process knows it: that is what makes mapping it shared and writing through `&mut [u8]`
/// safe. It is not resized while it is mapped. What has no name nobody can open, and it gets one when nobody
/// holds its memory any more. (Whoever goes through `/proc` may: as with `/proc/self/mem`, nothing holds against that.)
///
/// Two have a random name from the start: one where the file system has no `O_TMPFILE`, and one that was adopted, since
/// what has lost its last name cannot get another. There it is trust in the directory: that whoever may write to
/// it leaves alone what is called `.maptensors-….tmp`. The file is open to its owner only, and locked.
pub(crate) struct ExclusiveFile {
    // Declared before the file: forgotten before that is closed.
    _private: Private,
    file: File,
    /// Its random name, if it has one.
    name: Option<OsString>,
    /// Whether this descriptor holds a lease.
    leased: bool,
    owner: Owner,
}

/// How names of unfinished files start; [`ExclusiveFile::sweep`] looks for it.
const PREFIX: &str = ".maptensors-";

/// Creations that find their file locked by someone else, before giving up on the lock.
const TRIES: usize = 8;

/// An unfinished file of another boot (or another machine, over a network) is an orphan after so long.
const ABANDONED: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

impl Drop for ExclusiveFile {
    fn drop(&mut self) {
        // In a fork's child the lock may be held by a thread that is not there.
        if let Some(name) = self.name.as_ref().filter(|_| self.owner.is_me()) {
            fork::forget_unfinished(name);
        }
    }
}

impl ExclusiveFile {
    fn new(file: File, name: Option<OsString>, leased: bool) -> Self {
        Self::kept(Private::new(&file), file, name, leased)
    }

    fn kept(private: Private, file: File, name: Option<OsString>, leased: bool) -> Self {
        if let Some(name) = &name {
            fork::note_unfinished(name.clone());
        }
        Self { _private: private, file, name, leased, owner: Owner::me() }
    }

    /// Creates a new, empty, locked file in the file system of `dir`, with the mode that `mode` and the umask give:
    /// without a name, where that can be.
    pub(crate) fn create(dir: &Dir, mode: u32) -> io::Result<Self> {
        let Some(file) = dir.create_unnamed(mode)? else { return Self::create_named(dir, mode) };
        // As for a named one: once it has a name, that of a living owner's file.
        disk::flock(&file).ok();
        Ok(Self::new(file, None, false))
    }

    /// As [`ExclusiveFile::create`], under a random name.
    pub(crate) fn create_named(dir: &Dir, mode: u32) -> io::Result<Self> {
        let mut tries = 0;
        loop {
            let name = random_name()?;
            let file = match dir.create(&name, mode) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => continue,
                file => file?,
            };
            // The lock says that the file has a living owner. File systems without locks lose only the
            // sweeping of files that a crash left behind.
            let locked = disk::flock(&file);
            // A sweeper may have come between creation and lock, and taken the file for an orphan.
            let swept = rustix::fs::fstat(&file).map(|stat| stat.st_nlink == 0);
            tries += 1;
            if swept == Ok(false) && (locked.unwrap_or(true) || tries == TRIES) {
                return Ok(Self::new(file, Some(name), false));
            }
            dir.remove(&name).ok();
            swept?;
        }
    }

    /// Gives a file that has no name a random one: only for as long as it takes to rename it.
    pub(crate) fn link_hidden(&mut self, dir: &Dir) -> io::Result<OsString> {
        loop {
            let name = random_name()?;
            // Known before it is there: a sweep of this process's would see its own lock and let it be, but open it.
            fork::note_unfinished(name.clone());
            match dir.link(&self.file, &name) {
                Ok(()) => {
                    self.name = Some(name.clone());
                    return Ok(name);
                }
                Err(error) => {
                    fork::forget_unfinished(&name);
                    if error.raw_os_error() != Some(libc::EEXIST) {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Gives a file a name by which nobody will open it, and which a sweep removes.
    pub(crate) fn hide(dir: &Dir, name: &OsStr) -> io::Result<OsString> {
        let hidden = random_name()?;
        dir.rename_to_new(name, &hidden)?;
        Ok(hidden)
    }

    /// Takes over a [hidden](ExclusiveFile::hide) file, content and blocks, to be written anew. `None`, and
    /// no file left, where someone else may still read it: it has another name, or is open or mapped.
    ///
    /// The name that it had is gone durably when this returns: else a power loss could bring it back over
    /// content that has changed since.
    #[cfg(target_os = "linux")]
    pub(crate) fn adopt(dir: &Dir, hidden: &OsStr) -> io::Result<Option<Self>> {
        match Self::try_adopt(dir, hidden) {
            Ok(Some(file)) => Ok(Some(file)),
            other => {
                dir.remove(hidden)?;
                other
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn try_adopt(dir: &Dir, name: &OsStr) -> io::Result<Option<Self>> {
        let Ok(file) = dir.open_file(name, true) else { return Ok(None) };
        // At once: a child that had it, too, would stand in the lease's way the next time.
        let private = Private::new(&file);
        let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        // By this name nobody can have opened it since; the lease says that nobody has it from before.
        if locked == Err(Errno::WOULDBLOCK) || !lease::take(&file)? {
            return Ok(None);
        }
        // Under lock and lease: one name means this one, and no sweep has taken it meanwhile.
        let stat = rustix::fs::fstat(&file)?;
        let alone = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
            && stat.st_uid == rustix::process::geteuid().as_raw()
            && stat.st_nlink == 1;
        if !alone {
            return Ok(None);
        }
        dir.sync()?;
        Ok(Some(Self::kept(private, file, Some(name.into()), true)))
    }

    /// Whether nobody waits to open an adopted file: someone who had looked its old name up before that
    /// name was gone. Such a reader waits until the file is finished or dropped, but not for ever.
    ///
    /// True of a file that was made new: nobody knows it.
    pub(crate) fn is_undisputed(&self) -> bool {
        #[cfg(target_os = "linux")]
        return !self.leased || lease::is_undisputed(&self.file);
        #[cfg(not(target_os = "linux"))]
        true
    }

    /// Whether writing to a block of the file needs no new one. Where it may (reflinks, copy-on-write file
    /// systems), a full disk would be a `SIGBUS` when a page is written, unless it was made writable before.
    pub(crate) fn is_overwritten_in_place(&self) -> bool {
        // From linux/magic.h: ext2, ext3 and ext4; tmpfs.
        #[cfg(target_os = "linux")]
        return rustix::fs::fstatfs(&self.file)
            .is_ok_and(|stat| [0xef53, 0x0102_1994].contains(&stat.f_type));
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// Whether the file is memory (tmpfs). Its pages are small ones, as a rule, and a mapping of them is filled with a
    /// fault for each: pwrite(2) has been measured to take 0.55 of the time.
    pub(crate) fn is_memory(&self) -> bool {
        #[cfg(target_os = "linux")]
        return rustix::fs::fstatfs(&self.file).is_ok_and(|stat| stat.f_type == 0x0102_1994);
        #[cfg(not(target_os = "linux"))]
        false
    }

    /// Lets whoever waits to open the file have it: it is finished.
    pub(crate) fn release(&mut self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if std::mem::take(&mut self.leased) {
            return lease::give_up(&self.file);
        }
        Ok(())
    }

    /// Whether a file is an unfinished one by its name.
    pub(crate) fn is_unfinished(name: &OsStr) -> bool {
        let name = name.as_bytes();
        name.starts_with(PREFIX.as_bytes()) && name.ends_with(b".tmp")
    }

    /// Removes unfinished files of dead processes from `dir`: ours by name and owner, orphans because
    /// nobody holds their lock. Locks may be this machine's alone, so a file of another boot must also be
    /// old. Best effort.
    pub(crate) fn sweep(dir: &Dir) {
        for name in dir.names().unwrap_or_default() {
            if !Self::is_unfinished(&name) || fork::is_unfinished(&name) {
                continue;
            }
            let Ok(file) = dir.open_file(&name, false) else { continue };
            let here = name.as_bytes()[PREFIX.len()..].starts_with(boot().as_bytes());
            let orphan = rustix::fs::fstat(&file).is_ok_and(|stat| {
                rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
                    && stat.st_uid == rustix::process::geteuid().as_raw()
                    && (here || is_abandoned(stat.st_mtime))
            });
            if orphan && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                dir.remove(&name).ok();
            }
        }
    }

    /// Whether the file, if it has a name, still has it in `dir`: tidy people remove what looks temporary.
    pub(crate) fn is_in(&self, dir: &Dir) -> bool {
        let Some(name) = &self.name else { return true };
        let (Ok(here), Ok(there)) = (rustix::fs::fstat(&self.file), dir.stat(name)) else {
            return false;
        };
        (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
    }

    /// Its random name, if it has one.
    pub(crate) fn name(&self) -> Option<&OsStr> {
        self.name.as_deref()
    }

    /// Gives an adopted file, which is not mapped, another size; all its blocks are allocated.
    pub(crate) fn resize(&self, len: u64) -> io::Result<bool> {
        if self.file.metadata()?.len() > len {
            disk::resize(&self.file, len)?;
        }
        self.allocate(len)
    }

    /// Gives the file its size, with every block allocated, so that a full disk is an error here and
    /// not a `SIGBUS` later. `false`: the file system cannot allocate; the file has its size, but must be
    /// written with [`ExclusiveFile::file`], not mapped.
    pub(crate) fn allocate(&self, len: u64) -> io::Result<bool> {
        // Past the limit fallocate(2) would raise SIGXFSZ, which kills.
        if rustix::process::getrlimit(rustix::process::Resource::Fsize).current.is_some_and(|max| len > max) {
            return Err(Errno::FBIG.into());
        }
        if len == 0 {
            return Ok(true);
        }
        let allocated = disk::allocate(&self.file, len)?;
        if !allocated {
            disk::resize(&self.file, len)?;
        }
        Ok(allocated)
    }

    /// Writes at an offset inside the file's size.
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        disk::write_all_at(&self.file, bytes, offset)
    }

    /// The file, to write parts of it at offsets.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file a mode. File systems without modes keep their own.
    pub(crate) fn set_mode(&self, mode: u32) -> io::Result<()> {
        disk::set_mode(&self.file, mode)
    }

    /// fsync(2), once: after a failure the kernel marks the pages clean, and a second call would lie.
    pub(crate) fn sync(&self) -> io::Result<()> {
        disk::sync(&self.file)
    }
}

/// A name that no file has, by which an orphan is known.
fn random_name() -> io::Result<OsString> {
    Ok(format!("{PREFIX}{}-{:016x}.tmp", boot(), random()?).into())
}

/// What the umask makes of a new file's mode; umask(2) itself tells only by changing it.
pub(crate) fn mode_of_new_files() -> Option<u32> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
    Some(0o666 & !u32::from_str_radix(umask.trim(), 8).ok()?)
}

/// Eight characters that change with every boot of this machine.
fn boot() -> &'static str {
    static BOOT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    BOOT.get_or_init(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        id.get(..8).filter(|id| id.bytes().all(|b| b.is_ascii_hexdigit())).unwrap_or("00000000").to_owned()
    })
}

/// Whether a file last written at `mtime` (seconds since 1970) has been left alone for long.
fn is_abandoned(mtime: i64) -> bool {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(mtime).is_ok_and(|mtime| now.as_secs().saturating_sub(mtime) > ABANDONED.as_secs())
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Mode;

    #[test]
    fn sweeping_removes_orphans_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let fd = Dir::open(dir.path()).unwrap();
        let living = ExclusiveFile::create_named(&fd, 0o600).unwrap();
        let orphan = dir.path().join(format!(".maptensors-{}-0123456789abcdef.tmp", boot()));
        let elsewhere = dir.path().join(".maptensors-ffffffff-0123456789abcdef.tmp");
        let old = dir.path().join(".maptensors-ffffffff-fedcba9876543210.tmp");
        std::fs::write(&elsewhere, b"another machine's, perhaps alive").unwrap();
        std::fs::write(&old, b"another boot's").unwrap();
        let days_ago = std::time::SystemTime::now() - 2 * ABANDONED;
        File::options().write(true).open(&old).unwrap().set_modified(days_ago).unwrap();
        let other = dir.path().join(".maptensors-notes.txt");
        let fifo = dir.path().join(".maptensors-fifo.tmp");
        std::fs::write(&orphan, b"left by a crash").unwrap();
        std::fs::write(&other, b"not ours").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        ExclusiveFile::sweep(&fd);
        assert!(!orphan.exists() && !old.exists() && elsewhere.exists());
        assert!(dir.path().join(living.name().unwrap()).exists() && other.exists() && fifo.exists());
    }

    #[test]
    fn a_file_larger_than_any_disk_is_an_error_and_no_signal() {
        let dir = tempfile::tempdir().unwrap();
        let file = ExclusiveFile::create(&Dir::open(dir.path()).unwrap(), 0o600).unwrap();
        assert!(file.allocate(1 << 60).is_err());
    }
}
