//! What is done in the background: commits in their order, and the next output made ready.

use super::Ready;
use super::store::Store;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::map::Mapping;
use crate::os::fork::Owner;
use crate::save::slot::Slot;
use crate::save::{Commit, Draft, DraftOptions};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, thread};
use crate::work::inherited;
use std::collections::VecDeque;
use std::ffi::OsString;
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
    /// The highest step that was there, if this one is below it: of an abandoned run, or one that is gone back from.
    /// What is saved last is [`latest`](super::Checkpointer::latest) all the same; a new run is best given a directory
    /// to itself, and what is abandoned [removed](super::Checkpointer::remove).
    pub below: Option<u64>,
}

/// A checkpoint on its way. Dropped, it is saved all the same.
#[derive(Debug)]
pub struct Saving {
    ticket: Arc<Ticket>,
    /// As [`Saved::staged`].
    pub staged: Duration,
    /// As [`Saved::below`].
    pub below: Option<u64>,
}

impl Saving {
    /// Waits until it is saved.
    ///
    /// # Errors
    /// As [`Checkpointer::save`](super::Checkpointer::save). An error is told once. After [`Error::NotRemoved`] the
    /// checkpoint is there.
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

    /// Whether it is saved, or has failed. In a child that was forked meanwhile it never is.
    pub fn is_done(&self) -> bool {
        // There the lock may be held by a thread that is not there.
        self.ticket.owner.is_me() && !matches!(*lock(&self.ticket.outcome), Outcome::Pending)
    }
}

