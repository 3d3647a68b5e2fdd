//! The pages of a mapping, to be brought, given back and locked: nothing here looks at a byte.

use super::mlock::{self, Moving};
use super::raw::Raw;
use super::writable::{self, Writable};
use super::{Backing, Mapping, Residency, mapping, residency};
use crate::error::Result;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The pages of a mapping. Keeps them mapped, and can advise and ask, but never reads or writes a byte: so it may
/// outlive the [`Mapping`], and belong to a thread in the background.
#[derive(Clone)]
pub(crate) struct Pages {
    raw: Arc<Raw>,
    // INVARIANT: start + len <= raw.len(), as in the mapping this is of.
    start: usize,
    len: usize,
    /// Where in the file the first byte lies.
    offset: u64,
    backing: Backing,
    /// As the mapping's.
    writable: Option<Arc<Writable>>,
    /// The other mapping of the same file that a copy-on-write one has, as long.
    base: Option<Arc<Raw>>,
    path: Arc<Path>,
    identity: Option<(u64, u64)>,
    told: bool,
    locked_whole: bool,
    moving: Arc<Moving>,
    /// The file, opened again when it is first needed; none where its path leads to another now.
    file: Arc<OnceLock<Option<File>>>,
}

/// What giving pages back came to, in bytes of whole pages.
///
/// ```
/// # // SAFETY: nobody writes to the file while it is mapped.
/// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
/// model.tensor_mut("fc1.weight")?.as_mut_slice::<f32>()?[2000] = 0.5;
/// let evicted = model.evict(..)?;
/// assert_eq!(evicted.kept, 4096); // the page with the edit
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
#[non_exhaustive]
pub struct Evicted {
    /// Bytes that are no longer in memory.
    pub freed: u64,
    /// Bytes that stay because they were edited: they are nowhere else.
    pub kept: u64,
    /// Bytes that stay in the page cache: another process or mapping uses them, or the file system has no other
    /// place for them (tmpfs); they have left this process's page tables, and count as its memory no more. Of another
    /// user's file only what this process still maps counts, as the kernel tells strangers nothing of its cache; a
    /// copy-on-write mapping of one keeps its pages until memory runs out.
    pub remaining: u64,
}

impl std::ops::AddAssign for Evicted {
    /// Adds what another range came to.
    fn add_assign(&mut self, other: Self) {
        self.freed += other.freed;
        self.kept += other.kept;
        self.remaining += other.remaining;
    }
}

impl Mapping {
    /// Its pages; `path` is where the file was opened.
    pub(crate) fn pages(&self, path: &Path) -> Pages {
        Pages {
            raw: self.raw.clone(),
            start: self.start,
            len: self.len,
            offset: self.offset,
            backing: self.backing,
            writable: self.writable.clone(),
            base: self.base.as_ref().map(|base| base.raw.clone()),
            path: path.into(),
            identity: self.identity,
            told: self.told,
            locked_whole: self.locked_whole,
            moving: self.moving.clone(),
            file: Arc::default(),
        }
    }
}

impl Pages {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the bytes are a file's, and so can be read again.
    pub(crate) fn is_of_a_file(&self) -> bool {
        !matches!(self.backing, Backing::Owned | Backing::Lent)
    }

    /// Whether all of them were locked when they were mapped.
    pub(crate) fn is_locked_whole(&self) -> bool {
        self.locked_whole
    }

    fn ptr(&self, at: usize) -> *mut u8 {
        self.raw.as_mut_ptr().wrapping_add(self.start + at)
    }

