//! What a file system refuses to remove, rename or sync is told.

use super::{CheckpointOptions, Checkpointer};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::os::disk::{self, Op, Watch};
use crate::save::SaveOptions;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Refuses some operations with EPERM, as a file system does of files that are immutable.
struct Refuse {
    what: fn(&Op<'_>) -> bool,
    on: AtomicBool,
    refused: AtomicUsize,
}

impl Watch for Refuse {
    fn before(&self, op: &Op<'_>) -> io::Result<()> {
        if !self.on.load(Ordering::Relaxed) || !(self.what)(op) {
            return Ok(());
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
    fn after(&self, _: &Op<'_>, _: bool) {}
}

/// Runs `work`, and what it starts, while such operations are refused; `work` is given the switch, which is on. Fails if
/// none was.
fn refusing<T>(what: fn(&Op<'_>) -> bool, work: impl FnOnce(&dyn Fn(bool)) -> T) -> T {
    let watch = Arc::new(Refuse { what, on: true.into(), refused: 0.into() });
    let switch = |on| watch.on.store(on, Ordering::Relaxed);
    let done = disk::watched(Some(watch.clone()), || work(&switch));
    assert!(watch.refused.load(Ordering::Relaxed) > 0, "nothing was refused");
    done
}

fn text(name: &OsStr) -> &str {
    name.to_str().unwrap()
}

fn is_first(name: &OsStr) -> bool {
    text(name).starts_with("step-0000000001")
}

fn is_index(name: &OsStr) -> bool {
    Path::new(name).extension() == Some(OsStr::new("json"))
}

fn is_hidden(name: &OsStr) -> bool {
    text(name).starts_with(".maptensors-")
}

fn save(checkpoints: &Checkpointer, step: u64) -> Result<super::Saved> {
    let bytes = vec![u8::try_from(step).unwrap(); 10_000];
    let (a, b) = bytes.split_at(5000);
    checkpoints.save([("a", (DType::U8, [5000], a)), ("b", (DType::U8, [5000], b))], step)
}

#[track_caller]
fn assert_not_removed<T: std::fmt::Debug>(done: Result<T>, saved: u64, left: &str) {
    let Err(Error::NotRemoved { path, left: found, source }) = &done else { panic!("{done:?}") };
    assert!(path.ends_with(format!("step-{saved:010}.safetensors")), "{done:?}");
    assert!(found.file_name().unwrap().to_str().unwrap().starts_with(left), "{done:?}");
    assert_eq!(source.raw_os_error(), Some(libc::EPERM));
    assert!(done.unwrap_err().to_string().contains("saved and visible, but"));
}

fn options() -> CheckpointOptions {
    CheckpointOptions::new().keep(1)
}

/// A directory where nothing waits for a disk.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

#[test]
fn what_keep_cannot_remove_is_told_by_the_save_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let is_refused: fn(&Op<'_>) -> bool = |op| matches!(op, Op::Rename(_, from, _) if is_first(from));
    refusing(is_refused, |refuse| {
        let checkpoints = options().prepare(false).open(dir.path()).unwrap();
        save(&checkpoints, 1).unwrap();
        assert_not_removed(save(&checkpoints, 2), 2, "step-0000000001.safetensors");
        assert_eq!(checkpoints.steps().unwrap(), [1, 2]);
        assert_eq!(checkpoints.latest().unwrap(), Some(2));
        // In the background as well, and to the next call if nobody waits.
        let bytes = [3; 10];
        let view = (DType::U8, [10], bytes);
        let saving = checkpoints.save_async([("a", view)], 3).unwrap();
        assert_not_removed(saving.wait(), 3, "step-0000000001.safetensors");
        drop(checkpoints.save_async([("a", view)], 4).unwrap());
        assert_not_removed(checkpoints.wait(), 4, "step-0000000001.safetensors");
        checkpoints.wait().unwrap();
        refuse(false);
        save(&checkpoints, 5).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [5], "it goes as soon as it can");
        checkpoints.close().unwrap();
    });
}

#[test]
fn a_file_that_is_left_under_a_hidden_name_is_told_by_the_next_call() {
    for prepare in [false, true] {
        let dir = scratch();
        let is_refused: fn(&Op<'_>) -> bool = |op| matches!(op, Op::Remove(_, name) if is_hidden(name));
        refusing(is_refused, |refuse| {
            let checkpoints = options().prepare(prepare).open(dir.path()).unwrap();
            save(&checkpoints, 1).unwrap();
            checkpoints.wait().unwrap();
            // What is open is not written over, but removed.
            let held = std::fs::File::open(checkpoints.path(1)).unwrap();
            save(&checkpoints, 2).unwrap();
            assert_not_removed(checkpoints.wait(), 2, ".maptensors-");
            refuse(false);
            drop(held);
            save(&checkpoints, 3).unwrap();
            assert_eq!(checkpoints.steps().unwrap(), [3]);
            checkpoints.close().unwrap();
        });
    }
}

#[test]
fn a_step_that_cannot_be_removed_is_an_error_and_stays() {
    for sharded in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = CheckpointOptions::new().prepare(false);
        let options = if sharded { options.max_shard_size(5000) } else { options };
        let checkpoints = options.open(dir.path()).unwrap();
        save(&checkpoints, 1).unwrap();
        save(&checkpoints, 2).unwrap();
        refusing(
            |op| matches!(op, Op::Rename(_, name, _) | Op::Remove(_, name) if !is_first(name)),
            |_| {
                let error = checkpoints.remove(2).unwrap_err();
                assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(dir.path())), "{error}");
                assert_eq!(checkpoints.steps().unwrap(), [1, 2]);
                // What is not there is no reason to ask the file system.
                assert!(!checkpoints.remove(9).unwrap());
            },
        );
        // A power loss must not bring it back.
        refusing(
            |op| matches!(op, Op::SyncDir(_)),
            |_| assert!(matches!(checkpoints.remove(2), Err(Error::Io { .. }))),
        );
        assert!(checkpoints.remove(1).unwrap() && !checkpoints.remove(1).unwrap());
        assert_eq!(checkpoints.steps().unwrap(), [0; 0]);
    }
}

#[test]
fn shards_that_cannot_be_removed_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = [7; 100];
    let tensor = || (DType::U8, [100], bytes);
    let save = |path: &Path, value: &str| {
        let options = SaveOptions::new().metadata("value", value).max_shard_size(100);
        options.save([("a", tensor()), ("b", tensor())], path)
    };
    save(&path, "1").unwrap();
    refusing(
        |op| matches!(op, Op::Remove(_, name) if text(name) == "model-00001-of-00002.safetensors"),
        |_| {
            let error = save(&path, "2").unwrap_err();
            let Error::NotRemoved { path: saved, left, .. } = &error else { panic!("{error}") };
            assert!(*saved == path && left.ends_with("model-00001-of-00002.safetensors"), "{error}");
        },
    );
    let model = Model::read(dir.path()).unwrap();
    assert_eq!(model.metadata()["value"], "2");
    assert!(!dir.path().join("model-00002-of-00002.safetensors").exists(), "the others are");
    // Of a set that does not come about, the shards that are left are named beside the reason.
    refusing(
        |op| match op {
            Op::Rename(_, _, to) => is_index(to),
            Op::Remove(_, name) => text(name).contains("-g3-00002-of-"),
            _ => false,
        },
        |_| {
            let error = save(&path, "3").unwrap_err().to_string();
            assert!(
                error.contains("renaming") && error.contains("model-g3-00002-of-00002.safetensors is left")
            );
        },
    );
    assert_eq!(Model::read(dir.path()).unwrap().metadata()["value"], "2");

    let checkpoints = options().max_shard_size(5000).open(dir.path().join("run")).unwrap();
    let saved = |step| self::save(&checkpoints, step);
    saved(1).unwrap();
    for what in [
        (|op| matches!(op, Op::Remove(_, name) if is_index(name))) as fn(&Op<'_>) -> bool,
        |op| matches!(op, Op::Remove(_, name) if text(name).contains("-of-")),
    ] {
        let step = checkpoints.latest().unwrap().unwrap() + 1;
        refusing(what, |_| assert_not_removed(saved(step), step, "step-0000000001"));
        assert_eq!(checkpoints.latest().unwrap(), Some(step));
    }
    saved(9).unwrap();
    checkpoints.close().unwrap();
    let names = std::fs::read_dir(dir.path().join("run")).unwrap();
    assert_eq!(names.count(), 3, "what could not be removed before is now");
}
