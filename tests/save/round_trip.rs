//! What is written is read back bit for bit, here and by the reference crate, and what the reference
//! wrote is read here.
#![allow(unsafe_code)]

use crate::common;
use maptensors::{
    Complex32, Content, DType, Draft, Element, F4x2, F6E2M3x4, F6E3M2x4, F8E4M3, F8E4M3Fnuz, F8E5M2,
    F8E5M2Fnuz, F8E8M0, Index, Layout, Model, SaveOptions, TensorView, bf16, f16,
};
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn open(path: impl AsRef<Path>) -> Model {
    // SAFETY: nobody writes to the golden files, or to a test's own files while they are mapped.
    unsafe { Model::open(path) }.unwrap()
}

/// Noise, with the patterns that lossy handling would change up front; for BOOL only 0 and 1.
fn patterns(dtype: DType, len: usize) -> Vec<u8> {
    let mut bytes = common::noise(dtype.block().bytes as u64 * 31 + len as u64, len);
    if dtype == DType::Bool {
        for byte in &mut bytes {
            *byte &= 1;
        }
        return bytes;
    }
    let special: Vec<u8> = match dtype {
        // Signalling and quiet NaN with payloads, in both signs, and -0.0.
        DType::F64 => {
            [0x7ff0_0000_0000_0001u64, 0xfff8_dead_beef_0001, 1 << 63].map(u64::to_le_bytes).concat()
        }
        DType::F32 | DType::C64 => {
            [0x7f80_0001u32, 0xffc0_beef, 0x8000_0000, 0x7fa0_0000].map(u32::to_le_bytes).concat()
        }
        DType::F16 => [0x7c01u16, 0xfe42, 0x8000].map(u16::to_le_bytes).concat(),
        DType::BF16 => [0x7f81u16, 0xffc1, 0x8000].map(u16::to_le_bytes).concat(),
        _ => vec![0xff, 0x80, 0x7f, 0],
    };
    let n = special.len().min(len);
    bytes[..n].copy_from_slice(&special[..n]);
    bytes
}

/// One tensor of each dtype and some shapes: (name, dtype, shape, bytes).
fn zoo() -> Vec<(String, DType, Vec<usize>, Vec<u8>)> {
    let mut zoo = Vec::new();
    for &dtype in DType::ALL {
        for shape in [&[8usize][..], &[3, 4, 4], &[0, 5], &[64, 256]] {
            let len = dtype.nbytes(shape.iter().product()).unwrap();
            zoo.push((format!("{dtype}.{shape:?}"), dtype, shape.to_vec(), patterns(dtype, len)));
        }
        if let Some(len) = dtype.nbytes(1) {
            zoo.push((format!("{dtype}.scalar"), dtype, vec![], patterns(dtype, len)));
        }
    }
    zoo
}

type Zoo = [(String, DType, Vec<usize>, Vec<u8>)];

type Raw<'a> = (DType, &'a [usize], &'a [u8]);

fn views(zoo: &Zoo) -> Vec<(&str, Raw<'_>)> {
    zoo.iter().map(|(name, dtype, shape, bytes)| (name.as_str(), (*dtype, &shape[..], &bytes[..]))).collect()
}

fn assert_holds(model: &Model, zoo: &Zoo, how: &str) {
    assert_eq!(model.len(), zoo.len(), "{how}");
    for (name, dtype, shape, bytes) in zoo {
        let view = model.tensor(name).unwrap();
        assert_eq!((view.dtype(), view.shape()), (*dtype, &shape[..]), "{how}: {name}");
        assert!(view.as_bytes() == bytes, "{how}: {name}");
        assert!(*view.slice(&[]).unwrap().to_bytes() == bytes[..], "{how}: {name}, sliced");
        if let Some(&rows) = shape.first().filter(|&&rows| rows > 1) {
            let row = bytes.len() / rows;
            let packed = dtype.itemsize().is_none() && shape.len() == 1;
            let from = if packed { rows / 2 } else { 1 };
            let part = view.slice(&[Index::from(from..)]).unwrap();
            let expected = if packed { &bytes[bytes.len() / 2..] } else { &bytes[row..] };
            assert_eq!(*part.to_bytes(), *expected, "{how}: {name}, without its head");
        }
    }
}

