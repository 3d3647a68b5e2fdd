//! Checkpoints: saved again and again, kept or let go, into outputs used again where nobody can notice.
#![allow(unsafe_code)]

use crate::common::{self, bytes_tensor, listing};
use maptensors::{CheckpointOptions, Checkpointer, Content, DType, Error, Model, Ready};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

const LEN: usize = 300_000;

/// A state of two tensors whose bytes say which step they are of.
fn save(checkpoints: &Checkpointer, step: u64) -> maptensors::Result<maptensors::Saved> {
    let bytes = vec![u8::try_from(step % 251).unwrap(); LEN];
    checkpoints.save(views(&bytes), step)
}

type Raw<'a> = (DType, [usize; 1], &'a [u8]);

fn views(bytes: &[u8]) -> [(&'static str, Raw<'_>); 2] {
    [("a", bytes_tensor(&bytes[..LEN / 2])), ("b", bytes_tensor(&bytes[LEN / 2..]))]
}

/// The step that a model's bytes are of; fails on any mixture.
fn step_of(model: &Model) -> u8 {
    let first = model.tensor("a").unwrap().as_bytes()[0];
    assert!(model.tensors().all(|t| t.as_bytes().iter().all(|&b| b == first)), "a mixture");
    first
}

fn mode_of(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The mode that this process's umask gives a new file.
fn mode_of_a_new_file() -> u32 {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("new"), b"").unwrap();
    mode_of(&dir.path().join("new"))
}

#[test]
fn the_last_are_kept_each_whole_and_the_oldest_is_written_over() {
    use Ready::{No, Prepared, Recycled};
    let dir = common::recycling_dir();
    let checkpoints = CheckpointOptions::new().keep(2).open(dir.path()).unwrap();
    let mut how = Vec::new();
    for step in 1..=6 {
        let saved = save(&checkpoints, step).unwrap();
        assert_eq!((saved.step, saved.bytes, saved.durable), (step, LEN as u64, true));
        assert!(saved.staged <= saved.finished);
        how.push(saved.ready);
        assert_eq!(checkpoints.latest().unwrap(), Some(step));
        for step in checkpoints.steps().unwrap() {
            assert_eq!(u64::from(step_of(&checkpoints.read(Some(step)).unwrap())), step);
        }
        assert!(checkpoints.steps().unwrap().len() <= 2);
    }
    assert_eq!(how, [No, Prepared, Prepared, Recycled, Recycled, Recycled]);
    checkpoints.close().unwrap();
    assert_eq!(listing(dir.path()), ["step-0000000005.safetensors", "step-0000000006.safetensors"]);
    // What anyone's reader makes of a file that was written over.
    let bytes = std::fs::read(dir.path().join("step-0000000006.safetensors")).unwrap();
    assert!(
        safetensors::SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensor("b")
            .unwrap()
            .data()
            .iter()
            .all(|&b| b == 6)
    );
}

#[test]
fn a_checkpoint_that_somebody_has_is_never_written_over() {
    for hold in ["mapped", "open", "linked"] {
        let dir = common::recycling_dir();
        let checkpoints = CheckpointOptions::new().keep(1).open(dir.path()).unwrap();
        save(&checkpoints, 1).unwrap();
        let path = checkpoints.find(Some(1)).unwrap();
        let link = dir.path().join("kept.safetensors");
        // SAFETY: checkpoints that are mapped are not written to: that is what is tested.
        let mapped = (hold == "mapped").then(|| unsafe { Model::open(&path) }.unwrap());
        let open = (hold == "open").then(|| std::fs::File::open(&path).unwrap());
        if hold == "linked" {
            std::fs::hard_link(&path, &link).unwrap();
        }
        let how: Vec<Ready> = (2..=5).map(|step| save(&checkpoints, step).unwrap().ready).collect();
        // 1 falls out when 2 is there, and would be what 3 is written into.
        assert_eq!(how[1], Ready::Prepared, "{hold}");
        assert_eq!(how[2..], [Ready::Recycled, Ready::Recycled], "{hold}");
        if let Some(mapped) = &mapped {
            assert_eq!(step_of(mapped), 1);
        }
        if let Some(mut open) = open {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut open, &mut bytes).unwrap();
            assert_eq!(step_of(&Model::read(Content::new(&bytes)).unwrap()), 1);
        }
        if hold == "linked" {
            assert_eq!(step_of(&Model::read(&link).unwrap()), 1);
        }
    }
}

