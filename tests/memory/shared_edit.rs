//! Models edited in their files: what is written reaches the file, for everyone, and nothing else does.
#![allow(unsafe_code)]
// Values come back bit by bit; tensors have short names.
#![allow(clippy::float_cmp, clippy::many_single_char_names)]

use crate::common::{self, disk_dir, noise, smaps};
use maptensors::{
    DType, Draft, Error, F8E4M3, Layout, MapOptions, Model, ModelShared, OpenOptions, TensorShared, bf16,
};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const LEN: usize = 3 << 20;

fn open(path: impl AsRef<Path>) -> ModelShared {
    // SAFETY: a file of the test's own, which nobody truncates.
    unsafe { ModelShared::open(path) }.unwrap()
}

fn model_in(dir: &Path) -> PathBuf {
    let path = dir.join("model.safetensors");
    let layout = Layout::builder()
        .tensor("a", DType::F32, &[LEN / 4])
        .tensor("b", DType::BF16, &[1000])
        .tensor("c", DType::Bool, &[7])
        .tensor("d", DType::F8E4M3, &[5])
        .tensor("e", DType::I64, &[])
        .tensor("none", DType::F64, &[0])
        .metadata("kind", "test")
        .build()
        .unwrap();
    let mut draft = Draft::create(&path, &layout).unwrap();
    for name in ["a", "b", "c", "d", "e", "none"] {
        let mut tensor = draft.tensor_mut(name).unwrap();
        let bytes = tensor.as_bytes_mut();
        bytes.copy_from_slice(&noise(1, bytes.len()));
        if bytes.len() == 7 {
            bytes.fill(0);
        }
    }
    draft.commit().unwrap();
    path
}

#[test]
fn elements_of_every_width_are_written_to_the_file_and_nothing_around_them() {
    let dir = disk_dir();
    let path = model_in(dir.path());
    let mut expected = std::fs::read(&path).unwrap();
    let model = open(&path);
    let header = usize::try_from(model.tensor("a").unwrap().info().offset()).unwrap();
    let put = |expected: &mut [u8], tensor: TensorShared<'_>, at: usize, bytes: &[u8]| {
        let start = usize::try_from(tensor.info().offset()).unwrap() + at;
        expected[start..start + bytes.len()].copy_from_slice(bytes);
    };
    let [a, b, c, d, e] = ["a", "b", "c", "d", "e"].map(|name| model.tensor(name).unwrap());
    a.store(1, 1.5_f32).unwrap();
    put(&mut expected, a, 4, &1.5_f32.to_le_bytes());
    b.store(999, bf16::from_f32(2.0)).unwrap();
    put(&mut expected, b, 1998, &bf16::from_f32(2.0).to_le_bytes());
    c.store(3, true).unwrap();
    put(&mut expected, c, 3, &[1]);
    d.store(4, F8E4M3(0x3c)).unwrap();
    put(&mut expected, d, 4, &[0x3c]);
    e.store(0, -1_i64).unwrap();
    put(&mut expected, e, 0, &[0xff; 8]);
    // With no msync(2) at all: there is one cache for mappings and read(2).
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_eq!(a.load::<f32>(1).unwrap(), 1.5);
    assert_eq!(b.load::<bf16>(999).unwrap().to_f32(), 2.0);
    assert!(c.load::<bool>(3).unwrap() && !c.load::<bool>(2).unwrap());
    assert_eq!(e.load::<i64>(0).unwrap(), -1);
    assert!(expected[..header] == std::fs::read(&path).unwrap()[..header]);
    // Whole tensors, odd ones too.
    let values: Vec<f32> = (0..LEN / 4).map(|i| f32::from(u16::try_from(i % 50_000).unwrap())).collect();
    a.copy_from(&values).unwrap();
    put(&mut expected, a, 0, bytemuck::cast_slice(&values));
    c.copy_from(&[true; 7]).unwrap();
    put(&mut expected, c, 0, &[1; 7]);
    d.fill(F8E4M3(0x11)).unwrap();
    put(&mut expected, d, 0, &[0x11; 5]);
    b.copy_bytes_from(&noise(8, 2000)).unwrap();
    put(&mut expected, b, 0, &noise(8, 2000));
    assert!(std::fs::read(&path).unwrap() == expected);
    let mut back = vec![0.0; LEN / 4];
    a.copy_to(&mut back).unwrap();
    assert!(back == values && a.to_vec::<f32>().unwrap() == values);
    let mut flags = [false; 7];
    c.copy_to(&mut flags).unwrap();
    assert_eq!(flags, [true; 7]);
    let none = model.tensor("none").unwrap();
    none.fill(1.0).unwrap();
    none.copy_to::<f64>(&mut []).unwrap();
    assert!(none.load::<f64>(0).is_err());
    a.fill(0.25_f32).unwrap();
    let read = Model::read(&path).unwrap();
    assert!(read.tensor("a").unwrap().as_slice::<f32>().unwrap().iter().all(|&w| w == 0.25));
}

