//! Pages of a copy-on-write model are made writable when somebody takes them to write, and no others.
#![allow(unsafe_code)]

use crate::common::{self, smaps};
use maptensors::{
    DType, Draft, DraftOptions, Error, Layout, Model, ModelMut, OpenOptions, StreamOptions, save_diff,
};
use std::ops::Range;
use std::path::{Path, PathBuf};

const PAGE: usize = 4096;

/// Tensors `t0`, `t1`, … of these numbers of pages, every byte 1.
fn made(dir: &Path, pages: &[usize]) -> PathBuf {
    let path = dir.join("model.safetensors");
    let mut layout = Layout::builder();
    for (i, pages) in pages.iter().enumerate() {
        layout = layout.tensor(format!("t{i}"), DType::U8, &[pages * PAGE]);
    }
    let mut draft = Draft::create(&path, &layout.build().unwrap()).unwrap();
    draft.tensors_mut().unwrap().for_each(|mut tensor| tensor.as_bytes_mut().fill(1));
    draft.commit().unwrap();
    path
}

fn open_mut(path: &Path) -> ModelMut {
    // SAFETY: a file of the test's own, not written any more.
    unsafe { ModelMut::open(path) }.unwrap()
}

/// The bytes of the file that this process maps writable, in order.
fn writable(path: &Path) -> Vec<Range<u64>> {
    let path = path.canonicalize().unwrap();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for region in smaps::regions() {
        if Path::new(&region.path) == path && region.perms.starts_with("rw") {
            runs.push(region.offset..region.offset + (region.end - region.start) as u64);
        }
    }
    runs
}

#[test]
fn only_what_is_taken_to_write_is_made_writable() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path(), &[4, 3, 5, 20]);
    let mut model = open_mut(&path);
    assert_eq!(writable(&path), []);
    let bytes = |model: &ModelMut, name: &str| {
        let info = model.tensor(name).unwrap().info();
        info.offset()..info.offset() + info.nbytes()
    };
    let (t1, t2) = (bytes(&model, "t1"), bytes(&model, "t2"));
    model.tensor_mut("t1").unwrap();
    assert_eq!(writable(&path), std::slice::from_ref(&t1));
    model.tensor_mut("t1").unwrap().as_bytes_mut().fill(9);
    model.tensor_mut("t2").unwrap().as_bytes_mut()[0] = 9;
    let both = t1.start..t2.end;
    assert_eq!(writable(&path), std::slice::from_ref(&both), "neighbours are one run");
    assert_eq!(model.changed().unwrap().iter().map(|change| &*change.name).collect::<Vec<_>>(), ["t1", "t2"]);
    assert!(std::fs::read(&path).unwrap().iter().rev().take(32 * PAGE).all(|&byte| byte == 1));
}

#[test]
fn reading_comparing_hashing_saving_streaming_and_evicting_make_nothing_writable() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path(), &[4, 3, 5, 600]);
    let mut model = open_mut(&path);
    assert_eq!(
        model
            .tensors()
            .map(|tensor| tensor.as_bytes().iter().map(|&b| u64::from(b)).sum::<u64>())
            .sum::<u64>(),
        612 * PAGE as u64
    );
    assert!(model.changed().unwrap().is_empty());
    model.mark().unwrap();
    model
        .stream(StreamOptions::new())
        .unwrap()
        .for_each(|tensor| assert_eq!(tensor.unwrap().as_bytes()[0], 1));
    model
        .lock(..)
        .map_or_else(|error| assert!(matches!(error, Error::Limit { .. })), |()| model.unlock(..).unwrap());
    model.evict(..).unwrap();
    model.save(dir.path().join("copy.safetensors")).unwrap();
    // SAFETY: files of the test's own, not written any more.
    let base = unsafe { Model::open(&path) }.unwrap();
    save_diff(&base, &model, dir.path().join("delta.safetensors")).unwrap();
    assert_eq!(writable(&path), []);
}

#[test]
fn applying_a_delta_makes_only_what_it_changes_writable() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path(), &[4, 3, 5, 20]);
    let mut tuned = open_mut(&path);
    tuned.tensor_mut("t1").unwrap().as_bytes_mut()[7] = 3;
    let delta = dir.path().join("delta");
    maptensors::save_delta(&tuned, &delta).unwrap();
    let expected = writable(&path);
    drop(tuned);
    // SAFETY: as above.
    let again = maptensors::apply_delta(open_mut(&path), &[unsafe { Model::open(&delta) }.unwrap()]).unwrap();
    assert_eq!(again.tensor("t1").unwrap().as_bytes()[7], 3);
    assert_eq!(writable(&path), expected);
}

