//! Every source by every way to have it, under every option.
#![allow(unsafe_code)]

use maptensors::{
    Content, Error, Files, Memfd, Model, ModelMut, ModelShared, OpenOptions, Result, SaveOptions,
    SealedMemfd, Verify,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type Tensors = BTreeMap<String, Vec<u8>>;

fn of(model: &Model) -> Tensors {
    model.tensors().map(|tensor| (tensor.name().to_owned(), tensor.as_bytes().to_vec())).collect()
}

fn of_shared(model: &ModelShared) -> Tensors {
    let bytes = |tensor: maptensors::TensorShared<'_>| {
        let mut bytes = vec![0; tensor.nbytes()];
        tensor.copy_bytes_to(&mut bytes).unwrap();
        (tensor.name().to_owned(), bytes)
    };
    model.tensors().map(bytes).collect()
}

/// Where the same tensors are.
struct Sources {
    _dir: tempfile::TempDir,
    file: PathBuf,
    set: PathBuf,
    bytes: Vec<u8>,
    memory: SealedMemfd,
}

impl Sources {
    /// `change` is done to the whole file, and to the last shard of the set.
    fn new(change: impl Fn(&mut Vec<u8>)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, set) = (dir.path().join("model.safetensors"), dir.path().join("set"));
        std::fs::create_dir(&set).unwrap();
        let model = Model::read("models/digits.safetensors").unwrap();
        let options = SaveOptions::new().checksums(true);
        options.save(model.tensors().map(|t| (t.name(), t)), &file).unwrap();
        let in_shards = options.max_shard_size(17_000);
        in_shards.save(model.tensors().map(|t| (t.name(), t)), set.join("model.safetensors")).unwrap();
        for path in [&file, &set.join("model-00002-of-00002.safetensors")] {
            let mut bytes = std::fs::read(path).unwrap();
            change(&mut bytes);
            std::fs::write(path, bytes).unwrap();
        }
        let bytes = std::fs::read(&file).unwrap();
        let memory = sealed(&bytes);
        Self { _dir: dir, file, set, bytes, memory }
    }

    fn shards(&self) -> Files {
        Files::new([1, 2].map(|n| self.set.join(format!("model-{n:05}-of-00002.safetensors"))))
    }

    fn index(&self) -> PathBuf {
        self.set.join("model.safetensors.index.json")
    }

    /// What each way makes of each source: of one file, or with `of_sets` of two.
    fn all(&self, options: &OpenOptions, of_sets: bool) -> Vec<(String, Result<Tensors>)> {
        let mut all = Vec::new();
        macro_rules! every_way {
            ($name:expr, $source:expr) => {
                every_way!(read $name, $source);
                // SAFETY: files of the test's own, which nobody writes meanwhile.
                let found = unsafe { options.open($source) }.map(|model| of(&model));
                all.push((format!("{} open", $name), found));
                // SAFETY: as above.
                let found = unsafe { options.open_mut($source) }.map(|model| of(&model));
                all.push((format!("{} open_mut", $name), found));
                // SAFETY: as above.
                let found = unsafe { options.open_shared($source) }.map(|model| of_shared(&model));
                all.push((format!("{} open_shared", $name), found));
            };
            (read $name:expr, $source:expr) => {
                all.push((format!("{} read", $name), options.read($source).map(|model| of(&model))));
                all.push((format!("{} read_mut", $name), options.read_mut($source).map(|model| of(&model))));
                let found = options.read_sealed($source).map(|model| of(&model));
                all.push((format!("{} read_sealed", $name), found));
                let found = options.read_sealed_mut($source).map(|model| of(&model));
                all.push((format!("{} read_sealed_mut", $name), found));
            };
        }
        if of_sets {
            every_way!("set", &self.set);
            every_way!("index", self.index());
            every_way!("list", &self.shards());
            return all;
        }
        every_way!("file", &self.file);
        every_way!("list of one", Files::new([&self.file]));
        every_way!(read "content", Content::new(&self.bytes));
        every_way!(read "memory", &self.memory);
        all.push(("memory over".into(), options.over(&self.memory).map(|model| of(&model))));
        all.push(("memory over_mut".into(), options.over_mut(&self.memory).map(|model| of(&model))));
        all.push(("lent over".into(), options.over(self.bytes.clone()).map(|model| of(&model))));
        all
    }
}

fn sealed(bytes: &[u8]) -> SealedMemfd {
    let mut memfd = Memfd::create("sources", bytes.len()).unwrap();
    memfd.as_bytes_mut().copy_from_slice(bytes);
    memfd.seal().unwrap()
}

