//! What a child of fork(2) has of files that its parent is making: nothing that it could change or spoil.
#![allow(unsafe_code)]
#![cfg(target_os = "linux")]

use maptensors::{
    CheckpointOptions, DType, Draft, DraftOptions, Error, HeaderEdit, Layout, Memfd, Model, Publisher, Ready,
    SaveOptions, SaveTensor, TensorBytes,
};
use std::io::{Read as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::common::{self, bytes_tensor, listing};

const LEN: usize = 300_000;

/// A child, which is killed where it has not ended by itself.
struct Child(libc::pid_t);

impl Child {
    /// Forks, and does `work` in the child. Of each test's process this is the only thread but the harness' own, which
    /// waits; and the C library sees to it that the child may ask for memory.
    fn new(work: impl FnOnce()) -> Self {
        // SAFETY: see above: no lock that the child takes is held by a thread that it has not.
        match unsafe { libc::fork() } {
            -1 => panic!("fork"),
            0 => {
                let done = catch_unwind(AssertUnwindSafe(work)).is_ok();
                // SAFETY: ends the child: nothing of its parent's is run or written.
                unsafe { libc::_exit(i32::from(!done)) }
            }
            child => Self(child),
        }
    }

    /// The status that it ends with.
    fn end(self) -> i32 {
        let mut status = 0;
        // SAFETY: a child of this process, and a place for a number.
        assert_eq!(unsafe { libc::waitpid(self.0, &raw mut status, 0) }, self.0);
        std::mem::forget(self);
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of this process that nobody has waited for.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: as above.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Forks, does `work` in the child, and waits for it: it must not fail.
fn forked(work: impl FnOnce()) {
    assert_eq!(Child::new(work).end(), 0, "the child failed");
}

/// Runs `work` in a process of its own, in a directory where files may be used again.
fn alone(test: &str, work: impl FnOnce(&Path)) {
    if let Some(dir) = common::role("alone") {
        return work(&dir);
    }
    let dir = common::recycling_dir();
    common::pass(common::child(test, "alone", dir.path()));
}

/// The lines of this process's maps that can write to a file that others may have; and its descriptors of files in `dir`.
fn of_files(dir: &Path) -> (Vec<String>, Vec<String>) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let maps =
        maps.lines().filter(|line| line.split(' ').nth(1) == Some("rw-s")).map(str::to_owned).collect();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| {
        let to = std::fs::read_link(fd.ok()?.path()).ok()?;
        (to.starts_with(dir) && !to.is_dir()).then(|| to.display().to_string())
    });
    (maps, open.collect())
}

#[track_caller]
fn assert_belongs_to_another<T>(result: Result<T, Error>) {
    match result {
        Err(Error::Argument(text)) => assert!(text.contains("belongs to another process"), "{text}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("done in a fork's child"),
    }
}

/// A tensor whose bytes are asked for while the output is mapped: then there is a fork, and the child goes on as if
/// nothing had been.
struct Forking<'a> {
    bytes: &'a [u8],
    dir: &'a Path,
    in_child: &'a std::cell::Cell<bool>,
}

impl SaveTensor for Forking<'_> {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn shape(&self) -> &[usize] {
        std::slice::from_ref(&LEN)
    }
    fn bytes(&self) -> TensorBytes<'_> {
        let before = listing(self.dir);
        let (maps, open) = of_files(self.dir);
        assert!(!open.is_empty() && !maps.is_empty(), "the output is not there: {maps:?}, {open:?}");
        // SAFETY: as in `Child::new`.
        match unsafe { libc::fork() } {
            0 => {
                self.in_child.set(true);
                let (maps, open) = of_files(self.dir);
                // The control page of a publication is no output, and no checkpoint is open.
                let outputs = open.iter().filter(|path| !path.ends_with("/control")).count();
                if !maps.is_empty() || outputs > 0 {
                    eprintln!("the child has {maps:?}, {open:?}");
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(3) };
                }
            }
            child => {
                assert_eq!(Child(child).end(), 0, "the child failed");
                assert_eq!(listing(self.dir), before, "the child left something, or took it away");
            }
        }
        // Owned: it is copied at once.
        self.bytes.to_vec().into()
    }
}

/// Has `save` write a tensor in whose middle a child is forked, which goes on with the save. The child is refused, and
/// the parent's file is whole.
fn save_with_a_fork<T>(
    dir: &Path,
    fill: u8,
    save: impl FnOnce([(&'static str, Forking<'_>); 1]) -> Result<T, Error>,
) -> T {
    let (bytes, in_child) = (vec![fill; LEN], std::cell::Cell::new(false));
    let tensor = Forking { bytes: &bytes, dir, in_child: &in_child };
    let saved = catch_unwind(AssertUnwindSafe(|| save([("w", tensor)])));
    if in_child.get() {
        let refused = matches!(&saved, Ok(Err(Error::Argument(text))) if text.contains("another process"));
        if !refused {
            eprintln!("the child's save: {:?}", saved.map(|saved| saved.map(|_| ())));
        }
        // SAFETY: ends the child.
        unsafe { libc::_exit(if refused { 0 } else { 4 }) };
    }
    saved.unwrap().unwrap()
}

