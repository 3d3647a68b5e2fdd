//! Directories that are moved, removed or linked elsewhere while something saves into them.

mod common;
use common::{bytes_tensor, listing};
use maptensors::{CheckpointOptions, Checkpointer, DType, Draft, Error, Layout, Model, SaveOptions, Saving};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Once;

const LEN: usize = 100_000;

/// What becomes of a directory, and where its files are then.
struct Away {
    name: &'static str,
    does: fn(&Path) -> Option<PathBuf>,
}

/// Each is called with the directory's path, `…/run`, which is a link to `…/one` for those that point it elsewhere.
const AWAY: [Away; 4] = [
    Away {
        name: "moved",
        does: |run| {
            let to = run.with_file_name("archive");
            fs::rename(run, &to).unwrap();
            Some(to)
        },
    },
    Away {
        name: "moved, and another made",
        does: |run| {
            let to = run.with_file_name("archive");
            fs::rename(run, &to).unwrap();
            fs::create_dir(run).unwrap();
            Some(to)
        },
    },
    Away {
        name: "linked elsewhere",
        does: |run| {
            let other = run.with_file_name("two");
            fs::create_dir(&other).unwrap();
            fs::remove_file(run).unwrap();
            symlink(other, run).unwrap();
            Some(run.with_file_name("one"))
        },
    },
    Away {
        name: "removed",
        does: |run| {
            fs::remove_dir_all(run).unwrap();
            None
        },
    },
];

impl Away {
    /// A directory that this can be done to.
    fn make(&self, within: &Path) -> PathBuf {
        let run = within.join("run");
        if self.name == "linked elsewhere" {
            fs::create_dir(within.join("one")).unwrap();
            symlink("one", &run).unwrap();
        } else {
            fs::create_dir(&run).unwrap();
        }
        run
    }

    #[track_caller]
    fn assert_told<T: std::fmt::Debug>(&self, done: Result<T, Error>, run: &Path) -> String {
        let name = self.name;
        let error = done.unwrap_err();
        let Error::Moved { path, what, .. } = &error else { panic!("{name}: {error}") };
        assert_eq!(path, run, "{name}");
        let expected = match name {
            "removed" => "was removed",
            "linked elsewhere" => "/one now (it was moved, or a link points elsewhere)",
            _ => "/archive now (it was moved, or a link points elsewhere)",
        };
        assert!(what.contains(expected), "{name}: {what}");
        assert_eq!(what.contains("another is here"), !["moved", "removed"].contains(&name), "{what}");
        what.clone()
    }
}

fn save(checkpoints: &Checkpointer, step: u64) -> Result<Saving, Error> {
    let bytes = vec![u8::try_from(step).unwrap(); LEN];
    let (a, b) = bytes.split_at(LEN / 2);
    checkpoints.save_async([("a", bytes_tensor(a)), ("b", bytes_tensor(b))], step)
}

#[test]
fn a_run_whose_directory_is_elsewhere_saves_and_removes_nothing_and_says_so() {
    for away in &AWAY {
        for shards in [None, Some(LEN as u64 / 2)] {
            let dir = tempfile::tempdir().unwrap();
            let run = away.make(dir.path());
            let options = CheckpointOptions::new().keep(2);
            let options = shards.map_or(options.clone(), |limit| options.max_shard_size(limit));
            let checkpoints = options.open(&run).unwrap();
            for step in 1..=3 {
                save(&checkpoints, step).unwrap().wait().unwrap();
            }
            checkpoints.wait().unwrap();
            let is_checkpoint = |name: &String| !name.starts_with(".maptensors-");
            let before: Vec<String> = listing(&run).into_iter().filter(is_checkpoint).collect();
            let there = (away.does)(&run);
            let told = away.assert_told(save(&checkpoints, 4).map(drop), &run);
            assert!(told.contains("open the checkpoints again"), "{told}");
            away.assert_told(checkpoints.steps(), &run);
            away.assert_told(checkpoints.latest(), &run);
            away.assert_told(checkpoints.find(None), &run);
            away.assert_told(checkpoints.find(Some(3)), &run);
            away.assert_told(checkpoints.read(None).map(drop), &run);
            away.assert_told(checkpoints.remove(3), &run);
            away.assert_told(checkpoints.prepare(1000), &run);
            checkpoints.close().unwrap();
            if let Some(there) = there {
                assert_eq!(listing(&there), before, "{}", away.name);
                assert_eq!(Checkpointer::open(&there).unwrap().steps().unwrap(), [2, 3]);
            }
            assert!(!run.exists() || listing(&run).is_empty());
            // Opened again, it is a directory like any other.
            let again = options.open(&run).unwrap();
            save(&again, 4).unwrap().wait().unwrap();
            assert_eq!(again.steps().unwrap(), [4]);
        }
    }
}