#[test]
fn what_does_not_fit_is_refused_and_writes_nothing() {
    let dir = disk_dir();
    let path = model_in(dir.path());
    let before = std::fs::read(&path).unwrap();
    let model = open(&path);
    let [a, c] = ["a", "c"].map(|name| model.tensor(name).unwrap());
    assert!(matches!(a.store(0, 1.0_f64), Err(Error::DType { .. })));
    assert!(matches!(a.load::<bf16>(0), Err(Error::DType { .. })));
    assert!(matches!(a.store(LEN / 4, 1.0_f32), Err(Error::Argument(_))));
    assert!(matches!(a.load::<f32>(usize::MAX), Err(Error::Argument(_))));
    assert!(matches!(a.copy_from(&[1.0_f32]), Err(Error::Shape { found: 4, .. })));
    assert!(matches!(a.copy_to(&mut [1.0_f32; 2]), Err(Error::Shape { found: 8, .. })));
    assert!(matches!(a.copy_bytes_from(&[1]), Err(Error::Shape { found: 1, .. })));
    assert!(matches!(a.fill(1_u8), Err(Error::DType { .. })));
    assert!(matches!(model.tensor("aa"), Err(Error::Missing { .. })));
    assert!(matches!(model.flush("aa"), Err(Error::Missing { .. })));
    let memory = model.memory(0).unwrap();
    assert!(memory.write_at(memory.len(), &[1]).is_err() && memory.write_at(usize::MAX, &[1]).is_err());
    assert!(memory.read_at(memory.len() - 1, &mut [0; 2]).is_err());
    assert!(std::fs::read(&path).unwrap() == before);
    c.copy_bytes_from(&[0, 1, 0, 2, 0, 0, 0]).unwrap();
    assert!(matches!(c.load::<bool>(3), Err(Error::Value { .. })));
    assert!(matches!(c.to_vec::<bool>(), Err(Error::Value { .. })));
    assert!(matches!(c.copy_to(&mut [false; 7]), Err(Error::Value { .. })));
    assert!(c.load::<bool>(1).unwrap());
}

#[test]
fn writes_are_seen_by_every_mapping_of_the_file_and_by_the_writer_of_others() {
    let dir = disk_dir();
    let path = model_in(dir.path());
    let (one, two) = (open(&path), open(&path));
    one.tensor("a").unwrap().store(7, 42.0_f32).unwrap();
    assert_eq!(two.tensor("a").unwrap().load::<f32>(7).unwrap(), 42.0);
    // And what is written to the file otherwise is seen here: no MS_INVALIDATE.
    let file = File::options().write(true).open(&path).unwrap();
    let at = one.tensor("a").unwrap().info().offset();
    file.write_all_at(&43.0_f32.to_le_bytes(), at).unwrap();
    assert_eq!(one.tensor("a").unwrap().load::<f32>(0).unwrap(), 43.0);
    // No page is anyone's own.
    assert_eq!(one.residency().unwrap().private, 0);
}

#[test]
fn waiting_for_a_flush_leaves_no_dirty_page_and_scheduling_one_does_nothing_yet() {
    let dir = disk_dir();
    if common::on_tmpfs(dir.path()) {
        return common::skip(
            "waiting_for_a_flush_leaves_no_dirty_page_and_scheduling_one_does_nothing_yet",
            "on tmpfs, where pages are never written to a disk",
        );
    }
    let path = model_in(dir.path());
    File::open(&path).unwrap().sync_all().unwrap();
    // Small pages, so that a page is not dirty for its neighbours' sake.
    // SAFETY: nobody truncates the file.
    let model = unsafe { OpenOptions::new().huge_pages(false).open_shared(&path) }.unwrap();
    let dirty = || {
        let regions = smaps::regions().into_iter().filter(|region| Path::new(&region.path) == path);
        regions.map(|region| region.size("Private_Dirty") + region.size("Shared_Dirty")).sum::<usize>()
    };
    assert_eq!(dirty(), 0);
    model.tensor("a").unwrap().store(5, 1.0_f32).unwrap();
    let written = dirty();
    assert!(written > 0);
    model.flush_async("a").unwrap();
    model.flush_all_async().unwrap();
    assert_eq!(dirty(), written);
    model.flush("a").unwrap();
    assert_eq!(dirty(), 0);
    model.tensor("b").unwrap().fill(bf16::ONE).unwrap();
    model.tensor("e").unwrap().store(0, 1_i64).unwrap();
    assert!(dirty() > 0);
    model.flush_all().unwrap();
    assert_eq!(dirty(), 0);
}

#[test]
fn a_sharded_set_is_edited_in_all_its_files() {
    let dir = disk_dir();
    for entry in std::fs::read_dir("models/digits-sharded").unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let model = open(dir.path());
    assert!(model.shards() > 1);
    for tensor in model.tensors() {
        tensor.fill(0.5_f32).unwrap();
    }
    model.flush_all().unwrap();
    for tensor in Model::read(dir.path()).unwrap().tensors() {
        assert!(tensor.as_slice::<f32>().unwrap().iter().all(|&w| w == 0.5));
    }
}