#[test]
fn a_file_used_again_takes_on_the_size_and_mode_of_what_is_saved() {
    let dir = common::recycling_dir();
    let checkpoints = CheckpointOptions::new().keep(1).open(dir.path()).unwrap();
    let (mut recycled, mode) = (0, mode_of_a_new_file());
    for (step, len) in (1u64..).zip([LEN, LEN, LEN, LEN / 3, LEN * 2, 10, 0, LEN]) {
        let bytes = vec![u8::try_from(step).unwrap(); len];
        let saved = checkpoints.save([("w", bytes_tensor(&bytes))], step).unwrap();
        recycled += usize::from(saved.ready == Ready::Recycled);
        let model = checkpoints.read(None).unwrap();
        assert_eq!(model.tensor("w").unwrap().as_bytes(), bytes);
        let metadata = std::fs::metadata(saved.path.clone()).unwrap();
        assert_eq!(metadata.len(), model.layout(0).unwrap().file_len());
        assert_eq!(metadata.permissions().mode() & 0o7777, mode);
        std::fs::set_permissions(saved.path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    assert!(recycled >= 4, "{recycled}");
}

#[test]
fn what_happens_to_the_state_after_staging_does_not_reach_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = CheckpointOptions::new().keep(2).open(dir.path()).unwrap();
    let mut bytes = vec![0u8; LEN];
    let mut under_way = Vec::new();
    for step in 1..=20u8 {
        bytes.fill(step);
        under_way.push(checkpoints.save_async(views(&bytes), step.into()).unwrap());
        bytes.fill(255);
        // Whoever opens the latest at any time finds a whole one.
        if checkpoints.latest().unwrap().is_some() {
            match checkpoints.read(None) {
                Ok(model) => assert!(step_of(&model) <= step),
                Err(Error::Io { source, .. }) => assert_eq!(source.kind(), std::io::ErrorKind::NotFound),
                Err(error) => panic!("{error}"),
            }
        }
    }
    for (step, saving) in (1u64..).zip(under_way) {
        assert_eq!(saving.wait().unwrap().step, step);
        assert!(saving.is_done());
    }
    assert_eq!(checkpoints.steps().unwrap(), [19, 20]);
    assert_eq!(step_of(&checkpoints.read(None).unwrap()), 20);
    checkpoints.close().unwrap();
    assert_eq!(listing(dir.path()).len(), 2);
}

#[test]
fn an_error_in_the_background_is_told_once_by_the_save_or_by_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("checkpoints");
    // While step 1 or 2 is staged, a directory takes its name: found out when it is to be renamed.
    let block = {
        let directory = directory.clone();
        move |_, _| {
            for step in [1, 2] {
                std::fs::create_dir(directory.join(format!("step-{step:010}.safetensors"))).ok();
            }
        }
    };
    let unblock = || {
        for step in [1, 2] {
            std::fs::remove_dir(directory.join(format!("step-{step:010}.safetensors"))).unwrap();
        }
    };
    let checkpoints = CheckpointOptions::new().prepare(false).progress(block).open(&directory).unwrap();
    let bytes = vec![1u8; LEN];

    // By the one that waits for it, and then by nobody else.
    let saving = checkpoints.save_async(views(&bytes), 1).unwrap();
    assert!(matches!(saving.wait(), Err(Error::Io { .. })));
    assert!(saving.is_done() && matches!(saving.wait(), Err(Error::Argument(_))));
    checkpoints.wait().unwrap();
    unblock();

    // Where nobody waits, by the next call, which saves nothing; then all is well again.
    drop(checkpoints.save_async(views(&bytes), 2).unwrap());
    assert!(
        matches!(checkpoints.save(views(&bytes), 3), Err(Error::Io { path, .. }) if path.ends_with("step-0000000002.safetensors"))
    );
    unblock();
    checkpoints.save(views(&bytes), 3).unwrap();
    unblock();
    assert_eq!(checkpoints.steps().unwrap(), [3]);
    checkpoints.close().unwrap();
    assert_eq!(listing(&directory), ["step-0000000003.safetensors"]);
}

