//! Which checkpoint is the latest: the one that was saved last, whatever its step, its file's time, or its file's past.

use crate::common;
use maptensors::{CheckpointOptions, Checkpointer, Ready, SaveOptions, Saved};
use std::path::Path;
use std::time::{Duration, SystemTime};

fn save(checkpoints: &Checkpointer, step: u64) -> Saved {
    let bytes = vec![u8::try_from(step % 251).unwrap(); 200_000];
    let (a, b) = bytes.split_at(100_000);
    checkpoints.save([("a", common::bytes_tensor(a)), ("b", common::bytes_tensor(b))], step).unwrap()
}

fn open(dir: &Path) -> Checkpointer {
    Checkpointer::open(dir).unwrap()
}

/// The step that a run resumes from, by what it reads.
#[track_caller]
fn resumes_from(dir: &Path, step: u64) {
    let checkpoints = open(dir);
    assert_eq!(checkpoints.latest().unwrap(), Some(step));
    let model = checkpoints.read(None).unwrap();
    assert_eq!(u64::from(model.tensor("a").unwrap().as_bytes()[0]), step % 251);
}

fn date(path: &Path, time: SystemTime) {
    std::fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn a_new_run_with_lower_steps_resumes_from_what_it_saved_last() {
    for shards in [None, Some(100_000)] {
        let dir = tempfile::tempdir().unwrap();
        let options = CheckpointOptions::new();
        let options = shards.map_or(options.clone(), |limit| options.max_shard_size(limit));
        let old = options.open(dir.path()).unwrap();
        for step in [400, 500] {
            assert_eq!(save(&old, step).below, None);
        }
        old.close().unwrap();
        let new = options.open(dir.path()).unwrap();
        for step in [100, 150] {
            assert_eq!(save(&new, step).below, Some(500), "it says so");
            assert_eq!(new.latest().unwrap(), Some(step));
        }
        assert_eq!(save(&new, 600).below, None);
        assert_eq!(save(&new, 160).below, Some(600), "of its own as well");
        new.close().unwrap();
        resumes_from(dir.path(), 160);
        assert_eq!(open(dir.path()).steps().unwrap(), [100, 150, 160, 400, 500, 600]);
        // A third one goes on where that was.
        let third = options.open(dir.path()).unwrap();
        assert!(third.remove(600).unwrap());
        let saving = third.save_async([("a", common::bytes_tensor(&[170; 10]))], 170).unwrap();
        assert_eq!(saving.below, Some(500));
        assert_eq!(saving.wait().unwrap().below, Some(500));
        resumes_from(dir.path(), 170);
        assert!(third.remove(170).unwrap());
        resumes_from(dir.path(), 160);
        for step in [400, 500] {
            third.remove(step).unwrap();
        }
        assert_eq!(save(&third, 170).below, None, "what was above is gone");
    }
}

#[test]
fn times_copies_and_edits_do_not_change_which_was_saved_last() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = open(dir.path());
    for step in [500, 100, 90] {
        save(&checkpoints, step);
    }
    let now = SystemTime::now();
    for (step, age) in [(500, 0), (100, 1000), (90, 100_000)] {
        date(&checkpoints.path(step), now - Duration::from_secs(age));
    }
    resumes_from(dir.path(), 90);
    // All of one time, as on a file system that counts in seconds.
    for step in [500, 100, 90] {
        date(&checkpoints.path(step), now);
    }
    resumes_from(dir.path(), 90);
    maptensors::HeaderEdit::new().metadata("best", "yes").apply(checkpoints.path(500)).unwrap();
    maptensors::HeaderEdit::new().metadata("note", "x".repeat(100_000)).apply(checkpoints.path(100)).unwrap();
    resumes_from(dir.path(), 90);
    let copy = tempfile::tempdir().unwrap();
    for step in [90, 100, 500] {
        let name = checkpoints.path(step).file_name().unwrap().to_owned();
        std::fs::copy(checkpoints.path(step), copy.path().join(name)).unwrap();
    }
    resumes_from(copy.path(), 90);
    // Going on counts on.
    save(&open(copy.path()), 91);
    resumes_from(copy.path(), 91);
}

#[test]
fn a_file_that_is_used_again_is_as_new_as_what_is_saved_in_it() {
    let dir = common::recycling_dir();
    let checkpoints = CheckpointOptions::new().keep(2).open(dir.path()).unwrap();
    let mut recycled = 0;
    for step in [900, 800, 700, 10, 600, 20, 5] {
        recycled += usize::from(save(&checkpoints, step).ready == Ready::Recycled);
        resumes_from(dir.path(), step);
    }
    assert!(recycled >= 3, "{recycled}");
    assert_eq!(checkpoints.steps().unwrap(), [5, 20], "what this run saved last is what is kept");
}

#[test]
fn what_carries_no_number_was_there_before_and_what_is_damaged_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = open(dir.path());
    // Of an older version, or another program's.
    for step in [700u64, 200] {
        let bytes = [u8::try_from(step % 251).unwrap(); 100];
        SaveOptions::new().save([("a", common::bytes_tensor(&bytes))], checkpoints.path(step)).unwrap();
    }
    resumes_from(dir.path(), 700);
    assert_eq!(save(&checkpoints, 50).below, Some(700));
    resumes_from(dir.path(), 50);
    save(&checkpoints, 60);
    checkpoints.close().unwrap();
    // A disk that lost what it held: reading says so, and nobody goes back to 50 without a word.
    let path = open(dir.path()).path(60);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    let damaged = open(dir.path());
    assert_eq!(damaged.latest().unwrap(), Some(60));
    let error = damaged.read(None).unwrap_err().to_string();
    assert!(error.contains("step-0000000060"), "{error}");
    assert!(damaged.remove(60).unwrap());
    resumes_from(dir.path(), 50);
}
