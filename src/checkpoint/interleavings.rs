//! The queue of checkpoints, with real files, in many orders of its threads: `make interleavings`.
//!
//! shuttle switches between threads at every lock, wait and start of one, at random and by PCT's priorities. Each run tries
//! `MAPTENSORS_SCHEDULES` orders (300); a run that fails prints its order, and `shuttle::replay` takes it again. Time does not
//! pass: a wait with a time limit is one without.
//!
//! There is no ring of outputs to model. What is made ready is one slot, and these tests pass through it: it is
//! filled, taken, used again and dropped.

use super::queue::{Job, Queue, Saved, Saving};
use super::store::Store;
use super::{DraftOptions, Ready};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::sync::thread;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const FAULT: &str = "a disk that fails";

/// A queue over a directory of its own, and the steps in the order in which they were committed.
struct Saves {
    queue: Queue,
    // Of `std`: no switch of threads comes between.
    committed: Arc<Mutex<Vec<u64>>>,
    committing: Arc<AtomicBool>,
    dir: tempfile::TempDir,
}

fn in_many_orders(test: impl Fn(Saves) + Send + Sync + 'static) {
    let orders = std::env::var("MAPTENSORS_SCHEDULES").ok();
    let orders = orders.map_or(300, |orders| orders.parse().expect("a number of orders"));
    let test = Arc::new(move || {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.make().unwrap();
        let queue = Queue::new(store, Some(2), None, true);
        test(Saves { queue, committed: Arc::default(), committing: Arc::default(), dir });
    });
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    let random = test.clone();
    Runner::new(RandomScheduler::new(orders), config.clone()).run(move || random());
    Runner::new(PctScheduler::new(3, orders), config).run(move || test());
}

impl Saves {
    /// Saves a step, which fails where its number is odd.
    fn save(&self, step: u64, inline: bool) -> Result<Saving> {
        let begun = Instant::now();
        self.queue.make_room(inline)?;
        let path = self.queue.store().target(step);
        let layout = Layout::builder().tensor("w", DType::U64, &[16]).build()?;
        let options = DraftOptions::new().durable(false);
        let (mut draft, ready) = self.queue.draft(&path, &layout, &options)?;
        draft.tensor_mut("w")?.as_mut_slice::<u64>()?.fill(step);
        let size = Some(draft.layout().file_len());
        let (committed, committing) = (self.committed.clone(), self.committing.clone());
        let commit = Box::new(move || {
            assert!(!committing.swap(true, Relaxed), "two commits at once");
            thread::yield_now();
            committing.store(false, Relaxed);
            if step % 2 == 1 {
                return Err(Error::Argument(format!("{FAULT}: {step}")));
            }
            let memory = draft.commit_mapped()?;
            committed.lock().unwrap().push(step);
            Ok(memory)
        });
        let (bytes, durable, staged) = (128, false, Duration::ZERO);
        let job = Job { commit, step, path, bytes, ready, size, durable, begun, staged, below: None };
        Ok(self.queue.submit(job, inline))
    }

    fn committed(&self) -> Vec<u64> {
        self.committed.lock().unwrap().clone()
    }

    /// Drops the queue, and looks at the directory: these steps, whole, and nothing else.
    fn end(self, expected: &[u64]) {
        drop(self.queue);
        let mut names: Vec<_> =
            std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let store = Store::open(self.dir.path()).unwrap();
        let paths = expected.iter().map(|step| store.target(*step));
        let files: Vec<_> = paths.clone().map(|path| path.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, files, "what is kept, and no unfinished file");
        for (step, path) in expected.iter().zip(paths) {
            assert!(holds(&path, *step));
        }
    }
}

fn holds(path: &Path, step: u64) -> bool {
    let bytes = std::fs::read(path).unwrap();
    bytes[bytes.len() - 128..].chunks_exact(8).all(|word| word == step.to_ne_bytes())
}

fn step_of(saved: Result<Saved>) -> u64 {
    saved.unwrap().step
}

/// How many of these answers are the fault itself.
fn told<T>(answers: impl IntoIterator<Item = Result<T>>) -> usize {
    let is = |answer: Result<T>| answer.is_err_and(|error| error.to_string().contains(FAULT));
    answers.into_iter().map(is).filter(|told| *told).count()
}

#[test]
fn saves_are_committed_in_order_and_each_is_told() {
    in_many_orders(|saves| {
        let waits: Vec<_> = [2, 4, 6, 8]
            .map(|step| {
                let saving = saves.save(step, false).unwrap();
                thread::spawn(move || {
                    // Whoever waits again is told the same.
                    assert_eq!(step_of(saving.wait()), step);
                    assert!(saving.is_done());
                    step_of(saving.wait())
                })
            })
            .into();
        saves.queue.finish().unwrap();
        assert_eq!(saves.committed(), [2, 4, 6, 8]);
        let told: Vec<_> = waits.into_iter().map(|wait| wait.join().unwrap()).collect();
        assert_eq!(told, [2, 4, 6, 8]);
        saves.end(&[6, 8]);
    });
}

