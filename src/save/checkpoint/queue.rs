//! What is done in the background: commits in their order, and the next output made ready.

use super::super::slot::Slot;
use super::super::{Commit, Draft, DraftOptions};
use super::Ready;
use super::store::Store;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::map::{Mapping, disk};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, thread};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// A checkpoint that has been saved, and how long that took.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Its file; in shards, what its files are named after.
    pub path: PathBuf,
    /// Bytes of tensor data.
    pub bytes: u64,
    /// What it was written into.
    pub ready: Ready,
    /// From the call until the tensors were copied: the pause of a trainer that saves in the background.
    pub staged: Duration,
    /// From the call until the checkpoint was visible and, if it is to be, durable.
    pub finished: Duration,
    /// Whether it survives a power loss.
    pub durable: bool,
}

/// A checkpoint on its way. Dropped, it is saved all the same.
#[derive(Debug)]
pub struct Saving {
    ticket: Arc<Ticket>,
    /// As [`Saved::staged`].
    pub staged: Duration,
}

impl Saving {
    /// Waits until it is saved.
    ///
    /// # Errors
    /// As [`Checkpointer::save`](super::Checkpointer::save). An error is told once.
    pub fn wait(&self) -> Result<Saved> {
        self.ticket.wait(None).unwrap_or_else(|| Err(told_already()))
    }

    /// Waits at most so long; `None` if it is not saved by then.
    ///
    /// # Errors
    /// As [`Saving::wait`].
    pub fn wait_for(&self, most: Duration) -> Option<Result<Saved>> {
        self.ticket.wait(Some(most))
    }

    /// Whether it is saved, or has failed.
    pub fn is_done(&self) -> bool {
        !matches!(*lock(&self.ticket.outcome), Outcome::Pending)
    }
}

#[derive(Debug)]
struct Ticket {
    outcome: Mutex<Outcome>,
    done: Condvar,
    /// A fork's child would wait for ever.
    owner: u32,
}

#[derive(Debug)]
enum Outcome {
    Pending,
    Saved(Saved),
    /// `None` once told.
    Failed(Option<Error>),
}

impl Ticket {
    fn new() -> Self {
        Self { outcome: Mutex::new(Outcome::Pending), done: Condvar::new(), owner: std::process::id() }
    }

    fn tell(&self, outcome: Outcome) {
        *lock(&self.outcome) = outcome;
        self.done.notify_all();
    }

