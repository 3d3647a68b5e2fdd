//! Tensor after tensor through a bounded part of memory.

use super::Paging;
use super::prefetch::{Piece, pieces, unreadable};
use super::schedule::{Schedule, Step};
use crate::error::{Error, Result, quote};
use crate::layout::Catalog;
use crate::layout::{Position, Select};
use crate::map::{CHUNK, Pages};
use crate::work::Progress;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Memory to read ahead into, unless told otherwise.
const BUDGET: u64 = 1 << 30;

/// Threads that read ahead: a disk is busy with fewer than a memory bus.
const READERS: usize = 4;

/// How to stream a model's tensors; [`Model::stream`](crate::Model::stream) takes it.
///
/// ```
/// use maptensors::{Model, Order, Select, StreamOptions};
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let model = unsafe { Model::open("models/digits.safetensors")? };
/// let options = StreamOptions::new()
///     .budget(64 << 20)
///     .select(Select::matching(|name| name.ends_with(".weight")))
///     .order(Order::Name);
/// let names: Vec<_> = model.stream(options)?.map(|tensor| Ok(tensor?.name())).collect::<Result<_, maptensors::Error>>()?;
/// assert_eq!(names, ["fc1.weight", "fc2.weight"]);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StreamOptions<'a> {
    budget: u64,
    select: Select<'a>,
    order: Order<'a>,
}

/// The order in which a stream brings tensors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order<'a> {
    /// As they lie in their files, which reads each byte once.
    #[default]
    File,
    /// By name. Small tensors that are far apart are read with their neighbours, perhaps more than once.
    Name,
    /// As listed; what is selected besides is left out.
    Given(Vec<&'a str>),
}

impl Default for StreamOptions<'_> {
    fn default() -> Self {
        Self { budget: BUDGET, select: Select::from(..), order: Order::File }
    }
}

impl<'a> StreamOptions<'a> {
    /// The defaults: everything, in file order, through 1 GiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that may be in memory at once: of the tensor that is out, and of those that are read ahead. Counted
    /// in pieces of 2 MiB, one at least; in file order the kernel's own read-ahead is some 16 MiB further. A tensor
    /// that is larger passes all the same: its beginning is read ahead, the rest when it is touched.
    #[must_use]
    pub fn budget(mut self, bytes: u64) -> Self {
        self.budget = bytes;
        self
    }

    /// Which tensors; all unless told.
    #[must_use]
    pub fn select(mut self, select: impl Into<Select<'a>>) -> Self {
        self.select = select.into();
        self
    }

    /// In which order; that of the files unless told.
    #[must_use]
    pub fn order(mut self, order: Order<'a>) -> Self {
        self.order = order;
        self
    }
}

/// Reads tensors ahead in the background, and gives back what is behind. Dropping it ends that.
pub(crate) struct ReadAhead {
    shared: Arc<Shared>,
    order: Vec<Position>,
    sizes: Vec<u64>,
    /// The tensor that is asked for next.
    at: usize,
    progress: Progress,
    /// Threads that read, and whose: a fork's child has none of them.
    readers: (usize, u32),
}

struct Shared {
    pages: Vec<Pages>,
    /// What there is of each chunk.
    chunks: HashMap<usize, Piece>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    schedule: Schedule,
    /// Chunks that are being brought.
    coming: HashSet<usize>,
    failed: HashSet<usize>,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, timeout: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Does what is next to be done; the state comes back locked, with what that was.
    fn step<'a>(&'a self, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, Step) {
        let step = state.schedule.next();
        match step {
            Step::Bring(chunk) => {
                state.coming.insert(chunk);
                drop(state);
                let brought = self
                    .chunks
                    .get(&chunk)
                    .map_or(Ok(()), |piece| self.pages[piece.shard].bring(piece.part.clone(), piece.exact));
                state = self.state();
                state.coming.remove(&chunk);
                if brought.is_err() {
                    state.failed.insert(chunk);
                }
                self.changed.notify_all();
            }
            Step::Drop(chunk) => {
                drop(state);
                self.give_back(chunk);
                state = self.state();
            }
            Step::Wait | Step::Done => {}
        }
        (state, step)
    }

    /// Best effort: what is locked, say, stays.
    fn give_back(&self, chunk: usize) {
        let Some(piece) = self.chunks.get(&chunk) else { return };
        let pages = &self.pages[piece.shard];
        pages.evict(pages.pages_of(&piece.part)).ok();
    }

    fn read(&self) {
        let mut state = self.state();
        while !state.ended {
            let step;
            (state, step) = self.step(state);
            match step {
                Step::Done => return,
                Step::Wait => state = self.wait(state, Duration::from_secs(3600)),
                Step::Bring(_) | Step::Drop(_) => {}
            }
        }
    }
}