#[test]
fn there_is_room_for_one_save_behind_the_one_under_way() {
    in_many_orders(|saves| {
        for (before, step) in [2, 4, 6, 8].into_iter().enumerate() {
            drop(saves.save(step, false).unwrap());
            // Of those before it, one may be under way.
            assert!(saves.committed().len() + 1 >= before, "a third save was let in");
        }
        saves.queue.finish().unwrap();
        saves.end(&[6, 8]);
    });
}

#[test]
fn an_error_is_told_once_to_whoever_asks_first() {
    in_many_orders(|saves| {
        let saves = Arc::new(saves);
        let saving = Arc::new(saves.save(1, false).unwrap());
        let waits = [saving.clone(), saving].map(|saving| thread::spawn(move || saving.wait().map(drop)));
        let finish = {
            let saves = saves.clone();
            thread::spawn(move || saves.queue.finish())
        };
        let later = saves.save(2, false).map(|saving| step_of(saving.wait()));
        let is_later = later.is_ok();
        let mut told = told([later.map(drop)]) + told([finish.join().unwrap()]);
        for wait in waits {
            let answer = wait.join().unwrap();
            assert!(answer.is_err(), "who waits for what failed is never told that it was saved");
            told += self::told([answer]);
        }
        told += self::told([saves.queue.finish()]);
        assert_eq!(told, 1);
        let saves = Arc::into_inner(saves).unwrap();
        saves.end(if is_later { &[2] } else { &[] });
    });
}

#[test]
fn an_error_nobody_waits_for_is_told_by_the_next_call() {
    in_many_orders(|saves| {
        drop(saves.save(1, false).unwrap());
        let calls = [saves.save(2, false).map(drop), saves.save(4, true).map(drop)];
        assert_eq!(told(calls) + told([saves.queue.finish(), saves.queue.finish()]), 1);
        let committed = saves.committed();
        saves.end(&committed);
    });
}

#[test]
fn saves_of_two_threads_at_once_and_in_the_background_all_arrive() {
    in_many_orders(|saves| {
        let saves = Arc::new(saves);
        let other = {
            let saves = saves.clone();
            thread::spawn(move || [2, 4].map(|step| step_of(saves.save(step, false).unwrap().wait())))
        };
        let here = [6, 8].map(|step| step_of(saves.save(step, true).unwrap().wait()));
        assert_eq!((here, other.join().unwrap()), ([6, 8], [2, 4]));
        saves.queue.finish().unwrap();
        let committed = saves.committed();
        let at = |step: u64| committed.iter().position(|known| *known == step).unwrap();
        assert!(at(2) < at(4) && at(6) < at(8) && committed.len() == 4, "{committed:?}");
        let mut kept = committed[2..].to_vec();
        kept.sort_unstable();
        Arc::into_inner(saves).unwrap().end(&kept);
    });
}

#[test]
fn a_step_that_is_removed_meanwhile_is_gone_and_the_others_are_kept() {
    in_many_orders(|saves| {
        saves.save(2, true).unwrap().wait().unwrap();
        drop(saves.save(4, false).unwrap());
        saves.queue.prepare(4096);
        saves.queue.remove(2, false).unwrap();
        drop(saves.save(6, false).unwrap());
        saves.queue.finish().unwrap();
        assert_eq!(saves.committed(), [2, 4, 6]);
        saves.end(&[4, 6]);
    });
}

#[test]
fn dropped_at_any_moment_the_queue_does_what_was_given_to_it() {
    in_many_orders(|saves| {
        saves.queue.prepare(4096);
        let first = saves.save(2, false).unwrap();
        let second = saves.save(4, false).unwrap();
        let waits = thread::spawn(move || [first, second].map(|saving| step_of(saving.wait())));
        saves.end(&[2, 4]);
        assert_eq!(waits.join().unwrap(), [2, 4]);
    });
}

#[test]
fn an_output_made_ready_is_used_and_used_again() {
    let used = Arc::new(Mutex::new([false; 3]));
    let seen = used.clone();
    in_many_orders(move |saves| {
        for step in [2, 4, 6, 8] {
            let ready = saves.save(step, false).unwrap().wait().unwrap().ready;
            let kind = [Ready::No, Ready::Prepared, Ready::Recycled].iter().position(|kind| *kind == ready);
            seen.lock().unwrap()[kind.unwrap()] = true;
        }
        saves.end(&[6, 8]);
    });
    let used = used.lock().unwrap();
    assert!(used[0] && used[1], "the schedules were too few to pass through the slot: {used:?}");
}
