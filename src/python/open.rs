//! From Python's arguments to an open model.

use super::model::Model;
use crate::error::Error;
use crate::map::Backing;
use crate::model::{self, Model as Opened, OpenOptions, Place, locate};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use std::path::PathBuf;

/// The files that an argument names.
pub(super) enum Files {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl Files {
    pub(super) fn of(path: &Bound<'_, PyAny>) -> PyResult<Self> {
        static PATH_LIKE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let is_path = path.is_instance_of::<pyo3::types::PyString>()
            || path.is_instance_of::<pyo3::types::PyBytes>()
            || path.is_instance(PATH_LIKE.import(path.py(), "os", "PathLike")?)?;
        // Bytes too: a file's name need not be text.
        let decode = |path: &Bound<'_, PyAny>| -> PyResult<PathBuf> {
            path.py().import("os")?.call_method1("fsdecode", (path,))?.extract()
        };
        if is_path {
            return Ok(Self::One(decode(path)?));
        }
        let paths: PyResult<Vec<_>> = path.try_iter().and_then(|paths| paths.map(|p| decode(&p?)).collect());
        Ok(Self::Many(
            paths.map_err(|_| {
                PyTypeError::new_err("path is a str, bytes, an os.PathLike, or a list of them")
            })?,
        ))
    }

    pub(super) fn place(&self) -> Result<Place, Error> {
        match self {
            Self::One(path) => locate(path),
            Self::Many(paths) => Ok(Place::files(paths)),
        }
    }
}

/// "r" or "c".
pub(super) fn mode(mode: &str) -> PyResult<&'static str> {
    match mode {
        "r" => Ok("r"),
        "c" => Ok("c"),
        other => Err(PyValueError::new_err(format!("mode is \"r\" or \"c\", not {other:?}"))),
    }
}

/// Whether a backend maps.
pub(super) fn is_mapped(backend: &str) -> PyResult<bool> {
    match backend {
        "mmap" => Ok(true),
        "pread" => Ok(false),
        other => Err(PyValueError::new_err(format!("backend is \"mmap\" or \"pread\", not {other:?}"))),
    }
}

/// Opens a model: a file, a directory, an index, or a list of files.
///
/// `mode` is `"c"`, copy-on-write (arrays may be written, the file never changes), or `"r"`, read-only.
/// `backend="pread"` reads everything into memory of its own instead of mapping it. `populate` reads all
/// pages in at once, so that an I/O error shows here. `dense_edits` is for fine-tuning a whole model: each
/// tensor of 2 MiB or more becomes this process's own in bulk when it is first taken, several times as fast
/// as page by page when it is written. `verify="all"` holds every tensor against the checksum that the file
/// carries, which reads everything.
#[pyfunction]
#[pyo3(signature = (path, mode = "c", *, backend = "mmap", populate = false, dense_edits = false, verify = "never"))]
#[allow(clippy::too_many_arguments)] // Python's keyword arguments
pub(super) fn open(
    py: Python<'_>,
    path: &Bound<'_, PyAny>,
    mode: &str,
    backend: &str,
    populate: bool,
    dense_edits: bool,
    verify: &str,
) -> PyResult<Model> {
    let (mode, mapped) = (self::mode(mode)?, is_mapped(backend)?);
    let options = OpenOptions::new().populate(populate).verify(what_to_verify(verify)?);
    let files = Files::of(path)?;
    let opened = py.detach(|| -> Result<Opened, Error> {
        let place = files.place()?;
        if !mapped {
            return options.read_place(&place);
        }
        let backing = if mode == "r" { Backing::ReadOnly } else { Backing::CopyOnWrite };
        // SAFETY: the stable-file contract, which Python's documentation of `open` puts to the caller; no
        // `&[u8]` of the mapping outlives this statement.
        unsafe { options.open_place(&place, backing) }
    })?;
    Ok(Model::new(opened, mode, dense_edits))
}

/// A model from the bytes of a file, copied once into aligned memory.
#[pyfunction]
pub(super) fn load_bytes(py: Python<'_>, data: &[u8]) -> PyResult<Model> {
    Ok(Model::new(py.detach(|| Opened::from_bytes(data))?, "c", false))
}

/// "never" or "all".
pub(super) fn what_to_verify(verify: &str) -> PyResult<model::Verify> {
    match verify {
        "never" => Ok(model::Verify::Never),
        "all" => Ok(model::Verify::All),
        other => Err(PyValueError::new_err(format!("verify is \"never\" or \"all\", not {other:?}"))),
    }
}
