//! Opening touches no data, views are pointers into the mapping, and copy-on-write copies what is
//! written and nothing else.
#![allow(unsafe_code)]

use maptensors::{
    Backing, Content, DType, Draft, Layout, Model, ModelMut, OpenOptions, Residency, TensorView,
};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::common::{self, disk_dir, file_of, sha256_of};

const MIB: usize = 1 << 20;

fn open(path: impl AsRef<Path>) -> Model {
    // SAFETY: every test has its files to itself, in a directory of its own, and writes to none that is
    // mapped; it renames over them and unlinks them.
    unsafe { Model::open(path) }.unwrap()
}

fn open_mut(path: impl AsRef<Path>) -> ModelMut {
    // SAFETY: as above.
    unsafe { ModelMut::open(path) }.unwrap()
}

/// `count` tensors of `len` bytes each, all filled with noise.
fn model_file(dir: &Path, count: usize, len: usize) -> PathBuf {
    let path = dir.join("model.safetensors");
    let layout = (0..count)
        .fold(Layout::builder(), |builder, i| builder.tensor(format!("t{i}"), DType::F32, &[len / 4]))
        .build()
        .unwrap();
    let mut draft = Draft::create(&path, &layout).unwrap();
    for (seed, mut tensor) in (0..).zip(draft.tensors_mut().unwrap()) {
        tensor.as_bytes_mut().copy_from_slice(&common::noise(seed, len));
    }
    draft.commit().unwrap();
    path
}

fn bytes_of(model: &Model, tensor: &str) -> Range<usize> {
    let range = model.tensor(tensor).unwrap().info().range();
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

fn pages_of(model: &Model, tensor: &str) -> Residency {
    model.mapping(0).unwrap().residency(bytes_of(model, tensor)).unwrap()
}

fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn opening_and_viewing_touch_no_data_page() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 4, 4 * MIB);
    let look = |model: &Model, what: &str| {
        let pages = model.residency().unwrap();
        assert_eq!((pages.touched, pages.private), (0, 0), "{what}");
        assert_eq!(pages.pages, 16 * MIB / pages.page_size);
        let elements: usize = model.tensors().map(|t| t.as_slice::<f32>().unwrap().len()).sum();
        assert_eq!(elements, 4 * MIB);
        assert!(model.get("t2").unwrap().is_some_and(|t| t.is_aligned()));
        assert_eq!(model.residency().unwrap().touched, 0, "{what}: looking up and viewing");
        // Not zero for want of counting.
        std::hint::black_box(model.tensor("t3").unwrap().as_bytes()[0]);
        assert!(pages_of(model, "t3").touched > 0 && pages_of(model, "t0").touched == 0, "{what}");
    };
    look(&open(&path), "in the page cache");
    look(&open_mut(&path), "in the page cache, copy-on-write");
    evict(&path);
    look(&open(&path), "evicted");
    evict(&path);
    look(&open_mut(&path), "evicted, copy-on-write");
}

#[test]
fn opening_an_evicted_file_reads_no_data_from_the_disk() {
    let dir = disk_dir();
    if common::on_tmpfs(dir.path()) {
        return common::skip(
            "opening_an_evicted_file_reads_no_data_from_the_disk",
            "the build is on a tmpfs",
        );
    }
    let path = model_file(dir.path(), 4, 16 * MIB);
    // The header's own read-ahead may bring the first tensor's pages in; the last are far from it.
    let far = |model: &Model| (pages_of(model, "t2").resident, pages_of(model, "t3").resident);
    // Eviction is a request: pages on another core's queues stay. Were opening to read them in, no
    // attempt would succeed.
    let cold = (0..50).map(|_| {
        evict(&path);
        open(&path)
    });
    let model = cold.into_iter().find(|model| far(model) == (0, 0)).expect("open reads data");
    std::hint::black_box(model.tensor("t3").unwrap().as_bytes()[8 * MIB]);
    assert!(far(&model).1 > 0 && far(&model).0 == 0);
}

