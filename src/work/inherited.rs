//! What a thread inherits from the thread that starts it, besides its work.

#[cfg(test)]
use std::any::Any;
#[cfg(test)]
use std::cell::RefCell;
#[cfg(test)]
use std::sync::Arc;

/// What a test has put beside this thread's work: see [`with`].
#[cfg(test)]
pub(crate) type Inherited = Option<Arc<dyn Any + Send + Sync>>;

/// Nothing, but in tests.
#[cfg(not(test))]
pub(crate) type Inherited = ();

#[cfg(test)]
thread_local! {
    static CURRENT: RefCell<Inherited> = const { RefCell::new(None) };
}

/// What this thread has, to be [handed on](with) to a thread it starts.
#[cfg(test)]
pub(crate) fn current() -> Inherited {
    CURRENT.with_borrow(Clone::clone)
}

#[cfg(not(test))]
pub(crate) fn current() -> Inherited {}

/// Does `work` with what another thread has.
#[cfg(test)]
pub(crate) fn with<T>(inherited: Inherited, work: impl FnOnce() -> T) -> T {
    let before = CURRENT.replace(inherited);
    let done = work();
    CURRENT.set(before);
    done
}

#[cfg(not(test))]
pub(crate) fn with<T>((): Inherited, work: impl FnOnce() -> T) -> T {
    work()
}