    fn wait(&self, most: Option<Duration>) -> Option<Result<Saved>> {
        if self.owner != std::process::id() {
            return Some(Err(not_ours()));
        }
        // Longer than the clock can count is for ever.
        let until = most.and_then(|most| Instant::now().checked_add(most));
        let mut outcome = lock(&self.outcome);
        loop {
            match &mut *outcome {
                Outcome::Saved(saved) => return Some(Ok(saved.clone())),
                Outcome::Failed(error) => return Some(Err(error.take().unwrap_or_else(told_already))),
                Outcome::Pending => {}
            }
            outcome = match until {
                None => self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.checked_duration_since(Instant::now())?;
                    self.done.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Its error, if it failed and nobody was told.
    fn untold(&self) -> Option<Error> {
        match &mut *lock(&self.outcome) {
            Outcome::Failed(error) => error.take(),
            _ => None,
        }
    }
}

/// What a fork's child is told: the thread that does the work, and the files, are its parent's.
fn not_ours() -> Error {
    Error::Argument("these checkpoints were opened by another process: open them in this one".into())
}

fn told_already() -> Error {
    Error::Argument("this save failed, and its error was told already".into())
}

/// A checkpoint staged.
pub(super) struct Job {
    pub(super) commit: Commit,
    pub(super) step: u64,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) ready: Ready,
    /// The file's length, if it is one file.
    pub(super) size: Option<u64>,
    pub(super) durable: bool,
    pub(super) begun: Instant,
    pub(super) staged: Duration,
}

enum Task {
    Commit(Job, Arc<Ticket>),
    /// Memory to be unmapped; hidden files to be used again or removed; an output of so many bytes to be
    /// made ready.
    Tidy {
        memory: Option<Mapping>,
        hidden: Vec<PathBuf>,
        size: Option<u64>,
    },
}

pub(super) struct Queue {
    shared: Arc<Shared>,
    worker: Mutex<Option<thread::JoinHandle<()>>>,
    /// A fork's child has no worker.
    owner: u32,
}

struct Shared {
    store: Store,
    keep: Option<usize>,
    keep_every: Option<u64>,
    prepare: bool,
    state: Mutex<State>,
    turned: Condvar,
    /// The steps saved here, in order. Held while one becomes visible and others go: one at a time, whichever
    /// thread does it.
    saved: Mutex<Vec<u64>>,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    working: bool,
    /// Commits queued or under way.
    commits: usize,
    slot: Option<Slot>,
    /// Saves that failed, of which perhaps nobody was told.
    failed: Vec<Arc<Ticket>>,
    closing: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    pub(super) fn new(store: Store, keep: Option<usize>, keep_every: Option<u64>, prepare: bool) -> Self {
        let (state, turned, saved) = (Mutex::default(), Condvar::new(), Mutex::default());
        let shared = Arc::new(Shared { store, keep, keep_every, prepare, state, turned, saved });
        Self { shared, worker: Mutex::new(None), owner: std::process::id() }
    }

    pub(super) fn store(&self) -> &Store {
        &self.shared.store
    }

    /// # Errors
    /// In a fork's child.
    pub(super) fn own(&self) -> Result<()> {
        if self.owner == std::process::id() { Ok(()) } else { Err(not_ours()) }
    }

    pub(super) fn prepare(&self, bytes: u64) {
        self.shared.push(Task::Tidy { memory: None, hidden: Vec::new(), size: Some(bytes) });
        self.wake();
    }

    pub(super) fn remove(&self, step: u64) {
        let mut saved = lock(&self.shared.saved);
        saved.retain(|known| *known != step);
        if let Some(hidden) = self.shared.store.take_away(step) {
            std::fs::remove_file(hidden).ok();
        }
    }

    /// Waits until there is room for one more save (`alone`: until there is no other), and until an output
    /// that is being made ready is.
    ///
    /// # Errors
    /// That of an earlier save nobody was told of.
    pub(super) fn make_room(&self, alone: bool) -> Result<()> {
        first_error(self.shared.wait_while(|state| !state.has_room(alone)))
    }

    /// As [`make_room`](Queue::make_room), waiting at most so long: `None` if there is none by then.
    #[cfg(feature = "python")]
    pub(super) fn room_within(&self, alone: bool, most: Duration) -> Option<Result<()>> {
        if let Err(error) = self.own() {
            return Some(Err(error));
        }
        self.shared.wait_while_for(most, |state| !state.has_room(alone)).map(first_error)
    }

    /// A draft for a file at `path`: in the output made ready, if there is one.
    pub(super) fn draft(
        &self,
        path: &Path,
        layout: &Layout,
        options: &DraftOptions,
    ) -> Result<(Draft, Ready)> {
        let slot = lock(&self.shared.state).slot.take();
        if let Some(slot) = slot {
            let ready = if slot.is_recycled() { Ready::Recycled } else { Ready::Prepared };
            if let Some(draft) = slot.draft(path, layout, options)? {
                return Ok((draft, ready));
            }
        }
        Ok((options.create(path, layout)?, Ready::No))
    }

    /// Commits: at once, or in the background.
    pub(super) fn submit(&self, job: Job, inline: bool) -> Saving {
        let ticket = Arc::new(Ticket::new());
        let saving = Saving { ticket: ticket.clone(), staged: job.staged };
        if inline {
            self.shared.commit(job, &ticket);
        } else {
            self.shared.push(Task::Commit(job, ticket));
        }
        self.wake();
        saving
    }

    /// Waits until nothing is left to do.
    ///
    /// # Errors
    /// That of a save nobody was told of.
    pub(super) fn finish(&self) -> Result<()> {
        self.own()?;
        first_error(self.shared.wait_while(State::is_busy))
    }

    /// As [`finish`](Queue::finish), waiting at most so long: `None` if it goes on.
    #[cfg(feature = "python")]
    pub(super) fn finish_within(&self, most: Duration) -> Option<Result<()>> {
        if let Err(error) = self.own() {
            return Some(Err(error));
        }
        self.shared.wait_while_for(most, State::is_busy).map(first_error)
    }

    /// Has the tasks done: by the worker, or here where the system gives no thread.
    fn wake(&self) {
        let mut worker = lock(&self.worker);
        if worker.is_none() && !lock(&self.shared.state).tasks.is_empty() {
            let (shared, watching) = (self.shared.clone(), disk::watching());
            let work = move || disk::watched(watching, || shared.work(true));
            match thread::Builder::new().name("maptensors".into()).spawn(work) {
                Ok(started) => *worker = Some(started),
                Err(_) => self.shared.work(false),
            }
        }
        self.shared.turned.notify_all();
    }
}

fn first_error(mut state: MutexGuard<'_, State>) -> Result<()> {
    while !state.failed.is_empty() {
        if let Some(error) = state.failed.remove(0).untold() {
            return Err(error);
        }
    }
    Ok(())
}

impl State {
    fn is_busy(&self) -> bool {
        self.working || !self.tasks.is_empty()
    }

    /// Whether there is room for one more save; `alone`: and no other.
    fn has_room(&self, alone: bool) -> bool {
        self.commits <= usize::from(!alone) && (self.commits > 0 || !self.is_busy())
    }
}

impl Shared {
    fn push(&self, task: Task) {
        let mut state = lock(&self.state);
        state.commits += usize::from(matches!(task, Task::Commit(..)));
        state.tasks.push_back(task);
    }

    fn wait_while(&self, busy: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        self.turned.wait_while(state, |state| busy(state)).unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`wait_while`](Shared::wait_while), at most so long.
    #[cfg(feature = "python")]
    fn wait_while_for(&self, most: Duration, busy: impl Fn(&State) -> bool) -> Option<MutexGuard<'_, State>> {
        let waited = self.turned.wait_timeout_while(lock(&self.state), most, |state| busy(state));
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (!timeout.timed_out()).then_some(state)
    }

    /// Does what there is to do; `for_ever`: and waits for more.
    fn work(&self, for_ever: bool) {
        loop {
            let mut state = self.wait_while(|state| for_ever && state.tasks.is_empty() && !state.closing);
            let Some(task) = state.tasks.pop_front() else { return };
            state.working = true;
            drop(state);
            let committed = matches!(task, Task::Commit(..));
            match task {
                Task::Commit(job, ticket) => self.commit(job, &ticket),
                Task::Tidy { memory, hidden, size } => self.tidy(memory, hidden, size),
            }
            let mut state = lock(&self.state);
            state.working = false;
            state.commits -= usize::from(committed);
            self.turned.notify_all();
        }
    }

    fn commit(&self, job: Job, ticket: &Arc<Ticket>) {
        let Job { commit, step, path, bytes, ready, size, durable, begun, staged } = job;
        let mut saved = lock(&self.saved);
        // A fault of this crate must not leave others waiting.
        let committed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(commit));
        let failed = || Err(Error::Argument("saving failed: a fault of maptensors, please report it".into()));
        match committed.unwrap_or_else(|_| failed()) {
            Ok(memory) => {
                saved.retain(|known| *known != step);
                saved.push(step);
                self.let_go(&saved, size, memory);
                let finished = begun.elapsed();
                ticket.tell(Outcome::Saved(Saved { step, path, bytes, ready, staged, finished, durable }));
            }
            Err(error) => {
                // Who called it off knows.
                let is_news = !error.is_called_off();
                ticket.tell(Outcome::Failed(Some(error)));
                if is_news {
                    lock(&self.state).failed.push(ticket.clone());
                }
            }
        }
    }

