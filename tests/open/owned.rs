//! Tensors that own their share of the memory, and models over memory that somebody else owns.

use maptensors::{Backing, Error, Index, Model, ModelMut, ModelRef};
use std::sync::Arc;

fn is_shareable<T: Clone + Send + Sync + 'static>(_: &T) {}

#[test]
fn a_tensor_outlives_its_model_and_a_part_of_it_the_tensor() {
    let model = Model::read("models/digits.safetensors").unwrap();
    let expected = model.tensor("fc1.weight").unwrap().to_vec::<f32>().unwrap();
    let weight = model.owned("fc1.weight").unwrap();
    let at = model.tensor("fc1.weight").unwrap().as_bytes().as_ptr();
    drop(model);
    is_shareable(&weight);
    assert_eq!(weight.as_bytes().unwrap().as_ptr(), at, "nothing is copied");
    assert_eq!(weight.view().unwrap().as_slice::<f32>().unwrap(), expected);
    let rows = weight.slice(&[Index::from(8..16)]).unwrap();
    let every_other = rows.slice(&[Index::from(..).step_by(2), Index::from(1..3)]).unwrap();
    drop((weight, rows.clone()));
    assert_eq!(rows.as_slice::<f32>().unwrap(), &expected[8 * 64..16 * 64]);
    assert_eq!((every_other.shape(), every_other.strides()), (&[4, 2][..], Some(&[128, 1][..])));
    assert!(every_other.view().is_none() && every_other.as_slice::<f32>().is_err());
    let found = every_other.to_vec::<f32>().unwrap();
    assert_eq!(found[2..4], expected[10 * 64 + 1..10 * 64 + 3]);
    assert_eq!(every_other.nbytes(), 32);
}

#[test]
fn a_model_is_not_edited_while_a_tensor_of_it_is_held() {
    let mut model = ModelMut::read("models/digits.safetensors").unwrap();
    let held = model.owned("fc1.bias").unwrap();
    assert!(model.tensor_mut("fc1.bias").is_err());
    let before = held.to_vec::<f32>().unwrap();
    drop(held);
    model.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[0] = before[0] + 1.0;
}

#[test]
fn models_over_bytes_of_others_copy_nothing_and_refuse_what_files_are_refused_for() {
    let bytes = std::fs::read("models/digits.safetensors").unwrap();
    let read = Model::read("models/digits.safetensors").unwrap();
    let owner: Arc<[u8]> = bytes.clone().into();
    let over = Model::over(owner.clone()).unwrap();
    let borrowed = ModelRef::new(&bytes).unwrap();
    assert_eq!(over.mapping(0).unwrap().backing(), Backing::Lent);
    for tensor in read.tensors() {
        let (lent, lying) = (over.tensor(tensor.name()).unwrap(), borrowed.tensor(tensor.name()).unwrap());
        assert_eq!((lent.as_bytes(), lying.as_bytes()), (tensor.as_bytes(), tensor.as_bytes()));
        assert!(owner.as_ptr_range().contains(&lent.as_bytes().as_ptr()));
        assert!(bytes.as_ptr_range().contains(&lying.as_bytes().as_ptr()));
    }
    assert_eq!(borrowed.tensors().count(), read.len());
    assert!(matches!(borrowed.tensor("fc1.bais"), Err(Error::Missing { .. })));
    // The owner lives as long as anything over it.
    let held = over.owned("fc2.bias").unwrap();
    drop((over, owner));
    assert_eq!(held.as_bytes().unwrap(), read.tensor("fc2.bias").unwrap().as_bytes());
    let cut = bytes[..bytes.len() - 1].to_vec();
    assert!(matches!(ModelRef::new(&cut), Err(Error::Truncated { .. })));
    assert!(matches!(Model::over(cut), Err(Error::Truncated { .. })));
    // Paged, diffed and saved like any other.
    let over = Model::over(bytes).unwrap();
    assert!(maptensors::diff(&over, &read).unwrap().is_empty());
    over.prefetch(..).unwrap().wait().unwrap();
    over.evict(..).unwrap();
    let dir = tempfile::tempdir().unwrap();
    over.save(dir.path().join("m.safetensors")).unwrap();
    assert!(
        maptensors::diff(&Model::read(dir.path().join("m.safetensors")).unwrap(), &read).unwrap().is_empty()
    );
}
