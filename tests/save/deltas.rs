//! What changed, checksums, and deltas: exact for every dtype, refused where they do not fit, and as small
//! and as cheap as promised.
#![allow(unsafe_code)]

use crate::common::noise;
use maptensors::{
    DType, Draft, Error, Layout, Model, ModelMut, SaveOptions, apply_delta, diff, materialize, save_delta,
    save_diff,
};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn open(path: impl AsRef<Path>) -> ModelMut {
    // SAFETY: a test's own file, which nobody writes while it is mapped.
    unsafe { ModelMut::open(path) }.unwrap()
}

/// One tensor of each dtype in two sizes, of noise.
fn zoo(path: &Path, checksums: bool) {
    let mut builder = Layout::builder().metadata("step", "1");
    for &dtype in DType::ALL {
        builder = builder.tensor(format!("{dtype}.large"), dtype, &[64, 200]).tensor(
            format!("{dtype}.small"),
            dtype,
            &[12],
        );
    }
    let layout = builder.tensor("empty", DType::F32, &[0, 3]).build().unwrap();
    let mut draft =
        maptensors::DraftOptions::new().checksums(checksums).durable(false).create(path, &layout).unwrap();
    for (i, mut view) in draft.tensors_mut().unwrap().enumerate() {
        let len = view.as_bytes_mut().len();
        view.as_bytes_mut().copy_from_slice(&noise(i as u64, len));
    }
    draft.commit().unwrap();
}

/// Every tensor's bytes, by name.
fn contents(model: &Model) -> std::collections::BTreeMap<String, Vec<u8>> {
    model.tensors().map(|view| (view.name().to_owned(), view.as_bytes().to_vec())).collect()
}

/// Writes some bytes here and there: (tensor, place, length, value).
fn edit(model: &mut ModelMut, edits: &[(usize, usize, usize, u8)]) {
    for &(tensor, at, len, value) in edits {
        let mut views: Vec<_> = model.tensors_mut().unwrap().collect();
        let count = views.len();
        let bytes = views[tensor % count].as_bytes_mut();
        if !bytes.is_empty() {
            let at = at % bytes.len();
            let end = bytes.len().min(at + len);
            bytes[at..end].fill(value);
        }
    }
}

fn edits() -> impl Strategy<Value = Vec<(usize, usize, usize, u8)>> {
    let one = (0usize..50, 0usize..200_000, prop_oneof![1usize..4, 1usize..300, 1usize..20_000], any::<u8>());
    proptest::collection::vec(one, 0..30)
}

fn same_file(a: &Path, b: &Path) {
    let (a, b) = (Model::read(a).unwrap(), Model::read(b).unwrap());
    assert_eq!(contents(&a), contents(&b));
    assert!(diff(&a, &b).unwrap().is_empty());
}

#[test]
fn changes_are_told_exactly_and_a_write_of_the_same_value_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    zoo(&path, false);
    let mut model = open(&path);
    assert!(model.changed().unwrap().is_empty());
    let view = model.tensor_mut("F32.large").unwrap();
    let values = view.into_mut_slice::<f32>().unwrap();
    // The sign of zero and the payload of a NaN are changes; the same value is none.
    values[0] = -0.0;
    values[1] = f32::from_bits(0x7fc0_0001);
    values[2] = f32::from_bits(0x7fc0_0002);
    model.mark().unwrap();
    assert!(model.changed().unwrap().is_empty());
    let values = model.tensor_mut("F32.large").unwrap().into_mut_slice::<f32>().unwrap();
    values[0] = 0.0;
    values[1] = f32::from_bits(0x7fc0_0003);
    values[2] = f32::from_bits(0x7fc0_0002);
    // What is there is stored again.
    values[9] = f32::from_bits(values[9].to_bits());
    model.tensor_mut("F4.small").unwrap().as_bytes_mut()[5] ^= 0x10;
    let changed = model.changed().unwrap();
    let told: Vec<_> = changed.iter().map(|c| (c.name.as_str(), c.elements, c.bytes, c.pages)).collect();
    assert_eq!(told, [("F32.large", 2, 8, 1), ("F4.small", 1, 1, 1)]);
    assert_eq!((changed.elements(), changed.bytes(), changed.private_pages()), (3, 9, 2));
    assert!(changed.contains("F4.small") && changed.get("F64.large").is_none());
    // Promoted pages are private, and equal.
    model.mark().unwrap();
    model.promote().unwrap();
    assert!(model.changed().unwrap().is_empty());
    assert!(model.changed().unwrap().private_pages() > 100);
}