    /// The file, where its path still leads to it. Asked for only by what can do without.
    pub(crate) fn file(&self) -> Option<&File> {
        use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
        let open = || {
            let identity = self.identity?;
            // Looked at before it is opened: to open another file could break its lease, or wait.
            let there = std::fs::metadata(&self.path).ok()?;
            if (there.dev(), there.ino()) != identity {
                return None;
            }
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&self.path).ok()?;
            // Reading is of exactly what is asked: the kernel's guesses would bring neighbours in.
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).ok();
            (mapping::identity(&file)? == identity).then_some(file)
        };
        self.file.get_or_init(open).as_ref()
    }

    /// Reads the pages of a part in. With `exact` no neighbours: where a huge page is mapped at its first touch, the
    /// kernel reads the 2 MiB around it, and those behind.
    ///
    /// # Errors
    /// `EFAULT`, where a page cannot be read: the file ends before it, or the disk failed.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn bring(&self, part: Range<usize>, exact: bool) -> io::Result<()> {
        assert!(part.start <= part.end && part.end <= self.len);
        if part.is_empty() || !self.is_of_a_file() {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        {
            if exact && let Some(file) = self.file() {
                read_ahead(file, self.in_file(&part));
            }
            match self.raw.advise_range(memmap2::Advice::PopulateRead, self.start + part.start, part.len()) {
                // A kernel before 5.14: at least their reading is begun.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.raw.advise_range(memmap2::Advice::WillNeed, self.start + part.start, part.len())
                }
                done => done,
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = exact;
            self.raw.advise_range(memmap2::Advice::WillNeed, self.start + part.start, part.len())
        }
    }

    /// A part, as bytes of the file.
    fn in_file(&self, part: &Range<usize>) -> Range<u64> {
        self.offset + part.start as u64..self.offset + part.end as u64
    }

    /// Reads runs of the file, each from its offset on; only where there is a [`Pages::file`].
    ///
    /// # Errors
    /// What pread(2) answers; `UnexpectedEof` where the file ends before.
    pub(crate) fn read(&self, runs: Vec<(usize, &mut [u8])>) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let file = self.file().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        // All of it is asked of the disk before the first is waited for.
        #[cfg(target_os = "linux")]
        {
            let page = rustix::param::page_size() as u64;
            let mut asked = 0..0;
            for (at, to) in &runs {
                let bytes = self.in_file(&(*at..at + to.len()));
                let pages = bytes.start / page * page..bytes.end.next_multiple_of(page);
                if pages.start <= asked.end && asked.end > 0 {
                    asked.end = pages.end;
                } else {
                    read_ahead(file, asked);
                    asked = pages;
                }
            }
            read_ahead(file, asked);
        }
        runs.into_iter().try_for_each(|(at, to)| file.read_exact_at(to, self.offset + at as u64))
    }

    /// The pages of a part that are this process's own, as addresses.
    #[cfg(target_os = "linux")]
    fn edited(&self, part: Range<usize>) -> io::Result<Vec<Range<usize>>> {
        writable::private(self.backing, self.writable.as_deref(), self.ptr(0), &part)
    }

    /// Gives the pages that hold a part back to the system. What was edited stays.
    ///
    /// # Errors
    /// What the kernel answers; `EINVAL` where pages are locked.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn evict(&self, part: Range<usize>) -> io::Result<Evicted> {
        assert!(part.start <= part.end && part.end <= self.len);
        if part.is_empty() || !self.is_of_a_file() {
            return Ok(Evicted::default());
        }
        #[cfg(target_os = "linux")]
        return self.evict_pages(part);
        #[cfg(not(target_os = "linux"))]
        Ok(Evicted::default())
    }

    /// Never `MADV_DONTNEED` on memory that can be written: between looking which pages were written and giving the
    /// others back, another thread may write to one. `MADV_PAGEOUT` reclaims a page of the file and leaves one that
    /// was written be (or puts it into swap, where there is any).
    #[cfg(target_os = "linux")]
    fn evict_pages(&self, part: Range<usize>) -> io::Result<Evicted> {
        use rustix::mm::{Advice, madvise};
        let page = rustix::param::page_size();
        let size = |pages: usize| (pages * page) as u64;
        // A window's first byte may lie inside a page.
        let before_part = self.ptr(part.start).addr() % page;
        let start = self.ptr(part.start).addr() - before_part;
        let end = self.ptr(part.end).addr().next_multiple_of(page);
        // Where the kernel does not tell (no /proc, or a process that changed its user), nothing is counted.
        let count = || residency::of(self.ptr(part.start), part.len(), self.told, &[]).unwrap_or_default();
        let before = count();
        if self.told && before.pages > 0 && before.resident == 0 && before.touched == 0 {
            return Ok(Evicted { kept: size(before.private), ..Evicted::default() });
        }
        // A page mapped twice is not reclaimed.
        if let Some(base) = &self.base {
            let at = base.as_mut_ptr().wrapping_add(self.start + part.start - before_part).cast();
            // SAFETY: pages of a read-only mapping of the file: they are read again when they are touched, with the
            // same bytes.
            unsafe { madvise(at, end - start, Advice::LinuxDontNeed) }?;
        }
        let mut clean = Vec::new();
        let mut from = start;
        for run in self.edited(part.clone())? {
            clean.push(from..run.start.max(from));
            from = run.end;
        }
        clean.push(from..end);
        clean.retain(|run| !run.is_empty());
        let at = |address: usize| self.raw.as_mut_ptr().with_addr(address).cast();
        let page_out = |run: &Range<usize>| -> io::Result<()> {
            // SAFETY: pages that `raw` maps; the advice keeps every byte as it is, whoever writes meanwhile.
            unsafe { madvise(at(run.start), run.len(), Advice::LinuxPageOut) }?;
            if let (Backing::ReadOnly, Some(writable)) = (self.backing, &self.writable) {
                // Held meanwhile, so that no page becomes writable.
                let runs = writable.runs();
                for run in runs.read_only(run) {
                    // The file of another user is not paged out (it would tell who uses it), but it can be let go.
                    // SAFETY: pages of a read-only mapping of the file, which nobody can write: as above.
                    unsafe { madvise(at(run.start), run.len(), Advice::LinuxDontNeed) }?;
                }
            }
            Ok(())
        };
        let held = |found: Residency| found.resident.max(found.touched).saturating_sub(found.private);
        // A page that another processor has just brought is not on the kernel's lists yet, and passed over; fadvise has
        // it put there where it meets one.
        let mut after = before;
        for _ in 0..3 {
            clean.iter().try_for_each(page_out)?;
            // A huge page that reaches beyond the part is split only where it is mapped by small ones: at the first and
            // the last page is enough. (If it is in memory: this is not to read anything.)
            let ends =
                [clean.first().map(|run| (run, run.start)), clean.last().map(|run| (run, run.end - page))];
            for (run, address) in ends.into_iter().flatten() {
                if residency::of(at(address).cast(), page, self.told, &[])
                    .is_ok_and(|found| found.resident == 1)
                {
                    // SAFETY: a page that `raw` maps; reading it in changes nothing.
                    unsafe { madvise(at(address), page, Advice::LinuxPopulateRead) }.ok();
                    page_out(run)?;
                }
            }
            // What is cached and mapped by nobody; under a page that was edited, too.
            if let Some(file) = self.file() {
                let len = std::num::NonZeroU64::new((end - start) as u64);
                let from = self.in_file(&part).start - before_part as u64;
                rustix::fs::fadvise(file, from, len, rustix::fs::Advice::DontNeed).ok();
            }
            after = count();
            if held(after) == 0 {
                break;
            }
        }
        Ok(Evicted {
            freed: size(held(before).saturating_sub(held(after))),
            kept: size(after.private),
            remaining: size(held(after)),
        })
    }

    /// Holds the pages of a part in memory, and reads them in.
    ///
    /// # Errors
    /// As [`mlock::lock_range`]; a part of them may be locked then.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn lock(&self, part: Range<usize>) -> Result<()> {
        assert!(part.start <= part.end && part.end <= self.len);
        mlock::lock_range(&self.path, self.ptr(part.start), part.len(), &self.moving)
    }

    /// Ends [`Pages::lock`].
    ///
    /// # Errors
    /// What munlock(2) answers.
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn unlock(&self, part: Range<usize>) -> io::Result<()> {
        assert!(part.start <= part.end && part.end <= self.len);
        mlock::unlock_range(self.ptr(part.start), part.len(), &self.moving)
    }

    /// The parts that are locked, whoever locked them, in order.
    ///
    /// # Errors
    /// As [`mlock::locked`].
    pub(crate) fn locked(&self) -> io::Result<Vec<Range<usize>>> {
        let (start, end) = (self.ptr(0).addr(), self.ptr(self.len).addr());
        let within = |run: &Range<usize>| run.start.max(start) - start..run.end.min(end).max(start) - start;
        let locked = {
            let _still = self.moving.wait();
            mlock::locked()?
        };
        Ok(locked.iter().filter(|run| run.start < end && run.end > start).map(within).collect())
    }

    /// Which pages of each part are in memory, and whose.
    ///
    /// # Errors
    /// As [`Mapping::residency`].
    ///
    /// # Panics
    /// If a part lies outside: a fault of this crate.
    pub(crate) fn residency(&self, parts: &[Range<usize>]) -> io::Result<Vec<Residency>> {
        let locked = mlock::locked()?;
        let of = |part: &Range<usize>| {
            assert!(part.start <= part.end && part.end <= self.len);
            residency::of(self.ptr(part.start), part.len(), self.told, &locked)
        };
        parts.iter().map(of).collect()
    }

    /// The pages that hold a part, as a part; all of the last page counts, as far as there are bytes.
    pub(crate) fn pages_of(&self, part: &Range<usize>) -> Range<usize> {
        let page = rustix::param::page_size();
        let base = self.ptr(0).addr();
        let start = ((base + part.start) / page * page).saturating_sub(base);
        start..((base + part.end).next_multiple_of(page) - base).min(self.len)
    }

    /// The pages that hold nothing but a part; the last page of all is one.
    pub(crate) fn pages_in(&self, part: &Range<usize>) -> Range<usize> {
        let page = rustix::param::page_size();
        let base = self.ptr(0).addr();
        let start = ((base + part.start).next_multiple_of(page) - base).min(self.len);
        let end = if part.end == self.len {
            self.len
        } else {
            ((base + part.end) / page * page).saturating_sub(base)
        };
        start..end.max(start)
    }
}

/// Begins to read exactly the pages of a range; best effort.
#[cfg(target_os = "linux")]
fn read_ahead(file: &File, range: Range<u64>) {
    use std::os::fd::AsRawFd as _;
    // One call does no more than the disk's read-ahead window, which is 128 KiB at least.
    const STEP: usize = 128 << 10;
    let page = rustix::param::page_size() as u64;
    let (mut from, end) = (range.start / page * page, range.end.next_multiple_of(page));
    while from < end {
        let len = usize::try_from(end - from).unwrap_or(STEP).min(STEP);
        // SAFETY: a system call on a descriptor that is open, with numbers.
        unsafe { libc::readahead(file.as_raw_fd(), from.cast_signed() as _, len) };
        from += len as u64;
    }
}