#[derive(Debug)]
struct Ticket {
    outcome: Mutex<Outcome>,
    done: Condvar,
    /// A fork's child would wait for ever.
    owner: Owner,
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
        Self { outcome: Mutex::new(Outcome::Pending), done: Condvar::new(), owner: Owner::me() }
    }

    fn tell(&self, outcome: Outcome) {
        *lock(&self.outcome) = outcome;
        self.done.notify_all();
    }

    fn wait(&self, most: Option<Duration>) -> Option<Result<Saved>> {
        if let Err(error) = self.owner.check("this save") {
            return Some(Err(error));
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
    pub(super) below: Option<u64>,
    pub(super) begun: Instant,
    pub(super) staged: Duration,
}

enum Task {
    Commit(Job, Arc<Ticket>),
    /// Memory to be unmapped; hidden files to be used again or removed, after the checkpoint at a path was saved; an
    /// output of so many bytes to be made ready.
    Tidy {
        memory: Option<Mapping>,
        hidden: Vec<OsString>,
        saved: PathBuf,
        size: Option<u64>,
    },
}

pub(super) struct Queue {
    shared: Arc<Shared>,
    worker: Mutex<Option<thread::JoinHandle<()>>>,
    /// A fork's child has no worker.
    owner: Owner,
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
        Self { shared, worker: Mutex::new(None), owner: Owner::me() }
    }

    pub(super) fn store(&self) -> &Store {
        &self.shared.store
    }

    /// # Errors
    /// In a fork's child.
    pub(super) fn own(&self) -> Result<()> {
        self.owner.check("this checkpointer")
    }

    pub(super) fn prepare(&self, bytes: u64) {
        let (hidden, saved) = (Vec::new(), self.shared.store.path().to_owned());
        self.shared.push(Task::Tidy { memory: None, hidden, saved, size: Some(bytes) });
        self.wake();
    }

    /// Removes the checkpoint of a step, durably if asked to; whether there was one.
    pub(super) fn remove(&self, step: u64, durable: bool) -> Result<bool> {
        let mut saved = lock(&self.shared.saved);
        let store = &self.shared.store;
        let Some(dir) = store.here()? else { return Ok(false) };
        let away = store.take_away(dir, step)?;
        saved.retain(|known| *known != step);
        away.hidden.map_or(Ok(()), |hidden| store.discard(dir, &hidden))?;
        if durable && away.was_there {
            // Or a power loss would bring it back, and a run resume from it.
            dir.sync().map_err(Error::io(&store.target(step), "making its removal durable"))?;
        }
        Ok(away.was_there)
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
        let saving = Saving { ticket: ticket.clone(), staged: job.staged, below: job.below };
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
            let (shared, inherited) = (self.shared.clone(), inherited::current());
            let work = move || inherited::with(inherited, || shared.work(true));
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
                Task::Tidy { memory, hidden, saved, size } => {
                    drop(memory);
                    self.tidy(hidden, &saved, size);
                }
            }
            let mut state = lock(&self.state);
            state.working = false;
            state.commits -= usize::from(committed);
            self.turned.notify_all();
        }
    }

    fn commit(&self, job: Job, ticket: &Arc<Ticket>) {
        let Job { commit, step, path, bytes, ready, size, durable, below, begun, staged } = job;
        let mut saved = lock(&self.saved);
        // A fault of this crate must not leave others waiting.
        let committed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(commit));
        let failed = || Err(Error::Argument("saving failed: a fault of maptensors, please report it".into()));
        let (memory, trouble) = match committed.unwrap_or_else(|_| failed()) {
            Ok(memory) => (memory, None),
            // It is there.
            Err(error @ Error::NotRemoved { .. }) => (None, Some(error)),
            Err(error) => return self.fail(ticket, error),
        };
        saved.retain(|known| *known != step);
        saved.push(step);
        self.store.is_saved(step);
        let gone = self.let_go(&saved, &path, size, memory);
        if let Some(error) = trouble.or(gone.err()) {
            return self.fail(ticket, error);
        }
        let finished = begun.elapsed();
        let saved = Saved { step, path, bytes, ready, staged, finished, durable, below };
        ticket.tell(Outcome::Saved(saved));
    }

    fn fail(&self, ticket: &Arc<Ticket>, error: Error) {
        // Who called it off knows.
        let is_news = !error.is_canceled();
        ticket.tell(Outcome::Failed(Some(error)));
        if is_news {
            lock(&self.state).failed.push(ticket.clone());
        }
    }

    /// Takes away what falls out now that the last of `saved` is there, at `path`, and has the next output made ready.
    ///
    /// # Errors
    /// [`Error::NotRemoved`] for what should have gone; [`Error::Moved`].
    fn let_go(&self, saved: &[u64], path: &Path, size: Option<u64>, memory: Option<Mapping>) -> Result<()> {
        let (mut hidden, mut trouble) = (Vec::new(), None);
        let mut note = |error| {
            if trouble.is_none() {
                trouble = Some(not_removed(path, error));
            }
        };
        match self.store.here() {
            Ok(Some(dir)) => {
                if let (Some(_), Some(last)) = (size, saved.last()) {
                    // Of one file now: a set of the same step is not it any more.
                    self.store.remove_set(dir, *last).map_or_else(&mut note, drop);
                }
                let surplus = self.store.surplus(dir, self.keep, self.keep_every, saved);
                for step in surplus.map_err(&mut note).unwrap_or_default() {
                    match self.store.take_away(dir, step) {
                        Ok(away) => hidden.extend(away.hidden),
                        Err(error) => note(error),
                    }
                }
                if size.is_none() {
                    self.store.remove_orphans(dir).unwrap_or_else(&mut note);
                }
            }
            Ok(None) => {}
            Err(error) => note(error),
        }
        let size = size.filter(|_| self.prepare);
        self.push(Task::Tidy { memory, hidden, saved: path.into(), size });
        trouble.map_or(Ok(()), Err)
    }

    /// An error that the next call is told.
    fn note(&self, error: Error) {
        self.fail(&Arc::new(Ticket::new()), error);
    }

    fn tidy(&self, hidden: Vec<OsString>, saved: &Path, size: Option<u64>) {
        let mut size = size.filter(|_| lock(&self.state).slot.is_none() && !lock(&self.state).closing);
        // Hidden files lie there wherever it is by now. Of what cannot be opened the next save will say so.
        let Ok(Some(dir)) = self.store.opened() else { return };
        let mut slot = None;
        // The newest is the likeliest to be in memory.
        for name in hidden.into_iter().rev() {
            #[cfg(target_os = "linux")]
            if let Some(len) = size.filter(|_| slot.is_none()) {
                match Slot::recycle(dir, self.store.path(), &name, len) {
                    Ok(recycled) => slot = recycled,
                    // Not to be had, which a new one makes up for; but if it is still there, that is told.
                    Err(error) if dir.contains(&name) => self.note(not_removed(saved, error)),
                    Err(_) => {}
                }
                continue;
            }
            if let Err(error) = self.store.discard(dir, &name) {
                self.note(not_removed(saved, error));
            }
        }
        if slot.is_none()
            && let Some(len) = size.take()
        {
            // Where there is no space, or no memory to map, the save itself will say so.
            slot = Slot::fresh(dir, self.store.path(), len).unwrap_or_default();
        }
        if slot.is_some() {
            lock(&self.state).slot = slot;
        }
    }
}

/// What was saved is there; what should have gone for it is as well.
fn not_removed(saved: &Path, error: Error) -> Error {
    match error {
        Error::Io { path: left, source, .. } => Error::NotRemoved { path: saved.into(), left, source },
        Error::Moved { path, what } => {
            let saved = saved.file_name().unwrap_or_default().display();
            Error::Moved { path, what: format!("{what} ({saved} was saved just before)") }
        }
        error => error,
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !self.owner.is_me() {
            return;
        }
        lock(&self.shared.state).closing = true;
        self.shared.turned.notify_all();
        if let Some(worker) = lock(&self.worker).take() {
            worker.join().ok();
        }
    }
}
