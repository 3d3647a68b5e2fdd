//! A whole file of an edited model, from a copy of the one it was opened from.

use super::apply;
use crate::diff::digest::CHECKSUMS;
use crate::diff::{Span, Until};
use crate::error::{Error, Result};
use crate::format::safetensors;
use crate::map::{Backing, Memory as _, RawSlice};
use crate::model::{Model, ModelMut};
use crate::os;
use crate::save::over::Made;
use crate::save::{Pending, SaveOptions, checksum, model_may_be_at};
use crate::work;
use std::fs::File;
use std::path::Path;

/// Applies deltas to a base and writes the model that they make; whether blocks are shared with the base.
pub(crate) fn materialize_deltas(
    base: ModelMut,
    deltas: &[Model],
    path: &Path,
    options: &SaveOptions,
) -> Result<bool> {
    {
        let contents: Vec<_> = std::iter::once(&*base).chain(deltas).map(Model::contents).collect();
        Made::Result.may_be_at(path, &contents.iter().collect::<Vec<_>>())?;
    }
    materialize(&apply(base, deltas)?, path, options)
}

/// As [`ModelMut::materialize`].
pub(super) fn materialize(model: &ModelMut, path: &Path, options: &SaveOptions) -> Result<bool> {
    model_may_be_at(path, &model.contents())?;
    if let Some(file) = origin(model).filter(|_| options.max_shard_size.is_none())
        && let Some(header) = header(model, options, path)?
    {
        return from_copy(model, &file, &header, path, options);
    }
    let mut options = options.clone();
    options.metadata = model.has_metadata().then(|| model.metadata().clone());
    options.save(model.tensors().map(|tensor| (tensor.name(), tensor)), path)?;
    Ok(false)
}

/// The file that is mapped, if there is exactly one and its name still leads to it.
fn origin(model: &ModelMut) -> Option<File> {
    let mapping = model.mapping(0).filter(|mapping| mapping.backing() == Backing::CopyOnWrite)?;
    mapping.base().filter(|_| model.shards() == 1)?;
    let (file, len) = os::open_regular(model.path(0)?).ok()?;
    (mapping.is_of(&file) && len == mapping.len() as u64).then_some(file)
}

/// The header to write: as long as the old one, or none.
fn header(model: &ModelMut, options: &SaveOptions, path: &Path) -> Result<Option<Vec<u8>>> {
    let Some(layout) = model.layout(0) else { return Ok(None) };
    if options.draft.wants_checksums() || layout.metadata().contains_key(CHECKSUMS) {
        let sums = model.contents().sums(Until::Now)?;
        return safetensors::encode_placed(&checksum::stated(layout, &sums), path);
    }
    safetensors::encode_placed(layout, path)
}

fn from_copy(
    model: &ModelMut,
    file: &File,
    header: &[u8],
    path: &Path,
    options: &SaveOptions,
) -> Result<bool> {
    let pending = Pending::create(path)?;
    let Some(mapping) = model.mapping(0) else { return Ok(false) };
    let copied = os::clone_or_copy(file, pending.file().file(), mapping.len() as u64);
    let shared = copied.map_err(Error::io(path, "copying the file it was opened from"))?;
    let page = rustix::param::page_size();
    let (found, _) = model.contents().differences(Span::SinceFile, false)?;
    let mut jobs: Vec<(usize, RawSlice<'_>)> = vec![(0, RawSlice::from(header))];
    if mapping.base().is_some_and(|base| holds(&base, header)) {
        jobs.clear();
    }
    for found in &found {
        let range = found.info.bytes();
        for pages in found.difference.pages(found.info.offset()) {
            let part = (pages.start * page).max(range.start)..(pages.end * page).min(range.end);
            jobs.push((part.start, mapping.now().part(part)));
        }
    }
    work::each_in_parallel(jobs, |(at, source): (usize, RawSlice<'_>)| {
        work::cancel::check()?;
        source.write_to(0..source.len(), pending.file().file(), at as u64)
    })
    .map_err(Error::io(path, "writing what changed"))?;
    pending.publish_model(options.draft.is_durable())?;
    Ok(shared)
}

/// Whether these bytes start with that header.
fn holds(bytes: &RawSlice<'_>, header: &[u8]) -> bool {
    let mut start = vec![0; header.len()];
    bytes.copy_to(0..header.len(), &mut start);
    start == header
}
