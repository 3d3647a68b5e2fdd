//! Bringing tensors into memory, in the background.

use super::{Paging, ToLock};
use crate::error::{Error, Result, quote};
use crate::layout::{Position, Run, Select};
use crate::map::{CHUNK, Pages};
use crate::work::{Progress, each_in_parallel};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Tensors on their way into memory, made by [`Model::prefetch`](crate::Model::prefetch). Dropped, they are brought
/// all the same; the thread in the background keeps the file mapped until then.
///
/// ```
/// use maptensors::Model;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { Model::open("models/digits.safetensors")? };
/// let prefetch = model.prefetch(["fc1.weight", "fc1.bias"])?;
/// while !prefetch.is_done() {
///     let (bytes, total) = prefetch.progress();
///     println!("{bytes} of {total}");
///     std::thread::sleep(std::time::Duration::from_millis(10));
/// }
/// assert!(prefetch.wait()?); // an I/O error would show here
/// # Ok::<(), maptensors::Error>(())
/// ```
pub struct Prefetch {
    shared: Arc<Shared>,
    /// Whose thread brings them: a fork's child has none.
    process: u32,
}

struct Shared {
    progress: Progress,
    cancelled: AtomicBool,
    /// Once it has ended: whether all is there, until somebody takes an error.
    outcome: Mutex<Option<Result<bool>>>,
    ended: Condvar,
}

/// What the background does, without the model.
struct Work {
    pages: Vec<Pages>,
    pieces: Vec<Piece>,
    /// What to lock, once it is there.
    lock: Option<ToLock>,
    /// To say which tensor could not be read.
    names: Vec<(Run, String)>,
}

/// Bytes of one chunk of a file.
pub(crate) struct Piece {
    pub(crate) shard: usize,
    pub(crate) part: Range<usize>,
    /// Whether others have bytes in the same chunk.
    pub(crate) exact: bool,
}

/// Cuts runs at file offsets that are multiples of [`CHUNK`].
pub(crate) fn pieces(runs: &[Run], data: impl Fn(usize) -> Range<usize>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (shard, run) in runs {
        let data = data(*shard);
        for chunk in run.start / CHUNK..run.end.div_ceil(CHUNK) {
            let part = (chunk * CHUNK).max(run.start)..((chunk + 1) * CHUNK).min(run.end);
            let all = (chunk * CHUNK).max(data.start)..((chunk + 1) * CHUNK).min(data.end);
            pieces.push(Piece { shard: *shard, exact: part != all, part });
        }
    }
    pieces
}

