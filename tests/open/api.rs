//! What a user of the crate may do with its types, whatever is in them.

use maptensors::{
    Advice, AttachOptions, Backing, Change, Changes, CheckpointOptions, Content, DType, Differences,
    DraftOptions, Edited, Error, ErrorKind, Evicted, HeaderEdit, Index, Layout, LayoutBuilder, MapOptions,
    Model, ModelMut, OpenOptions, Order, Publication, PublishOptions, RankPlan, Ready, Refreshed, Reshaped,
    Residency, SaveOptions, Select, Split, StreamOptions, TensorInfo, Verify,
};
use std::fmt::Debug;

#[test]
fn options_can_be_cloned_printed_and_sent_to_threads() {
    fn is_an_option<T: Clone + Debug + Send + Sync>() {}
    is_an_option::<OpenOptions>();
    is_an_option::<MapOptions>();
    is_an_option::<SaveOptions>();
    is_an_option::<DraftOptions>();
    is_an_option::<CheckpointOptions>();
    is_an_option::<PublishOptions>();
    is_an_option::<AttachOptions>();
    is_an_option::<StreamOptions<'_>>();
    is_an_option::<HeaderEdit>();
    is_an_option::<LayoutBuilder>();
    is_an_option::<Select<'_>>();
    is_an_option::<RankPlan<'_>>();
    is_an_option::<Order<'_>>();
    is_an_option::<Split>();
    is_an_option::<Verify>();
    is_an_option::<Advice>();
    is_an_option::<Index>();
}

#[test]
fn answers_can_be_cloned_compared_printed_and_sent_to_threads() {
    fn is_an_answer<T: Clone + PartialEq + Debug + Send + Sync>() {}
    is_an_answer::<ErrorKind>();
    is_an_answer::<DType>();
    is_an_answer::<Layout>();
    is_an_answer::<TensorInfo<'_>>();
    is_an_answer::<Residency>();
    is_an_answer::<Evicted>();
    is_an_answer::<Change>();
    is_an_answer::<Changes>();
    is_an_answer::<Differences>();
    is_an_answer::<Reshaped>();
    is_an_answer::<Backing>();
    is_an_answer::<Edited>();
    is_an_answer::<Ready>();
    is_an_answer::<Refreshed>();
    is_an_answer::<Publication>();
}

#[test]
fn an_error_goes_through_threads_and_boxes() {
    fn is_an_error<T: std::error::Error + Send + Sync + 'static>() {}
    is_an_error::<Error>();
    let boxed: Box<dyn std::error::Error + Send + Sync> = Model::read(Content::new(b"")).unwrap_err().into();
    assert_eq!(boxed.downcast_ref::<Error>().map(Error::kind), Some(ErrorKind::Truncated));
}

#[test]
fn a_kind_of_error_has_the_name_of_its_variant_and_of_pythons_class() {
    let classes = include_str!("../../python/maptensors/errors.py");
    for kind in ErrorKind::ALL {
        assert_eq!(kind.name(), format!("{kind:?}"));
        assert_eq!(format!("{kind:>12}"), format!("{:>12}", kind.name()));
        let names_it =
            |line: &str| line.trim_start().starts_with("kind") && line.ends_with(&format!("= \"{kind}\""));
        // What the system refuses is Python's own OSError.
        assert_eq!(classes.lines().any(names_it), *kind != ErrorKind::Io, "{kind}");
    }
    assert_eq!(ErrorKind::ALL.len(), 25);
}

#[test]
fn options_cloned_with_a_predicate_select_the_same() {
    let model = Model::read("models/digits.safetensors").unwrap();
    let suffix = String::from(".bias");
    let select = Select::matching(|name| name.ends_with(&suffix));
    let plan =
        RankPlan::new().when(|name| name.ends_with(&suffix), Split::Replicate).otherwise(Split::COLUMN);
    let (mine, theirs) = (select.clone(), plan.clone());
    drop((select, plan));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let options = StreamOptions::new().select(mine).clone();
            model.stream(options).unwrap().map(|tensor| tensor.unwrap().name().to_owned()).collect::<Vec<_>>()
        });
        assert_eq!(other.join().unwrap(), ["fc1.bias", "fc2.bias"]);
    });
    assert_eq!(model.rank_view(1, 2, &theirs).unwrap().tensor("fc1.weight").unwrap().shape(), [32, 64]);
}