#[test]
fn a_model_in_memory_of_its_own_says_that_it_cannot_tell() {
    let model = ModelMut::read("models/digits.safetensors").unwrap();
    let error = model.changed().unwrap_err();
    assert!(matches!(error, Error::Argument(_)) && error.to_string().contains("open it mapped"), "{error}");
    assert!(ModelMut::read("models/digits.safetensors").unwrap().mark().is_err());
}

#[test]
fn a_sharded_model_tells_changes_of_every_shard_and_makes_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = open("models/digits-sharded");
    let delta = dir.path().join("d.safetensors");
    let names: Vec<String> = model.names().map(str::to_owned).collect();
    for name in &names {
        model.tensor_mut(name).unwrap().as_mut_slice::<f32>().unwrap()[1] = 7.5;
    }
    assert_eq!(model.changed().unwrap().iter().map(|c| c.elements).sum::<usize>(), 4);
    save_delta(&model, &delta).unwrap();
    // Against the same tensors in one file, too: how they are divided does not matter.
    for base in ["models/digits-sharded", "models/digits.safetensors"] {
        let applied = apply_delta(open(base), &[Model::read(&delta).unwrap()]).unwrap();
        assert_eq!(contents(&applied), contents(&model), "{base}");
        let out = dir.path().join("out.safetensors");
        materialize(open(base), &[Model::read(&delta).unwrap()], &out).unwrap();
        assert_eq!(contents(&Model::read(&out).unwrap()), contents(&model), "{base}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn chains_of_deltas_bring_back_every_bit_of_every_dtype(
        first in edits(), second in edits(), third in edits(), checksums in any::<bool>(), promote in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| -> PathBuf { dir.path().join(name) };
        zoo(&at("base"), checksums);
        let mut model = open(at("base"));
        if promote {
            model.promote_tensor("BF16.large").unwrap();
        }
        let mut states = vec![contents(&model)];
        let quick = SaveOptions::new().durable(false);
        for (i, edits) in [first, second, third].iter().enumerate() {
            edit(&mut model, edits);
            quick.save_delta(&model, at(&format!("d{i}"))).unwrap();
            states.push(contents(&model));
            let previous = if i == 0 { Model::read(at("base")) } else { Model::read(at(&format!("s{}", i - 1))) };
            quick.save_diff(&previous.unwrap(), &model, at(&format!("e{i}"))).unwrap();
            quick.clone().checksums(checksums).save(model.tensors().map(|t| (t.name(), t)), at(&format!("s{i}"))).unwrap();
            model.mark().unwrap();
        }
        for kind in ["d", "e"] {
            let deltas: Vec<Model> = (0..3).map(|i| Model::read(at(&format!("{kind}{i}"))).unwrap()).collect();
            for n in 0..=3 {
                let applied = apply_delta(open(at("base")), &deltas[..n]).unwrap();
                prop_assert_eq!(&contents(&applied), &states[n]);
                quick.materialize(&applied, at("out")).unwrap();
                let out = Model::read(at("out")).unwrap();
                prop_assert_eq!(&contents(&out), &states[n]);
                prop_assert_eq!(out.verify().is_ok(), out.metadata().contains_key("maptensors.checksums"));
                let carries = out.metadata().contains_key("maptensors.checksums");
                prop_assert!(carries == checksums || (kind == "e" && n > 0));
                prop_assert_eq!(applied.verify().is_ok(), carries);
            }
            // A link that is left out is noticed, whatever it would do.
            let id = |delta: &Model, key: &str| -> String {
                let text: serde_json::Value = serde_json::from_str(delta.metadata().text("maptensors.delta").unwrap()).unwrap();
                text[key].as_str().unwrap().to_owned()
            };
            if id(&deltas[0], "base") != id(&deltas[1], "base") {
                let skipped = apply_delta(open(at("base")), &deltas[1..]);
                let is_base = matches!(skipped, Err(Error::Base { .. }));
                prop_assert!(is_base);
            }
        }
        // And two files, compared.
        let (a, b) = (Model::read(at("base")).unwrap(), Model::read(at("s2")).unwrap());
        let differences = diff(&a, &b).unwrap();
        for (name, bytes) in &states[0] {
            prop_assert_eq!(differences.changed.contains(name), bytes != &states[3][name]);
        }
    }
}