#[test]
fn every_dtype_round_trips_bit_for_bit_by_every_way_in_and_out() {
    let (zoo, dir) = (zoo(), tempfile::tempdir().unwrap());
    let path = dir.path().join("zoo.safetensors");
    for mapped in [true, false] {
        SaveOptions::new().mapped(mapped).save(views(&zoo), &path).unwrap();
        assert_holds(&open(&path), &zoo, "mapped");
        assert_holds(&Model::read(&path).unwrap(), &zoo, "read");
        assert_holds(&Model::read(Content::new(&std::fs::read(&path).unwrap())).unwrap(), &zoo, "from bytes");
        std::fs::remove_file(&path).unwrap();
    }

    // Slices are saved as what they select.
    let source = open_saved(&zoo, &path);
    let halves = source.tensors().filter(|t| t.shape().len() == 3);
    let halves: Vec<_> =
        halves.map(|t| (t.name(), t.slice(&[Index::from(..), Index::At(1)]).unwrap())).collect();
    let sliced = dir.path().join("sliced.safetensors");
    maptensors::save(halves, &sliced).unwrap();
    for view in Model::read(&sliced).unwrap().tensors() {
        assert_eq!(view.shape(), [3, 4]);
        let whole = source.tensor(view.name()).unwrap().as_bytes();
        let row = whole.len() / 12;
        let expected: Vec<u8> =
            (0..3).flat_map(|i| whole[(i * 4 + 1) * row..(i * 4 + 2) * row].to_vec()).collect();
        assert_eq!(view.as_bytes(), expected, "{}", view.name());
    }

    let set = dir.path().join("set");
    std::fs::create_dir(&set).unwrap();
    SaveOptions::new().max_shard_size(100_000).save(views(&zoo), set.join("zoo.safetensors")).unwrap();
    assert!(open(&set).shards() > 3);
    assert_holds(&open(&set), &zoo, "sharded, mapped");
    assert_holds(&Model::read(&set).unwrap(), &zoo, "sharded, read");
    let merged = dir.path().join("merged.safetensors");
    open(&set).save(&merged).unwrap();
    assert_holds(&open(&merged), &zoo, "merged");
}

fn open_saved(zoo: &Zoo, path: &Path) -> Model {
    maptensors::save(views(zoo), path).unwrap();
    open(path)
}

#[test]
fn the_reference_reads_what_we_write() {
    let (zoo, dir) = (zoo(), tempfile::tempdir().unwrap());
    let path = dir.path().join("zoo.safetensors");
    let options = SaveOptions::new().metadata("format", "pt").metadata("", "\n\0é").metadata("k", "");
    options.save(views(&zoo), &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), zoo.len());
    for (name, dtype, shape, data) in &zoo {
        let view = theirs.tensor(name).unwrap();
        assert_eq!((&*view.dtype().to_string(), view.shape()), (dtype.name(), &shape[..]), "{name}");
        assert!(view.data() == data, "{name}");
    }
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let expected = HashMap::from([("format", "pt"), ("", "\n\0é"), ("k", "")]);
    let expected: HashMap<_, _> = expected.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    assert_eq!(header.metadata(), &Some(expected));
}

#[cfg(feature = "safetensors")]
#[test]
fn our_views_can_be_saved_by_the_reference() {
    use safetensors::View as _;
    let (zoo, dir) = (zoo(), tempfile::tempdir().unwrap());
    let path = dir.path().join("zoo.safetensors");
    maptensors::save(views(&zoo), &path).unwrap();
    let model = open(&path);
    let bytes = safetensors::serialize(model.tensors().map(|t| (t.name(), t)), None).unwrap();
    assert_holds(&Model::read(Content::new(&bytes)).unwrap(), &zoo, "written by the reference");
    let view = model.tensors().next().unwrap();
    assert_eq!(view.data().as_ptr(), view.as_bytes().as_ptr(), "borrowed, not copied");
    assert_eq!(view.data_len(), view.as_bytes().len());
}

#[test]
fn the_same_input_makes_the_same_bytes() {
    let (zoo, dir) = (zoo(), tempfile::tempdir().unwrap());
    let save = |name: &str, mapped: bool| {
        let path = dir.path().join(name);
        let options = SaveOptions::new().metadata("b", "1").metadata("a", "2").mapped(mapped);
        options.save(views(&zoo), &path).unwrap();
        std::fs::read(path).unwrap()
    };
    let first = save("1", true);
    assert!(first == save("2", true), "twice");
    assert!(first == save("3", false), "with and without a map");
    open(dir.path().join("1")).save(dir.path().join("4")).unwrap();
    assert!(first == std::fs::read(dir.path().join("4")).unwrap(), "read and saved again");
    let sharded = |name: &str| {
        let set = dir.path().join(name);
        std::fs::create_dir(&set).unwrap();
        SaveOptions::new().max_shard_size(200_000).save(views(&zoo), set.join("m.safetensors")).unwrap();
        common::listing(&set).into_iter().map(|f| (common::sha256_of(&set.join(&f)), f)).collect::<Vec<_>>()
    };
    assert_eq!(sharded("set1"), sharded("set2"));
}

