//! What can be saved: tensors of ours, of a caller's own, and raw bytes; and those that are not what they say.

use crate::common::listing;
use maptensors::{
    CheckpointOptions, Checkpointer, DType, Index, Model, ModelMut, Publisher, Result, SaveOptions,
    SaveTensor, Tensor, TensorBytes, TensorView, save,
};
use std::cell::Cell;
use std::io;
use std::path::Path;

const DIGITS: &str = "models/digits.safetensors";

/// A caller's own tensor of 16-bit numbers.
struct Numbers {
    shape: [usize; 1],
    values: Vec<u8>,
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Borrowed,
    Owned,
    Written,
    /// The number of bytes that it says it wrote.
    Wrote(usize),
    Fails,
}

impl Numbers {
    fn new(count: usize, how: How) -> Self {
        let values = (0..count).flat_map(|i| u16::try_from(i % 60_000).unwrap().to_le_bytes()).collect();
        Self { shape: [count], values, how }
    }
}

impl SaveTensor for Numbers {
    fn dtype(&self) -> DType {
        DType::U16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn bytes(&self) -> TensorBytes<'_> {
        match self.how {
            How::Borrowed => self.values.as_slice().into(),
            How::Owned => self.values.clone().into(),
            How::Written => TensorBytes::written(|to| {
                to.copy_from_slice(&self.values);
                Ok(to.len())
            }),
            How::Wrote(len) => TensorBytes::written(move |_| Ok(len)),
            How::Fails => TensorBytes::written(|_| Err(io::Error::other("the device is gone"))),
        }
    }
}

/// Every way to save, with where what it saved can be read from; the same tensors, whole, by each.
type Way = (&'static str, fn(Vec<(String, Box<dyn SaveTensor + '_>)>, &Path) -> Result<Model>);

const WAYS: &[Way] = &[
    ("mapped", |tensors, dir| {
        save(tensors, dir.join("m.safetensors"))?;
        Model::read(dir.join("m.safetensors"))
    }),
    ("with pwrite(2)", |tensors, dir| {
        SaveOptions::new().mapped(false).save(tensors, dir.join("m.safetensors"))?;
        Model::read(dir.join("m.safetensors"))
    }),
    ("with checksums", |tensors, dir| {
        SaveOptions::new().checksums(true).save(tensors, dir.join("m.safetensors"))?;
        let model = Model::read(dir.join("m.safetensors"))?;
        model.verify()?;
        Ok(model)
    }),
    ("in shards", |tensors, dir| {
        SaveOptions::new().max_shard_size(1).save(tensors, dir.join("m.safetensors"))?;
        Model::read(dir)
    }),
    ("as a checkpoint", |tensors, dir| {
        let checkpoints = Checkpointer::open(dir)?;
        checkpoints.save(tensors, 1)?;
        checkpoints.read(None)
    }),
    ("as a checkpoint in shards", |tensors, dir| {
        let checkpoints = CheckpointOptions::new().max_shard_size(1).open(dir)?;
        checkpoints.save_async(tensors, 1)?.wait()?;
        checkpoints.read(None)
    }),
    ("published", |tensors, dir| {
        let place = dir.join("p");
        let mut publisher = Publisher::open(&place)?;
        let done = publisher.publish(tensors);
        let model = done.and_then(|_| segment(&place));
        publisher.remove()?;
        model
    }),
    ("published where it differs", |tensors, dir| {
        let place = dir.join("p");
        let mut publisher = Publisher::open(&place)?;
        let done = publisher.publish_differing(tensors);
        let model = done.and_then(|_| segment(&place));
        publisher.remove()?;
        model
    }),
];

/// The only segment of a publication: its head.
fn segment(place: &Path) -> Result<Model> {
    let name = listing(place).into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    Model::read(place.join(name))
}

