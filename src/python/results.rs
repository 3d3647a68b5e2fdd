//! What questions are answered with: the named tuples of `maptensors._results`.

use crate::diff::Change;
use crate::map::{Evicted, Residency};
use pyo3::call::PyCallArgs;
use pyo3::prelude::*;

/// A named tuple of this class.
pub(super) fn result<'py>(
    py: Python<'py>,
    class: &str,
    fields: impl PyCallArgs<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    py.import("maptensors._results")?.getattr(class)?.call1(fields)
}

pub(super) fn residency<'py>(py: Python<'py>, found: &Residency) -> PyResult<Bound<'py, PyAny>> {
    let Residency { page_size, pages, resident, touched, private, locked, huge } = *found;
    result(py, "Residency", (page_size, pages, resident, touched, private, locked, huge))
}

pub(super) fn evicted<'py>(py: Python<'py>, found: &Evicted) -> PyResult<Bound<'py, PyAny>> {
    result(py, "Evicted", (found.freed, found.kept, found.remaining))
}

pub(super) fn change<'py>(py: Python<'py>, found: &Change) -> PyResult<Bound<'py, PyAny>> {
    result(py, "Change", (found.elements, found.bytes, found.pages, found.nbytes))
}