#[test]
fn sharded_checkpoints_are_whole_sets_and_fall_out_whole() {
    let dir = tempfile::tempdir().unwrap();
    let options = CheckpointOptions::new().keep(2).max_shard_size(LEN as u64 / 2);
    let checkpoints = options.open(dir.path()).unwrap();
    for step in 1..=4 {
        let bytes = vec![u8::try_from(step).unwrap(); LEN];
        let saving = checkpoints.save_async(views(&bytes), step).unwrap();
        assert_eq!(saving.wait().unwrap().ready, Ready::No);
    }
    assert_eq!(checkpoints.steps().unwrap(), [3, 4]);
    let model = checkpoints.read(None).unwrap();
    assert_eq!((model.shards(), step_of(&model)), (2, 4));
    assert_eq!(listing(dir.path()).len(), 6);
    // A set that has lost a shard is no checkpoint.
    std::fs::remove_file(dir.path().join("step-0000000004-00001-of-00002.safetensors")).unwrap();
    assert_eq!(checkpoints.latest().unwrap(), Some(3));
    assert!(matches!(checkpoints.find(Some(4)), Err(Error::Argument(_))));
}

#[test]
fn milestones_stay_and_metadata_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = CheckpointOptions::new().keep(1).keep_every(3).open(dir.path()).unwrap();
    let bytes = vec![7u8; LEN];
    for step in 1..=7 {
        let metadata = [("loss", format!("0.{step}"))];
        checkpoints.save_with(views(&bytes), metadata, step).unwrap();
    }
    assert_eq!(checkpoints.steps().unwrap(), [3, 6, 7]);
    assert_eq!(checkpoints.read(Some(6)).unwrap().metadata()["loss"], "0.6");
}

#[test]
fn an_output_asked_for_ahead_is_there_for_the_first_save_and_gone_if_unused() {
    let dir = tempfile::tempdir().unwrap();
    let layout = maptensors::Layout::builder()
        .tensor("a", DType::U8, &[LEN / 2])
        .tensor("b", DType::U8, &[LEN / 2])
        .build()
        .unwrap();
    let checkpoints = Checkpointer::open(dir.path()).unwrap();
    checkpoints.prepare(layout.data_len() + 4096).unwrap();
    checkpoints.wait().unwrap();
    assert!(listing(dir.path()).is_empty(), "what is made ready has no name");
    assert_eq!(checkpoints.steps().unwrap(), [0u64; 0]);
    assert_eq!(save(&checkpoints, 1).unwrap().ready, Ready::Prepared);
    checkpoints.prepare(layout.data_len()).unwrap();
    drop(checkpoints);
    assert_eq!(listing(dir.path()), ["step-0000000001.safetensors"]);
}

#[test]
fn threads_that_save_at_once_take_turns_and_leave_the_last() {
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = CheckpointOptions::new().keep(1).durable(false).open(dir.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let checkpoints = &checkpoints;
                scope.spawn(move || {
                    for step in 0..3 {
                        save(checkpoints, thread * 10 + step).unwrap();
                    }
                });
            }
        });
        let steps = checkpoints.steps().unwrap();
        assert_eq!(steps.len(), 1);
        assert_eq!(u64::from(step_of(&checkpoints.read(None).unwrap())), steps[0]);
    }
}

#[test]
fn going_back_keeps_what_the_new_run_saves() {
    let dir = tempfile::tempdir().unwrap();
    let options = CheckpointOptions::new().keep(3);
    let checkpoints = options.open(dir.path()).unwrap();
    for step in [200, 230, 250] {
        save(&checkpoints, step).unwrap();
    }
    drop(checkpoints);
    let checkpoints = options.open(dir.path()).unwrap();
    for step in [150, 160, 170] {
        save(&checkpoints, step).unwrap();
    }
    assert_eq!(checkpoints.steps().unwrap(), [150, 160, 170]);
    checkpoints.remove(170).unwrap();
    assert_eq!(checkpoints.latest().unwrap(), Some(160));
}