impl Paging<'_> {
    /// Begins to bring what is selected, and to lock it then.
    pub(crate) fn prefetch(&self, select: &Select<'_>, lock: bool) -> Result<Prefetch> {
        let positions = self.catalog.select(select)?;
        let runs = self.catalog.runs(&positions);
        let total = runs.iter().map(|(_, run)| run.len() as u64).sum();
        let named = |&position: &Position| {
            ((position.0, self.catalog.bytes(position)), self.catalog.name(position).to_owned())
        };
        let work = Work {
            pages: self.pages.clone(),
            pieces: pieces(&runs, |shard| self.catalog.shards()[shard].layout.data_range()),
            names: positions.iter().map(named).collect(),
            lock: lock.then(|| self.to_lock(&positions)),
        };
        let shared = Arc::new(Shared {
            progress: Progress::default().over(total),
            cancelled: AtomicBool::new(false),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new().name("maptensors-prefetch".into());
        thread
            .spawn(move || theirs.end(work.run(&theirs)))
            .map_err(Error::io(Path::new(""), "starting a thread to read ahead"))?;
        Ok(Prefetch { shared, process: std::process::id() })
    }
}

impl Work {
    fn run(self, shared: &Shared) -> Result<bool> {
        let Self { pages, pieces, lock: to_lock, names } = self;
        each_in_parallel(pieces, |piece: Piece| {
            if shared.cancelled.load(Ordering::Relaxed) {
                return Ok(());
            }
            let bytes = piece.part.len() as u64;
            let failed = |error| {
                let inside = |((shard, run), _): &&(Run, String)| {
                    *shard == piece.shard && run.start < piece.part.end && piece.part.start < run.end
                };
                let name = names.iter().find(inside).map_or("", |(_, name)| name);
                unreadable(pages[piece.shard].path(), name, &error)
            };
            pages[piece.shard].bring(piece.part.clone(), piece.exact).map_err(failed)?;
            shared.progress.add(bytes);
            Ok::<_, Error>(())
        })?;
        if shared.cancelled.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if let Some(to_lock) = to_lock {
            to_lock.lock(&pages)?;
        }
        Ok(true)
    }
}

/// What the kernel means by refusing to bring a page.
pub(crate) fn unreadable(path: &Path, name: &str, error: &io::Error) -> Error {
    let source = match error.raw_os_error() {
        Some(libc::EFAULT) => io::Error::other(format!(
            "tensor {}: its pages cannot be read: the file was cut short, or its disk fails",
            quote(name)
        )),
        _ => io::Error::new(error.kind(), format!("tensor {}: {error}", quote(name))),
    };
    Error::io(path, "reading ahead")(source)
}

impl Shared {
    fn end(&self, outcome: Result<bool>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.ended.notify_all();
    }
}

impl Prefetch {
    /// Bytes that are in memory, and all that will be.
    pub fn progress(&self) -> (u64, u64) {
        self.shared.progress.so_far()
    }

    /// Whether it was begun in the process that this one was forked from: nobody here is told of its end.
    fn is_elsewhere(&self) -> bool {
        self.process != std::process::id()
    }

    /// Does not wait: in a fork's child, the lock may be held by a thread that is not there.
    fn has_outcome(&self) -> bool {
        self.shared.outcome.try_lock().is_ok_and(|outcome| outcome.is_some())
    }

    /// Whether it has ended: all is there, it was cancelled, or it failed. In a child that was forked meanwhile, it
    /// has.
    pub fn is_done(&self) -> bool {
        self.is_elsewhere() || self.shared.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Ends it early; each thread finishes the 2 MiB that it is reading. What is there stays.
    ///
    /// ```
    /// # // SAFETY: nobody writes to the file while it is mapped.
    /// # let model = unsafe { maptensors::Model::open("models/digits.safetensors")? };
    /// let prefetch = model.prefetch(..)?;
    /// prefetch.cancel();
    /// let all = prefetch.wait()?; // false, unless it was faster
    /// # let _ = all;
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits until it has ended; whether all is there, so not cancelled.
    ///
    /// # Errors
    /// [`Error::Io`] where a page cannot be read, with the tensor; those of [`Model::lock`](crate::Model::lock) if
    /// that was asked for; [`Error::Argument`] in a child that was forked meanwhile: the thread is the parent's.
    pub fn wait(self) -> Result<bool> {
        loop {
            if let Some(outcome) = self.wait_for(Duration::MAX) {
                return outcome;
            }
        }
    }

    /// As [`Prefetch::wait`], no longer than `timeout`; `None` if it goes on. An error is told once, later calls
    /// tell `false`.
    ///
    /// # Errors
    /// As [`Prefetch::wait`].
    pub fn wait_for(&self, timeout: Duration) -> Option<Result<bool>> {
        if self.is_elsewhere() && !self.has_outcome() {
            let text = "it was begun in the process that this one was forked from; begin another";
            return Some(Err(Error::Argument(text.into())));
        }
        let deadline = Instant::now().checked_add(timeout);
        let mut outcome = self.shared.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        while outcome.is_none() {
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            // A wait of years overflows in some systems' clocks.
            let left = left.min(Duration::from_secs(3600));
            let waited = self.shared.ended.wait_timeout(outcome, left);
            outcome = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let all = matches!(*outcome, Some(Ok(true)));
        outcome.replace(Ok(all))
    }
}

impl std::fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (bytes, total) = self.progress();
        f.debug_struct("Prefetch").field("bytes", &bytes).field("total", &total).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_at_chunks_and_know_whether_they_have_theirs_alone() {
        let data = |_| 4096..3 * CHUNK + 100;
        let cut = |run: Range<usize>| -> Vec<(Range<usize>, bool)> {
            pieces(&[(0, run)], data).into_iter().map(|piece| (piece.part, piece.exact)).collect()
        };
        let whole = [
            (4096..CHUNK, false),
            (CHUNK..2 * CHUNK, false),
            (2 * CHUNK..3 * CHUNK, false),
            (3 * CHUNK..3 * CHUNK + 100, false),
        ];
        assert_eq!(cut(data(0)), whole);
        assert_eq!(cut(5000..CHUNK + 1), [(5000..CHUNK, true), (CHUNK..CHUNK + 1, true)]);
        assert_eq!(cut(CHUNK..2 * CHUNK), [(CHUNK..2 * CHUNK, false)]);
    }
}