#[test]
fn tensors_that_come_go_and_change_shape_are_part_of_a_delta() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let make = |path: &Path, tensors: &[(&str, DType, &[usize], u64)], step: &str| {
        let mut builder = Layout::builder().metadata("step", step);
        for (name, dtype, shape, _) in tensors {
            builder = builder.tensor(*name, *dtype, shape);
        }
        let mut draft = Draft::create(path, &builder.build().unwrap()).unwrap();
        for (name, _, _, seed) in tensors {
            let mut view = draft.tensor_mut(name).unwrap();
            let len = view.as_bytes_mut().len();
            view.as_bytes_mut().copy_from_slice(&noise(*seed, len));
        }
        draft.commit().unwrap();
    };
    let a: &[(&str, DType, &[usize], u64)] = &[
        ("kept", DType::F32, &[5000], 1),
        ("edited", DType::U8, &[9000], 2),
        ("gone", DType::F16, &[10], 3),
        ("reshaped", DType::F16, &[10, 2], 4),
        ("retyped", DType::F16, &[10, 2], 5),
    ];
    let b: &[(&str, DType, &[usize], u64)] = &[
        ("new:one", DType::F4, &[6], 6),
        ("kept", DType::F32, &[5000], 1),
        ("edited", DType::U8, &[9000], 7),
        ("reshaped", DType::F16, &[2, 10], 4),
        ("retyped", DType::BF16, &[10, 2], 5),
        ("nothing", DType::F64, &[0], 0),
    ];
    make(&at("a"), a, "1");
    make(&at("b"), b, "2");
    let (first, second) = (Model::read(at("a")).unwrap(), Model::read(at("b")).unwrap());
    let found = diff(&first, &second).unwrap();
    assert_eq!(found.added, ["nothing", "new:one"]);
    assert_eq!(found.removed, ["gone"]);
    let reshaped: Vec<&str> = found.reshaped.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(reshaped, ["reshaped", "retyped"]);
    assert_eq!(found.metadata, ["step"]);
    assert_eq!((found.changed.len(), found.compared), (1, 2));
    save_diff(&first, &second, at("delta")).unwrap();
    for base in [open(at("a")), ModelMut::read(at("a")).unwrap()] {
        let applied = apply_delta(base, &[Model::read(at("delta")).unwrap()]).unwrap();
        assert!(diff(&applied, &second).unwrap().is_empty());
    }
    assert!(!at("out").exists());
    materialize(open(at("a")), &[Model::read(at("delta")).unwrap()], at("out")).unwrap();
    same_file(&at("out"), &at("b"));
    // Back again.
    save_diff(&second, &first, at("back")).unwrap();
    let both = ["delta", "back"].map(|name| Model::read(at(name)).unwrap());
    materialize(open(at("a")), &both, at("out")).unwrap();
    same_file(&at("out"), &at("a"));
}

#[test]
fn a_wrong_base_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    for checksums in [false, true] {
        zoo(&at("a"), checksums);
        let mut other = open(at("a"));
        other.tensor_mut("I8.small").unwrap().as_bytes_mut()[0] ^= 1;
        other.save(at("other")).unwrap();
        let mut model = open(at("a"));
        model.tensor_mut("U8.small").unwrap().as_bytes_mut()[0] ^= 1;
        save_delta(&model, at("d")).unwrap();
        let delta = [Model::read(at("d")).unwrap()];
        let refused = materialize(open(at("other")), &delta, at("out")).unwrap_err();
        assert!(matches!(&refused, Error::Base { found, expected, .. } if found != expected), "{refused}");
        assert!(!at("out").exists());
        assert!(matches!(apply_delta(model, &delta), Err(Error::Base { .. })), "it is applied already");
    }
}