    /// Takes away what falls out now that the last of `saved` is there, and has the next output made ready.
    fn let_go(&self, saved: &[u64], size: Option<u64>, memory: Option<Mapping>) {
        if let (Some(_), Some(last)) = (size, saved.last()) {
            // Of one file now: a set of the same step is not it any more.
            self.store.remove_set(*last);
        }
        // A directory that cannot be listed now will be the next time; nothing is lost but space.
        let surplus = self.store.surplus(self.keep, self.keep_every, saved).unwrap_or_default();
        let hidden = surplus.into_iter().filter_map(|step| self.store.take_away(step)).collect();
        if size.is_none() {
            self.store.remove_orphans();
        }
        let size = size.filter(|_| self.prepare);
        self.push(Task::Tidy { memory, hidden, size });
    }

    fn tidy(&self, memory: Option<Mapping>, hidden: Vec<PathBuf>, size: Option<u64>) {
        drop(memory);
        let mut size = size.filter(|_| lock(&self.state).slot.is_none() && !lock(&self.state).closing);
        let mut slot = None;
        // The newest is the likeliest to be in memory.
        for path in hidden.into_iter().rev() {
            #[cfg(target_os = "linux")]
            if let Some(len) = size.filter(|_| slot.is_none()) {
                slot = Slot::recycle(&path, len).unwrap_or_default();
                continue;
            }
            std::fs::remove_file(&path).ok();
        }
        if slot.is_none()
            && let Some(len) = size.take()
        {
            // Where there is no space, or no memory to map, the save itself will say so.
            slot = Slot::fresh(self.store.path(), len).unwrap_or_default();
        }
        if slot.is_some() {
            lock(&self.state).slot = slot;
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            return;
        }
        lock(&self.shared.state).closing = true;
        self.shared.turned.notify_all();
        if let Some(worker) = lock(&self.worker).take() {
            worker.join().ok();
        }
    }
}
