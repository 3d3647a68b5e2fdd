//! Ctrl-C in commands that write files: nothing unfinished is left behind.
//!
//! Signals that end the process are held back, and taken by a thread that waits for them. It calls the work off, which
//! removes what is unfinished, and then has the process end by the signal after all.
#![allow(unsafe_code)]

use crate::work::cancel::{self, Cancel};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What ends a process by default and may come from outside.
const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// How often the thread looks whether it is still needed.
const TURN: Duration = Duration::from_millis(50);

/// How long work that was canceled may take to end by itself.
const GRACE: Duration = Duration::from_millis(300);

/// Does `work`, which a signal calls off.
pub(super) fn guarded<T>(work: impl FnOnce() -> T) -> T {
    let signals = Signals::that_end_this();
    let (cancel, done) = (Cancel::default(), Arc::new(AtomicBool::new(false)));
    let before = signals.block();
    let watch = {
        let (cancel, done) = (cancel.clone(), done.clone());
        move || {
            while !done.load(Ordering::Relaxed) {
                let Some(signal) = signals.wait(TURN) else { continue };
                cancel.cancel();
                let began = Instant::now();
                while !done.load(Ordering::Relaxed) && began.elapsed() < GRACE {
                    thread::sleep(Duration::from_millis(1));
                }
                end_by(signal);
            }
        }
    };
    // Where the system gives no thread, signals come after the work.
    thread::Builder::new().name("signals".into()).spawn(watch).ok();
    let result = cancel::under(Some(cancel.clone()), work);
    done.store(true, Ordering::Relaxed);
    // The thread is about to end the process: nobody wants to hear from the work that it was canceled.
    let began = Instant::now();
    while cancel.is_canceled() && began.elapsed() < 10 * GRACE {
        thread::sleep(GRACE);
    }
    before.restore();
    result
}

/// A set of signals.
#[derive(Clone, Copy)]
struct Signals(libc::sigset_t);

impl Signals {
    fn none() -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset(3) makes what it is given an empty set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialized just above.
        Self(unsafe { set.assume_init() })
    }

    fn add(&mut self, signal: libc::c_int) {
        // SAFETY: a set and a number; one that is no signal's is refused.
        unsafe { libc::sigaddset(&raw mut self.0, signal) };
    }

    /// Those that end this process. One that is ignored (nohup(1)) or handled (by Python) does not.
    fn that_end_this() -> Self {
        let mut set = Self::none();
        for signal in SIGNALS {
            let mut action = MaybeUninit::<libc::sigaction>::uninit();
            // SAFETY: without a new action, sigaction(2) writes what the action is to the third argument.
            if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
                continue;
            }
            // SAFETY: it answered that it did.
            if unsafe { action.assume_init() }.sa_sigaction == libc::SIG_DFL {
                set.add(signal);
            }
        }
        set
    }

    /// Holds them back, in this thread and those it starts; returns what was held back before.
    fn block(&self) -> Self {
        let mut before = *self;
        // SAFETY: both are sets.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const self.0, &raw mut before.0) };
        before
    }

    /// Holds back these and no others.
    fn restore(&self) {
        // SAFETY: the set is one; what was set before is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }

    /// Takes one that has come, or comes within so long.
    fn wait(&self, most: Duration) -> Option<libc::c_int> {
        #[cfg(target_os = "linux")]
        {
            let most = libc::timespec {
                tv_sec: most.as_secs().try_into().unwrap_or_default(),
                tv_nsec: most.subsec_nanos().into(),
            };
            // SAFETY: a set and a time; nothing is asked for besides the signal's number.
            let signal = unsafe { libc::sigtimedwait(&raw const self.0, ptr::null_mut(), &raw const most) };
            (signal > 0).then_some(signal)
        }
        #[cfg(not(target_os = "linux"))]
        {
            thread::sleep(most);
            let mut pending = *self;
            // SAFETY: sigpending(2) writes a set.
            unsafe { libc::sigpending(&raw mut pending.0) };
            // SAFETY: both are signals and sets.
            let has = |set: &libc::sigset_t, signal| unsafe { libc::sigismember(set, signal) == 1 };
            SIGNALS.into_iter().find(|&signal| has(&self.0, signal) && has(&pending.0, signal))
        }
    }
}

/// Ends the process as the signal would have, so that a shell sees what ended it.
fn end_by(signal: libc::c_int) {
    let mut only = Signals::none();
    only.add(signal);
    // SAFETY: as in `block`. The action is the default, or the signal would not have been waited for.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const only.0, ptr::null_mut()) };
    // SAFETY: raise(3) of a signal, in this thread, which does not hold it back.
    unsafe { libc::raise(signal) };
}
