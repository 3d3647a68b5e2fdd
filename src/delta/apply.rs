//! From a base and deltas to the result, in memory.

use super::decode::{Delta, Part};
use super::invalid;
use crate::diff::Until;
use crate::diff::digest::{self, CHECKSUMS};
use crate::error::{Error, Result};
use crate::layout::{Catalog, Metadata, Shard};
use crate::layout::{Layout, TensorInfo};
use crate::map::{Mapping, RawSlice};
use crate::model::{Model, ModelMut};
use crate::save::{Target, fill};
use crate::tensor::TensorViewMut;
use crate::work;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

/// As [`apply_delta`](crate::apply_delta).
pub(crate) fn apply(mut model: ModelMut, deltas: &[Model]) -> Result<ModelMut> {
    let deltas: Vec<Delta<'_>> = deltas.iter().map(Delta::parse).collect::<Result<_>>()?;
    let Some(last) = deltas.last() else { return Ok(model) };
    let mut id = identity(&model)?.1;
    for delta in &deltas {
        if delta.base != id {
            return Err(Error::Base {
                path: delta.path.into(),
                base: model.path(0).unwrap_or(Path::new("")).into(),
                found: digest::hex(id),
                expected: digest::hex(delta.base),
            });
        }
        id = delta.result;
    }
    for delta in &deltas {
        model = apply_one(model, delta)?;
    }
    let (sums, found) = identity(&model)?;
    if found != last.result {
        let (found, expected) = (digest::hex(found), digest::hex(last.result));
        let what = format!("what comes out is {found}, and was to be {expected}: it is damaged");
        return Err(invalid(last.path, "", what));
    }
    let mut metadata = last.metadata.clone().map(Metadata::from);
    if last.checksums {
        let text = digest::encode(model.names().zip(sums));
        metadata.get_or_insert_default().insert(CHECKSUMS, text);
    }
    model.set_metadata(metadata);
    Ok(model)
}

/// The checksums and the identity of a model as it is now.
fn identity(model: &ModelMut) -> Result<(Vec<u128>, u128)> {
    let contents = model.contents();
    let sums = contents.sums(Until::Now)?;
    let id = contents.id(&sums);
    Ok((sums, id))
}

fn apply_one(mut model: ModelMut, delta: &Delta<'_>) -> Result<ModelMut> {
    let mut removed: HashSet<&str> = HashSet::new();
    for name in &delta.removed {
        if !removed.insert(name) {
            return Err(invalid(delta.path, name, "it is removed twice"));
        }
        if !model.contains(name) {
            return Err(invalid(delta.path, name, "it is removed, but not there"));
        }
    }
    for (name, part) in &delta.tensors {
        if removed.contains(name) {
            return Err(invalid(delta.path, name, "it is removed and changed"));
        }
        if matches!(part, Part::Edits(_)) && !model.contains(name) {
            return Err(invalid(delta.path, name, "it is changed, but not there"));
        }
    }
    if changes_layout(&model, delta) {
        model = rebuilt(&model, delta)?;
    }
    let parts: HashMap<&str, &Part<'_>> = delta.tensors.iter().map(|(name, part)| (*name, part)).collect();
    let views = model.some_tensors_mut(|name| parts.contains_key(name))?;
    let jobs: Vec<(&Part<'_>, TensorViewMut<'_>)> =
        views.into_iter().filter_map(|view| Some((*parts.get(view.name())?, view))).collect();
    work::each_in_parallel(jobs, |(part, mut view): (&Part<'_>, TensorViewMut<'_>)| match part {
        Part::Whole(whole) => {
            view.as_bytes_mut().copy_from_slice(whole.as_bytes());
            Ok(())
        }
        Part::Edits(edits) => edits.apply(delta.path, &view.info(), view.as_bytes_mut()),
    })?;
    Ok(model)
}

/// Whether a tensor is one of the same name, dtype and shape.
fn is_like(new: &TensorInfo<'_>, old: Option<TensorInfo<'_>>) -> bool {
    old.is_some_and(|old| (old.dtype(), old.shape()) == (new.dtype(), new.shape()))
}

fn changes_layout(model: &Model, delta: &Delta<'_>) -> bool {
    let changes = |(name, part): &(&str, Part<'_>)| match part {
        Part::Whole(whole) => !is_like(&whole.info(), model.info(name)),
        Part::Edits(_) => false,
    };
    !delta.removed.is_empty() || delta.tensors.iter().any(changes)
}

/// The model in memory of its own, with the tensors that the delta's result has; those it changes are yet to
/// be written.
fn rebuilt(model: &Model, delta: &Delta<'_>) -> Result<ModelMut> {
    let removed: HashSet<&str> = delta.removed.iter().map(String::as_str).collect();
    let mut wholes: HashMap<&str, TensorInfo<'_>> = HashMap::new();
    for (name, part) in &delta.tensors {
        if let Part::Whole(whole) = part {
            wholes.insert(name, whole.info());
        }
    }
    let mut builder = Layout::builder();
    for view in model.tensors().filter(|view| !removed.contains(view.name())) {
        let info = wholes.get(view.name()).copied().unwrap_or(view.info());
        builder = builder.tensor(view.name(), info.dtype(), info.shape());
    }
    for (name, info) in delta.tensors.iter().filter_map(|(name, _)| Some((*name, wholes.get(name)?))) {
        if !model.contains(name) {
            builder = builder.tensor(name, info.dtype(), info.shape());
        }
    }
    let layout = builder.build()?;
    let path = model.path(0).unwrap_or(Path::new("")).to_owned();
    let mut memory = Mapping::owned(layout.data_range().end, 0)
        .map_err(Error::io(&path, "allocating memory for the model"))?;
    let kept = layout.iter().filter(|info| !wholes.contains_key(info.name()));
    let source = |info: TensorInfo<'_>| {
        let view = model.tensor(info.name())?;
        Ok((info.bytes().start, RawSlice::from(view.as_bytes())))
    };
    // What the base lacks is among the delta's own.
    let jobs = kept.filter(|info| model.contains(info.name())).map(source).collect::<Result<Vec<_>>>()?;
    fill(Target::Memory(memory.as_bytes_mut()), jobs, &|_| ())
        .map_err(Error::io(&path, "copying tensor data"))?;
    let catalog = Catalog::new(vec![Shard { path, layout }])?;
    Ok(ModelMut::new(Model::new(catalog, vec![Arc::new(memory)]), false))
}