fn holds(path: &Path, fill: u8) {
    let model = Model::read(path).unwrap();
    assert!(model.tensor("w").unwrap().as_bytes().iter().all(|&byte| byte == fill), "not of {fill}s alone");
}

#[test]
fn a_child_that_is_forked_in_a_save_has_nothing_of_the_output_and_cannot_finish_it() {
    alone("a_child_that_is_forked_in_a_save_has_nothing_of_the_output_and_cannot_finish_it", |dir| {
        let at = |name: &str| dir.join(name).join("model.safetensors");
        for name in ["file", "set", "checkpoints", "published"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        for fill in 1..=3 {
            save_with_a_fork(&dir.join("file"), fill, |w| maptensors::save(w, at("file")));
            holds(&at("file"), fill);

            let sharded = SaveOptions::new().max_shard_size(10);
            save_with_a_fork(&dir.join("set"), fill, |w| sharded.save(w, at("set")));
            holds(&dir.join("set"), fill);
        }
        let checkpoints = CheckpointOptions::new().keep(1).open(dir.join("checkpoints")).unwrap();
        for (fill, ready) in
            [(1, Ready::No), (2, Ready::Prepared), (3, Ready::Recycled), (4, Ready::Recycled)]
        {
            checkpoints.wait().unwrap();
            let saved =
                save_with_a_fork(&dir.join("checkpoints"), fill, |w| checkpoints.save(w, fill.into()));
            assert_eq!(saved.ready, ready, "{fill}");
            holds(&saved.path, fill);
        }
        checkpoints.close().unwrap();
        let mut publisher = Publisher::open(dir.join("published/p")).unwrap();
        for fill in 1..=4 {
            save_with_a_fork(&dir.join("published/p"), fill, |w| publisher.publish(w));
        }
        publisher.remove().unwrap();
    });
}

#[test]
fn a_draft_is_the_processs_that_made_it() {
    alone("a_draft_is_the_processs_that_made_it", |dir| {
        let layout = Layout::builder().tensor("w", DType::U8, &[LEN]).build().unwrap();
        let path = dir.join("model.safetensors");
        for mapped in [true, false] {
            let mut draft = DraftOptions::new().mapped(mapped).create(&path, &layout).unwrap();
            draft.tensor_mut("w").unwrap().as_bytes_mut().fill(1);
            let before = listing(dir);
            let mut draft = Some(draft);
            forked(|| {
                assert_eq!(of_files(dir), (Vec::new(), Vec::new()));
                let mut draft = draft.take().unwrap();
                assert_belongs_to_another(draft.tensor_mut("w").map(drop));
                assert_belongs_to_another(draft.tensors_mut().map(drop));
                assert_belongs_to_another(draft.commit());
            });
            let mut draft = draft.unwrap();
            assert_eq!(listing(dir), before);
            draft.tensor_mut("w").unwrap().as_bytes_mut()[..10].fill(1);
            draft.commit().unwrap();
            holds(&path, 1);
            std::fs::remove_file(&path).unwrap();
        }
    });
}

#[test]
fn a_child_that_touches_a_draft_ends_and_changes_nothing() {
    alone("a_child_that_touches_a_draft_ends_and_changes_nothing", |dir| {
        let layout = Layout::builder().tensor("w", DType::U8, &[LEN]).build().unwrap();
        let path = dir.join("model.safetensors");
        let mut draft = Draft::create(&path, &layout).unwrap();
        let mut tensor = draft.tensor_mut("w").unwrap();
        let bytes = tensor.as_bytes_mut();
        bytes.fill(1);
        let (mut start, go) = std::io::pipe().unwrap();
        let mut go = Some(go);
        let child = Child::new(|| {
            drop(go.take());
            // What the child maps now must not come to lie there.
            let others: Vec<_> = (0..50)
                .map(|i| {
                    let mut other = maptensors::MapOptions::new().anonymous(4096 * (1 + i * 13)).unwrap();
                    other.try_as_bytes_mut().unwrap().fill(9);
                    other
                })
                .collect();
            start.read_to_end(&mut Vec::new()).unwrap();
            bytes[5] = 2;
            // SAFETY: ends the child: it should not have come so far.
            unsafe { libc::_exit(i32::from(others.iter().any(|other| other.as_bytes().contains(&2)))) };
        });
        draft.commit().unwrap();
        // SAFETY: nobody writes to it: that is what is tested.
        let reader = unsafe { Model::open(&path) }.unwrap();
        go.take().unwrap().write_all(b".").unwrap();
        let status = child.end();
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:x}");
        assert!(reader.tensor("w").unwrap().as_bytes().iter().all(|&byte| byte == 1));
    });
}

