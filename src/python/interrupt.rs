//! Ctrl-C, seen while work is done outside the interpreter.
//!
//! Python's handlers run on the main thread, which asks for them between waits: so what takes long is done by another
//! thread. On any other thread there is nothing to see, and work is done where it is.

use crate::error::Error;
use crate::work::cancel::{self, Cancel};
use pyo3::prelude::*;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What waits sees signals so often.
pub(super) const TURN: Duration = Duration::from_millis(50);

/// What was cancelled may take this long to tidy up before it is left to itself.
pub(super) const GRACE: Duration = Duration::from_millis(200);

/// Copying fewer bytes than this is over before anybody could want it to be.
pub(super) const LONG: u64 = 16 << 20;

/// Does `work`, which is cancelled when a signal's handler raises.
pub(super) fn interruptible<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    if !is_main_thread() {
        return Ok(py.detach(work));
    }
    let cancel = Cancel::default();
    // Taken by the thread, or here where the system gives none.
    let work = Mutex::new(Some(work));
    let take_and_work = || {
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        work.map(|work| cancel::under(Some(cancel.clone()), work))
    };
    let done = py.detach(|| {
        thread::scope(|scope| -> PyResult<Option<T>> {
            let (ended, end) = channel::<()>();
            let take_and_work = &take_and_work;
            let worker = move || {
                let _ended = ended;
                take_and_work()
            };
            let Ok(worker) = thread::Builder::new().spawn_scoped(scope, worker) else {
                return Ok(take_and_work());
            };
            let seen = wait(&end, &cancel);
            let done = worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            seen.map(|_| done)
        })
    })?;
    done.ok_or_else(|| Error::Argument("the work was not done".into()).into())
}

/// As [`interruptible`], of work that borrows nothing: it is not waited for where it cannot be cancelled at once, as
/// in fsync(2). Its unfinished files are gone all the same.
pub(super) fn abandonable<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    if !is_main_thread() {
        return Ok(py.detach(work));
    }
    let cancel = Cancel::default();
    py.detach(|| {
        let (result, end) = channel();
        // Handed over once the thread is there.
        let (hand, over) = channel::<Box<dyn FnOnce() -> T + Send>>();
        let under = cancel.clone();
        let worker = move || {
            if let Ok(work) = over.recv() {
                result.send(cancel::under(Some(under), work)).ok();
            }
        };
        let Ok(worker) = thread::Builder::new().name("maptensors".into()).spawn(worker) else {
            return Ok(work());
        };
        hand.send(Box::new(work)).ok();
        match wait(&end, &cancel)? {
            Some(done) => Ok(done),
            None => match worker.join() {
                Err(panic) => resume_unwind(panic),
                Ok(()) => Err(Error::Argument("the work was not done".into()).into()),
            },
        }
    })
}

/// Calls `wait_for` with a time to wait until it answers, or `timeout` seconds are over.
pub(super) fn wait_in_turns<T: Send>(
    py: Python<'_>,
    timeout: Option<f64>,
    wait_for: impl Fn(Duration) -> Option<T> + Sync,
) -> PyResult<Option<T>> {
    let most = timeout.map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX));
    // Longer than the clock can count is for ever.
    let until = most.and_then(|most| Instant::now().checked_add(most));
    loop {
        let left = until.map_or(TURN, |until| until.saturating_duration_since(Instant::now()));
        if let Some(answer) = py.detach(|| wait_for(left.min(TURN))) {
            return Ok(Some(answer));
        }
        py.check_signals()?;
        if left.is_zero() {
            return Ok(None);
        }
    }
}

/// Waits until work ends, with what it sends if it does; a signal's handler that raises cancels it.
fn wait<T>(end: &Receiver<T>, cancel: &Cancel) -> PyResult<Option<T>> {
    loop {
        match end.recv_timeout(TURN) {
            Ok(done) => return Ok(Some(done)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(raised) = Python::attach(|py| py.check_signals()) {
            cancel.cancel();
            end.recv_timeout(GRACE).ok();
            return Err(raised);
        }
    }
}

/// Python runs handlers on its main thread, which is the process's, as a rule.
fn is_main_thread() -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: gettid(2) takes nothing and cannot fail.
        let thread = unsafe { libc::gettid() };
        u32::try_from(thread) == Ok(std::process::id())
    }
    #[cfg(not(target_os = "linux"))]
    true
}
