//! What a forked child has no business with: files that are being made, and their memory.
//!
//! A child of fork(2) gets a copy of every value, and every descriptor and shared mapping with them. A draft's pages
//! are its file's: what a child wrote to them, however late, would reach the file that its parent has published since,
//! under everybody who has it mapped; and a file that a child has open or mapped is never used again. So
//!
//! - an output's memory is not inherited (`MADV_DONTFORK`). Where it was, the child has memory that nobody may touch
//!   (`PROT_NONE`), so that nothing else comes to lie under an array that it inherited: to touch one is `SIGSEGV`.
//!   Memory that was cut off from its file, once that is finished, is inherited like any other;
//! - an output's descriptor is exchanged for one of `/dev/null`;
//! - what publishes asks its [`Owner`] at each step that does.
//!
//! The kernel does the first by itself. The rest is done by handlers of `pthread_atfork(3)`, which fork(2) as the C
//! library has it calls, and with it Python's `os.fork` and `multiprocessing`. vfork(2) and `posix_spawn(3)` need none
//! of it: they share the memory until the child executes. After a bare clone(2) system call there are holes where the
//! memory was, and the descriptors are there: whoever makes one executes at once, or touches nothing.

use crate::error::{Error, Result};
use std::cell::UnsafeCell;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// How often this process was forked from one that had this module.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Whose a value is that publishes something, or removes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    process: u32,
    /// In a namespace of its own a child may have its parent's number.
    forks: u32,
}

impl Owner {
    /// This process.
    pub(crate) fn me() -> Self {
        handle();
        Self { process: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// Whether this is the process that it was made in, and no child that was forked from it.
    pub(crate) fn is_me(self) -> bool {
        self == Self::me()
    }

    /// Whether this process may go on with something.
    ///
    /// # Errors
    /// [`Error::Argument`] in a fork's child.
    pub(crate) fn check(self, what: &str) -> Result<()> {
        if self.is_me() {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "{what} belongs to another process, the one that this was forked from: make one in this process"
        )))
    }

    /// Another's.
    #[cfg(test)]
    pub(crate) fn nobody() -> Self {
        Self { process: 0, forks: 0 }
    }
}

/// What is not to be inherited.
#[derive(Default)]
struct Withheld {
    /// Addresses of whole pages, each with a number: what is unmapped may at once be another's.
    memory: Vec<(u64, Range<usize>)>,
    next: u64,
    descriptors: Vec<RawFd>,
    /// The names of this process's unfinished files. Here, so that no child is forked while another thread has them
    /// locked: it would wait for that thread for ever.
    names: BTreeSet<OsString>,
}

static WITHHELD: Mutex<Withheld> =
    Mutex::new(Withheld { memory: Vec::new(), next: 0, descriptors: Vec::new(), names: BTreeSet::new() });

/// Notes the name of an unfinished file of this process.
pub(crate) fn note_unfinished(name: OsString) {
    handle();
    withheld().names.insert(name);
}

/// Forgets what [`note_unfinished`] noted.
pub(crate) fn forget_unfinished(name: &OsStr) {
    withheld().names.remove(name);
}

/// Whether a name is that of an unfinished file of this process.
pub(crate) fn is_unfinished(name: &OsStr) -> bool {
    withheld().names.contains(name)
}

fn withheld() -> MutexGuard<'static, Withheld> {
    WITHHELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lock, while a thread forks.
struct Forking(UnsafeCell<Option<MutexGuard<'static, Withheld>>>);

// SAFETY: only the handlers look inside, and only on the thread that holds the lock, by which they are in turn.
unsafe impl Sync for Forking {}

static FORKING: Forking = Forking(UnsafeCell::new(None));

/// Has fork(2) call the handlers.
fn handle() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: three functions that live as long as the program does, or are taken back with its library.
        unsafe { libc::pthread_atfork(Some(prepare), Some(in_parent), Some(in_child)) };
    });
}

/// Before a fork: nothing is half withheld meanwhile.
extern "C" fn prepare() {
    let lock = withheld();
    // SAFETY: this thread has the lock, so no other handler looks at the cell.
    unsafe { *FORKING.0.get() = Some(lock) };
}

/// What `prepare` has left.
fn take_lock() -> Option<MutexGuard<'static, Withheld>> {
    // SAFETY: this thread has the lock since `prepare`, so no other handler looks at the cell.
    unsafe { (*FORKING.0.get()).take() }
}

extern "C" fn in_parent() {
    drop(take_lock());
}

/// In the child, which has this one thread. Only what signal-safety(7) allows: no memory is asked for or given back.
extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    let Some(mut withheld) = take_lock() else { return };
    for (_, range) in withheld.memory.drain(..) {
        // Where that fails something is there already, or there are no addresses for anything.
        close_gap(range);
    }
    if !withheld.descriptors.is_empty() {
        exchange(&withheld.descriptors);
    }
    withheld.descriptors.clear();
}

