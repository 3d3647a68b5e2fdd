//! From Python's arguments to an open model.

use super::interrupt::interruptible;
use super::model::Model;
use crate::diff;
use crate::error::Error;
use crate::map::{Backing, SharedMemory};
use crate::model::{Assembled, Into, Location, OpenOptions, Readable, locate};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyMemoryView, PyType};
use std::path::PathBuf;

type Opened = Assembled<SharedMemory>;

/// The files that an argument names.
pub(super) enum Files {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl Files {
    pub(super) fn of(path: &Bound<'_, PyAny>) -> PyResult<Self> {
        static PATH_LIKE: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let is_path = path.is_instance_of::<pyo3::types::PyString>()
            || path.is_instance_of::<PyBytes>()
            || path.is_instance(PATH_LIKE.import(path.py(), "os", "PathLike")?)?;
        // Bytes too: a file's name need not be text.
        let decode = |path: &Bound<'_, PyAny>| -> PyResult<PathBuf> {
            path.py().import("os")?.call_method1("fsdecode", (path,))?.extract()
        };
        if is_path {
            return Ok(Self::One(decode(path)?));
        }
        // A file object is iterable, by its lines.
        if path.hasattr("read")? {
            return Err(PyTypeError::new_err(format!(
                "path is a str, bytes or an os.PathLike, not an open file ({}): give its path, or its content to maptensors.loads",
                class_name(path)
            )));
        }
        let paths: PyResult<Vec<_>> = path.try_iter().and_then(|paths| paths.map(|p| decode(&p?)).collect());
        Ok(Self::Many(
            paths.map_err(|_| {
                PyTypeError::new_err("path is a str, bytes, an os.PathLike, or a list of them")
            })?,
        ))
    }

    pub(super) fn locate(&self) -> Result<Location, Error> {
        match self {
            Self::One(path) => locate(path),
            Self::Many(paths) => Ok(Location::files(paths.clone())),
        }
    }
}

/// How a model is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// Its file is mapped.
    Mmap,
    /// It is read into this process's own memory.
    Pread,
    /// It is read into sealed memory, which is mapped.
    Memfd,
}

