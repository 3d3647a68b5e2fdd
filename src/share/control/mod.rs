//! The control page of a publication: which generation is the current one, and the way to wait for the next.
//!
//! ```text
//!  0  magic and version
//!  8  generation; its low half is the futex word
//! 16  number of the generation's head segment
//! 24  check: a mixture of the two before
//! 32  closed: not 0 once the publication is over
//! 40  the publisher's process id, for messages
//! ```
//!
//! The words are this machine's own: a publication does not leave it. The page is made whole under another name
//! and never resized. It is written with pwrite(2) and read with pread(2), and mapped only to have an
//! address for futex(2): whoever truncates it gets an error out of that, and nobody a `SIGBUS`.
//!
//! The publisher has two locks on it, which end together. flock(2) keeps a second one out. Beside it stands one of fcntl(2)
//! for the open file: of that kind alone one can ask whether it is held, without taking it for a moment.
//!
//! A flip is one pwrite(2) of three words that lie in one page on both sides: a process that is killed has
//! done it or has not. A pread(2) beside it may see a part; the check tells, and the reader looks again.

#[cfg(all(test, interleavings))]
mod interleavings;
mod protocol;

pub(crate) use protocol::State;

use crate::os::ExclusiveFile;
use crate::os::Futex;
use crate::os::disk::{self, Dir};
#[cfg(target_os = "linux")]
use crate::os::lock_of_open_file;
use protocol::{CLOSED, END, GENERATION, MAGIC, WRITER, Words, record};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::time::Duration;

const LEN: usize = 4096;
/// A control page, open.
pub(crate) struct Control {
    file: File,
    /// The generation's low half. `None` where it cannot be mapped: waiting is then looking again and again.
    word: Option<Futex>,
}

/// On a cache line of its own: no word of it, and no two, lie across a page's end.
#[repr(align(64))]
struct Line([u8; 64]);

impl Control {
    /// Makes a control page of no generation, [locked](Control::lock) against others, but not yet so that one could ask. `None` where there is one already.
    pub(crate) fn create(dir: &Dir, name: &OsStr, mode: u32) -> io::Result<Option<Self>> {
        let file = ExclusiveFile::create_named(dir, 0o600)?;
        let hidden = file.name().unwrap_or_default();
        let named = Self::fill(&file, mode).and_then(|()| match dir.rename_to_new(hidden, name) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            done => done.map(|()| true),
        });
        if !matches!(named, Ok(true)) {
            let removed = dir.remove(hidden);
            // Where naming it failed, that is told.
            if named.is_ok() {
                removed?;
            }
        }
        // The same open file, hence the lock that it was made with.
        Ok(if named? { Some(Self::new(file.file().try_clone()?)) } else { None })
    }

    fn fill(file: &ExclusiveFile, mode: u32) -> io::Result<()> {
        let mut page = [0; LEN];
        page[..GENERATION].copy_from_slice(&MAGIC);
        page[GENERATION..CLOSED].copy_from_slice(&record(0, 0));
        page[WRITER..END].copy_from_slice(&u64::from(std::process::id()).to_ne_bytes());
        file.write_all_at(&page, 0)?;
        file.set_mode(mode)
    }

    /// Opens a control page, to write it or only to look.
    ///
    /// # Errors
    /// What open(2) answers; [`io::ErrorKind::InvalidData`] for what is no file.
    pub(crate) fn open(dir: &Dir, name: &OsStr, write: bool) -> io::Result<Self> {
        let file = dir.open_file(name, write)?;
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self::new(file))
    }

    fn new(file: File) -> Self {
        let low = if cfg!(target_endian = "big") { 4 } else { 0 };
        let word = Futex::in_file(&file, LEN, GENERATION + low).ok();
        Self { file, word }
    }

    /// Locks it for the one publisher there may be; `false` where another has it. The lock ends with this value, and
    /// with the process, fork's children included.
    pub(crate) fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                mark(&self.file);
                Ok(true)
            }
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether anybody has locked it. Who asks takes no lock, and keeps nobody out.
    pub(crate) fn is_locked(&self) -> io::Result<bool> {
        #[cfg(target_os = "linux")]
        return lock_of_open_file::is_held(&self.file);
        #[cfg(not(target_os = "linux"))]
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                rustix::fs::flock(&self.file, FlockOperation::Unlock).ok();
                Ok(false)
            }
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// The same open file once more, as a fork's child has it.
    #[cfg(test)]
    pub(crate) fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives the lock back: closing would not, where a fork's child holds the file open as well.
    pub(crate) fn unlock(&self) {
        #[cfg(target_os = "linux")]
        lock_of_open_file::give_back(&self.file).ok();
        rustix::fs::flock(&self.file, FlockOperation::Unlock).ok();
    }

    /// Whether this is the page called `name`.
    pub(crate) fn is(&self, dir: &Dir, name: &OsStr) -> bool {
        let (Ok(here), Ok(there)) = (rustix::fs::fstat(&self.file), dir.stat(name)) else { return false };
        (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
    }

    /// Whether it is a control page by how it begins, whatever has become of the rest.
    pub(crate) fn is_one(&self) -> io::Result<bool> {
        let mut magic = [0; MAGIC.len()];
        let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut magic, 0))?;
        Ok(read == MAGIC.len() && magic == MAGIC)
    }

    /// What it says; `None` if that makes no sense.
    pub(crate) fn read(&self) -> io::Result<Option<State>> {
        protocol::read(self)
    }

    /// Makes a generation the current one, and wakes who waits for it.
    pub(crate) fn flip(&self, generation: u64, head: u64) -> io::Result<()> {
        protocol::flip(self, generation, head)
    }

    /// Says that there will be no more generations.
    pub(crate) fn close(&self) -> io::Result<()> {
        protocol::close(self)
    }

    /// Sleeps until the generation is another than this, or about so long.
    pub(crate) fn wait(&self, generation: u64, most: Duration) {
        protocol::wait(self, generation, most);
    }

    /// Says who publishes.
    pub(crate) fn sign(&self) -> io::Result<()> {
        self.store(WRITER, &u64::from(std::process::id()).to_ne_bytes())
    }

    /// Its file, to ask about it, and to give it another mode or owner.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl Words for Control {
    fn load(&self, page: &mut [u8; END]) -> io::Result<usize> {
        let mut line = Line([0; 64]);
        let bytes = &mut line.0[..END];
        let read = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut *bytes, 0))?;
        page.copy_from_slice(bytes);
        Ok(read)
    }

    fn store(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let mut line = Line([0; 64]);
        let line = &mut line.0[..bytes.len()];
        line.copy_from_slice(bytes);
        disk::write_all_at(&self.file, line, at as u64)
    }

    fn is_removed(&self) -> io::Result<bool> {
        Ok(rustix::fs::fstat(&self.file)?.st_nlink == 0)
    }

    fn sleep(&self, low: u32, most: Duration) {
        if !self.word.as_ref().is_some_and(|word| word.wait(low, most)) {
            std::thread::sleep(most.min(Duration::from_millis(2)));
        }
    }

    fn wake(&self) {
        if let Some(word) = &self.word {
            word.wake();
        }
    }

    fn pause() {
        std::thread::yield_now();
    }
}