#[test]
fn every_checkpoint_has_the_mode_of_a_new_file_or_of_the_one_it_replaces() {
    const TEST: &str = "every_checkpoint_has_the_mode_of_a_new_file_or_of_the_one_it_replaces";
    for (role, mask, expected) in [("000", 0, 0o666), ("022", 0o022, 0o644), ("077", 0o077, 0o600)] {
        let Some(dir) = common::role(role) else { continue };
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
        let checkpoints = CheckpointOptions::new().keep(3).open(&dir).unwrap();
        for step in 0..6 {
            save(&checkpoints, step).unwrap();
            assert_eq!(mode_of(&checkpoints.path(step)), expected, "{step}");
        }
        std::fs::set_permissions(checkpoints.path(5), std::fs::Permissions::from_mode(0o640)).unwrap();
        save(&checkpoints, 5).unwrap();
        assert_eq!(mode_of(&checkpoints.path(5)), 0o640);
        return;
    }
    // The umask is the whole process'.
    for role in ["000", "022", "077"] {
        let dir = tempfile::tempdir().unwrap();
        common::pass(common::child(TEST, role, dir.path()));
    }
}

#[test]
fn a_step_saved_again_as_one_file_leaves_no_set_behind() {
    let dir = tempfile::tempdir().unwrap();
    let sharded = CheckpointOptions::new().max_shard_size(LEN as u64 / 2).open(dir.path()).unwrap();
    save(&sharded, 1).unwrap();
    assert_eq!(listing(dir.path()).len(), 3);
    drop(sharded);
    let single = Checkpointer::open(dir.path()).unwrap();
    save(&single, 1).unwrap();
    single.close().unwrap();
    assert_eq!(listing(dir.path()), ["step-0000000001.safetensors"]);
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_next_one() {
    const TEST: &str = "what_a_killed_process_left_is_removed_by_the_next_one";
    if let Some(dir) = common::role("killed") {
        // Saves three, waits until the next output is ready, and dies.
        let checkpoints = CheckpointOptions::new().keep(2).open(dir).unwrap();
        for step in 1..=3 {
            save(&checkpoints, step).unwrap();
        }
        checkpoints.wait().unwrap();
        std::process::abort();
    }
    // The output made ready is a file that is used again, which has a name.
    let dir = common::recycling_dir();
    let status = common::child(TEST, "killed", dir.path()).status().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
    assert!(listing(dir.path()).iter().any(|name| name.starts_with(".maptensors-")));
    let checkpoints = CheckpointOptions::new().keep(2).open(dir.path()).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [2, 3]);
    save(&checkpoints, 4).unwrap();
    checkpoints.close().unwrap();
    assert_eq!(listing(dir.path()), ["step-0000000003.safetensors", "step-0000000004.safetensors"]);
}

#[test]
fn looking_for_checkpoints_makes_no_directory_and_the_first_save_does() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("a/b");
    let model = Model::read("models/digits.safetensors").unwrap();
    let checkpoints = CheckpointOptions::new().keep(1).open(&dir).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [0; 0]);
    assert_eq!(checkpoints.latest().unwrap(), None);
    assert!(checkpoints.find(None).is_err() && checkpoints.find(Some(1)).is_err());
    checkpoints.remove(1).unwrap();
    assert!(!temporary.path().join("a").exists());
    for step in [1, 2] {
        checkpoints.save(model.tensors().map(|t| (t.name(), t)), step).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [step]);
    }
    checkpoints.close().unwrap();
    // What is no directory is an error at once.
    let file = temporary.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(Checkpointer::open(&file).is_err());
}

#[test]
fn a_directory_that_others_make_meanwhile_is_seen() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("later");
    let model = Model::read("models/digits.safetensors").unwrap();
    let reader = Checkpointer::open(&dir).unwrap();
    let writer = Checkpointer::open(&dir).unwrap();
    writer.save(model.tensors().map(|t| (t.name(), t)), 7).unwrap();
    assert_eq!(reader.latest().unwrap(), Some(7));
}
