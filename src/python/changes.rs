//! `maptensors.Changes`: which tensors changed, and by how much.

use super::results;
use crate::diff;
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyList;

/// Which tensors changed: a mapping from their names, in file order, to a `Change` each: `elements`
/// and `bytes` that differ, `pages` that hold them, and the tensor's `nbytes`. False if nothing changed.
#[pyclass(frozen, mapping, module = "maptensors")]
pub(super) struct Changes {
    inner: diff::Changes,
}

impl From<diff::Changes> for Changes {
    fn from(inner: diff::Changes) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl Changes {
    /// Elements that changed, of all tensors. Where elements are packed several to the byte, bytes count.
    #[getter]
    fn elements(&self) -> usize {
        self.inner.elements()
    }

    /// Bytes that those elements take.
    #[getter]
    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    /// Pages of the model that are this process's own, changed or not.
    #[getter]
    fn private_pages(&self) -> usize {
        self.inner.private_pages()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let change = self.inner.get(name).ok_or_else(|| PyKeyError::new_err(name.to_owned()))?;
        results::change(py, change)
    }

    /// What changed of the tensor called `name`, or `default`.
    #[pyo3(signature = (name, default = None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        default: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.inner.get(name) {
            Some(change) => Ok(Some(results::change(py, change)?)),
            None => Ok(default),
        }
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> bool {
        name.extract::<&str>().is_ok_and(|name| self.inner.contains(name))
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        PyList::new(py, self.inner.iter().map(|change| &change.name))?.call_method0("__iter__")
    }

    /// The names of the tensors that changed, in file order.
    fn keys<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("collections.abc")?.getattr("KeysView")?.call1((slf,))
    }

    /// How much of each.
    fn values<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("collections.abc")?.getattr("ValuesView")?.call1((slf,))
    }

    /// Names and how much of each.
    fn items<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("collections.abc")?.getattr("ItemsView")?.call1((slf,))
    }

    fn __repr__(&self) -> String {
        let names: Vec<String> =
            self.inner.iter().take(3).map(|change| crate::error::quote(&change.name)).collect();
        let more = if self.inner.len() > names.len() { ", …" } else { "" };
        format!(
            "Changes({} tensors: {}{more}; {} elements, {} bytes)",
            self.inner.len(),
            names.join(", "),
            self.inner.elements(),
            self.inner.bytes()
        )
    }
}