/// Name, dtype, shape and bytes.
type Given = (&'static str, DType, Vec<usize>, Vec<u8>);

/// A delta file with these tensors (name, dtype, length, bytes), over this base and result.
fn lie(path: &Path, header: &str, tensors: &[Given]) {
    let mut builder = Layout::builder().metadata("maptensors.delta", header);
    for (name, dtype, shape, _) in tensors {
        builder = builder.tensor(*name, *dtype, shape);
    }
    let mut draft = Draft::create(path, &builder.build().unwrap()).unwrap();
    for (name, _, _, bytes) in tensors {
        draft.tensor_mut(name).unwrap().as_bytes_mut().copy_from_slice(bytes);
    }
    draft.commit().unwrap();
}

#[test]
fn every_lie_of_a_delta_is_an_error_with_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let layout =
        Layout::builder().tensor("w", DType::U16, &[100]).tensor("p", DType::F4, &[8]).build().unwrap();
    Draft::create(at("base"), &layout).unwrap().commit().unwrap();
    let mut model = open(at("base"));
    model.tensor_mut("w").unwrap().as_bytes_mut()[7] = 1;
    save_delta(&model, at("d")).unwrap();
    let honest = Model::read(at("d")).unwrap().metadata().text("maptensors.delta").unwrap().to_owned();
    let list = |name, dtype: DType, bytes: &[u8]| {
        (name, dtype, vec![bytes.len() / dtype.block().bytes * dtype.block().elements], bytes.to_vec())
    };
    let (gaps, lengths, values) = ("gaps:w", "lengths:w", "values:w");
    let u8s = |name, bytes: &[u8]| list(name, DType::U8, bytes);
    let u16s = |name, bytes: &[u8]| list(name, DType::U16, bytes);
    let huge = u64::MAX.to_le_bytes();
    let lies: Vec<(&str, Vec<Given>)> = vec![
        ("no gaps", vec![u16s(values, &[1, 1])]),
        ("no values", vec![u8s(gaps, &[1])]),
        ("lengths alone", vec![u8s(lengths, &[1])]),
        ("whole and values", vec![u16s("whole:w", &[0; 200]), u8s(gaps, &[1]), u16s(values, &[1, 1])]),
        ("another kind", vec![u8s("what:w", &[1])]),
        ("no kind", vec![u8s("w", &[1])]),
        ("no such tensor", vec![u8s("gaps:x", &[1]), u16s("values:x", &[1, 1])]),
        ("behind the end", vec![u8s(gaps, &[100]), u16s(values, &[1, 1])]),
        ("behind the end, in sum", vec![u8s(gaps, &[60, 60]), u16s(values, &[1, 1, 1, 1])]),
        ("a run over the end", vec![u8s(gaps, &[99]), u8s(lengths, &[2]), u16s(values, &[1, 1, 1, 1])]),
        ("a gap that overflows", vec![list(gaps, DType::U64, &huge), u16s(values, &[1, 1])]),
        (
            "gaps that overflow in sum",
            vec![list(gaps, DType::U64, &[1u64.to_le_bytes(), huge].concat()), u16s(values, &[1, 1, 1, 1])],
        ),
        (
            "a length that overflows",
            vec![u8s(gaps, &[1]), list(lengths, DType::U64, &huge), u16s(values, &[1, 1])],
        ),
        ("a length of none", vec![u8s(gaps, &[1]), u8s(lengths, &[0]), u16s(values, &[])]),
        (
            "fewer lengths than gaps",
            vec![u8s(gaps, &[1, 1]), u8s(lengths, &[2]), u16s(values, &[1, 1, 1, 1])],
        ),
        ("fewer values than gaps", vec![u8s(gaps, &[1, 1]), u16s(values, &[1, 1])]),
        ("fewer values than lengths", vec![u8s(gaps, &[1]), u8s(lengths, &[2]), u16s(values, &[1, 1])]),
        ("more values than lengths", vec![u8s(gaps, &[1]), u8s(lengths, &[1]), u16s(values, &[1, 1, 1, 1])]),
        ("values of another dtype", vec![u8s(gaps, &[1]), list(values, DType::I16, &[1, 1])]),
        ("values in rows", vec![u8s(gaps, &[1]), (values, DType::U16, vec![1, 1], vec![1, 1])]),
        ("gaps in rows", vec![(gaps, DType::U8, vec![1, 1], vec![1]), u16s(values, &[1, 1])]),
        ("signed gaps", vec![list(gaps, DType::I8, &[1]), u16s(values, &[1, 1])]),
        (
            "fractional lengths",
            vec![u8s(gaps, &[1]), list(lengths, DType::F16, &[1, 1]), u16s(values, &[1, 1])],
        ),
        ("packed values not as bytes", vec![u8s("gaps:p", &[1]), list("values:p", DType::F4, &[1])]),
        ("packed, behind the end", vec![u8s("gaps:p", &[4]), u8s("values:p", &[1])]),
        ("another result", vec![u8s(gaps, &[1]), u16s(values, &[1, 1])]),
        ("a tensor too many", vec![u8s("whole:new", &[1])]),
    ];
    for (what, tensors) in &lies {
        lie(&at("lie"), &honest, tensors);
        let error = apply_delta(open(at("base")), &[Model::read(at("lie")).unwrap()]).unwrap_err();
        assert!(matches!(error, Error::Delta { .. }), "{what}: {error}");
        // Found where it lies, and not only by what comes of it.
        let by_result = ["another result", "a tensor too many"].contains(what);
        assert_eq!(error.to_string().contains("what comes out"), by_result, "{what}: {error}");
        assert!(
            materialize(open(at("base")), &[Model::read(at("lie")).unwrap()], at("out")).is_err(),
            "{what}"
        );
        assert!(!at("out").exists(), "{what}");
    }
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1", "\"version\":-1"),
        ("\"removed\":[]", "\"removed\":[\"nobody\"]"),
        ("\"removed\":[]", "\"removed\":7"),
        ("\"removed\":[]", "\"removed\":[\"w\",\"w\"]"),
        ("\"base\":\"", "\"base\":\"x"),
        ("\"checksums\"", "\"x\""),
        ("{", "["),
    ] {
        assert!(honest.contains(from), "{from}");
        lie(&at("lie"), &honest.replacen(from, to, 1), &[]);
        let error = apply_delta(open(at("base")), &[Model::read(at("lie")).unwrap()]).unwrap_err();
        assert!(matches!(error, Error::Delta { .. }), "{to}: {error}");
    }
    let error = apply_delta(open(at("base")), &[Model::read(at("base")).unwrap()]).unwrap_err();
    assert!(matches!(error, Error::Delta { .. }), "{error}");
    // And the honest one is none of these.
    let honest = apply_delta(open(at("base")), &[Model::read(at("d")).unwrap()]).unwrap();
    assert_eq!(contents(&honest), contents(&model));
}

