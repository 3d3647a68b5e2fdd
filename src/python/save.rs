//! Saving what Python holds.

use super::import::{self, Data, Given, collect};
use super::interrupt::{LONG, abandonable, interruptible};
use super::metadata::{Metadata, entries, metadata as read_metadata};
use super::model::Model;
use super::tensor::Tensor;
use crate::diff::digest::CHECKSUMS;
use crate::error::Error;
use crate::format::safetensors;
use crate::layout::Layout;
use crate::map::RawSlice;
use crate::os::disk::Dir;
use crate::save as saving;
use crate::save::sharded::{Locked, save_in};
use crate::save::{
    Commit, DraftOptions, Edited, HeaderEdit, Later, Target, checksum, fill, model_may_be_at, nbytes, place,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where each contiguous array goes.
fn jobs<'a>(layout: &Layout, tensors: &'a [(String, Given)]) -> Vec<(usize, RawSlice<'a>)> {
    tensors.iter().filter_map(|(name, given)| Some((layout.position(name)?, given.data.source()?))).collect()
}

/// Writes tensors to `path` and returns true. With `distinct`, tensors that share memory or do not lie in
/// one piece on the CPU make it return false, and nothing is written.
///
/// One file, or with `max_shard_size` as many as needed and an index.
#[pyfunction]
#[pyo3(signature = (tensors, path, *, metadata = None, durable = true, mapped = true, max_shard_size = None, checksums = false, distinct = false))]
#[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // Python's keyword arguments
pub(super) fn save(
    py: Python<'_>,
    tensors: &Bound<'_, PyAny>,
    path: PathBuf,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    durable: bool,
    mapped: bool,
    max_shard_size: Option<u64>,
    checksums: bool,
    distinct: bool,
) -> PyResult<bool> {
    if let Ok(model) = tensors.cast::<Model>() {
        let parts = model.get().parts()?;
        py.detach(|| parts.with_contents(|contents| model_may_be_at(&path, contents)))?;
    }
    let tensors = collect(tensors)?;
    if distinct && !are_distinct(&tensors) {
        return Ok(false);
    }
    let options = DraftOptions::new().durable(durable).mapped(mapped).checksums(checksums);
    let write = |part: Range<usize>, path: &Path, dir: Option<&Arc<Dir>>| -> PyResult<()> {
        let options = dir.map_or_else(|| options.clone(), |dir| options.within(dir));
        let tensors = &tensors[part];
        let commit = stage_one(py, tensors, path, &metadata, &options)?;
        // Unmapping takes its time as well.
        let commit = move || commit().map(drop);
        Ok(if is_long(tensors) { abandonable(py, commit)? } else { py.detach(commit) }?)
    };
    match max_shard_size {
        None => write(0..tensors.len(), &path, None)?,
        Some(limit) => {
            // Checksums are those of each file.
            let mut shared = metadata.clone();
            if let Some(shared) = &mut shared {
                shared.remove(CHECKSUMS);
            }
            let write = |part, path: &Path, dir: &Arc<Dir>| write(part, path, Some(dir));
            // Whoever has the directory locked may need the interpreter to finish.
            let locked = py.detach(|| Locked::wait(&path))?;
            save_in(locked, &saving::sizes(&tensors), &path, limit, shared.as_ref(), durable, write)?;
        }
    }
    Ok(true)
}

/// Changes metadata and tensor names in a file's header; says how.
#[pyfunction]
#[pyo3(signature = (path, *, metadata = BTreeMap::new(), remove = Vec::new(), rename = BTreeMap::new(), durable = true))]
pub(super) fn edit(
    py: Python<'_>,
    path: PathBuf,
    #[pyo3(from_py_with = entries)] metadata: BTreeMap<String, String>,
    remove: Vec<String>,
    rename: BTreeMap<String, String>,
    durable: bool,
) -> PyResult<&'static str> {
    let mut edit = HeaderEdit::new().durable(durable);
    for (key, value) in metadata {
        edit = edit.metadata(key, value);
    }
    for key in remove {
        edit = edit.remove(key);
    }
    for (tensor, name) in rename {
        edit = edit.rename(tensor, name);
    }
    Ok(match abandonable(py, move || edit.apply(&path))?? {
        Edited::InPlace => "in place",
        Edited::Rewritten => "rewritten",
        Edited::Unchanged => "unchanged",
    })
}

