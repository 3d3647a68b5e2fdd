//! The protocol of the control page, tried by loom in every order that its threads may take: `make interleavings`.
//!
//! The functions are those of `protocol.rs`. What stands for the page is [`Memory`]: words that may be seen each at a moment
//! of its own, as pread(2) beside a pwrite(2) may see them, and a sleep as of futex(2). Where the page is spoilt, the same
//! properties do not hold, and the model says so: that is what the tests that should panic are for.

use super::protocol::{self, CLOSED, END, GENERATION, MAGIC, Words, record};
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use std::io;
use std::time::Duration;

/// How a page is spoilt.
#[derive(Clone, Copy, PartialEq)]
enum Spoilt {
    No,
    /// What is read always fits its check.
    NoCheck,
    /// Sleepers are woken before the words are written.
    WokenFirst,
    /// The word is compared, and only then may a wake be noticed.
    SleepsLate,
}

struct Memory {
    /// Those behind the magic.
    words: [AtomicU64; (END - GENERATION) / 8],
    /// What futex(2) locks while it compares and enqueues, and while it wakes.
    sleepers: Mutex<Sleepers>,
    woken: Condvar,
    spoilt: Spoilt,
}

#[derive(Default)]
struct Sleepers {
    /// How many times they were woken.
    wakes: u64,
    /// All else has come to rest: the time of all who sleep is up, now and from now on.
    at_rest: bool,
    /// Somebody slept until then.
    overslept: bool,
}

impl Memory {
    fn new(spoilt: Spoilt) -> Arc<Self> {
        let words = [(); (END - GENERATION) / 8].map(|()| AtomicU64::new(0));
        let page = Self { words, sleepers: Mutex::new(Sleepers::default()), woken: Condvar::new(), spoilt };
        page.put(GENERATION, &record(0, 0));
        Arc::new(page)
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        for (word, bytes) in self.words[(at - GENERATION) / 8..].iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Relaxed);
        }
    }

    fn rest(&self) {
        self.sleepers.lock().unwrap().at_rest = true;
        self.woken.notify_all();
    }

    fn wake_all(&self) {
        self.sleepers.lock().unwrap().wakes += 1;
        self.woken.notify_all();
    }

    fn assert_that_nobody_overslept(&self) {
        assert!(!self.sleepers.lock().unwrap().overslept, "somebody was not woken");
    }
}

impl Words for Memory {
    fn load(&self, page: &mut [u8; END]) -> io::Result<usize> {
        page[..GENERATION].copy_from_slice(&MAGIC);
        for (word, bytes) in self.words.iter().zip(page[GENERATION..].chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Relaxed).to_ne_bytes());
        }
        if self.spoilt == Spoilt::NoCheck {
            let word = |at: usize| u64::from_ne_bytes(page[at..at + 8].try_into().unwrap());
            let fits = record(word(GENERATION), word(GENERATION + 8));
            page[GENERATION..CLOSED].copy_from_slice(&fits);
        }
        Ok(END)
    }

    fn store(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        if self.spoilt == Spoilt::WokenFirst {
            self.wake_all();
        }
        self.put(at, bytes);
        Ok(())
    }

    fn is_removed(&self) -> io::Result<bool> {
        Ok(false)
    }

    fn sleep(&self, low: u32, _: Duration) {
        let differs = || self.words[0].load(Relaxed) & u64::from(u32::MAX) != u64::from(low);
        if self.spoilt == Spoilt::SleepsLate && differs() {
            return;
        }
        let mut sleepers = self.sleepers.lock().unwrap();
        if self.spoilt != Spoilt::SleepsLate && differs() {
            return;
        }
        let before = sleepers.wakes;
        while sleepers.wakes == before {
            if sleepers.at_rest {
                sleepers.overslept = true;
                return;
            }
            sleepers = self.woken.wait(sleepers).unwrap();
        }
    }

    fn wake(&self) {
        if self.spoilt != Spoilt::WokenFirst {
            self.wake_all();
        }
    }

    fn pause() {
        thread::yield_now();
    }
}