#[test]
fn a_file_that_may_not_be_written_is_not_opened() {
    const TEST: &str = "a_file_that_may_not_be_written_is_not_opened";
    if let Some(dir) = common::role("refused") {
        // SAFETY: as in `open`.
        let error = unsafe { ModelShared::open(dir.join("model.safetensors")) }.unwrap_err();
        let Error::Io { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = model_in(dir.path());
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let (command, _home) = common::unprivileged_child(TEST, "refused", dir.path());
    common::pass(command);
    // SAFETY: as above.
    let error = unsafe { ModelShared::open(dir.path().join("nothing.safetensors")) }.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    let fifo = dir.path().join("fifo.safetensors");
    common::fifo(&fifo);
    // SAFETY: as above.
    let error = unsafe { ModelShared::open(&fifo) }.unwrap_err();
    assert!(matches!(error, Error::NotRegular { .. }), "{error:?}");
}

#[test]
fn a_misaligned_tensor_is_edited_like_any_other() {
    let dir = disk_dir();
    let path = dir.path().join("odd.safetensors");
    let header = r#"{"o":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[3],"data_offsets":[1,13]}}"#;
    std::fs::write(&path, common::file_of(header, 13)).unwrap();
    let model = open(&path);
    let tensor = model.tensor("w").unwrap();
    tensor.copy_from(&[1.0_f32, 2.0, 3.0]).unwrap();
    tensor.store(1, 5.0_f32).unwrap();
    assert_eq!(tensor.to_vec::<f32>().unwrap(), [1.0, 5.0, 3.0]);
    assert_eq!(tensor.load::<f32>(2).unwrap(), 3.0);
    let read = Model::read(&path).unwrap();
    assert_eq!(read.tensor("w").unwrap().to_vec::<f32>().unwrap(), [1.0, 5.0, 3.0]);
    assert_eq!(read.tensor("o").unwrap().as_bytes(), [1]);
}

#[test]
fn a_window_is_edited_where_it_lies() {
    let dir = disk_dir();
    let inner = std::fs::read(model_in(dir.path())).unwrap();
    let path = dir.path().join("archive");
    std::fs::write(&path, [&[7; 1027], &inner[..], &[8; 99]].concat()).unwrap();
    let options = OpenOptions::new().window(1027..1027 + inner.len() as u64);
    // SAFETY: nobody truncates the file.
    let model = unsafe { options.open_shared(&path) }.unwrap();
    model.tensor("e").unwrap().store(0, 77_i64).unwrap();
    model.flush("e").unwrap();
    let read = options.read(&path).unwrap();
    assert_eq!(read.tensor("e").unwrap().to_vec::<i64>().unwrap(), [77]);
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes[..1027] == [7; 1027] && bytes[1027 + inner.len()..] == [8; 99]);
}

#[test]
fn two_threads_write_to_one_word_and_neither_loses() {
    let dir = disk_dir();
    let path = model_in(dir.path());
    let model = open(&path);
    let tensor = model.tensor("b").unwrap();
    std::thread::scope(|scope| {
        for lane in 0..4 {
            scope.spawn(move || {
                for round in 0..20_000_u16 {
                    tensor.store(lane, bf16::from_bits(round)).unwrap();
                    assert_eq!(tensor.load::<bf16>(lane).unwrap().to_bits(), round);
                }
            });
        }
    });
}

#[test]
fn a_guarded_edit_minds_the_files_length_alone() {
    let dir = disk_dir();
    let path = model_in(dir.path());
    // SAFETY: truncated under a guard only, and not looked at afterwards.
    let model = unsafe { OpenOptions::new().guard(true).open_shared(&path) }.unwrap();
    model.tensor("a").unwrap().fill(1.0_f32).unwrap();
    model.flush_all().unwrap();
    model.tensor("a").unwrap();
    model.check().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(5000).unwrap();
    assert!(matches!(model.tensor("a"), Err(Error::Changed { found, .. }) if found == "5000"));
    assert!(model.check().is_err());
}

#[test]
fn memory_mapped_shared_by_hand_is_read_written_and_flushed() {
    let dir = disk_dir();
    let path = dir.path().join("raw");
    std::fs::write(&path, noise(1, 10_001)).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: nobody truncates the file.
    let memory = unsafe { MapOptions::new().window(3..10_000).populate(true).map_shared(&file) }.unwrap();
    assert_eq!((memory.len(), memory.is_empty()), (9997, false));
    memory.write_at(5, b"maptensors").unwrap();
    memory.flush(0..9997).unwrap();
    assert!(memory.flush(0..9998).is_err() && memory.flush_async(9998..9999).is_err());
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(&bytes[8..18], b"maptensors");
    let mut seen = [0; 12];
    memory.read_at(4, &mut seen).unwrap();
    assert_eq!(seen[..], bytes[7..19]);
    assert_eq!(memory.residency(0..9997).unwrap().touched, 3);
}
