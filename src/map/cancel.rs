//! Work that somebody may call off: by Ctrl-C.
//!
//! Work is done under a [`Cancel`], which the threads that it starts inherit. Long loops [`check`] between pieces and
//! end with `ECANCELED`. What cannot look (`fsync(2)`, `fallocate(2)`) is not waited for: an unfinished file has no name, or
//! is known by it, and calling off removes it at once. A file gets its name before that or not at all.
//!
//! Who calls work off has no use for its result. So a loop that returns no error may just end early.

use super::disk::Dir;
use super::fork::Owner;
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The way to call work off.
#[derive(Clone, Default)]
pub(crate) struct Cancel(Arc<State>);

#[derive(Default)]
struct State {
    called_off: AtomicBool,
    /// Locked while a file gets its name.
    unfinished: Mutex<Vec<(Arc<Dir>, OsString)>>,
}

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

/// Whether this thread's work is called off.
pub(crate) fn is_called_off() -> bool {
    CURRENT.with_borrow(|cancel| cancel.as_ref().is_some_and(Cancel::is_called_off))
}

/// # Errors
/// `ECANCELED` if this thread's work is called off.
pub(crate) fn check() -> io::Result<()> {
    if is_called_off() { Err(Errno::CANCELED.into()) } else { Ok(()) }
}

/// Does what makes this thread's work visible, unless it is called off; and has who calls it off wait for that.
///
/// # Errors
/// `ECANCELED`, and those of `act`.
pub(crate) fn unless_called_off<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(cancel) = current() else { return act() };
    let _still = cancel.unfinished();
    check()?;
    act()
}

impl Cancel {
    /// Has work end, and removes its unfinished files.
    #[cfg(any(feature = "cli", feature = "python", test))]
    pub(crate) fn call_off(&self) {
        // Under the lock: what is renamed meanwhile is finished, and what comes after will see it.
        let mut unfinished = self.unfinished();
        self.0.called_off.store(true, Ordering::Relaxed);
        for (dir, name) in unfinished.drain(..) {
            dir.remove(&name).ok();
        }
    }

    pub(crate) fn is_called_off(&self) -> bool {
        self.0.called_off.load(Ordering::Relaxed)
    }

    fn unfinished(&self) -> MutexGuard<'_, Vec<(Arc<Dir>, OsString)>> {
        self.0.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An unfinished file, to be removed when the work is called off that this thread does.
pub(crate) struct Unfinished {
    cancel: Option<Cancel>,
    /// What is to be removed; a file without a name goes by itself.
    name: Option<OsString>,
    owner: Owner,
}

impl Unfinished {
    pub(crate) fn new(dir: &Arc<Dir>, name: Option<&OsStr>) -> Self {
        let mut file = Self { cancel: None, name: name.map(Into::into), owner: Owner::me() };
        // Called off already: it is not published.
        file.take_on(dir).ok();
        file
    }

    /// From now on it belongs to this thread's work.
    ///
    /// # Errors
    /// `ECANCELED`: called off already.
    pub(crate) fn take_on(&mut self, dir: &Arc<Dir>) -> io::Result<()> {
        self.forget();
        self.cancel = current();
        if let Some(cancel) = &self.cancel {
            let mut unfinished = cancel.unfinished();
            check()?;
            unfinished.extend(self.name.clone().map(|name| (dir.clone(), name)));
        }
        Ok(())
    }

    /// Has the file under the name that `give` gives it, in place of the one that it had, unless the work is
    /// called off.
    ///
    /// # Errors
    /// `ECANCELED`, and those of `give`.
    pub(crate) fn named(
        &mut self,
        dir: &Arc<Dir>,
        give: impl FnOnce() -> io::Result<OsString>,
    ) -> io::Result<()> {
        let Some(cancel) = &self.cancel else {
            self.name = Some(give()?);
            return Ok(());
        };
        let mut unfinished = cancel.unfinished();
        if cancel.is_called_off() {
            return Err(Errno::CANCELED.into());
        }
        let name = give()?;
        unfinished.retain(|(_, known)| Some(known) != self.name.as_ref());
        unfinished.push((dir.clone(), name.clone()));
        self.name = Some(name);
        Ok(())
    }

    fn forget(&self) {
        // In a fork's child the lock may be held by a thread that is not there.
        if let (Some(cancel), true) = (&self.cancel, self.owner.is_me()) {
            cancel.unfinished().retain(|(_, known)| Some(known) != self.name.as_ref());
        }
    }

    /// Gives the file its name, unless the work is called off.
    ///
    /// # Errors
    /// `ECANCELED`, and those of `rename`.
    pub(crate) fn finish(&self, rename: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(cancel) = &self.cancel else { return rename() };
        let mut unfinished = cancel.unfinished();
        if cancel.is_called_off() {
            return Err(Errno::CANCELED.into());
        }
        unfinished.retain(|(_, known)| Some(known) != self.name.as_ref());
        rename()
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::super::each_in_parallel;
    use super::*;

    #[test]
    fn what_is_called_off_loses_its_unfinished_files_and_what_is_finished_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Arc::new(Dir::open(temporary.path()).unwrap());
        let cancel = Cancel::default();
        let begin = |name: &str| {
            std::fs::write(temporary.path().join(name), b"").unwrap();
            Unfinished::new(&dir, Some(name.as_ref()))
        };
        under(Some(cancel.clone()), || {
            let (first, mut second) = (begin("a.tmp"), begin("b.tmp"));
            second.take_on(&dir).unwrap();
            first.finish(|| dir.rename("a.tmp".as_ref(), "a".as_ref())).unwrap();
            let give = |name: &str| {
                std::fs::write(temporary.path().join(name), b"").unwrap();
                Ok(name.into())
            };
            // One without a name gets one, and another; another gets none before it is cancelled.
            let (mut named, mut unnamed) = (Unfinished::new(&dir, None), Unfinished::new(&dir, None));
            named.named(&dir, || give("d.tmp")).unwrap();
            named.named(&dir, || dir.remove("d.tmp".as_ref()).and_then(|()| give("e.tmp"))).unwrap();
            check().unwrap();
            cancel.call_off();
            assert!(unnamed.named(&dir, || give("f.tmp")).is_err());
            assert_eq!(check().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
            assert!(second.finish(|| Ok(())).is_err());
            assert!(second.take_on(&dir).is_err() && unless_called_off(|| Ok(())).is_err());
        });
        check().unwrap();
        assert_eq!(dir.names().unwrap(), ["a"]);
        // Of nobody's work.
        begin("c.tmp").finish(|| dir.rename("c.tmp".as_ref(), "c".as_ref())).unwrap();
    }

    #[test]
    fn threads_that_work_starts_are_called_off_with_it() {
        let cancel = Cancel::default();
        let done = under(Some(cancel.clone()), || {
            each_in_parallel((0..100).collect(), |i: usize| {
                if i == 50 {
                    cancel.call_off();
                }
                if i > 60 { check() } else { Ok(()) }
            })
        });
        assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    }
}