/// Says to who asks that the file is locked. File systems without such locks lose only that.
fn mark(file: &File) {
    #[cfg(target_os = "linux")]
    lock_of_open_file::take(file).ok();
    let _ = file;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    fn made(dir: &Path) -> (Dir, Control) {
        let dir = Dir::open(dir).unwrap();
        let control = Control::create(&dir, "control".as_ref(), 0o600).unwrap().unwrap();
        (dir, control)
    }

    #[test]
    fn what_is_flipped_is_read_and_there_is_one_page_and_one_lock() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, control) = made(temporary.path());
        let writer = u64::from(std::process::id());
        assert_eq!(control.read().unwrap(), Some(State { writer, ..State::default() }));
        assert!(Control::create(&dir, "control".as_ref(), 0o600).unwrap().is_none());
        let other = Control::open(&dir, "control".as_ref(), false).unwrap();
        assert!(!other.lock().unwrap() && control.lock().unwrap());
        assert!(other.is_locked().unwrap());
        control.flip(u64::MAX, 77).unwrap();
        let state = State { generation: u64::MAX, head: 77, closed: false, writer };
        assert_eq!(other.read().unwrap(), Some(state));
        control.close().unwrap();
        assert_eq!(other.read().unwrap(), Some(State { closed: true, ..state }));
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1, "nothing is left of the second");
        control.unlock();
        assert!(!other.is_locked().unwrap() && control.lock().unwrap() && other.is_locked().unwrap());
        drop(control);
        assert!(!other.is_locked().unwrap());
        let third = Control::open(&dir, "control".as_ref(), true).unwrap();
        assert!(third.lock().unwrap() && !other.lock().unwrap() && other.is_locked().unwrap());
    }

    #[test]
    fn a_page_that_is_gone_is_closed_and_one_that_makes_no_sense_says_nothing() {
        let temporary = tempfile::tempdir().unwrap();
        let (_, control) = made(temporary.path());
        let path = temporary.path().join("control");
        let file = File::options().write(true).open(&path).unwrap();
        for (at, len) in [(0, 4096), (8, 4096), (16, 4096), (24, 4096), (0, 47), (0, 0)] {
            file.set_len(4096).unwrap();
            control.file.write_all_at(&MAGIC, 0).unwrap();
            control.flip(3, 9).unwrap();
            assert!(control.read().unwrap().is_some());
            file.write_all_at(b"x", at).unwrap();
            file.set_len(len).unwrap();
            assert_eq!(control.read().unwrap(), None, "{at}, {len}");
            control.wait(3, Duration::from_millis(1)); // no signal
        }
        control.file.write_all_at(&MAGIC, 0).unwrap();
        control.store(CLOSED, &[0; 16]).unwrap();
        control.flip(3, 9).unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(control.read().unwrap().unwrap().closed);
    }

    #[test]
    fn who_waits_is_woken_by_a_flip_through_another_descriptor() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, control) = made(temporary.path());
        let other = Control::open(&dir, "control".as_ref(), false).unwrap();
        let (tell, woken) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // Far longer than the test: only a wake ends the first, and a value that is another already the second.
            for _ in 0..2 {
                other.wait(0, Duration::from_secs(100_000));
                tell.send(other.read().unwrap().unwrap().generation).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        control.flip(1, 1).unwrap();
        for _ in 0..2 {
            assert_eq!(woken.recv_timeout(Duration::from_secs(30)), Ok(1));
        }
    }
}