#[test]
fn a_sparse_file_of_1_tib_opens_and_gives_views() {
    const TIB: usize = 1 << 40;
    let dir = disk_dir();
    let path = dir.path().join("sparse.safetensors");
    let header = format!(
        r#"{{"big":{{"dtype":"U8","shape":[{TIB}],"data_offsets":[0,{TIB}]}},"last":{{"dtype":"F32","shape":[2],"data_offsets":[{TIB},{}]}}}}"#,
        TIB + 8
    );
    let header = format!("{header:<248}");
    std::fs::write(&path, file_of(&header, 0)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len((8 + header.len() + TIB + 8) as u64).unwrap();
    let look = |model: &Model| {
        assert_eq!(model.tensor("big").unwrap().as_bytes().len(), TIB);
        assert_eq!(pages_of(model, "last").touched, 0);
        assert_eq!(model.tensor("last").unwrap().as_slice::<f32>().unwrap(), [0.0, 0.0]);
        let huge_page = 2 * MIB / rustix::param::page_size();
        let tail = model.mapping(0).unwrap().residency(TIB - 64 * MIB..TIB).unwrap();
        assert!(tail.touched <= huge_page, "one fault maps at most a huge page: {tail:?}");
    };
    look(&open(&path));
    let mut edited = open_mut(&path);
    look(&edited);
    edited.tensor_mut("big").unwrap().as_bytes_mut()[TIB / 2] = 9;
    let middle = edited.mapping(0).unwrap().residency(TIB / 2 - MIB..TIB / 2 + MIB).unwrap();
    assert_eq!(middle.private, 1, "of a terabyte, one page was copied");
}

/// Whether every view of `model` is a pointer into its mapping, at the tensor's place in the file.
fn all_views_are_in_place(model: &Model) -> bool {
    let memory = model.mapping(0).unwrap().as_bytes();
    model.tensors().all(|view: TensorView<'_>| {
        let bytes = bytes_of(model, view.name());
        view.as_slice::<f32>().unwrap().as_ptr().cast() == memory[bytes.clone()].as_ptr()
            && view.as_bytes().as_ptr_range() == memory[bytes].as_ptr_range()
            && memory.as_ptr_range().contains(&view.as_bytes().as_ptr())
    })
}

#[test]
fn views_are_pointers_into_the_mapping() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 9, 5000);
    assert!(all_views_are_in_place(&open(&path)));
    assert!(all_views_are_in_place(&Model::read(&path).unwrap()));
    assert!(all_views_are_in_place(&Model::read(Content::new(&std::fs::read(&path).unwrap())).unwrap()));
    let mut model = open_mut(&path);
    assert!(all_views_are_in_place(&model));
    let memory = model.mapping(0).unwrap().as_bytes().as_ptr_range();
    for mut tensor in model.tensors_mut().unwrap() {
        assert!(memory.contains(&tensor.as_mut_slice::<f32>().unwrap().as_ptr().cast()));
    }
}

#[test]
fn an_edit_copies_the_pages_it_writes_and_never_reaches_the_file() {
    const EDITED: [&str; 4] = ["t3", "t17", "t18", "t60"];
    let dir = disk_dir();
    let path = model_file(dir.path(), 64, 3 * 4096);
    let before = sha256_of(&path);
    let reader = open(&path);
    let mut model = open_mut(&path);
    assert_eq!(model.mapping(0).unwrap().backing(), Backing::CopyOnWrite);
    let read: u64 = model.tensors().map(|t| u64::from(t.as_bytes()[0])).sum();
    assert!(read > 0);
    assert_eq!(model.residency().unwrap().private, 0, "reading copies nothing");

    for name in EDITED {
        assert_eq!(model.tensor(name).unwrap().info().alignment(), 4096, "a page belongs to one tensor");
        let mut tensor = model.tensor_mut(name).unwrap();
        let values = tensor.as_mut_slice::<f32>().unwrap();
        (values[1024], values[1025]) = (-1.0, -2.0); // the second of three pages
    }
    assert_eq!(model.residency().unwrap().private, EDITED.len());
    for name in model.names().map(str::to_owned).collect::<Vec<_>>() {
        let edited = EDITED.contains(&name.as_str());
        assert_eq!(pages_of(&model, &name).private, usize::from(edited), "{name}");
        let (mine, theirs) = (model.tensor(&name).unwrap(), reader.tensor(&name).unwrap());
        let differ = mine.as_bytes() != theirs.as_bytes();
        assert_eq!(differ, edited, "{name}");
        assert_eq!(&mine.as_bytes()[..4096], &theirs.as_bytes()[..4096]);
        assert_eq!(&mine.as_bytes()[8192..], &theirs.as_bytes()[8192..]);
    }
    assert_eq!(sha256_of(&path), before);
    drop(model);
    assert_eq!(sha256_of(&path), before);
    assert_eq!(open_mut(&path).residency().unwrap().private, 0, "edits end with their model");
}

