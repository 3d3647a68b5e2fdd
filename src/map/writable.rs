//! Which pages of a private mapping may be written.
//!
//! A private mapping of a file starts out read-only, and the pages of what somebody takes to write are made writable
//! then, with mprotect(2). A mapping that is writable as a whole would be charged as a whole where the kernel promises
//! memory for every page that may be written (`vm.overcommit_memory` is 2), and a device that copies from it would
//! break its sharing with the page cache: a driver that pins pages of a writable private mapping asks for them to be
//! written.

use super::{Backing, CHUNK, Mapping};
use crate::error::Error;
use rustix::io::Errno;
use rustix::mm::{MprotectFlags, mprotect};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Runs of writable pages in all mappings together. Each may take two of the maps that a process may have.
static RUNS: AtomicUsize = AtomicUsize::new(0);

/// The pages of a private mapping that may be written, as ranges of addresses.
#[derive(Debug, Default)]
pub(super) struct Writable {
    runs: Mutex<Runs>,
}

/// Ends by starts, apart and not touching.
#[derive(Debug, Default)]
pub(super) struct Runs(BTreeMap<usize, usize>);

impl Writable {
    pub(super) fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        RUNS.fetch_sub(self.0.len(), Ordering::Relaxed);
    }
}

impl Runs {
    /// The run that holds a range or touches its start.
    fn before(&self, start: usize) -> Option<Range<usize>> {
        self.0.range(..=start).next_back().map(|(&start, &end)| start..end)
    }

    /// The run that starts at an address, or the next one.
    fn behind(&self, start: usize) -> Option<Range<usize>> {
        self.0.range(start..).next().map(|(&start, &end)| start..end)
    }

    fn holds(&self, range: &Range<usize>) -> bool {
        self.before(range.start).is_some_and(|run| range.end <= run.end)
    }

    /// The parts of a range that may not be written.
    pub(super) fn read_only(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let mut parts = Vec::new();
        let mut from = self.before(range.start).map_or(range.start, |run| run.end.max(range.start));
        while let Some(run) = self.behind(from).filter(|run| run.start < range.end) {
            parts.push(from..run.start);
            from = run.end;
        }
        parts.push(from..range.end);
        parts.retain(|part| part.start < part.end);
        parts
    }

    /// The parts of a range that may be written.
    fn within(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let first = self.before(range.start).map_or(range.start, |run| run.start);
        let runs =
            self.0.range(first..range.end).map(|(&start, &end)| start.max(range.start)..end.min(range.end));
        runs.filter(|run| run.start < run.end).collect()
    }

    /// Notes that a range may be written.
    pub(super) fn add(&mut self, range: Range<usize>) {
        let before = self.0.len();
        let mut whole = range;
        if let Some(run) = self.before(whole.start).filter(|run| run.end >= whole.start) {
            whole = run.start..whole.end.max(run.end);
        }
        while let Some(run) = self.behind(whole.start).filter(|run| run.start <= whole.end) {
            self.0.remove(&run.start);
            whole.end = whole.end.max(run.end);
        }
        self.0.insert(whole.start, whole.end);
        // Wraps where runs became fewer, as the sum does.
        RUNS.fetch_add(self.0.len().wrapping_sub(before), Ordering::Relaxed);
    }

    /// A range that reaches to the nearest run, so that no further run is needed; as it is where there is none.
    fn joined(&self, range: &Range<usize>) -> Range<usize> {
        let before =
            self.before(range.start).map(|run| (range.start.saturating_sub(run.end), run.start..range.end));
        let behind =
            self.behind(range.start).map(|run| (run.start.saturating_sub(range.end), range.start..run.end));
        let nearest = before.into_iter().chain(behind).min_by_key(|(gap, _)| *gap);
        nearest.map_or(range.clone(), |(_, joined)| joined.start.min(range.start)..joined.end.max(range.end))
    }
}

