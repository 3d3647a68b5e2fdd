//! `maptensors.Draft`: a file being made in place.

use super::interrupt::{LONG, abandonable};
use super::metadata::{Metadata, metadata as read_metadata};
use super::tensor::Tensor;
use super::{frameworks, import};
use crate::dtype::DType;
use crate::error::{Error, quote};
use crate::layout::Layout;
use crate::map::SharedMemory;
use crate::os::fork::Owner;
use crate::save::{self, DraftOptions, SharedDraft};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A safetensors file being made: allocated and mapped, invisible until `commit()`.
///
/// `draft["w"]` is a writable tensor in the file's own pages; arrays made from it may be written with
/// `out=`, `copy_` or `[...] =`. As a context manager it commits, unless an exception passes through;
/// dropped without a commit it leaves nothing behind. Arrays still held after the commit stay valid and
/// no longer reach the file. It is this process's: in a child that is forked before the commit, an array of it is
/// nothing to touch (SIGSEGV), and committing is an error.
#[pyclass(frozen, mapping, module = "maptensors")]
pub(super) struct Draft {
    layout: Layout,
    memory: Arc<SharedMemory>,
    mapped: bool,
    path: PathBuf,
    /// Until it is committed or closed.
    open: Mutex<Option<SharedDraft>>,
    owner: Owner,
}

impl Draft {
    fn new(draft: save::Draft) -> Result<Self, Error> {
        let draft = SharedDraft::new(draft)?;
        Ok(Self {
            layout: draft.layout().clone(),
            memory: draft.memory().clone(),
            mapped: draft.is_mapped(),
            path: draft.path().to_owned(),
            open: Mutex::new(Some(draft)),
            owner: Owner::me(),
        })
    }

    fn open(&self) -> MutexGuard<'_, Option<SharedDraft>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tensor(&self, name: &str) -> PyResult<Tensor> {
        self.owner.check("this draft")?;
        if self.closed() {
            return Err(PyValueError::new_err("the draft is committed or closed"));
        }
        let missing = || Error::Missing {
            path: self.path.clone(),
            name: name.into(),
            hint: " in the planned layout".into(),
        };
        let info = self.layout.get(name).ok_or_else(missing)?;
        Ok(Tensor::whole(self.memory.clone(), info.bytes().start, info.dtype(), info.shape(), name, false))
    }

    /// A file with bools that are not all 0 or 1 is one that no framework loads.
    fn check_bools(&self) -> Result<(), Error> {
        for info in self.layout.iter().filter(|info| info.dtype() == DType::Bool) {
            match import::largest(&self.memory.source(&info.bytes())) {
                0 | 1 => {}
                found => return Err(import::bad_bool(info.name(), found)),
            }
        }
        Ok(())
    }

    /// What commits it, on any thread. The draft is closed from here on.
    fn finishing(&self) -> Result<impl FnOnce() -> Result<(), Error> + Send + 'static, Error> {
        // First: in a fork's child the lock may be held by a thread that is not there.
        self.owner.check("this draft")?;
        self.check_bools()?;
        let Some(draft) = self.open().take() else {
            return Err(Error::Argument("the draft is committed or closed already".into()));
        };
        Ok(move || draft.commit())
    }
}

#[pymethods]
impl Draft {
    fn __getitem__(&self, name: &str) -> PyResult<Tensor> {
        self.tensor(name)
    }

    /// `draft["w"] = array`: copies the array into the file's pages.
    fn __setitem__(&self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        import::assign(py, &self.tensor(name)?.array(), value)
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> bool {
        name.extract::<&str>().is_ok_and(|name| self.layout.get(name).is_some())
    }

    fn __len__(&self) -> usize {
        self.layout.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        PyList::new(py, self.layout.iter().map(|info| info.name()))?.call_method0("__iter__")
    }

    /// The names, in file order.
    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("collections.abc")?.getattr("KeysView")?.call1((slf,))
    }

    /// The path the file will have.
    #[getter]
    fn path(&self) -> &OsStr {
        self.path.as_os_str()
    }

    /// Whether tensors lie in the file's own pages. False where the file system cannot allocate space
    /// ahead: then `commit` writes them.
    #[getter]
    fn mapped(&self) -> bool {
        self.mapped
    }

    /// Whether the draft has been committed or closed.
    #[getter]
    fn closed(&self) -> bool {
        self.open().is_none()
    }