/// A copy of a model that a test may edit.
fn copied() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::copy("models/digits.safetensors", &path).unwrap();
    (dir, path)
}

#[test]
#[allow(unsafe_code)]
fn a_clone_of_a_model_is_of_the_same_memory_and_outlives_it() {
    let (_dir, path) = copied();
    // SAFETY: nobody writes to the file.
    let model = unsafe { Model::open(&path) }.unwrap();
    let first = model.tensor("fc1.weight").unwrap().as_bytes().as_ptr();
    let clone = model.clone();
    drop(model);
    let tensor = clone.tensor("fc1.weight").unwrap();
    assert_eq!(tensor.as_bytes().as_ptr(), first);
    assert_eq!(tensor.to_vec::<f32>().unwrap().len(), 64 * 64);
}

#[test]
#[allow(unsafe_code)]
fn nothing_is_written_while_a_clone_reads_the_same_memory() {
    let (_dir, path) = copied();
    // SAFETY: nobody writes to the file.
    let mut tuned = unsafe { OpenOptions::new().dense_edits(true).open_mut(&path) }.unwrap();
    tuned.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[0] = 5.0;
    let clone: Model = tuned.clone();
    assert_eq!(clone.tensor("fc1.bias").unwrap().as_slice::<f32>().unwrap()[0].to_bits(), 5.0_f32.to_bits());
    let refused = [
        tuned.tensor_mut("fc1.bias").err(),
        tuned.get_mut("fc1.bias").err(),
        tuned.tensors_mut().err(),
        tuned.promote().err(),
        tuned.promote_tensor("fc1.bias").err(),
    ];
    for error in refused {
        let error = error.unwrap();
        assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("clone"), "{error}");
    }
    drop(clone);
    tuned.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[0] = 6.0;
}

#[test]
#[allow(unsafe_code)]
fn get_asks_a_guard_as_tensor_does() {
    let (_dir, path) = copied();
    let options = OpenOptions::new().guard(true);
    // SAFETY: no view is held while the file changes.
    let model = unsafe { options.open(&path) }.unwrap();
    // SAFETY: as above.
    let shared = unsafe { options.open_shared(&path) }.unwrap();
    assert!(model.get("fc1.bias").unwrap().is_some() && model.get("fc3.bias").unwrap().is_none());
    assert!(shared.get("fc1.bias").unwrap().is_some() && shared.get("fc3.bias").unwrap().is_none());
    std::fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert_eq!(model.get("fc1.bias").unwrap_err().kind(), ErrorKind::Changed);
    assert_eq!(model.clone().get("fc1.bias").unwrap_err().kind(), ErrorKind::Changed);
    assert_eq!(shared.get("fc1.bias").unwrap_err().kind(), ErrorKind::Changed);
}

#[test]
fn models_and_layouts_are_gone_through_by_reference() {
    let model = Model::read("models/digits-sharded").unwrap();
    let names: Vec<_> = model.names().collect();
    assert_eq!((&model).into_iter().map(|tensor| tensor.name()).collect::<Vec<_>>(), names);
    let mut tensors = model.tensors();
    for left in (0..names.len()).rev() {
        assert!(tensors.next().is_some());
        assert_eq!(tensors.len(), left);
    }
    assert!(tensors.next().is_none() && tensors.next().is_none());

    let edited = ModelMut::read("models/digits-sharded").unwrap();
    assert_eq!((&edited).into_iter().count(), 4);

    let layout = model.layout(0).unwrap();
    let mut infos = layout.into_iter();
    assert_eq!(infos.len(), layout.len());
    assert_eq!(infos.next_back(), layout.at(layout.len() - 1));
    assert!(layout.into_iter().rev().eq((0..layout.len()).rev().filter_map(|i| layout.at(i))));
}