/// Whether saving these takes so long that somebody may interrupt it.
pub(super) fn is_long(tensors: &[(String, Given)]) -> bool {
    saving::total(&saving::sizes(tensors)) >= LONG
}

/// Whether every tensor lies in one piece of CPU memory that no other has a part in.
fn are_distinct(tensors: &[(String, Given)]) -> bool {
    let mut spans = Vec::with_capacity(tensors.len());
    for (_, given) in tensors {
        match &given.data {
            Data::Ready { len: 0, .. } => {}
            Data::Ready { ptr, len, .. } => spans.push((ptr.addr(), ptr.addr() + len)),
            Data::Strided(_) => return false,
        }
    }
    spans.sort_unstable();
    spans.windows(2).all(|pair| pair[0].1 <= pair[1].0)
}

/// Makes a file, up to its commit.
fn stage_one(
    py: Python<'_>,
    tensors: &[(String, Given)],
    path: &Path,
    metadata: &Metadata,
    options: &DraftOptions,
) -> PyResult<Commit> {
    let staged = stage(py, tensors, || {
        saving::stage(options.create(path, &saving::plan(tensors, metadata.as_ref())?)?, tensors)
    })?;
    bring(py, tensors, &staged.later)?;
    Ok(staged.commit)
}

/// Copies what lies in memory: `stage` does, outside the interpreter.
pub(super) fn stage<T: Send>(
    py: Python<'_>,
    tensors: &[(String, Given)],
    stage: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    let staged = if is_long(tensors) { interruptible(py, stage)? } else { py.detach(stage) }?;
    // Ctrl-C while the data was copied: nothing is visible yet, and what was staged cleans up.
    py.check_signals()?;
    Ok(staged)
}

/// Has the rest written by its own framework, straight into the file's pages.
pub(super) fn bring(py: Python<'_>, tensors: &[(String, Given)], later: &[Later]) -> PyResult<()> {
    for place in later {
        let Some((name, given)) = tensors.get(place.tensor) else { continue };
        if let Data::Strided(array) = &given.data {
            let (memory, offset) = (place.memory.clone(), place.offset);
            let to = Tensor::whole(memory, offset, given.dtype, &given.shape, name, false);
            import::copy(py, &to.array(), array.bind(py))?;
            place.progress.add(nbytes(given));
            py.check_signals()?;
        }
    }
    Ok(())
}

/// The length of the file that tensors, or a spec of them as for `create`, would make.
#[pyfunction]
#[pyo3(signature = (spec, *, metadata = None))]
pub(super) fn planned_size(
    spec: &Bound<'_, PyAny>,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
) -> PyResult<u64> {
    let layout = super::draft::planned(spec, metadata)?;
    Ok(safetensors::encode(&layout, Path::new(""))?.1.file_len())
}

/// The bytes of a file.
#[pyfunction]
#[pyo3(signature = (tensors, *, metadata = None, checksums = false))]
pub(super) fn dumps<'py>(
    py: Python<'py>,
    tensors: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    checksums: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let mut tensors = collect(tensors)?;
    for (name, array) in &mut tensors {
        // Bytes have no pages for a framework to write to: one tensor is gathered first.
        if let Data::Strided(object) = &array.data {
            *array = array.gathered(py, name, object)?;
        }
    }
    let (header, layout) = py.detach(|| {
        let layout = saving::plan(&tensors, metadata.as_ref())?;
        let declared = checksum::declare(&layout, checksums);
        safetensors::encode(declared.as_ref().unwrap_or(&layout), Path::new(""))
    })?;
    PyBytes::new_with(py, layout.data_range().end, |bytes| {
        bytes[..header.len()].copy_from_slice(&header);
        let placed = place(&layout, jobs(&layout, &tensors), Path::new(""))?;
        let copy = || fill(Target::Memory(bytes), placed, &|_| ());
        let copied = if is_long(&tensors) { interruptible(py, copy)? } else { py.detach(copy) };
        copied.map_err(Error::io(Path::new(""), "copying tensor data"))?;
        if layout.metadata().contains_key(CHECKSUMS) {
            let written = RawSlice::from(&*bytes);
            let header = checksum::header(&layout, Path::new(""), |range, to| {
                written.copy_to(range, to);
                Ok(())
            })?;
            bytes[..header.len()].copy_from_slice(&header);
        }
        Ok(())
    })
}