fn golden(name: &str) -> PathBuf {
    Path::new("models/golden").join(name)
}

#[test]
fn golden_files_read_as_the_reference_says() {
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden("expected.json")).unwrap()).unwrap();
    let files = expected.as_object().unwrap();
    assert!(files.len() >= 8);
    for (file, expected) in files {
        let path = golden(file);
        let bytes = std::fs::read(&path).unwrap();
        for model in [open(&path), Model::read(&path).unwrap(), Model::read(Content::new(&bytes)).unwrap()] {
            let tensors = expected["tensors"].as_array().unwrap();
            assert_eq!(model.len(), tensors.len(), "{file}");
            for tensor in tensors {
                let name = tensor["name"].as_str().unwrap();
                let view = model.tensor(name).unwrap();
                assert_eq!(view.dtype().name(), tensor["dtype"], "{file}: {name:?}");
                assert_eq!(serde_json::json!(view.shape()), tensor["shape"], "{file}: {name:?}");
                assert_eq!(common::sha256(view.as_bytes()), tensor["sha256"], "{file}: {name:?}");
            }
            let has = model.layout(0).unwrap().has_metadata();
            let metadata = has.then(|| {
                model.metadata().iter().map(|(key, value)| (key, value.as_str())).collect::<HashMap<_, _>>()
            });
            assert_eq!(serde_json::json!(metadata), expected["metadata"], "{file}");
        }
    }
    let on_disk = common::listing(Path::new("models/golden"));
    assert_eq!(on_disk.iter().filter(|n| n.ends_with(".safetensors")).count(), files.len());
}

#[test]
fn misaligned_tensors_are_refused_in_place_and_copied_or_read_aligned() {
    fn look<T: Element + PartialEq + std::fmt::Debug>(name: &str) {
        let path = golden("odd-header.safetensors");
        let (mapped, owned) = (open(&path), Model::read(&path).unwrap());
        let view = mapped.tensor(name).unwrap();
        assert!(!view.is_aligned());
        let error = view.as_slice::<T>().unwrap_err();
        assert!(error.kind().name() == "Align" && error.to_string().contains(name), "{error}");
        let copied = view.to_vec::<T>().unwrap();
        assert_eq!(bytemuck::cast_slice::<T, u8>(&copied), view.as_bytes());
        let part = view.slice(&[Index::from(1..)]).unwrap();
        let elements = view.shape().iter().product::<usize>() / view.shape()[0];
        assert_eq!(part.to_vec::<T>().unwrap(), copied[elements..]);
        let view = owned.tensor(name).unwrap();
        assert!(view.is_aligned());
        assert_eq!(view.as_slice::<T>().unwrap(), copied);
        // Every save repairs it.
        let dir = tempfile::tempdir().unwrap();
        mapped.save(dir.path().join("m")).unwrap();
        assert_eq!(open(dir.path().join("m")).tensor(name).unwrap().as_slice::<T>().unwrap(), copied);
    }
    look::<f64>("f64");
    look::<i32>("i32");
    look::<f16>("f16");
    let model = open(golden("odd-header.safetensors"));
    assert_eq!(model.tensor("u8").unwrap().as_slice::<u8>().unwrap().len(), 3);
}

