//! Work that somebody may cancel: by Ctrl-C.
//!
//! Work is done under a [`Cancel`], which the threads that it starts inherit. Long loops [`check`] between pieces and
//! end with `ECANCELED`. A system call that cannot look (`fsync(2)`, `fallocate(2)`) is not waited for: work leaves with its
//! `Cancel` how to [undo](Begun::add) what it has begun, and canceling does that at once. What makes work visible happens
//! before that, or not at all.
//!
//! A caller that cancels work has no use for its result. So a loop that returns no error may end early.

use rustix::io::Errno;
use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The way to cancel work.
#[derive(Clone, Default)]
pub(crate) struct Cancel(Arc<State>);

#[derive(Default)]
struct State {
    canceled: AtomicBool,
    begun: Mutex<List>,
}

#[derive(Default)]
struct List {
    next: u64,
    undo: Vec<(u64, Undo)>,
}

type Undo = Box<dyn FnOnce() + Send>;

thread_local! {
    static CURRENT: RefCell<Option<Cancel>> = const { RefCell::new(None) };
}

/// What this thread's work is under, to be [handed on](under) to a thread it starts.
pub(crate) fn current() -> Option<Cancel> {
    CURRENT.with_borrow(Clone::clone)
}

/// Does `work` under what another thread's is.
pub(crate) fn under<T>(cancel: Option<Cancel>, work: impl FnOnce() -> T) -> T {
    struct Back(Option<Cancel>);
    impl Drop for Back {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _back = Back(CURRENT.replace(cancel));
    work()
}

/// Whether this thread's work is canceled.
pub(crate) fn is_canceled() -> bool {
    CURRENT.with_borrow(|cancel| cancel.as_ref().is_some_and(Cancel::is_canceled))
}

/// # Errors
/// `ECANCELED` if this thread's work is canceled.
pub(crate) fn check() -> io::Result<()> {
    if is_canceled() { Err(Errno::CANCELED.into()) } else { Ok(()) }
}

/// Does what makes this thread's work visible, unless it is canceled. Canceling waits for that.
///
/// # Errors
/// `ECANCELED`, and those of `act`.
pub(crate) fn unless_canceled<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(cancel) = current() else { return act() };
    let _still = cancel.begun()?;
    act()
}

impl Cancel {
    /// Has work end, and undoes what it has begun.
    #[cfg(any(feature = "cli", feature = "python", test))]
    pub(crate) fn cancel(&self) {
        // Under the lock: what becomes visible meanwhile is finished, and what comes after will see it.
        let mut list = self.list();
        self.0.canceled.store(true, Ordering::Relaxed);
        for (_, undo) in list.undo.drain(..) {
            undo();
        }
    }

    pub(crate) fn is_canceled(&self) -> bool {
        self.0.canceled.load(Ordering::Relaxed)
    }

    /// What is begun, locked: as long as this lives, the work is not canceled.
    ///
    /// # Errors
    /// `ECANCELED`: it is already.
    pub(crate) fn begun(&self) -> io::Result<Begun<'_>> {
        let list = self.list();
        if self.is_canceled() { Err(Errno::CANCELED.into()) } else { Ok(Begun(list)) }
    }

    /// Forgets what [`Begun::add`] added.
    pub(crate) fn forget(&self, number: u64) {
        Begun(self.list()).remove(number);
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What work has begun that is to be undone where it is canceled.
pub(crate) struct Begun<'a>(MutexGuard<'a, List>);

impl Begun<'_> {
    /// Adds how to undo something; the number is for [`Begun::remove`].
    pub(crate) fn add(&mut self, undo: impl FnOnce() + Send + 'static) -> u64 {
        let number = self.0.next;
        self.0.next += 1;
        self.0.undo.push((number, Box::new(undo)));
        number
    }

    /// Takes back what was added: it is finished, or gone.
    pub(crate) fn remove(&mut self, number: u64) {
        self.0.undo.retain(|(known, _)| *known != number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::each_in_parallel;
    use super::*;

    #[test]
    fn what_is_begun_is_undone_once_and_what_is_removed_is_not() {
        let cancel = Cancel::default();
        let undone = Arc::new(Mutex::new(Vec::new()));
        let note = |what: &'static str| {
            let undone = undone.clone();
            move || undone.lock().unwrap().push(what)
        };
        let mut begun = cancel.begun().unwrap();
        let (first, second, _third) = (begun.add(note("a")), begun.add(note("b")), begun.add(note("c")));
        begun.remove(first);
        drop(begun);
        cancel.forget(second);
        cancel.cancel();
        cancel.cancel();
        assert_eq!(*undone.lock().unwrap(), ["c"]);
        assert!(cancel.begun().is_err());
    }

    #[test]
    fn threads_that_work_starts_are_canceled_with_it() {
        let cancel = Cancel::default();
        let done = under(Some(cancel.clone()), || {
            each_in_parallel((0..100).collect(), |i: usize| {
                if i == 50 {
                    cancel.cancel();
                }
                if i > 60 { check() } else { Ok(()) }
            })
        });
        assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    }
}