#[test]
fn more_scattered_tensors_than_the_kernel_allows_maps_can_be_taken_one_by_one() {
    const TENSORS: usize = 80_000;
    const TEST: &str = "more_scattered_tensors_than_the_kernel_allows_maps_can_be_taken_one_by_one";
    let Some(dir) = common::role("alone") else {
        // Of a process that is near the limit, other tests could map nothing.
        let dir = tempfile::tempdir().unwrap();
        return common::pass(common::child(TEST, "alone", dir.path()));
    };
    let path = dir.join("model.safetensors");
    let mut layout = Layout::builder();
    for i in 0..TENSORS {
        layout = layout.tensor(format!("{i:05}"), DType::U8, &[PAGE]);
    }
    DraftOptions::new().durable(false).create(&path, &layout.build().unwrap()).unwrap().commit().unwrap();
    let mut model = open_mut(&path);
    // Every other one: 80,000 maps, where the kernel's default is 65,530.
    for i in (0..TENSORS).step_by(2) {
        model.tensor_mut(&format!("{i:05}")).unwrap();
    }
    model.tensor_mut("00100").unwrap().as_bytes_mut()[5] = 1;
    model.tensor_mut("79998").unwrap().as_bytes_mut()[5] = 1;
    assert_eq!(model.changed().unwrap().len(), 2);
}

#[test]
fn a_model_larger_than_what_may_be_written_opens_and_says_what_cannot_be_taken() {
    const TEST: &str = "a_model_larger_than_what_may_be_written_opens_and_says_what_cannot_be_taken";
    if let Some(dir) = common::role("limited") {
        let path = dir.join("model.safetensors");
        // The kernel counts private writable memory against RLIMIT_DATA, as it does against its promises where
        // vm.overcommit_memory is 2.
        let limit = rustix::process::Rlimit { current: Some(256 << 20), maximum: Some(256 << 20) };
        rustix::process::setrlimit(rustix::process::Resource::Data, limit).unwrap();
        let mut model = open_mut(&path);
        let error = model.tensor_mut("large").unwrap_err();
        let text = error.to_string();
        assert!(matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(12)), "{error:?}");
        for part in ["model.safetensors", "tensor \"large\"", "1073741824 bytes", "RLIMIT_DATA", "mode \"r\""]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(model.tensors_mut().is_err());
        model.tensor_mut("small").unwrap().as_bytes_mut()[0] = 5;
        assert_eq!(model.tensor("small").unwrap().as_bytes()[0], 5);
        assert_eq!(model.tensor("large").unwrap().as_bytes()[1 << 29], 0);
        // All of it promised at once is what the old way asked for.
        // SAFETY: as above.
        assert!(unsafe { OpenOptions::new().reserve_swap(true).open_mut(&path) }.is_err());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let layout = Layout::builder().tensor("large", DType::U8, &[1 << 30]).tensor("small", DType::U8, &[PAGE]);
    let (file, header) = (std::fs::File::create(&path).unwrap(), {
        // A sparse file: nothing of it is allocated.
        let layout = layout.build().unwrap();
        let entry = |name: &str, begin: usize, end: usize| {
            format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
        };
        let large = 1 << 30;
        assert_eq!(layout.data_len(), (large + PAGE) as u64);
        format!("{{{},{}}}", entry("large", 0, large), entry("small", large, large + PAGE))
    });
    let start = common::file_of(&header, 0);
    std::os::unix::fs::FileExt::write_all_at(&file, &start, 0).unwrap();
    file.set_len((start.len() + (1 << 30) + PAGE) as u64).unwrap();
    common::pass(common::child(TEST, "limited", dir.path()));
}

#[test]
fn a_layout_that_was_cloned_is_plain_data_whatever_becomes_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let name = |i: usize| format!("{i:05}{}", "x".repeat(100));
    let mut layout = Layout::builder();
    for i in 0..4000 {
        layout = layout.tensor(name(i), DType::U8, &[1]);
    }
    Draft::create(&path, &layout.build().unwrap()).unwrap().commit().unwrap();
    // SAFETY: nobody writes to the file while it is mapped.
    let model = unsafe { Model::open(&path) }.unwrap();
    assert!(model.layout(0).unwrap().data_start() > 256 << 10, "a header that is read where it lies");
    let layout = model.layout(0).unwrap().clone();
    drop(model);
    // The contract ended with the model.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(layout.at(3999).unwrap().name(), name(3999));
    assert_eq!(layout.position(&name(17)), Some(17));
}