#[test]
fn every_element_type_sees_its_dtype_and_no_other() {
    fn look<T: Element>(model: &Model, zoo: &Zoo) {
        let name = format!("{}.[3, 4, 4]", T::DTYPE);
        let (_, dtype, shape, bytes) = zoo.iter().find(|entry| entry.0 == name).unwrap();
        let view: TensorView<'_> = model.tensor(&name).unwrap();
        let values = view.as_slice::<T>().unwrap();
        assert_eq!(values.len() * T::PER_VALUE, shape.iter().product::<usize>());
        assert_eq!(bytemuck::cast_slice::<T, u8>(values), bytes);
        assert_eq!(bytemuck::cast_slice::<T, u8>(&view.to_vec::<T>().unwrap()), bytes);
        for other in model.tensors().filter(|t| t.dtype() != *dtype) {
            assert_eq!(
                other.as_slice::<T>().err().map(|e| e.kind().name()),
                Some("DType"),
                "{}",
                other.name()
            );
            assert_eq!(other.to_vec::<T>().err().map(|e| e.kind().name()), Some("DType"));
        }
    }
    let (zoo, dir) = (zoo(), tempfile::tempdir().unwrap());
    let model = open_saved(&zoo, &dir.path().join("m"));
    let mut seen = 0;
    macro_rules! all {
        ($($t:ty)*) => { $( look::<$t>(&model, &zoo); seen += 1; )* };
    }
    all!(bool u8 i8 u16 i16 u32 i32 u64 i64 f16 bf16 f32 f64 Complex32);
    all!(F8E4M3 F8E5M2 F8E8M0 F8E4M3Fnuz F8E5M2Fnuz F4x2 F6E2M3x4 F6E3M2x4);
    assert_eq!(seen, DType::ALL.len());
}

#[test]
fn a_bool_that_is_neither_0_nor_1_is_bytes_only() {
    let mut bytes = common::file_of(r#"{"m":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}"#, 3);
    *bytes.last_mut().unwrap() = 2;
    let model = Model::read(Content::new(&bytes)).unwrap();
    let view = model.tensor("m").unwrap();
    assert_eq!(view.as_bytes(), [1, 1, 2]);
    assert_eq!(view.as_slice::<bool>().unwrap_err().kind().name(), "Value");
    assert_eq!(view.to_vec::<bool>().unwrap_err().kind().name(), "Value");
}

#[test]
fn nearly_all_bytes_of_a_real_layout_are_aligned() {
    // A small GPT-2 in the order its framework names things: matrices, norms, biases, odd vocabulary.
    let (width, vocabulary) = (192, 5_057);
    let mut builder = Layout::builder().tensor("wte.weight", DType::F16, &[vocabulary, width]).tensor(
        "wpe.weight",
        DType::F16,
        &[1023, width],
    );
    for i in 0..12 {
        for (name, shape) in [
            ("ln_1.weight", &[width][..]),
            ("ln_1.bias", &[width]),
            ("attn.mask", &[1, 1, 33, 33]),
            ("attn.c_attn.weight", &[width, 3 * width]),
            ("attn.c_attn.bias", &[3 * width]),
            ("attn.c_proj.weight", &[width, width]),
            ("mlp.c_fc.weight", &[width, 4 * width]),
            ("mlp.c_fc.bias", &[4 * width]),
            ("mlp.c_proj.weight", &[4 * width, width]),
            ("scale", &[]),
        ] {
            builder = builder.tensor(format!("h.{i}.{name}"), DType::F16, shape);
        }
    }
    let layout = builder.tensor("lm_head.bias", DType::F16, &[vocabulary]).build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gpt.safetensors");
    Draft::create(&path, &layout).unwrap().commit().unwrap();
    let model = open(&path);
    let aligned = |to: usize| -> u64 {
        let views = model.tensors().filter(|t| t.as_bytes().as_ptr().addr().is_multiple_of(to));
        views.map(|t| t.info().nbytes()).sum()
    };
    let total: u64 = model.tensors().map(|t| t.info().nbytes()).sum();
    assert!(aligned(64) * 100 >= total * 99, "{} of {total} bytes on 64", aligned(64));
    assert!(aligned(4096) * 100 >= total * 70, "{} of {total} bytes on a page", aligned(4096));
    assert!(model.tensors().all(|t| t.as_slice::<f16>().is_ok()));
}

#[test]
fn a_save_refuses_metadata_that_is_no_string_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let bytes = [7; 2000];
    let tensors = || [("a", common::bytes_tensor(&bytes)), ("b", common::bytes_tensor(&bytes))];
    let options = SaveOptions::new().metadata("step", 100u32);
    for options in [options.clone(), options.max_shard_size(2000)] {
        let error = options.save(tensors(), &path).unwrap_err();
        assert!(
            error.kind() == maptensors::ErrorKind::Argument && error.to_string().contains("\"step\""),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        options.metadata("step", "100").save(tensors(), &path).unwrap();
        assert_eq!(Model::read(dir.path()).unwrap().metadata()["step"], "100");
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}