    /// Copies arrays in, one after the other: from a mapping, or from an iterable of pairs of which only one
    /// is held at a time, so that a generator needs the memory of its largest tensor. `progress`, if given,
    /// is called with the bytes copied and their total. Each tensor of the spec must be among them.
    #[pyo3(signature = (tensors, *, progress = None))]
    fn fill(
        &self,
        py: Python<'_>,
        tensors: &Bound<'_, PyAny>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let pairs = if tensors.hasattr("items")? { tensors.call_method0("items")? } else { tensors.clone() };
        let mut missing = vec![true; self.layout.len()];
        let mut done = 0;
        for pair in pairs.try_iter()? {
            let (name, array): (String, Bound<'_, PyAny>) = pair?.extract()?;
            import::assign(py, &self.tensor(&name)?.array(), &array)?;
            if let Some(index) = self.layout.position(&name) {
                missing[index] = false;
                done += self.layout.at(index).map_or(0, |info| info.nbytes());
            }
            if let Some(progress) = &progress {
                progress.call1((done, self.layout.data_len()))?;
            }
            py.check_signals()?;
        }
        let forgotten: Vec<_> = self.layout.iter().zip(&missing).filter(|(_, missing)| **missing).collect();
        let Some((first, _)) = forgotten.first() else { return Ok(()) };
        let (name, more) = (quote(first.name()), forgotten.len() - 1);
        let more = if more == 0 { String::new() } else { format!(", nor were {more} more") };
        Err(PyValueError::new_err(format!("tensor {name} of the draft was not given{more}")))
    }

    /// Syncs the file and renames it into place. `MovedError`: the directory was moved since the draft was begun, or
    /// a link to it points elsewhere; the file is saved in that directory, whole, and the error says where it is now.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        let finish = self.finishing()?;
        let commit = self.layout.data_len() >= LONG;
        Ok(if commit { abandonable(py, finish)? } else { py.detach(finish) }?)
    }

    /// Gives the file up, if it is not committed: nothing is left behind.
    fn close(&self) {
        self.open().take();
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, _exc, _traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        _exc: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        if !exc_type.is_none() {
            self.close();
        } else if !self.closed() {
            let done = self.commit(py);
            self.close();
            return done;
        }
        Ok(())
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { ", closed" } else { "" };
        let path = quote(&self.path.to_string_lossy());
        format!("Draft({path}, {} tensors{state})", self.layout.len())
    }
}

/// Allocates and maps a new file for the tensors of `spec`. With `checksums` the commit puts one for each
/// tensor into the file's metadata. A name that says another kind of file is refused; a sharded set of the file's name
/// goes when it is committed.
#[pyfunction]
#[pyo3(signature = (path, spec, *, metadata = None, durable = true, mapped = true, checksums = false))]
pub(super) fn create(
    py: Python<'_>,
    path: PathBuf,
    spec: &Bound<'_, PyAny>,
    #[pyo3(from_py_with = read_metadata)] metadata: Metadata,
    durable: bool,
    mapped: bool,
    checksums: bool,
) -> PyResult<Draft> {
    let layout = planned(spec, metadata)?;
    let made = py.detach(|| {
        let options = DraftOptions::new().durable(durable).mapped(mapped).checksums(checksums);
        options.create(&path, &layout).and_then(Draft::new)
    });
    Ok(made?)
}

/// The layout of a spec: names, and what each tensor is.
pub(super) fn planned(spec: &Bound<'_, PyAny>, metadata: Metadata) -> PyResult<Layout> {
    let mut builder = Layout::builder().with_metadata(metadata);
    let mut declarations = Vec::new();
    for item in spec.call_method0("items")?.try_iter()? {
        let (name, what): (String, Bound<'_, PyAny>) = item?.extract()?;
        let what = declared(&name, &what)?;
        declarations.push((name, what));
    }
    let held = declarations.iter().filter_map(|(_, what)| match what {
        Declared::Like(held) => Some(held),
        Declared::As(..) => None,
    });
    let _out = import::out_of_modes(spec.py(), held)?;
    for (name, what) in &declarations {
        builder = match what {
            Declared::As(dtype, shape) => builder.tensor(name, *dtype, shape),
            Declared::Like(held) => {
                let given = held.look(name)?;
                builder.tensor(name, given.dtype, &given.shape)
            }
        };
    }
    Ok(builder.build()?)
}

/// What a spec says of a tensor.
enum Declared<'py> {
    As(DType, Vec<usize>),
    Like(import::Held<'py>),
}

/// `("F32", (2, 3))`, `{"dtype": …, "shape": …}`, or an array to be like.
fn declared<'py>(name: &str, what: &Bound<'py, PyAny>) -> PyResult<Declared<'py>> {
    if let Ok(pair) = what.cast::<PyTuple>() {
        let (dtype, shape): (Bound<'_, PyAny>, Bound<'_, PyAny>) =
            pair.extract().map_err(|_| no_spec(name, what))?;
        let shape = shape_of(name, &shape)?;
        return Ok(Declared::As(frameworks::parse_dtype(name, &dtype)?, shape));
    }
    if let Ok(dict) = what.cast::<PyDict>() {
        let part = |key: &str| {
            dict.get_item(key)?.ok_or_else(|| {
                PyValueError::new_err(format!("the spec of tensor {} has no {key:?}", quote(name)))
            })
        };
        let dtype = frameworks::parse_dtype(name, &part("dtype")?)?;
        return Ok(Declared::As(dtype, shape_of(name, &part("shape")?)?));
    }
    import::hold(name, what).map(Declared::Like)
}

fn shape_of(name: &str, shape: &Bound<'_, PyAny>) -> PyResult<Vec<usize>> {
    shape.extract().map_err(|error| {
        let text = format!("tensor {} has the shape {shape}, which is none: {error}", quote(name));
        PyValueError::new_err(text)
    })
}

fn no_spec(name: &str, what: &Bound<'_, PyAny>) -> PyErr {
    let text = format!("tensor {} is declared as {what}, expected (dtype, shape)", quote(name));
    PyValueError::new_err(text)
}