#[test]
fn a_checkpoint_that_is_staged_while_its_directory_goes_is_not_saved() {
    for away in &AWAY {
        for shards in [None, Some(LEN as u64 / 2)] {
            let dir = tempfile::tempdir().unwrap();
            let run = away.make(dir.path());
            let first = CheckpointOptions::new().open(&run).unwrap();
            save(&first, 1).unwrap().wait().unwrap();
            first.close().unwrap();
            let (goes, once, does) = (run.clone(), Once::new(), away.does);
            let options =
                CheckpointOptions::new().keep(1).progress(move |_, _| once.call_once(|| drop(does(&goes))));
            let options = shards.map_or(options.clone(), |limit| options.max_shard_size(limit));
            let checkpoints = options.open(&run).unwrap();
            let done = save(&checkpoints, 2).and_then(|saving| saving.wait());
            let told = away.assert_told(done, &run);
            assert!(told.contains("nothing was saved"), "{told}");
            checkpoints.close().unwrap();
            let there =
                ["archive", "one"].iter().map(|name| dir.path().join(name)).find(|path| path.exists());
            if let Some(there) = there {
                assert_eq!(listing(&there), ["step-0000000001.safetensors"], "{}", away.name);
            }
        }
    }
}

#[test]
fn a_draft_goes_where_its_directory_is_now_and_says_so() {
    let layout = Layout::builder().tensor("w", DType::U8, &[LEN]).build().unwrap();
    for away in &AWAY {
        let dir = tempfile::tempdir().unwrap();
        let run = away.make(dir.path());
        let mut draft = Draft::create(run.join("m.safetensors"), &layout).unwrap();
        draft.tensor_mut("w").unwrap().as_bytes_mut().fill(7);
        let there = (away.does)(&run);
        let told = away.assert_told(draft.commit(), &run);
        match there {
            None => assert!(told.contains("nothing was saved"), "{told}"),
            Some(there) => {
                assert!(told.contains("the file was saved in that directory, whole"), "{told}");
                assert_eq!(listing(&there), ["m.safetensors"], "{}", away.name);
                let model = Model::read(there.join("m.safetensors")).unwrap();
                assert!(model.tensor("w").unwrap().as_bytes().iter().all(|&byte| byte == 7));
            }
        }
    }
}

#[test]
fn a_set_whose_directory_goes_is_not_saved_and_the_old_one_stays() {
    for away in AWAY.iter().filter(|away| away.name != "removed") {
        let dir = tempfile::tempdir().unwrap();
        let run = away.make(dir.path());
        let bytes = vec![1; LEN];
        let tensors = || [("a", bytes_tensor(&bytes)), ("b", bytes_tensor(&bytes))];
        let options = SaveOptions::new().max_shard_size(LEN as u64);
        options.clone().save(tensors(), run.join("model.safetensors")).unwrap();
        let before = listing(&run);
        let (goes, once, does) = (run.clone(), Once::new(), away.does);
        let options = options.progress(move |_, _| once.call_once(|| drop(does(&goes))));
        away.assert_told(options.save(tensors(), run.join("model.safetensors")), &run);
        let there = ["archive", "one"].iter().map(|name| dir.path().join(name)).find(|path| path.exists());
        let there = there.unwrap();
        assert_eq!(listing(&there), before, "{}", away.name);
        assert_eq!(Model::read(&there).unwrap().shards(), 2);
    }
}