/// Puts `/dev/null` in the place of descriptors.
fn exchange(descriptors: &[RawFd]) {
    // SAFETY: opens a file by a name that is a C string.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if null < 0 {
        // Then the child has them: what is closed goes later, and is not used again.
        return;
    }
    for &descriptor in descriptors {
        // SAFETY: a descriptor of an `ExclusiveFile` that the parent has (it is listed until it is closed); in this
        // process only values that belong to the parent know of it, and what they close is the new one.
        unsafe { libc::dup2(null, descriptor) };
        // SAFETY: as above.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: opened above, and nobody else's.
    unsafe { libc::close(null) };
}

/// Addresses that children are not to inherit, listed as long as this lives.
#[derive(Debug)]
pub(crate) struct Listed {
    /// In `Withheld::memory`.
    number: u64,
    owner: Owner,
}

/// Maps with `map`, which is to say which pages it took, and lists those: no child is forked between the two.
///
/// # Errors
/// Those of `map`.
pub(crate) fn withhold<T>(map: impl FnOnce() -> io::Result<(T, Range<usize>)>) -> io::Result<(T, Listed)> {
    handle();
    let mut withheld = withheld();
    let (mapped, pages) = map()?;
    let number = withheld.next;
    withheld.next += 1;
    withheld.memory.push((number, pages));
    Ok((mapped, Listed { number, owner: Owner::me() }))
}

impl Listed {
    /// Does what makes the memory this process's own; from then on children inherit it.
    ///
    /// # Errors
    /// Those of `detach`; the memory is withheld as before then.
    #[cfg(feature = "python")]
    pub(crate) fn inherit_after(&self, detach: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut withheld = withheld();
        detach()?;
        self.forget(&mut withheld);
        Ok(())
    }

    fn forget(&self, withheld: &mut Withheld) {
        withheld.memory.retain(|(number, _)| *number != self.number);
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // In a child there are others by now.
        if self.owner.is_me() {
            self.forget(&mut withheld());
        }
    }
}

/// Maps memory that nobody may touch where nothing is. `false` where something is.
///
/// Values that lie there by somebody's mistake are then an error that is seen (`SIGSEGV`), and not another's bytes.
pub(crate) fn close_gap(range: Range<usize>) -> bool {
    #[cfg(target_os = "linux")]
    {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        let at = std::ptr::without_provenance_mut::<libc::c_void>(range.start);
        // SAFETY: a mapping that takes nobody's place: MAP_FIXED_NOREPLACE.
        let made = unsafe { libc::mmap(at, range.len(), libc::PROT_NONE, flags, -1, 0) };
        if made == libc::MAP_FAILED {
            return false;
        }
        if made != at {
            // A kernel before 4.17 takes the address for a wish.
            // SAFETY: made just above, and nobody knows of it.
            unsafe { libc::munmap(made, range.len()) };
            return false;
        }
        true
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = range;
        false
    }
}

/// A descriptor that children are not to have, listed as long as this lives: dropped before it is closed.
#[derive(Debug)]
pub(crate) struct Private {
    descriptor: RawFd,
    owner: Owner,
}

impl Private {
    pub(crate) fn new(file: &impl AsRawFd) -> Self {
        let (descriptor, owner) = (file.as_raw_fd(), Owner::me());
        withheld().descriptors.push(descriptor);
        Self { descriptor, owner }
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if self.owner.is_me() {
            withheld().descriptors.retain(|known| *known != self.descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_gap_is_closed_and_what_is_there_stays() {
        let page = rustix::param::page_size();
        let mut memory = memmap2::MmapMut::map_anon(3 * page).unwrap();
        memory.fill(7);
        let start = memory.as_ptr().addr();
        assert!(!close_gap(start..start + page));
        assert!(memory.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn a_value_of_another_process_is_refused() {
        Owner::me().check("this").unwrap();
        let error = Owner::nobody().check("this draft").unwrap_err().to_string();
        assert!(error.contains("this draft belongs to another process"), "{error}");
    }

    #[test]
    fn what_is_unmapped_or_closed_is_forgotten() {
        let file = tempfile::tempfile().unwrap();
        let ((), listed) = withhold(|| Ok(((), 0..0))).unwrap();
        let (number, descriptor) = (listed.number, file.as_raw_fd());
        let private = Private::new(&file);
        let is_known = || withheld().memory.iter().any(|(known, _)| *known == number);
        assert!(is_known() && withheld().descriptors.contains(&descriptor));
        drop(listed);
        drop(private);
        // The file is still open: nobody else's.
        assert!(!is_known() && !withheld().descriptors.contains(&descriptor));
    }
}