fn expected() -> Tensors {
    of(&Model::read("models/digits.safetensors").unwrap())
}

#[test]
fn every_source_is_had_by_every_way_alike_under_every_option() {
    let sources = Sources::new(|_| {});
    let plain = OpenOptions::new();
    let options = [
        ("none", plain.clone()),
        ("verify", plain.clone().verify(Verify::All)),
        ("guard", plain.clone().guard(true)),
        ("small pages", plain.clone().huge_pages(false)),
        ("reserve_swap", plain.clone().reserve_swap(true)),
        ("no reserve_swap", plain.clone().reserve_swap(false)),
        ("dense_edits", plain.clone().dense_edits(true)),
        ("whole window", plain.clone().window(..)),
        ("populate", plain.clone().populate(true)),
        ("lock", plain.lock(true)),
    ];
    let expected = expected();
    for (option, options) in options {
        for of_sets in [false, true] {
            for (way, found) in sources.all(&options, of_sets) {
                // What their owner alone may do with them is refused by its name.
                if way == "lent over" && ["populate", "lock"].contains(&option) {
                    let error = found.err().unwrap();
                    assert!(matches!(error, Error::Argument(_)), "{error}");
                    assert!(error.to_string().starts_with(option), "{error}");
                    continue;
                }
                assert!(found.unwrap() == expected, "{option}: {way}");
            }
        }
    }
}

#[test]
fn a_changed_byte_is_found_by_every_way_of_every_source_that_verifies() {
    let sources = Sources::new(|bytes| *bytes.last_mut().unwrap() ^= 1);
    for of_sets in [false, true] {
        for (way, found) in sources.all(&OpenOptions::new().verify(Verify::All), of_sets) {
            assert!(matches!(found, Err(Error::Checksum { .. })), "{way}: {:?}", found.err());
        }
        for (way, found) in sources.all(&OpenOptions::new(), of_sets) {
            assert!(found.unwrap() != expected(), "{way}");
        }
    }
}

#[test]
fn a_window_is_of_every_source_that_is_one_file_and_refused_for_a_set() {
    let sources = Sources::new(|bytes| *bytes = [&[7; 515], &bytes[..], &[7; 100]].concat());
    let len = sources.bytes.len() as u64;
    for (way, found) in sources.all(&OpenOptions::new().window(515..len - 100), false) {
        assert!(found.unwrap() == expected(), "{way}");
    }
    for (way, found) in sources.all(&OpenOptions::new().window(515..=len), false) {
        assert!(matches!(found, Err(Error::Truncated { .. })), "{way}: {:?}", found.err());
    }
    #[allow(clippy::reversed_empty_ranges)]
    for (way, found) in sources.all(&OpenOptions::new().window(515..3), false) {
        assert!(matches!(found, Err(Error::Argument(_))), "{way}: {:?}", found.err());
    }
    for (way, found) in sources.all(&OpenOptions::new().window(515..), true) {
        assert!(matches!(found, Err(Error::Argument(_))), "{way}: {:?}", found.err());
    }
}

#[test]
fn what_is_edited_in_a_copy_is_in_no_source() {
    let sources = Sources::new(|_| {});
    let options = OpenOptions::new().dense_edits(true);
    let copies: Vec<(&str, Result<ModelMut>)> = vec![
        // SAFETY: a file of the test's own, which nobody writes meanwhile.
        ("open_mut", unsafe { options.open_mut(sources.shards()) }),
        ("read_mut", options.read_mut(sources.shards())),
        ("read_mut of content", options.read_mut(Content::new(&sources.bytes))),
        ("read_mut of memory", options.read_mut(&sources.memory)),
        ("read_sealed_mut", options.read_sealed_mut(sources.shards())),
        ("read_sealed_mut of content", options.read_sealed_mut(Content::new(&sources.bytes))),
        ("read_sealed_mut of memory", options.read_sealed_mut(&sources.memory)),
        ("over_mut", options.over_mut(&sources.memory)),
    ];
    for (way, copy) in copies {
        let mut copy = copy.unwrap();
        copy.tensor_mut("fc1.bias").unwrap().as_bytes_mut().fill(0);
        assert_ne!(of(&copy), expected(), "{way}");
    }
    for of_sets in [false, true] {
        for (way, found) in sources.all(&OpenOptions::new(), of_sets) {
            assert!(found.unwrap() == expected(), "{way}");
        }
    }
}

#[test]
fn no_file_at_all_is_an_error_that_says_so() {
    let none = Files::new(<[&Path; 0]>::default());
    let error = Model::read(&none).unwrap_err();
    assert!(matches!(&error, Error::Argument(text) if text.contains("no file is named")), "{error}");
}
