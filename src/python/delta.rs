//! Deltas, differences and checksums, of models and of files.

use super::changes::Changes;
use super::interrupt::{abandonable, interruptible};
use super::metadata::{Metadata, metadata as read_metadata};
use super::model::Model;
use super::open::{self, Files};
use super::parts::Parts;
use super::results::result;
use crate::delta::{apply_delta as apply, materialize_deltas, write_delta, write_diff};
use crate::diff::{Contents, Differences, compare_contents};
use crate::error::Error;
use crate::map::Backing;
use crate::model::Model as Opened;
use crate::model::{Into, Location, ModelMut, OpenOptions, Readable};
use crate::save::SaveOptions;
use pyo3::exceptions::PyUserWarning;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

fn options(metadata: Metadata, durable: bool, checksums: bool) -> SaveOptions {
    let options = SaveOptions::new().durable(durable).checksums(checksums);
    match metadata {
        Some(metadata) => options.all_metadata(metadata),
        None => options,
    }
}

/// Maps a model.
fn map(location: &Location, backing: Backing) -> Result<Opened, Error> {
    // SAFETY: the stable-file contract, which Python's documentation puts to the caller. These mappings live
    // no longer than the call, or become a model's like any other.
    unsafe { OpenOptions::new().map_files(location, backing) }.map(Opened::of)
}

/// A model to look at: one that is open, or files.
enum Given {
    Open(Arc<Parts>),
    Files(Files),
}

impl Given {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        match object.cast::<Model>() {
            Ok(model) => Ok(Self::Open(model.get().parts()?)),
            Err(_) => Ok(Self::Files(Files::of(object)?)),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&Contents<'_>) -> Result<T, Error>) -> Result<T, Error> {
        match self {
            Self::Open(parts) => parts.with_contents(work),
            Self::Files(files) => work(&map(&files.locate()?, Backing::ReadOnly)?.contents()),
        }
    }
}

/// Writes what changed in `model` since it was opened (or `mark()`) to a delta file at `path`.
///
/// The file the model was opened from is not read, if it carries checksums; nobody may write to the model's
/// arrays meanwhile. `path` may not lead to a file of the model, nor to another model.
#[pyfunction]
#[pyo3(signature = (model, path, *, metadata = None, durable = true, checksums = false))]
pub(super) fn save_delta(
    py: Python<'_>,
    model: &Bound<'_, Model>,
    path: PathBuf,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    durable: bool,
    checksums: bool,
) -> PyResult<()> {
    let parts = model.get().parts()?;
    let options = options(metadata, durable, checksums);
    Ok(interruptible(py, || parts.with_contents(|contents| write_delta(contents, &path, &options)))??)
}

/// Writes what turns `a` into `b` (models or paths) to a delta file at `path`. Compares all of both.
///
/// `path` may not lead to a file of either, nor to another model.
#[pyfunction]
#[pyo3(signature = (a, b, path, *, metadata = None, durable = true, checksums = false))]
pub(super) fn save_diff(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    path: PathBuf,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    durable: bool,
    checksums: bool,
) -> PyResult<()> {
    let (a, b) = (Given::of(a)?, Given::of(b)?);
    let options = options(metadata, durable, checksums);
    Ok(interruptible(py, || a.with(|a| b.with(|b| write_diff(a, b, &path, &options))))??)
}

/// How `b` differs from `a` (models or paths): `Differences`, with `equal`, `changed` (`Changes`), `added` and `removed`
/// (names), `reshaped` (name to dtype and shape in `a` and in `b`), `metadata` (keys) and `compared`.
#[pyfunction]
pub(super) fn diff<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let (a, b) = (Given::of(a)?, Given::of(b)?);
    let found = interruptible(py, || a.with(|a| b.with(|b| Ok(compare_contents(a, b, false).report()))))??;
    let reshaped = PyDict::new(py);
    for tensor in &found.reshaped {
        let side = |(dtype, shape): &(crate::dtype::DType, Vec<usize>)| -> PyResult<_> {
            Ok((dtype.name(), pyo3::types::PyTuple::new(py, shape)?))
        };
        reshaped.set_item(&tensor.name, (side(&tensor.from)?, side(&tensor.to)?))?;
    }
    let equal = found.is_empty();
    let Differences { changed, added, removed, metadata, compared, .. } = found;
    let changed = Changes::from(changed);
    result(py, "Differences", (equal, changed, added, removed, reshaped, metadata, compared))
}

