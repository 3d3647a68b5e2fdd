//! What a user of the crate may do with its types, whatever is in them.

use maptensors::{
    Advice, AttachOptions, Backing, Change, Changes, CheckpointOptions, DType, Differences, DraftOptions,
    Edited, Error, ErrorKind, Evicted, HeaderEdit, Index, Layout, LayoutBuilder, MapOptions, Model, ModelMut,
    OpenOptions, Order, Publication, PublishOptions, Ready, Refreshed, Reshaped, Residency, SaveOptions,
    Select, ShardPlan, Split, StreamOptions, TensorInfo, Verify,
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
    is_an_option::<ShardPlan<'_>>();
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
    let boxed: Box<dyn std::error::Error + Send + Sync> = Model::from_bytes(b"").unwrap_err().into();
    assert_eq!(boxed.downcast_ref::<Error>().map(Error::kind), Some(ErrorKind::Truncated));
}

#[test]
fn a_kind_of_error_has_the_name_of_its_variant_and_of_pythons_class() {
    let classes = include_str!("../python/maptensors/errors.py");
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
        ShardPlan::new().when(|name| name.ends_with(&suffix), Split::Replicate).otherwise(Split::COLUMN);
    let (mine, theirs) = (select.clone(), plan.clone());
    drop((select, plan));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let options = StreamOptions::new().select(mine).clone();
            model.stream(options).unwrap().map(|tensor| tensor.unwrap().name().to_owned()).collect::<Vec<_>>()
        });
        assert_eq!(other.join().unwrap(), ["fc1.bias", "fc2.bias"]);
    });
    assert_eq!(model.shard(1, 2, &theirs).unwrap().tensor("fc1.weight").unwrap().shape(), [32, 64]);
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