fn assert_same(
    tensors: &[(String, Box<dyn SaveTensor + '_>)],
    expected: &[Vec<u8>],
    model: &Model,
    way: &str,
) {
    assert_eq!(model.len(), tensors.len(), "{way}");
    for ((name, tensor), expected) in tensors.iter().zip(expected) {
        let found = model.tensor(name).unwrap();
        assert_eq!((found.dtype(), found.shape()), (tensor.dtype(), tensor.shape()), "{way}: {name}");
        assert!(found.as_bytes() == expected, "{way}: {name}");
    }
}

#[test]
fn every_way_to_save_takes_every_kind_of_tensor() {
    let model = Model::read(DIGITS).unwrap();
    let mut edited = ModelMut::read(DIGITS).unwrap();
    let edited = edited.tensor_mut("fc1.bias").unwrap();
    let weight = model.tensor("fc1.weight").unwrap();
    let columns = [Index::from(..), Index::from(1..64).step_by(3)];
    let owned: Tensor = model.owned("fc1.weight").unwrap();
    let elements = [1.5f32, -2.0];
    let tensors = || -> Vec<(String, Box<dyn SaveTensor + '_>)> {
        let tensors: Vec<Box<dyn SaveTensor + '_>> = vec![
            Box::new(weight),
            Box::new(weight.slice(&[Index::from(3..9)]).unwrap()),
            Box::new(weight.slice(&columns).unwrap()),
            Box::new(owned.clone()),
            Box::new(owned.slice(&columns).unwrap()),
            Box::new(&edited),
            Box::new((DType::I8, vec![2, 2], [1u8, 2, 3, 4])),
            Box::new(TensorView::from_slice(&[2], &elements).unwrap()),
            Box::new((DType::F32, [0, 4], [0u8; 0])),
            Box::new(weight.slice(&[Index::from(0..0), Index::from(0..64).step_by(2)]).unwrap()),
            // Larger than what one thread copies in one go.
            Box::new(Numbers::new(1_500_000, How::Borrowed)),
            Box::new(Numbers::new(1_500_000, How::Owned)),
            Box::new(Numbers::new(1_500_000, How::Written)),
            Box::new(Numbers::new(0, How::Written)),
        ];
        tensors.into_iter().enumerate().map(|(i, tensor)| (format!("t{i}"), tensor)).collect()
    };
    let part = |indices: &[Index]| weight.slice(indices).unwrap().to_bytes().into_owned();
    let numbers = Numbers::new(1_500_000, How::Owned).values;
    let expected = [
        weight.as_bytes().to_vec(),
        part(&[Index::from(3..9)]),
        part(&columns),
        weight.as_bytes().to_vec(),
        part(&columns),
        model.tensor("fc1.bias").unwrap().as_bytes().to_vec(),
        vec![1, 2, 3, 4],
        elements.iter().flat_map(|e| e.to_le_bytes()).collect(),
        vec![],
        vec![],
        numbers.clone(),
        numbers.clone(),
        numbers,
        vec![],
    ];
    for (way, save) in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let saved = save(tensors(), dir.path());
        let saved = saved.unwrap_or_else(|error| panic!("{way}: {error}"));
        assert_same(&tensors(), &expected, &saved, way);
    }
}

type Case = (&'static str, fn() -> Numbers, &'static str);

#[test]
fn a_tensor_that_is_not_what_it_says_is_refused_and_nothing_is_left() {
    let with = |how, change: fn(&mut Vec<u8>)| {
        let mut tensor = Numbers::new(1000, how);
        change(&mut tensor.values);
        tensor
    };
    let cases: &[Case] = &[
        ("short", || Numbers::new(1000, How::Wrote(1999)), "1999"),
        ("nothing", || Numbers::new(1000, How::Wrote(0)), "0 bytes"),
        ("more", || Numbers::new(1000, How::Wrote(2001)), "2001"),
        ("fails", || Numbers::new(1000, How::Fails), "the device is gone"),
    ];
    let mut cases: Vec<(String, Numbers, &str)> =
        cases.iter().map(|(what, make, text)| ((*what).to_owned(), make(), *text)).collect();
    for how in [How::Borrowed, How::Owned] {
        cases.push((format!("{how:?}, short"), with(how, |values| values.truncate(1998)), "1998"));
        cases.push((format!("{how:?}, long"), with(how, |values| values.push(0)), "2001"));
    }
    for (what, tensor, text) in &cases {
        for (way, save) in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let good = Numbers::new(1000, How::Written);
            let tensors: Vec<(String, Box<dyn SaveTensor + '_>)> =
                vec![("good".into(), Box::new(&good)), ("bad".into(), Box::new(tensor))];
            let error = save(tensors, dir.path()).unwrap_err();
            let kind = if tensor.how == How::Fails { "Io" } else { "Shape" };
            assert_eq!(error.kind().name(), kind, "{what}, {way}: {error}");
            let error = error.to_string();
            assert!(error.contains("\"bad\"") && error.contains(text), "{what}, {way}: {error}");
            assert_eq!(listing(dir.path()), Vec::<String>::new(), "{what}, {way}");
        }
    }
}