/// Tries every order with at most three preemptions (`LOOM_MAX_PREEMPTIONS`): switches that no wait or lock asks for. All
/// orders of two flips and a waiter take minutes.
fn waiting(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(model);
}

const NO_MATTER: Duration = Duration::ZERO;

/// Heads that no two generations share, and that are not theirs.
fn head(generation: u64) -> u64 {
    if generation == 0 { 0 } else { 100 - generation }
}

fn read(page: &Memory) -> protocol::State {
    let state = protocol::read(page).unwrap().expect("it makes sense");
    assert_eq!(state.head, head(state.generation), "a part of one flip beside a part of another");
    state
}

/// A publisher that flips twice, and a reader that looks twice.
fn readers_beside_flips(spoilt: Spoilt) {
    loom::model(move || {
        let page = Memory::new(spoilt);
        let reader = {
            let page = page.clone();
            thread::spawn(move || {
                let first = read(&page);
                let second = read(&page);
                assert!(first.generation <= second.generation, "back to an older generation");
            })
        };
        for generation in 1..=2 {
            protocol::flip(&*page, generation, head(generation)).unwrap();
        }
        reader.join().unwrap();
        assert_eq!(read(&page).generation, 2);
    });
}

/// A subscriber that waits, each time for the generation after the one it sees, up to the last. One alone: two that look
/// again beside half a flip could do so in turns for ever, and loom would follow them.
fn a_waiter_beside_flips(spoilt: Spoilt, last: u64) {
    waiting(move || {
        let page = Memory::new(spoilt);
        let waiter = {
            let page = page.clone();
            thread::spawn(move || {
                let mut seen = read(&page).generation;
                while seen < last {
                    protocol::wait(&*page, seen, NO_MATTER);
                    seen = read(&page).generation;
                }
            })
        };
        for generation in 1..=last {
            protocol::flip(&*page, generation, head(generation)).unwrap();
        }
        page.rest();
        waiter.join().unwrap();
        page.assert_that_nobody_overslept();
    });
}

/// A subscriber that waits for the end; `then` looks at the page when all is over.
fn a_waiter_beside_a_close(then: fn(&Memory)) {
    waiting(move || {
        let page = Memory::new(Spoilt::No);
        let waiter = {
            let page = page.clone();
            thread::spawn(move || {
                let mut seen = read(&page);
                while !seen.closed {
                    protocol::wait(&*page, seen.generation, NO_MATTER);
                    seen = read(&page);
                }
            })
        };
        protocol::flip(&*page, 1, head(1)).unwrap();
        protocol::close(&*page).unwrap();
        page.rest();
        waiter.join().unwrap();
        then(&page);
    });
}

#[test]
fn a_torn_read_is_never_returned_and_no_reader_goes_back() {
    readers_beside_flips(Spoilt::No);
}

#[test]
#[should_panic = "a part of one flip beside a part of another"]
fn without_the_check_a_torn_read_is_returned() {
    readers_beside_flips(Spoilt::NoCheck);
}

#[test]
fn no_waiter_misses_a_flip() {
    a_waiter_beside_flips(Spoilt::No, 2);
}

#[test]
#[should_panic = "somebody was not woken"]
fn woken_before_the_flip_a_waiter_sleeps_on() {
    a_waiter_beside_flips(Spoilt::WokenFirst, 1);
}

#[test]
#[should_panic = "somebody was not woken"]
fn with_a_gap_between_look_and_sleep_a_waiter_sleeps_on() {
    a_waiter_beside_flips(Spoilt::SleepsLate, 1);
}

#[test]
fn the_end_is_seen_at_the_latest_when_the_time_is_up() {
    a_waiter_beside_a_close(|page| {
        assert!(read(page).closed);
    });
}

/// Why a subscriber sleeps in slices.
#[test]
#[should_panic = "somebody was not woken"]
fn the_end_that_comes_between_look_and_sleep_wakes_nobody() {
    a_waiter_beside_a_close(Memory::assert_that_nobody_overslept);
}