#[test]
fn reading_everything_in_ahead_copies_nothing() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 3, MIB + 4096);
    let options = OpenOptions::new().populate(true);
    let is_there = common::soon(|| {
        // SAFETY: as in `open`.
        let model = unsafe { options.open_mut(&path) }.unwrap();
        let pages = model.residency().unwrap();
        assert_eq!(pages.private, 0);
        pages.touched == pages.pages
    });
    assert!(is_there);
}

#[test]
fn a_save_writes_the_edits_and_the_source_stays() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 5, 10_000);
    let before = sha256_of(&path);
    let mut model = open_mut(&path);
    model.tensor_mut("t2").unwrap().as_mut_slice::<f32>().unwrap()[7] = 0.5;
    let out = dir.path().join("tuned.safetensors");
    model.save(&out).unwrap();
    let (saved, original) = (Model::read(&out).unwrap(), Model::read(&path).unwrap());
    for view in saved.tensors() {
        assert_eq!(view.as_bytes(), model.tensor(view.name()).unwrap().as_bytes());
        let same = view.as_bytes() == original.tensor(view.name()).unwrap().as_bytes();
        assert_eq!(same, view.name() != "t2");
    }
    assert_eq!(saved.tensor("t2").unwrap().as_slice::<f32>().unwrap()[7].to_bits(), 0.5f32.to_bits());
    assert_eq!(sha256_of(&path), before);
}

#[test]
fn saving_over_the_mapped_source_is_exact() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 5, 3 * MIB);
    let model = open(&path);
    let before = sha256_of(&path);
    model.save(&path).unwrap();
    assert_eq!(sha256_of(&path), before, "nothing edited: the same bytes");

    let mut edited = open_mut(&path);
    for mut tensor in edited.tensors_mut().unwrap() {
        let len = tensor.as_bytes_mut().len();
        tensor.as_bytes_mut()[len / 2..].fill(0x3f);
    }
    edited.save(&path).unwrap();
    let saved = Model::read(&path).unwrap();
    for view in saved.tensors() {
        assert!(view.as_bytes() == edited.tensor(view.name()).unwrap().as_bytes(), "{}", view.name());
        assert!(view.as_bytes() != model.tensor(view.name()).unwrap().as_bytes());
    }
    assert_eq!(
        common::sha256(model.mapping(0).unwrap().as_bytes()),
        before,
        "the old map shows the old file"
    );
    assert_eq!(common::listing(dir.path()), ["model.safetensors"]);
}

#[test]
fn renaming_over_and_unlinking_leave_views_as_they_were() {
    let dir = disk_dir();
    let path = model_file(dir.path(), 4, 2 * MIB);
    let before = sha256_of(&path);
    let (model, edited) = (open(&path), open_mut(&path));
    let view = model.tensor("t3").unwrap();
    let other = dir.path().join("other");
    std::fs::write(&other, b"short").unwrap();
    std::fs::rename(&other, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // Pages not yet touched come from the old inode too.
    assert_eq!(view.as_bytes(), common::noise(3, 2 * MIB));
    assert_eq!(common::sha256(model.mapping(0).unwrap().as_bytes()), before);
    assert_eq!(common::sha256(edited.mapping(0).unwrap().as_bytes()), before);
}

#[test]
fn a_slice_in_one_piece_is_a_pointer_too() {
    let dir = disk_dir();
    let path = dir.path().join("m.safetensors");
    let layout = Layout::builder().tensor("w", DType::U16, &[64, 32]).build().unwrap();
    Draft::create(&path, &layout).unwrap().commit().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[5; 64], layout_start(&path) + 3 * 64).unwrap();
    let model = open(&path);
    let rows = model.tensor("w").unwrap().slice(&[maptensors::Index::from(3..5)]).unwrap();
    let bytes = rows.as_bytes().expect("contiguous");
    assert!(model.mapping(0).unwrap().as_bytes().as_ptr_range().contains(&bytes.as_ptr()));
    assert_eq!((bytes[0], bytes[63], bytes[64]), (5, 5, 0));
}

fn layout_start(path: &Path) -> u64 {
    Model::read(path).unwrap().layout(0).unwrap().data_start()
}