#[test]
fn checkpoints_are_used_again_though_a_forked_child_lives() {
    alone("checkpoints_are_used_again_though_a_forked_child_lives", |dir| {
        let bytes = vec![1; LEN];
        let checkpoints = CheckpointOptions::new().keep(1).open(dir).unwrap();
        let save = |step| checkpoints.save([("w", bytes_tensor(&bytes))], step).unwrap().ready;
        save(1);
        checkpoints.wait().unwrap();
        // As a data loader's worker: it has all that was there, and does something else.
        let _worker = Child::new(|| {
            loop {
                std::thread::park();
            }
        });
        assert_eq!(save(2), Ready::Prepared);
        checkpoints.wait().unwrap();
        let _another = Child::new(|| {
            loop {
                std::thread::park();
            }
        });
        assert_eq!([3, 4, 5, 6].map(save), [Ready::Recycled; 4]);
    });
}

#[test]
fn a_checkpointer_and_what_it_has_under_way_are_the_processs_that_made_them() {
    alone("a_checkpointer_and_what_it_has_under_way_are_the_processs_that_made_them", |dir| {
        let bytes = vec![1; LEN];
        let checkpoints = CheckpointOptions::new().keep(1).open(dir).unwrap();
        let state = || [("w", bytes_tensor(&bytes))];
        checkpoints.save(state(), 1).unwrap();
        checkpoints.wait().unwrap();
        let mut value = Some(checkpoints);
        forked(|| {
            assert_eq!(of_files(dir), (Vec::new(), Vec::new()));
            let checkpoints = value.take().unwrap();
            assert_belongs_to_another(checkpoints.save(state(), 2));
            assert_belongs_to_another(checkpoints.save_async(state(), 2));
            assert_belongs_to_another(checkpoints.prepare(10));
            assert_belongs_to_another(checkpoints.remove(1));
            assert_belongs_to_another(checkpoints.wait());
            assert_eq!(checkpoints.latest().unwrap(), Some(1), "looking is for everybody");
        });
        let checkpoints = value.unwrap();
        let saving = checkpoints.save_async(state(), 2).unwrap();
        let child = Child::new(|| {
            assert_belongs_to_another(saving.wait());
            assert!(!saving.is_done());
        });
        assert_eq!(saving.wait().unwrap().ready, Ready::Prepared);
        assert_eq!(child.end(), 0);
        assert_eq!(checkpoints.steps().unwrap(), [2]);
    });
}

#[test]
fn a_publisher_is_the_processs_that_opened_it() {
    alone("a_publisher_is_the_processs_that_opened_it", |dir| {
        let place = dir.join("p");
        let bytes = vec![1; LEN];
        let mut value = Some(Publisher::open(&place).unwrap());
        value.as_mut().unwrap().publish([("w", bytes_tensor(&bytes))]).unwrap();
        let before = listing(&place);
        forked(|| {
            let mut publisher = value.take().unwrap();
            assert_belongs_to_another(publisher.publish([("w", bytes_tensor(&bytes))]));
            assert_belongs_to_another(publisher.publish_differing([("w", bytes_tensor(&bytes))]));
            assert_belongs_to_another(publisher.remove());
            assert_eq!(Publisher::open(&place).unwrap_err().kind().name(), "Busy");
        });
        assert_eq!(listing(&place), before);
        let mut publisher = value.unwrap();
        assert_eq!(publisher.publish([("w", bytes_tensor(&bytes))]).unwrap(), 2);
        publisher.remove().unwrap();
    });
}

#[test]
fn memory_that_is_being_filled_is_not_a_childs_and_sealed_memory_is() {
    alone("memory_that_is_being_filled_is_not_a_childs_and_sealed_memory_is", |dir| {
        let model = Model::read("models/digits.safetensors").unwrap();
        let whole = std::fs::read("models/digits.safetensors").unwrap();
        let mut memfd = Memfd::create("weights", whole.len()).unwrap();
        memfd.as_bytes_mut().copy_from_slice(&whole);
        let mut value = Some(memfd);
        forked(|| {
            assert_eq!(of_files(dir).0, Vec::<String>::new());
            assert_belongs_to_another(value.take().unwrap().seal());
        });
        // Sealing does not wait for a child that lives.
        let _child = Child::new(|| {
            loop {
                std::thread::park();
            }
        });
        let sealed = value.unwrap().seal().unwrap();
        forked(|| {
            let opened = maptensors::OpenOptions::new().over(&sealed).unwrap();
            let same = |name: &str| {
                opened.tensor(name).unwrap().as_bytes() == model.tensor(name).unwrap().as_bytes()
            };
            assert!(model.names().all(same));
        });
    });
}

#[test]
fn a_header_is_edited_by_a_child_as_by_anybody() {
    alone("a_header_is_edited_by_a_child_as_by_anybody", |dir| {
        let path = dir.join("model.safetensors");
        Model::read("models/digits.safetensors").unwrap().save(&path).unwrap();
        let edit = HeaderEdit::new().metadata("step", "1").metadata("long", "x".repeat(5000));
        forked(|| assert_eq!(edit.apply(&path).unwrap(), maptensors::Edited::Rewritten));
        assert_eq!(Model::read(&path).unwrap().metadata()["step"], "1");
        assert_eq!(listing(dir), ["model.safetensors"]);
    });
}