fn backend(backend: &str) -> PyResult<Backend> {
    match backend {
        "mmap" => Ok(Backend::Mmap),
        "pread" => Ok(Backend::Pread),
        "memfd" => Ok(Backend::Memfd),
        other => {
            Err(PyValueError::new_err(format!("backend is \"mmap\", \"pread\" or \"memfd\", not {other:?}")))
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

/// Opens a model: a file, a directory, an index, or a list of files. A directory with a file and an index of one name
/// (`model.safetensors`, `model.safetensors.index.json`) is refused, unless they are one model: name one of them.
///
/// `mode` is `"c"`, copy-on-write (arrays may be written, the file never changes), `"r"`, read-only, or `"r+"`:
/// arrays are the file's pages, shared. What is written to them reaches the file, and everyone who maps or reads it,
/// at once; `model.flush()` has it reach the disk. The header, checksums in it included, stays as it is.
///
/// `backend="pread"` reads everything into the process's own memory instead of mapping it. `backend="memfd"` reads it into
/// sealed memory and maps that: as independent of the file, with pages that forked children share, and `changed()`
/// works. `populate` reads all pages in at once, so that an I/O error shows here. `lock` has them stay in RAM
/// (`LimitError` where `RLIMIT_MEMLOCK` does not allow it). `reserve_swap` has the kernel promise memory for every page
/// that may be edited, all at once; otherwise it is for the tensors that are taken to be written. `huge_pages=False` asks for none. `dense_edits` is for fine-tuning a whole model: each
/// tensor of 2 MiB or more becomes this process's own in bulk when it is first taken, several times as fast
/// as page by page when it is written; it has no meaning in `"r+"`. `verify="all"` checks every tensor against the
/// checksum that the file carries, which reads everything. `offset` and `length`, in bytes, are the part of the file
/// that is the model, for one inside a tar or an uncompressed zip archive.
///
/// `guard=True` keeps the files open and looks at each access through the model (`model[name]`, `model.numpy()`,
/// iterating, `stream()`, `rank_view()`, `changed()`, saving) whether their size and time of writing are as they were (in `"r+"` the size alone);
/// if not, `ChangedError` is raised. So does a `Tensor` each time it becomes an array, a buffer, a capsule or `bytes`, is
/// assigned to or saved. The tensor's pages are read in before it is handed out, so that an I/O error
/// is an `OSError`. What is already out can still suffer: after a truncation, touching it is `SIGBUS`; bytes
/// overwritten in the file show in pages that this process has not written; and a page that the kernel
/// dropped for want of memory, and cannot read again, is `SIGBUS` too. `"pread"` and `"memfd"` know none of that.
#[pyfunction]
#[pyo3(signature = (path, mode = "c", *, backend = "mmap", populate = false, dense_edits = false, verify = "never", lock = false, reserve_swap = false, huge_pages = true, offset = 0, length = None, guard = false))]
#[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // Python's keyword arguments
pub(super) fn open(
    py: Python<'_>,
    path: &Bound<'_, PyAny>,
    mode: &str,
    backend: &str,
    populate: bool,
    dense_edits: bool,
    verify: &str,
    lock: bool,
    reserve_swap: bool,
    huge_pages: bool,
    offset: u64,
    length: Option<u64>,
    guard: bool,
) -> PyResult<Model> {
    let (edited, backend) = (mode == "r+", self::backend(backend)?);
    let mode = if edited { "r+" } else { self::mode(mode).map_err(|_| not_a_mode(mode))? };
    if edited && backend != Backend::Mmap {
        return Err(PyValueError::new_err(
            "mode \"r+\" edits the file itself, which only backend=\"mmap\" has in memory",
        ));
    }
    let mut options = OpenOptions::new()
        .populate(populate)
        .verify(what_to_verify(verify)?)
        .lock(lock)
        .huge_pages(huge_pages)
        .guard(guard);
    if reserve_swap {
        options = options.reserve_swap(true);
    }
    options = match length.map(|length| offset.checked_add(length)) {
        None if offset == 0 => options,
        None => options.window(offset..),
        Some(Some(end)) => options.window(offset..end),
        Some(None) => return Err(PyValueError::new_err("offset and length are past any file's end")),
    };
    if mode == "r" {
        options = options.compared();
    }
    let files = Files::of(path)?;
    let backing = if mode == "r" { Backing::ReadOnly } else { Backing::CopyOnWrite };
    let open = || -> Result<Opened, Error> {
        let location = files.locate()?;
        let opened = match backend {
            // SAFETY: that nobody truncates the files, which Python's documentation of `open` puts to the caller.
            Backend::Mmap if edited => return unsafe { options.map_files_shared(&location) },
            // SAFETY: the stable-file contract, which Python's documentation of `open` puts to the caller; no
            // `&[u8]` of the mapping outlives this statement.
            Backend::Mmap => unsafe { options.map_files(&location, backing) },
            Backend::Pread => options.read_into(Readable::Files(location), Into::Owned),
            Backend::Memfd => options.read_into(Readable::Files(location), Into::Sealed(backing)),
        };
        Ok(opened?.shared())
    };
    let reads = backend != Backend::Mmap || populate || lock || verify == "all";
    let opened = if reads { interruptible(py, open)? } else { py.detach(open) }?;
    Ok(Model::new(opened, mode, dense_edits))
}

/// A model of which every tensor is taken at once: as `open(path, backend=backend)`, in fewer steps.
#[pyfunction]
#[pyo3(signature = (path, backend = "mmap"))]
pub(super) fn open_whole(py: Python<'_>, path: &Bound<'_, PyAny>, backend: &str) -> PyResult<Model> {
    if self::backend(backend)? != Backend::Mmap {
        return open(py, path, "c", backend, false, false, "never", false, false, true, 0, None, false);
    }
    let files = Files::of(path)?;
    let opened = py.detach(|| -> Result<Opened, Error> {
        // SAFETY: as in `open`, of which this is a part.
        let opened = unsafe { OpenOptions::new().taken().map_files(&files.locate()?, Backing::CopyOnWrite) };
        Ok(opened?.shared())
    })?;
    Ok(Model::new(opened, "c", false))
}

fn not_a_mode(mode: &str) -> PyErr {
    PyValueError::new_err(format!("mode is \"r\", \"c\" or \"r+\", not {mode:?}"))
}

/// A model from the bytes of a file, copied into aligned memory: `bytes`, a `bytearray` or a `memoryview`.
///
/// >>> import maptensors as mt, numpy as np
/// >>> mt.loads(mt.dumps({"w": np.ones(3, "f4")}))["w"].numpy()
/// array([1., 1., 1.], dtype=float32)
#[pyfunction]
pub(super) fn loads(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Model> {
    let held;
    let bytes = if let Ok(bytes) = data.cast::<PyBytes>() {
        bytes
    } else {
        // What others may write to is copied while the interpreter is held.
        let view = PyMemoryView::from(data).map_err(|_| not_bytes(data))?;
        held = view.call_method0("tobytes")?.cast_into::<PyBytes>()?;
        &held
    };
    let bytes = bytes.as_bytes();
    let read = || OpenOptions::new().read_into(Readable::Content(bytes), Into::Owned);
    Ok(Model::new(py.detach(read)?.shared(), "c", false))
}

fn not_bytes(data: &Bound<'_, PyAny>) -> PyErr {
    PyTypeError::new_err(format!(
        "loads takes the bytes of a file, not {}; a path is opened by maptensors.open",
        class_name(data)
    ))
}

fn class_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "that".into(), |name| name.to_string())
}

/// "never" or "all".
pub(super) fn what_to_verify(verify: &str) -> PyResult<diff::Verify> {
    match verify {
        "never" => Ok(diff::Verify::Never),
        "all" => Ok(diff::Verify::All),
        other => Err(PyValueError::new_err(format!("verify is \"never\" or \"all\", not {other:?}"))),
    }
}
