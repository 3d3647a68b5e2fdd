//! Readers beside a saver that replaces what they open, again and again: each finds the old model or the new one.
#![allow(unsafe_code)]

use crate::common::bytes_tensor;
use maptensors::{CheckpointOptions, Checkpointer, Error, Model, SaveOptions};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const SAVES: u8 = 250;

fn save(path: &Path, value: u8, limit: u64) {
    let bytes = [value; 100];
    let names = ["a", "b", "c", "d"];
    let options = SaveOptions::new().durable(false).max_shard_size(limit);
    options.save(names.map(|name| (name, bytes_tensor(&bytes))), path).unwrap();
}

fn assert_whole(model: &Model) {
    let first = model.tensor("a").unwrap().as_bytes()[0];
    assert_eq!(model.len(), 4);
    assert!(model.tensors().all(|tensor| tensor.as_bytes().iter().all(|&byte| byte == first)), "a mixture");
}

/// Has two threads read for as long as another saves; fails if either did not get to.
fn beside(saves: impl FnOnce() + Send, read: impl Fn() + Sync) {
    let done = AtomicBool::new(false);
    let reads = std::thread::scope(|scope| {
        let readers = [(); 2].map(|()| {
            scope.spawn(|| {
                let mut reads = 0;
                while !done.load(Ordering::Relaxed) || reads == 0 {
                    read();
                    reads += 1;
                }
                reads
            })
        });
        let done_saving = std::panic::catch_unwind(std::panic::AssertUnwindSafe(saves));
        done.store(true, Ordering::Relaxed);
        let reads = readers.map(|reader| reader.join().unwrap());
        done_saving.unwrap();
        reads
    });
    println!("{reads:?} reads");
}

#[test]
fn a_set_that_is_saved_again_and_again_is_found_whole_by_index_and_by_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    save(&path, 0, 100);
    let index = dir.path().join("model.safetensors.index.json");
    let saves = || {
        for value in 0..SAVES {
            save(&path, value, 100);
        }
    };
    beside(saves, || {
        assert_whole(&Model::read(&index).unwrap());
        // SAFETY: files here are replaced, and never written to.
        assert_whole(&unsafe { Model::open(dir.path()) }.unwrap());
    });
}

#[test]
fn a_model_that_is_a_file_and_a_set_by_turns_is_found_in_its_directory() {
    // A name that directories are searched for.
    for name in ["model.safetensors", "m.safetensors"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        save(&path, 0, 100);
        let saves = || {
            for value in 0..SAVES {
                save(&path, value, if value % 2 == 0 { 1 << 30 } else { 100 });
            }
        };
        beside(saves, || assert_whole(&Model::read(dir.path()).unwrap()));
    }
}

#[test]
fn a_set_that_has_lost_a_shard_is_an_error_at_once_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("model.safetensors"), 0, 100);
    std::fs::remove_file(dir.path().join("model-00003-of-00004.safetensors")).unwrap();
    for path in [dir.path().to_owned(), dir.path().join("model.safetensors.index.json")] {
        let error = Model::read(path).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path, .. } if path.ends_with("model-00003-of-00004.safetensors")),
            "{error}"
        );
    }
}

#[test]
fn the_latest_of_one_that_is_kept_is_always_found() {
    for limit in [None, Some(100)] {
        let dir = tempfile::tempdir().unwrap();
        let options = CheckpointOptions::new().keep(1).durable(false);
        let options = limit.map_or(options.clone(), |limit| options.max_shard_size(limit));
        let writer = options.open(dir.path()).unwrap();
        let save = |step: u64| {
            let bytes = [u8::try_from(step).unwrap(); 100];
            let tensors = ["a", "b", "c", "d"].map(|name| (name, bytes_tensor(&bytes)));
            writer.save(tensors, step).unwrap();
        };
        save(0);
        let reader = Checkpointer::open(dir.path()).unwrap();
        let saves = || (0..SAVES).for_each(|step| save(step.into()));
        beside(saves, || {
            assert!(!reader.steps().unwrap().is_empty());
            assert!(reader.latest().unwrap().is_some());
            reader.find(None).unwrap();
            assert_whole(&reader.read(None).unwrap());
        });
        // What is not there is an error all the same.
        assert!(matches!(reader.find(Some(1000)), Err(Error::Argument(_))));
        assert!(matches!(reader.read(Some(1000)), Err(Error::Argument(_))));
    }
}