impl Mapping {
    /// Makes the pages that hold a part of a private mapping writable: what is written to them becomes this process's
    /// own. Does nothing for other mappings, which are writable from the start.
    ///
    /// # Errors
    /// `ENOMEM` where the kernel does not promise the memory; `InvalidInput` for a range outside the mapping.
    pub(super) fn make_writable(&self, part: &Range<usize>) -> io::Result<()> {
        self.check(part)?;
        let Some(writable) = self.writable.as_ref().filter(|_| !part.is_empty()) else { return Ok(()) };
        if self.backing == Backing::Lent {
            // The owner's, who may have it in pages that are nobody's to write.
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let range = self.pages_holding(part);
        // Held meanwhile: whoever looks at the runs sees them as they are.
        let mut runs = writable.runs();
        if runs.holds(&range) {
            return Ok(());
        }
        let alone = RUNS.load(Ordering::Relaxed) < most_runs();
        let tries = [alone.then(|| range.clone()), Some(runs.joined(&range))];
        let mut refused = Errno::NOMEM;
        for range in tries.into_iter().flatten() {
            let at = self.raw.as_mut_ptr().with_addr(range.start).cast();
            // SAFETY: whole pages of a private mapping that `raw` owns: the range lies inside (checked above), and so do
            // all runs, to one of which it may have been extended. They stay readable, and no byte changes.
            match unsafe { mprotect(at, range.len(), MprotectFlags::READ | MprotectFlags::WRITE) } {
                Ok(()) => {
                    runs.add(range.clone());
                    drop(runs);
                    if self.moving.was_locked() {
                        self.bring_back(&range);
                    }
                    return Ok(());
                }
                // Too many maps, for which joining two of them helps; or too much memory promised.
                Err(Errno::NOMEM) => refused = Errno::NOMEM,
                Err(error) => return Err(error.into()),
            }
        }
        Err(refused.into())
    }

    /// Reads the pages around both ends of a run in again: where a huge page is divided between two maps, the kernel
    /// takes all of it out of the page tables, and with that, what was locked is so no more until it is touched.
    fn bring_back(&self, run: &Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            use rustix::mm::{Advice, madvise};
            let (first, page) = (self.ptr().addr(), rustix::param::page_size());
            let all = first / page * page..(first + self.len).next_multiple_of(page);
            for end in [run.start, run.end] {
                let start = (end / CHUNK * CHUNK).max(all.start);
                let len = (end / CHUNK * CHUNK + CHUNK).min(all.end).saturating_sub(start);
                let at = self.raw.as_mut_ptr().with_addr(start).cast();
                // SAFETY: pages that `raw` maps; reading them in changes no byte. What cannot be read shows when it is
                // touched, as it would have.
                unsafe { madvise(at, len, Advice::LinuxPopulateRead) }.ok();
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = run;
    }

    /// Notes that the pages that hold a part may be written by now: they were mapped so, or put in others' place.
    pub(super) fn note_writable(&self, part: &Range<usize>) {
        if let (Some(writable), false) = (&self.writable, part.is_empty()) {
            writable.runs().add(self.pages_holding(part));
        }
    }

    /// The pages that hold a part, by address.
    fn pages_holding(&self, part: &Range<usize>) -> Range<usize> {
        let (first, page) = (self.ptr().addr(), rustix::param::page_size());
        (first + part.start) / page * page..(first + part.end).next_multiple_of(page)
    }

    /// A part of the bytes, to write.
    ///
    /// # Errors
    /// As [`Mapping::make_writable`].
    ///
    /// # Panics
    /// If the part lies outside: a fault of this crate.
    pub(crate) fn part_mut(&mut self, part: Range<usize>) -> io::Result<&mut [u8]> {
        self.make_writable(&part)?;
        assert!(part.start <= part.end && part.end <= self.len);
        // SAFETY: inside (asserted) and mapped; writable, as was just seen to, or from the start (field invariant);
        // `&mut self` makes it the only reference.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ptr().wrapping_add(part.start), part.len()) })
    }
}

impl Mapping {
    /// Several parts of the bytes, in order and apart, to write.
    ///
    /// # Errors
    /// As [`Mapping::make_writable`].
    ///
    /// # Panics
    /// If they are not in order, overlap, or lie outside: a fault of this crate.
    pub(crate) fn parts_mut(&mut self, parts: &[Range<usize>]) -> io::Result<Vec<&mut [u8]>> {
        let mut end = 0;
        let mut slices = Vec::with_capacity(parts.len());
        for part in parts {
            assert!(end <= part.start && part.start <= part.end && part.end <= self.len);
            end = part.end;
            self.make_writable(part)?;
            // SAFETY: inside, and apart from those before (asserted); mapped and writable, as in `part_mut`. `&mut self`
            // lasts as long as the slices.
            slices.push(unsafe {
                std::slice::from_raw_parts_mut(self.ptr().wrapping_add(part.start), part.len())
            });
        }
        Ok(slices)
    }
}

/// The pages among those that hold a part of a mapping's bytes, from `ptr` on, that are this process's own, by address:
/// of a private mapping of a file, and only pages that may be written can be.
///
/// # Errors
/// As `private::pages`.
pub(super) fn private(
    backing: Backing,
    writable: Option<&Writable>,
    ptr: *const u8,
    part: &Range<usize>,
) -> io::Result<Vec<Range<usize>>> {
    if !matches!(backing, Backing::CopyOnWrite | Backing::ReadOnly) || part.is_empty() {
        return Ok(Vec::new());
    }
    let page = rustix::param::page_size();
    let first = ptr.addr();
    let pages = (first + part.start) / page * page..(first + part.end).next_multiple_of(page);
    let runs = match writable {
        None => vec![pages],
        Some(writable) => writable.runs().within(&pages),
    };
    #[cfg(target_os = "linux")]
    {
        let mut found = Vec::new();
        for run in runs {
            found.extend(super::private::pages(ptr.with_addr(run.start), run.len())?);
        }
        Ok(found)
    }
    #[cfg(not(target_os = "linux"))]
    Ok(runs)
}

/// How many runs there may be before they are joined: a quarter of the maps that the kernel lets a process have, so
/// that runs and what lies between them take half.
fn most_runs() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
        most.trim().parse::<usize>().unwrap_or(65_530) / 4
    })
}

