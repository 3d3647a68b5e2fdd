//! Pages held in memory: mlock2(2), its limit, and what is locked now.

use crate::error::{Error, Result};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Holds the pages of `len` bytes at `ptr` in memory, until [`unlock_range`] or the end of their mapping.
///
/// They are locked as they come (`MLOCK_ONFAULT`), and then read in: plain mlock(2) would write to every page of a
/// writable private mapping, and so copy the file into memory of this process's own. Not the other way round: at
/// the ends of a lock the kernel takes huge page-table entries away.
///
/// # Errors
/// [`Error::Limit`] where `RLIMIT_MEMLOCK` does not allow it, with the limit; [`Error::Io`] where a page cannot
/// be read, or for what mlock2(2) answers else. Some pages may be locked then: which of them were before, the caller
/// knows.
pub(super) fn lock_range(path: &Path, ptr: *const u8, len: usize, moving: &Moving) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    let (start, len) = whole_pages(ptr, len);
    {
        let _still = moving.wait();
        moving.note_locked();
        lock(start, len).map_err(|error| refused(path, len, error))?;
    }
    read_in(start, len).map_err(Error::io(path, "reading pages in, to lock them"))
}

/// Held while pages of a mapping are put in the place of others, which are locked afterwards as those were: who locks
/// or unlocks meanwhile would do so to pages that go. Reading and writing never wait.
#[derive(Debug, Default)]
pub(super) struct Moving {
    still: Mutex<()>,
    locked: AtomicBool,
}

impl Moving {
    pub(super) fn wait(&self) -> MutexGuard<'_, ()> {
        self.still.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that pages of the mapping were locked.
    pub(super) fn note_locked(&self) {
        self.locked.store(true, Ordering::Relaxed);
    }

    /// Whether any page of the mapping was ever locked.
    pub(super) fn was_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }
}

/// Has the pages that hold some bytes stay in memory from when they come there.
///
/// # Errors
/// What mlock2(2) answers.
pub(super) fn lock_pages(ptr: *const u8, len: usize) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let (start, len) = whole_pages(ptr, len);
    lock(start, len)
}

/// Ends what [`lock_range`] began. Pages that were not locked are as they were.
///
/// # Errors
/// What munlock(2) answers.
pub(super) fn unlock_range(ptr: *const u8, len: usize, moving: &Moving) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let (start, len) = whole_pages(ptr, len);
    let _still = moving.wait();
    unlock(start, len)
}

/// The pages that hold some bytes.
fn whole_pages(ptr: *const u8, len: usize) -> (*const u8, usize) {
    let page = rustix::param::page_size();
    let start = ptr.addr() / page * page;
    (ptr.with_addr(start), (ptr.addr() + len).next_multiple_of(page) - start)
}

fn read_in(start: *const u8, len: usize) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        // SAFETY: advice that changes no byte; addresses that are not mapped are an error.
        match unsafe { madvise(start.cast_mut().cast(), len, Advice::LinuxPopulateRead) } {
            // A kernel before 5.14: they come when they are touched, and are locked then.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            // madvise(2)'s word for what would be SIGBUS at a touch.
            Err(rustix::io::Errno::FAULT) => return Err(rustix::io::Errno::IO.into()),
            Err(error) => return Err(error.into()),
        }
    }
    let _ = (start, len);
    Ok(())
}

fn lock(start: *const u8, len: usize) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    // SAFETY: reads and writes no memory at `start`; what is not mapped is an error.
    let answer = unsafe { libc::mlock2(start.cast(), len, libc::MLOCK_ONFAULT) };
    #[cfg(not(target_os = "linux"))]
    // SAFETY: as above.
    let answer = unsafe { libc::mlock(start.cast(), len) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn unlock(start: *const u8, len: usize) -> io::Result<()> {
    // SAFETY: reads and writes no memory at `start`; what is not mapped is an error.
    if unsafe { libc::munlock(start.cast(), len) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a refusal means: mostly the limit.
pub(super) fn refused(path: &Path, asked: usize, error: io::Error) -> Error {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let together = asked as u64 + locked_bytes();
    match limit {
        Some(limit) if together > limit => Error::Limit {
            path: path.into(),
            what: "the number of bytes to be locked in memory",
            found: together,
            limit,
            hint: Some(
                "RLIMIT_MEMLOCK; raise it with `ulimit -l`, limits.conf, systemd's LimitMEMLOCK= or \
                 `docker run --ulimit memlock=`, give the process CAP_IPC_LOCK, or lock less",
            ),
        },
        _ => Error::io(path, "locking pages in memory")(error),
    }
}

/// Bytes of this process under a lock, in memory or not: `VmLck` of `/proc/self/status`.
pub(super) fn locked_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The addresses of this process that are under a lock, in order.
///
/// # Errors
/// What reading `/proc/self/smaps` answers. It is read only where anything is locked at all: it looks at every page.
pub(super) fn locked() -> io::Result<Vec<Range<usize>>> {
    if locked_bytes() == 0 {
        return Ok(Vec::new());
    }
    Ok(locked_in(&std::fs::read_to_string("/proc/self/smaps")?))
}

/// By the text of `/proc/PID/smaps`: a line for the addresses, and behind it one of flags, `lo` among them.
fn locked_in(smaps: &str) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = 0..0;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "lo") {
                match found.last_mut() {
                    Some(last) if last.end == at.start => last.end = at.end,
                    _ => found.push(at.clone()),
                }
            }
        } else if let Some((start, end)) = line.split(' ').next().and_then(|first| first.split_once('-'))
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            at = start..end;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{CHUNK, Mapping};
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn locked_regions_are_read_from_their_flags_and_joined() {
        let text = "1000-2000 rw-p 0 0:0 0 \nSize: 4 kB\nVmFlags: rd wr lo \n\
                    2000-3000 r--p 0 0:0 0 /a-b\nVmFlags: rd lo lf\n\
                    5000-6000 r--p 0 0:0 0\nVmFlags: rd local\n7000-8000 r--p 0 0:0 0\nVmFlags: lo\n";
        assert_eq!(locked_in(text), [0x1000..0x3000, 0x7000..0x8000]);
    }

    #[test]
    fn locking_copies_no_page_of_a_writable_private_mapping() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 2 * CHUNK], 0).unwrap();
        // SAFETY: a file of our own, unlinked, not written any more.
        let mapping = unsafe { Mapping::open_copy_on_write(&file, 2 * CHUNK) }.unwrap();
        let page = rustix::param::page_size();
        let part = 3 * page..CHUNK + page;
        if let Err(error) =
            lock_range(Path::new("f"), mapping.ptr().wrapping_add(part.start), part.len(), &mapping.moving)
        {
            return crate::skipped("locking_copies_no_page_of_a_writable_private_mapping", error);
        }
        let found = mapping.residency(0..2 * CHUNK).unwrap();
        assert_eq!((found.private, found.locked), (0, part.len() / page));
        assert_eq!(mapping.residency(0..3 * page).unwrap().locked, 0);
        unlock_range(mapping.ptr(), 2 * CHUNK, &mapping.moving).unwrap();
        assert_eq!(mapping.residency(0..2 * CHUNK).unwrap().locked, 0);
    }
}