#[test]
fn a_delta_of_scattered_elements_is_a_fraction_of_the_file_and_one_of_pages_is_the_pages() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let elements = 2 << 20;
    let layout = Layout::builder().tensor("w", DType::BF16, &[elements]).build().unwrap();
    Draft::create(at("base"), &layout).unwrap().commit().unwrap();
    let size = |name: &str| std::fs::metadata(at(name)).unwrap().len();
    let random: Vec<usize> = noise(7, 8 * elements / 50)
        .chunks_exact(8)
        .map(|bytes| {
            usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap()) % elements as u64).unwrap()
        })
        .collect();
    let mut model = open(at("base"));
    let bytes = model.tensor_mut("w").unwrap();
    let values = bytes.into_mut_slice::<maptensors::bf16>().unwrap();
    for &i in &random {
        values[i] = maptensors::bf16::ONE;
    }
    let changed = model.changed().unwrap();
    assert!(changed.elements() > elements / 60);
    save_delta(&model, at("scattered")).unwrap();
    assert!(size("scattered") * 100 <= size("base") * 8, "{} of {}", size("scattered"), size("base"));

    let mut model = open(at("base"));
    let mut view = model.tensor_mut("w").unwrap();
    let pages = elements * 2 / 4096;
    for &i in random.iter().take(pages / 100) {
        let at = i % pages * 4096;
        view.as_bytes_mut()[at..at + 4096].copy_from_slice(&noise(at as u64, 4096));
    }
    save_delta(&model, at("pages")).unwrap();
    let changed = model.changed().unwrap().bytes() as u64;
    assert!(size("pages") * 10 <= changed * 11, "{} for {changed}", size("pages"));
    // All of it: no larger than the file, but for names.
    let mut model = open(at("base"));
    model.tensor_mut("w").unwrap().as_bytes_mut().copy_from_slice(&noise(3, elements * 2));
    save_delta(&model, at("all")).unwrap();
    assert!(size("all") <= size("base") + 8192);
}