#[test]
fn a_layout_is_planned_and_a_selection_made_from_what_an_iterator_gives() {
    let model = Model::read("models/digits.safetensors").unwrap();
    let tensors = || model.tensors().map(|tensor| (tensor.name(), tensor.dtype(), tensor.shape()));
    let mut plan: LayoutBuilder = tensors().take(2).collect();
    plan.extend(tensors().skip(2));
    let planned = plan.build().unwrap();
    assert_eq!(planned.len(), model.len());
    for (name, dtype, shape) in tensors() {
        assert_eq!(planned.get(name).map(|info| (info.dtype(), info.shape())), Some((dtype, shape)));
    }

    let select: Select<'_> = model.names().filter(|name| name.ends_with("bias")).collect();
    assert_eq!(model.stream(StreamOptions::new().select(select)).unwrap().count(), 2);
}

#[test]
fn tensors_and_mappings_are_bytes_to_whoever_takes_those() {
    fn len(bytes: impl AsRef<[u8]>) -> usize {
        bytes.as_ref().len()
    }
    let mut model = ModelMut::read("models/digits.safetensors").unwrap();
    assert_eq!(len(model.tensor("fc1.bias").unwrap()), 256);
    assert_eq!(len(model.mapping(0).unwrap()), std::fs::read("models/digits.safetensors").unwrap().len());
    let mut bias = model.tensor_mut("fc1.bias").unwrap();
    bias.as_mut().fill(0);
    assert!(bias.as_ref().iter().all(|&byte| byte == 0));
}

#[cfg(feature = "serde")]
mod serialized {
    use super::*;
    use maptensors::diff;
    use serde::{Serialize, de::DeserializeOwned};

    fn there_and_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) -> String {
        let text = serde_json::to_string(value).unwrap();
        assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), value, "{text}");
        text
    }

    #[test]
    fn plain_answers_go_to_json_and_back() {
        for dtype in DType::ALL {
            assert_eq!(there_and_back(dtype), format!("{:?}", dtype.name()));
        }
        for kind in ErrorKind::ALL {
            assert_eq!(there_and_back(kind), format!("{:?}", kind.name()));
        }
        // SAFETY: nobody writes to the file.
        #[allow(unsafe_code)]
        let mut model = unsafe { ModelMut::open("models/digits.safetensors") }.unwrap();
        model.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[..3].fill(9.0);
        let changes = model.changed().unwrap();
        there_and_back(&changes);
        let text = serde_json::to_string(&changes).unwrap();
        let again: Changes = serde_json::from_str(&text).unwrap();
        assert_eq!(again.get("fc1.bias").map(|change| change.elements), Some(3));
        there_and_back(&model.residency().unwrap());
        there_and_back(&model.evict(..).unwrap());
        there_and_back(&diff(&Model::read("models/digits.safetensors").unwrap(), &model).unwrap());
        there_and_back(&[Split::COLUMN, Split::Replicate]);
        there_and_back(&[Verify::All, Verify::Never]);
        there_and_back(&[Advice::Random, Advice::HugePage]);
        there_and_back(&[Backing::Owned, Backing::CopyOnWrite]);
        there_and_back(&[Edited::InPlace, Edited::Rewritten]);
    }

    #[test]
    fn a_number_that_is_not_there_is_zero_and_a_dtype_that_is_none_an_error() {
        let pages: Residency = serde_json::from_str(r#"{"pages": 3}"#).unwrap();
        assert_eq!((pages.pages, pages.huge), (3, 0));
        let error = serde_json::from_str::<DType>("\"F128\"").unwrap_err();
        assert!(error.to_string().contains("such as"), "{error}");
    }

    #[test]
    fn a_layout_is_written_with_its_tensors() {
        let layout =
            Layout::builder().tensor("w", DType::F4, &[2, 3]).metadata("format", "pt").build().unwrap();
        let written = serde_json::to_value(&layout).unwrap();
        let tensor =
            serde_json::json!({"name": "w", "dtype": "F4", "shape": [2, 3], "offset": 0, "nbytes": 3});
        assert_eq!(
            written,
            serde_json::json!({"metadata": {"format": "pt"}, "data_start": 0, "data_len": 3, "tensors": [tensor]})
        );
    }
}