/// The delta files of an argument: a path or a list of them, each one file.
fn deltas(given: &Bound<'_, PyAny>) -> PyResult<Vec<PathBuf>> {
    Ok(match Files::of(given)? {
        Files::One(path) => vec![path],
        Files::Many(paths) => paths,
    })
}

fn opened(deltas: &[PathBuf]) -> Result<Vec<Opened>, Error> {
    deltas.iter().map(|path| map(&Location::files(vec![path.clone()]), Backing::ReadOnly)).collect()
}

/// Opens `base` and applies a delta, or a list of them in order, in memory. The files do not change.
///
/// Another base is refused. One that carries checksums is known by them, without being read: `verify` tells
/// whether they are true. A delta that adds, removes or reshapes tensors makes the model anew in memory.
///
/// `base` must be what the first delta was made against, and each further delta made against the result of the
/// one before. `mode` and `backend` are those of `open`.
#[pyfunction]
#[pyo3(signature = (base, delta, mode = "c", *, backend = "mmap"))]
pub(super) fn apply_delta(
    py: Python<'_>,
    base: &Bound<'_, PyAny>,
    delta: &Bound<'_, PyAny>,
    mode: &str,
    backend: &str,
) -> PyResult<Model> {
    let (mode, mapped) = (open::mode(mode)?, open::is_mapped(backend)?);
    let (base, deltas) = (Files::of(base)?, deltas(delta)?);
    let model = interruptible(py, || -> Result<_, Error> {
        let location = base.locate()?;
        let base = if mapped {
            map(&location, Backing::CopyOnWrite)?
        } else {
            Opened::of(OpenOptions::new().read_into(Readable::Files(location), Into::Owned)?)
        };
        Ok(apply(ModelMut::new(base, false), &opened(&deltas)?)?.into_model().into_parts().shared())
    })??;
    Ok(Model::new(model, mode, false))
}

/// Writes the model that `base` and `deltas` (a path or a list, in order) make to one file at `out`.
///
/// Starts from a copy of the base that shares its blocks where the file system can, so that only what changed
/// takes space and time. Returns whether blocks are shared. `out` may not lead to the base or to a delta, which would
/// be lost.
#[pyfunction]
#[pyo3(signature = (base, deltas, out, *, durable = true))]
pub(super) fn materialize(
    py: Python<'_>,
    base: &Bound<'_, PyAny>,
    deltas: &Bound<'_, PyAny>,
    out: PathBuf,
    durable: bool,
) -> PyResult<bool> {
    let (base, deltas) = (Files::of(base)?, self::deltas(deltas)?);
    Ok(abandonable(py, move || -> Result<_, Error> {
        let base = ModelMut::new(map(&base.locate()?, Backing::CopyOnWrite)?, false);
        materialize_deltas(base, &opened(&deltas)?, &out, &SaveOptions::new().durable(durable))
    })??)
}

/// Checks every tensor of a model (or path) against the checksum that its file carries. Raises
/// `ChecksumError`, whose `tensors` names those that differ; a file without checksums is an error too.
///
/// Warns where an index's `metadata.total_size` is not the bytes that the tensors take, which harms nobody.
#[pyfunction]
pub(super) fn verify(py: Python<'_>, model: &Bound<'_, PyAny>) -> PyResult<()> {
    let given = Given::of(model)?;
    let (verified, misstated) = interruptible(py, || -> Result<_, Error> {
        given.with(|contents| Ok((contents.verify(), contents.catalog.misstated_size())))
    })??;
    if let Some((found, expected)) = misstated {
        let text = format!("the index says total_size {found}, but the tensors take {expected} bytes");
        let text = std::ffi::CString::new(text).unwrap_or_default();
        PyErr::warn(py, &py.get_type::<PyUserWarning>(), &text, 1)?;
    }
    Ok(verified?)
}