impl Paging<'_> {
    /// Begins to read ahead.
    pub(crate) fn read_ahead(&self, options: &StreamOptions<'_>) -> Result<ReadAhead> {
        let order = self.order(options)?;
        let mut positions = order.clone();
        positions.sort_unstable();
        // Chunks have numbers over all files, and none is of two.
        let mut first = Vec::with_capacity(self.pages.len());
        let mut next = 0;
        for shard in self.catalog.shards() {
            first.push(next);
            next += shard.layout.data_range().end.div_ceil(CHUNK);
        }
        let mut chunks: HashMap<usize, Piece> = HashMap::new();
        let data = |shard: usize| self.catalog.shards()[shard].layout.data_range();
        for piece in pieces(&self.catalog.runs(&positions), data) {
            let chunk = first[piece.shard] + piece.part.start / CHUNK;
            // In another order, what the kernel reads behind a huge page would only be in the way.
            let piece = Piece { exact: piece.exact || options.order != Order::File, ..piece };
            // Two runs in one chunk: what lies between is little.
            chunks.entry(chunk).and_modify(|whole| whole.part.end = piece.part.end).or_insert(piece);
        }
        let needs = |&position: &Position| {
            let bytes = self.catalog.bytes(position);
            let first = first[position.0];
            if bytes.is_empty() {
                0..0
            } else {
                first + bytes.start / CHUNK..first + bytes.end.div_ceil(CHUNK)
            }
        };
        let limit = usize::try_from(options.budget / CHUNK as u64).unwrap_or(usize::MAX).max(1);
        let schedule = Schedule::new(order.iter().map(needs).collect(), limit);
        let state = State { schedule, coming: HashSet::new(), failed: HashSet::new(), ended: false };
        let shared = Arc::new(Shared {
            pages: self.pages.clone(),
            chunks,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let mut readers = 0;
        for _ in 0..READERS.min(limit) {
            let theirs = shared.clone();
            let thread = std::thread::Builder::new().name("maptensors-stream".into());
            // Where the system gives no thread, the consumer reads.
            readers += usize::from(thread.spawn(move || theirs.read()).is_ok());
        }
        let sizes: Vec<u64> =
            order.iter().map(|&position| self.catalog.bytes(position).len() as u64).collect();
        let progress = Progress::default().over(sizes.iter().sum());
        Ok(ReadAhead { shared, order, sizes, at: 0, progress, readers: (readers, std::process::id()) })
    }

    fn order(&self, options: &StreamOptions<'_>) -> Result<Vec<Position>> {
        let mut order = self.catalog.select(&options.select)?;
        match &options.order {
            Order::File => {}
            Order::Name => order.sort_by_key(|&position| self.catalog.name(position)),
            Order::Given(names) => {
                let selected: HashSet<Position> = order.into_iter().collect();
                let mut seen = HashSet::new();
                order = Vec::with_capacity(names.len());
                for &name in names {
                    let position = self.catalog.find(name).ok_or_else(|| self.catalog.missing(name))?;
                    if !seen.insert(position) {
                        return Err(Error::Argument(format!("the order names tensor {} twice", quote(name))));
                    }
                    order.extend(selected.contains(&position).then_some(position));
                }
            }
        }
        Ok(order)
    }
}

impl ReadAhead {
    pub(crate) fn progress(&self) -> (u64, u64) {
        self.progress.so_far()
    }

    pub(crate) fn left(&self) -> usize {
        self.order.len() - self.at
    }

    /// Gives back what only the tensor that is out needed.
    fn pass(&mut self, tensor: usize) {
        let drop = self.shared.state().schedule.pass();
        for chunk in drop {
            self.shared.give_back(chunk);
        }
        self.shared.changed.notify_all();
        self.progress.add(self.sizes[tensor]);
    }

    /// The position of the next tensor, once it is there; what was out before is passed. `Some(Ok(None))` where that
    /// takes longer than `timeout`; `None` at the end.
    pub(crate) fn next(&mut self, catalog: &Catalog, timeout: Duration) -> Option<Result<Option<Position>>> {
        let deadline = Instant::now().checked_add(timeout);
        if self.at > 0 && self.is_out() {
            self.pass(self.at - 1);
        }
        let &position = self.order.get(self.at)?;
        let alone = self.readers.0 == 0 || self.readers.1 != std::process::id();
        let mut state = self.shared.state();
        let chunks = loop {
            match state.schedule.chunks(self.at) {
                Some(chunks) if !chunks.clone().any(|chunk| state.coming.contains(&chunk)) => break chunks,
                _ => {}
            }
            if alone {
                state.coming.clear();
                state = self.shared.step(state).0;
                continue;
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Some(Ok(None));
            }
            state = self.shared.wait(state, left.min(Duration::from_secs(3600)));
        };
        self.at += 1;
        let failed: Vec<usize> = chunks.filter(|chunk| state.failed.contains(chunk)).collect();
        drop(state);
        let bytes = catalog.bytes(position);
        for piece in failed.iter().filter_map(|chunk| self.shared.chunks.get(chunk)) {
            // What could not be read may be a neighbour's.
            let part = piece.part.start.max(bytes.start)..piece.part.end.min(bytes.end);
            let pages = &self.shared.pages[position.0];
            if let Err(error) = pages.bring(part.start..part.end.max(part.start), true) {
                return Some(Err(unreadable(pages.path(), catalog.name(position), &error)));
            }
        }
        Some(Ok(Some(position)))
    }

    /// Whether a tensor was handed out that has not been passed.
    fn is_out(&self) -> bool {
        self.shared.state().schedule.passed() < self.at
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        // In a fork's child there is nobody to tell, and the lock may be held by a thread that is not there.
        if self.readers.1 != std::process::id() {
            return;
        }
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
    }
}