/// What a refusal to make `asked` bytes of something writable means.
pub(crate) fn refused(path: &Path, what: &str, asked: usize, error: io::Error) -> Error {
    let strict =
        std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2");
    let why = if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Data).current {
        format!(
            " (RLIMIT_DATA lets this process have {limit} bytes of memory that may be written: take fewer tensors to \
             write, or open the model read-only, with mode \"r\")"
        )
    } else if strict {
        let left =
            promised_left().map(|left| format!(", of which {left} bytes are left")).unwrap_or_default();
        format!(
            " (as vm.overcommit_memory is 2, the kernel promises memory for all that may be written{left}: take fewer \
             tensors to write, or open the model read-only, with mode \"r\")"
        )
    } else {
        String::new()
    };
    Error::Io {
        path: path.into(),
        action: format!("making {asked} bytes of {what} writable{why}").into(),
        source: error,
    }
}

/// What the kernel may still promise: `CommitLimit` less `Committed_AS` of `/proc/meminfo`.
fn promised_left() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(kib("CommitLimit:")?.saturating_sub(kib("Committed_AS:")?).saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_what_a_set_of_all_their_addresses_says(
            ranges in proptest::collection::vec((0usize..60, 1usize..9), 0..30),
            (start, len) in (0usize..60, 1usize..20),
        ) {
            let (mut runs, mut set) = (Runs::default(), [false; 80]);
            for (start, len) in ranges {
                runs.add(start..start + len);
                set[start..start + len].fill(true);
            }
            let range = start..start + len;
            let all: Vec<Range<usize>> = runs.0.iter().map(|(&start, &end)| start..end).collect();
            // Apart and not touching, or there would be more maps than there need be.
            prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start));
            let covers = |parts: &[Range<usize>], at: usize| parts.iter().any(|part| part.contains(&at));
            for (at, &is) in set.iter().enumerate() {
                prop_assert_eq!(covers(&all, at), is);
                prop_assert_eq!(covers(&runs.within(&range), at), range.contains(&at) && is);
                prop_assert_eq!(covers(&runs.read_only(&range), at), range.contains(&at) && !is);
            }
            prop_assert_eq!(runs.holds(&range), set[range.clone()].iter().all(|&is| is));
            let joined = runs.joined(&range);
            prop_assert!(joined.start <= range.start && range.end <= joined.end);
            let before = all.len();
            runs.add(joined);
            prop_assert!(before == 0 || runs.0.len() <= before, "joining takes no further run");
        }
    }
}