#[test]
fn an_old_file_stays_where_a_tensor_cannot_be_brought() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    save([("w", Numbers::new(10, How::Written))], &path).unwrap();
    let before = std::fs::read(&path).unwrap();
    save([("w", Numbers::new(1000, How::Fails))], &path).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(listing(dir.path()), ["m.safetensors"]);
}

/// Knows whether one of its kind is asked for and not brought yet.
struct Counted<'a>(&'a Cell<usize>);

impl SaveTensor for Counted<'_> {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn shape(&self) -> &[usize] {
        &[64]
    }
    fn bytes(&self) -> TensorBytes<'_> {
        assert_eq!(self.0.replace(1), 0, "the last one is brought");
        TensorBytes::written(|to| {
            to.fill(7);
            assert_eq!(self.0.replace(0), 1, "asked for");
            Ok(to.len())
        })
    }
}

#[test]
fn what_is_brought_is_asked_for_once_and_brought_before_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let held = Cell::new(0);
    let tensors = (0..20).map(|i| (format!("t{i}"), Counted(&held)));
    save(tensors, dir.path().join("m.safetensors")).unwrap();
    assert_eq!(held.get(), 0);
}

#[test]
fn raw_bytes_become_a_view_only_if_they_are_as_many_as_the_shape_asks_for() {
    let view =
        |dtype, shape, bytes| TensorView::from_bytes(dtype, shape, bytes).map(|view| view.as_bytes().len());
    assert_eq!(view(DType::F32, &[2], &[0; 8]).unwrap(), 8);
    assert_eq!(view(DType::F32, &[], &[0; 4]).unwrap(), 4);
    assert_eq!(view(DType::F4, &[2, 3], &[0; 3]).unwrap(), 3);
    assert_eq!(view(DType::F32, &[usize::MAX, 0], &[]).unwrap(), 0);
    for (dtype, shape, bytes, kind) in [
        (DType::F32, &[2][..], &[0; 7][..], "Shape"),
        (DType::F32, &[2], &[0; 9], "Shape"),
        (DType::F4, &[3], &[0; 2], "Align"),
        (DType::F32, &[usize::MAX, 2], &[0; 8], "Overflow"),
        (DType::F64, &[usize::MAX], &[0; 8], "Overflow"),
    ] {
        assert_eq!(view(dtype, shape, bytes).unwrap_err().kind().name(), kind, "{dtype} {shape:?}");
    }
    assert!(TensorView::from_slice(&[3], &[1.0f32, 2.0]).is_err());
    assert_eq!(TensorView::from_slice(&[], &[1u64]).unwrap().as_slice::<u64>().unwrap(), [1]);
}

#[cfg(feature = "safetensors")]
#[test]
fn views_of_the_reference_crate_are_saved() {
    use maptensors::FromView;
    use safetensors::{Dtype, View};
    use std::borrow::Cow;

    /// Brings its bytes, or has them; and may lie about how many.
    struct Theirs(bool, usize);

    impl View for Theirs {
        fn dtype(&self) -> Dtype {
            Dtype::I8
        }
        fn shape(&self) -> &[usize] {
            &[4]
        }
        fn data(&self) -> Cow<'_, [u8]> {
            if self.0 { vec![9; self.1].into() } else { (&[8; 8][..self.1]).into() }
        }
        fn data_len(&self) -> usize {
            4
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let view = |owned, len| FromView::new(Theirs(owned, len)).unwrap();
    save([("a", view(true, 4)), ("b", view(false, 4))], &path).unwrap();
    let model = Model::read(&path).unwrap();
    assert_eq!(model.tensor("a").unwrap().as_slice::<i8>().unwrap(), [9; 4]);
    assert_eq!(model.tensor("b").unwrap().as_slice::<i8>().unwrap(), [8; 4]);
    for (owned, len) in [(true, 3), (false, 5)] {
        assert_eq!(save([("a", view(owned, len))], &path).unwrap_err().kind().name(), "Shape");
    }
}
